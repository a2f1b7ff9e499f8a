"""An exponential moving average of the weights in CPU memory, brought up to date beside the training.

As in section 3.2.3 of the DeepSeek-V3 report: the average costs the GPU no memory and the step no time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK = 1 << 15
"""Elements averaged at a time: few enough for torch not to take threads away from the training."""


class Ema:
    """Averages of the master weights (or of this rank's shards of them), in FP32.

    After each optimizer step `update` copies the masters to CPU memory; a thread of its own averages them
    while the next step runs. On GPUs the copy runs on a stream of its own: call `before_write` before the
    masters change. Whoever reads the averages calls `wait` first (`tensors` and `in_place` do).
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        """masters: FP32, looked at again by every update. decay: the weight of the past, in [0, 1)."""
        if not 0 <= decay < 1:
            raise ValueError(f"Ema: decay is {decay}, expected a number from 0 up to, and without, 1")
        self.decay, self._masters = decay, dict(masters)
        self._average = {
            name: t.detach().to("cpu", torch.float32, copy=True).contiguous() for name, t in masters.items()
        }
        self._copied = {
            name: torch.empty(t.shape, pin_memory=t.is_cuda, dtype=torch.float32)
            for name, t in masters.items()
        }
        self._chunks = _chunks(self._average.values()), _chunks(self._copied.values())
        device = next((t.device for t in masters.values() if t.is_cuda), None)
        self._stream = None if device is None else torch.cuda.Stream(device)
        self._event: torch.cuda.Event | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._running: Future[None] | None = None

    def decay_at(self, step: int) -> float:
        """Less in the first steps, so that the initial weights are soon forgotten."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the masters as they are now, after step `step` (from 1). Returns before it is averaged."""
        self.wait()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._copy()
                self._event = torch.cuda.Event()
                self._event.record()
        else:
            self._copy()
        self._running = self._thread.submit(self._average_in, 1 - self.decay_at(step), self._event)

    def _copy(self) -> None:
        for name, copied in self._copied.items():
            copied.copy_(self._masters[name], non_blocking=True)

    def _average_in(self, weight: float, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        averages, copies = self._chunks
        torch._foreach_lerp_(averages, copies, weight)

    def before_write(self) -> None:
        """Has the current stream wait until the masters are copied."""
        if self._event is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._event)

    def wait(self) -> None:
        """Until all updates are in. Raises what one failed with."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def tensors(self) -> dict[str, Tensor]:
        """The averages, FP32 on the CPU, by the names of the masters. Writing to them changes the state."""
        self.wait()
        return dict(self._average)

    @contextmanager
    def in_place(self, write: Callable[[], None]) -> Iterator[None]:
        """Inside, the masters hold the averages. write: brings the masters into the model; called twice."""
        averages = self.tensors()
        kept = {name: master.clone() for name, master in self._masters.items()}
        try:
            self._write(averages, write)
            yield
        finally:
            self._write(kept, write)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor], write: Callable[[], None]) -> None:
        for name, master in self._masters.items():
            master.copy_(values[name])
        write()


def _chunks(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [chunk for tensor in tensors for chunk in tensor.view(-1).split(CHUNK)]
