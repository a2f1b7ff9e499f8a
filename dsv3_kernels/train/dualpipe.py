"""DualPipe (section 3.2.1 of the DeepSeek-V3 report) and DualPipeV, its half: action lists in eight steps.

Micro-batches enter a pipeline of P ranks from both ends. Each rank holds two stages: the near one, which the
stream from its own end reaches first, and the far one of the other stream; rank P - 1 - r mirrors rank r. Cut
in the middle, one half alone is DualPipeV: there one stream turns round at the last rank and comes back, and
what is far is the way back.

    1  F near                  until the first of the far stream arrives
    2  F near, F far
    3  I far, W, F far         input gradients first: the rank before waits for them
    4  F near & B far, F far & B near                     the steady state
    5  B far, F far & B near
    6  B far, B near           the second half of these are I
    7  W, I near
    8  W
"""

from collections import deque

from dsv3_kernels.train.pipeline.actions import Action, Kind, Overlap, Schedule, Work


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """P ranks and P stages, each stage on two ranks; the first half of the micro-batches enter at rank 0.

    Raises ValueError where ranks is odd, or micro_batches is odd or below 2 · ranks.
    """
    if ranks < 2 or ranks % 2:
        raise ValueError(
            f"dualpipe: got {ranks} ranks, expected an even number: stages are mirrored in pairs. "
            f"Mend: --pp {max(ranks + 1, 2)}, or --pp-schedule dualpipev"
        )
    if micro_batches % 2 or micro_batches < 2 * ranks:
        raise ValueError(
            f"dualpipe: got {micro_batches} micro-batches, expected an even number, at least 2 x {ranks} "
            f"ranks = {2 * ranks}: half of them enter at either end. "
            f"Mend: --micro-batches {max(micro_batches + micro_batches % 2, 2 * ranks)}"
        )
    half, chunks = ranks // 2, micro_batches // 2
    lists = []
    for rank in range(ranks):
        depth = min(rank, ranks - 1 - rank)
        near, far = (0, chunks) if rank < half else (chunks, 0)
        lists.append(_Rank(depth, ranks - 1 - depth, near, far).steps(half, chunks))
    return Schedule("dualpipe", ranks, micro_batches, tuple(lists))


def dualpipev(ranks: int, micro_batches: int) -> Schedule:
    """P ranks and 2P stages, rank r holding stages r and 2P - 1 - r.

    Raises ValueError where micro_batches is below 2 · ranks.
    """
    if ranks < 1:
        raise ValueError(f"dualpipev: got {ranks} ranks, expected 1 or more")
    if micro_batches < 2 * ranks:
        raise ValueError(
            f"dualpipev: got {micro_batches} micro-batches, expected at least 2 x {ranks} ranks = "
            f"{2 * ranks}. Mend: --micro-batches {2 * ranks}"
        )
    lists = [_Rank(r, 2 * ranks - 1 - r, 0, 0).steps(ranks, micro_batches) for r in range(ranks)]
    return Schedule("dualpipev", 2 * ranks, micro_batches, tuple(lists))


class _Rank:
    """Writes the list of a rank: depth is how far it is from its own end of the pipeline."""

    def __init__(self, near: int, far: int, first_near: int, first_far: int) -> None:
        self._depth = near
        self._stages = {"near": near, "far": far}
        self._next_forward = {"near": first_near, "far": first_far}
        self._next_backward = dict(self._next_forward)
        self._put_off: deque[Work] = deque()
        self._actions: list[Action] = []

    def steps(self, half: int, chunks: int) -> tuple[Action, ...]:
        """half: ranks up to the middle; chunks: micro-batches of each stream."""
        depth, to_middle = self._depth, half - self._depth - 1
        for _ in range(2 * to_middle):
            self._forward("near")
        for _ in range(depth + 1):
            self._forward("near")
            self._forward("far")
        for _ in range(to_middle):
            self._backward("far", split=True)
            self._weight()
            self._forward("far")
        for i in range(chunks - 2 * half + depth + 1):
            if i == 0 and to_middle == 0:  # side by side they would keep the neighbour in the middle waiting
                self._forward("near")
                self._backward("far")
            else:
                self._both("near", "far")
            self._both("far", "near")
        for _ in range(to_middle):
            self._backward("far")
            self._both("far", "near")
        for i in range(depth + 1):
            self._backward("far", split=2 * i > depth)
            self._backward("near", split=2 * i + 1 > depth)
        for _ in range(to_middle):
            self._weight()
            self._backward("near", split=True)
        for _ in range(depth + 1):
            self._weight()
        return tuple(self._actions)

    def _take(self, kind: Kind, stream: str) -> Work:
        following = self._next_forward if kind == "F" else self._next_backward
        work = Work(kind, self._stages[stream], following[stream])
        following[stream] += 1
        return work

    def _forward(self, stream: str) -> None:
        self._actions.append(self._take("F", stream))

    def _backward(self, stream: str, split: bool = False) -> None:
        work = self._take("I" if split else "B", stream)
        self._actions.append(work)
        if split:
            self._put_off.append(work._replace(kind="W"))

    def _weight(self) -> None:
        self._actions.append(self._put_off.popleft())

    def _both(self, forward: str, backward: str) -> None:
        self._actions.append(Overlap(self._take("F", forward), self._take("B", backward)))
