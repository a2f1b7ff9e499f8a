"""Barriers, mbarriers, release and acquire, spinning and virtual time, programmatic dependent launch."""

import functools

import pytest
import torch

from dsv3_kernels import emulator, jit

SEEDS = range(8)


@functools.cache
def compiled(source):
    head = '#include "ptx.cuh"\nusing namespace dsv3;\nextern "C" __global__ void '
    return jit.compile_ptx(head + source, lineinfo=True)


def cuda(source, *args, block=32, grid=1, seed=0, gpu=None, cluster=1, **options):
    gpu = gpu or emulator.VirtualGPU(num_sms=4, seed=seed, **options)
    gpu.launch(
        compiled(source),
        "k",
        grid=(grid, 1, 1),
        block=(block, 1, 1),
        args=list(args),
        cluster=(cluster, 1, 1),
    )
    return gpu


@pytest.mark.parametrize("seed", SEEDS)
def test_tree_reduction_in_shared_memory(seed):
    x = torch.arange(256, dtype=torch.int32)
    out = torch.zeros(1, dtype=torch.int32)
    source = """k(const int* x, int* o) { __shared__ int s[256]; s[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
    for (int n = 128; n > 0; n /= 2) { if (threadIdx.x < n) s[threadIdx.x] += s[threadIdx.x + n]; SYNC }
    if (threadIdx.x == 0) *o = s[0]; }"""
    cuda(source.replace("SYNC", "__syncthreads();"), x, out, block=256, seed=seed)
    assert out.item() == x.sum()
    with pytest.raises(emulator.HazardError, match="data race"):
        cuda(source.replace("SYNC", ""), x, out, block=256, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_barrier_reductions(seed):
    out = torch.zeros(3, dtype=torch.int32)
    cuda(
        """k(int* o) { int n = __syncthreads_count(threadIdx.x % 3 == 0);
            int a = __syncthreads_and(threadIdx.x < 96);
    int b = __syncthreads_or(threadIdx.x == 95); if (threadIdx.x == 7) { o[0] = n; o[1] = a; o[2] = b; } }""",
        out,
        block=96,
        seed=seed,
    )
    assert out.tolist() == [32, 1, 1]


def test_warps_that_exit_leave_the_whole_block_barrier():
    out = torch.zeros(1, dtype=torch.int32)
    cuda(
        "k(int* o) { if (threadIdx.x >= 64) return; __syncthreads(); if (threadIdx.x == 0) *o = 3; }",
        out,
        block=128,
    )
    assert out.item() == 3


def test_deadlock_lists_who_waits_for_what():
    source = """k() { __shared__ u64 b; if (threadIdx.x == 0) ptx::mbarrier_init(&b, 3); __syncthreads();
    if (threadIdx.x < 2) ptx::mbarrier_arrive(&b); if (threadIdx.x >= 32) ptx::named_barrier_sync(5, 64);
    ptx::mbarrier_wait(&b, 0); }"""
    with pytest.raises(emulator.DeadlockError) as info:
        cuda(source, block=64)
    text = str(info.value)
    assert "warp 0" in text and "warp 1" in text and "seed 0" in text
    assert "barrier 5" in text and "32 threads arrived, 64 expected" in text
    assert "2 of 3 arrivals" in text and "parity 0" in text and "ptx.cuh" in text


BARRIER = "__shared__ u64 b; if (threadIdx.x == 0) ptx::mbarrier_init(&b, 1); __syncthreads();"


@pytest.mark.parametrize(
    ("body", "waits"),
    [
        (
            BARRIER + "if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(&b, 48); ptx::mbarrier_wait(&b, 0);",
            ["phase 0 (parity 0): 1 of 1 arrivals, 48 bytes missing"] * 3,
        ),
        (
            BARRIER + "ptx::mbarrier_wait(&b, 1); ptx::mbarrier_wait(&b, 0);",
            ["phase 0 (parity 0): 0 of 1 arrivals"] * 3,
        ),
        (
            BARRIER + "if (threadIdx.x >= 32) __syncthreads(); else ptx::mbarrier_wait(&b, 0);",
            ["0 of 1 arrivals", *["barrier 0 phase 1: 64 threads arrived, all of the block expected"] * 2],
        ),
        (
            "if (threadIdx.x >= 64) return; ptx::named_barrier_sync(3, 96);",
            ["barrier 3 phase 0: 64 threads arrived, 96 expected"] * 2,
        ),
        (
            "if (threadIdx.x == 7) { while (*(volatile int*)o == 0) {} } __syncwarp();",
            ["another value than 0 in 'int32[1]' at byte 0", "lanes"],
        ),
        (
            "if (threadIdx.x < 64) ptx::cluster_arrive(); else { while (*(volatile int*)o == 0) {} }"
            "ptx::cluster_wait();",
            [*["barrier.cluster phase 0: 2 warps arrived, 3 expected"] * 2, "another value than 0"],
        ),
    ],
)
def test_every_blocked_warp_is_listed_with_its_counts(body, waits):
    with pytest.raises(emulator.DeadlockError) as info:
        cuda(f"k(int* o) {{ {body} }}", torch.zeros(1, dtype=torch.int32), block=96)
    listed = [line for line in str(info.value).splitlines() if ": waits for " in line]
    assert len(listed) == len(waits) and all("at PTX line" in line for line in listed)
    for wait in waits:
        found = next((line for line in listed if wait in line), None)
        assert found, f"{wait!r} is not in {listed}"
        listed.remove(found)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("schedule", ["random", "pct", "round_robin"])
def test_message_passing_by_release_and_acquire(seed, schedule):
    source = """k(int* data, int* flag, int* o) {
    if (blockIdx.x == 0) { data[threadIdx.x] = 5 + threadIdx.x; __syncwarp();
        if (threadIdx.x == 0) asm volatile("st.release.SCOPE.global.u32 [%0], 1;" :: "l"(flag) : "memory"); }
    else { int v; if (threadIdx.x == 0) do {
    asm volatile("ld.acquire.SCOPE.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory"); } while (!v);
        __syncwarp(); o[threadIdx.x] = data[threadIdx.x]; } }"""
    data, flag, out = (torch.zeros(32, dtype=torch.int32) for _ in range(3))
    cuda(source.replace("SCOPE", "gpu"), data, flag, out, grid=2, seed=seed, schedule=schedule)
    assert out.tolist() == list(range(5, 37))
    flag.zero_()
    with pytest.raises(emulator.HazardError, match="data race"):
        cuda(source.replace("SCOPE", "cta"), data, flag, out, grid=2, seed=seed, schedule=schedule)


@pytest.mark.parametrize("seed", SEEDS)
def test_message_passing_by_fences(seed):
    source = """k(int* data, int* flag, int* o) {
    if (blockIdx.x == 0) { data[threadIdx.x] = 5; __syncwarp(); if (threadIdx.x == 0) { FENCE;
    *(volatile int*)flag = 1; } }
    else { if (threadIdx.x == 0) { while (!*(volatile int*)flag) {} __threadfence(); } __syncwarp();
    o[threadIdx.x] = data[threadIdx.x]; } }"""
    data, flag, out = (torch.zeros(32, dtype=torch.int32) for _ in range(3))
    cuda(source.replace("FENCE", "__threadfence()"), data, flag, out, grid=2, seed=seed)
    assert (out == 5).all()
    flag.zero_()
    with pytest.raises(emulator.HazardError, match="data race"):
        cuda(source.replace("FENCE", ""), data, flag, out, grid=2, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lock_in_global_memory(seed):
    out = torch.zeros(2, dtype=torch.int32)
    cuda(
        """k(int* o) { if (threadIdx.x % 32) return; for (int i = 0; i < 3; i++) {
            while (atomicCAS(o, 0, 1)) {} __threadfence(); o[1]++;
    __threadfence(); atomicExch(o, 0); } }""",
        out,
        grid=4,
        block=64,
        seed=seed,
    )
    assert out.tolist() == [0, 24]


def test_diverged_lanes_may_wait_for_each_other():
    out = torch.zeros(1, dtype=torch.int32)
    cuda(
        """k(int* o) { __shared__ volatile int f; if (threadIdx.x == 0) f = 0; __syncwarp();
    if (threadIdx.x == 5) { while (f == 0) __nanosleep(20); *o = f; } else if (threadIdx.x == 9) { f = 4;
    } }""",
        out,
    )
    assert out.item() == 4


def test_timeouts_fire_at_once():
    """A wait of 30 s for what never comes ends by the kernel's own clock."""
    out = torch.zeros(1, dtype=torch.int64)
    flag = torch.zeros(1, dtype=torch.int32)
    source = """k(int* flag, long long* o) { unsigned long long t0, t;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t0));
    do { asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    } while (*(volatile int*)flag == 0 && t - t0 < 30000000000ull); *o = t - t0; }"""
    gpu = cuda(source, flag, out, block=1)
    assert 30_000_000_000 <= out.item() < 60_000_000_000 and gpu.counters["instructions"] < 5000


def test_clock_and_sleep():
    out = torch.zeros(2, dtype=torch.int64)
    cuda(
        """k(long long* o) { unsigned long long a, b; long long c = clock64();
            asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(a));
    __nanosleep(5000); asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(b)); o[0] = b - a;
    o[1] = clock64() - c; }""",
        out,
        block=1,
    )
    assert 5000 <= out[0] < 6000 and out[1] > 5000


@pytest.mark.parametrize("seed", SEEDS)
def test_programmatic_dependent_launch(seed):
    first = """k(int* x) { ptx::launch_dependents(); x[blockIdx.x * 32 + threadIdx.x] = 7; }"""
    second = (
        """k(int* x, int* o) { WAIT o[blockIdx.x * 32 + threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x]; }"""
    )

    def launches(wait):
        head = '#include "ptx.cuh"\nusing namespace dsv3;\nextern "C" __global__ void '
        return [
            {
                "ptx": jit.compile_ptx(head + source.replace("WAIT", wait)),
                "kernel": "k",
                "grid": (4, 1, 1),
                "block": (32, 1, 1),
                "args": args,
            }
            for source, args in ((first, [x]), (second, [x, out]))
        ]

    x, out = torch.zeros(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    emulator.VirtualGPU(num_sms=2, seed=seed).launch_chain(launches("ptx::grid_dependency_wait();"))
    assert (out == 7).all()
    with pytest.raises(emulator.HazardError, match="data race"):
        emulator.VirtualGPU(num_sms=2, seed=seed).launch_chain(launches(""))


def test_trap_names_the_lane():
    with pytest.raises(emulator.EmulationError, match="trapped") as info:
        cuda('k() { if (threadIdx.x == 13) asm volatile("trap;"); }')
    assert info.value.lane == 13
