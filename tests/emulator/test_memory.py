"""State spaces, bounds, freed and unwritten memory."""

import gc

import pytest
import torch
from ptx_helpers import run

from dsv3_kernels import emulator, jit

D = dict(declarations=".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<3>; .reg .f32 %f<4>;")  # noqa: C408
LOAD = "ld.param.u64 %rd1, [o]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.u64 %rd2, %rd1, %rd2; "


def cuda(source, *args, block=32, grid=1, seed=0, gpu=None, **options):
    gpu = gpu or emulator.VirtualGPU(num_sms=4, seed=seed, **options)
    ptx = jit.compile_ptx('extern "C" __global__ void ' + source, lineinfo=True)
    gpu.launch(ptx, "k", grid=(grid, 1, 1), block=(block, 1, 1), args=list(args))
    return gpu


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("ld.global.u32 %r2, [%rd2+4];", "outside all allocations"),
        ("st.global.u32 [%rd1+-4], %r1;", "outside all allocations"),
        ("ld.global.u32 %r2, [%rd1+2];", "aligned"),
        ("ld.global.v4.u32 {%r2,%r3,%r4,%r5}, [%rd1+8];", "aligned"),
        ("ld.shared.u32 %r2, [%r1];", "outside the block"),
        ("mov.u64 %rd3, 0; ld.u32 %r2, [%rd3];", "null"),
        ("mov.u32 %r3, s; cvt.u64.u32 %rd3, %r3; cvta.shared.u64 %rd3, %rd3; ld.global.u32 %r2, [%rd3];", "generic address of shared"),
        ("mov.u32 %r3, s; mapa.shared::cluster.u32 %r3, %r3, 1; ld.shared::cluster.u32 %r2, [%r3];", "cluster of 1"),
        ("st.param.u32 [o], %r1;", "read-only"),
    ],
)  # fmt: skip
def test_bad_addresses(code, word):
    with pytest.raises(emulator.MemoryAccessError, match=word) as info:
        run(".shared .b32 s[4]; " + LOAD + code + " ret;", torch.zeros(32, dtype=torch.int32), params=".param .u64 o", **D)
    assert info.value.lane is not None and info.value.warp == 0 and info.value.block == (0, 0, 0)


def test_bounds_are_those_of_the_storage_and_views_keep_their_offset():
    t = torch.arange(64, dtype=torch.int32)
    run(LOAD + "ld.global.u32 %r2, [%rd2]; add.u32 %r2, %r2, 1; st.global.u32 [%rd2], %r2; ret;", t[32:], params=".param .u64 o", **D)
    assert t.tolist() == [*range(32), *range(33, 65)]


def test_freed_memory_is_known():
    gpu = emulator.VirtualGPU()
    dead = torch.zeros(8)
    table = torch.tensor([gpu.address_of(dead)])
    source = "k(float** p) { **p = 1; }"
    cuda(source, table, block=1, gpu=gpu)
    assert dead[0] == 1
    del dead
    gc.collect()
    with pytest.raises(emulator.MemoryAccessError, match="freed"):
        cuda(source, table, block=1, gpu=gpu)


def test_local_memory_is_private():
    out = torch.zeros(64, dtype=torch.int32)
    cuda("k(int* o) { int a[16]; for (int i = 0; i < 16; i++) a[(i * 5 + threadIdx.x) % 16] = i * threadIdx.x;"
         " int s = 0; for (int i = 0; i < 16; i++) s += a[i] * (i + 1); o[threadIdx.x] = s; }", out, block=64)  # fmt: skip
    expected = []
    for t in range(64):
        a = [0] * 16
        for i in range(16):
            a[(i * 5 + t) % 16] = i * t
        expected.append(sum(x * (i + 1) for i, x in enumerate(a)))
    assert out.tolist() == expected


def test_unwritten_bytes_matter_when_used_not_when_loaded():
    """A vector load may bring bytes that nobody wrote, as long as nothing uses them."""
    body = """.shared .align 16 .b32 s[4]; ld.param.u64 %rd1, [o]; mov.u32 %r1, 5; st.shared.u32 [s], %r1;
    ld.shared.v2.u32 {%r2, %r3}, [s]; mov.u32 %r4, %r3; st.global.u32 [%rd1], %r2; USE ret;"""
    out = torch.zeros(2, dtype=torch.int32)
    run(body.replace("USE", ""), out, params=".param .u64 o", block=1, **D)
    assert out[0] == 5
    for use in ("st.global.u32 [%rd1+4], %r4;", "add.u32 %r5, %r4, 1;", "setp.eq.u32 %p1, %r3, 0;"):
        with pytest.raises(emulator.HazardError, match="nobody wrote"):
            run(body.replace("USE", use), out, params=".param .u64 o", block=1, **D)


def test_tensors_can_be_declared_unwritten():
    gpu = emulator.VirtualGPU()
    a, b = torch.zeros(32), torch.zeros(32)
    gpu.mark_unwritten(a)
    with pytest.raises(emulator.HazardError, match="nobody wrote"):
        cuda("k(float* a, float* b) { b[threadIdx.x] = a[threadIdx.x] + 1; }", a, b, gpu=gpu)
    gpu.mark_unwritten(b)
    cuda("k(float* b) { b[threadIdx.x] = 3; }", b, gpu=gpu)
    cuda("k(float* a, float* b) { a[threadIdx.x] = b[threadIdx.x] + 1; }", a, b, gpu=gpu)
    assert (a == 4).all()


def test_module_variables_keep_their_values_between_launches():
    gpu = emulator.VirtualGPU()
    out = torch.zeros(1, dtype=torch.int32)
    source = "__device__ int counter = 5;\nextern \"C\" __global__ void k(int* o) { *o = ++counter; }"
    ptx = jit.compile_ptx(source)
    for expected in (6, 7, 8):
        gpu.launch(ptx, "k", grid=(1, 1, 1), block=(1, 1, 1), args=[out])
        assert out.item() == expected


def test_addresses_do_not_depend_on_the_host():
    first = [emulator.VirtualGPU().address_of(torch.empty(n)) for n in (4, 400, 4000)]
    second = [emulator.VirtualGPU().address_of(torch.empty(n)) for n in (4, 400, 4000)]
    assert first == second and all(x % 256 == 0 for x in first)


def test_races_are_byte_exact():
    """Neighbouring bytes may be written by different warps, the same byte may not."""
    out = torch.zeros(64, dtype=torch.uint8)
    cuda("k(unsigned char* o) { o[threadIdx.x % 2 * 32 + threadIdx.x / 2] = threadIdx.x; }", out, block=64)
    with pytest.raises(emulator.HazardError, match="data race"):
        cuda("k(unsigned char* o) { o[threadIdx.x / 2] = threadIdx.x; }", out, block=64)
    with pytest.raises(emulator.HazardError, match="data race"):
        cuda("k(unsigned char* o) { o[0] = blockIdx.x; }", out, block=1, grid=2)
    cuda("k(unsigned char* o) { o[0] = 7; }", out, block=32)  # lanes of one store that agree
