"""What a call costs the host: in C++, in `launch`, and through the op, with all its checks.

On a GPU the calls are real, and asynchronous. Without one, or with --fake, libcuda is a stand-in that does
nothing and CPU tensors pass for CUDA tensors: then the driver's own part of a launch (about 2 us) is missing,
and the result's allocation is that of a CPU tensor.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import dsv3_kernels as dk
from bench.report import Report
from dsv3_kernels import launch, quantize, quantized
from dsv3_kernels.checks import ceil_div
from dsv3_kernels.quantized import ROW, SQUARE, QuantizedTensor
from dsv3_kernels.tensor_map import MapLayout

ROOT = Path(__file__).parents[1]
CALLS, LOOPS = 20, 500  # short loops and their median: on a busy machine few of them are interrupted
M, N, K = 64, 256, 512  # small, so that neither a queue fills nor an allocation goes to the system


class PassesForCuda(torch.Tensor):
    """A CPU tensor that the launcher takes for one on cuda:0."""

    is_cuda = True
    device = torch.device("cuda:0")

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is made of it is a plain tensor

    def get_device(self) -> int:
        return 0


def calls(on_device: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of all that is timed."""

    def codes(*shape: int) -> torch.Tensor:
        return on_device(torch.randint(0, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn))

    def scales(rows: int) -> torch.Tensor:
        return on_device(quantized.empty_mn_major((rows, ceil_div(K, 128)), torch.device("cpu")).fill_(1))

    x = on_device(torch.randn(M, K).bfloat16())
    a = QuantizedTensor(codes(M, K), scales(M), ROW)
    b = QuantizedTensor(codes(N, K), on_device(torch.ones(ceil_div(N, 128), ceil_div(K, 128))), SQUARE)

    kernel = quantize.kernel_1x128(torch.bfloat16, False)
    data, row_scales = codes(M, K), scales(M)
    arguments = (x, data, row_scales, 1, M, K, M * K, K, 0, M)
    grid, block = (112, 1, 1), (quantize.THREADS, 1, 1)
    launch.launch(kernel, grid, block, arguments)
    loaded = launch._loaded(kernel, 0)
    values = tuple(v.data_ptr() if isinstance(v, torch.Tensor) else v for v in arguments)
    stream = torch._C._cuda_getCurrentRawStream(0)
    prepared = launch.Prepared(kernel, grid, block, (*[launch.Slot.ADDRESS] * 3, *arguments[3:]))

    yield "launch in C++, 10 arguments", lambda: loaded.launch(0, stream, grid, block, values)
    yield "launch.launch, 10 arguments", lambda: launch.launch(kernel, grid, block, arguments)
    yield "launch.Prepared, 3 tensors", lambda: prepared(x, data, row_scales)
    layout = MapLayout(torch.float8_e4m3fn, (64, 128), (N, K), (K, 1))
    yield "a tensor map, found again", lambda: launch._map_bytes(layout, b.data.data_ptr())
    yield "quantize_1x128", lambda: dk.quantize_1x128(x)
    yield "fp8_gemm", lambda: dk.fp8_gemm(a, b)


def measure(fake: bool, out: Path | None) -> None:
    report = Report("launch")
    report.machine["driver calls"] = "to a stand-in that does nothing" if fake else "real"
    on_device = (lambda tensor: tensor.as_subclass(PassesForCuda)) if fake else torch.Tensor.cuda
    for name, call in calls(on_device):
        _seconds(call)  # compiles, loads, fills caches
        print(report.add(name, [_seconds(call) for _ in range(LOOPS)]), flush=True)
    print(f"written: {report.write(out)}")


def _seconds(call: Callable[[], object]) -> float:
    """Of one call on the host; of so few that the queue, of about a thousand launches, never fills."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - started) / CALLS


def pretend() -> None:
    """In a process whose libcuda does nothing: make PyTorch's side of it look as if it were real."""
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.cuda.get_device_properties = lambda device: type("Properties", (), {"multi_processor_count": 132})
    for name in ("empty", "empty_strided"):
        make = getattr(torch, name)

        def made(*args: object, _make=make, device: object = None, **options: object) -> torch.Tensor:
            tensor = _make(*args, **options)
            return tensor.as_subclass(PassesForCuda) if device is PassesForCuda.device else tensor

        setattr(torch, name, made)


def build_fake_driver(folder: Path) -> None:
    """A libcuda.so.1 that does nothing, from the tests' source. Raises SystemExit without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise SystemExit(
            "bench_launch: found no C++ compiler to build its libcuda with; install g++, or set CXX"
        )
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", str(ROOT / "tests" / "fake_libcuda.cpp")]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fake", action="store_true", help="the stand-in even where there is a GPU")
    parser.add_argument("--out", type=Path, help="where to write the JSON (default runs/bench/launch.json)")
    options = parser.parse_args(arguments)
    if torch.cuda.is_available() and not options.fake:
        measure(False, options.out)
        return 0
    if os.environ.get("DSV3_KERNELS_STAND_IN"):  # the process started below
        pretend()
        measure(True, options.out)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        build_fake_driver(Path(temporary))
        environment = {**os.environ, "LD_LIBRARY_PATH": temporary, "DSV3_KERNELS_STAND_IN": "1"}
        command = [sys.executable, "-m", "bench.bench_launch", "--fake"]
        command += ["--out", str(options.out)] if options.out else []
        return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
