"""DeepSeekV3 cut into the stages of a pipeline: the embedding first, norm, head and MTP last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsv3_kernels.model import DeepSeekV3, ModelConfig
from dsv3_kernels.train.executor import window_losses


@dataclass(frozen=True)
class Stage:
    """Number `index` of `count`, and the blocks in it."""

    index: int
    count: int
    blocks: range

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1


def split(config: ModelConfig, count: int) -> list[Stage]:
    """As even as may be; an MTP module weighs as much as a block, and the first stages take what is over.

    Raises ValueError where a stage would be left empty.
    """
    blocks, modules = config.num_hidden_layers, config.num_nextn_predict_layers
    most = blocks + (modules > 0)
    if not 1 <= count <= most:
        beside = " and the MTP modules one more" if modules else ""
        raise ValueError(
            f"split: cannot cut {blocks} blocks into {count} stages, expected 1 to {most}: each of them "
            f"takes a block{beside}. Mend: fewer pipeline ranks, or a schedule with fewer stages"
        )
    in_last = blocks if count == 1 else max((blocks + modules) // count - modules, 0)
    each, over = divmod(blocks - in_last, max(count - 1, 1))
    sizes = [each + (i < over) for i in range(count - 1)] + [in_last]
    starts = [sum(sizes[:i]) for i in range(count)]
    return [Stage(i, count, range(a, a + n)) for i, (a, n) in enumerate(zip(starts, sizes, strict=True))]


def layers_of(config: ModelConfig, stages: Sequence[Stage]) -> set[str]:
    """What these stages need of the model, by name.

    With MTP modules the last stage needs the embedding too: on a rank that has the first stage as well it is
    the same one, elsewhere a copy.
    """
    layers = {f"blocks.{i}" for stage in stages for i in stage.blocks}
    last = any(stage.last for stage in stages)
    if last:
        layers |= {"norm", "head", "mtp"}
    if any(stage.first for stage in stages) or (last and config.num_nextn_predict_layers):
        layers.add("embedding")
    return layers


class Absent(nn.Module):
    """Where a layer that another rank holds would be."""


def cut(model: DeepSeekV3, stages: Sequence[Stage]) -> DeepSeekV3:
    """Leaves the model, in place, with what these stages need; names stay, parameters of others are freed."""
    kept = layers_of(model.config, stages)
    for i in range(len(model.blocks)):
        if f"blocks.{i}" not in kept:
            model.blocks[i] = Absent()
    for name in {"embedding", "norm", "head"} - kept:
        model.add_module(name, Absent())
    if "mtp" not in kept:
        model.mtp = nn.ModuleList()
    return model


class Output(NamedTuple):
    """hidden: [B, S, hidden], None from the last stage. loss: this stage's share of the weighted loss, None
    where it has none; losses: main, mtp, balance, FP32 [3], this stage's share of each, without gradient.
    """

    hidden: Tensor | None
    loss: Tensor | None
    losses: Tensor


class StageRunner:
    """Forward of the stages that a cut model has."""

    def __init__(self, model: DeepSeekV3, mtp_weight: float, balance_weight: float) -> None:
        config = model.config
        self._model = model
        self._mtp_weight, self._balance_weight = mtp_weight, balance_weight
        self._depth = config.num_nextn_predict_layers
        dense = min(config.first_k_dense_replace, config.num_hidden_layers)
        self._balanced = config.num_hidden_layers - dense + self._depth

    def forward(self, stage: Stage, window: Tensor, hidden: Tensor | None) -> Output:
        """window: int64 [B, S + 1 + D]. hidden: what the stage before returned, None for the first."""
        cos, sin = self._model.rope(0, window.shape[1] - 1 - self._depth)
        hidden, balances = self._blocks(stage, window, hidden, cos, sin)
        zero = torch.zeros((), device=hidden.device)
        if not stage.last:
            balance = torch.stack(balances).sum() / self._balanced if balances else None
            loss = None if balance is None else self._balance_weight * balance
            shares = (zero, zero, zero if balance is None else balance)
            return Output(hidden, loss, _detached(shares))
        main, mtp, more = self._model.predictions(hidden, window, cos, sin)
        balances = balances + more
        balance = torch.stack(balances).sum() / self._balanced if balances else zero
        loss = main + self._mtp_weight * mtp + self._balance_weight * balance
        return Output(None, loss, _detached((main, mtp, balance)))

    def evaluate(self, stage: Stage, windows: Tensor, hidden: Tensor | None) -> Tensor:
        """windows: int64 [B, S + 1]. Returns the next stage's input, the last stage each loss, [B]."""
        model = self._model
        cos, sin = model.rope(0, windows.shape[1] - 1)
        hidden, _ = self._blocks(stage, windows, hidden, cos, sin)
        return window_losses(model.logits(model.norm(hidden)), windows) if stage.last else hidden

    def _blocks(
        self, stage: Stage, window: Tensor, hidden: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The state after the stage's blocks, and their balance losses."""
        model = self._model
        if hidden is None:
            hidden = model.embedding(window[:, : len(cos)])
        balances: list[Tensor] = []
        for i in stage.blocks:
            hidden, balance = model.blocks[i](hidden, cos, sin)
            if balance is not None:
                balances.append(balance)
        return hidden, balances


def _detached(shares: Sequence[Tensor]) -> Tensor:
    return torch.stack([share.detach().to(shares[0].device, torch.float32) for share in shares])
