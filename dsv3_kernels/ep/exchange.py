"""Messages between the ranks of a torch.distributed group, each wait with a deadline that names the peer.

Point to point rather than all_to_all_single: only so does a failed wait say which rank it was for. A message
carries a tag made of buffer, op and call, so that ranks in different calls never take each other's
messages for their own: they wait, and the timeout says so.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import TimeoutError
from .types import Stall

OPS = ("Buffer", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine")
_SHORT_WAIT = 1e-3  # seconds: less is no stall
_buffers: dict[str, int] = {}  # group name -> buffers made on it in this process


@dataclass
class _Message:
    work: Any  # of torch.distributed
    role: str
    peer: int
    tensor: Tensor  # gloo does not keep it alive


class _Broken:
    """The work of a message that could not be posted."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error

    def wait(self, timeout: timedelta) -> None:
        raise self._error


class Pending:
    """Messages under way."""

    def __init__(self, exchange: "Exchange", op: str, messages: list[_Message]) -> None:
        self._exchange, self._op, self._messages = exchange, op, messages

    def wait(self) -> None:
        messages, self._messages = self._messages, []
        self._exchange.wait(self._op, messages)


class Exchange:
    """One rank's side. A group of None is one rank alone, which sends nothing."""

    def __init__(self, group: "dist.ProcessGroup | None", timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.bytes_sent = 0
        self.failure: TimeoutError | None = None
        self._stalls: dict[tuple[str, str, int], tuple[int, float]] = {}
        self._calls = 0
        name = "" if group is None else group.group_name
        self._number = _buffers[name] = _buffers.get(name, -1) + 1

    def begin(self) -> None:
        """A new call, the same on every rank: its messages carry a new tag."""
        if self.failure is not None:
            raise self.failure
        self._calls += 1

    def _tag(self, op: str, variant: int) -> int:
        """31 bits: which buffer, which of its calls, which op, in what form."""
        return (self._number % 256) << 23 | (self._calls % (1 << 18)) << 5 | variant << 3 | OPS.index(op)

    def all_gather(self, op: str, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """The values of every rank, as many on each."""
        mine = torch.tensor(values, dtype=torch.int64, device=device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        every[self.rank] = mine
        self.swap(op, [mine] * self.size, every).wait()
        return [vector.tolist() for vector in every]

    def swap(self, op: str, sends: Sequence[Tensor], receives: Sequence[Tensor], variant: int = 0) -> Pending:
        """Sends sends[r] to each other rank r and fills receives[r] from it; empty messages are not sent.

        All tensors are contiguous, and receives[r] is as large as what r sends here. variant: 0 to 3, what
        form the message has where ranks could differ in it.
        """
        if self.size == 1:
            return Pending(self, op, [])
        peers = [(self.rank + i) % self.size for i in range(1, self.size)]
        plan = [("receive", p, receives[p]) for p in peers if receives[p].numel()]
        plan += [("send", p, sends[p]) for p in reversed(peers) if sends[p].numel()]
        self.bytes_sent += sum(t.numel() * t.element_size() for role, _, t in plan if role == "send")
        if any(t.is_cuda for _, _, t in plan):
            return Pending(self, op, self._post_batch(op, plan))
        messages, tag = [], self._tag(op, variant)
        work: Any
        for role, peer, tensor in plan:
            try:
                if role == "send":
                    work = dist.isend(tensor, group=self.group, group_dst=peer, tag=tag)
                else:
                    work = dist.irecv(tensor, group=self.group, group_src=peer, tag=tag)
            except RuntimeError as error:
                work = _Broken(error)
            messages.append(_Message(work, role, peer, tensor))
        return Pending(self, op, messages)

    def _post_batch(self, op: str, plan: list[tuple[str, int, Tensor]]) -> list[_Message]:
        """NCCL sends and receives at once or not at all; one work then stands for all, with no one peer."""
        batch = [
            dist.P2POp(dist.isend if role == "send" else dist.irecv, t, group=self.group, group_peer=peer)
            for role, peer, t in plan
        ]
        works = dist.batch_isend_irecv(batch)
        return [_Message(work, "exchange", -1, torch.empty(0)) for work in works]

    def wait(self, op: str, messages: list[_Message]) -> None:
        start = time.monotonic()
        for i, message in enumerate(messages):
            before = time.monotonic()
            try:
                if message.peer < 0:
                    message.work.wait()  # the current stream waits; NCCL's own timeout watches it
                else:
                    left = max(start + self.timeout - before, 0.001)
                    message.work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                waited = time.monotonic() - start
                peers = {message.peer} | _missing(messages[i + 1 :], waited >= self.timeout)
                cause = str(error).split("] ", 1)[-1].split(". ", 1)[0]
                self.failure = TimeoutError(op, self.rank, sorted(peers), message.role, 0, waited, cause)
                raise self.failure from error
            seconds = time.monotonic() - before
            if seconds > _SHORT_WAIT:
                waits, total = self._stalls.get((op, message.role, message.peer), (0, 0.0))
                self._stalls[op, message.role, message.peer] = waits + 1, total + seconds

    def stalls(self) -> tuple[Stall, ...]:
        return tuple(
            Stall(op, role, 0, peer, waits, seconds)
            for (op, role, peer), (waits, seconds) in sorted(self._stalls.items())
        )


def _missing(messages: list[_Message], out_of_time: bool) -> set[int]:
    """After a failure, the peers of other messages that are gone or, out of time, silent.

    A rank that fails leaves, and others then miss it too: only the whole list holds the one that began.
    """
    missing, asked = set(), set()
    for message in messages:
        if message.peer in asked or message.peer < 0:
            continue  # the first wait that times out closes the connection, so a second would say it is gone
        asked.add(message.peer)
        try:
            message.work.wait(timedelta(milliseconds=1))
        except RuntimeError as error:
            if out_of_time or "Timed out" not in str(error):
                missing.add(message.peer)
    return missing
