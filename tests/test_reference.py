"""Hopper's arithmetic in the reference, bit for bit, against exact fractions; and what promotion saves."""

from fractions import Fraction

import pytest
import torch
from fp8_helpers import E4M3, fresh_generator, hopper_dot, round_to_float32, tensor_core_step

import dsv3_kernels as dk
from dsv3_kernels import reference

TABLE = torch.from_numpy(E4M3).float()


def random_codes(generator, *shape, low=0, high=127):
    """e4m3 values of random codes: every exponent alike, subnormals and zeros among them."""
    magnitude = torch.randint(low, high, shape, generator=generator)
    return TABLE[magnitude + 128 * torch.randint(2, shape, generator=generator)]


def cases(generator):
    yield random_codes(generator, 6, 32), random_codes(generator, 6, 32)
    yield random_codes(generator, 6, 32, high=9), random_codes(generator, 6, 32, high=9)  # subnormals
    yield random_codes(generator, 6, 32, low=110), random_codes(generator, 6, 32, low=110)  # the largest
    sparse = torch.rand(6, 32, generator=generator) < 0.9
    yield random_codes(generator, 6, 32).masked_fill_(sparse, 0), random_codes(generator, 6, 32)
    tiny, wide = random_codes(generator, 6, 32, high=9), random_codes(generator, 6, 32)
    yield tiny, wide  # the largest exponent comes from a subnormal's -6
    yield wide, tiny
    holes = torch.rand(1, 32, generator=generator) < 0.5
    tiny, zeros = tiny.masked_fill(holes, 448.0), random_codes(generator, 6, 32).masked_fill_(holes, 0)
    yield tiny, zeros  # 448 times zero has no exponent
    yield zeros, tiny
    half = random_codes(generator, 6, 16)
    flipped = torch.cat([half, -half], 1)  # sums that cancel wholly or nearly
    yield flipped, torch.cat([half.flip(0), half.flip(0)], 1)
    yield flipped, flipped.roll(1, 1)
    yield torch.zeros(6, 32), random_codes(generator, 6, 32)


def test_tensor_core_step():
    generator = fresh_generator()
    for round_ in range(4):
        for a, b in cases(generator):
            c = torch.zeros(6, 6)
            if round_:  # an accumulator of 14 significant bits, up to 2^±30 away from the products
                bits = torch.randint(1 << 13, 1 << 14, (6, 6), generator=generator).float()
                c = torch.ldexp(bits, torch.randint(-43, 17, (6, 6), generator=generator))
                c *= torch.randint(2, (6, 6), generator=generator) * 2 - 1
            got = reference.tensor_core(a, b, c)
            for i in range(6):
                for j in range(6):
                    want = tensor_core_step(a[i].tolist(), b[j].tolist(), Fraction(c[i, j].item()))
                    assert Fraction(got[i, j].item()) == want, (a[i], b[j], c[i, j])


def test_tensor_core_nan_and_zero():
    nan, zero, one = torch.full((1, 32), torch.nan), torch.zeros(1, 32), torch.ones(1, 32)
    for a, b in ((nan, one), (one, nan), (nan, zero)):
        got = reference.tensor_core(a, b, torch.ones(1, 1))
        assert got.view(torch.int32).item() == 0x7FFFFFFF
    got = reference.tensor_core(one, one, torch.full((1, 1), torch.nan))
    assert got.view(torch.int32).item() == 0x7FFFFFFF
    for a, c in ((zero, 0.0), (-zero, -0.0), (-zero, 0.0)):
        assert reference.tensor_core(a, one, torch.full((1, 1), c)).view(torch.int32).item() == 0
    kept = torch.tensor([[2.0**-40 * 8193]])
    assert torch.equal(reference.tensor_core(zero, one, kept), kept)


def test_fma_rounds_once():
    generator = fresh_generator()
    n = 4000
    partial = torch.randint(-(1 << 14) + 1, 1 << 14, (n,), generator=generator).float()
    s = torch.ldexp(
        torch.rand(n, generator=generator) + 0.5, torch.randint(-40, 40, (n,), generator=generator)
    )
    y = -(s * partial)  # cancels to a small remainder, or, shifted, overlaps in part
    y[::2] = torch.ldexp(y[::2], torch.randint(-30, 30, (n // 2,), generator=generator))
    got = reference.fma(s, partial, y)
    want = [
        float(round_to_float32(Fraction(a) * Fraction(b) + Fraction(c)))
        for a, b, c in zip(s.tolist(), partial.tolist(), y.tolist(), strict=True)
    ]
    assert got.tolist() == want
    assert (got != s * partial + y).any()  # the inputs do tell one rounding from two


def test_fma_where_fp64_would_round_twice():
    """y + s·partial lies 2^-60 beside the middle of two FP32 numbers; FP64 rounds it onto the middle."""
    ulp = 2.0**-23
    above = (16773121 * 2.0**-60, 4097.0)  # 4097 · 16773121 = 2^36 + 1, so s·partial = 2^-24 (1 + 2^-36)
    below = (8636355 * 2.0**-60, 7957.0)  # 7957 · 8636355 = 2^36 - 1
    for (s, partial), y, want in ((above, 1.0, 1 + ulp), (below, 1 + ulp, 1 + ulp)):
        for sign in (1, -1):
            args = [torch.tensor([v], dtype=torch.float32) for v in (s, sign * partial, sign * y)]
            assert [t.double().item() for t in args] == [s, sign * partial, sign * y]
            assert reference.fma(*args).item() == sign * want
            twice = (args[0].double() * args[1].double() + args[2].double()).float().item()
            assert twice != sign * want


def test_fma_special_values():
    inf, nan, largest = torch.inf, torch.nan, torch.finfo(torch.float32).max
    for s, partial, y, want in (
        (inf, 1.0, 0.0, inf),
        (inf, 0.0, 0.0, nan),
        (1.0, 1.0, -inf, -inf),
        (inf, 1.0, -inf, nan),
        (nan, 0.0, 1.0, nan),
        (largest, 2.0, 0.0, inf),
        (largest, 2.0, -largest, largest),
        (2.0**-149, 0.5, 0.0, 0.0),
        (2.0**-149, 0.5, 2.0**-149, 2.0**-148),
        (2.0**-149, 3.0, 2.0**-140, 2.0**-140 + 3 * 2.0**-149),
    ):
        got = reference.fma(*(torch.tensor([v]) for v in (s, partial, y)))
        assert torch.equal(got.nan_to_num(777.0), torch.tensor([want]).nan_to_num(777.0)), (s, partial, y)


def quantized(codes, scales, block):
    return dk.QuantizedTensor(codes.to(torch.float8_e4m3fn), scales, block)


@pytest.mark.parametrize("k", [16, 128, 144, 400])
def test_hopper_gemm_and_wgrad(k):
    """The promoted sum of whole GEMMs, with tails of K and N, against exact fractions."""
    generator = fresh_generator()
    m, n, tiles = 3, 136, -(-k // 128)
    a_values = random_codes(generator, m, k)
    b_values = random_codes(generator, n, k)
    scales = [
        torch.ldexp(torch.rand(r, tiles, generator=generator) + 0.5, torch.tensor(-6)) for r in (m, 2, n)
    ]
    a, b = quantized(a_values, scales[0], (1, 128)), quantized(b_values, scales[1], (128, 128))
    out = reference.fp8_gemm(a, b, "hopper")
    b_rows = quantized(b_values, scales[2], (1, 128))
    y = torch.full((m, n), torch.nan)
    wgrad = reference.fp8_wgrad(a, b_rows, y, accumulation="hopper")
    added = reference.fp8_wgrad(a, b_rows, y.clone(), accumulate=True, accumulation="hopper")
    assert wgrad is y and torch.equal(added, y + y)
    for i in range(m):
        for j in range(0, n, 9):
            rows = a_values[i].tolist(), b_values[j].tolist(), scales[0][i].tolist()
            want = torch.tensor(hopper_dot(*rows, scales[1][j // 128].tolist()))
            assert out[i, j] == want.bfloat16()
            assert y[i, j] == hopper_dot(*rows, scales[2][j].tolist())


def test_hopper_groups_are_dense_gemms():
    generator = fresh_generator()
    a = dk.quantize_1x128(torch.randn(60, 256, generator=generator))
    b = dk.quantize_128x128(torch.randn(3, 40, 256, generator=generator))
    offsets = torch.tensor([0, 25, 25, 58], dtype=torch.int32)
    out = reference.grouped_fp8_gemm(a, b, offsets, "hopper")
    masked_a = dk.QuantizedTensor(a.data.view(3, 20, 256), a.scales.reshape(3, 20, 2), (1, 128))
    masked = reference.masked_grouped_fp8_gemm(
        masked_a, b, torch.tensor([20, 0, 7], dtype=torch.int32), "hopper"
    )
    for g, (low, high) in enumerate(((0, 25), (25, 25), (25, 58))):
        rows = dk.QuantizedTensor(a.data[low:high], a.scales[low:high], (1, 128))
        weight = dk.QuantizedTensor(b.data[g], b.scales[g], (128, 128))
        assert torch.equal(out[low:high], reference.fp8_gemm(rows, weight, "hopper"))
    assert not out[58:].any() and not masked[1].any() and not masked[2, 7:].any()
    weight = dk.QuantizedTensor(b.data[2], b.scales[2], (128, 128))
    rows = dk.QuantizedTensor(a.data[40:47], a.scales[40:47], (1, 128))
    assert torch.equal(masked[2, :7], reference.fp8_gemm(rows, weight, "hopper"))


def test_hopper_nan_reaches_its_row_only():
    x = torch.randn(4, 256, generator=fresh_generator())
    x[2, 200] = torch.nan
    a, b = dk.quantize_1x128(x), dk.quantize_128x128(torch.eye(256)[:8].contiguous())
    out = reference.fp8_gemm(a, b, "hopper")
    assert out[2].isnan().all() and out[[0, 1, 3]].isfinite().all()


def accumulation_errors(a, b):
    """Largest error of the raw and of the promoted sum, relative to the RMS of the exact results."""
    exact = a.double() @ b.double().t()
    promoted = torch.zeros_like(exact, dtype=torch.float32)
    for k in range(0, a.shape[1], 128):
        promoted += reference.tensor_core_dot(a[:, k : k + 128], b[:, k : k + 128])
    sums = reference.tensor_core_dot(a, b), promoted
    return [((s - exact).abs().max() / exact.square().mean().sqrt()).item() for s in sums]


def test_what_promotion_saves():
    """K = 4096 in the tensor core's 14-bit accumulator alone costs up to about 2 % on normal data (the figure
    of the DeepSeek-V3 report, section 3.3.2) and 8 % on data of one sign; promoted every 128, under 0.1 %."""
    generator = fresh_generator()
    for name, draw, low, high in (
        ("normal", torch.randn, 0.004, 0.04),  # 150 seeds: 0.8 to 2.1 %, promoted 0.04 to 0.07 %
        ("uniform in 0..1", torch.rand, 0.06, 0.10),  # 7.9 to 8.1 %, promoted 0.06 to 0.07 %
    ):
        a, b = (
            reference.decode(dk.quantize_1x128(draw(64, 4096, generator=generator)).data) for _ in range(2)
        )
        raw, promoted = accumulation_errors(a, b)
        print(f"{name}: raw {raw:.3%}, promoted {promoted:.3%}")
        assert low < raw < high
        assert promoted < 0.0015 and raw > 5 * promoted
