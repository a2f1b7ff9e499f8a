// FP8 weight gradient: D[g, n, k] = dy^T * x over the tokens of group g, in FP32, both operands scaled by
// 1x128 tiles along the tokens (DeepSeek-V3 report, section 3.3.2), written or added to what D holds.
//
// As in gemm.cuh, one warp feeds a ring of stages and two warpgroups multiply; per 128 tokens the tensor
// core's partial sum is promoted: s = rn(scale_a * scale_b); y = fma(s, partial, y), here with a scale a row
// and a scale a column. D is as large as FP32 makes it, so it has two warps of its own: each brings what one
// warpgroup's half of the tile holds already while the products are computed, and takes the result away
// during the next tile.
//
// Accumulating is load, add, store: the copy engine's reduce-add may flush subnormals, as red.add.f32 does.
// Every element of D belongs to one tile, so nothing else touches it in between and the result is the same on
// every run.
//
// In a cluster of 2 the blocks take tiles one below the other, of the same group: each loads half of the x
// that both need, into both.
//
// Tiles of 128 tokens restart at each group and their tails are zeros (quantize_1x128_t), so a group is a
// range of token tiles: one tensor map serves all groups, none is written on the device, and no box crosses a
// group's end.
#pragma once

#include "error.cuh"
#include "pipeline.cuh"
#include "ptx_wgmma.cuh"
#include "tile_scheduler.cuh"

namespace dsv3 {
namespace wgrad {

constexpr u32 kTokens = 128;  // of a tile: one scale, and the width of the 128-byte swizzle
constexpr u32 kWgmmaK = 32;
constexpr u32 kWaveRows = 64;  // M of a wgmma
constexpr u32 kWarpgroup = 128;
constexpr u32 kMathWarpgroups = 2;  // a wave of 64 rows each
constexpr u32 kBlockM = kMathWarpgroups * kWaveRows;
constexpr u32 kThreads = (kMathWarpgroups + 1) * kWarpgroup;
constexpr u32 kPanel = 32;  // columns of D in the 128-byte swizzle's span
constexpr u32 kPanelElements = kWaveRows * kPanel;
constexpr u32 kHelperRegisters = 40;
constexpr u32 kMathRegisters = 232;  // 2 * 128 * 232 + 128 * 40 = 64,512 of an SM's 65,536

// python: dsv3_kernels.wgrad.WgradConfig
template <u32 kBlockN, u32 kStages, u32 kCluster>
struct Layout {
    static_assert(kBlockN % kPanel == 0, "D leaves in panels");
    static constexpr u32 kStageBytes = (kBlockM + kBlockN) * (kTokens + sizeof(float));
    static constexpr u32 kPanels = kBlockN / kPanel;

    struct alignas(1024) Shared {
        u8 a[kStages][kBlockM * kTokens];
        u8 b[kStages][kBlockN * kTokens];
        float d[kMathWarpgroups][kPanels][kPanelElements];
        float a_scales[kStages][kBlockM];
        float b_scales[kStages][kBlockN];
        Ring<kStages, kCluster> ring;
        Ring<1> panels[kMathWarpgroups];  // what d holds already one way, the result the other
    };
};

struct GroupTile {
    u32 group, row, column;  // of D
    u32 first, count;        // token tiles
};

// Group after group, the tiles of each, kRows by kBlockN, in strips (tile_scheduler.cuh). Every thread that
// asks gets the same sequence.
//
// group_offsets may be null: one group of all token tiles. Offsets that do not start at 0, descend, or need
// more token tiles than there are, are reported, and clamped: no tile lies outside the operands.
template <u32 kRows, u32 kBlockN>
class Scheduler {
  public:
    // skip_empty: groups without tokens have no tiles. `block` of `blocks` asks.
    __device__ __forceinline__ Scheduler(const i32* group_offsets, u32 groups, u32 n, u32 k, u32 token_tiles,
                                         u32 strip, bool skip_empty, u32* error, u32 block, u32 blocks)
        : offsets_(group_offsets),
          error_(error),
          groups_(groups),
          rows_((n + kRows - 1) / kRows),
          columns_((k + kBlockN - 1) / kBlockN),
          token_tiles_(token_tiles),
          strip_(strip),
          blocks_(blocks),
          skip_empty_(skip_empty),
          next_(block) {
        enter_group();
    }

    // False when the block is done; not to be called again then.
    __device__ __forceinline__ bool next(GroupTile& tile) {
        while (next_ >= tiles_) {
            next_ -= tiles_;
            if (++group_ == groups_) return false;
            enter_group();
        }
        const TilePosition at = strip_tile(rows_, columns_, strip_, next_);
        tile = {group_, at.row * kRows, at.column * kBlockN, first_, count_};
        next_ += blocks_;
        return true;
    }

  private:
    __device__ __forceinline__ void enter_group() {
        first_ += count_;
        if (offsets_) {
            const i32 low = offsets_[group_], high = offsets_[group_ + 1];
            const u32 tokens = high > low ? static_cast<u32>(high) - static_cast<u32>(low) : 0;
            const u32 needed = tokens / kTokens + (tokens % kTokens > 0);
            count_ = min(needed, token_tiles_ - first_);
            const bool wrong = low < 0 || high < low || (group_ == 0 && low != 0) || count_ < needed;
            if (wrong && error_) report_error(error_, ErrorCode::kWgradOffsets);
        } else {
            count_ = token_tiles_;
        }
        tiles_ = skip_empty_ && count_ == 0 ? 0 : rows_ * columns_;
    }

    const i32* offsets_;
    u32* error_;
    u32 groups_, rows_, columns_, token_tiles_, strip_, blocks_;
    bool skip_empty_;
    u32 group_ = 0, first_ = 0, count_ = 0;  // the group, its first token tile and how many
    u32 tiles_;                              // of D in it
    u32 next_;                               // among them
};

// sum += (a_scale * b_scale) * partial; b_scales: the tile's, in shared memory.
template <u32 kCount>
__device__ __forceinline__ void promote(float (&sum)[kCount], const float (&partial)[kCount],
                                        const float (&a_scale)[2], const float* b_scales) {
    const auto* pairs = reinterpret_cast<const Float2*>(b_scales + threadIdx.x % 4 * 2);
#pragma unroll
    for (u32 i = 0; i < kCount; i += 4) {
        const Float2 b_scale = ptx::load_shared(pairs + i);  // columns 2 * i and the next of each 8
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            const float scale = __fmul_rn(a_scale[j / 2], j % 2 ? b_scale.y : b_scale.x);
            sum[i + j] = __fmaf_rn(scale, partial[i + j], sum[i + j]);
        }
    }
}

// One wave's sums to its panels in shared memory, in the swizzle that the copy engine expects, or added
// there.
template <u32 kBlockN>
__device__ __forceinline__ void stage_output(float (*panels)[kPanelElements], const float (&sum)[kBlockN / 2],
                                             bool accumulate) {
    constexpr u32 kPairs =
        kPanel / 4;  // of a lane in a panel: columns 8j + 2 * (lane % 4) and the next, in 2 rows
    const u32 lane = threadIdx.x % 32;
    const u32 row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
    // The swizzle spreads rows 2r and 2r + 1 over the same banks. So odd rows take the panel's columns 16 to
    // 31 while even ones take 0 to 15.
    const u32 odd = row % 2;
#pragma unroll
    for (u32 p = 0; p < kBlockN / kPanel; ++p) {
        const auto place = [&](u32 i) {
            u32 offset = ((row + i % 2 * 8) * kPanel + (i / 2 ^ odd * 2) * 8 + lane % 4 * 2) * sizeof(float);
            offset ^= (offset >> 7 & 7) << 4;
            return reinterpret_cast<Float2*>(reinterpret_cast<u8*>(panels[p]) + offset);
        };
        Float2 v[kPairs];
#pragma unroll
        for (u32 i = 0; i < kPairs; ++i) {
            const float *here = &sum[2 * (p * kPairs + i)], *there = &sum[2 * (p * kPairs + (i ^ 4))];
            v[i] = {odd ? there[0] : here[0], odd ? there[1] : here[1]};
        }
        if (accumulate) {
            Float2 before[kPairs];
#pragma unroll
            for (u32 i = 0; i < kPairs; ++i) before[i] = ptx::load_shared(place(i));
#pragma unroll
            for (u32 i = 0; i < kPairs; ++i)
                v[i] = {__fadd_rn(before[i].x, v[i].x), __fadd_rn(before[i].y, v[i].y)};
        }
#pragma unroll
        for (u32 i = 0; i < kPairs; ++i) ptx::store_shared(place(i), v[i]);
    }
}

}  // namespace wgrad

// a_map: dy e4m3 [n, 128 * token_tiles], boxes [128, 128], 128-byte swizzle; b_map: x e4m3 [k, 128 *
// token_tiles], boxes [kBlockN / kCluster, 128], likewise. a_scales_map, b_scales_map: FP32 [token_tiles, n]
// and [token_tiles, k] (the MN-major scales as they lie), boxes [1, 128] and [1, kBlockN], no swizzle. d_map:
// D FP32 [groups, n, k], boxes [1, 64, 32], 128-byte swizzle. group_offsets: [groups + 1], or null. A group
// without tokens gets zeros, or keeps what it has if `accumulate`.
template <u32 kBlockN, u32 kStages, u32 kCluster>
__global__ void __launch_bounds__(wgrad::kThreads, 1)
    fp8_wgrad(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
              const __grid_constant__ TensorMap a_scales_map, const __grid_constant__ TensorMap b_scales_map,
              const __grid_constant__ TensorMap d_map, const i32* group_offsets, u32 groups, u32 n, u32 k,
              u32 token_tiles, u32 strip, u32 accumulate, u32* error) {
    using namespace wgrad;
    using L = Layout<kBlockN, kStages, kCluster>;

    extern __shared__ __align__(1024) u8 dynamic_shared[];
    auto& shared = *reinterpret_cast<typename L::Shared*>(dynamic_shared);
    const u32 warpgroup = threadIdx.x / kWarpgroup;
    const u32 warp = threadIdx.x % kWarpgroup / 32;
    const u32 lane = threadIdx.x % 32;
    const u32 rank = kCluster == 1 ? 0 : ptx::cluster_rank();

    if (threadIdx.x == 0) {
        for (const TensorMap* map : {&a_map, &b_map, &a_scales_map, &b_scales_map, &d_map})
            ptx::prefetch_tensor_map(map);
        shared.ring.init(kMathWarpgroups * kWarpgroup / 32);
        for (auto& panels : shared.panels) panels.init(kWarpgroup / 32);
    }
    if constexpr (kCluster == 1) {
        __syncthreads();
    } else {
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
    ptx::grid_dependency_wait();

    const bool loads_operands = warpgroup == kMathWarpgroups && warp == 0;
    Scheduler<kCluster * kBlockM, kBlockN> scheduler(group_offsets, groups, n, k, token_tiles, strip,
                                                     accumulate, loads_operands ? error : nullptr,
                                                     blockIdx.x / kCluster, gridDim.x / kCluster);
    const auto next_tile = [&](GroupTile& tile) {
        const bool found = scheduler.next(tile);
        tile.row += rank * kBlockM;
        return found;
    };
    typename Ring<kStages, kCluster>::Position position;
    Ring<1>::Position panel_position;
    GroupTile tile;

    if (warpgroup == kMathWarpgroups) {
        ptx::decrease_registers<kHelperRegisters>();
        if (loads_operands && ptx::elect_one()) {
            while (next_tile(tile)) {
                for (u32 t = tile.first; t < tile.first + tile.count; ++t, position.advance()) {
                    const u32 s = position.stage;
                    u64* full = shared.ring.acquire(position, L::kStageBytes);
                    ptx::tma_load(shared.a[s], &a_map, full, t * kTokens, tile.row);
                    load_operand<kCluster == 2, kBlockN>(shared.b[s], &b_map, full, t * kTokens, tile.column,
                                                         rank);
                    ptx::tma_load(shared.a_scales[s], &a_scales_map, full, tile.row, t);
                    ptx::tma_load(shared.b_scales[s], &b_scales_map, full, tile.column, t);
                }
            }
            ptx::launch_dependents();
        } else if (1 <= warp && warp <= kMathWarpgroups && ptx::elect_one()) {
            const u32 half = warp - 1;
            while (next_tile(tile)) {
                const u32 row = tile.row + half * kWaveRows;
                ptx::bulk_wait_group_read<0>();  // the previous tile's stores have read the panels
                u64* full =
                    shared.panels[half].acquire(panel_position, accumulate ? sizeof(shared.d[half]) : 0);
                for (u32 p = 0; p < L::kPanels && accumulate; ++p)
                    ptx::tma_load(shared.d[half][p], &d_map, full, tile.column + p * kPanel, row, tile.group);
                shared.panels[half].wait_released(panel_position);
                for (u32 p = 0; p < L::kPanels; ++p)
                    ptx::tma_store(&d_map, shared.d[half][p], tile.column + p * kPanel, row, tile.group);
                ptx::bulk_commit_group();
                panel_position.advance();
            }
            ptx::bulk_wait_group_read<0>();
        }
    } else {
        ptx::increase_registers<kMathRegisters>();
        const u32 first_row = warpgroup * kWaveRows;            // of the warpgroup in the tile
        const u32 lane_row = first_row + warp * 16 + lane / 4;  // and that row + 8

        while (next_tile(tile)) {
            float sum[kBlockN / 2] = {};
            for (u32 t = 0; t < tile.count; ++t, position.advance()) {
                const u32 s = position.stage;
                shared.ring.wait(position);
                const float* scales = &shared.a_scales[s][lane_row];
                const float a_scale[2] = {ptx::load_shared(scales), ptx::load_shared(scales + 8)};
                const u64 a = ptx::k_major_descriptor(shared.a[s] + first_row * kTokens);
                const u64 b = ptx::k_major_descriptor(shared.b[s]);
                float partial[kBlockN / 2];
                ptx::wgmma_fence();
#pragma unroll
                for (u32 step = 0; step < kTokens / kWgmmaK; ++step)
                    ptx::wgmma_e4m3<kBlockN>(partial, a + step * ptx::kDescriptorStep,
                                             b + step * ptx::kDescriptorStep, step > 0);
                ptx::wgmma_commit_group();
                ptx::wgmma_wait(partial);
                promote(sum, partial, a_scale, shared.b_scales[s]);
                __syncwarp();  // the other lanes have read their scales too
                if (lane < kCluster) shared.ring.release(position, lane);
            }

            shared.panels[warpgroup].wait(panel_position);
            stage_output<kBlockN>(shared.d[warpgroup], sum, accumulate);
            ptx::fence_proxy_async_shared();
            __syncwarp();
            if (lane == 0) shared.panels[warpgroup].release(panel_position);
            panel_position.advance();
        }
    }

    if constexpr (kCluster == 2) {
        // The peer still arrives at this block's barriers, and fills its stages, until it has come here too.
        __syncwarp();
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
}

}  // namespace dsv3
