"""A schedule against time: when each action runs, where ranks wait, what they keep in memory."""

from dataclasses import dataclass
from itertools import accumulate

from dsv3_kernels.train.pipeline.actions import Action, Overlap, Schedule, Work, dependencies, label, works


@dataclass(frozen=True)
class Times:
    """What one P-th of the layers takes on a micro-batch, in any unit (table 2 of the DeepSeek-V3 report).

    backward: all of it; weight: the part of it that makes weight gradients. overlapped: a forward and a
    backward side by side; by default as long as one after the other.
    """

    forward: float = 1.0
    backward: float = 2.0
    weight: float = 1.0
    overlapped: float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.forward < float("inf") and 0 < self.weight < self.backward < float("inf")):
            raise ValueError(f"Times: got {self}, expected forward > 0 and 0 < weight < backward")
        if self.overlapped is not None and not 0 < self.overlapped < float("inf"):
            raise ValueError(f"Times: overlapped is {self.overlapped}, expected a finite number above 0")

    @property
    def both(self) -> float:
        return self.forward + self.backward if self.overlapped is None else self.overlapped

    def of(self, action: Action) -> float:
        if isinstance(action, Overlap):
            return self.both
        return {
            "F": self.forward,
            "B": self.backward,
            "I": self.backward - self.weight,
            "W": self.weight,
        }[action.kind]


@dataclass(frozen=True)
class Span:
    """One action of one rank."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    schedule: Schedule
    ranks: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        return max(span.end for spans in self.ranks for span in spans)

    def bubbles(self) -> list[float]:
        """The time each rank waits, its start and its end included."""
        return [self.makespan - sum(s.end - s.start for s in spans) for spans in self.ranks]

    def live_activations(self, until_weights: bool = False) -> list[float]:
        """The most forwards whose activations a rank holds at once, each that of a P-th of the layers.

        They are held up to the backward of the input, or with until_weights up to that of the weights.
        """
        share = len(self.ranks) / self.schedule.stages
        last = "BW" if until_weights else "BI"
        return [
            share
            * max(accumulate((w.kind == "F") - (w.kind in last) for s in spans for w in works(s.action)))
            for spans in self.ranks
        ]


def simulate(schedule: Schedule, times: Times = Times()) -> Timeline:
    """Every rank runs its actions in order, each as soon as it can; messages take no time.

    Raises ValueError where ranks wait for each other in a circle, or for what no rank computes.
    """
    scale = len(schedule.ranks) / schedule.stages
    done: dict[Work, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    free = [0.0] * len(schedule.ranks)
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.ranks):
            while len(spans[rank]) < len(actions):
                action = actions[len(spans[rank])]
                needs = [d for work in works(action) for d in dependencies(work, schedule.stages)]
                if any(need not in done for need in needs):
                    break
                start = max([free[rank], *(done[need] for need in needs)])
                free[rank] = start + scale * times.of(action)
                spans[rank].append(Span(action, start, free[rank]))
                for work in works(action):
                    done[work] = free[rank]
                    if work.kind == "I":
                        done[work._replace(kind="B")] = free[rank]
                progress = True
    stuck = {
        r: a[len(s)] for r, (a, s) in enumerate(zip(schedule.ranks, spans, strict=True)) if len(s) < len(a)
    }
    if stuck:
        waiting = "; ".join(f"rank {rank} before {label(action)}" for rank, action in stuck.items())
        raise ValueError(f"{schedule.name}: the schedule never ends: {waiting}")
    return Timeline(schedule, tuple(map(tuple, spans)))
