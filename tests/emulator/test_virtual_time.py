"""Virtual time: what things cost, who waits for whom, and comparisons made with it."""

import functools

import pytest
import torch
from gemm_runs import run_gemm
from ptx_helpers import run
from test_network import DECLARATIONS, SIZE, expected, ring
from test_sync import cuda

import dsv3_kernels as dsv3
from dsv3_kernels import emulator, jit

MEGAHERTZ = 1755
LATENCY = 350 * MEGAHERTZ // 1000  # of emulator.HBM, in cycles
REGISTERS = ".reg .b32 %t, %a, %b; .reg .b64 %x; .reg .pred %p;"


def cycles(body, *args, block=32, params="", **options):
    return run(body + " ret;", *args, declarations=REGISTERS, params=params, block=block, **options).counters[
        "cycles"
    ]


def test_an_instruction_takes_an_issue_slot_and_a_move_none():
    assert cycles("add.u32 %a, 1, 2; " * 100) == 100
    assert cycles("mov.u32 %a, 2; " * 100) == 0
    # Four quarters of the SM issue side by side; a fifth warp shares a quarter's slots with the first.
    assert cycles("add.u32 %a, 1, 2; " * 320, block=128) == 320
    assert cycles("add.u32 %a, 1, 2; " * 320, block=160) == 640


def test_promotion_costs_a_quarter_of_the_tensor_core():
    # 128 of K for a tile of 128x128: 128 * 128 * 128 / 4096 cycles of wgmma; 8 warps promote 64 values a lane.
    body = ".reg .f32 %f; mov.f32 %f, 0f00000000; " + "fma.rn.f32 %f, %f, %f, %f; " * 64
    assert cycles(body, block=256) == 128 and 128 * 128 * 128 // 4096 == 512


@pytest.mark.parametrize("adds", [0, 100, 1000])
def test_a_load_is_waited_for_where_its_result_is_used(adds):
    x = torch.zeros(32, dtype=torch.int32)
    start = "ld.param.u64 %x, [p]; ld.global.u32 %a, [%x]; "
    body = start + "add.u32 %b, 1, 2; " * adds + "add.u32 %a, %a, 1;"
    # ld.param, then the load with its sector (a cycle), its latency, and the add.
    latency = 1 + 1 + LATENCY + 1
    assert cycles(body, x, params=".param .u64 p") == max(latency, adds + 3)
    # The second time it is in L1; at another place it is not.
    again = body + " ld.global.u32 %b, [%x]; add.u32 %b, %b, 1;"
    assert cycles(again, x, params=".param .u64 p") == max(latency, adds + 3) + 35 + 1
    other = body + " ld.global.u32 %b, [%x + 64]; add.u32 %b, %b, 1;"
    assert cycles(other, x, params=".param .u64 p") == max(latency, adds + 3) + latency - 1


def test_bank_conflicts_take_passes():
    def store(stride):
        body = f".shared .align 128 .b8 s[4096]; mov.u32 %t, %tid.x; mul.lo.u32 %t, %t, {stride}; mov.u32 %a, s; add.u32 %t, %t, %a; "
        return cycles(body + "ld.shared.u32 %b, [%t]; add.u32 %b, %b, 1;", checks=False)

    assert store(128) - store(4) == 31


@pytest.mark.parametrize("schedule", ["timed", "random"])
def test_a_doubled_bandwidth_of_memory_halves_what_it_bounds(schedule):
    x = torch.zeros(65536, dtype=torch.int32)
    source = "k(const int4* x, int4* o) { int i = blockIdx.x * 128 + threadIdx.x; o[i] = x[i]; }"

    def taken(bandwidth):
        memory = emulator.Link(latency=0, bandwidth=bandwidth)
        out = torch.zeros_like(x)
        return cuda(source, x, out, grid=128, block=128, schedule=schedule, memory=memory).counters["cycles"]

    slow, fast = taken(2.0), taken(4.0)
    assert slow == pytest.approx(2 * fast, rel=0.01)
    assert slow == pytest.approx(2 * x.nbytes / 2.0 * MEGAHERTZ / 1000, rel=0.01)


SEND = """extern "C" __global__ void k(char* to, char* from, u64 bytes) {
    nvshmemx_qp_char_put_nbi_warp(to, from, bytes, 1 - nvshmem_my_pe(), 2);
    nvshmem_quiet();
}"""


@functools.cache
def send_ptx():
    return jit.compile_ptx(DECLARATIONS + SEND, defines={"TIMEOUT": "0ull"})


def exchange(link, size=1 << 20, seed=0, nodes=1, schedule="random"):
    """Cycles until two ranks have sent each other `size` bytes and know it."""
    links = {"nvlink": link} if nodes == 1 else {"ib": link}
    cluster = emulator.VirtualCluster(nodes, 2 // nodes, seed, schedule, **links)
    to, of = (cluster.symmetric((size,), torch.uint8) for _ in range(2))
    args = [[to[r], of[r], size] for r in range(2)]
    cluster.launch(send_ptx(), "k", grid=(1, 1, 1), block=(32, 1, 1), args=args)
    return cluster.counters["cycles"], cluster


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("schedule", ["random", "timed"])
def test_an_exchange_follows_bandwidth_and_latency(nodes, schedule):
    size = 1 << 20
    taken = {}
    for seed in range(2):
        for latency, bandwidth in ((0, 50.0), (0, 100.0), (10_000, 100.0)):
            link = emulator.Link(latency, bandwidth)
            taken[latency, bandwidth] = exchange(link, size, seed, nodes, schedule)[0]
        assert taken[0, 50.0] == pytest.approx(2 * taken[0, 100.0], rel=0.01)
        assert taken[0, 100.0] == pytest.approx(size / 100.0 * MEGAHERTZ / 1000, rel=0.01)
        # There, and the news of it back.
        assert taken[10_000, 100.0] - taken[0, 100.0] == 2 * 10_000 * MEGAHERTZ // 1000


def test_a_gpu_has_one_port_for_all_its_peers():
    ptx = jit.compile_ptx(
        DECLARATIONS
        + """extern "C" __global__ void k(char* to, char* from, u64 bytes, int peers) {
        for (int p = 1; p <= peers; p++)
            nvshmemx_qp_char_put_nbi_warp(to, from, bytes, (nvshmem_my_pe() + p) % 4, 2);
        nvshmem_quiet(); }""",
        defines={"TIMEOUT": "0ull"},
    )

    def taken(peers):
        cluster = emulator.VirtualCluster(1, 4, nvlink=emulator.Link(0, 100.0), checks=False)
        to, of = (cluster.symmetric((1 << 18,), torch.uint8) for _ in range(2))
        args = [[to[r], of[r], 1 << 18, peers] for r in range(4)]
        cluster.launch(ptx, "k", grid=(1, 1, 1), block=(32, 1, 1), args=args)
        return cluster.counters["cycles"]

    assert taken(3) == pytest.approx(3 * taken(1), rel=0.02)


def test_a_message_keeps_the_warp_that_posts_it():
    """A put with its signal is one; another warp does not wait."""
    puts, nanoseconds = 5, 1000
    call = {
        "put": "nvshmemx_qp_char_put_nbi_warp(to, from, 64, peer, 2)",
        "both": "nvshmemx_qp_char_put_signal_nbi_warp(to, from, 64, (u64*)(to + 64), 1ull, 9, peer, 2)",
    }

    def taken(what, posting, warps, schedule):
        source = f"""extern "C" __global__ void k(char* to, char* from) {{ int peer = nvshmem_my_pe() ^ 1;
            for (int i = 0; i < {puts}; i++) {call[what]}; }}"""
        ptx = jit.compile_ptx(DECLARATIONS + source, defines={"TIMEOUT": "0ull"})
        ib = emulator.Link(0, 100.0, posting=posting)
        cluster = emulator.VirtualCluster(2, 1, 0, schedule, ib=ib, checks=False)
        to, of = (cluster.symmetric((128,), torch.uint8) for _ in range(2))
        args = [[to[r], of[r]] for r in range(2)]
        cluster.launch(ptx, "k", grid=(1, 1, 1), block=(32 * warps, 1, 1), args=args)
        return cluster.counters["cycles"]

    for what, schedule in (("put", "timed"), ("both", "timed"), ("both", "random")):
        free = taken(what, 0, 1, schedule)
        posted = taken(what, nanoseconds, 1, schedule)
        assert posted - free == pytest.approx(puts * nanoseconds * MEGAHERTZ / 1000, rel=0.02)
        assert taken(what, nanoseconds, 2, schedule) - posted < nanoseconds


def gemm_cycles(stages, seed=0, schedule="timed", checks=True):
    gpu, _ = run_gemm(128, 128, 1024, stages=stages, seed=seed, schedule=schedule, checks=checks)
    return gpu.counters["cycles"]


def test_a_gemm_with_more_stages_is_faster():
    one, two, four = (gemm_cycles(stages) for stages in (1, 2, 4))
    assert one > two > four
    for seed in range(2):
        assert gemm_cycles(1, seed, "random") > 1.5 * gemm_cycles(4, seed, "random")
    # Two of the latencies cannot be hidden; the tensor core's 512 cycles a step can, behind nothing.
    assert four > 8 * 512 + 2 * LATENCY - LATENCY // 2
    assert one > 8 * (512 + LATENCY)


def test_timed_runs_take_the_same_time_for_every_seed_and_without_checks():
    assert len({gemm_cycles(4, seed, "timed", checks) for seed in range(3) for checks in (True, False)}) == 1


@pytest.mark.parametrize("schedule", ["random", "pct", "round_robin", "timed"])
def test_nobody_sees_a_value_before_it_is_written(schedule):
    # Block 0 raises a flag after 1000 atomics; block 1 polls it, in the schedule's order before or after.
    source = """k(int* flag, int* o) { int v;
    if (blockIdx.x == 0) { for (int i = 0; i < 1000; i++) asm volatile("add.u32 %0, %0, 1;" : "+r"(v));
        asm volatile("st.release.gpu.global.u32 [%0], 1;" :: "l"(flag) : "memory"); }
    else { do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory"); while (!v);
        *o = 7; } }"""
    for seed in range(8):
        for checks in (True, False):
            flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            gpu = cuda(source, flag, out, grid=2, block=1, seed=seed, schedule=schedule, checks=checks)
            # The flag's way to memory, the value's way back, and the way of what is stored then. Under random
            # and pct the flag may become visible any time after that.
            assert gpu.counters["cycles"] > 1000 + 3 * (LATENCY // 2)
            if schedule in ("round_robin", "timed"):
                assert gpu.counters["cycles"] < 1000 + 3 * LATENCY + 1200
            assert out.item() == 7


def test_a_release_waits_for_the_stores_that_it_releases():
    def taken(store, scope):
        source = f"""k(int* o) {{ if (threadIdx.x == 0) {{ {store}
        asm volatile("fence.acq_rel.{scope};" ::: "memory"); }} }}"""
        return cuda(source, torch.zeros(1, dtype=torch.int32)).counters["cycles"]

    # A store at the end of a launch is waited for too, so the fence adds what follows it only.
    assert taken("", "gpu") < 50 < LATENCY // 2 < taken("*o = 1;", "gpu")
    source = """k(int* o) { if (threadIdx.x == 0) { *o = 1; FENCE o[1] = 2; } }"""
    both = [
        cuda(source.replace("FENCE", f), torch.zeros(2, dtype=torch.int32)).counters["cycles"]
        for f in ("", 'asm volatile("fence.acq_rel.cta;" ::: "memory");', "__threadfence();")
    ]
    assert both[1] - both[0] <= 2 and both[2] - both[0] == pytest.approx(LATENCY // 2, abs=4)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_wait_for_a_place(seed):
    # 1024 threads a block: two blocks an SM.
    source = "k(int* o) { __shared__ int s[25000]; s[threadIdx.x] = 0; for (int i = 0; i < 100; i++) atomicAdd(o, 1); }"
    one, two, three = (
        cuda(
            source, torch.zeros(1, dtype=torch.int32), block=32, grid=4 * n, seed=seed, checks=False
        ).counters["cycles"]
        for n in (1, 2, 3)
    )
    assert one <= two < three and three > 1.5 * one


def test_launches_follow_each_other_and_each_has_its_time():
    gpu = emulator.VirtualGPU(num_sms=1)
    source = "k(int* o) { for (int i = 0; i < 50; i++) atomicAdd(o, 1); }"
    ends = [0]
    for _ in range(3):
        cuda(source, torch.zeros(1, dtype=torch.int32), gpu=gpu)
        ends.append(gpu.counters["cycles"])
        assert gpu.counters["launch_cycles"] == ends[-1] - ends[-2] > 50


def test_a_timeout_of_the_kernel_takes_its_time():
    source = """k(int* flag, int* o) { int v; u64 begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do { asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); } while (!v && now - begin < 1000000);
    *o = v; }"""
    gpu = cuda(source, torch.zeros(1, dtype=torch.int32), torch.full((1,), 9, dtype=torch.int32), block=1)
    assert gpu.counters["cycles"] > 1_000_000 * MEGAHERTZ // 1000


def test_timed_runs_give_the_same_results():
    _, out = ring(schedule="timed")
    assert out.tolist() == [expected(r) for r in range(SIZE)]
    a, b = dsv3.quantize_1x128(torch.randn(200, 304)), dsv3.quantize_128x128(torch.randn(96, 304))
    with emulator.virtual_gpu(schedule="timed"):
        y = dsv3.fp8_gemm(a, b)
    want = dsv3.reference.fp8_gemm(a, b, accumulation="hopper")
    assert torch.equal(y.view(torch.int16), want.view(torch.int16))
    source = """k(const int* x, int* o) { __shared__ int s[64]; __shared__ u64 b; u32 t = threadIdx.x;
    if (t == 0) ptx::mbarrier_init(&b, 64);
    __syncthreads();
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(ptx::shared_address(s + t)), "l"(x + t) : "memory");
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(ptx::shared_address(&b)) : "memory");
    ptx::mbarrier_wait(&b, 0); o[t] = s[63 - t]; }"""
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    gpu = cuda(source, x, out, block=64, schedule="timed")
    assert out.tolist() == x.flip(0).tolist() and gpu.counters["cycles"] > LATENCY
