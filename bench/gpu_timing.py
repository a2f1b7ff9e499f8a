"""How a GPU bench measures: CUDA events, a cold L2 before every call, candidates in turn, medians."""

import statistics
import time
from collections.abc import Mapping

import torch

from bench.cases import Call

FLUSH_BYTES = 512 * 2**20  # well past any L2; the time it takes also lets the host queue what follows
MOST_ROUNDS, FEWEST_ROUNDS, ROUNDS_AT_ONCE = 100, 5, 5
COPY_BYTES = 2 * 2**30


class ColdTimer:
    """Times of calls on the current CUDA device, none of whose data is in L2.

    Before each call a large buffer is read. Writing it, as is often done, would leave L2 full of lines that
    still have to go to memory, and the call would share the way.
    """

    def __init__(self) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")

    def measure(self, calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
        """Seconds of each call, in rounds that take every call once, for about `seconds` in all."""
        for call in calls.values():
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + seconds
        while True:
            queued = [
                (name, *self._timed(call)) for _ in range(ROUNDS_AT_ONCE) for name, call in calls.items()
            ]
            torch.cuda.synchronize()
            for name, start, stop in queued:
                times[name].append(start.elapsed_time(stop) * 1e-3)
            rounds = len(next(iter(times.values())))
            if rounds >= MOST_ROUNDS or (rounds >= FEWEST_ROUNDS and time.perf_counter() > end):
                return times

    def _timed(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()
        start.record()
        call()
        stop.record()
        return start, stop


def host_seconds(call: Call, calls: int = 300) -> float:
    """What the host spends on a call: the best of five loops too short to fill the launch queue."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - started) / calls)
    torch.cuda.synchronize()
    return best


def copy_bandwidth(timer: ColdTimer) -> float:
    """Bytes read and written a second by a large copy within the device's memory."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = timer.measure({"copy": lambda: target.copy_(source)}, 0.5)["copy"]
    return 2 * COPY_BYTES / statistics.median(times)


def fp8_peak(timer: ColdTimer, size: int = 8192) -> float:
    """Operations a second of a large FP8 product by cuBLASLt, without block scales, on random data."""
    one = torch.ones((), device="cuda")
    a, b = ((torch.randn(size, size, device="cuda") * 16).to(torch.float8_e4m3fn) for _ in range(2))

    def call() -> torch.Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return 2 * size**3 / statistics.median(timer.measure({"fp8": call}, 0.5)["fp8"])
