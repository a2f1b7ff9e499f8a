"""Single instructions against Python integers and NumPy, on random and edge inputs."""

import numpy as np
import pytest
import torch
from ptx_helpers import edges, elementwise, float_edges, run

# NumPy's, of the NaN among the inputs.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

N = 1500
INTS = {
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
}


@pytest.fixture
def rng(request):
    seed = np.random.SeedSequence().entropy % 2**32
    print("seed", seed)
    return np.random.default_rng(seed)


def wrap(values, dtype):
    """Python integers reduced to a dtype, two's complement."""
    bits = np.dtype(dtype).itemsize * 8
    unsigned = np.array([int(v) % 2**bits for v in values], dtype=np.dtype(f"uint{bits}"))
    return unsigned.view(dtype)


def divide(a, b, bits):
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: (a * b) >> bits,
    "div": divide,
    "rem": lambda a, b, bits: a if b == 0 else a - b * divide(a, b, bits),
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
}


@pytest.mark.parametrize("type_", INTS)
@pytest.mark.parametrize("op", BINARY)
def test_integer_binary(op, type_, rng):
    dtype = INTS[type_]
    a, b = edges(dtype, rng, N), edges(dtype, rng, N)
    bits = np.dtype(dtype).itemsize * 8
    got = elementwise(f"{op}.{type_} %d, %a, %b;", dtype, a, b)
    expected = wrap([BINARY[op](int(x), int(y), bits) for x, y in zip(a, b, strict=True)], dtype)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("type_", "wide"), [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")])
def test_widening(type_, wide, rng):
    a, b = edges(INTS[type_], rng, N), edges(INTS[type_], rng, N)
    c = edges(INTS[wide], rng, N)
    product = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(
        elementwise(f"mul.wide.{type_} %d, %a, %b;", INTS[wide], a, b), wrap(product, INTS[wide])
    )
    got = elementwise(f"mad.wide.{type_} %d, %a, %b, %c;", INTS[wide], a, b, c)
    np.testing.assert_array_equal(
        got, wrap([p + int(z) for p, z in zip(product, c, strict=True)], INTS[wide])
    )


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_shifts_beyond_the_width(type_, rng):
    dtype, bits = INTS[type_], np.dtype(INTS[type_]).itemsize * 8
    a = edges(dtype, rng, N)
    n = rng.choice(
        np.array([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 2**31, 2**32 - 1], dtype=np.uint32), N
    )
    left = wrap([int(x) << int(s) if s < bits else 0 for x, s in zip(a, n, strict=True)], dtype)
    right = wrap([int(x) >> min(int(s), 200) for x, s in zip(a, n, strict=True)], dtype)
    np.testing.assert_array_equal(elementwise(f"shl.b{bits} %d, %a, %b;", dtype, a, n), left)
    np.testing.assert_array_equal(elementwise(f"shr.{type_} %d, %a, %b;", dtype, a, n), right)


def test_bit_instructions(rng):
    a, b, c = (edges(np.uint32, rng, N) for _ in range(3))
    i64 = [int(x) for x in a]
    rows = list(zip(map(int, a), map(int, b), map(int, c), strict=True))
    mask = 2**32 - 1

    def check(code, expected, *sources):
        got = elementwise(code, np.uint32, *sources)
        np.testing.assert_array_equal(
            got, np.array([x & mask for x in expected], dtype=np.uint32), err_msg=code
        )

    check("popc.b32 %d, %a;", [x.bit_count() for x in i64], a)
    check("clz.b32 %d, %a;", [32 - x.bit_length() for x in i64], a)
    check("brev.b32 %d, %a;", [int(f"{x:032b}"[::-1], 2) for x in i64], a)
    check("bfind.u32 %d, %a;", [x.bit_length() - 1 for x in i64], a)
    check("bfind.shiftamt.u32 %d, %a;", [32 - x.bit_length() if x else -1 for x in i64], a)
    check("not.b32 %d, %a;", [~x for x in i64], a)
    for name, f in (("and", lambda x, y: x & y), ("or", lambda x, y: x | y), ("xor", lambda x, y: x ^ y)):
        check(f"{name}.b32 %d, %a, %b;", [f(x, y) for x, y, _ in rows], a, b)
    check("shf.l.wrap.b32 %d, %a, %b, %c;", [((y << 32 | x) << (z & 31)) >> 32 for x, y, z in rows], a, b, c)
    check("shf.r.clamp.b32 %d, %a, %b, %c;", [(y << 32 | x) >> min(z, 32) for x, y, z in rows], a, b, c)
    for table in (0x00, 0xE8, 0x96, 0xCA, 0x1B, 0xFF):
        expected = [
            sum(
                1 << i for i in range(32) if table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1
            )
            for x, y, z in rows
        ]
        check(f"lop3.b32 %d, %a, %b, %c, {table};", expected, a, b, c)

    def prmt(x, y, s):
        pool = (y << 32 | x).to_bytes(8, "little")
        out = 0
        for i in range(4):
            n = s >> 4 * i & 15
            byte = pool[n & 7]
            out |= (byte if n < 8 else 255 * (byte >> 7)) << 8 * i
        return out

    check("prmt.b32 %d, %a, %b, %c;", [prmt(*row) for row in rows], a, b, c)
    pos, length = (rng.integers(0, 40, N, dtype=np.uint32) for _ in range(2))
    fields = list(zip(i64, map(int, pos), map(int, length), strict=True))
    check("bfe.u32 %d, %a, %b, %c;", [x >> p & ((1 << n) - 1) for x, p, n in fields], a, pos, length)

    def bfe_signed(x, p, n):
        if n == 0:
            return 0
        sign = x >> min(p + n - 1, 31) & 1
        field = (x >> p & ((1 << n) - 1)) if p < 32 else 0
        kept = max(0, min(n, 32 - p))
        return field | (-sign << kept)

    check("bfe.s32 %d, %a, %b, %c;", [bfe_signed(*f) for f in fields], a, pos, length)
    expected = [
        (y & ~(((1 << n) - 1) << p)) | (x & ((1 << n) - 1)) << p
        for (x, p, n), y in zip(fields, map(int, b), strict=True)
    ]
    check("bfi.b32 %d, %a, %b, %c, %e;", expected, a, b, pos, length)


def test_carries(rng):
    a, b = (edges(np.uint64, rng, N) for _ in range(2))
    code = """{ .reg .b32 %al, %ah, %bl, %bh, %dl, %dh;
    mov.b64 {%al, %ah}, %a; mov.b64 {%bl, %bh}, %b; OP.cc.u32 %dl, %al, %bl; OPc.u32 %dh, %ah, %bh;
    mov.b64 %d, {%dl, %dh}; }"""
    np.testing.assert_array_equal(elementwise(code.replace("OP", "add"), np.uint64, a, b), a + b)
    np.testing.assert_array_equal(elementwise(code.replace("OP", "sub"), np.uint64, a, b), a - b)


def test_saturating_and_dot_products(rng):
    a, b, c = (edges(np.int32, rng, N) for _ in range(3))
    exact = a.astype(np.int64) + b
    np.testing.assert_array_equal(
        elementwise("add.sat.s32 %d, %a, %b;", np.int32, a, b), np.clip(exact, -(2**31), 2**31 - 1)
    )
    lanes = [v.view(np.int8).reshape(-1, 4).astype(np.int64) for v in (a, b)]
    expected = wrap((lanes[0] * lanes[1]).sum(1) + c, np.int32)
    np.testing.assert_array_equal(elementwise("dp4a.s32.s32 %d, %a, %b, %c;", np.int32, a, b, c), expected)
    np.testing.assert_array_equal(
        elementwise("sad.s32 %d, %a, %b, %c;", np.int32, a, b, c),
        wrap(np.abs(a.astype(np.int64) - b) + c, np.int32),
    )


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("type_", [*INTS, "f32", "f64"])
def test_setp_and_selp(type_, rng):
    dtype = INTS.get(type_) or {"f32": np.float32, "f64": np.float64}[type_]
    make = float_edges if type_[0] == "f" else edges
    a, b = make(dtype, rng, N), make(dtype, rng, N)
    b = np.where(rng.random(N) < 0.3, a, b)
    for name, f in COMPARE.items():
        got = elementwise(f"setp.{name}.{type_} %p, %a, %b; selp.u32 %d, 1, 0, %p;", np.uint32, a, b)
        expected = f(a, b) & ~(np.isnan(a) | np.isnan(b)) if type_[0] == "f" else f(a, b)
        np.testing.assert_array_equal(got, expected.astype(np.uint32), err_msg=name)
        if type_[0] == "f" and name != "eq":
            got = elementwise(f"setp.{name}u.{type_} %p|%q, %a, %b; selp.u32 %d, 1, 0, %q;", np.uint32, a, b)
            expected = ~(f(a, b) | np.isnan(a) | np.isnan(b))
            np.testing.assert_array_equal(got, expected.astype(np.uint32), err_msg=name + "u")


def same_floats(got, expected, what=""):
    """Bits equal, except that any NaN of the reference stands for PTX's one NaN."""
    bits = {4: np.uint32, 8: np.uint64, 2: np.uint16}[got.dtype.itemsize]
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan, err_msg=what)
    np.testing.assert_array_equal(got.view(bits)[~nan], expected.view(bits)[~nan], err_msg=what)
    if got.dtype == np.float32:
        assert (got.view(np.uint32)[nan] == 0x7FFFFFFF).all()


@pytest.mark.parametrize("type_", ["f32", "f64"])
def test_float_arithmetic(type_, rng):
    dtype = {"f32": np.float32, "f64": np.float64}[type_]
    a, b, c = (float_edges(dtype, rng, N) for _ in range(3))
    with np.errstate(all="ignore"):
        for name, f in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div.rn", np.divide)):
            same_floats(elementwise(f"{name}.{type_} %d, %a, %b;", dtype, a, b), f(a, b), name)
        same_floats(elementwise(f"sqrt.rn.{type_} %d, %a;", dtype, a), np.sqrt(a), "sqrt")
        same_floats(elementwise(f"rcp.rn.{type_} %d, %a;", dtype, a), dtype(1) / a, "rcp")
        expected = torch.addcmul(*(torch.from_numpy(x).double() for x in (c, a, b))).numpy()
    if type_ == "f32":
        # Exact in double where the product and the sum are: small integers and halves.
        small = rng.integers(-2048, 2048, (3, N)).astype(np.float32) / 2
        got = elementwise("fma.rn.f32 %d, %a, %b, %c;", np.float32, *small)
        same_floats(got, (small[0].astype(np.float64) * small[1] + small[2]).astype(np.float32))
        got = elementwise("fma.rn.f32 %d, %a, %b, %c;", np.float32, a, b, c)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))


@pytest.mark.parametrize(("mode", "direction"), [("rz", 0), ("rm", -1), ("rp", 1)])
def test_directed_rounding(mode, direction, rng):
    a, b = (
        rng.normal(size=N).astype(np.float32) * 2.0 ** rng.integers(-20, 20, N).astype(np.float32)
        for _ in range(2)
    )
    a, b = a.astype(np.float32), b.astype(np.float32)
    for name, f in (("add", np.add), ("mul", np.multiply)):
        got = elementwise(f"{name}.{mode}.f32 %d, %a, %b;", np.float32, a, b)
        exact = f(a.astype(np.longdouble), b.astype(np.longdouble))
        near = exact.astype(np.float32)
        goal = -np.sign(exact) if mode == "rz" else np.full(N, direction)
        wrong = ((near > exact) & (goal < 0)) | ((near < exact) & (goal > 0))
        stepped = np.nextafter(
            near, np.where(goal > 0, np.float32(np.inf), np.float32(-np.inf)).astype(np.float32)
        )
        same_floats(got, np.where(wrong, stepped, near).astype(np.float32), name)


def test_flush_saturate_min_max(rng):
    a, b = (float_edges(np.float32, rng, N) for _ in range(2))
    tiny = np.finfo(np.float32).tiny

    def flush(x):
        return np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x).astype(np.float32)

    with np.errstate(all="ignore"):
        same_floats(elementwise("mul.ftz.f32 %d, %a, %b;", np.float32, a, b), flush(flush(a) * flush(b)))
        s = a + b
        got = elementwise("add.sat.f32 %d, %a, %b;", np.float32, a, b)
        np.testing.assert_array_equal(got, np.where(np.isnan(s), 0, np.clip(s, 0, 1)) + np.float32(0))
    for name, f in (("min", np.fmin), ("max", np.fmax)):
        got = elementwise(f"{name}.f32 %d, %a, %b;", np.float32, a, b)
        expected = f(a, b)
        zeros = (a == 0) & (b == 0)
        both = np.signbit(a) & np.signbit(b) if name == "max" else np.signbit(a) | np.signbit(b)
        expected = np.where(zeros, np.where(both, np.float32(-0.0), np.float32(0)), expected).astype(
            np.float32
        )
        same_floats(got, expected, name)
        got = elementwise(f"{name}.NaN.f32 %d, %a, %b;", np.float32, a, b)
        same_floats(got, np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), expected), name)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_half_arithmetic(name, rng):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[name]
    bits = [rng.integers(0, 2**16, N, dtype=np.uint16) for _ in range(3)]
    t = [torch.from_numpy(x.view(np.int16).copy()).view(dtype) for x in bits]
    d = [x.double() for x in t]
    cases = {
        "add": d[0] + d[1],
        "mul": d[0] * d[1],
        "sub": d[0] - d[1],
        "fma.rn": torch.addcmul(d[2], d[0], d[1]),
    }
    for op, exact in cases.items():
        sources = bits if op == "fma.rn" else bits[:2]
        got = elementwise(
            f"{op}.{name} %d, {', '.join('%abc'[0] + x for x in 'abc'[: len(sources)])};", np.uint16, *sources
        )
        got = torch.from_numpy(got.view(np.int16).copy()).view(dtype)
        # Between the neighbours of the exact result, and the nearer one.
        finite = exact.isfinite() & got.isfinite()
        step = (torch.nextafter(got.float(), torch.tensor(torch.inf)) - got.float()).abs().double()
        ulp = torch.maximum(got.double().abs() * 2.0 ** (-10 if name == "f16" else -7), step)
        ulp = ulp.clamp(min=2.0**-24 if name == "f16" else 2.0**-133)
        assert ((got.double() - exact).abs()[finite] <= 0.5 * ulp[finite]).all(), op
        assert torch.equal(got.isnan(), exact.isnan()), op
    pair = bits[0].astype(np.uint32) << 16 | bits[1]
    other = bits[1].astype(np.uint32) << 16 | bits[2]
    got = elementwise(f"add.{name}x2 %d, %a, %b;", np.uint32, pair, other)
    single = elementwise(f"add.{name} %d, %a, %b;", np.uint16, bits[0], bits[1])
    np.testing.assert_array_equal(got >> 16, single)


INT_RANGE = {t: (np.iinfo(d).min, np.iinfo(d).max) for t, d in INTS.items()}


@pytest.mark.parametrize("to", INTS)
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_float_to_integer(to, source, rng):
    dtype = {"f32": np.float32, "f64": np.float64}[source]
    a = float_edges(dtype, rng, N)
    a = np.where(
        rng.random(N) < 0.5, a, (rng.normal(size=N) * 2.0 ** rng.integers(0, 70, N)).astype(dtype)
    ).astype(dtype)
    low, high = INT_RANGE[to]
    bits = np.dtype(INTS[to]).itemsize * 8
    for mode, f in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
        got = elementwise(f"cvt.{mode}.{to}.{source} %d, %a;", INTS[to], a)
        nan = 2 ** (bits - 1) if source == "f64" or bits == 64 else 0
        values = [
            nan if x != x else low if x < low else high if x > high else int(x)
            for x in f(a.astype(np.float64)).tolist()
        ]
        np.testing.assert_array_equal(got, wrap(values, INTS[to]), err_msg=mode)


@pytest.mark.parametrize("source", INTS)
def test_integer_to_float_and_integer(source, rng):
    a = edges(INTS[source], rng, N)
    same_floats(elementwise(f"cvt.rn.f32.{source} %d, %a;", np.float32, a), a.astype(np.float32))
    same_floats(elementwise(f"cvt.rn.f64.{source} %d, %a;", np.float64, a), a.astype(np.float64))
    for to, dtype in INTS.items():
        np.testing.assert_array_equal(
            elementwise(f"cvt.{to}.{source} %d, %a;", dtype, a), wrap(a, dtype), err_msg=to
        )
        low, high = INT_RANGE[to]
        got = elementwise(f"cvt.sat.{to}.{source} %d, %a;", dtype, a)
        np.testing.assert_array_equal(got, wrap([min(max(int(x), low), high) for x in a], dtype), err_msg=to)


def test_float_to_float(rng):
    a = float_edges(np.float32, rng, N)
    d = float_edges(np.float64, rng, N)
    t = torch.from_numpy(a)
    with np.errstate(all="ignore"):
        same_floats(elementwise("cvt.rn.f32.f64 %d, %a;", np.float32, d), d.astype(np.float32))
    same_floats(elementwise("cvt.f64.f32 %d, %a;", np.float64, a), a.astype(np.float64))
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        got = torch.from_numpy(elementwise(f"cvt.rn.{name}.f32 %d, %a;", np.uint16, a).view(np.int16)).view(
            dtype
        )
        expected = t.to(dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        keep = ~expected.isnan()
        assert torch.equal(got[keep].view(torch.int16), expected[keep].view(torch.int16))
        pair = elementwise(f"cvt.rn.{name}x2.f32 %d, %a, %b;", np.uint32, a, a[::-1].copy())
        np.testing.assert_array_equal(pair >> 16, got.view(torch.int16).numpy().view(np.uint16))
    for mode, f in (("rni", np.rint), ("rzi", np.trunc)):
        same_floats(elementwise(f"cvt.{mode}.f32.f32 %d, %a;", np.float32, a), f(a))
    pair = elementwise("cvt.rn.satfinite.e4m3x2.f32 %d, %a, %b;", np.uint16, a, a[::-1].copy())
    expected = t.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    nan = np.isnan(a)
    np.testing.assert_array_equal((pair >> 8)[~nan], expected[~nan])
    assert ((pair >> 8)[nan] == 0x7F).all()


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode, rng):
    for width in (32, 16, 8):
        b = int(rng.integers(0, 32))
        clamp = (0 if mode == "up" else 31) | (32 - width) << 8
        out = torch.zeros(64, dtype=torch.int32)
        run(
            f"""mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [o];
                shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {clamp}, -1;
            selp.u32 %r3, 1, 0, %p1; mul.wide.u32 %rd2, %r1, 8; add.u64 %rd1, %rd1, %rd2;
            st.global.v2.u32 [%rd1], {{%r2, %r3}}; ret;""",
            out,
            params=".param .u64 o",
            declarations=".reg .b32 %r<4>; .reg .b64 %rd<3>; .reg .pred %p<2>;",
        )
        for lane in range(32):
            base, last = lane // width * width, lane // width * width + width - 1
            j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": base + b % width}[mode]
            ok = j >= base if mode == "up" else j <= last
            assert out[2 * lane : 2 * lane + 2].tolist() == [j if ok else lane, int(ok)], (width, b, lane)


def test_votes_and_reductions(rng):
    values = torch.from_numpy(rng.integers(-5, 5, 32, dtype=np.int32))
    out = torch.zeros(32, 10, dtype=torch.int32)
    run(
        """mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [v]; mul.wide.u32 %rd2, %r1, 4;
            add.u64 %rd1, %rd1, %rd2; ld.global.u32 %r2, [%rd1];
        setp.gt.s32 %p1, %r2, 0; vote.sync.ballot.b32 %r3, %p1, -1; vote.sync.any.pred %p2, %p1, -1;
        selp.u32 %r4, 1, 0, %p2;
        vote.sync.all.pred %p2, %p1, -1; selp.u32 %r5, 1, 0, %p2; match.any.sync.b32 %r6, %r2, -1;
        redux.sync.add.s32 %r7, %r2, -1;
        redux.sync.min.s32 %r8, %r2, -1; redux.sync.max.u32 %r9, %r2, -1;
        redux.sync.xor.b32 %r10, %r2, -1; activemask.b32 %r11;
        elect.sync %r12|%p2, -1; ld.param.u64 %rd3, [o]; mul.wide.u32 %rd2, %r1, 40; add.u64 %rd3, %rd3, %rd2;
        st.global.v2.u32 [%rd3], {%r3, %r4}; st.global.v2.u32 [%rd3+8], {%r5, %r6};
        st.global.v2.u32 [%rd3+16], {%r7, %r8};
        st.global.v2.u32 [%rd3+24], {%r9, %r10}; st.global.v2.u32 [%rd3+32], {%r11, %r12}; ret;""",
        values,
        out,
        params=".param .u64 v, .param .u64 o",
        declarations=".reg .b32 %r<13>; .reg .b64 %rd<4>; .reg .pred %p<3>;",
    )
    v = values.tolist()
    ballot = sum(1 << i for i, x in enumerate(v) if x > 0)
    xor = 0
    for x in v:
        xor ^= x & 0xFFFFFFFF
    for lane in range(32):
        match = sum(1 << i for i, x in enumerate(v) if x == v[lane])
        expected = [
            ballot,
            any(x > 0 for x in v),
            all(x > 0 for x in v),
            match,
            sum(v),
            min(v),
            max(x & 0xFFFFFFFF for x in v),
            xor,
            -1,
            0,
        ]
        assert [x & 0xFFFFFFFF for x in out[lane].tolist()] == [int(x) & 0xFFFFFFFF for x in expected]


def test_atomics(rng):
    """128 threads add, and each takes a distinct place of a counter."""
    out = torch.zeros(4, dtype=torch.int32)
    seen = torch.zeros(128, dtype=torch.int32)
    sums = torch.zeros(2)
    run(
        """ld.param.u64 %rd1, [o]; ld.param.u64 %rd2, [s]; ld.param.u64 %rd5, [f]; mov.u32 %r1, %tid.x;
        atom.global.add.u32 %r2, [%rd1], 1; mul.wide.u32 %rd3, %r2, 4; add.u64 %rd3, %rd2, %rd3;
        atom.global.exch.b32 %r3, [%rd3], 7;
        red.global.max.s32 [%rd1+4], %r1; red.global.or.b32 [%rd1+8], %r1;
        atom.global.inc.u32 %r4, [%rd1+12], 9;
        cvt.rn.f32.u32 %f1, %r1; red.global.add.f32 [%rd5], %f1;
        red.global.add.v2.f32 [%rd5], {%f1, %f1}; ret;""",
        out,
        seen,
        sums,
        params=".param .u64 o, .param .u64 s, .param .u64 f",
        block=128,
        declarations=".reg .b32 %r<5>; .reg .b64 %rd<6>; .reg .f32 %f<2>;",
    )
    total = 127 * 128 // 2
    assert out.tolist() == [128, 127, 127, 128 % 10] and seen.tolist() == [7] * 128
    assert sums.tolist() == [2 * total, total]
