"""The messages between the ranks of a pipeline: when each is posted, and how.

All messages of a step have one order, that of their senders' ends in the simulated schedule, and every rank
posts its own, sends and receives, in that order. What a rank posts before a receive then never depends on
what it receives, so nothing deadlocks even where messages are strictly served in turn, as on NCCL.
"""

import time
from collections.abc import Iterable
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_kernels.nn.interleave import Observer
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.pipeline.actions import Schedule, Work, works
from dsv3_kernels.train.pipeline.simulate import simulate


class Message(NamedTuple):
    """A state on its way to the next stage (F), or its gradient to the one before (B)."""

    time: float
    kind: Literal["F", "B"]
    stage: int
    """That it comes from."""
    micro_batch: int
    source: int
    target: int


def posts(schedule: Schedule, rank: int) -> list[list[list[Message]]]:
    """What a rank posts, in batches that belong to one moment of the schedule.

    First what comes before any action, then for each action what follows its results. Receives stand as early
    as the order allows: they too follow the action before the rank's next send. What passes between two
    stages of one rank is no message.
    """
    result: list[list[list[Message]]] = [[] for _ in range(len(schedule.ranks[rank]) + 1)]
    action_of = {w: i for i, action in enumerate(schedule.ranks[rank], start=1) for w in works(action)}
    place = 0
    mine = (item for item in _ordered(schedule) if rank in (item[0].source, item[0].target))
    for _, moment in groupby(mine, lambda item: item[0].time):
        batch = list(moment)
        place = max(place, *(action_of[work] for message, work in batch if message.source == rank), 0)
        result[place].append([message for message, _ in batch])
    return result


def _ordered(schedule: Schedule) -> list[tuple[Message, Work]]:
    """Every message of a step, and the work that makes it."""
    spans = (span for of_rank in simulate(schedule).ranks for span in of_rank)
    found = []
    for span in spans:
        for work in works(span.action):
            kind: Literal["F", "B"] = "F" if work.kind == "F" else "B"
            to = work.stage + (1 if kind == "F" else -1)
            if work.kind == "W" or not 0 <= to < schedule.stages:
                continue
            source, target = (schedule.places[stage, work.micro_batch] for stage in (work.stage, to))
            if source != target:
                found.append((Message(span.end, kind, work.stage, work.micro_batch, source, target), work))
    return sorted(found)


class Link:
    """One rank's side of the messages of one step. All are tensors of one shape.

    group: None where the pipeline is one rank, which has no messages. observer: as in `interleave.observed`.
    """

    def __init__(
        self,
        group: "dist.ProcessGroup | None",
        schedule: Schedule,
        like: Tensor,
        observer: Observer,
    ) -> None:
        self._group, self._like, self._micro_batches = group, like, schedule.micro_batches
        self._observe = observer
        self._rank = 0 if group is None else dist.get_rank(group)
        self._ready: dict[tuple[str, int, int], Tensor] = {}
        self._coming: dict[tuple[str, int, int], tuple[Message, Any, Tensor]] = {}
        self._going: dict[Message, tuple[Any, Tensor]] = {}

    def give(self, kind: Literal["F", "B"], stage: int, micro_batch: int, result: Tensor) -> None:
        """What a stage has made, for `post` to send, or for another stage of this rank to take."""
        self._ready[kind, stage, micro_batch] = result

    def take(self, kind: Literal["F", "B"], stage: int, micro_batch: int) -> Tensor:
        """What the stage has made, here or elsewhere; waits for it."""
        key = kind, stage, micro_batch
        if key not in self._coming:
            return self._ready.pop(key)
        message, work, buffer = self._coming.pop(key)
        start = time.perf_counter()
        self._wait(message, work)
        self._observe(f"{kind}{micro_batch} of stage {stage}", start, start, time.perf_counter())
        self._forget_sent(message)
        return buffer

    def post(self, batches: Iterable[list[Message]]) -> None:
        """Starts sends and receives; those of one batch together. Two sends to a rank may be under way."""
        for batch in batches:
            for target in {message.target for message in batch} - {self._rank}:
                self._make_room(target)
            tensors = [self._tensor(message) for message in batch]
            operations = [
                dist.P2POp(
                    dist.isend if message.source == self._rank else dist.irecv,
                    tensor,
                    group=self._group,
                    group_peer=message.target if message.source == self._rank else message.source,
                    tag=self._tag(message),
                )
                for message, tensor in zip(batch, tensors, strict=True)
            ]
            try:
                work = dist.batch_isend_irecv(operations)
            except RuntimeError as error:
                raise self._failure(batch, error) from error
            # Some backends give one work for the whole batch, others one a message.
            each = work if len(work) == len(batch) else [work[0]] * len(batch)
            for message, one, tensor in zip(batch, each, tensors, strict=True):
                if message.source == self._rank:
                    self._going[message] = one, tensor
                else:
                    self._coming[message.kind, message.stage, message.micro_batch] = message, one, tensor

    def finish(self) -> None:
        """Waits until all that was sent has gone."""
        going, self._going = self._going, {}
        for message, (work, _) in going.items():
            self._wait(message, work)

    def _forget_sent(self, received: Message) -> None:
        """Whoever sent this had posted the receives of all that comes before it in the one order: those sends
        of ours are over, or will be without more help, and their tensors can go.
        """
        self._let_go([m for m in self._going if m.target == received.source and m.time < received.time])

    def _make_room(self, target: int) -> None:
        """Waits for all that was sent to a rank but the last, where nothing has come from it for long. Safe:
        what we post from now on comes later in the one order, and that rank receives those without it.
        """
        self._let_go([m for m in self._going if m.target == target][:-1])

    def _let_go(self, sent: list[Message]) -> None:
        for message in sent:
            work, tensor = self._going[message]
            if not tensor.is_cuda:
                self._wait(message, work)
                del self._going[message]
            elif work.is_completed():  # waiting would be the stream's business
                del self._going[message]

    def _tensor(self, message: Message) -> Tensor:
        if message.source != self._rank:
            return torch.empty_like(self._like)
        return self._ready.pop((message.kind, message.stage, message.micro_batch)).contiguous()

    def _tag(self, message: Message) -> int:
        return (message.stage * self._micro_batches + message.micro_batch) * 2 + (message.kind == "F")

    def _wait(self, message: Message, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._failure([message], error) from error

    def _failure(self, batch: list[Message], error: RuntimeError) -> TrainError:
        peers = {m.target if m.source == self._rank else m.source for m in batch}
        names = " or ".join(f"rank {peer}" for peer in sorted(peers))
        first = batch[0]
        what = "state" if first.kind == "F" else "gradient"
        return TrainError(
            f"pipeline rank {self._rank}: {names} is gone or stalls; the {what} of micro-batch "
            f"{first.micro_batch} from stage {first.stage} did not pass: {_cause(error)}"
        )


def _cause(error: RuntimeError) -> str:
    """The backend's own sentence, without where in its source it comes from."""
    return str(error).split("] ", 1)[-1].split(". ", 1)[0]
