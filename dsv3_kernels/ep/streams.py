"""Where a transport's kernels run on a GPU: a stream of their own, beside the caller's.

A call takes a turn there: `with turn.memory()` allocates, `with turn.work()` launches, `turn.event` ends it.
Its order among the caller's work is that of a call on the caller's stream, but for two things that overlap is
made of: with `previous_event` it waits for that event alone, and with `async_op` the caller's stream does not
wait for it. Nothing here makes the host wait, so that a CUDA graph may capture it all.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..quantized import QuantizedTensor
from .types import Event

Tensors = Iterable[Tensor | QuantizedTensor | None]


class Turn:
    """On the CPU, where a launch has ended when it returns."""

    def __init__(self, previous: Event | None = None) -> None:
        if previous is not None:
            previous.wait()

    def memory(self) -> AbstractContextManager[object]:
        return nullcontext()

    def work(self) -> AbstractContextManager[object]:
        return nullcontext()

    def event(self, inputs: Tensors, outputs: Tensors, check: Callable[[], None]) -> Event:
        """The end of the call, before which nothing that it reads or writes is freed.

        check: raises what has failed so far.
        """
        check()
        return Event()


class StreamTurn(Turn):
    def __init__(self, stream: torch.cuda.Stream, previous: Event | None, async_op: bool) -> None:
        self._stream, self._previous, self._async = stream, previous, async_op
        self._caller = torch.cuda.current_stream(stream.device)
        self._done = torch.cuda.Event()

    def memory(self) -> AbstractContextManager[object]:
        """Where to allocate what the call returns.

        Memory that the caller has just given up may still be in use by its stream. Behind `previous_event` a
        call does not wait for that, and has to take its memory from its own stream.
        """
        return nullcontext() if self._previous is None else torch.cuda.stream(self._stream)

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        if self._previous is None:
            self._stream.wait_stream(self._caller)
        else:
            self._previous.wait_on(self._stream)
        with torch.cuda.stream(self._stream):
            yield
            self._done.record(self._stream)

    def event(self, inputs: Tensors, outputs: Tensors, check: Callable[[], None]) -> Event:
        if not self._async:
            self._caller.wait_event(self._done)
        own_memory = self._previous is not None
        for tensor in _each(outputs):
            if self._async or own_memory:
                tensor.record_stream(self._caller if own_memory else self._stream)
        for tensor in _each(inputs):
            if self._async:
                tensor.record_stream(self._stream)
        return Event(cuda=self._done, check=check)


def _each(values: Tensors) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, QuantizedTensor):
            yield from (value.data, value.scales)
        elif value is not None:
            yield value
