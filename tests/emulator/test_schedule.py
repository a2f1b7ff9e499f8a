"""Seeds replay, schedules differ, small cases can be explored whole."""

import pytest
import torch
from test_sync import cuda

from dsv3_kernels import emulator, jit

ORDER = "k(int* o) { if (threadIdx.x % 32 == 0) o[1 + atomicAdd(o, 1)] = blockIdx.x * 4 + threadIdx.x / 32; }"


def order(seed, schedule="random"):
    out = torch.zeros(17, dtype=torch.int32)
    gpu = cuda(ORDER, out, grid=4, block=128, seed=seed, schedule=schedule)
    return out.tolist(), gpu.counters


@pytest.mark.parametrize("schedule", ["random", "pct", "round_robin"])
def test_a_seed_replays_the_same_run(schedule):
    assert order(3, schedule) == order(3, schedule)
    if schedule != "round_robin":
        assert len({tuple(order(seed, schedule)[0]) for seed in range(10)}) > 5


def test_explore_finds_every_order():
    """Three warps take a ticket each: all 6 orders occur, and nothing else."""
    seen = set()
    ptx = jit.compile_ptx('extern "C" __global__ void ' + ORDER)

    def run(gpu):
        out = torch.zeros(4, dtype=torch.int32)
        gpu.launch(ptx, "k", grid=(1, 1, 1), block=(96, 1, 1), args=[out])
        seen.add(tuple(out.tolist()[1:]))

    assert emulator.explore(run) >= 6
    assert len(seen) == 6


STORE_BUFFERING = """k(int* o) { int w = blockIdx.x, seen;
    asm volatile("st.relaxed.gpu.global.u32 [%0], 1;" :: "l"(o + w) : "memory");
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(o + 1 - w) : "memory");
    o[2 + w] = seen; }"""


def test_explore_without_late_stores_is_sequentially_consistent():
    """Every order of the four steps; that both read 0 takes stores that come late."""
    ptx = jit.compile_ptx('extern "C" __global__ void ' + STORE_BUFFERING)
    seen = set()

    def run(gpu):
        out = torch.zeros(4, dtype=torch.int32)
        gpu.launch(ptx, "k", grid=(2, 1, 1), block=(1, 1, 1), args=[out])
        seen.add(tuple(out.tolist()[2:]))

    assert emulator.explore(run, late_stores=False) >= 6
    assert seen == {(0, 1), (1, 0), (1, 1)}
    emulator.explore(run)
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_explore_takes_a_cluster():
    """Two ranks take a ticket: both orders occur."""
    seen = set()
    ptx = jit.compile_ptx(
        'extern "C" __global__ void k(int* o, int r) { o[1 + r] = atomicAdd_system(o, 1); }'
    )

    def run(cluster):
        out = torch.zeros(3, dtype=torch.int32)
        address = torch.tensor([cluster.address_of(out, 0)])
        args = [[address.numpy().tobytes(), r] for r in range(2)]
        cluster.launch(ptx, "k", grid=(1, 1, 1), block=(1, 1, 1), args=args)
        seen.add(tuple(out.tolist()[1:]))

    make = emulator.VirtualCluster
    assert emulator.explore(run, make=make, nodes=1, gpus_per_node=2, late_stores=False) >= 2
    assert seen == {(0, 1), (1, 0)}


def test_explore_finds_the_one_bad_order():
    """The bug needs one of the orders; the error holds the choices that led there."""
    source = """k(int* o) { if (threadIdx.x == 0) {
        if (atomicAdd(o, 1) == 1 && atomicAdd(o + 1, 1) == 0) asm volatile("trap;"); }
    if (threadIdx.x == 32) { atomicAdd(o, 1); atomicAdd(o + 1, 1); } }"""
    ptx = jit.compile_ptx('extern "C" __global__ void ' + source)

    def run(gpu):
        gpu.launch(ptx, "k", grid=(1, 1, 1), block=(64, 1, 1), args=[torch.zeros(2, dtype=torch.int32)])

    with pytest.raises(emulator.EmulationError, match="trapped") as info:
        emulator.explore(run)
    assert info.value.choices
    with pytest.raises(emulator.EmulationError, match="more than 2 interleavings"):
        emulator.explore(
            lambda gpu: cuda(ORDER, torch.zeros(17, dtype=torch.int32), block=128, gpu=gpu), limit=2
        )


def test_a_gpu_goes_on_after_an_error():
    gpu = emulator.VirtualGPU()
    with pytest.raises(emulator.DeadlockError):
        cuda(
            "k() { __shared__ u64 b;"
            "if (threadIdx.x == 0) { ptx::mbarrier_init(&b, 1); ptx::mbarrier_wait(&b, 0); } }",
            gpu=gpu,
        )
    out = torch.zeros(1, dtype=torch.int32)
    cuda("k(int* o) { *o = 3; }", out, block=1, gpu=gpu)
    assert out.item() == 3


def test_blocks_wait_for_a_free_sm():
    """More blocks than fit: those that spin on one that has not started deadlock, in order they pass."""
    source = """k(int* o) { extern __shared__ int s[]; if (threadIdx.x) return;
    if (blockIdx.x == WHO) atomicExch(o, 1); else while (atomicAdd(o, 0) == 0) {} }"""
    head = 'extern "C" __global__ void '

    def run(who):
        gpu = emulator.VirtualGPU(num_sms=2)
        gpu.launch(
            jit.compile_ptx(head + source.replace("WHO", str(who))),
            "k",
            grid=(4, 1, 1),
            block=(32, 1, 1),
            args=[torch.zeros(1, dtype=torch.int32)],
            shared_bytes=200_000,
        )

    run(0)
    with pytest.raises(emulator.DeadlockError):
        run(3)


def test_endless_loops_end_at_max_steps():
    with pytest.raises(emulator.EmulationError, match="max_steps"):
        cuda(
            "k(int* o) { for (int i = 0;; i++) o[threadIdx.x] = i; }",
            torch.zeros(32, dtype=torch.int32),
            max_steps=10_000,
        )


def test_current_gpu_is_that_of_the_innermost_with():
    assert emulator.current() is None
    with emulator.virtual_gpu(seed=1) as outer:
        assert emulator.current() is outer
        with emulator.virtual_gpu(num_sms=3) as inner:
            assert emulator.current() is inner and inner.num_sms == 3
        assert emulator.current() is outer
    assert emulator.current() is None
    with pytest.raises(ValueError, match="schedule"):
        emulator.VirtualGPU(schedule="fair")
