"""One model in training: a step, its validation, and what a checkpoint of it holds."""

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_kernels.ep import Buffer
from dsv3_kernels.model import DeepSeekV3, Losses, ModelConfig
from dsv3_kernels.nn import Fp8Recipe, set_recipe
from dsv3_kernels.nn.gate import Gate
from dsv3_kernels.nn.recipe import RECOMPUTE, Precision
from dsv3_kernels.train import schedule
from dsv3_kernels.train.config import ParallelConfig, TrainConfig, from_json, to_json
from dsv3_kernels.train.data.corpus import Batches, Corpus
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.executor import Executor, LocalExecutor
from dsv3_kernels.train.observe import not_finite
from dsv3_kernels.train.parallel.groups import Groups, Layout, add_up, gather, named_parameters, rank_in
from dsv3_kernels.train.pipeline.executor import PipelineExecutor
from dsv3_kernels.train.pipeline.schedules import SCHEDULES
from dsv3_kernels.train.state.checkpoint import Checkpoint
from dsv3_kernels.train.state.ema import Ema
from dsv3_kernels.train.state.optimizer import AdamW, Piece
from dsv3_kernels.train.state.saver import Saver


@dataclass(frozen=True)
class StepMetrics:
    """One row of metrics.jsonl. Losses are nats a byte, before the step's update."""

    precision: str
    step: int
    loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    lr: float
    expert_load: float
    """The most loaded expert's share of the mean load, the worst of the layers."""
    expert_loads: tuple[float, ...]
    """The same of each layer, the MTP modules' last."""
    seconds: float
    tokens_per_second: float
    skipped: str | None = None
    """Why the step made no update, where it made none."""


class Trainer:
    """The model at one precision, or this rank's part of it, its optimizer, and its place in the data.

    All randomness is a function of (seed, step), so the state is the weights, the moments, the expert biases
    and the step. Every method is called on all ranks together.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        precision: Precision,
        corpus: Corpus,
        parallel: ParallelConfig | None = None,
        groups: Groups | None = None,
        saver: Saver | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """groups: this rank's, by default of a process alone. saver: one for all trainers of the groups.

        dtype: of the weights that the model computes with, and of what moves between experts; float32 is for
        checks of many processes against one.
        """
        self.config, self.precision, self.corpus, self.model_config = train, precision, corpus, model
        self.parallel = parallel or ParallelConfig()
        self.groups = groups or Groups(Layout())
        self.layout, self.device, self.dtype = self.groups.layout, torch.device(device), dtype
        for batch_size in {schedule.batch_size(step, train) for step in range(train.steps)}:
            self.layout.check(model, batch_size, self.parallel.micro_batches)
        recompute = RECOMPUTE if train.recompute else ()
        self.recipe = Fp8Recipe(precision, train.power_of_2_scales, recompute=recompute)
        buffer = self._buffer()
        with torch.device("meta"):  # memory is for what is left of it on this rank
            self.model = DeepSeekV3(model, self.recipe, buffer)
        self.executor = _executor(self.model, self.parallel, self.groups)
        _require_room(self.model, self.device)
        self.model.to_empty(device=self.device)
        self.model.initialize(train.seed)
        self.optimizer = AdamW(
            named_parameters(self.executor),
            weight_decay=train.weight_decay,
            placements=self.groups.placements(self.executor),
            world=self.groups.world,
            shares=self.layout.shares,
        )
        self.model.to(dtype)
        self.optimizer.write_parameters()
        self.step = 0
        window = train.seq_len + 1 + model.num_nextn_predict_layers
        self.ema = None if train.ema is None else Ema(self.optimizer.masters(), train.ema)
        self.batches = Batches(corpus.train, window, train.batch_size, train.seed, corpus.vocab_size)
        self.saver = saver or Saver(self.groups.saving)

    def _buffer(self) -> Buffer | None:
        """The all-to-all, where experts are spread."""
        if self.layout.ep == 1:
            return None
        tokens = self.config.batch_size // self.layout.shares * self.config.seq_len
        model = self.model_config
        return Buffer(
            self.groups.experts,
            model.n_routed_experts,
            model.hidden_size,
            tokens,
            model.num_experts_per_tok,
            dtype=self.dtype,
            timeout=self.parallel.timeout,
        )

    def train_step(self) -> StepMetrics:
        """One update; none where loss or gradients are not finite: TrainError, or on, as configured."""
        start = time.perf_counter()
        losses = self._forward_backward()
        weight = schedule.mtp_weight(self.step, self.config)
        loss = losses.main + weight * losses.mtp + self.config.balance_weight * losses.balance
        norm = self.optimizer.gather_gradients()
        lr = schedule.learning_rate(self.step, self.config)
        skipped = self._not_finite(loss.item(), norm.item())
        if skipped is None:
            if self.ema is not None:
                self.ema.before_write()
            self.optimizer.step(lr, min(1.0, self.config.grad_clip / max(norm.item(), 1e-12)))
            if self.ema is not None:
                self.ema.update(self.step + 1)
        speed = schedule.bias_speed(self.step, self.config) if skipped is None else 0.0
        loads = self._balance_experts(speed)
        sequences = schedule.batch_size(self.step, self.config)
        self.step += 1
        seconds = time.perf_counter() - start
        return StepMetrics(
            precision=self.precision,
            step=self.step,
            loss=losses.main.item(),
            mtp_loss=losses.mtp.item(),
            balance_loss=losses.balance.item(),
            grad_norm=norm.item(),
            lr=lr,
            expert_load=max(loads, default=1.0),
            expert_loads=tuple(loads),
            seconds=seconds,
            tokens_per_second=sequences * self.config.seq_len / seconds,
            skipped=skipped,
        )

    def _forward_backward(self) -> Losses:
        """Gradients of this rank's share of the step's sequences; the losses of all of them."""
        for part in self.executor.modules:
            part.train()
        count = schedule.batch_size(self.step, self.config) // self.layout.shares
        first = schedule.first_sample(self.step, self.config) + self.layout.share(self.groups.rank) * count
        windows = self.batches.samples(first, count).to(self.device)
        self.optimizer.zero_gradients()
        losses = self.executor.forward_backward(
            windows.unflatten(0, (self.parallel.micro_batches, -1)),
            schedule.mtp_weight(self.step, self.config),
            self.config.balance_weight,
        )
        if self.layout.shares == 1:
            return losses
        values = torch.stack([losses.main, losses.mtp, losses.balance]).double()
        mean = add_up(values, self.groups.dense) / self.layout.shares
        return Losses(*mean.float())

    def _not_finite(self, loss: float, norm: float) -> str | None:
        """Why there must be no update, or None. Raises it as an error unless steps are to be skipped."""
        if math.isfinite(loss) and math.isfinite(norm):
            return None
        control = self.groups.control
        if math.isfinite(loss):
            what, value = "gradient norm", norm
            where = not_finite.layer_of_gradient(self.executor, self.optimizer.not_finite(), control)
        else:
            what, value = "loss", loss
            gates = self._gates()
            loads = [gate.load.clone() for gate in gates.values()]
            where = not_finite.layer_of_loss(self.executor, self._forward_backward, control)
            for gate, load in zip(gates.values(), loads, strict=True):
                gate.load.copy_(load)
            for _, parameter in named_parameters(self.executor):
                parameter.grad = None
        reason = f"the {what} of step {self.step + 1} is {value}; first not finite: {where}"
        if self.config.on_not_finite == "skip":
            return reason
        self.saver.wait()
        raise TrainError(
            f"{self.precision}: {reason}; stopped before its update. "
            "Mend: a smaller --lr or more --warmup-steps, or --on-not-finite skip"
        )

    def _gates(self) -> dict[str, Gate]:
        modules = (item for part in self.executor.modules for item in part.named_modules())
        return {name: module for name, module in modules if isinstance(module, Gate)}

    def _gate_group(self, name: str) -> "dist.ProcessGroup | None":
        return self.groups.replicas(self.executor, f"{name}.weight")

    def _balance_experts(self, speed: float) -> list[float]:
        """Moves the biases by the loads of the whole step. Returns max/mean of each layer, MTP's last."""
        by_group: dict[Any, list[tuple[str, Gate]]] = {}
        for name, gate in self._gates().items():
            by_group.setdefault(self._gate_group(name), []).append((name, gate))
        shares: dict[str, float] = {}
        for group, gates in by_group.items():
            loads = add_up(torch.stack([gate.load for _, gate in gates]), group)
            for (name, gate), load in zip(gates, loads, strict=True):
                shares[name] = (load.max() / load.mean()).item()
                gate.load.copy_(load)
                gate.balance(speed)
        everywhere = {
            name: share for part in gather(shares, self.groups.control) for name, share in part.items()
        }
        return [everywhere[name] for name in sorted(everywhere, key=_layer)]

    @torch.no_grad()
    def evaluate(self, windows: Tensor, precision: Precision | None = None) -> float:
        """Mean loss over windows [n, seq_len + 1 + D], in the trainer's precision or in another."""
        for part in self.executor.modules:
            part.eval()
        if precision is not None:
            self._set_recipe(Fp8Recipe(precision, self.recipe.power_of_2_scales))
        windows = windows[:, : self.config.seq_len + 1].to(self.device)
        mean = self._evaluate_alone(windows) if self.layout.world == 1 else self._evaluate_share(windows)
        self._set_recipe(self.recipe)
        return mean

    def evaluate_average(self, windows: Tensor) -> float | None:
        """As `evaluate`, of the average of the weights, if one is kept."""
        if self.ema is None:
            return None
        with self.ema.in_place(self.optimizer.write_parameters):
            return self.evaluate(windows)

    def _set_recipe(self, recipe: Fp8Recipe) -> None:
        for part in self.executor.modules:
            set_recipe(part, recipe)

    def _evaluate_alone(self, windows: Tensor) -> float:
        total = 0.0
        for batch in windows.split(self.config.batch_size):
            total += self.model.next_token_loss(batch).item() * len(batch)
        return total / len(windows)

    def _evaluate_share(self, windows: Tensor) -> float:
        """Every rank takes as many windows, so that all call together; those past the last count nothing."""
        shares, share = self.layout.shares, self.layout.share(self.groups.rank)
        each = -(-len(windows) // shares)
        indices = torch.arange(share * each, (share + 1) * each, device=windows.device)
        mine, counted = windows[indices % len(windows)], indices < len(windows)
        losses = [self.executor.window_losses(b) for b in mine.split(self.config.batch_size // shares)]
        total = torch.where(counted, torch.cat(losses).double(), 0.0).sum()
        return add_up(total, self.groups.dense).item() / len(windows)

    def _pieces(self, *, owned: bool) -> dict[str, Piece]:
        """This rank's part of the state; owned: without the expert biases that another rank writes."""
        biases = {
            f"buffer/{name}.bias": Piece(gate.bias, 0, gate.bias.shape)
            for name, gate in self._gates().items()
            if not owned or rank_in(self._gate_group(name)) == 0
        }
        pieces = self.optimizer.pieces() | biases
        if self.ema is not None:
            for name, average in self.ema.tensors().items():
                master = pieces[f"master/{name}"]
                pieces[f"ema/{name}"] = Piece(average, master.first, master.shape)
        return pieces

    def _state(self, step: int) -> dict[str, Any]:
        """The manifest's state of a checkpoint at the step."""
        return {
            "precision": self.precision,
            "step": step,
            "updates": self.optimizer.steps,
            "samples": schedule.first_sample(step, self.config),
            "text_sha256": self.corpus.sha256,
            "model": to_json(self.model_config),
            "train": to_json(self.config),
        }

    def save(self, folder: Path, keep: int) -> None:
        """Begins a checkpoint of what is now; `saver.wait()` says when it is on the disk."""
        self.saver.submit(folder, self.step, self._pieces(owned=True), self._state(self.step), keep)

    def load(self, folder: Path) -> None:
        """Goes on from the checkpoint in folder; it must be of the same settings (but steps) and text.

        Any layout of processes may have written it.
        """
        found = Checkpoint(folder, self.groups.control)
        where = f"the checkpoint in {folder}"
        state = found.state
        for name in ("step", "updates"):
            if type(state.get(name)) is not int or state[name] < 0:
                raise TrainError(f"{where}: {name} is {state.get(name)!r}, expected an integer from 0 up")
        expected = self._state(state["step"]) | {"updates": state["updates"]}
        if state.keys() != expected.keys():
            raise TrainError(f"{where}: its state has keys {sorted(state)}, expected {sorted(expected)}")
        from_json(ModelConfig, state["model"], f"{where}: model")
        train = asdict(from_json(TrainConfig, state["train"], f"{where}: train"))
        state["train"] = train | {"steps": self.config.steps, "on_not_finite": self.config.on_not_finite}
        state["train"] |= {"recompute": self.config.recompute}
        for name in expected:
            if state[name] != expected[name]:
                raise TrainError(f"{where}: {_difference(name, state[name], expected[name])}")
        pieces = self._pieces(owned=False)
        names = {name for rank in gather(sorted(pieces), self.groups.control) for name in rank}
        found.read(pieces, names)
        self.optimizer.steps, self.step = state["updates"], state["step"]
        self.optimizer.write_parameters()


def _require_room(model: DeepSeekV3, device: torch.device) -> None:
    """Raises TrainError where weights and gradients alone are more than the machine has for this rank."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        there = memory // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 8 * count > there:
        needed, room = (f"{size / 2**30:,.0f} GiB" for size in (8 * count, there))
        raise TrainError(
            f"this rank's part of the model has {count / 1e6:,.0f} million parameters, with gradients "
            f"{needed} in FP32, expected at most the {room} that it has on {device}. Mend: more --pp or "
            "--ep; --plan prints what each rank would hold"
        )


def _executor(model: DeepSeekV3, parallel: ParallelConfig, groups: Groups) -> Executor:
    """What runs a step. A pipeline's removes from the model what other ranks hold."""
    if parallel.pp == 1:
        return LocalExecutor(model)
    try:
        SCHEDULES[parallel.pp_schedule](parallel.pp, parallel.micro_batches)
        return PipelineExecutor(model, parallel.pp_schedule, groups.pipeline)
    except ValueError as error:
        raise TrainError(f"--pp {parallel.pp} --pp-schedule {parallel.pp_schedule}: {error}") from error


def _layer(name: str) -> tuple[bool, int]:
    """Sorts names of modules by layer, MTP modules last."""
    part, number = name.split(".")[:2]
    return part == "mtp", int(number)


def _difference(name: str, found: Any, expected: Any) -> str:
    if isinstance(found, dict):
        name, found, expected = next(
            (f"{name}.{key}", found[key], expected[key]) for key in expected if found[key] != expected[key]
        )
    if name == "text_sha256":
        return "its text was another (the data has changed since), so the same batches cannot go on"
    return f"{name} is {found!r}, expected {expected!r}"
