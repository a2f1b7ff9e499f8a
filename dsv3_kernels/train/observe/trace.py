"""Timelines for ui.perfetto.dev (Chrome's trace format)."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class TraceEvent(NamedTuple):
    """lane: what within a rank, such as "compute"; start, end: seconds."""

    rank: int
    lane: str
    name: str
    start: float
    end: float


class Clock:
    """Moments of the work that a device does, as it reaches them; seconds of the host's clock in the end."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize(device)
            self._first = self.now()
        self._host = time.perf_counter()

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: Any) -> float:
        """Of a moment that the device has reached."""
        return self._host + self._first.elapsed_time(moment) / 1e3 if self._cuda else moment


def write_trace(path: Path, events: Iterable[TraceEvent]) -> None:
    """One process a rank, one thread a lane. Times count from the first event."""
    ordered = sorted(events, key=lambda e: (e.start, e.rank))
    origin = ordered[0].start if ordered else 0.0
    lanes = sorted({(e.rank, e.lane) for e in ordered})
    threads = {lane: number for number, lane in enumerate(lanes)}
    rows: list[dict[str, object]] = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({rank for rank, _ in lanes})
    ]
    rows += [
        {"name": "thread_name", "ph": "M", "pid": rank, "tid": tid, "args": {"name": lane}}
        for (rank, lane), tid in threads.items()
    ]
    rows += [
        {
            "name": e.name,
            "ph": "X",
            "pid": e.rank,
            "tid": threads[e.rank, e.lane],
            "ts": round((e.start - origin) * 1e6, 3),
            "dur": round((e.end - e.start) * 1e6, 3),
        }
        for e in ordered
    ]
    path.write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}) + "\n")
