"""Number formats of the emulator, against torch where it defines the format and exact rationals elsewhere."""

import bisect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from dsv3_kernels import _emulator

leaves = _emulator.leaves

# Casting a signalling NaN from FP32 to FP64 sets the invalid flag.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast")

# exponent bits, fraction bits, largest finite code, has infinity, code of NaN
FORMATS = {
    "e4m3": (4, 3, 0x7E, False, 0x7F),
    "e5m2": (5, 2, 0x7B, True, 0x7F),
    "f16": (5, 10, 0x7BFF, True, 0x7FFF),
    "bf16": (8, 7, 0x7F7F, True, 0x7FFF),
}
TORCH = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
ROUNDINGS = ("rn", "rna", "rz", "rm", "rp")


def all_values(name: str) -> np.ndarray:
    """FP32 value of every code, by torch."""
    bits = 8 if name.startswith("e") else 16
    codes = torch.arange(2**bits).to(torch.uint8 if bits == 8 else torch.uint16)
    return codes.view(TORCH[name]).float().numpy()


def positive_grid(name: str) -> list[Fraction]:
    """Exact values of the finite codes from 0 up, plus the first value beyond the range."""
    exponent_bits, fraction_bits, max_finite, _, _ = FORMATS[name]
    bias = 2 ** (exponent_bits - 1) - 1
    grid = []
    for code in range(max_finite + 2):
        field, fraction = divmod(code, 2**fraction_bits)
        significand = Fraction(fraction + (2**fraction_bits if field else 0))
        grid.append(significand * Fraction(2) ** (max(field, 1) - bias - fraction_bits))
    return grid


def round_exactly(x: Fraction, name: str, rounding: str, saturate: bool) -> int:
    """The code of a nonzero x, found by bisection in the table of exact values."""
    exponent_bits, fraction_bits, max_finite, has_infinity, nan = FORMATS[name]
    grid = GRIDS[name]
    negative, magnitude = x < 0, abs(x)
    sign = 1 << (exponent_bits + fraction_bits) if negative else 0
    low = min(bisect.bisect_right(grid, magnitude) - 1, max_finite)
    beyond = magnitude >= grid[-1]
    if magnitude == grid[low]:
        code = low
    else:
        high = low + 1
        middle = (grid[low] + grid[high]) / 2
        up = {
            "rn": magnitude > middle or (magnitude == middle and low % 2 == 1),
            "rna": magnitude >= middle,
            "rz": False,
            "rm": negative,
            "rp": not negative,
        }[rounding]
        code = high if up else low
    if beyond:
        code = max_finite if rounding in ("rz", "rp" if negative else "rm") else max_finite + 1
    if code > max_finite:
        code = max_finite if saturate else (max_finite + 1 if has_infinity else nan)
        return code if code == nan else sign | code
    return sign | code


GRIDS = {name: positive_grid(name) for name in FORMATS}


def hard_inputs(name: str, rng: np.random.Generator) -> np.ndarray:
    """Every value of the format, the midpoints between neighbours, both a float64 ulp off, random ones."""
    finite = np.unique(np.abs(all_values(name)[np.isfinite(all_values(name))])).astype(np.float64)
    middles = (finite[1:] + finite[:-1]) / 2
    if finite.size > 2000:
        pick = rng.choice(finite.size - 1, 500, replace=False)
        finite, middles = np.concatenate([finite[pick], finite[:5], finite[-5:]]), middles[pick]
    points = np.concatenate([finite, middles, [finite.max() * 1.03, finite.max() * 2, 1e300, 5e-324]])
    spread = rng.standard_normal(500) * 2.0 ** rng.integers(-30, 30, 500)
    points = np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, 0), spread])
    points = np.concatenate([points, -points])
    return points[points != 0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_encode_against_exact_rationals(name, rounding):
    x = hard_inputs(name, np.random.default_rng(7))
    for saturate in (False, True):
        got = leaves.encode(x, name, rounding, saturate)
        expected = [round_exactly(Fraction(float(v)), name, rounding, saturate) for v in x]
        wrong = [i for i in range(x.size) if got[i] != expected[i]]
        assert not wrong, [(x[i], hex(got[i]), hex(expected[i])) for i in wrong[:5]]


@pytest.mark.parametrize("name", FORMATS)
def test_decode_every_code(name):
    values = all_values(name)
    codes = np.arange(values.size, dtype=np.uint32)
    np.testing.assert_array_equal(leaves.decode(codes, name), values.astype(np.float64))
    fast = leaves.fast_to_float_bits(codes, name)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(fast[finite], values.view(np.uint32)[finite])
    assert np.isnan(fast.view(np.float32)[~finite]).all()


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_survives_the_round_trip(name):
    values = all_values(name)
    codes = np.arange(values.size, dtype=np.uint32)
    back = leaves.encode(values, name)
    np.testing.assert_array_equal(back, np.where(np.isnan(values), FORMATS[name][4], codes))


@pytest.mark.parametrize("name", ["e4m3", "f16", "bf16"])
def test_fast_paths_equal_encode(name):
    rng = np.random.default_rng(3)
    random_bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    near = hard_inputs(name, rng).clip(-3e38, 3e38).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    x = np.concatenate([random_bits, near, special])
    expected = leaves.encode(x, name, "rn", name == "e4m3")
    got = leaves.fast_from_float(x, name)
    wrong = np.flatnonzero(got != expected)
    assert wrong.size == 0, [(x[i], hex(got[i]), hex(expected[i])) for i in wrong[:5]]


def test_fast_paths_agree_with_torch():
    rng = np.random.default_rng(4)
    x = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    for name, width in (("bf16", torch.int16), ("f16", torch.int16)):
        expected = torch.from_numpy(x).to(TORCH[name]).view(width).numpy().astype(np.uint16)
        np.testing.assert_array_equal(leaves.fast_from_float(x, name), expected)
    inside = x[np.abs(x) <= 448]
    expected = torch.from_numpy(inside).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(leaves.fast_from_float(inside, "e4m3"), expected)


def test_specials_and_modifiers():
    specials = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0])
    assert leaves.encode(specials, "e4m3", "rn", True).tolist() == [0x7F, 0x7E, 0xFE, 0, 0x80]
    assert leaves.encode(specials, "f16").tolist() == [0x7FFF, 0x7C00, 0xFC00, 0, 0x8000]
    relu = leaves.encode(np.array([np.nan, -np.inf, -1.0, -0.0, 1.0]), "bf16", "rn", False, True)
    assert relu.tolist() == [0x7FFF, 0, 0, 0, 0x3F80]


def test_packed_forms_put_the_first_source_in_the_upper_half():
    assert leaves.cvt_fp8x2_f32(1.0, -448.0, "e4m3", False) == 0x38FE
    assert leaves.cvt_fp8x2_f32(1e9, math.nan, "e5m2", False) == 0x7B7F
    assert leaves.cvt_fp8x2_f32(-1.0, 2.0, "e4m3", True) == 0x0040
    assert leaves.cvt_fp8x2_f16x2(0x3C00_FC00, "e4m3", False) == 0x38FE  # 1.0 and -inf
    assert leaves.cvt_f16x2_fp8x2(0x387F, "e4m3", False) == 0x3C00_7FFF
    assert leaves.cvt_f16x2_fp8x2(0xB87C, "e5m2", True) == 0x0000_7C00  # -0.5 under relu, inf
    assert leaves.cvt_half2_f32(1.0, -2.0, "bf16", "rn", False, False) == 0x3F80_C000
    assert leaves.cvt_half2_f32(70000.0, 1.0, "f16", "rz", False, False) == 0x7BFF_3C00


def test_e4m3_and_e5m2_codes_are_exact_in_f16():
    for name in ("e4m3", "e5m2"):
        values = all_values(name)
        for code in range(256):
            half = np.uint16(leaves.cvt_f16x2_fp8x2(code, name, False) & 0xFFFF).view(np.float16)
            assert (np.isnan(half) and np.isnan(values[code])) or half == values[code]


def test_tf32_keeps_ten_fraction_bits():
    ulp = 2.0**-10
    assert leaves.cvt_tf32_f32(1 + ulp / 2, "rna", False, False) == np.float32(1 + ulp).view(np.uint32)
    assert leaves.cvt_tf32_f32(1 + ulp / 2, "rn", False, False) == np.float32(1).view(np.uint32)
    assert leaves.cvt_tf32_f32(-1 - ulp * 0.99, "rz", False, False) == np.float32(-1).view(np.uint32)
    assert leaves.cvt_tf32_f32(math.nan, "rna", False, False) == 0x7FFFFFFF
    assert leaves.cvt_tf32_f32(3.4028e38, "rna", False, False) == 0x7F800000
    assert leaves.cvt_tf32_f32(3.4028e38, "rna", True, False) == 0x7F7FE000
