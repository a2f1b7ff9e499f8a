// Tokens into the order of the experts, quantised on the way, and the experts' outputs back to their tokens.
//
// Memory bound. Permuting reads b bytes an element of the result and writes 1 an orientation: 3 from BF16, 4
// with both. Unpermuting reads 2 bytes an element of the rows it sums and writes 2 an element of the result.
#pragma once

#include "tile.cuh"

namespace dsv3 {
namespace permute {

using namespace quantize;

constexpr u32 kThreads = 256;      // a block of unpermute
constexpr u32 kColumnsOfLane = 8;  // 16 bytes
constexpr u32 kColumnsOfWarp = 32 * kColumnsOfLane;

}  // namespace permute

// x [tokens, width], contiguous, and index [rows] -> row r is x[index[r]], or zeros where that is no row of
// x, as q and scales of quantize_1x128, and with kTranspose as q_t and scales_t of quantize_1x128_t. width is
// a multiple of 16. A block takes a tile of the result.
template <class Input, bool kPowerOf2Scales, bool kTranspose, class Scale = float>
__global__ void __launch_bounds__(quantize::PartOf<Input>::kThreads, quantize::PartOf<Input>::kBlocksPerSm)
    permute_quantize(const Input* x, const i32* index, const i32* group_offsets, u32* error, u8* q,
                     Scale* scales, u8* q_t, Scale* scales_t, u32 tokens, u32 rows, u32 width, u32 groups,
                     u32 tiles_t, i64 scale_stride, i64 scale_t_stride) {
    using namespace permute;
    using P = PartOf<Input>;
    __shared__ RowStage<P::kColumns> row_stage;
    __shared__ ColumnStage<P::kColumns> column_stage;

    const u32 across = (width + kTile - 1) / kTile;
    const u32 tile = blockIdx.x / across, column = blockIdx.x % across * kTile;
    const Tokens span = tokens_of_tile<true>(group_offsets, groups, rows, tile);

    u32 token[kRows];  // as unsigned, a negative one is past the end
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
        const u32 row = P::row() + r;
        token[r] = row < span.count ? ptx::load_global_nc_u32(index + span.first + row) : ~0u;
    }
    Held<Input> held;
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
        const bool inside = token[r] < tokens && column + P::column() < width;
        const Input* source = x + static_cast<i64>(token[r]) * width + column + P::column();
        held.raw[r] = words(inside ? ptx::load_global_nc(source) : U32x4{0, 0, 0, 0});
    }
    quantize_tile<kPowerOf2Scales, true, kTranspose>(
        held, row_stage, row_target(q, scales, scale_stride, width, span, column), column_stage,
        column_target(q_t, scales_t, scale_t_stride, width, column, tile, tiles_t, !span.grouped));
    if (kTranspose) report_wrong_offsets(group_offsets, groups, rows, error);
}

// rows [count, width] BF16 and slots [tokens, top_k] -> y[t] = the sum over k, ascending, of weights[t, k] *
// rows[slots[t, k]] in FP32, rounded once to BF16; a slot that is no row is left out. weights may be null:
// ones. width is a multiple of 8. Any grid is right; a warp takes 256 columns of a token at a time,
// kLoadsInFlight rows together.
template <u32 kLoadsInFlight>
__global__ void __launch_bounds__(permute::kThreads)
    unpermute(const Bf16* rows, const i32* slots, const float* weights, Bf16* y, u32 count, u32 tokens,
              u32 top_k, u32 width) {
    using namespace permute;
    const u32 lane = threadIdx.x % 32;
    const u32 across = (width + kColumnsOfWarp - 1) / kColumnsOfWarp;
    const u32 warps = gridDim.x * (kThreads / 32);
    for (u64 task = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; task < static_cast<u64>(tokens) * across;
         task += warps) {
        const u32 token = task / across, column = task % across * kColumnsOfWarp + lane * kColumnsOfLane;
        float sum[kColumnsOfLane] = {};
        for (u32 base = 0; base < top_k; base += 32) {
            const u32 here = min(top_k - base, 32u);
            const i64 mine = static_cast<i64>(token) * top_k + base + lane;
            const u32 slot_of_lane = lane < here ? ptx::load_global_nc_u32(slots + mine) : ~0u;
            const float weight_of_lane =
                lane < here && weights ? ptx::load_global_nc_float(weights + mine) : 1.0f;
            for (u32 k = 0; k < here; k += kLoadsInFlight) {
                U32x4 raw[kLoadsInFlight];
                u32 slot[kLoadsInFlight];
#pragma unroll
                for (u32 i = 0; i < kLoadsInFlight; ++i) {
                    slot[i] = __shfl_sync(~0u, slot_of_lane, (k + i) % 32);
                    if (k + i >= here) slot[i] = ~0u;
                    const Bf16* address = rows + static_cast<i64>(slot[i]) * width + column;
                    const bool inside = slot[i] < count && column < width;
                    raw[i] = inside ? ptx::load_global_nc(address) : U32x4{0, 0, 0, 0};
                }
#pragma unroll
                for (u32 i = 0; i < kLoadsInFlight; ++i) {
                    const float weight = __shfl_sync(~0u, weight_of_lane, (k + i) % 32);
                    float v[kColumnsOfLane];
                    widen(words(raw[i]), v, Bf16{});
                    if (slot[i] < count) {
#pragma unroll
                        for (u32 c = 0; c < kColumnsOfLane; ++c)
                            sum[c] = __fadd_rn(sum[c], __fmul_rn(weight, v[c]));
                    }
                }
            }
        }
        if (column < width)
            ptx::store_global(y + static_cast<i64>(token) * width + column,
                              U32x4{ptx::bf16x2(sum[0], sum[1]), ptx::bf16x2(sum[2], sum[3]),
                                    ptx::bf16x2(sum[4], sum[5]), ptx::bf16x2(sum[6], sum[7])});
    }
}

}  // namespace dsv3
