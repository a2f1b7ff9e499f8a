"""Two computations that take turns: while one waits for its communication, the other computes.

DualPipe (section 3.2.1 of the DeepSeek-V3 report) runs the forward of one micro-batch beside the backward of
another: attention, dispatch, MLP, combine of the one alternate with those of the other. Here both are plain
code. Where a layer has started a communication it calls `await_event`, and goes on when the other side does
so too or is through. Only one of the two ever runs, and where they change depends on nothing but the code:
ranks that run the same layers communicate in the same order.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from dsv3_kernels.ep import Event

F = TypeVar("F")
S = TypeVar("S")

Observer = Callable[[str, float, float, float], None]

_between: Callable[[], None] | None = None
_observer: Observer | None = None
_second_thread = ThreadPoolExecutor(1, thread_name_prefix="interleaved")


def pause() -> None:
    """Lets something else compute, if there is anything."""
    if _between is not None:
        _between()


def await_event(event: Event, name: str) -> None:
    """Ends a communication that has been started; until then something else may compute."""
    if _observer is None:
        pause()
        event.wait()
        return
    observer, started = _observer, time.perf_counter()
    pause()
    resumed = time.perf_counter()
    event.wait()
    observer(name, started, resumed, time.perf_counter())


@contextlib.contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """Inside, every `await_event` tells the observer its name, and by `time.perf_counter()` when it paused,
    when it went on to wait, and when the wait was over. On a GPU it is the stream that waits, not the host.
    """
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


@contextlib.contextmanager
def filled(work: Callable[[], None]) -> Iterator[None]:
    """Inside, `pause` calls `work`: what can be done at any time, such as weight gradients."""
    global _between
    before, _between = _between, work
    try:
        yield
    finally:
        _between = before


class _Turns:
    """Whose turn it is, 0 or 1. The one that runs is the one whose turn it is, whatever thread it is on:
    autograd has threads of its own.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._through = [False, False]

    def wait(self, side: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == side)

    def pass_on(self) -> None:
        """To the other side, and back when it passes on; at once where it is through."""
        with self._changed:
            side = self._turn
            if self._through[1 - side]:
                return
            self._turn = 1 - side
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._turn == side)

    def leave(self, side: int) -> None:
        with self._changed:
            self._through[side] = True
            self._turn = 1 - side
            self._changed.notify_all()


def interleaved(first: Callable[[], F], second: Callable[[], S]) -> tuple[F, S]:
    """Runs both, `first` from its start to its first `pause`, then `second` likewise, and so on in turns.

    `second` runs on a thread of its own, on the current stream of the caller's device. Returns what both
    return; where one raises, the other goes on to its end first.
    """
    turns = _Turns()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def other() -> S:
        turns.wait(1)
        try:
            with torch.cuda.stream(stream):
                return second()
        finally:
            turns.leave(1)

    with filled(turns.pass_on):
        pending = _second_thread.submit(other)
        try:
            result = first()
        finally:
            turns.leave(0)
            error = pending.exception()
    if error is not None:
        raise error
    return result, pending.result()
