// FP8 GEMM with fine-grained scales: D[m, n] = A[m, k] * B[n, k]^T in BF16, A scaled by 1x128 tiles, B by
// 128x128 blocks (DeepSeek-V3 report, section 3.3.2); dense, or with a B for each group of rows.
//
// A persistent block an SM: one warp feeds a ring of stages through the copy engine, one or two warpgroups
// multiply. Per 128 of K the tensor core's partial sum, which keeps 14 bits, is promoted into an FP32 sum in
// registers: s = rn(scale_a * scale_b); y = fma(s, partial, y). While one warpgroup promotes, the other's
// wgmma run.
//
// wgmma multiplies 64 rows of one operand by 16 to 256 of the other. `kSwap` makes B the 64: 16 rows of A
// then cost what they should, and D leaves transposed.
//
// In a cluster of 2 both blocks need the same tile of A, or of B: each loads half of it, into both.
//
// Tails of N and K, and of M without groups, cost nothing: boxes beyond the end arrive as zeros, and the copy
// engine does not store outside D. A group's last tile reads rows of the next group, and leaves by stores of
// 16 bytes.
#pragma once

#include "error.cuh"
#include "output_panel.cuh"
#include "pipeline.cuh"
#include "ptx_wgmma.cuh"
#include "tile_scheduler.cuh"

namespace dsv3 {

// Which operand a cluster of 2 shares. kA: neighbours in a row of tiles; kB: in a column of tiles.
enum class Multicast : u32 { kNone, kA, kB };

namespace gemm {

constexpr u32 kBlockK = 128;  // one scale wide, and the width of the 128-byte swizzle
constexpr u32 kWgmmaK = 32;
constexpr u32 kWaveRows = 64;     // M of a wgmma
constexpr u32 kScaleBlock = 128;  // rows of B that share a scale
constexpr u32 kProducerRegisters = 40;
constexpr u32 kMathRegisters = 232;  // 2 * 128 * 232 + 128 * 40 = 64,512 of an SM's 65,536
constexpr u32 kScaleAlign = 32;      // floats: the copy engine writes to 128-byte borders

// What follows from a tile's shape. python: dsv3_kernels.gemm.GemmConfig.
template <u32 kBlockM, u32 kBlockN, u32 kStages, bool kSwap, Multicast kMulticast>
struct Layout {
    static constexpr u32 kRows = kSwap ? kBlockN : kBlockM;     // of the operand that is 64 rows a wgmma
    static constexpr u32 kColumns = kSwap ? kBlockM : kBlockN;  // of the other
    static_assert(kRows % kWaveRows == 0, "a tile is made of waves of 64 rows");
    static constexpr u32 kMathWarpgroups = kRows > kWaveRows ? 2 : 1;
    static constexpr u32 kMathThreads = kMathWarpgroups * kWarpgroup;
    static constexpr u32 kThreads = kMathThreads + kWarpgroup;
    // A warpgroup computes one after the other.
    static constexpr u32 kWaves = kRows / kWaveRows / kMathWarpgroups;
    static constexpr u32 kCluster = kMulticast == Multicast::kNone ? 1 : 2;
    // D leaves in panels as wide as a swizzle's span, `kPanels` a wave.
    static constexpr u32 kPanel = kSwap || kBlockN % 64 == 0 ? 64 : kBlockN % 32 == 0 ? 32 : 16;
    static constexpr u32 kPanelRows = kSwap ? kBlockM : kWaveRows;
    static constexpr u32 kPanels = kSwap ? 1 : kBlockN / kPanel;
    static constexpr u32 kScales = (kBlockM + kScaleAlign - 1) / kScaleAlign * kScaleAlign;
    static constexpr u32 kStageBytes = (kBlockM + kBlockN) * kBlockK + kBlockM * sizeof(float);

    struct alignas(1024) Shared {
        u8 a[kStages][kBlockM * kBlockK];
        u8 b[kStages][kBlockN * kBlockK];
        Bf16 d[kMathWarpgroups][kWaves][kPanels][kPanelRows * kPanel];
        float a_scales[kStages][kScales];
        Ring<kStages, kCluster> ring;
    };
};

// sum += (a_scale * b_scale) * partial for a lane's accumulators, which lie as wgmma_e4m3 says. Rows are A's,
// in pairs 8 apart; columns are B's, and from `split` on, a multiple of kSegment, they belong to the next
// block of its scales.
template <u32 kSegment, u32 kCount>
__device__ __forceinline__ void promote(float (&sum)[kCount], const float (&partial)[kCount],
                                        const float (&a_scale)[2], const float (&b_scale)[2], u32 split) {
#pragma unroll
    for (u32 column = 0; column < kCount * 2; column += kSegment) {
        const bool next = kSegment < kCount * 2 && column >= split;
        const float b = next ? b_scale[1] : b_scale[0];
        const float scale[2] = {__fmul_rn(a_scale[0], b), __fmul_rn(a_scale[1], b)};
#pragma unroll
        for (u32 i = column / 2; i < (column + kSegment) / 2; ++i)
            sum[i] = __fmaf_rn(scale[i / 2 % 2], partial[i], sum[i]);
    }
}

// The same, swapped: rows are B's, of one block; columns are A's, each with its scale.
template <u32 kCount>
__device__ __forceinline__ void promote_swapped(float (&sum)[kCount], const float (&partial)[kCount],
                                                const float (&a_scale)[kCount / 2], float b_scale) {
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) {
        const float scale = __fmul_rn(a_scale[i / 4 * 2 + i % 2], b_scale);
        sum[i] = __fmaf_rn(scale, partial[i], sum[i]);
    }
}

// By a warp.
template <Grouping kGrouping>
__device__ __forceinline__ void report_wrong_list(const i32* list, u32 groups, u32 m, u32 lane, u32* error) {
    if (!list_is_valid<kGrouping>(list, groups, m, lane))
        report_error(error, kGrouping == Grouping::kOffsets ? ErrorCode::kGroupedGemmOffsets
                                                            : ErrorCode::kMaskedGemmCounts);
}

}  // namespace gemm

// a_map: A e4m3 [rows, k], boxes [kBlockM, 128], 128-byte swizzle; b_map: B e4m3 [groups * n, k], boxes
// [kBlockN, 128], likewise; the operand that a cluster shares has boxes of half the rows. a_scales_map: FP32
// [ceil(k / 128), rows] (the MN-major scales as they lie; counted: [groups * ceil(k / 128), m]), boxes [1,
// kBlockM], no swizzle. d_map: D BF16 [rows, n], boxes [kPanelRows, kPanel], swizzle 2 * kPanel bytes; d: the
// same memory. b_scales: FP32 [groups, ceil(n / 128), ceil(k / 128)]. m: rows, in a group where they are
// counted. groups: of them, with `group_list` as Grouping says. strip: the scheduler's. error: see error.cuh.
template <Grouping kGrouping, u32 kBlockM, u32 kBlockN, u32 kStages, bool kSwap, Multicast kMulticast>
__global__ void __launch_bounds__(gemm::Layout<kBlockM, kBlockN, kStages, kSwap, kMulticast>::kThreads, 1)
    fp8_gemm(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
             const __grid_constant__ TensorMap a_scales_map, const __grid_constant__ TensorMap d_map,
             const float* b_scales, Bf16* d, const i32* group_list, u32* error, u32 m, u32 n, u32 k,
             u32 groups, u32 strip) {
    using namespace gemm;
    using L = Layout<kBlockM, kBlockN, kStages, kSwap, kMulticast>;
    constexpr bool kSpansBlocks = !kSwap && kScaleBlock % kBlockN != 0;
    constexpr u32 kSegment = !kSpansBlocks ? kBlockN : kBlockN % 64 == 0 ? 64 : 32;
    constexpr bool kSharesA = kMulticast == Multicast::kA, kSharesB = kMulticast == Multicast::kB;
    static_assert(kGrouping == Grouping::kNone || !kSharesB, "tiles of two groups do not share B");

    extern __shared__ __align__(1024) u8 dynamic_shared[];
    auto& shared = *reinterpret_cast<typename L::Shared*>(dynamic_shared);
    const u32 warpgroup = threadIdx.x / kWarpgroup;
    const u32 warp = threadIdx.x / 32;
    const u32 lane = threadIdx.x % 32;
    const u32 k_blocks = (k + kBlockK - 1) / kBlockK;
    const u32 rank = L::kCluster == 1 ? 0 : ptx::cluster_rank();

    if (threadIdx.x == 0) {
        for (const TensorMap* map : {&a_map, &b_map, &a_scales_map, &d_map}) ptx::prefetch_tensor_map(map);
        shared.ring.init(L::kMathThreads / 32);
    }
    if constexpr (L::kCluster == 1) {
        __syncthreads();
    } else {
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
    ptx::grid_dependency_wait();

    // A cluster takes a pair of tiles, side by side to share A, one below the other to share B.
    TileScheduler<kGrouping, kBlockM*(kSharesB ? 2 : 1), kBlockN*(kSharesA ? 2 : 1)> scheduler(
        m, n, strip, group_list, groups, blockIdx.x / L::kCluster, gridDim.x / L::kCluster);
    const auto next_tile = [&](Tile& tile) {
        const bool found = scheduler.next(tile);
        tile.row += kSharesB ? rank * kBlockM : 0;
        tile.column += kSharesA ? rank * kBlockN : 0;
        return found;
    };
    typename Ring<kStages, L::kCluster>::Position position;
    Tile tile;

    if (warpgroup == L::kMathWarpgroups) {
        if constexpr (L::kMathWarpgroups == 2) ptx::decrease_registers<kProducerRegisters>();
        if constexpr (kGrouping != Grouping::kNone) {
            if (blockIdx.x == 0 && warp == L::kMathThreads / 32 + 1)
                report_wrong_list<kGrouping>(group_list, groups, m, lane, error);
        }
        if (warp == L::kMathThreads / 32 && ptx::elect_one()) {
            while (next_tile(tile)) {
                // Counted groups have scales of their own, [ceil(k / 128), m] each.
                const bool counted = kGrouping == Grouping::kCounts;
                const u32 scale_column = counted ? tile.row - tile.group * m : tile.row;
                const u32 scale_row = counted ? tile.group * k_blocks : 0;
                const u32 b_row = tile.group * n + tile.column;
                for (u32 k_block = 0; k_block < k_blocks; ++k_block, position.advance()) {
                    const u32 s = position.stage;
                    u64* full = shared.ring.acquire(position, L::kStageBytes);
                    const u32 x = k_block * kBlockK;
                    load_operand<kSharesA, kBlockM>(shared.a[s], &a_map, full, x, tile.row, rank);
                    load_operand<kSharesB, kBlockN>(shared.b[s], &b_map, full, x, b_row, rank);
                    ptx::tma_load(shared.a_scales[s], &a_scales_map, full, scale_column, scale_row + k_block);
                }
            }
            ptx::launch_dependents();
        }
    } else {
        if constexpr (L::kMathWarpgroups == 2) ptx::increase_registers<kMathRegisters>();
        const u32 first_row = warpgroup * L::kWaves * kWaveRows;    // of the warpgroup in the tile
        const u32 lane_row = first_row + warp % 4 * 16 + lane / 4;  // and that row + 8
        const u32 scale_rows = (n + kScaleBlock - 1) / kScaleBlock;

        const auto release = [&] {
            __syncwarp();  // the other lanes have seen the phase and read their scales too
            if (lane < L::kCluster) shared.ring.release(position, lane);
        };

        while (next_tile(tile)) {
            const u32 b_row = tile.column + (kSwap ? first_row : 0);
            const u32 split = kScaleBlock - b_row % kScaleBlock;
            const float* b_scale_row =
                b_scales + (tile.group * scale_rows + min(b_row / kScaleBlock, scale_rows - 1)) * k_blocks;
            const u32 next_row = kSpansBlocks && b_row / kScaleBlock + 1 < scale_rows ? k_blocks : 0;
            // Waves of rows past the group's last are left out.
            u32 waves = L::kWaves;
            if constexpr (kGrouping != Grouping::kNone && !kSwap) {
                const u32 rows_left = tile.row_end - min(tile.row + first_row, tile.row_end);
                waves = min(waves, (rows_left + kWaveRows - 1) / kWaveRows);
            }
            float sum[L::kWaves][L::kColumns / 2] = {};

            for (u32 k_block = 0; k_block < k_blocks; ++k_block, position.advance()) {
                const u32 s = position.stage;
                // Before the wait, which hides their latency.
                const float b_scale[2] = {
                    ptx::load_global_nc_float(b_scale_row + k_block),
                    kSpansBlocks ? ptx::load_global_nc_float(b_scale_row + k_block + next_row) : 0.0f};
                shared.ring.wait(position);
                if (waves == 0) release();
#pragma unroll
                for (u32 wave = 0; wave < L::kWaves; ++wave) {
                    if (wave >= waves) break;
                    float a_scale[kSwap ? L::kColumns / 4 : 2];
                    if constexpr (kSwap) {
                        const auto* lane_scales =
                            reinterpret_cast<const Float2*>(shared.a_scales[s]) + lane % 4;
#pragma unroll
                        for (u32 i = 0; i < L::kColumns / 8; ++i) {
                            const Float2 pair = ptx::load_shared(&lane_scales[i * 4]);
                            a_scale[2 * i] = pair.x, a_scale[2 * i + 1] = pair.y;
                        }
                    } else {
#pragma unroll
                        for (u32 i = 0; i < 2; ++i)
                            a_scale[i] =
                                ptx::load_shared(&shared.a_scales[s][lane_row + wave * kWaveRows + i * 8]);
                    }
                    const u32 operand_row = (first_row + wave * kWaveRows) * kBlockK;
                    const u64 rows =
                        ptx::k_major_descriptor((kSwap ? shared.b[s] : shared.a[s]) + operand_row);
                    const u64 columns = ptx::k_major_descriptor(kSwap ? shared.a[s] : shared.b[s]);
                    float partial[L::kColumns / 2];
                    ptx::wgmma_fence();
#pragma unroll
                    for (u32 step = 0; step < kBlockK / kWgmmaK; ++step)
                        ptx::wgmma_e4m3<L::kColumns>(partial, rows + step * ptx::kDescriptorStep,
                                                     columns + step * ptx::kDescriptorStep, step > 0);
                    ptx::wgmma_commit_group();
                    ptx::wgmma_wait(partial);
                    if (wave + 1 == waves) release();
                    if constexpr (kSwap)
                        promote_swapped(sum[wave], partial, a_scale, b_scale[0]);
                    else
                        promote<kSegment>(sum[wave], partial, a_scale, b_scale, split);
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
                stage_output<L, kSwap>(shared.d[warpgroup][wave], sum[wave]);
            ptx::fence_proxy_async_shared();
            ptx::named_barrier_sync(barrier, kWarpgroup);
            for (u32 wave = 0; wave < L::kWaves; ++wave) {
                const u32 row = tile.row + (kSwap ? 0 : first_row + wave * kWaveRows);
                const bool whole = kGrouping == Grouping::kNone || row + L::kPanelRows <= tile.row_end;
                for (u32 panel = 0; panel < L::kPanels; ++panel) {
                    const u32 column = tile.column + (kSwap ? first_row : panel * L::kPanel);
                    Bf16* source = shared.d[warpgroup][wave][panel];
                    if (whole) {
                        if (stores) ptx::tma_store(&d_map, source, column, row);
                    } else if (row < tile.row_end && column < n) {
                        store_tail<L>(source, d + static_cast<u64>(row) * n + column, tile.row_end - row,
                                      n - column, n);
                    }
                }
            }
            if (stores) ptx::bulk_commit_group();
        }
        if (threadIdx.x % kWarpgroup == 0) ptx::bulk_wait_group_read<0>();
    }

    if constexpr (L::kCluster == 2) {
        // The peer still arrives at this block's barriers, and fills its stages, until it has come here too.
        __syncwarp();
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
}

// In place of fp8_gemm where there is no product: a tensor map cannot hold nothing. A warp.
template <Grouping kGrouping>
__global__ void check_group_list(const i32* group_list, u32 groups, u32 m, u32* error) {
    gemm::report_wrong_list<kGrouping>(group_list, groups, m, threadIdx.x, error);
}

}  // namespace dsv3
