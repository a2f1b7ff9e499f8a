"""How long a kernel takes to compile, to load from the cache in a fresh process, and to find again in this.

Each number is the median of fresh processes, with the fastest and the slowest; nothing is warmed up by hand,
but the system's file cache is warm after the first process. No GPU is needed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report import Report

ROOT = Path(__file__).parents[1]

# Prints seconds as JSON. The first four parts happen once a process; `memo` is the mean of many calls.
COMPILE = """
import json, sys, time
marks = [time.perf_counter()]
mark = lambda: marks.append(time.perf_counter())
from dsv3_kernels.jit import Kernel, toolchain; mark()
toolchain.nvrtc(); mark()
kernel = Kernel("quantize.cuh", "quantize_1x128", ("Bf16", False))
kernel.ptx(); mark()
kernel.cubin(); mark()
for _ in range(1000):
    kernel.cubin()
mark()
names = ("import", "load NVRTC", "ptx", "cubin", "memo")
seconds = dict(zip(names, (b - a for a, b in zip(marks, marks[1:]))))
seconds["memo"] /= 1000
print(json.dumps(seconds))
"""


def run(script: str, **environment: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds of each part, one a repeat."""
    results: dict[str, list[float]] = {}

    def add(prefix: str, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            results.setdefault(f"{prefix}: {name}", []).append(value)

    with tempfile.TemporaryDirectory() as temporary:
        for i in range(repeats):
            cache = str(Path(temporary) / f"cache{i}")
            add("cold process, empty cache", run(COMPILE, DSV3_KERNELS_CACHE=cache))
            add("cold process, full cache", run(COMPILE, DSV3_KERNELS_CACHE=cache))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="fresh processes a number (default 7)")
    parser.add_argument("--out", type=Path, help="where to write the JSON (default runs/bench/jit.json)")
    options = parser.parse_args()
    report = Report("jit")
    for name, seconds in measure(options.repeats).items():
        print(report.add(name, seconds))
    print(f"written: {report.write(options.out)}")


if __name__ == "__main__":
    main()
