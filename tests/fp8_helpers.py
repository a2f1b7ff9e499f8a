"""Independent models of what the ops promise: float64, NumPy, exact fractions; none of the package's code."""

import os
import secrets
from fractions import Fraction

import numpy as np
import pytest
import torch
from commit_seed import base, seeds

SCALINGS = {"exact": {}, "power_of_2": {"power_of_2_scales": True}, "ue8m0": {"ue8m0_scales": True}}
each_scaling = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
powers = pytest.mark.parametrize("power_of_2", [False, True], ids=["exact", "power_of_2"])

torch.set_num_threads(1)  # tensors this small lose more to two threads' barriers than they gain


def fresh_generator() -> torch.Generator:
    """A new seed every run, printed (pytest shows it when the test fails); DSV3_SEED repeats one."""
    seed = int(os.environ.get("DSV3_SEED") or secrets.randbits(32))
    print(f"DSV3_SEED={seed}")
    return torch.Generator().manual_seed(seed)


def commit_generator() -> torch.Generator:
    """Of the running test, one seed for each commit (tests/commit_seed.py); what is printed repeats it."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    print(f"DSV3_SEED={base()}")
    return torch.Generator().manual_seed(seeds(test, 1)[0])


def offsets_of(*sizes: int) -> torch.Tensor:
    """group_offsets of groups of these sizes."""
    return torch.tensor([0, *sizes]).cumsum(0).int()


def e4m3_value(code: int) -> float:
    sign, exponent, fraction = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    return sign * (fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10))


E4M3 = np.array([e4m3_value(code) for code in range(256)])
_MAGNITUDES = E4M3[:127]
_MIDPOINTS = (_MAGNITUDES[:-1] + _MAGNITUDES[1:]) / 2


def encode_e4m3(x: np.ndarray) -> np.ndarray:
    """Codes of float64 values: nearest, ties to the even code, saturating, NaN to 0x7F."""
    x = np.asarray(x, np.float64)
    magnitude = np.abs(x)
    below = np.searchsorted(_MIDPOINTS, magnitude, side="left")  # midpoints under |x|: a tie stays low
    tie = np.isin(magnitude, _MIDPOINTS) & (below % 2 == 1)
    codes = (below + tie) | np.where(np.signbit(x), 0x80, 0)
    return np.where(np.isnan(x), 0x7F, codes).astype(np.uint8)


def tile_scale(tile: np.ndarray, power_of_2: bool) -> np.float32:
    amax = np.abs(tile.astype(np.float32)).max()
    if amax == 0:
        return np.float32(1)
    scale = max(np.float32(amax) / np.float32(448), np.float32(2.0**-126))
    if power_of_2:
        fraction, exponent = np.frexp(np.float64(scale))
        scale = np.float32(np.ldexp(1.0, int(exponent) - (fraction == 0.5)))
    return np.float32(scale)


def quantize(x: torch.Tensor, block: tuple[int, int], power_of_2: bool) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of a finite matrix, one tile at a time."""
    values = x.float().numpy()
    rows, columns = block
    m, k = values.shape
    codes = np.zeros((m, k), np.uint8)
    scales = np.zeros((-(-m // rows), -(-k // columns)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scales[i, j] = tile_scale(values[at], power_of_2)
            codes[at] = encode_e4m3(values[at] / scales[i, j])
    return codes, scales


def exact_values(q) -> torch.Tensor:
    """Code times scale in float64, where the product of 4 and 24 bits is exact."""
    codes = torch.from_numpy(E4M3)[q.data.view(torch.uint8).long()]
    rows, columns = q.block
    *_, m, k = codes.shape
    scales = q.scales.double().repeat_interleave(rows, -2)[..., :m, :].repeat_interleave(columns, -1)[..., :k]
    return codes * scales


def assert_same(got, want) -> None:
    """Equal codes and scales; of a NaN neither the sign nor the payload counts."""
    got_codes, want_codes = (q.data.view(torch.uint8) for q in (got, want))
    both_nan = (got_codes & 0x7F == 0x7F) & (want_codes & 0x7F == 0x7F)
    wrong = (got_codes != want_codes) & ~both_nan
    assert not wrong.any(), f"codes differ at {wrong.nonzero()[:5].tolist()}"
    assert got.scales.shape == want.scales.shape and got.scales.stride() == want.scales.stride()
    assert got.scales.dtype == want.scales.dtype
    got_scales, want_scales = got.scales.float(), want.scales.float()
    wrong = (got_scales != want_scales) & ~(got_scales.isnan() & want_scales.isnan())
    assert not wrong.any(), f"scales differ at {wrong.nonzero()[:5].tolist()}"
    assert got.block == want.block


def wide(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Rows from subnormal to nearly overflowing, with zeros of both signs."""
    exponents = torch.randint(-149, 126, (*shape[:-1], 1), generator=generator)
    x = torch.ldexp(torch.randn(shape, generator=generator), exponents)
    x.view(-1)[::7] = 0.0
    x.view(-1)[3::11] = -0.0
    return x


def round_to_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """float64 rounded to `bits` significant bits, ties to even (normal range)."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(torch.ldexp(fraction, torch.tensor(bits))), exponent - bits)


def assert_rounds_exact_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Each element of `out`, BF16 or FP32, is the rounding of a number within FP32 error of the float64 a·bᵀ.

    The FP32 error of a sum of K products of dequantised operands is at most (K + 4)·2^-24·Σ|a·b|: a rounding
    for each operand and product, K - 1 for the sum, one in reserve for second-order terms. Rounding is
    monotone, so `out` lies between the roundings of exact - error and exact + error.
    """
    exact, magnitude = a @ b.mT, a.abs() @ b.abs().mT
    error = (a.shape[-1] + 4) * 2.0**-24 * magnitude
    bits = 8 if out.dtype == torch.bfloat16 else 24
    low, high = round_to_bits(exact - error, bits), round_to_bits(exact + error, bits)
    got = out.double()
    wrong = ~((low <= got) & (got <= high))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements wrong; the first at {at}: got {got[at]}, "
            f"exact {exact[at]}, allowed {low[at]} to {high[at]}"
        )


# Hopper's arithmetic on Python integers


def _floor_log2(x: Fraction) -> int:
    x = abs(x)
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if x >= Fraction(2) ** guess else guess - 1


def _truncate(x: Fraction, unit_exponent: int) -> Fraction:
    unit = Fraction(2) ** unit_exponent
    return int(x / unit) * unit


def tensor_core_step(a: list[float], b: list[float], c: Fraction) -> Fraction:
    """32 products and the accumulator, finite."""
    terms = []
    for x, y in zip(a, b, strict=True):
        if x and y:
            exponents = [max(-6, _floor_log2(Fraction(v))) for v in (x, y)]
            terms.append((Fraction(x) * Fraction(y), sum(exponents)))
    if c:
        terms.append((c, _floor_log2(c)))
    if not terms:
        return Fraction(0)
    largest = max(exponent for _, exponent in terms)
    total = sum((_truncate(term, largest - 13) for term, _ in terms), Fraction(0))
    return _truncate(total, _floor_log2(total) - 13) if total else Fraction(0)


def round_to_float32(x: Fraction) -> Fraction:
    if not x:
        return x
    unit = Fraction(2) ** max(_floor_log2(x) - 23, -149)
    return round(x / unit) * unit  # Python rounds halves to even


def hopper_dot(a: list[float], b: list[float], scales_a: list[float], scales_b: list[float]) -> float:
    """One element of a·bᵀ before the final cast: the tensor core per 128, promoted with one FMA."""
    y = Fraction(0)
    for tile, (scale_a, scale_b) in enumerate(zip(scales_a, scales_b, strict=True)):
        c = Fraction(0)
        for k in range(tile * 128, min(len(a), tile * 128 + 128), 32):
            c = tensor_core_step(a[k : k + 32], b[k : k + 32], c)
        y = round_to_float32(round_to_float32(Fraction(scale_a) * Fraction(scale_b)) * c + y)
    return float(y)
