"""One model in training: a step, its validation, and what a checkpoint of it holds."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_kernels.model import DeepSeekV3, ModelConfig
from dsv3_kernels.nn import Fp8Recipe, set_recipe
from dsv3_kernels.nn.recipe import Precision
from dsv3_kernels.train import checkpoint, schedule
from dsv3_kernels.train.config import TrainConfig, from_json, to_json
from dsv3_kernels.train.data import Batches, Corpus
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.optimizer import AdamW

FORMAT = 1


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
    seconds: float
    tokens_per_second: float


class Trainer:
    """The model at one precision, its optimizer, and its place in the data.

    All randomness is a function of (seed, step), so the state is the weights, the moments, the expert biases
    and the step.
    """

    def __init__(self, model: ModelConfig, train: TrainConfig, precision: Precision, corpus: Corpus) -> None:
        self.config, self.precision, self.corpus = train, precision, corpus
        self.recipe = Fp8Recipe(precision, power_of_2_scales=train.power_of_2_scales)
        self.model = DeepSeekV3(model, self.recipe)
        self.model.initialize(train.seed)
        self.optimizer = AdamW(self.model.named_parameters(), weight_decay=train.weight_decay)
        self.model.bfloat16()
        self.optimizer.write_parameters()
        self.step = 0
        window = train.seq_len + 1 + model.num_nextn_predict_layers
        self.batches = Batches(corpus.train, window, train.batch_size, train.seed)

    def train_step(self) -> StepMetrics:
        """One update. Raises TrainError, the weights untouched, where loss or gradients are not finite."""
        start = time.perf_counter()
        self.model.train()
        losses = self.model.losses(self.batches.batch(self.step))
        weight = schedule.mtp_weight(self.step, self.config)
        loss = losses.main + weight * losses.mtp + self.config.balance_weight * losses.balance
        self._require_finite(loss, "loss")
        loss.backward()
        norm = self.optimizer.gather_gradients()
        self._require_finite(norm, "gradient norm")
        lr = schedule.learning_rate(self.step, self.config)
        self.optimizer.step(lr, min(1.0, self.config.grad_clip / max(norm.item(), 1e-12)))
        load = self._balance_experts()
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
            expert_load=load,
            seconds=seconds,
            tokens_per_second=self.config.batch_size * self.config.seq_len / seconds,
        )

    def _require_finite(self, value: Tensor, what: str) -> None:
        if not math.isfinite(value.item()):
            raise TrainError(
                f"{self.precision}: the {what} of step {self.step + 1} is {value.item()}; "
                "stopped before its update. Mend: a smaller --lr or more --warmup-steps"
            )

    def _balance_experts(self) -> float:
        speed = schedule.bias_speed(self.step, self.config)
        worst = 1.0
        for gate in self.model.gates():
            worst = max(worst, (gate.load.max() / gate.load.mean()).item())
            gate.balance(speed)
        return worst

    @torch.no_grad()
    def evaluate(self, windows: Tensor, precision: Precision | None = None) -> float:
        """Mean loss over windows [n, seq_len + 1 + D], in the trainer's precision or in another."""
        self.model.eval()
        if precision is not None:
            set_recipe(self.model, Fp8Recipe(precision, self.recipe.power_of_2_scales))
        total = 0.0
        for batch in windows.split(self.config.batch_size):
            total += self.model.next_token_loss(batch[:, : self.config.seq_len + 1]).item() * len(batch)
        set_recipe(self.model, self.recipe)
        return total / len(windows)

    def _tensors(self) -> dict[str, Tensor]:
        biases = {
            f"buffer/{name}": buffer
            for name, buffer in self.model.state_dict().items()
            if name.endswith(".bias")
        }
        return self.optimizer.tensors() | biases

    def _state(self, step: int) -> dict[str, Any]:
        """state.json of a checkpoint at the step."""
        return {
            "format": FORMAT,
            "precision": self.precision,
            "step": step,
            "samples": step * self.config.batch_size,
            "text_sha256": self.corpus.sha256,
            "model": to_json(self.model.config),
            "train": to_json(self.config),
        }

    def save(self, folder: Path, keep: int) -> Path:
        return checkpoint.save(folder, self.step, self._tensors(), self._state(self.step), keep)

    def load(self, folder: Path) -> None:
        """Goes on from the checkpoint in folder; it must be of the same settings (but steps) and text."""
        tensors, found = checkpoint.load(folder)
        where = f"the checkpoint in {folder}"
        step = found.get("step")
        if type(step) is not int or step < 0:
            raise TrainError(f"{where}: step is {step!r}, expected an integer from 0 up")
        expected = self._state(step)
        if found.keys() != expected.keys():
            raise TrainError(f"{where}: its state has keys {sorted(found)}, expected {sorted(expected)}")
        from_json(ModelConfig, found["model"], f"{where}: model")
        train = asdict(from_json(TrainConfig, found["train"], f"{where}: train"))
        found["train"] = train | {"steps": self.config.steps}
        for name in expected:
            if found[name] != expected[name]:
                raise TrainError(f"{where}: {_difference(name, found[name], expected[name])}")
        checkpoint.copy_checked(tensors, self._tensors(), where)
        self.optimizer.steps = self.step = step
        self.optimizer.write_parameters()


def _difference(name: str, found: Any, expected: Any) -> str:
    if isinstance(found, dict):
        name, found, expected = next(
            (f"{name}.{key}", found[key], expected[key]) for key in expected if found[key] != expected[key]
        )
    if name == "text_sha256":
        return "its text was another (the data has changed since), so the same batches cannot go on"
    return f"{name} is {found!r}, expected {expected!r}"
