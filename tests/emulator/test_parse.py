"""The loader: what it takes, what it refuses and where, and how registers get their slots."""

import pytest
import torch
from ptx_helpers import HEADER, kernel, run

from dsv3_kernels import _emulator, emulator, jit


def load_body(body, declarations=".reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .pred %p<2>; .reg .f32 %f<3>;"):
    return _emulator.load(kernel(body, declarations=declarations))


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("tex.2d.v4.f32.f32 {%f0,%f0,%f0,%f0}, [%rd0, {%f0,%f0}];", "tex"),
        ("add.u128 %r0, %r1, %r2;", "u128"),
        ("add.rn.ftz.foo.f32 %f0, %f1, %f2;", "foo"),
        ("multimem.red.global.add.f32 [%rd0], %f0;", "multimem"),
        ("mov.u32 %r0, %nosuch;", "%nosuch"),
        ("wgmma.mma_async.sync.aligned.m64n12k32.f32.e4m3.e4m3 {%f0}, %rd0, %rd1, 1, 1, 1;", "12"),
    ],
)
def test_unknown_instructions_are_refused_with_their_line(code, word):
    with pytest.raises(emulator.UnsupportedInstructionError) as info:
        load_body(f"mov.u32 %r0, 0;\n{code}\nret;")
    assert word in str(info.value) and info.value.ptx_line == 9 and info.value.kernel == "k"


@pytest.mark.parametrize(
    "code",
    ["add.u32 %r0, %r1", "add.u32 %r0;", "add.u32 %r0, %r1, %undeclared;", "bra NOWHERE;", "{ add.u32 %r0, %r1, %r2;",
     "add.u64 %r0, %r1, %r2;", "mov.u32 %r0, 0x;", "ld.global.u32 %r0, %rd0;", "@%r0 ret;", "st.global.v4.u32 [%rd0], {%r0, %r1};",
     "mov.b64 %rd0, {%r0, %r1, %r2};", "add.f32 %f0, %f1, 3;", "shfl.sync.up.b32 %r0, %r1, 1;"],
)  # fmt: skip
def test_malformed_text_is_an_error_with_a_line(code):
    with pytest.raises(emulator.EmulationError) as info:
        load_body(code + "\nret;")
    assert info.value.ptx_line is not None


def test_scopes_have_their_own_registers_and_labels():
    out = torch.zeros(3, dtype=torch.int32)
    run(
        """ld.param.u64 %rd1, [o]; mov.u32 %r1, 1;
        { .reg .b32 %r1; .reg .pred p; mov.u32 %r1, 5; setp.eq.u32 p, %r1, 5; @p bra L; mov.u32 %r1, 6; L: st.global.u32 [%rd1], %r1; }
        { .reg .b32 t<2>; mov.u32 t1, 7; bra L; mov.u32 t1, 8; L: st.global.u32 [%rd1+4], t1; }
        st.global.u32 [%rd1+8], %r1; ret;""",
        out, params=".param .u64 o", declarations=".reg .b32 %r<3>; .reg .b64 %rd<2>;", block=1,
    )  # fmt: skip
    assert out.tolist() == [5, 7, 1]


def test_module_variables_and_initialisers():
    before = """.global .align 4 .b8 bytes[8] = {1, 2, 3, 4};
.const .align 8 .u64 table[2] = {generic(bytes), 42};
.global .f32 half = 0f3F000000;
.extern .shared .align 16 .b8 dyn[];"""
    out = torch.zeros(4, dtype=torch.int32)
    run(
        """ld.param.u64 %rd1, [o]; ld.const.u64 %rd2, [table]; ld.u32 %r1, [%rd2]; ld.const.u32 %r2, [table+8];
        ld.global.u32 %r3, [half]; st.global.v2.u32 [%rd1], {%r1, %r2}; mov.u32 %r1, dyn; st.shared.u32 [%r1+12], %r3;
        ld.shared.u32 %r2, [dyn+12]; st.global.v2.u32 [%rd1+8], {%r2, %r3}; ret;""",
        out, params=".param .u64 o", declarations=".reg .b32 %r<4>; .reg .b64 %rd<3>;", block=1, shared=16, before=before,
    )  # fmt: skip
    assert out.tolist() == [0x04030201, 42, 0x3F000000, 0x3F000000]


def test_calls_and_divergent_returns():
    source = """
    __device__ __noinline__ int collatz(int n, int* steps) { int s = 0; while (n > 1) { n = n & 1 ? 3 * n + 1 : n / 2; s++; } *steps = s; return s * 2; }
    __device__ __noinline__ int both(int n) { int s; if (n & 1) return collatz(n, &s) + s; return collatz(n + 1, &s) - s; }
    extern "C" __global__ void k(int* o) { o[threadIdx.x] = both(threadIdx.x); }"""
    out = torch.zeros(96, dtype=torch.int32)
    emulator.VirtualGPU().launch(jit.compile_ptx(source), "k", grid=(1, 1, 1), block=(96, 1, 1), args=[out])

    def steps(n):
        return 0 if n <= 1 else 1 + steps(3 * n + 1 if n & 1 else n // 2)

    assert out.tolist() == [3 * steps(n) if n & 1 else steps(n + 1) for n in range(96)]


def test_extern_functions_are_bound_or_refused():
    text = HEADER + """.extern .func (.param .b32 r) twice(.param .b32 x);
.visible .entry k(.param .u64 o) { .reg .b32 %r<3>; .reg .b64 %rd<3>; ld.param.u64 %rd1, [o]; mov.u32 %r1, %tid.x;
{ .param .b32 p0; st.param.b32 [p0], %r1; .param .b32 q; call.uni (q), twice, (p0); ld.param.b32 %r2, [q]; }
mul.wide.u32 %rd2, %r1, 4; add.u64 %rd1, %rd1, %rd2; st.global.u32 [%rd1], %r2; ret; }"""
    out = torch.zeros(8, dtype=torch.int32)
    gpu = emulator.VirtualGPU()
    with pytest.raises(emulator.UnsupportedInstructionError, match="twice"):
        gpu.launch(text, "k", grid=(1, 1, 1), block=(8, 1, 1), args=[out])
    gpu.bind("twice", lambda args: (2 * int.from_bytes(args[0], "little")).to_bytes(4, "little"))
    gpu.launch(text, "k", grid=(1, 1, 1), block=(8, 1, 1), args=[out])
    assert out.tolist() == [2 * i for i in range(8)]


def test_recursion_is_refused():
    text = HEADER + ".func f() { call f; ret; }\n.visible .entry k() { call f; ret; }"
    with pytest.raises(emulator.UnsupportedInstructionError, match="recursive"):
        _emulator.load(text)


def test_register_slots_follow_liveness():
    """A thousand values used one after the other need few slots; a thousand that live at once need a thousand."""
    n = 1000
    chain = "\n".join(f"add.u32 %r{i + 1}, %r{i}, 1;" for i in range(n))
    program = _emulator.load(kernel(f"mov.u32 %r0, 0;\n{chain}\nret;", declarations=f".reg .b32 %r<{n + 1}>;"))
    assert program.virtual_registers > n and program.register_bytes < 20 * 128
    makes = "\n".join(f"mov.u32 %r{i}, {i};" for i in range(n))
    uses = "\n".join(f"add.u32 %t, %t, %r{i};" for i in range(n))
    out = torch.zeros(1, dtype=torch.int32)
    body = f"ld.param.u64 %a, [o]; mov.u32 %t, 0;\n{makes}\n{uses}\nst.global.u32 [%a], %t; ret;"
    run(body, out, params=".param .u64 o", declarations=f".reg .b32 %r<{n}>, %t; .reg .b64 %a;", block=1)
    assert out.item() == n * (n - 1) // 2


@pytest.mark.parametrize(
    ("change", "words"),
    [({"block": (2048, 1, 1)}, "2048"), ({"grid": (0, 1, 1)}, "grid"), ({"args": [1]}, "arguments"), ({"shared_bytes": 300_000}, "shared"),
     ({"cluster": (3, 1, 1)}, "cluster"), ({"kernel": "nosuch"}, "nosuch"), ({"args": [2**40, 1]}, "does not fit")],
)  # fmt: skip
def test_bad_launches(change, words):
    given = {"kernel": "k", "grid": (4, 1, 1), "block": (32, 1, 1), "args": [1, 2.5], **change}
    text = kernel("ret;", ".param .u32 a, .param .f32 b")
    with pytest.raises(emulator.EmulationError, match=words):
        emulator.VirtualGPU().launch(text, given.pop("kernel"), **given)
