"""Settings of a run, and their JSON form, which is checked field by field when read back."""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from dsv3_kernels.model import PRESETS, ModelConfig
from dsv3_kernels.nn.recipe import Precision
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.phases import Schedule, resolve

T = TypeVar("T")
PipelineSchedule = Literal["dualpipe", "dualpipev", "1f1b", "zb1p"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything the weights after a step depend on, beside the model's sizes and the text."""

    steps: int = 120
    batch_size: int = 8
    seq_len: int = 128
    seed: int = 0
    lr: float = 1e-3
    final_lr: float = 0.1
    """The learning rate of the last step, as a fraction of the highest."""
    warmup_steps: int = 20
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    bias_speed: float = 5e-3
    power_of_2_scales: bool = False
    on_not_finite: Literal["stop", "skip"] = "stop"
    """What to do where loss or gradients are not finite; a step that is skipped changes no weight."""
    schedule: Schedule | None = None
    """None: a cosine right after the warm-up, and one batch size."""
    ema: float | None = None
    """The decay of an average of the weights that is kept in CPU memory; None keeps none."""
    recompute: bool | None = None
    """Whether the backward makes again what it can (`Fp8Recipe.recompute`); no weight depends on it."""

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("seq_len", 1), ("seed", 0), ("warmup_steps", 0)):
            if getattr(self, name) < low:
                raise TrainError(f"{name} is {getattr(self, name)}, expected at least {low}")
        for name in ("lr", "final_lr", "weight_decay", "mtp_weight", "balance_weight", "bias_speed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise TrainError(f"{name} is {getattr(self, name)}, expected a finite number from 0 up")
        if not self.grad_clip > 0:
            raise TrainError(f"grad_clip is {self.grad_clip}, expected a number above 0")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise TrainError(f"ema is {self.ema}, expected a number from 0 up to, and without, 1")
        resolve(self.schedule, self.steps, self.batch_size, self.seq_len, self.warmup_steps)


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over processes; how many of them there are says the rest (data parallel)."""

    pp: int = 1
    ep: int = 1
    micro_batches: int = 1
    """Into how many parts a process (or pipeline) divides its sequences of a step, one after the other."""
    pp_schedule: PipelineSchedule = "dualpipe"
    timeout: float = 120.0
    """Seconds after which a rank that gives no sign of life ends the run."""
    trace_step: int | None = None
    """The step whose timeline the first pipeline writes, to trace-<precision>.json in the run's folder."""

    def __post_init__(self) -> None:
        for name in ("pp", "ep", "micro_batches"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.trace_step is not None and self.trace_step < 1:
            raise TrainError(f"trace_step is {self.trace_step}, expected a step from 1 up")
        if not 1 <= self.timeout <= 86400:
            raise TrainError(f"timeout is {self.timeout}, expected seconds from 1 to a day")


@dataclass(frozen=True)
class RunConfig:
    """config.json of a run."""

    preset: str = "tiny"
    precisions: tuple[Precision, ...] = ("fp8", "bf16")
    data: str | None = None
    """A file or folder of text; None is the standard library's source."""
    model: ModelConfig = field(default_factory=lambda: PRESETS["tiny"])
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint_every: int = 100
    validate_every: int = 50
    validation_windows: int = 64
    keep: int = 2

    def __post_init__(self) -> None:
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise TrainError(f"precisions is {list(self.precisions)}, expected fp8, bf16 or both, once each")
        for name in ("checkpoint_every", "validate_every", "validation_windows", "keep"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} is {getattr(self, name)}, expected at least 1")


def read_json(path: Path, option: str = "", *, expected: str = "", mend: str = "") -> Any:
    """What a JSON file holds. Raises TrainError where it cannot be read.

    option: that named it, as messages begin; expected: what there was to be; mend: of a damaged one.
    """
    begin = f"{option}: " if option else ""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        after = f"; expected {expected}" if expected else ""
        raise TrainError(f"{begin}cannot read {path}: {error.strerror}{after}") from error
    except (ValueError, RecursionError) as error:
        after = f". Mend: {mend}" if mend else ""
        raise TrainError(f"{begin}{path} is not JSON: {error}{after}") from error


def read_config(folder: Path) -> RunConfig:
    """Of the run in this folder."""
    path = folder / "config.json"
    return from_json(RunConfig, read_json(path, expected="the folder of a run"), str(path))


def to_json(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_json(cls: type[T], value: Any, where: str) -> T:
    """Builds the dataclass from parsed JSON: no unknown key, none missing, each value of its field's type."""
    if not isinstance(value, dict):
        raise TrainError(f"{where}: found {type(value).__name__}, expected an object")
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = {f.name for f in fields}
    # What is None where it is not asked for may be missing: files of earlier versions lack it.
    unknown = sorted(set(value) - names)
    missing = sorted({f.name for f in fields if f.default is not None} - set(value))
    if unknown or missing:
        raise TrainError(f"{where}: unknown keys {unknown}, missing keys {missing}")
    try:
        return cls(**{name: _field(hints[name], value[name], f"{where}.{name}") for name in value})
    except ValueError as error:
        raise TrainError(f"{where}: {error}") from error


def _field(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_field(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is typing.Literal:
        if value in arguments:
            return value
    elif origin in (types.UnionType, typing.Union):
        if value is None or type(value) in arguments:
            return value
        for argument in arguments:
            if dataclasses.is_dataclass(argument):
                return from_json(typing.cast(type, argument), value, where)
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise TrainError(f"{where}: found {value!r}, expected {getattr(hint, '__name__', hint)}")
