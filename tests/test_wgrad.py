"""The weight gradient, element by element against the float64 product of the dequantised operands."""

import pytest
import torch
from fp8_helpers import assert_rounds_exact_product, exact_values, fresh_generator

import dsv3_kernels as dk


def operands(generator, tokens, n, k, offsets=None):
    dy, x = torch.randn(tokens, n, generator=generator), torch.randn(tokens, k, generator=generator)
    dy, x = (torch.ldexp(t, torch.randint(-8, 8, (1, t.shape[1]), generator=generator)) for t in (dy, x))
    return dk.quantize_1x128_t(dy, offsets), dk.quantize_1x128_t(x, offsets)


@pytest.mark.parametrize(
    "shape", [(1, 8, 16), (128, 24, 8), (129, 136, 40), (300, 64, 264), (1024, 32, 32)], ids=str
)
def test_dense(shape):
    _, n, k = shape
    dy_t, x_t = operands(fresh_generator(), *shape)
    out = dk.fp8_wgrad(dy_t, x_t)
    assert out.dtype == torch.float32 and tuple(out.shape) == (n, k) and out.is_contiguous()
    assert_rounds_exact_product(out, exact_values(dy_t), exact_values(x_t))
    poisoned = torch.full((n, k), torch.nan)
    assert dk.fp8_wgrad(dy_t, x_t, poisoned) is poisoned
    assert torch.equal(poisoned, out)
    start = torch.randn(n, k, generator=fresh_generator())
    total = start.clone()
    assert dk.fp8_wgrad(dy_t, x_t, total, accumulate=True) is total
    assert torch.equal(total, start + out)  # one addition, after the whole sum
    assert torch.equal(dk.fp8_wgrad((dy_t.data, dy_t.scales), (x_t.data, x_t.scales)), out)


@pytest.mark.parametrize("sizes", [[], [0], [5], [0, 128, 1, 300, 0], [127, 129, 2], [256]], ids=str)
@pytest.mark.parametrize("unused", [0, 11])
def test_grouped(sizes, unused):
    generator = fresh_generator()
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    dy_t, x_t = operands(generator, sum(sizes) + unused, 24, 40, offsets)
    poisoned = torch.full((len(sizes), 24, 40), torch.nan)
    out = dk.fp8_wgrad(dy_t, x_t, poisoned, group_offsets=offsets)
    assert out is poisoned
    assert torch.equal(dk.fp8_wgrad(dy_t, x_t, group_offsets=offsets), out)
    exact_dy, exact_x = exact_values(dy_t), exact_values(x_t)
    start = 0
    for g, size in enumerate(sizes):
        end = start + -(-size // 128) * 128
        assert_rounds_exact_product(out[g], exact_dy[:, start:end], exact_x[:, start:end])
        assert size or not out[g].any()
        start = end
    base = torch.randn(out.shape, generator=generator)
    total = dk.fp8_wgrad(dy_t, x_t, base.clone(), True, offsets)
    assert torch.equal(total, base + out)


def test_gradient_of_a_linear_layer():
    """Within what e4m3's 3 fraction bits allow of the exact dyᵀ·x, for every group."""
    generator = fresh_generator()
    offsets = torch.tensor([0, 100, 100, 300], dtype=torch.int32)
    dy, x = torch.randn(300, 32, generator=generator), torch.randn(300, 48, generator=generator)
    out = dk.fp8_wgrad(
        dk.quantize_1x128_t(dy, offsets), dk.quantize_1x128_t(x, offsets), group_offsets=offsets
    )
    for g in range(3):
        rows = slice(int(offsets[g]), int(offsets[g + 1]))
        exact = dy[rows].double().t() @ x[rows].double()
        # An operand is off by at most 2^-4 of itself, or 2^-10 of its tile's scale where codes are subnormal.
        magnitude = dy[rows].double().abs().t() @ x[rows].double().abs()
        slack = 2.0**-10 / 448 * 5 * 5 * 2 * dy[rows].shape[0]
        assert ((out[g] - exact).abs() <= (2 * 2.0**-4 + 2.0**-8) * magnitude + slack).all()


def test_empty():
    for tokens, n, k in ((0, 8, 16), (5, 0, 16), (5, 8, 0)):
        dy_t, x_t = dk.quantize_1x128_t(torch.ones(tokens, n)), dk.quantize_1x128_t(torch.ones(tokens, k))
        out = dk.fp8_wgrad(dy_t, x_t, torch.full((n, k), torch.nan))
        assert not out.any()
        kept = torch.full((n, k), 3.0)
        dk.fp8_wgrad(dy_t, x_t, kept, accumulate=True)
        assert (kept == 3 + tokens).all() if n * k else True


def test_nan_reaches_its_row_and_group_only():
    generator = fresh_generator()
    offsets = torch.tensor([0, 100, 200], dtype=torch.int32)
    dy, x = torch.randn(200, 8, generator=generator), torch.randn(200, 16, generator=generator)
    dy[150, 3] = torch.nan
    out = dk.fp8_wgrad(
        dk.quantize_1x128_t(dy, offsets), dk.quantize_1x128_t(x, offsets), group_offsets=offsets
    )
    expected = torch.zeros(2, 8, 16, dtype=torch.bool)
    expected[1, 3] = True
    assert torch.equal(out.isnan(), expected)


def test_offsets_that_need_more_columns_than_there_are():
    dy_t = dk.quantize_1x128_t(torch.ones(100, 8))
    with pytest.raises(ValueError, match=r"group_offsets takes 256 token columns .* expected at most 128"):
        dk.fp8_wgrad(dy_t, dy_t, group_offsets=torch.tensor([0, 50, 100], dtype=torch.int32))
