"""With power-of-two scales every quantiser gives the bits of the formulas that others publish.

Each tile is scaled by what TransformerEngine and DeepSeek compute from its largest magnitude, written here
from their definitions; the tiles hold magnitudes at and next to the borders where the power changes.
"""

import contextlib

import pytest
import torch
from fp8_helpers import commit_generator

import dsv3_kernels as dk
from dsv3_kernels import emulator, reference

POWERS = {"power_of_2_scales": True}
E8M0 = {"ue8m0_scales": True}
SIZES = (20, 130)  # of two groups, which fill all tiles that their tokens may need
OFFSETS = torch.tensor([0, 20, 150], dtype=torch.int32)


def bits(x):
    return x.view(torch.int32)


def transformer_engine(amax):
    """The inverse scale 448/amax without its fraction, and the scale as its reciprocal."""
    inverse = (bits(448 / amax) & 0x7F800000).view(torch.float32)
    return inverse, 1 / inverse


def deepseek(amax):
    """2^ceil(log2(amax/448)), exactly."""
    return torch.exp2(torch.ceil(torch.log2(amax.double() / 448)))


def deepseek_by_bits(amax):
    """The same from the bits of amax·(1/448): the exponent, and one more where there is a fraction."""
    ratio = bits(amax * torch.tensor(1 / 448))
    exponent = (ratio >> 23) + ((ratio & 0x7FFFFF) != 0)
    return (exponent << 23).view(torch.float32)


def check(q, values):
    """q against the formulas on `values`, of the same orientation."""
    assert q.shape == values.shape
    rows = q.block[0]
    padded = torch.nn.functional.pad(
        values.float(), (0, -values.shape[-1] % 128, 0, -values.shape[-2] % rows)
    )
    tiles = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, rows))
    amax = tiles.abs().amax((-3, -1))
    amax[amax == 0] = 448  # of zeros each says something else; here the scale is 1
    scales = q.scales.float()
    inverse, scale = transformer_engine(amax)
    for want in (scale, deepseek(amax), deepseek_by_bits(amax)):
        assert torch.equal(scales.double(), want.double())
    for scaled in (tiles * inverse[..., None, :, None], tiles / scale[..., None, :, None]):
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten(-4, -3).flatten(-2)
        codes = codes[..., : values.shape[-2], : values.shape[-1]]
        assert torch.equal(codes, q.data.view(torch.uint8))


def by_groups(x):
    """The transpose, each group filled up with zeros to whole tiles."""
    return torch.cat([torch.nn.functional.pad(p.t(), (0, -p.shape[0] % 128)) for p in x.split(SIZES)], 1)


def at_borders(generator, *shape):
    """Rows of every size, and in two of three 448·2^n or a neighbour of it in each 128."""
    x = torch.randn(shape, generator=generator)
    x *= torch.ldexp(torch.ones(shape[-2], 1), torch.randint(-20, 20, (shape[-2], 1), generator=generator))
    largest = 448 * torch.exp2(torch.randint(4, 20, (*shape[:-1], shape[-1] // 128), generator=generator))
    steps = torch.randint(-1, 2, largest.shape, generator=generator, dtype=torch.int32)
    at = torch.arange(shape[-2])[:, None] * 5 % 128 + torch.arange(0, shape[-1], 128)
    at = at.expand(largest.shape)
    planted = x.scatter(-1, at, (bits(largest) + steps).view(torch.float32))
    return torch.where(torch.arange(shape[-2])[:, None] % 3 > 0, planted, x)


def quantised_x(generator, options):
    for dtype in (torch.float32, torch.bfloat16):
        x = at_borders(generator, sum(SIZES), 256).to(dtype)
        yield dk.quantize_1x128(x, **options), x
        yield dk.quantize_1x128(x.view(2, -1, 256), **options), x.view(2, -1, 256)
        yield dk.quantize_1x128_t(x, OFFSETS, **options), by_groups(x)
        q, q_t = dk.quantize_1x128(x, transpose=True, group_offsets=OFFSETS, **options)
        yield from ((q, x), (q_t, by_groups(x)))


def quantised_w(generator, options):
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(4, 144, 256, generator=generator).to(dtype) / 64
        w[:, 5:7] = at_borders(generator, 4, 2, 256).to(dtype)  # the largest of their blocks
        yield dk.quantize_128x128(w, **options), w
        yield dk.quantize_128x128(w[0].contiguous(), **options), w[0]
        q, q_t = dk.quantize_128x128(w, transpose=True, **options)
        yield from ((q, w), (q_t, w.mT))


def requantised(generator, options):
    q = dk.quantize_1x128(at_borders(generator, sum(SIZES), 256), power_of_2_scales=True)
    yield dk.requantize_1x128_t(q, OFFSETS, **options), by_groups(dk.dequantize(q))


def swiglu(generator, options):
    x = at_borders(generator, sum(SIZES), 512).bfloat16()
    weights = torch.rand(sum(SIZES), generator=generator) + 0.1
    y = reference.swiglu(x, weights)
    yield dk.swiglu_quantize(x, weights, **options), y
    q, q_t = dk.swiglu_quantize(x, weights, transpose=True, group_offsets=OFFSETS, **options)
    yield from ((q, y), (q_t, by_groups(y)))


def swiglu_backward(generator, options):
    x = dk.quantize_1x128(torch.randn(sum(SIZES), 256, generator=generator), **options)
    dy = at_borders(generator, sum(SIZES), 128).bfloat16()
    dx, y = reference.swiglu_backward(dy, dk.dequantize(x))
    for recompute in (False, True):
        got = dk.swiglu_backward_quantize(dy, x, OFFSETS, recompute=recompute, **options)
        yield from ((got.dx, dx), (got.dx_t, by_groups(dx)))
    yield got.y_t, by_groups(y)


def permuted(generator, options):
    x = at_borders(generator, 90, 256).bfloat16()
    index = torch.randint(90, (sum(SIZES),), generator=generator, dtype=torch.int32)
    rows = x[index.long()]
    yield dk.permute_quantize(x, index, **options), rows
    q, q_t = dk.permute_quantize(x, index, transpose=True, group_offsets=OFFSETS, **options)
    yield from ((q, rows), (q_t, by_groups(rows)))


EVERY = (quantised_x, quantised_w, requantised, swiglu, swiglu_backward, permuted)
FORMS = [(form, options) for options in (POWERS, E8M0) for form in EVERY]


@pytest.mark.parametrize("world", ["reference", "emulator"])
@pytest.mark.parametrize(
    ("form", "options"), FORMS, ids=lambda v: getattr(v, "__name__", None) or next(iter(v))
)
def test_the_published_bits(form, options, world):
    checked = 0
    with emulator.virtual_gpu() if world == "emulator" else contextlib.nullcontext():
        for q, values in form(commit_generator(), options):
            check(q, values)
            checked += 1
    assert checked


def test_borders_are_seen():
    """Any other power of two is not the published one: what `check` compares with can tell."""
    x = at_borders(commit_generator(), 150, 256)
    q = dk.quantize_1x128(x, power_of_2_scales=True)
    plain = dk.quantize_1x128(x)
    exact = (bits(plain.scales) & 0x7FFFFF) == 0
    assert 0 < exact.sum() < exact.numel()
    assert torch.equal(q.scales[exact], plain.scales[exact])
    above = dk.QuantizedTensor(q.data, q.scales * torch.where(exact, 2, 1), q.block)
    with pytest.raises(AssertionError):
        check(above, x)
