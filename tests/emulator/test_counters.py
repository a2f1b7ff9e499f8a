"""gpu.counters against figures worked out by hand."""

import pytest
import torch
from gemm_runs import run_gemm
from ptx_helpers import run
from test_sync import cuda

from dsv3_kernels import emulator, jit

CLASSES = (
    "integer",
    "float",
    "convert",
    "move",
    "memory",
    "atomic",
    "barrier",
    "async",
    "wgmma",
    "control",
    "warp",
)


@pytest.mark.parametrize("seed", range(3))
def test_instructions_by_class(seed):
    body = """
    mov.u32 %t, %tid.x;
    add.u32 %a, %t, 1;
    setp.lt.u32 %p, %t, 32;
    @%p bra FIRST;
    cvt.rn.f32.u32 %f, %a;
    add.f32 %f, %f, %f;
    add.f32 %f, %f, %f;
    FIRST:
    shfl.sync.idx.b32 %a, %a, 0, 31, -1;
    ld.param.u64 %o, [out];
    mad.wide.u32 %o, %t, 4, %o;
    st.global.u32 [%o], %a;
    red.global.add.u32 [%o], 1;
    bar.sync 0;
    ret;
    """
    out = torch.zeros(64, dtype=torch.int32)
    gpu = run(
        body,
        out,
        params=".param .u64 out",
        declarations=".reg .b32 %t, %a; .reg .f32 %f; .reg .b64 %o; .reg .pred %p;",
        block=64,
        seed=seed,
    )
    assert out.tolist() == [2] * 32 + [34] * 32
    # Of two warps; the first branches past three instructions.
    want = {
        "integer": 6,
        "convert": 1,
        "float": 2,
        "move": 2,
        "warp": 2,
        "memory": 4,
        "atomic": 2,
        "barrier": 2,
    }
    want = {name: want.get(name, 0) for name in CLASSES} | {"control": 4}
    assert gpu.counters["instructions_by_class"] == want
    assert gpu.counters["instructions"] == sum(want.values())
    assert gpu.counters["launches"] == 1


@pytest.mark.parametrize(
    ("stride", "size", "sectors"),
    [(4, 4, 4), (8, 4, 8), (32, 4, 32), (128, 4, 32), (0, 4, 1), (16, 16, 16), (1, 1, 1)],
)
def test_bytes_and_sectors_of_global_memory(stride, size, sectors):
    kind = {1: "u8", 4: "u32", 16: "v4.u32"}[size]
    value = "{%a, %b, %c, %d}" if size == 16 else "%a"
    body = f"""
    mov.u32 %t, %tid.x; mov.u32 %a, 0; mov.u32 %b, 0; mov.u32 %c, 0; mov.u32 %d, 0;
    ld.param.u64 %x, [from]; mad.wide.u32 %x, %t, {stride}, %x; ld.global.{kind} {value}, [%x];
    ld.param.u64 %y, [to]; mad.wide.u32 %y, %t, {stride}, %y; st.global.{kind} [%y], {value}; ret;
    """
    x, y = torch.zeros(1024, dtype=torch.int32), torch.zeros(1024, dtype=torch.int32)
    gpu = run(
        body,
        x,
        y,
        params=".param .u64 from, .param .u64 to",
        declarations=".reg .b32 %t, %a, %b, %c, %d; .reg .b64 %x, %y;",
    )
    c = gpu.counters
    assert (c["global_bytes_read"], c["global_bytes_written"]) == (32 * size, 32 * size)
    assert c["global_sectors"] == 2 * sectors


@pytest.mark.parametrize(
    ("address", "size", "conflicts"),
    [
        ("lane * 4", 4, 0),
        ("lane * 8", 4, 1),
        ("lane * 128", 4, 31),
        ("lane * 132", 4, 0),
        ("0", 4, 0),
        ("lane / 2 * 128", 4, 15),  # 16 words in one bank, each of two lanes
        ("lane", 1, 0),
        ("lane * 8", 8, 0),
        ("lane * 128", 8, 2 * 15),  # in two halves of 16 lanes
        ("lane * 16", 16, 0),
        ("lane * 128", 16, 4 * 7),  # in four quarters of 8 lanes
        ("lane * 128 ^ lane % 8 * 16", 16, 0),
    ],
)
def test_bank_conflicts(address, size, conflicts):
    kind = {1: "u8", 4: "u32", 8: "u64", 16: "v4.u32"}[size]
    value = {8: "%1", 16: "{%1, %1, %1, %1}"}.get(size, "%1")
    operand = '"l"(0ull)' if size == 8 else '"r"(0)'
    source = f"""k() {{ __shared__ __align__(128) int s[1056]; u32 lane = threadIdx.x;
    asm volatile("st.shared.{kind} [%0], {value};" :: "r"(ptx::shared_address(s) + ({address})), {operand}); }}"""
    gpu = cuda(source)
    assert gpu.counters["bank_conflicts"] == conflicts
    assert gpu.counters["shared_bytes_written"] == 32 * size and gpu.counters["shared_bytes_read"] == 0
    assert gpu.counters["peak_shared_bytes"] == 4224


@pytest.mark.parametrize(
    ("pitch", "swizzle", "conflicts"), [(128, 0, 4 * 7), (128, 1, 0), (16, 0, 0), (64, 0, 4 * 3)]
)
def test_bank_conflicts_of_matrices(pitch, swizzle, conflicts):
    source = f"""k() {{ __shared__ __align__(128) u8 s[4096]; u32 lane = threadIdx.x, d;
    u32 at = ptx::shared_address(s) + (lane * {pitch} ^ {swizzle} * (lane % 8 * 16));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {{%1, %1, %1, %1}};" :: "r"(at), "r"(0) : "memory");
    __syncwarp();
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%0, %0, %0, %0}}, [%1];" : "=r"(d) : "r"(at) : "memory"); }}"""
    c = cuda(source).counters
    assert c["bank_conflicts"] == 2 * conflicts
    assert (c["shared_bytes_read"], c["shared_bytes_written"]) == (512, 512)


@pytest.mark.parametrize(("stride", "conflicts"), [(4, 0), (128, 31)])
def test_bank_conflicts_in_another_block(stride, conflicts):
    source = f"""k() {{ __shared__ __align__(128) int s[1024]; __shared__ u64 b;
    if (threadIdx.x == 0) {{ ptx::mbarrier_init(&b, 1); ptx::fence_mbarrier_init();
        if (blockIdx.x == 1) ptx::mbarrier_arrive_expect(&b, 128); }}
    ptx::cluster_arrive(); ptx::cluster_wait();
    if (blockIdx.x == 0) asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
        :: "r"(ptx::cluster_address(s, 1) + threadIdx.x * {stride}), "r"(7), "r"(ptx::cluster_address(&b, 1)) : "memory");
    if (blockIdx.x == 1) ptx::mbarrier_wait(&b, 0);
    ptx::cluster_arrive(); ptx::cluster_wait(); }}"""
    c = cuda(source, grid=2, cluster=2).counters
    assert c["bank_conflicts"] == conflicts
    assert c["distributed_shared_bytes"] == c["shared_bytes_written"] == 128


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("schedule", ["random", "pct", "round_robin", "timed"])
def test_a_barrier_wait_is_counted_once_and_with_its_cycles(seed, schedule):
    # Both warps issue two instructions, the second ten more.
    body = (
        """setp.lt.u32 %p, %t, 32; @%p bra WAIT; """ + "add.u32 %a, %a, 1; " * 10 + "WAIT: bar.sync 0; ret;"
    )
    options = {"block": 64, "seed": seed, "schedule": schedule}
    c = run(
        "mov.u32 %t, %tid.x; mov.u32 %a, 0;" + body,
        declarations=".reg .b32 %t, %a; .reg .pred %p;",
        **options,
    ).counters
    assert (c["barrier_waits"], c["barrier_wait_cycles"]) == (1, 10)

    # One of two warps waits for three arrivals that come apart: it is woken for each test, but waits once.
    source = """k(int* o) { __shared__ u64 b; if (threadIdx.x == 32) ptx::mbarrier_init(&b, 96);
    ptx::named_barrier_sync(1, 64);
    if (threadIdx.x < 32) { for (int i = 0; i < 3; i++) { for (int j = 0; j < 50; j++) atomicAdd(o, 1);
        ptx::mbarrier_arrive(&b); } }
    else ptx::mbarrier_wait(&b, 0); }"""
    c = cuda(source, torch.zeros(1, dtype=torch.int32), **options).counters
    assert c["barrier_waits"] == 2 and c["barrier_wait_cycles"] > 150


def test_peak_shared_memory_is_the_largest_of_a_block():
    # Static, then dynamic behind it.
    dynamic = ".extern .shared .align 16 .b8 d[];"
    body = ".shared .align 16 .b8 s[400]; st.shared.u32 [s], 0; st.shared.u32 [d], 0; ret;"
    assert run(body, before=dynamic, shared=112).counters["peak_shared_bytes"] == 512
    gpu = emulator.VirtualGPU()
    for size, peak in ((16, 16), (2048, 2048), (64, 2048)):
        cuda(f"k() {{ __shared__ volatile int s[{size // 4}]; s[threadIdx.x % 4] = 0; }}", gpu=gpu, grid=3)
        assert gpu.counters["peak_shared_bytes"] == peak


def test_bytes_over_links():
    cluster = emulator.VirtualCluster(nodes=1, gpus_per_node=3)
    x = [torch.zeros(64, dtype=torch.int32) for _ in range(3)]
    addresses = [cluster.address_of(t, r) for r, t in enumerate(x)]
    tables = [torch.tensor(addresses) for _ in range(3)]
    source = """extern "C" __global__ void k(int** x, int rank) { int t = threadIdx.x;
        if (rank == 0) x[1][t] = 1;                                    // 128 bytes from 0 to 1
        if (rank == 2) x[2][t] = x[0][32 + t] + x[0][(32 + t) ^ 1];    // 256 bytes from 0 to 2
    }"""
    ptx = jit.compile_ptx(source)
    cluster.launch(ptx, "k", grid=(1, 1, 1), block=(32, 1, 1), args=[[tables[r], r] for r in range(3)])
    c = cluster.counters
    assert c["peer_bytes_by_link"] == {(0, 1): 128, (0, 2): 256}
    assert c["peer_bytes"] == 384 and c["links"] == {}


@pytest.mark.parametrize("seed", range(2))
def test_a_gemm(seed):
    m, n, k, tile = 128, 256, 512, 128
    gpu, config = run_gemm(m, n, k, tile=(tile, tile), blocks=2, seed=seed)
    c = gpu.counters
    tiles, steps, math_warps = n // tile, k // 128, 8
    assert c["wgmma"] == tiles * steps * 2 * 4
    assert c["tensor_core_cycles"] == m * n * k // 4096
    assert c["bank_conflicts"] == 0  # stmatrix writes through the swizzle; the scales of A lie side by side
    assert c["copy_bytes_read"] == tiles * steps * (2 * tile * 128 + tile * 4)
    assert c["copy_bytes_written"] == c["shared_bytes_written"] == m * n * 2
    scales = tiles * steps * math_warps * 32 * 4
    assert c["shared_bytes_read"] == c["wgmma"] * (64 + 128) * 32 + 2 * scales
    assert c["global_bytes_read"] == scales and c["global_bytes_written"] == 0
    assert c["global_sectors"] == tiles * steps * math_warps
    assert c["peak_shared_bytes"] == config.shared_bytes
