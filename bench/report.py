"""The one JSON format of all benches, and how two candidates are timed against each other.

    {"bench": "gemm", "started": "2026-11-21T22:00:00+00:00",
     "machine": {"cpu": ..., "cores": ..., "python": ..., "torch": ..., "threads": ...},
     "results": [{"name": "fp8_gemm 1024x1024x1024", "unit": "s", "median": ..., "low": ..., "high": ...,
                  "repeats": ..., "peer": "torch.mm float32", "speed_against_peer": 0.75}, ...]}

Every result has name, unit, median, low, high and repeats; more fields are the bench's own. One that could
not be measured has name and error. Written to runs/bench/<bench>.json, unless a path is given.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "runs" / "bench"


def machine() -> dict[str, object]:
    """What a number depends on. Adds nothing about torch where it is not installed."""
    facts: dict[str, object] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
        facts["cpu"] = ", ".join(sorted(names)) or facts["cpu"]
    try:
        import torch

        facts |= {"torch": metadata.version("torch"), "threads": torch.get_num_threads()}
        if torch.cuda.is_available():
            facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
            facts["driver"] = _driver_version()
    except ImportError:
        pass
    return facts


def _driver_version() -> str:
    """The driver's release, say 580.159.04; from the kernel module, else from nvidia-smi."""
    version = Path("/sys/module/nvidia/version")
    if version.is_file():
        return version.read_text().strip()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.partition("\n")[0].strip() or "unknown"


class Report:
    """Results of one bench on one machine."""

    def __init__(self, bench: str) -> None:
        self.bench, self.machine = bench, machine()
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.results: list[dict[str, object]] = []

    def add(self, name: str, values: Sequence[float], unit: str = "s", **facts: object) -> str:
        """One result, with any further facts; returns the line to print."""
        middle, low, high = statistics.median(values), min(values), max(values)
        result = {
            "name": name,
            "unit": unit,
            "median": middle,
            "low": low,
            "high": high,
            "repeats": len(values),
        }
        self.results.append(result | facts)
        scale, shown = 1.0, unit
        if unit == "s":
            scale, shown = (1e3, "ms") if middle >= 1e-3 else (1e6, "us")
        line = f"{name:44s} {scale * middle:9.2f} {shown:3s} ({scale * low:.2f} to {scale * high:.2f})"
        for key, value in facts.items():
            line += f"  {key} {value:.3g}" if isinstance(value, float) else f"  {key} {value}"
        return line

    def note(self, name: str, error: str, **facts: object) -> str:
        """A result that could not be measured; returns the line to print."""
        self.results.append({"name": name, "error": error} | facts)
        return f"{name:44s} {error}"

    def write(self, path: Path | None = None) -> Path:
        path = path or RESULTS / f"{self.bench}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "bench": self.bench,
            "started": self.started,
            "machine": self.machine,
            "results": self.results,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def interleaved(
    *candidates: Callable[[], object], seconds: float = 1.0, warm_up: int = 3
) -> list[list[float]]:
    """Times of each candidate, called in turn, so that a slow moment of the machine falls on all of them."""
    for candidate in candidates:
        for _ in range(warm_up):
            candidate()
    times: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for candidate, taken in zip(candidates, times, strict=True):
            start = time.perf_counter()
            candidate()
            taken.append(time.perf_counter() - start)
    return times
