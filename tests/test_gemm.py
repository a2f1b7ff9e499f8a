"""The three GEMMs, element by element against the float64 product of the dequantised operands."""

import pytest
import torch
from fp8_helpers import assert_rounds_exact_product, exact_values, fresh_generator

import dsv3_kernels as dk


def operands(generator, m, n, k, groups=(), masked=False, power_of_2=False):
    """Rows of very different sizes: an error of one tile or one scale cannot hide behind a larger one."""
    a = torch.randn(*(groups if masked else ()), m, k, generator=generator)
    b = torch.randn(*groups, n, k, generator=generator)
    a, b = (torch.ldexp(t, torch.randint(-8, 8, (*t.shape[:-1], 1), generator=generator)) for t in (a, b))
    return (
        dk.quantize_1x128(a, power_of_2_scales=power_of_2),
        dk.quantize_128x128(b, power_of_2_scales=power_of_2),
    )


SHAPES = [
    (1, 8, 16),
    (1, 8, 128),
    (7, 24, 144),
    (64, 128, 256),
    (129, 136, 272),
    (33, 264, 400),
    (128, 256, 512),
    (300, 520, 784),
    (4, 8, 4096),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("power_of_2", [False, True], ids=["exact", "power_of_2"])
def test_dense(shape, power_of_2):
    a, b = operands(fresh_generator(), *shape, power_of_2=power_of_2)
    out = dk.fp8_gemm(a, b)
    assert out.dtype == torch.bfloat16 and out.is_contiguous() and tuple(out.shape) == shape[:2]
    assert_rounds_exact_product(out, exact_values(a), exact_values(b))
    assert torch.equal(dk.fp8_gemm((a.data, a.scales), (b.data, b.scales)), out)


def test_the_bound_notices_one_wrong_scale():
    """A scale off by 2 %, in one of 192 tiles, is seen: the comparison is not blind."""
    a, b = operands(fresh_generator(), 64, 128, 384)
    wrong = a.scales.clone()
    wrong[17, 1] *= 1.02
    with pytest.raises(AssertionError, match="elements wrong"):
        assert_rounds_exact_product(dk.fp8_gemm((a.data, wrong), b), exact_values(a), exact_values(b))


def test_scales_of_any_strides():
    a, b = operands(fresh_generator(), 30, 264, 400)
    out = dk.fp8_gemm(a, b)
    row_major = dk.QuantizedTensor(a.data, a.scales.contiguous(), a.block)
    column_major = dk.QuantizedTensor(b.data, b.scales.t().contiguous().t(), b.block)
    spaced = dk.QuantizedTensor(a.data, torch.stack([a.scales, a.scales], 1)[:, 0], a.block)
    assert torch.equal(dk.fp8_gemm(row_major, b), out)
    assert torch.equal(dk.fp8_gemm(a, column_major), out)
    assert torch.equal(dk.fp8_gemm(spaced, b), out)


@pytest.mark.parametrize("sizes", [[5], [0, 128, 1, 300, 0], [0, 0], [1] * 9, [37, 0, 200]], ids=str)
@pytest.mark.parametrize("unused", [0, 11])
def test_grouped(sizes, unused):
    generator = fresh_generator()
    a, b = operands(generator, sum(sizes) + unused, 136, 272, (len(sizes),))
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    out = dk.grouped_fp8_gemm(a, b, offsets)
    assert out.dtype == torch.bfloat16 and tuple(out.shape) == (sum(sizes) + unused, 136)
    exact_a, exact_b = exact_values(a), exact_values(b)
    for g in range(len(sizes)):
        rows = slice(int(offsets[g]), int(offsets[g + 1]))
        assert_rounds_exact_product(out[rows], exact_a[rows], exact_b[g])
    assert not out[sum(sizes) :].any()


@pytest.mark.parametrize("counts", [[5, 0, 40], [0, 0, 0], [40, 40, 40], [1, 39, 2]], ids=str)
def test_masked(counts):
    a, b = operands(fresh_generator(), 40, 136, 272, (3,), masked=True)
    out = dk.masked_grouped_fp8_gemm(a, b, torch.tensor(counts, dtype=torch.int32))
    assert out.dtype == torch.bfloat16 and tuple(out.shape) == (3, 40, 136)
    exact_a, exact_b = exact_values(a), exact_values(b)
    for g, count in enumerate(counts):
        assert_rounds_exact_product(out[g, :count], exact_a[g, :count], exact_b[g])
        assert not out[g, count:].any()


def test_empty():
    def q(shape, quantizer):
        return quantizer(torch.zeros(shape))

    for m, n, k in ((0, 8, 128), (3, 0, 128), (3, 8, 0), (0, 0, 0)):
        out = dk.fp8_gemm(q((m, k), dk.quantize_1x128), q((n, k), dk.quantize_128x128))
        assert tuple(out.shape) == (m, n) and not out.any()
        for groups in (0, 2):
            b = q((groups, n, k), dk.quantize_128x128)
            offsets = torch.zeros(groups + 1, dtype=torch.int32)
            out = dk.grouped_fp8_gemm(q((m, k), dk.quantize_1x128), b, offsets)
            assert tuple(out.shape) == (m, n) and not out.any()
            out = dk.masked_grouped_fp8_gemm(q((groups, m, k), dk.quantize_1x128), b, offsets[:-1])
            assert tuple(out.shape) == (groups, m, n) and not out.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("power_of_2", [False, True])
def test_nan_and_inf_come_out_as_nan(bad, power_of_2):
    generator = fresh_generator()
    x, w = torch.randn(40, 384, generator=generator), torch.randn(264, 384, generator=generator)
    clean = dk.fp8_gemm(dk.quantize_1x128(x), dk.quantize_128x128(w))
    x[11, 200], w[130, 3] = bad, bad
    out = dk.fp8_gemm(
        dk.quantize_1x128(x, power_of_2_scales=power_of_2),
        dk.quantize_128x128(w, power_of_2_scales=power_of_2),
    )
    assert out[11].isnan().all()  # the row of x
    assert out[:, 128:256].isnan().all()  # the block of w
    others = [r for r in range(40) if r != 11]
    assert out[others][:, :128].isfinite().all() and out[others][:, 256:].isfinite().all()
    if not power_of_2:
        assert torch.equal(out[others][:, :128], clean[others][:, :128])
    scales = torch.full((40, 3), torch.nan)
    ones = torch.ones(40, 384).to(torch.float8_e4m3fn)
    assert dk.fp8_gemm((ones, scales), dk.quantize_128x128(torch.ones(8, 384))).isnan().all()


def test_the_reference_backend_agrees_with_hopper():
    """Truncation to 13 fraction bits within each 128 is all that is between them."""
    from dsv3_kernels import reference

    a, b = operands(fresh_generator(), 64, 128, 1024)
    fast, hopper = dk.fp8_gemm(a, b).double(), reference.fp8_gemm(a, b, "hopper").double()
    exact_a, exact_b = exact_values(a), exact_values(b)
    # A step truncates 33 terms and their sum, each by less than 2^-13 of the largest, which is below Σ|a·b|.
    bound = torch.zeros(64, 128, dtype=torch.float64)
    for k in range(0, 1024, 128):
        tile_a, tile_b = exact_a[:, k : k + 128].abs(), exact_b[:, k : k + 128].abs()
        bound += 4 * 34 * 2.0**-13 * (tile_a @ tile_b.t())
    gap = (fast - hopper).abs()
    assert (gap <= bound + 2.0**-8 * (fast.abs() + hopper.abs())).all()
    assert gap.any()  # they are two arithmetics
