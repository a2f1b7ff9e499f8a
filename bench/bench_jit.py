"""How long a kernel takes to compile, to load from the cache in a fresh process, and to find again in this.

Each number is the median of fresh processes, with the fastest and the slowest; nothing is warmed up by hand,
but the system's file cache is warm after the first process. No GPU is needed: launches go to a driver that
does nothing, so that their number is what the host side costs.
"""

import argparse
import json
import os
import shutil
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

LAUNCH = """
import json, time, torch
from dsv3_kernels import launch
from dsv3_kernels.jit import Kernel

class OnCuda(torch.Tensor):
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl
    def get_device(self): return 0

torch._C._cuda_getCurrentRawStream = lambda device: 0
tensors = [torch.zeros(16).as_subclass(OnCuda) for _ in range(3)]
args = (*tensors, 1, 4096, 7168, 4096 * 7168, 7168, 0, 4096)
kernel = Kernel("quantize.cuh", "quantize_1x128", ("Bf16", False))
call = lambda: launch.launch(kernel, (896, 1, 1), (256, 1, 1), args)
call()
loaded = launch._loaded(kernel, 0)
values = tuple(7 if isinstance(a, torch.Tensor) else a for a in args)
bare = lambda: loaded.launch(0, 0, (896, 1, 1), (256, 1, 1), values)
seconds = {}
for name, function in (("launch.launch", call), ("C++ launch", bare)):
    started = time.perf_counter()
    for _ in range(20000):
        function()
    seconds[name] = (time.perf_counter() - started) / 20000
print(json.dumps(seconds))
"""


def run(script: str, **environment: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def fake_driver(folder: Path) -> Path | None:
    """A libcuda that does nothing, built from the tests' source; None without it or a compiler."""
    source, compiler = ROOT / "tests" / "fake_libcuda.cpp", shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or not source.is_file():
        return None
    library = folder / "libcuda.so.1"
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
    )
    return folder


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds of each part, one a repeat."""
    results: dict[str, list[float]] = {}

    def add(prefix: str, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            results.setdefault(f"{prefix}: {name}", []).append(value)

    with tempfile.TemporaryDirectory() as temporary:
        driver = fake_driver(Path(temporary))
        for i in range(repeats):
            cache = str(Path(temporary) / f"cache{i}")
            add("cold process, empty cache", run(COMPILE, DSV3_KERNELS_CACHE=cache))
            add("cold process, full cache", run(COMPILE, DSV3_KERNELS_CACHE=cache))
            if driver is not None:
                add(
                    "host side of a launch",
                    run(LAUNCH, DSV3_KERNELS_CACHE=cache, LD_LIBRARY_PATH=str(driver)),
                )
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
