"""Timelines for ui.perfetto.dev (Chrome's trace format)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class TraceEvent(NamedTuple):
    """lane: what within a rank, such as "compute"; start, end: seconds."""

    rank: int
    lane: str
    name: str
    start: float
    end: float


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
