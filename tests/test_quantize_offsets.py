"""Offsets of groups that are out of range on a GPU: the quantisers that read them report and clamp them."""

import itertools

import pytest
import torch
from fp8_helpers import assert_same, commit_generator

import dsv3_kernels as dk
from dsv3_kernels import emulator, quantize, quantized, reference
from dsv3_kernels.device_error import DeviceValueError, ErrorCode

BAD_OFFSETS = [
    [0, 300, 0, 300, 0, 300],
    [-(2**31), -1, 2**31 - 1, -5, 7],
    [2**31 - 1, 0],
    [250, 260],
    [-40, 20, 400],
    [0, 2**31 - 1] * 40,
]


def reports_offsets():
    return pytest.raises(DeviceValueError, match=r"group_offsets held values that descend, do not start at 0")


def quantisers_of_groups(x):
    """With offsets of its rows."""
    q, index = dk.quantize_1x128(x), torch.arange(x.shape[0], dtype=torch.int32)
    dy = x[:, :128].contiguous()
    yield lambda o: dk.quantize_1x128_t(x, o)
    yield lambda o: dk.quantize_1x128(x, transpose=True, group_offsets=o)
    yield lambda o: dk.requantize_1x128_t(q, o)
    yield lambda o: dk.swiglu_quantize(x, transpose=True, group_offsets=o)
    yield lambda o: dk.swiglu_backward_quantize(dy, q, o)
    yield lambda o: dk.swiglu_backward_quantize(dy, q, o, recompute=True)
    yield lambda o: dk.permute_quantize(x, index, transpose=True, group_offsets=o)


def test_wrong_offsets_are_reported_once_and_right_ones_never():
    """Each kind of mistake, in the first 32 offsets that a warp looks at together and in the next."""
    tokens = 200
    x = torch.randn(tokens, 256, generator=commit_generator()).bfloat16()
    wrong = [[5, 100, 200], [-1, 100], [0, 100, 99, 200], [0, 100, 201], [0, -3], [7], [*range(40), 38]]
    right = [[0, 0, 200], [0, 10], [0], [*range(40), 39], [0] * 32 + [200]]
    for quantiser in quantisers_of_groups(x):
        with emulator.virtual_gpu(checks=False):
            for offsets in wrong:
                with reports_offsets() as raised:
                    quantiser(torch.tensor(offsets, dtype=torch.int32))
                assert raised.value.code == ErrorCode.QUANTIZE_OFFSETS
            for offsets in right:
                quantiser(torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=lambda o: str(o[:4]))
def test_offsets_on_a_gpu_are_clamped(offsets):
    """Nobody reads them back there, and none makes the kernel read or write outside its arguments."""
    tokens = 257
    x = torch.randn(tokens, 16, generator=commit_generator()).bfloat16()
    offsets_there = torch.tensor(offsets, dtype=torch.int32)
    rows = quantized.empty_rows(x.shape, x.device)
    q, q_t = (quantized.empty_transposed(x.shape, offsets_there, x.device) for _ in range(2))
    for outputs, checks in (((None, q), True), ((rows, q_t), False)):  # groups that overlap write rows twice
        with emulator.virtual_gpu(checks=checks), reports_offsets():
            quantize._launch_1x128_t("op", x, offsets_there, *outputs, False, False)
    columns = []
    clamped = [min(max(o, 0), tokens) for o in offsets]
    for low, high in itertools.pairwise(clamped):
        for start in range(low, high, 128):
            part = x[start : min(start + 128, high)]
            columns.append(torch.nn.functional.pad(part, (0, 0, 0, 128 - part.shape[0])))
    columns.append(torch.zeros(q.shape[1], 16, dtype=x.dtype))
    want = reference.quantize_1x128_t(torch.cat(columns)[: q.shape[1]].contiguous())
    assert_same(q, want)
    assert_same(q_t, want)
