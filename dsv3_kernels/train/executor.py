"""Who runs forward and backward of the micro-batches of a step: one process, or the ranks of a pipeline."""

import contextlib
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_kernels.model import DeepSeekV3, Losses
from dsv3_kernels.nn import constant_weights


class Executor(Protocol):
    """What the trainer knows of a pipeline.

    modules: the parts of the model that this rank holds, their parameters under the whole model's names
        ("blocks.3.attention..."). Where several ranks of a pipeline hold one, each gets a part of its
        gradient, which is the sum; so it is with the loads that the gates count.
    replicated: names of the parameters that rank P - 1 - r of the pipeline holds too, this one being r.
    """

    @property
    def modules(self) -> Sequence[nn.Module]: ...

    @property
    def replicated(self) -> Collection[str]: ...

    def forward_backward(self, windows: Tensor, mtp_weight: float, balance_weight: float) -> Losses:
        """Adds to `grad` the gradient of the mean over the micro-batches, and returns their mean losses.

        windows: int64 [M, B, S + 1 + D], the M micro-batches of this data-parallel rank, the same on all
            ranks of the pipeline.
        The loss of one is main + mtp_weight · mtp + balance_weight · balance. All ranks get the same losses.
        """
        ...

    def window_losses(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy of the next token of each window, int64 [B, S + 1]: [B], on all ranks."""
        ...


class LocalExecutor:
    """The whole model in one process, a micro-batch after the other."""

    def __init__(self, model: DeepSeekV3) -> None:
        self.modules: list[nn.Module] = [model]
        self.replicated: frozenset[str] = frozenset()
        self._model = model

    def forward_backward(self, windows: Tensor, mtp_weight: float, balance_weight: float) -> Losses:
        check_windows(windows)
        count = len(windows)
        total = torch.zeros(3, device=windows.device)
        with constant_weights() if count > 1 else contextlib.nullcontext():
            for window in windows:
                losses = self._model.losses(window)
                loss = losses.main + mtp_weight * losses.mtp + balance_weight * losses.balance
                (loss / count).backward()
                parts = (losses.main, losses.mtp, losses.balance)
                total += torch.stack([part.detach().to(total) for part in parts])
        return Losses(*(total / count))

    @torch.no_grad()
    def window_losses(self, windows: Tensor) -> Tensor:
        return window_losses(self._model(windows[:, :-1]), windows)


def window_losses(logits: Tensor, windows: Tensor) -> Tensor:
    """logits: [B, S, vocab_size], of windows, int64 [B, S + 1]. Returns the mean loss of each, [B]."""
    losses = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1).mean(1)


def check_windows(windows: Tensor) -> None:
    if windows.dim() != 3 or windows.dtype != torch.int64 or 0 in windows.shape:
        raise ValueError(
            f"forward_backward: windows is {windows.dtype} of shape {tuple(windows.shape)}, expected "
            "torch.int64 [micro-batches, sequences, S + 1 + D], none of them 0"
        )
