"""Tiles of 1x128 into tiles of 128 tokens, the PTX run by the emulator: bit for bit the reference."""

import pytest
import torch
from fp8_helpers import assert_same, commit_generator, each_scaling, offsets_of, wide

import dsv3_kernels as dk
from dsv3_kernels import emulator, reference

GROUPS = (0, 128, 1, 300, 0)


def check_requantized(q, offsets=None, **options):
    with emulator.virtual_gpu():
        got = dk.requantize_1x128_t(q, offsets, **options)
    assert_same(got, reference.requantize_1x128_t(q, offsets, **options))
    return got


@each_scaling
@pytest.mark.parametrize("shape", [(1, 16), (128, 128), (300, 144)])
def test_requantized(scaling, shape):
    generator = commit_generator()
    for x in (torch.randn(shape, generator=generator), wide(generator, *shape)):
        q = dk.quantize_1x128(x, power_of_2_scales=bool(scaling))
        check_requantized(q, **scaling)
        row_major = dk.QuantizedTensor(q.data, q.scales.contiguous(), q.block)
        check_requantized(row_major, power_of_2_scales=not scaling)


@each_scaling
def test_requantized_groups(scaling):
    x = torch.randn(sum(GROUPS) + 11, 48, generator=commit_generator())
    check_requantized(dk.quantize_1x128(x, power_of_2_scales=bool(scaling)), offsets_of(*GROUPS), **scaling)


@each_scaling
def test_requantized_codes_of_every_kind_and_scales_of_any(scaling):
    """Every code, NaN too, with subnormal, infinite, huge and NaN scales."""
    generator = commit_generator()
    data = torch.randint(0, 256, (256, 256), dtype=torch.uint8, generator=generator)
    data[:, :128] &= 0x77  # no NaN on the left
    scales = torch.ldexp(torch.ones(256, 2), torch.randint(-149, 128, (256, 2), generator=generator))
    scales[5], scales[200, 1], scales[77, 0] = float("nan"), float("inf"), 0.0
    q = dk.QuantizedTensor(data.view(torch.float8_e4m3fn), scales, (1, 128))
    check_requantized(q, **scaling)
    q = dk.QuantizedTensor(data.view(torch.float8_e4m3fn), torch.ones(256, 2), (1, 128))
    values = dk.dequantize(check_requantized(q, **scaling))
    assert values[:128].isfinite().all() and values[128:].isnan().any()


def test_requantized_empty():
    for shape in ((0, 16), (16, 0)):
        check_requantized(dk.quantize_1x128(torch.zeros(shape)), offsets_of(0, 0, 0))
