"""What the device reports reaches Python, once, and names what was wrong."""

import pytest
import torch

import dsv3_kernels as dk
from dsv3_kernels import jit, launch
from dsv3_kernels.device_error import DeviceValueError, ErrorCode
from dsv3_kernels.jit.compile import compile_source, source_options

SOURCE = """
#include "error.cuh"
using namespace dsv3;
__global__ void reporting(u32* error, u32 code, u32* done) {
    if (threadIdx.x < code) report_error(error, static_cast<ErrorCode>(code));
    done[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}
"""


class Reporting:
    """A kernel whose first `code` lanes of every block report `code`, and which goes on."""

    def cubin(self):
        done = compile_source(SOURCE, ["reporting"], source_options(), cubin=True)
        return jit.Cubin(done.cubin, done.names[0], ("u64", "u32", "u64"), done.resources(done.names[0]))


KERNEL = Reporting()


def report(code):
    done = torch.zeros(256 * 32, dtype=torch.int32, device="cuda")
    launch.launch(KERNEL, (256, 1, 1), (32, 1, 1), (launch.error_flag(done), code, done))
    return done


@pytest.mark.parametrize("code", list(ErrorCode)[1:])
def test_synchronize_raises_what_a_kernel_reported(code):
    done = report(code)
    with pytest.raises(DeviceValueError, match=r"on cuda:\d: what it returned is not valid. Mend:"):
        launch.synchronize()
    assert done.all(), "a kernel that reports goes on"
    launch.synchronize()


def test_the_next_launch_raises_too_and_does_not_run():
    report(ErrorCode.WGRAD_OFFSETS)
    torch.cuda.synchronize()
    with pytest.raises(DeviceValueError, match="fp8_wgrad: group_offsets"):
        report(ErrorCode.NONE)
    assert report(ErrorCode.NONE).all()


def test_a_graph_reports_at_each_replay():
    report(ErrorCode.NONE)
    launch.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report(ErrorCode.MASKED_GEMM_COUNTS)
    for _ in range(3):
        graph.replay()
        with pytest.raises(DeviceValueError, match="masked_grouped_fp8_gemm: counts"):
            launch.synchronize()


def test_a_result_that_finds_no_memory_is_an_error_before_the_launch():
    torch.cuda.empty_cache()
    x = torch.empty(2**14, 2**15, dtype=torch.bfloat16, device="cuda")  # 1 GiB; the result takes half of it
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError, match="out of memory"):
            dk.quantize_1x128(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
