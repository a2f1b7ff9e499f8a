"""The phases of a long run, as settings (section 4.2 of the DeepSeek-V3 report)."""

import bisect
import functools
import itertools
import math
import re
from dataclasses import dataclass, fields

from dsv3_kernels.train.errors import TrainError

_POINT = re.compile(r"(?P<number>\d+(?:\.\d+)?(?:e\d+)?) *(?P<unit>%|steps?|tokens?)")


@dataclass(frozen=True)
class Point:
    """A moment of a run: a share of its steps, a number of steps, or of tokens seen."""

    number: float
    unit: str

    @classmethod
    def parse(cls, text: str, name: str) -> "Point":
        match = _POINT.fullmatch(text.strip())
        if match is None:
            raise TrainError(
                f"schedule: {name} is {text!r}, expected like '67.6%', '2000 steps' or '1e9 tokens'"
            )
        number, unit = float(match["number"]), match["unit"].rstrip("s")
        if unit == "%" and number > 100:
            raise TrainError(f"schedule: {name} is {text!r}, expected at most 100%")
        return cls(number, unit)

    def step(self, steps: int, seq_len: int, batch_size: float, ramp: tuple[int, ...]) -> float:
        """The step that it falls on. ramp: samples before each of the first steps; then batch_size each."""
        if self.unit == "%":
            return self.number / 100 * steps
        if self.unit == "step":
            return self.number
        samples = self.number / seq_len
        if samples < ramp[-1]:
            return float(bisect.bisect_left(ramp, samples))
        return len(ramp) - 1 + (samples - ramp[-1]) / batch_size


@dataclass(frozen=True)
class Schedule:
    """When what changes; None leaves a thing as it is without a schedule. Moments are written as in `Point`.

    The learning rate rises over warmup_steps, rests at its highest until constant_until, falls along a
    cosine to final_lr of the highest at decay_until (by default the last step), rests there, and is last_lr
    of the highest from last_lr_from on.
    """

    constant_until: str | None = None
    decay_until: str | None = None
    last_lr_from: str | None = None
    last_lr: float | None = None
    first_batch_size: int | None = None
    """The batch grows evenly from this many sequences to batch_size, from the first step to ramp_until."""
    ramp_until: str | None = None
    batch_multiple: int | None = None
    """While it grows the batch is a multiple of this, which must divide both ends: ranks x micro-batches."""
    mtp_weight_until: str | None = None
    """From here on the weight of the MTP loss (lambda) is a third."""
    bias_speed_until: str | None = None
    """From here on the expert biases (gamma) rest."""

    def __post_init__(self) -> None:
        self.points()
        for one, other in (("last_lr", "last_lr_from"), ("first_batch_size", "ramp_until")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise TrainError(f"schedule: {one} and {other} belong together, expected both or neither")
        if self.last_lr is not None and not 0 <= self.last_lr <= 1:
            raise TrainError(f"schedule: last_lr is {self.last_lr}, expected a share of the highest, 0 to 1")
        for name in ("first_batch_size", "batch_multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainError(f"schedule: {name} is {value}, expected at least 1")

    def points(self) -> dict[str, Point]:
        """The moments that are set, by name."""
        names = [f.name for f in fields(self) if f.name.endswith(("_until", "_from"))]
        texts = {name: getattr(self, name) for name in names}
        return {name: Point.parse(text, name) for name, text in texts.items() if text is not None}


def paper(batch_size: int, multiple: int = 1) -> Schedule:
    """DeepSeek-V3's: its moments in tokens, of 14.8T, as shares of its steps.

    The shares are larger than those of the tokens, for the first 469B tokens came in smaller batches.
    multiple: of which all batches are, as ranks and micro-batches need.
    """
    return Schedule(
        constant_until="68.24%",  # 10T
        decay_until="96.69%",  # 14.3T
        last_lr_from="98.895%",  # the last 167B
        last_lr=0.03318,  # 7.3e-6 of 2.2e-4
        first_batch_size=max(1, batch_size // 5 // multiple) * multiple,  # 3072 of 15360
        ramp_until="5.172%",  # 469B
        batch_multiple=multiple,
        mtp_weight_until="68.24%",  # 10T
        bias_speed_until="96.69%",  # 14.3T
    )


@dataclass(frozen=True)
class Steps:
    """A schedule's moments as (fractions of) steps, and the batches before the last has its size.

    Inf: never.
    """

    constant_until: float
    decay_until: float
    last_lr_from: float
    mtp_weight_until: float
    bias_speed_until: float
    ramp: tuple[int, ...]
    """The number of samples before each step of the ramp, and before the first step after it."""


MTP_WEIGHT_UNTIL = 0.676
"""Without a schedule: of the steps (10T of 14.8T tokens)."""
BIAS_SPEED_UNTIL = 0.967
"""Without a schedule: of the steps (14.3T of 14.8T tokens)."""


@functools.lru_cache(maxsize=32)
def resolve(schedule: Schedule | None, steps: int, batch_size: int, seq_len: int, warmup_steps: int) -> Steps:
    """Raises TrainError where the moments are out of order, or batches are not multiples."""
    schedule = schedule or Schedule()
    ramp = _ramp(schedule, steps, batch_size, seq_len)

    def step_of(name: str, default: float) -> float:
        point = schedule.points().get(name)
        return default if point is None else point.step(steps, seq_len, batch_size, ramp)

    constant = step_of("constant_until", warmup_steps)
    last = step_of("last_lr_from", math.inf)
    decay = step_of("decay_until", min(max(steps - 1, constant + 1), last))
    order = [
        ("warmup_steps", warmup_steps),
        ("constant_until", constant),
        ("decay_until", decay),
        ("last_lr_from", last),
    ]
    for (before, low), (after, high) in itertools.pairwise(order):
        if low > high:
            raise TrainError(
                f"schedule: {after} is at step {high:.10g} of {steps}, "
                f"expected not before {before} = {low:.10g}"
            )
    return Steps(
        constant,
        decay,
        last,
        step_of("mtp_weight_until", MTP_WEIGHT_UNTIL * steps),
        step_of("bias_speed_until", BIAS_SPEED_UNTIL * steps),
        ramp,
    )


def _ramp(schedule: Schedule, steps: int, batch_size: int, seq_len: int) -> tuple[int, ...]:
    """Even growth with the step, so that a ramp of so many tokens takes as many steps as its mean batch."""
    first, until = schedule.first_batch_size, schedule.points().get("ramp_until")
    if first is None or until is None:
        return (0,)
    multiple = schedule.batch_multiple or 1
    if first > batch_size or first % multiple or batch_size % multiple:
        raise TrainError(
            f"schedule: first_batch_size is {first}, expected at most batch_size = {batch_size}, and both "
            f"multiples of batch_multiple = {multiple}"
        )
    length = until.step(steps, seq_len, (first + batch_size) / 2, (0,))
    sizes = (
        (first + int((batch_size - first) * step / length)) // multiple * multiple
        for step in range(min(math.ceil(length), steps))
    )
    return tuple(itertools.accumulate(sizes, initial=0))
