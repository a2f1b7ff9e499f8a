"""The pipeline schedules by name, and what the literature says of their bubbles."""

from collections.abc import Callable
from dataclasses import dataclass

from dsv3_kernels.train.dualpipe import dualpipe, dualpipev
from dsv3_kernels.train.pipeline.actions import Schedule, one_f_one_b, zero_bubble
from dsv3_kernels.train.pipeline.simulate import Times, simulate

SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "zb1p": zero_bubble,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
"""From ranks and micro-batches to the schedule; each raises ValueError where there is none."""


def published_bubble(name: str, ranks: int, times: Times) -> float:
    """Table 2 of the DeepSeek-V3 report; DualPipeV by the same count, its chunks being half as long.

    Exact where F = W = B / 2 and B <= F&B <= F + B. Of DualPipe it is then what the ranks in the middle wait;
    with F&B below F + B the outer ones, which overlap less, wait less.
    """
    dual = times.both + times.backward - 3 * times.weight
    return {
        "1f1b": (ranks - 1) * (times.forward + times.backward),
        "zb1p": (ranks - 1) * (times.forward + times.backward - 2 * times.weight),
        "dualpipe": (ranks / 2 - 1) * dual,
        "dualpipev": (ranks - 1) * dual / 2,
    }[name]


@dataclass(frozen=True)
class Comparison:
    """A schedule simulated. bubble: of the rank that waits longest; published: the formula's.

    parameters: how many times the model's a pipeline holds. activations: the most that a rank holds at once,
    in those of one P-th of the layers on one micro-batch, up to the weight gradients.
    """

    name: str
    makespan: float
    bubble: float
    published: float
    parameters: int
    activations: float


def compare(ranks: int, micro_batches: int, times: Times) -> list[Comparison]:
    """All schedules that there are for these ranks and micro-batches."""
    rows = []
    for name, make in SCHEDULES.items():
        try:
            schedule = make(ranks, micro_batches)
        except ValueError:
            continue
        timeline = simulate(schedule, times)
        held = sum(len(schedule.stages_of(rank)) for rank in range(ranks))
        rows.append(
            Comparison(
                name,
                timeline.makespan,
                max(timeline.bubbles()),
                published_bubble(name, ranks, times),
                held // schedule.stages,
                max(timeline.live_activations(until_weights=True)),
            )
        )
    return rows
