"""Every border between two codes of e4m3, and its neighbours, through the kernel of each quantiser.

Tiles that hold 448 have the scale 1, so that a value is its own quotient: each lands exactly on a border, on
a code, or one step of its dtype beside them, and must round to nearest, ties to even.
"""

import numpy as np
import pytest
import torch
from fp8_helpers import E4M3, each_dtype, encode_e4m3

import dsv3_kernels as dk
from dsv3_kernels import emulator
from dsv3_kernels.quantized import TILE


def borders(dtype):
    """[rows, 128]: codes, borders and what lies beside both, of both signs; each row and column holds 448."""
    codes = torch.from_numpy(E4M3[:127].copy())
    exact = torch.cat([codes, (codes[1:] + codes[:-1]) / 2]).to(dtype)
    integers = {2: torch.int16, 4: torch.int32}[exact.element_size()]
    beside = [(exact.view(integers) + step).view(dtype) for step in (1, -1)]
    # Below 0 lies nothing, above 448 another scale; and fp16's grid under its least normal is the codes' own.
    values = torch.cat([exact, *beside]).double()
    values = values[values.isfinite() & (values.abs() <= 448)].unique()
    values = torch.cat([values, -values]).to(dtype)
    rows = -(-values.numel() // (TILE - 1))
    x = torch.zeros(max(rows, TILE), TILE, dtype=dtype)
    cells = torch.ones_like(x, dtype=torch.bool).fill_diagonal_(False)[:rows]
    x[:rows][cells] = torch.nn.functional.pad(values, (0, int(cells.sum()) - values.numel()))
    return x.fill_diagonal_(448)


def check(q, x):
    """Codes of NumPy's float64 rounding, which shares nothing with the kernels; scales of 1."""
    assert (q.scales == 1).all()
    np.testing.assert_array_equal(q.data.view(torch.uint8).numpy(), encode_e4m3(x.double().numpy()))


@each_dtype
def test_the_values_are_all_there(dtype):
    x = borders(dtype)
    assert x.shape[0] == TILE and (x.abs().amax(0) == 448).all() and (x.abs().amax(1) == 448).all()
    found = set(x.double().flatten().tolist())
    halves = (E4M3[:126] + E4M3[1:127]) / 2
    assert {*E4M3[:127], *-E4M3[:127], *halves, *-halves} <= found and len(found) > 1000


@each_dtype
@pytest.mark.parametrize("option", [{}, {"power_of_2_scales": True}], ids=["exact", "power_of_2"])
def test_quantisers(dtype, option):
    x = borders(dtype)
    with emulator.virtual_gpu():
        rows, columns = dk.quantize_1x128(x, **option), dk.quantize_1x128_t(x, **option)
        both = dk.quantize_1x128(x, transpose=True, **option)
        square = dk.quantize_128x128(x, transpose=True, **option)
    for q, values in zip((rows, columns, *both, *square), (x, x.T, x, x.T, x, x.T), strict=True):
        check(q, values)


@each_dtype
def test_permute(dtype):
    x = borders(dtype)
    index = torch.randperm(TILE).int()
    with emulator.virtual_gpu():
        q, q_t = dk.permute_quantize(x, index, transpose=True)
    check(q, x[index])
    check(q_t, x[index].T)


def test_swiglu():
    """silu(64) is 64 in FP32, so the products are the values: a power of two moves no border."""
    y = borders(torch.bfloat16)
    x = torch.cat([torch.full_like(y, 64), y / 64], 1)
    with emulator.virtual_gpu():
        q, q_t = dk.swiglu_quantize(x, transpose=True)
    check(q, y)
    check(q_t, y.T)


def test_requantise():
    """A code times (a border over the code) in FP32 is that border or a neighbour of it."""
    codes = torch.from_numpy(E4M3[1:127].copy())
    half = (codes[1:] + codes[:-1]) / 2
    data = torch.zeros(TILE, 256, dtype=torch.float8_e4m3fn)
    scales = torch.ones(TILE, 2)
    for tile in range(2):  # each row a border, from another code; the diagonal keeps each column's scale at 1
        code = codes[torch.randint(0, 126, (125,))]
        scales[:125, tile] = (half / code).float()
        data.view(torch.uint8)[:125, TILE * tile + 125] = torch.from_numpy(encode_e4m3(code.numpy()))
        data.view(torch.uint8)[126, TILE * tile : TILE * (tile + 1)] = 126
    q = dk.QuantizedTensor(data, scales, (1, 128))
    with emulator.virtual_gpu():
        q_t = dk.requantize_1x128_t(q)
    check(q_t, dk.dequantize(q).T)


def test_a_wrong_rounding_is_noticed():
    x = borders(torch.bfloat16)
    truncated = dk.quantize_1x128(x)
    truncated.data.view(torch.uint8)[3, 7] ^= 1
    with pytest.raises(AssertionError):
        check(truncated, x)
