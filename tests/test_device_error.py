"""The device's error word: what a kernel stores there becomes an exception, once."""

import re

import pytest
import torch

from dsv3_kernels import device_error, emulator, jit, launch
from dsv3_kernels.device_error import DeviceValueError, ErrorCode

SOURCE = """
#include "error.cuh"
using namespace dsv3;
extern "C" __global__ void reporting(u32* error, u32 code, u32* done) {
    if (threadIdx.x < code) report_error(error, static_cast<ErrorCode>(code));
    done[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}
"""


class Reporting:
    """A kernel whose first `code` lanes of every block report `code`, and which goes on."""

    def ptx(self, lineinfo):
        text = jit.compile_ptx(SOURCE, lineinfo=lineinfo)
        return jit.Ptx(text, "reporting", jit.kernel.parameters(text, "reporting"))


def report(code):
    done = torch.zeros(64, dtype=torch.int32)
    try:
        launch.launch(Reporting(), (2, 1, 1), (32, 1, 1), (launch.error_flag(done), code, done))
    finally:
        assert done.all(), "a kernel that reports goes on"


@pytest.mark.parametrize("code", list(ErrorCode)[1:])
def test_a_report_is_raised_once_and_names_op_argument_and_mend(code):
    with emulator.virtual_gpu():
        with pytest.raises(DeviceValueError) as raised:
            report(code)
        report(ErrorCode.NONE)
    text = str(raised.value)
    assert raised.value.code == code
    named = r"\w+: (group_offsets|counts|topk_idx|max_recv_tokens) (held|was) .*"
    assert re.match(named + r", in an earlier call on .*Mend: \w+", text), text


def test_an_unknown_code_is_an_error_too():
    with emulator.virtual_gpu(), pytest.raises(DeviceValueError, match=r"unknown error 31.*cache"):
        report(31)


def test_each_virtual_gpu_has_a_word_of_its_own():
    tensor = torch.zeros(1)
    with emulator.virtual_gpu():
        outer = launch.error_flag(tensor)
        with emulator.virtual_gpu():
            assert launch.error_flag(tensor) is not outer
        assert launch.error_flag(tensor) is outer


def test_the_table_is_that_of_the_kernels():
    text = (jit.kernel_dir() / "error.cuh").read_text()
    table = {name: int(value) for name, value in re.findall(r"^    k(\w+) = (\d+),$", text, re.MULTILINE)}
    assert table == {code.name.title().replace("_", ""): code for code in ErrorCode}
    assert set(device_error._MESSAGES) == set(ErrorCode) - {ErrorCode.NONE}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on a GPU")
def test_without_a_gpu_there_is_nothing_to_wait_for():
    launch.synchronize()
