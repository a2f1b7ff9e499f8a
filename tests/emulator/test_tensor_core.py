"""wgmma's arithmetic and layouts, against an exact model in rationals that shares nothing with the C++."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from dsv3_kernels import _emulator, reference

leaves = _emulator.leaves

TORCH = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
}
MIN_EXPONENT = {"e4m3": -6, "e5m2": -14, "f16": -14, "bf16": -126, "tf32": -126, "f32": -126}


def values_of(tile: np.ndarray, kind: str) -> np.ndarray:
    """[rows, 32 bytes] -> [rows, depth] float64."""
    if kind == "tf32":
        tile = (np.ascontiguousarray(tile).view(np.uint32) & 0xFFFFE000).view(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(tile)).view(TORCH[kind]).double().numpy()


def floor_log2(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if x >= Fraction(2) ** e else e - 1


def exponent(x: float, kind: str) -> int:
    return max(floor_log2(abs(Fraction(x))), MIN_EXPONENT[kind])


def truncate(x: Fraction, quantum: Fraction) -> Fraction:
    steps = abs(x) / quantum
    return (1 if x > 0 else -1) * (steps.numerator // steps.denominator) * quantum


def round_half_even(x: Fraction, quantum: Fraction) -> Fraction:
    return round(x / quantum) * quantum


def model(a_row, b_row, c: float, a_kind: str, b_kind: str, d_kind: str) -> int:
    """One output of one step, as the bits of the FP32 value."""
    with np.errstate(all="ignore"):
        total = float(np.sum(a_row * b_row) + c)
    if not np.isfinite(total):
        if np.isnan(total):
            return 0x7FFFFFFF if d_kind == "f32" else 0x7FFFE000
        return int(np.float32(total).view(np.uint32))
    fp8 = a_kind in ("e4m3", "e5m2")
    bits = 13 if fp8 else 25
    terms = [
        (Fraction(float(x)) * Fraction(float(y)), exponent(x, a_kind) + exponent(y, b_kind))
        for x, y in zip(a_row, b_row, strict=True)
        if x != 0 and y != 0
    ]
    if c != 0:
        terms.append((Fraction(float(c)), exponent(c, d_kind)))
    if not terms:
        return 0
    quantum = Fraction(2) ** (max(e for _, e in terms) - bits)
    total = sum((truncate(t, quantum) for t, _ in terms), Fraction(0))
    if total == 0:
        return 0
    e = max(floor_log2(abs(total)), MIN_EXPONENT[d_kind])
    if d_kind == "f32":
        result = truncate(total, Fraction(2) ** (e - (13 if fp8 else 23)))
        limit = Fraction(2) ** 128
    else:
        result = round_half_even(total, Fraction(2) ** (e - 10))
        limit = Fraction(2) ** 16
    if abs(result) >= limit:
        return 0x7F800000 if result > 0 else 0xFF800000
    return int(np.float32(float(result)).view(np.uint32)) if result else 0


CASES = [
    ("e4m3", "e4m3", "f32"),
    ("e4m3", "e5m2", "f32"),
    ("e5m2", "e4m3", "f16"),
    ("e5m2", "e5m2", "f32"),
    ("f16", "f16", "f32"),
    ("f16", "f16", "f16"),
    ("bf16", "bf16", "f32"),
    ("tf32", "tf32", "f32"),
]


def random_tile(rng, rows: int, kind: str, style: str) -> np.ndarray:
    if style == "bits":
        return rng.integers(0, 256, (rows, 32), dtype=np.uint8)
    depth = 32 // torch.empty(0, dtype=TORCH[kind]).element_size()
    x = rng.standard_normal((rows, depth))
    if style == "wide":
        x *= 2.0 ** rng.integers(-12, 8, x.shape)
    elif style == "subnormal":
        x *= 2.0 ** (MIN_EXPONENT[kind] - 1)
    elif style == "cancel":
        x = np.where(np.arange(depth) % 2 == 0, 1.0, -1.0) * rng.choice([1.0, 1.125, 0.0, 2.0**-5], x.shape)
    return torch.from_numpy(x).to(TORCH[kind]).view(torch.uint8).numpy().reshape(rows, 32)


def random_accumulator(rng, shape, kind: str, style: str) -> np.ndarray:
    if style == "bits":
        c = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    else:
        c = (rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 12, shape)).astype(np.float32)
        c[rng.random(shape) < 0.2] = 0
        if style == "subnormal":
            c *= np.float32(2.0**-120)
    if kind == "f16":
        with np.errstate(over="ignore"):
            c = c.astype(np.float16).astype(np.float32)
    return c


@pytest.mark.parametrize("a_kind,b_kind,d_kind", CASES)
@pytest.mark.parametrize("style", ["bits", "normal", "wide", "subnormal", "cancel"])
def test_step_is_bit_exact(a_kind, b_kind, d_kind, style):
    seed = int(torch.seed() % 2**32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    n = 16
    a, b = random_tile(rng, 64, a_kind, style), random_tile(rng, n, b_kind, style)
    c = random_accumulator(rng, (64, n), d_kind, style)
    got = leaves.multiply_accumulate(a, b, c.view(np.uint32), a_kind, b_kind, d_kind)
    av, bv = values_of(a, a_kind), values_of(b, b_kind)
    for i in range(0, 64, 3):
        for j in range(n):
            expected = model(av[i], bv[j], float(c[i, j]), a_kind, b_kind, d_kind)
            assert got[i, j] == expected, (i, j, hex(got[i, j]), hex(expected), av[i], bv[j], c[i, j])


def e4m3_tile(rows: list[list[float]], count: int) -> np.ndarray:
    x = torch.zeros(count, 32)
    for i, row in enumerate(rows):
        x[i, : len(row)] = torch.tensor(row)
    return x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_truncation_by_hand():
    """2^14 swallows everything below 2 (13 fraction bits), whatever its sign."""
    a = e4m3_tile([[128.0, 1.0, 1.5], [128.0, -1.0, 1.0]], 64)
    b = e4m3_tile([[128.0, 1.0, 2.0], [1.0, 1.0, 1.0]], 8)
    got = leaves.multiply_accumulate(a, b, np.zeros((64, 8), np.uint32)).view(np.float32)
    assert got[0, 0] == 16384 + 0 + 2  # 3 truncates to 2
    assert got[0, 1] == 130.5
    assert got[1, 0] == 16384 + 2
    assert got[1, 1] == 128


def test_zero_products_do_not_set_the_exponent():
    a, b = e4m3_tile([[0.0, 2.0**-9]], 64), e4m3_tile([[448.0, 2.0**-9]], 8)
    c = np.zeros((64, 8), np.float32)
    c[0, 0] = 2.0**-31
    got = leaves.multiply_accumulate(a, b, c.view(np.uint32)).view(np.float32)
    assert got[0, 0] == 2.0**-18  # exponent of the product is -12: 2^-31 lies below 2^-25 and is cut
    c[1, 0] = 3e-39
    got = leaves.multiply_accumulate(a, b, c.view(np.uint32)).view(np.float32)
    assert got[1, 0] == truncate_f32(3e-39)


def truncate_f32(x: float) -> np.float32:
    return np.float32(float(truncate(Fraction(float(np.float32(x))), Fraction(2) ** (-126 - 13))))


@pytest.mark.parametrize("style", ["bits", "normal", "wide", "subnormal", "cancel"])
def test_agrees_with_the_reference(style):
    """Four steps from zero, as a GEMM takes them, against the reference's own model of the tensor core."""
    rng = np.random.default_rng(11)
    a, b = ([random_tile(rng, rows, "e4m3", style) for _ in range(4)] for rows in (64, 40))
    d = np.zeros((64, 40), np.uint32)
    for a_step, b_step in zip(a, b, strict=True):
        d = leaves.multiply_accumulate(a_step, b_step, d)
    operands = (torch.from_numpy(np.concatenate([values_of(s, "e4m3") for s in x], axis=1)) for x in (a, b))
    expected = reference.tensor_core_dot(*(x.float() for x in operands)).numpy()
    nan = np.isnan(expected)
    np.testing.assert_array_equal(d[nan], 0x7FFFFFFF)
    np.testing.assert_array_equal(d[~nan], expected.view(np.uint32)[~nan])


def test_scale_d_and_negation():
    rng = np.random.default_rng(1)
    a, b = random_tile(rng, 64, "e4m3", "normal"), random_tile(rng, 24, "e4m3", "normal")
    poison = np.full((64, 24), 0x7FFFFFFF, np.uint32)
    zero = np.zeros((64, 24), np.uint32)
    plain = leaves.multiply_accumulate(a, b, zero)
    np.testing.assert_array_equal(leaves.multiply_accumulate(a, b, poison, scale_d=False), plain)
    negated = leaves.multiply_accumulate(a, b, zero, negate_a=True).view(np.float32)
    np.testing.assert_array_equal(negated, -plain.view(np.float32))
    both = leaves.multiply_accumulate(a, b, zero, negate_a=True, negate_b=True)
    np.testing.assert_array_equal(both, plain)


def test_exact_accumulate_is_a_chain_of_fma():
    rng = np.random.default_rng(2)
    a, b = random_tile(rng, 64, "e4m3", "wide"), random_tile(rng, 8, "e4m3", "wide")
    c = random_accumulator(rng, (64, 8), "f32", "normal")
    got = leaves.multiply_accumulate(a, b, c.view(np.uint32), exact_accumulate=True).view(np.float32)
    av, bv = values_of(a, "e4m3"), values_of(b, "e4m3")
    for i in range(0, 64, 9):
        for j in range(8):
            y = Fraction(float(c[i, j]))
            for k in range(32):
                total = Fraction(av[i, k]) * Fraction(bv[j, k]) + y
                y = round_half_even(total, Fraction(2) ** (floor_log2(abs(total)) - 23)) if total else total
            assert Fraction(float(got[i, j])) == y


@pytest.mark.parametrize(
    "config,message",
    [
        ({"a_type": "bf16", "b_type": "f16"}, "operand types differ"),
        ({"a_type": "e4m3", "b_type": "f16"}, "operand types differ"),
        ({"a_type": "bf16", "b_type": "bf16", "d_type": "f16"}, "f16 accumulator"),
        ({"a_type": "e3m4"}, "operand type is e3m4, expected one of"),
    ],
)
def test_combinations_that_do_not_exist(config, message):
    with pytest.raises(ValueError, match=message):
        a, b, d = np.zeros((64, 32), np.uint8), np.zeros((8, 32), np.uint8), np.zeros((64, 8), np.uint32)
        leaves.multiply_accumulate(a, b, d, **config)


# ---- Layouts ----------------------------------------------------------------------------------------------


def swizzled(address: int, width: int) -> int:
    return address ^ ((address >> 7) & (width // 16 - 1 if width else 0)) << 4


def descriptor(start: int, lbo: int, sbo: int, swizzle: int, base: int = 0) -> int:
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return start >> 4 | (lbo >> 4) << 16 | (sbo >> 4) << 32 | base << 49 | mode << 62


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("rows", [8, 64, 192, 256])
def test_k_major_reads_what_a_row_major_tile_holds(swizzle, rows):
    """A tile of `rows` lines of `swizzle` bytes, swizzled as a whole, read at every 32-byte step of K."""
    base = 0x4000
    memory = np.zeros(0x40000, np.uint8)
    tile = np.random.default_rng(rows).integers(0, 256, (rows, swizzle), dtype=np.uint8)
    for r in range(rows):
        for c in range(swizzle):
            memory[swizzled(base + r * swizzle + c, swizzle)] = tile[r, c]
    for k in range(swizzle // 32):
        bits = descriptor(base + 32 * k, 16, 8 * swizzle, swizzle)
        addresses = leaves.operand_chunk_addresses(bits, False, rows)
        chunks = np.stack([memory[a : a + 16] for a in addresses])
        np.testing.assert_array_equal(leaves.assemble_operand(False, chunks), tile[:, 32 * k : 32 * k + 32])


def test_k_major_without_swizzle_strides_core_matrices():
    addresses = leaves.operand_chunk_addresses(descriptor(0x1000, 0x400, 0x80, 0), False, 64)
    for row in range(64):
        for half in range(2):
            assert addresses[2 * row + half] == 0x1000 + row // 8 * 0x80 + row % 8 * 16 + half * 0x400


def test_base_offset_moves_the_pattern():
    start = 0x2000 + 3 * 128  # a pattern that starts on line 3 of an aligned 1024
    moved = leaves.operand_chunk_addresses(descriptor(start, 16, 1024, 128, base=3), False, 8)
    assert moved == [start + 128 * r + (half ^ r) * 16 for r in range(8) for half in range(2)]


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_mn_major_reads_the_transpose(swizzle):
    """bf16, 128 rows of M: panels of `swizzle` bytes of M, each a block of 16 lines of K."""
    rows, depth, base = 128, 16, 0x8000
    panel = swizzle // 2
    values = np.random.default_rng(5).integers(0, 2**16, (rows, depth), dtype=np.uint16)
    memory = np.zeros(0x40000, np.uint8)
    panel_bytes = depth * swizzle
    for m in range(rows):
        for k in range(depth):
            address = base + m // panel * panel_bytes + k * swizzle + m % panel * 2
            at = swizzled(address, swizzle)
            memory[at : at + 2] = [values[m, k] & 255, values[m, k] >> 8]
    bits = descriptor(base, panel_bytes, 8 * swizzle, swizzle)
    addresses = leaves.operand_chunk_addresses(bits, True, rows)
    chunks = np.stack([memory[a : a + 16] for a in addresses])
    np.testing.assert_array_equal(leaves.assemble_operand(True, chunks).view(np.uint16), values)


def test_mn_major_without_swizzle():
    addresses = leaves.operand_chunk_addresses(descriptor(0, 0x1000, 0x100, 0), True, 64)
    for i, address in enumerate(addresses):
        k, group = divmod(i, 8)
        assert address == group * 0x100 + k // 8 * 0x1000 + k % 8 * 16


def test_fragments_cover_the_tile_once():
    for n in (8, 64, 192):
        seen = {leaves.accumulator_position("f32", t, i) for t in range(128) for i in range(n // 2)}
        assert seen == {(r, c) for r in range(64) for c in range(n)}
        pairs = [leaves.accumulator_position("f16", t, i) for t in range(128) for i in range(n // 4)]
        assert {(r, c + h) for r, c in pairs for h in range(2)} == seen and all(c % 2 == 0 for _, c in pairs)
    starts = {leaves.a_fragment_position(t, i) for t in range(128) for i in range(4)}
    assert starts == {(r, c) for r in range(64) for c in range(0, 32, 4)}
    # Spot values of the PTX ISA's figures.
    assert leaves.accumulator_position("f32", 37, 6) == (16 + 1 + 8, 8 + 2)
    assert leaves.a_fragment_position(37, 2) == (16 + 1, 16 + 4)


def test_ldmatrix_and_stmatrix():
    rows = np.arange(128, dtype=np.uint8).reshape(8, 16)
    halves = rows.view(np.uint16)
    for transposed in (False, True):
        registers = leaves.ldmatrix_distribute(rows, transposed)
        matrix = halves.T if transposed else halves
        pairs = matrix.reshape(32, 2).astype(np.uint32)
        expected = pairs[:, 0] | pairs[:, 1] << 16
        np.testing.assert_array_equal(registers, expected)
        np.testing.assert_array_equal(leaves.stmatrix_collect(registers, transposed), rows)
