"""The quantisers, bit for bit, against an encoder that enumerates the 256 codes."""

import numpy as np
import pytest
import torch
from fp8_helpers import E4M3, commit_generator, encode_e4m3, exact_values, powers, quantize

import dsv3_kernels as dk

QUANTIZERS = {"1x128": dk.quantize_1x128, "128x128": dk.quantize_128x128}
BLOCKS = {"1x128": (1, 128), "128x128": (128, 128)}
both = pytest.mark.parametrize("kind", QUANTIZERS)


def codes(q):
    return q.data.view(torch.uint8).numpy()


def assert_same(q, expected_codes, expected_scales):
    np.testing.assert_array_equal(q.scales.numpy().view(np.uint32), expected_scales.view(np.uint32))
    np.testing.assert_array_equal(codes(q), expected_codes)


def spread(generator, *shape):
    """Normal values times a power of two for each row, over most of FP32's range, and a few outliers."""
    x = torch.randn(*shape, generator=generator)
    exponents = torch.randint(-120, 100, (shape[0], 1), generator=generator)
    outliers = torch.randint(-20, 20, shape, generator=generator)
    return torch.ldexp(x, exponents + outliers * (outliers > 17))


@both
@powers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16), (5, 128), (130, 272), (129, 400), (256, 256)])
def test_bit_exact(kind, power_of_2, dtype, shape):
    generator = commit_generator()
    for x in (torch.randn(shape, generator=generator), spread(generator, *shape)):
        x = x.to(dtype).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
        before = x.clone()
        q = QUANTIZERS[kind](x, power_of_2_scales=power_of_2)
        assert q.block == BLOCKS[kind]
        assert q.data.is_contiguous() and q.data.dtype == torch.float8_e4m3fn
        assert_same(q, *quantize(x, BLOCKS[kind], power_of_2))
        assert torch.equal(x, before)  # no quantiser works in place on its input


@both
def test_batches_are_quantised_one_by_one(kind):
    x = torch.randn(3, 40, 144, generator=commit_generator())
    q = QUANTIZERS[kind](x)
    for g in range(3):
        one = QUANTIZERS[kind](x[g])
        assert torch.equal(one.scales, q.scales[g])
        assert np.array_equal(codes(one), codes(q)[g])


@pytest.mark.parametrize("shape", [(1, 16), (5, 256), (8, 384), (2, 7, 256), (0, 128), (4, 0)])
def test_scales_are_mn_major(shape):
    q = dk.quantize_1x128(torch.zeros(shape))
    *batch, m, k = shape
    leading, tiles = (m + 3) // 4 * 4, (k + 127) // 128
    assert tuple(q.scales.shape) == (*batch, m, tiles)
    assert q.scales.stride() == ((leading * tiles, 1, leading) if batch else (1, leading))


def test_ties_borders_and_subnormals():
    """Scale 1 (the tile holds 448), then every code, every midpoint between codes, and their neighbours."""
    finite = E4M3[:127]
    middle = ((finite[:-1] + finite[1:]) / 2).astype(np.float32)
    points = np.concatenate([finite.astype(np.float32), middle])
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    )
    points = points[np.abs(points) <= 448]
    points = np.concatenate([points, -points, np.float32([0.0, -0.0, 2.0**-149, -(2.0**-126), 2.0**-10])])
    rows = np.zeros((-(-len(points) // 127), 128), np.float32)
    rows[:, 0] = 448
    rows[:, 1:].flat[: len(points)] = points
    for q in (dk.quantize_1x128(torch.from_numpy(rows)), dk.quantize_128x128(torch.from_numpy(rows))):
        assert (q.scales == 1).all()
        np.testing.assert_array_equal(codes(q), encode_e4m3(rows))


@both
def test_every_code_survives_a_round_trip(kind):
    table = torch.from_numpy(E4M3).float().nan_to_num(448.0).view(2, 128)
    q = QUANTIZERS[kind](table)
    assert (q.scales == 1).all()
    assert torch.equal(dk.dequantize(q), table)
    np.testing.assert_array_equal(codes(q).ravel() & 0x7F, np.minimum(np.arange(256) & 0x7F, 0x7E))


@both
@powers
def test_smallest_scale(kind, power_of_2):
    """Tiles whose amax/448 is subnormal take 2^-126; tiles of zeros, of either sign, take 1."""
    tiny = torch.full((1, 128), 2.0**-149)
    at_border = torch.full((1, 128), 448 * 2.0**-126)
    under = torch.full((1, 128), 447 * 2.0**-126)
    zero = torch.tensor([0.0, -0.0]).repeat(64)[None]
    for x, scale in ((tiny, 2.0**-126), (at_border, 2.0**-126), (under, 2.0**-126), (zero, 1.0)):
        q = QUANTIZERS[kind](x, power_of_2_scales=power_of_2)
        assert q.scales.item() == scale
        assert_same(q, *quantize(x, BLOCKS[kind], power_of_2))
    largest = torch.full((1, 128), torch.finfo(torch.float32).max)
    q = QUANTIZERS[kind](largest, power_of_2_scales=power_of_2)
    assert q.scales.isfinite().all() and q.data.float().isfinite().all()


@both
@powers
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_poison_their_tile_and_no_other(kind, power_of_2, bad, dtype):
    generator = commit_generator()
    x = torch.randn(256, 256, generator=generator).to(dtype)
    clean = dk.dequantize(QUANTIZERS[kind](x, power_of_2_scales=power_of_2))
    row, column = (int(torch.randint(256, (), generator=generator)) for _ in range(2))
    x[row, column] = bad
    values = dk.dequantize(QUANTIZERS[kind](x, power_of_2_scales=power_of_2))
    poisoned = torch.zeros(256, 256, dtype=torch.bool)
    r = row if kind == "1x128" else slice(row // 128 * 128, row // 128 * 128 + 128)
    poisoned[r, column // 128 * 128 : column // 128 * 128 + 128] = True
    assert values[poisoned].isnan().all()
    assert torch.equal(values[~poisoned], clean[~poisoned])


@powers
@pytest.mark.parametrize("batch", [(), (2,)])
def test_transposed_weights_hold_the_same_codes(power_of_2, batch):
    w = torch.randn(*batch, 144, 304, generator=commit_generator())
    q, q_t = dk.quantize_128x128(w, transpose=True, power_of_2_scales=power_of_2)
    plain = dk.quantize_128x128(w, power_of_2_scales=power_of_2)
    assert np.array_equal(codes(q), codes(plain)) and torch.equal(q.scales, plain.scales)
    assert q_t.data.is_contiguous() and q_t.scales.is_contiguous() and q_t.block == (128, 128)
    assert torch.equal(q_t.data.view(torch.uint8), q.data.view(torch.uint8).mT)
    assert torch.equal(q_t.scales, q.scales.mT)


@powers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [None, [], [0], [0, 128, 1, 300, 0], [127, 129], [0, 0, 5], [256], [91]])
@pytest.mark.parametrize("unused", [0, 37])
def test_transposed_tokens(power_of_2, dtype, sizes, unused):
    """Each group is what quantising the transpose of its own rows gives; tails are zero with scale 1."""
    generator = commit_generator()
    tokens = (sum(sizes) if sizes is not None else 200) + unused
    x = torch.randn(tokens, 24, generator=generator).to(dtype)
    offsets = None if sizes is None else torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
    q = dk.quantize_1x128_t(x, offsets, power_of_2_scales=power_of_2)
    groups = 1 if sizes is None else len(sizes)
    columns = 128 * ((tokens + 127 * groups) // 128)
    assert tuple(q.data.shape) == (24, columns) and q.data.is_contiguous()
    assert tuple(q.scales.shape) == (24, columns // 128) and q.scales.stride() == (1, 24)
    start = 0
    for low, size in zip(np.cumsum([0, *(sizes or [])]), [tokens] if sizes is None else sizes, strict=False):
        end = start + -(-size // 128) * 128
        padded = torch.zeros(24, end - start)
        padded[:, :size] = x[low : low + size].t()
        alone = dk.quantize_1x128(padded, power_of_2_scales=power_of_2)
        assert np.array_equal(codes(q)[:, start:end], codes(alone))
        assert torch.equal(q.scales[:, start // 128 : end // 128], alone.scales)
        start = end
    assert not codes(q)[:, start:].any() and (q.scales[:, start // 128 :] == 1).all()


def ue8m0_quantizers(x, offsets):
    yield lambda **o: dk.quantize_1x128(x, **o)
    yield lambda **o: dk.quantize_1x128(x.view(2, x.shape[0] // 2, -1), **o)
    yield lambda **o: dk.quantize_1x128(x, transpose=True, group_offsets=offsets, **o)
    yield lambda **o: dk.quantize_1x128_t(x, offsets, **o)
    yield lambda **o: dk.quantize_128x128(x, **o)
    yield lambda **o: dk.quantize_128x128(x, transpose=True, **o)


def test_ue8m0_scales_are_the_powers_of_two():
    """The same codes; the scales are the exponent bytes, in the same layout; each op takes them."""
    x = spread(commit_generator(), 160, 144)
    x[5, 3], x[150, 140], x[80] = float("nan"), float("inf"), 0.0
    for quantize_ in ue8m0_quantizers(x, torch.tensor([0, 30, 150], dtype=torch.int32)):
        wants, gots = quantize_(power_of_2_scales=True), quantize_(ue8m0_scales=True)
        if isinstance(wants, dk.QuantizedTensor):
            wants, gots = (wants,), (gots,)
        for want, got in zip(wants, gots, strict=True):
            assert np.array_equal(codes(got), codes(want)) and got.block == want.block
            assert got.scales.dtype == torch.float8_e8m0fnu and got.scales.stride() == want.scales.stride()
            exponents = got.scales.view(torch.uint8).int()
            expected = torch.log2(want.scales.double()).nan_to_num(128, posinf=128) + 127
            assert torch.equal(exponents.double(), expected)
            values = dk.dequantize(got)
            assert torch.equal(values.nan_to_num(-7), dk.dequantize(want).nan_to_num(-7))
            assert torch.equal(values.isnan(), dk.dequantize(want).isnan())


def test_gemms_take_ue8m0_scales():
    generator = commit_generator()
    x, w = (torch.randn(m, 272, generator=generator) for m in (40, 32))
    results = []
    for option in ({"power_of_2_scales": True}, {"ue8m0_scales": True}):
        x_q, x_t = dk.quantize_1x128(x, transpose=True, **option)
        w_q, w_t = dk.quantize_128x128(w, transpose=True, **option)
        again = dk.requantize_1x128_t(x_q, power_of_2_scales=True)
        tuples = dk.fp8_gemm((x_q.data, x_q.scales), (w_q.data, w_q.scales))
        results.append(
            [dk.fp8_gemm(x_q, w_q), tuples, dk.fp8_wgrad(x_t, x_t), dk.dequantize(again), dk.dequantize(w_t)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("spread_of_rows", [0, 3, 20])
def test_requantizing_with_powers_of_two_is_nearly_exact(spread_of_rows):
    """A code times a power of two fits e4m3 as long as it stays above the subnormals of its new scale; below
    it is rounded to their grid. With scales in FP32 nearly every value moves."""
    generator = commit_generator()
    x = torch.randn(300, 256, generator=generator)
    x *= torch.exp2(spread_of_rows * torch.randn(300, 1, generator=generator))
    moved = {}
    for power_of_2 in (True, False):
        q = dk.quantize_1x128(x, power_of_2_scales=power_of_2)
        q_t = dk.requantize_1x128_t(q, power_of_2_scales=power_of_2)
        before, after = dk.dequantize(q).double(), dk.dequantize(q_t)[:, :300].t().double()
        scale = q_t.scales.t().repeat_interleave(128, 0)[:300].double()
        moved[power_of_2] = (before != after).double().mean().item()
        if power_of_2:
            assert ((before - after).abs() <= 2.0**-10 * scale).all()
            large = before.abs() >= 2.0**-6 * scale
            assert torch.equal(before[large], after[large]) and large.any()
    print(moved)
    assert moved[False] > 0.5
    if spread_of_rows == 0:
        assert moved[True] < 0.01


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_does_not_matter(default):
    x = torch.randn(200, 144, generator=commit_generator())
    offsets = torch.tensor([0, 70, 200], dtype=torch.int32)

    def results():
        w_q, w_t = dk.quantize_128x128(x[:192], transpose=True)
        x_q, x_t = dk.quantize_1x128(x), dk.quantize_1x128_t(x, offsets)
        quantized = [t for q in (w_q, w_t, x_q, x_t) for t in (q.data.float(), q.scales, dk.dequantize(q))]
        hopper = dk.reference.fp8_gemm(x_q, w_q, "hopper")
        return [*quantized, hopper, dk.fp8_gemm(x_q, w_q), dk.fp8_wgrad(x_t, x_t, group_offsets=offsets)]

    expected = results()
    torch.set_default_dtype(default)
    try:
        got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(e, g) and e.dtype == g.dtype for e, g in zip(expected, got, strict=True))


def test_empty():
    for shape in ((0, 128), (3, 0), (0, 0), (0, 4, 128), (2, 0, 128)):
        for quantizer in (dk.quantize_1x128, dk.quantize_128x128):
            q = quantizer(torch.zeros(shape))
            assert tuple(q.data.shape) == shape
            assert tuple(dk.dequantize(q).shape) == shape
    q, q_t = dk.quantize_128x128(torch.zeros(0, 128), transpose=True)
    assert tuple(q_t.shape) == (128, 0) and tuple(q_t.scales.shape) == (1, 0)
    for shape in ((0, 16), (5, 0)):
        q = dk.quantize_1x128_t(torch.zeros(shape))
        assert tuple(q.data.shape) == (shape[1], 128 * (shape[0] > 0))


@both
@pytest.mark.parametrize("shape", [(3, 130, 272), (256, 256), (5, 16)])
def test_dequantize_rounds_once(kind, shape):
    x = torch.randn(shape, generator=commit_generator())
    q = QUANTIZERS[kind](x)
    exact = exact_values(q)
    values = dk.dequantize(q)
    assert values.dtype == torch.float32 and values.is_contiguous()
    assert torch.equal(values, exact.float())
    assert torch.equal(dk.dequantize(q, torch.bfloat16), exact.float().bfloat16())
    assert torch.equal(dk.dequantize(q, torch.float16), exact.float().half())
    assert torch.equal(dk.dequantize(q, torch.float64), exact.float().double())
    assert torch.equal(dk.dequantize((q.data, q.scales)), values)


def test_dequantize_of_every_code_and_scale():
    """NaN codes stay NaN, scales may be NaN, Inf, subnormal or near overflow, with any strides."""
    data = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    for scale in (1.0, 2.0**-149, 3e-39, 7.6e35, 3e38, float("inf"), float("nan"), 0.0):
        q = dk.QuantizedTensor(data, torch.full((1, 2), scale).t(), (1, 128))
        expected = (torch.from_numpy(E4M3).view(2, 128) * np.float64(np.float32(scale))).float()
        assert torch.equal(dk.dequantize(q).nan_to_num(12345.0), expected.nan_to_num(12345.0))
