"""Idioms that are right and look dangerous: no schedule may raise an alarm."""

import pytest
import torch
from test_sync import cuda

from dsv3_kernels import emulator
from dsv3_kernels.tensor_map import TensorMap

SEEDS = range(12)
BULK_STORE = """asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256;"
    :: "l"(o), "r"(ptx::shared_address(s)) : "memory"); ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<0>();"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("before", [True, False])
def test_proxy_fence_on_either_side_of_the_barrier(seed, before):
    out = torch.zeros(64, dtype=torch.int32)
    fence = "ptx::fence_proxy_async_shared();"
    source = f"""k(int* o) {{ __shared__ __align__(128) int s[64]; s[threadIdx.x] = threadIdx.x;
    {fence if before else ""} __syncthreads(); if (threadIdx.x == 0) {{
    {"" if before else fence} {BULK_STORE} }} }}"""
    cuda(source, out, block=64, seed=seed)
    assert out.tolist() == list(range(64))
    with pytest.raises(emulator.HazardError, match="no proxy fence"):
        cuda(source.replace(fence, ""), out, block=64, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_consumers_release_a_stage_without_a_proxy_fence(seed):
    """The copy engine refills behind the consumers' arrivals; parity 1 passes on a fresh barrier."""
    x = torch.arange(8 * 64, dtype=torch.int32)
    out = torch.zeros(8 * 64, dtype=torch.int32)
    cuda(
        """k(const int* x, int* o) {
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
    } }""",
        x,
        out,
        block=96,
        seed=seed,
    )
    assert torch.equal(out, x)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("row", [-3, 6, 8, 100])
def test_boxes_beyond_the_tensor_complete_all_their_bytes(seed, row):
    x = torch.arange(1, 8 * 32 + 1, dtype=torch.int32).view(8, 32)
    out = torch.full((4, 32), -1, dtype=torch.int32)
    cuda(
        """k(const __grid_constant__ TensorMap m, int row, int* o) {
    __shared__ __align__(128) int s[4][32]; __shared__ u64 b;
    if (threadIdx.x == 0) { ptx::mbarrier_init(&b, 1); ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(&b, 512);
        ptx::tma_load(s, &m, &b, 0, row); } __syncthreads(); ptx::mbarrier_wait(&b, 0);
    for (int i = 0; i < 4; i++) o[i * 32 + threadIdx.x] = s[i][threadIdx.x]; }""",
        TensorMap(x, (4, 32), 0),
        row,
        out,
        seed=seed,
    )
    rows = [x[r].tolist() if 0 <= r < 8 else [0] * 32 for r in range(row, row + 4)]
    assert out.tolist() == rows


@pytest.mark.parametrize("seed", SEEDS)
def test_lane_0_publishes_the_warps_writes(seed):
    data, flag, out = torch.zeros(32), torch.zeros(1, dtype=torch.int32), torch.zeros(32)
    cuda(
        """k(float* d, int* f, float* o) { if (blockIdx.x == 0) { d[threadIdx.x] = 2; __syncwarp();
        if (threadIdx.x == 0) { __threadfence(); atomicExch(f, 1); } }
    else { if (threadIdx.x == 0) { while (atomicAdd(f, 0) == 0) {} __threadfence(); } __syncwarp();
        o[threadIdx.x] = d[threadIdx.x]; } }""",
        data,
        flag,
        out,
        grid=2,
        seed=seed,
    )
    assert (out == 2).all()
