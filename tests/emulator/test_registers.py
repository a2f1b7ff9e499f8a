"""setmaxnreg: what a thread begins with, and what the loader refuses. The bugs are in kernels/registers.cu."""

import re

import pytest
import torch
from ptx_helpers import kernel

from dsv3_kernels import emulator, jit
from dsv3_kernels.jit.compile import compile_source

SOURCE = """extern "C" __global__ void BOUNDS k(int* out) {
    if (threadIdx.x < 128) asm volatile("setmaxnreg.inc.sync.aligned.u32 256;");
    out[threadIdx.x] = threadIdx.x;
}"""


def launch(source, threads):
    out = torch.full((threads,), -1, dtype=torch.int32)
    emulator.VirtualGPU().launch(
        jit.compile_ptx(source), "k", grid=(1, 1, 1), block=(threads, 1, 1), args=[out]
    )
    assert out.tolist() == list(range(threads))


@pytest.mark.parametrize(
    ("bounds", "threads"),
    [
        ("__launch_bounds__(384, 1)", 384),
        ("__launch_bounds__(288, 1)", 288),
        ("__launch_bounds__(640, 1)", 640),
        ("__launch_bounds__(128, 3)", 128),
        ("__launch_bounds__(224, 2)", 128),
        ("__maxnreg__(120)", 256),
    ],
)
def test_registers_at_entry_are_those_of_ptxas(bounds, threads):
    source = SOURCE.replace("BOUNDS", bounds)
    with pytest.raises(emulator.DeadlockError, match=r"to go from \d+ to 256 a thread: 0 are free") as info:
        launch(source, threads)
    began = int(re.search(r"began with (\d+) a thread", str(info.value))[1])
    assert began == compile_source(source, (), (), cubin=True).resources("k").registers


def test_ptxas_and_the_machine_ignore_it_where_the_count_at_entry_is_unknown():
    source = SOURCE.replace("BOUNDS", "__launch_bounds__(256)")
    launch(source, 256)
    assert "'setmaxnreg' ignored" in compile_source(source, (), (), cubin=True).log


def test_launch_bounds_that_leave_all_registers_make_an_increase_free():
    launch(SOURCE.replace("BOUNDS", "__launch_bounds__(128, 1)"), 128)


@pytest.mark.parametrize("count", [0, 16, 23, 100, 257, 264, 2**32 + 24])
@pytest.mark.parametrize("action", ["inc", "dec"])
def test_counts_that_are_refused_at_load(action, count):
    text = kernel(f"setmaxnreg.{action}.sync.aligned.u32 {count}; ret;")
    with pytest.raises(emulator.EmulationError, match="24 to 256 registers in steps of 8"):
        emulator.VirtualGPU().launch(text, "k", grid=(1, 1, 1), block=(128, 1, 1), args=[])
