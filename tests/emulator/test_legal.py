"""Idioms that are right and look dangerous: no schedule may raise an alarm."""

import pytest
import torch
from test_sync import cuda

from dsv3_kernels import emulator
from dsv3_kernels.tensor_map import TensorMap

SEEDS = range(200)
BULK_STORE = """asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256;"
    :: "l"(o), "r"(ptx::shared_address(s)) : "memory"); ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<0>();"""


@pytest.mark.parametrize("before", [True, False])
def test_proxy_fence_on_either_side_of_the_barrier(before):
    out = torch.zeros(64, dtype=torch.int32)
    fence = "ptx::fence_proxy_async_shared();"
    source = f"""k(int* o) {{ __shared__ __align__(128) int s[64]; s[threadIdx.x] = threadIdx.x;
    {fence if before else ""} __syncthreads(); if (threadIdx.x == 0) {{
    {"" if before else fence} {BULK_STORE} }} }}"""
    for seed in SEEDS:
        out.zero_()
        cuda(source, out, block=64, seed=seed)
        assert out.tolist() == list(range(64))
        with pytest.raises(emulator.HazardError, match="no proxy fence"):
            cuda(source.replace(fence, ""), out, block=64, seed=seed)


def test_consumers_release_a_stage_without_a_proxy_fence():
    """The copy engine refills behind the consumers' arrivals; parity 1 passes on a fresh barrier."""
    x = torch.arange(8 * 64, dtype=torch.int32)
    out = torch.zeros(8 * 64, dtype=torch.int32)
    source = """k(const int* x, int* o) {
    __shared__ __align__(128) int s[64];
    __shared__ u64 full, empty;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::mbarrier_init(&empty, 2);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x > 64) return;
    if (threadIdx.x == 64) {
        for (int i = 0; i < 8; i++) {
            ptx::mbarrier_wait(&empty, i & 1 ^ 1);
            ptx::mbarrier_arrive_expect(&full, 256);
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];"
                :: "r"(ptx::shared_address(s)), "l"(x + i * 64), "r"(ptx::shared_address(&full)) : "memory");
        }
        return;
    }
    for (int i = 0; i < 8; i++) {
        ptx::mbarrier_wait(&full, i & 1);
        o[i * 64 + threadIdx.x] = s[threadIdx.x];
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&empty);
    } }"""
    for seed in SEEDS:
        out.zero_()
        cuda(source, x, out, block=96, seed=seed)
        assert torch.equal(out, x)


@pytest.mark.parametrize("row", [-3, 6, 8, 100])
def test_boxes_beyond_the_tensor_complete_all_their_bytes(row):
    x = torch.arange(1, 8 * 32 + 1, dtype=torch.int32).view(8, 32)
    out = torch.full((4, 32), -1, dtype=torch.int32)
    source = """k(const __grid_constant__ TensorMap m, int row, int* o) {
    __shared__ __align__(128) int s[4][32]; __shared__ u64 b;
    if (threadIdx.x == 0) { ptx::mbarrier_init(&b, 1); ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(&b, 512);
        ptx::tma_load(s, &m, &b, 0, row); } __syncthreads(); ptx::mbarrier_wait(&b, 0);
    for (int i = 0; i < 4; i++) o[i * 32 + threadIdx.x] = s[i][threadIdx.x]; }"""
    rows = [x[r].tolist() if 0 <= r < 8 else [0] * 32 for r in range(row, row + 4)]
    for seed in SEEDS:
        out.fill_(-1)
        cuda(source, TensorMap(x, (4, 32), 0), row, out, seed=seed)
        assert out.tolist() == rows


def test_lane_0_publishes_the_warps_writes():
    source = """k(float* d, int* f, float* o) { if (blockIdx.x == 0) { d[threadIdx.x] = 2; __syncwarp();
        if (threadIdx.x == 0) { __threadfence(); atomicExch(f, 1); } }
    else { if (threadIdx.x == 0) { while (atomicAdd(f, 0) == 0) {} __threadfence(); } __syncwarp();
        o[threadIdx.x] = d[threadIdx.x]; } }"""
    for seed in SEEDS:
        data, flag, out = torch.zeros(32), torch.zeros(1, dtype=torch.int32), torch.zeros(32)
        cuda(source, data, flag, out, grid=2, seed=seed)
        assert (out == 2).all()


def test_operands_of_asm_may_be_registers_never_written():
    """A tied operand whose old value nobody uses; as wgmma's accumulators with scale-d off."""
    source = """k(int* o) { int x, y; asm volatile("" : "+r"(x)); asm volatile("{ .reg .pred p;"
        "setp.ne.s32 p, %2, 0; selp.b32 %0, %2, %0, p; selp.b32 %1, %0, 9, p; }" : "+r"(y), "=r"(x)
        : "r"(threadIdx.x + 1)); o[threadIdx.x] = x; }"""
    out = torch.zeros(32, dtype=torch.int32)
    for seed in SEEDS:
        out.zero_()
        cuda(source, out, seed=seed)
        assert out.tolist() == list(range(1, 33))


def test_mbarriers_of_a_cluster_behind_a_relaxed_arrive():
    """fence.mbarrier_init is all that the peers, and the engine that serves them, need besides the barrier."""
    x = torch.arange(64, dtype=torch.int32)
    source = """k(const int* x, int* o) { __shared__ __align__(128) int s[64]; __shared__ u64 full, ready;
    u32 rank = ptx::cluster_rank();
    if (threadIdx.x == 0) { ptx::mbarrier_init(&full, 1); ptx::mbarrier_init(&ready, 2);
        ptx::fence_mbarrier_init(); }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); ptx::cluster_wait();
    if (threadIdx.x == 0) { ptx::mbarrier_arrive_expect(&full, 256);
        ptx::mbarrier_arrive_cluster(ptx::cluster_address(&ready, 0)); }
    if (rank == 0 && threadIdx.x == 0) { ptx::mbarrier_wait(&ready, 0); asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], 256,"
        "[%2], %3;" :: "r"(ptx::shared_address(s)), "l"(x), "r"(ptx::shared_address(&full)), "h"((u16)3)); }
    ptx::mbarrier_wait(&full, 0); o[rank * 32 + threadIdx.x] = s[rank * 32 + threadIdx.x];
    ptx::cluster_arrive(); ptx::cluster_wait(); }"""
    for seed in SEEDS:
        out = torch.zeros(64, dtype=torch.int32)
        cuda(source, x, out, grid=2, cluster=2, seed=seed)
        assert torch.equal(out, x)


def test_bulk_reductions_of_many_blocks_meet_in_one_place():
    source = """k(int* o) { __shared__ __align__(128) int s[64]; s[threadIdx.x] = threadIdx.x;
    ptx::fence_proxy_async_shared(); __syncthreads(); if (threadIdx.x == 0) { asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], 256;"
        :: "l"(o), "r"(ptx::shared_address(s)) : "memory"); ptx::bulk_commit_group();
        ptx::bulk_wait_group_read<0>(); } }"""
    for seed in SEEDS:
        out = torch.zeros(64, dtype=torch.int32)
        cuda(source, out, grid=4, block=64, seed=seed)
        assert out.tolist() == [4 * i for i in range(64)]


def test_spins_on_values_that_arrive_late_end():
    """A ring of flags, each a relaxed store that the next block polls: nobody counts as stuck meanwhile."""
    source = """k(volatile int* f, int laps) { int next = (blockIdx.x + 1) % gridDim.x;
    for (int i = 1; i <= laps; i++) { if (blockIdx.x || i > 1) while (f[blockIdx.x] < i - !blockIdx.x) {}
        f[next] = i; } }"""
    for seed in SEEDS:
        flags = torch.zeros(4, dtype=torch.int32)
        cuda(source, flags, 3, grid=4, block=1, seed=seed)
        assert flags.tolist() == [3] * 4
