// FP8 GEMM with fine-grained scales: D[m, n] = A[m, k] * B[n, k]^T in BF16, A scaled by 1x128 tiles, B by
// 128x128 blocks (DeepSeek-V3 report, section 3.3.2).
//
// A persistent block an SM: one warp feeds a ring of stages through the copy engine, one or two warpgroups
// multiply. Per 128 of K the tensor core's partial sum, which keeps 14 bits, is promoted into an FP32 sum in
// registers: s = rn(scale_a * scale_b); y = fma(s, partial, y). While one warpgroup promotes, the other's
// wgmma run.
//
// Tails cost nothing here: boxes beyond M, N or K arrive as zeros, and the copy engine does not store outside
// D.
#pragma once

#include "pipeline.cuh"
#include "ptx.cuh"
#include "tile_scheduler.cuh"

namespace dsv3 {
namespace gemm {

constexpr u32 kBlockK = 128;  // one scale wide, and the width of the 128-byte swizzle
constexpr u32 kWgmmaK = 32;
constexpr u32 kWaveRows = 64;     // M of a wgmma
constexpr u32 kScaleBlock = 128;  // rows of B that share a scale
constexpr u32 kWarpgroup = 128;   // threads
constexpr u32 kProducerRegisters = 40;
constexpr u32 kMathRegisters = 232;  // 2 * 128 * 232 + 128 * 40 = 64,512 of an SM's 65,536

// What follows from a tile's shape. python: dsv3_kernels.gemm.GemmConfig.
template <u32 kBlockM, u32 kBlockN, u32 kStages>
struct Layout {
    static_assert(kBlockM % kWaveRows == 0, "a tile is made of waves of 64 rows");
    static constexpr u32 kMathWarpgroups = kBlockM > kWaveRows ? 2 : 1;
    static constexpr u32 kMathThreads = kMathWarpgroups * kWarpgroup;
    static constexpr u32 kThreads = kMathThreads + kWarpgroup;
    static constexpr u32 kWaves =
        kBlockM / kWaveRows / kMathWarpgroups;  // a warpgroup computes one after the other
    // D leaves in panels as wide as a swizzle's span, 64 rows each.
    static constexpr u32 kPanel = kBlockN % 64 == 0 ? 64 : kBlockN % 32 == 0 ? 32 : 16;
    static constexpr u32 kPanelElements = kWaveRows * kPanel;
    static constexpr u32 kPanels = kBlockN / kPanel;
    static constexpr u32 kStageBytes = (kBlockM + kBlockN) * kBlockK + kBlockM * sizeof(float);

    struct alignas(1024) Shared {
        u8 a[kStages][kBlockM * kBlockK];
        u8 b[kStages][kBlockN * kBlockK];
        Bf16 d[kMathWarpgroups][kWaves][kPanels][kPanelElements];
        float a_scales[kStages][kBlockM];
        Ring<kStages> ring;
    };
};

// sum += (a_scale * b_scale) * partial. Columns from `split` on belong to the next block of B's scales.
template <bool kSpansBlocks, u32 kCount>
__device__ __forceinline__ void promote(float (&sum)[kCount], const float (&partial)[kCount],
                                        const float (&a_scale)[2], const float (&b_scale)[2], u32 split) {
    float scale[2][2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i)
#pragma unroll
        for (u32 j = 0; j < 2; ++j) scale[i][j] = __fmul_rn(a_scale[i], b_scale[j]);
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) {
        const bool next = kSpansBlocks && i / 4 * 8 >= split;
        sum[i] = __fmaf_rn(next ? scale[i / 2 % 2][1] : scale[i / 2 % 2][0], partial[i], sum[i]);
    }
}

// One wave's FP32 sums as BF16 to its panels in shared memory, in the swizzle that the copy engine expects.
template <u32 kBlockN, u32 kPanel, u32 kPanelElements>
__device__ __forceinline__ void stage_output(Bf16 (*panels)[kPanelElements],
                                             const float (&sum)[kBlockN / 2]) {
    const u32 lane = threadIdx.x % 32;
    const u32 row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
    for (u32 column = 0; column < kBlockN; column += 16) {
        u32 offset = (row * kPanel + column % kPanel + lane / 16 * 8) * sizeof(Bf16);
        offset ^= (offset >> 7 & (kPanel / 8 - 1)) << 4;
        const float* v = &sum[column / 2];
        ptx::stmatrix(reinterpret_cast<u8*>(panels[column / kPanel]) + offset, ptx::bf16x2(v[0], v[1]),
                      ptx::bf16x2(v[2], v[3]), ptx::bf16x2(v[4], v[5]), ptx::bf16x2(v[6], v[7]));
    }
}

}  // namespace gemm

// a_map: A e4m3 [m, k], boxes [kBlockM, 128], 128-byte swizzle; b_map: B e4m3 [n, k], boxes [kBlockN, 128],
// likewise. a_scales_map: FP32 [ceil(k / 128), m] (the MN-major scales as they lie), boxes [1, kBlockM], no
// swizzle. d_map: D BF16 [m, n], boxes [64, kPanel], swizzle 2 * kPanel bytes. b_scales: FP32 [ceil(n / 128),
// ceil(k / 128)].
template <u32 kBlockM, u32 kBlockN, u32 kStages, u32 kStrip>
__global__ void __launch_bounds__(gemm::Layout<kBlockM, kBlockN, kStages>::kThreads, 1)
    fp8_gemm(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
             const __grid_constant__ TensorMap a_scales_map, const __grid_constant__ TensorMap d_map,
             const float* b_scales, u32 m, u32 n, u32 k) {
    using namespace gemm;
    using L = Layout<kBlockM, kBlockN, kStages>;
    constexpr bool kSpansBlocks = kScaleBlock % kBlockN != 0;

    extern __shared__ __align__(1024) u8 dynamic_shared[];
    auto& shared = *reinterpret_cast<typename L::Shared*>(dynamic_shared);
    const u32 warpgroup = threadIdx.x / kWarpgroup;
    const u32 warp = threadIdx.x / 32;
    const u32 lane = threadIdx.x % 32;
    const u32 k_blocks = (k + kBlockK - 1) / kBlockK;

    if (threadIdx.x == 0) {
        for (const TensorMap* map : {&a_map, &b_map, &a_scales_map, &d_map}) ptx::prefetch_tensor_map(map);
        shared.ring.init(L::kMathThreads / 32);
    }
    __syncthreads();
    ptx::grid_dependency_wait();

    DenseScheduler<kBlockM, kBlockN, kStrip> scheduler(m, n);
    typename Ring<kStages>::Position position;
    Tile tile;

    if (warpgroup == L::kMathWarpgroups) {
        if constexpr (L::kMathWarpgroups == 2) ptx::decrease_registers<kProducerRegisters>();
        if (warp == L::kMathThreads / 32 && ptx::elect_one()) {
            while (scheduler.next(tile)) {
                for (u32 k_block = 0; k_block < k_blocks; ++k_block, position.advance()) {
                    const u32 s = position.stage;
                    u64* full = shared.ring.acquire(position, L::kStageBytes);
                    ptx::tma_load(shared.a[s], &a_map, full, k_block * kBlockK, tile.row);
                    ptx::tma_load(shared.b[s], &b_map, full, k_block * kBlockK, tile.column);
                    ptx::tma_load(shared.a_scales[s], &a_scales_map, full, tile.row, k_block);
                }
            }
            ptx::launch_dependents();
        }
        return;
    }

    if constexpr (L::kMathWarpgroups == 2) ptx::increase_registers<kMathRegisters>();
    const u32 first_row = warpgroup * L::kWaves * kWaveRows;    // of the warpgroup in the tile
    const u32 lane_row = first_row + warp % 4 * 16 + lane / 4;  // and that row + 8
    const u32 last_scale_row = (n - 1) / kScaleBlock;

    while (scheduler.next(tile)) {
        const u32 scale_row = tile.column / kScaleBlock;
        const u32 split = kScaleBlock - tile.column % kScaleBlock;
        const float* b_scale_rows[2] = {b_scales + scale_row * k_blocks,
                                        b_scales + min(scale_row + 1, last_scale_row) * k_blocks};
        float sum[L::kWaves][kBlockN / 2] = {};

        for (u32 k_block = 0; k_block < k_blocks; ++k_block, position.advance()) {
            const u32 s = position.stage;
            // Before the wait, which hides their latency.
            const float b_scale[2] = {
                ptx::load_global_nc_float(b_scale_rows[0] + k_block),
                kSpansBlocks ? ptx::load_global_nc_float(b_scale_rows[1] + k_block) : 0.0f};
            shared.ring.wait(position);
#pragma unroll
            for (u32 wave = 0; wave < L::kWaves; ++wave) {
                const float* scales = &shared.a_scales[s][lane_row + wave * kWaveRows];
                const float a_scale[2] = {ptx::load_shared(scales), ptx::load_shared(scales + 8)};
                const u64 a = ptx::k_major_descriptor(shared.a[s] + (first_row + wave * kWaveRows) * kBlockK);
                const u64 b = ptx::k_major_descriptor(shared.b[s]);
                float partial[kBlockN / 2];
                ptx::wgmma_fence();
#pragma unroll
                for (u32 step = 0; step < kBlockK / kWgmmaK; ++step)
                    ptx::wgmma_e4m3<kBlockN>(partial, a + step * ptx::kDescriptorStep,
                                             b + step * ptx::kDescriptorStep, step > 0);
                ptx::wgmma_commit_group();
                ptx::wgmma_wait(partial);
                if (wave == L::kWaves - 1) {
                    __syncwarp();  // the other lanes have read their scales too
                    if (lane == 0) shared.ring.release(position);
                }
                promote<kSpansBlocks>(sum[wave], partial, a_scale, b_scale, split);
            }
        }

        // The previous tile's stores have had this tile's main loop to read their panels. The warpgroup's
        // barrier tells all its warps that they have, then that every panel is staged.
        const u32 barrier = 1 + warpgroup;
        const bool stores = threadIdx.x % kWarpgroup == 0;
        if (stores) ptx::bulk_wait_group_read<0>();
        ptx::named_barrier_sync(barrier, kWarpgroup);
#pragma unroll
        for (u32 wave = 0; wave < L::kWaves; ++wave)
            stage_output<kBlockN, L::kPanel>(shared.d[warpgroup][wave], sum[wave]);
        ptx::fence_proxy_async_shared();
        ptx::named_barrier_sync(barrier, kWarpgroup);
        if (stores) {
            for (u32 wave = 0; wave < L::kWaves; ++wave)
                for (u32 panel = 0; panel < L::kPanels; ++panel)
                    ptx::tma_store(&d_map, shared.d[warpgroup][wave][panel], tile.column + panel * L::kPanel,
                                   tile.row + first_row + wave * kWaveRows);
            ptx::bulk_commit_group();
        }
    }
    if (threadIdx.x % kWarpgroup == 0) ptx::bulk_wait_group_read<0>();
}

}  // namespace dsv3
