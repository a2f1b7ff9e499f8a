"""Pipeline schedules as data: what each rank computes, in order. Nothing here runs anything."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Work(NamedTuple):
    """One stage on one micro-batch.

    kind: F forward; B backward, all of it; I the backward's gradient of the input alone, and W that of the
        weights, which an I has put off.
    """

    kind: Kind
    stage: int
    micro_batch: int


class Overlap(NamedTuple):
    """A forward and a backward whose parts alternate, so that one computes while the other communicates."""

    forward: Work
    backward: Work


Action = Work | Overlap


def works(action: Action) -> tuple[Work, ...]:
    return (action,) if isinstance(action, Work) else tuple(action)


def label(action: Action) -> str:
    """F5 stage 2: the kind of work, the micro-batch, the stage."""
    if isinstance(action, Overlap):
        return f"{label(action.forward)} & {label(action.backward)}"
    return f"{action.kind}{action.micro_batch} stage {action.stage}"


@dataclass(frozen=True)
class Schedule:
    """stages: how many the model is cut into; ranks: the actions of each rank, in order."""

    name: str
    stages: int
    micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]

    @cached_property
    def places(self) -> dict[tuple[int, int], int]:
        """The rank that computes (stage, micro_batch), forward and backward."""
        return {(w.stage, w.micro_batch): rank for rank, w in self.all_works() if w.kind == "F"}

    def all_works(self) -> Iterator[tuple[int, Work]]:
        return ((r, work) for r, actions in enumerate(self.ranks) for a in actions for work in works(a))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages whose layers a rank holds, ascending."""
        return tuple(sorted({stage for (stage, _), r in self.places.items() if r == rank}))


def dependencies(work: Work, stages: int) -> Iterator[Work]:
    """What must be done before. The backward of the next stage stands here as a B, be it a B or an I."""
    kind, stage, micro_batch = work
    if kind == "F":
        if stage > 0:
            yield Work("F", stage - 1, micro_batch)
    elif kind == "W":
        yield Work("I", stage, micro_batch)
    else:
        yield Work("F", stage, micro_batch)
        if stage + 1 < stages:
            yield Work("B", stage + 1, micro_batch)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B: as few forwards in advance as keep the pipeline full, then a backward after each forward."""
    _require(ranks >= 1, "1f1b", f"got {ranks} ranks, expected 1 or more")
    _require(micro_batches >= 1, "1f1b", f"got {micro_batches} micro-batches, expected 1 or more")
    return Schedule(
        "1f1b", ranks, micro_batches, tuple(_in_turn(ranks, micro_batches, r) for r in range(ranks))
    )


def _in_turn(ranks: int, micro_batches: int, rank: int) -> tuple[Action, ...]:
    ahead = min(ranks - 1 - rank, micro_batches)
    actions: list[Action] = [Work("F", rank, i) for i in range(ahead)]
    for i in range(micro_batches):
        if i + ahead < micro_batches:
            actions.append(Work("F", rank, i + ahead))
        actions.append(Work("B", rank, i))
    return tuple(actions)


def zero_bubble(ranks: int, micro_batches: int) -> Schedule:
    """ZB1P (ZB-H1 of arXiv 2401.10241): 1F1B whose weight gradients lag behind.

    Rank r puts off those of its last r micro-batches, so that every rank keeps the activations of as many as
    the first one does.
    """
    plain = one_f_one_b(ranks, micro_batches)
    lists = []
    for rank, actions in enumerate(plain.ranks):
        split: list[Action] = []
        for kind, stage, i in (w for a in actions for w in works(a)):
            if kind == "F":
                split.append(Work("F", stage, i))
                continue
            split.append(Work("I", stage, i))
            if i >= rank:
                split.append(Work("W", stage, i - rank))
        split += [Work("W", rank, i) for i in range(max(micro_batches - rank, 0), micro_batches)]
        lists.append(tuple(split))
    return Schedule("zb1p", ranks, micro_batches, tuple(lists))


def forward_only(places: Sequence[int], micro_batches: int) -> Schedule:
    """For evaluation: stage s of every micro-batch on rank places[s], a rank's stages one after the other."""
    lists: list[list[Action]] = [[] for _ in range(max(places) + 1)]
    for stage, rank in enumerate(places):
        lists[rank] += [Work("F", stage, i) for i in range(micro_batches)]
    return Schedule("forward only", len(places), micro_batches, tuple(map(tuple, lists)))


def _require(holds: bool, name: str, message: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {message}")
