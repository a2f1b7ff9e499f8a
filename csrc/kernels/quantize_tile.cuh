// The quantisers that take a tile of 128x128 elements a block, because they write it transposed: weights in
// blocks of 128x128, and activations and gradients in tiles of 128 tokens (DeepSeek-V3 report, section
// 3.3.2).
//
// Memory bound: an element of b bytes is read once and written once an orientation, 3 bytes from BF16, 4 in
// both orientations. The whole tile is in flight at once, in registers: a thread loads 16 rows of 16 bytes.
#pragma once

#include "tile.cuh"

namespace dsv3 {
namespace quantize {

// Codes with the scale of each row: their products are the values.
struct HeldScaled : Held<E4m3> {
    float scale[kRows];

    __device__ __forceinline__ void widen_row(u32 r, float (&v)[kColumns]) const {
        Held<E4m3>::widen_row(r, v);
#pragma unroll
        for (u32 i = 0; i < kColumns; ++i) v[i] = __fmul_rn(v[i], scale[r]);
    }
};

// The scales of the rows of a tile, spread so that the row groups of a warp read theirs from banks of their
// own.
struct RowScales {
    float scale[kTile + kTile / 32 * 8];

    __device__ __forceinline__ float& at(u32 row) { return scale[row + row / 32 * 8]; }
};

}  // namespace quantize

// w [batches, n, k] -> q e4m3 of the same shape and scales [batches, ceil(n / 128), ceil(k / 128)], all
// contiguous; with kTranspose also q_t [batches, k, n] and scales_t [batches, ceil(k / 128), ceil(n / 128)],
// the same codes and scales. k is a multiple of 16, and n with kTranspose. A block takes a tile.
template <class Input, bool kPowerOf2Scales, bool kTranspose, class Scale = float>
__global__ void __launch_bounds__(quantize::PartOf<Input>::kThreads, quantize::PartOf<Input>::kBlocksPerSm)
    quantize_128x128(const Input* w, u8* q, Scale* scales, u8* q_t, Scale* scales_t, u32 n, u32 k) {
    using namespace quantize;
    using P = PartOf<Input>;
    __shared__ RowMajorTile<P::kColumns> tile;
    __shared__ TransposedTile<P::kColumns> tile_t;
    __shared__ float amax_of_warp[P::kThreads / 32];

    const u32 tiles_k = (k + kTile - 1) / kTile, tiles_n = (n + kTile - 1) / kTile;
    const u32 tile_k = blockIdx.x % tiles_k, tile_n = blockIdx.x / tiles_k % tiles_n;
    const i64 batch = blockIdx.x / tiles_k / tiles_n;
    const u32 row = tile_n * kTile, column = tile_k * kTile;
    const i64 matrix = batch * n * k;

    Held<Input> held;
    held.load(w + matrix + static_cast<i64>(row) * k + column, k, n - row, k - column);

    float amax = 0.0f;
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
        float v[P::kColumns];
        held.widen_row(r, v);
#pragma unroll
        for (u32 i = 0; i < P::kColumns; ++i) amax = ptx::max_nan(amax, ptx::abs(v[i]));
        held.forget_widened(r);
    }
#pragma unroll
    for (u32 mask = 1; mask < 32; mask *= 2) amax = ptx::max_nan(amax, ptx::shuffle_xor(amax, mask));
    if (threadIdx.x % 32 == 0) amax_of_warp[threadIdx.x / 32] = amax;
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < P::kThreads / 32; ++i) amax = ptx::max_nan(amax, amax_of_warp[i]);
    const float scale = tile_scale<kPowerOf2Scales>(amax);

    U32x4 columns[P::kColumns];
#pragma unroll
    for (u32 i = 0; i < P::kColumns; ++i) {
        columns[i] = encode_column<kPowerOf2Scales>(held, i, scale);
        if (kTranspose) tile_t.at(P::column() + i, P::row_group()) = columns[i];
    }
    tile.put(columns);
    __syncthreads();

    tile.store(q + matrix + static_cast<i64>(row) * k + column, k, n - row, k - column);
    if (kTranspose) tile_t.store(q_t + matrix + static_cast<i64>(column) * n + row, n, k - column, n - row);
    if (threadIdx.x == 0) {
        store_scale(scales + blockIdx.x, scale);
        if (kTranspose) store_scale(scales_t + (batch * tiles_k + tile_k) * tiles_n + tile_n, scale);
    }
}

// x [tokens, width], contiguous -> q_t e4m3 [width, 128 * tiles_t], contiguous, and scales_t [width, tiles_t]
// with strides (1, scale_t_stride): groups in tiles of their own, zeros in their tails. group_offsets [groups
// + 1] may be null: one group. error: see error.cuh. width is a multiple of 8.
// With kRowWise also q e4m3 [tokens, width] and scales [tokens, ceil(width / 128)] with strides (1,
// scale_stride), of all tokens, those past the last group too; width is then a multiple of 16.
// A block takes a tile; neighbouring blocks take neighbouring features of the same tokens.
template <class Input, bool kPowerOf2Scales, bool kRowWise, class Scale = float>
__global__ void __launch_bounds__(quantize::PartOf<Input>::kThreads, quantize::PartOf<Input>::kBlocksPerSm)
    quantize_1x128_t(const Input* x, const i32* group_offsets, u32* error, u8* q, Scale* scales, u8* q_t,
                     Scale* scales_t, u32 tokens, u32 width, u32 groups, u32 tiles_t, i64 scale_stride,
                     i64 scale_t_stride) {
    using namespace quantize;
    __shared__ RowStage<PartOf<Input>::kColumns> row_stage;
    __shared__ ColumnStage<PartOf<Input>::kColumns> column_stage;

    const u32 across = (width + kTile - 1) / kTile;
    const u32 tile = blockIdx.x / across, column = blockIdx.x % across * kTile;
    const Tokens span = tokens_of_tile<kRowWise>(group_offsets, groups, tokens, tile);
    const i64 first = static_cast<i64>(span.first) * width + column;

    Held<Input> held;
    held.load(x + first, width, span.count, width - column);
    quantize_tile<kPowerOf2Scales, kRowWise, true>(
        held, row_stage, row_target(q, scales, scale_stride, width, span, column), column_stage,
        column_target(q_t, scales_t, scale_t_stride, width, column, tile, tiles_t, !span.grouped));
    report_wrong_offsets(group_offsets, groups, tokens, error);
}

// q e4m3 [tokens, width], contiguous, with scales of strides (row_stride, tile_stride), one for 1x128 ->
// q_t and scales_t as quantize_1x128_t makes them of the products in FP32. width is a multiple of 16. A block
// takes a tile. A thread also holds the scales of its rows: 6 blocks of 64 threads leave it 168 registers.
template <bool kPowerOf2Scales, class Scale = float>
__global__ void __launch_bounds__(quantize::PartOf<E4m3>::kThreads, 6)
    requantize_1x128_t(const E4m3* q, const float* scales, const i32* group_offsets, u32* error, u8* q_t,
                       Scale* scales_t, u32 tokens, u32 width, u32 groups, u32 tiles_t, i64 row_stride,
                       i64 tile_stride, i64 scale_t_stride) {
    using namespace quantize;
    using P = PartOf<E4m3>;
    __shared__ RowScales row_scales;
    __shared__ RowStage<P::kColumns> unused;
    __shared__ ColumnStage<P::kColumns> column_stage;

    const u32 across = (width + kTile - 1) / kTile;
    const u32 tile = blockIdx.x / across, column = blockIdx.x % across * kTile;
    const Tokens span = tokens_of_tile<false>(group_offsets, groups, tokens, tile);

    HeldScaled held;
    held.load(q + static_cast<i64>(span.first) * width + column, width, span.count, width - column);
    for (u32 row = threadIdx.x; row < kTile; row += P::kThreads) {
        const float* source = scales + (span.first + row) * row_stride + column / kTile * tile_stride;
        row_scales.at(row) = row < span.count ? ptx::load_global_nc_float(source) : 1.0f;
    }
    __syncthreads();
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) held.scale[r] = row_scales.at(P::row() + r);

    quantize_tile<kPowerOf2Scales, false, true>(
        held, unused, RowTarget<Scale>{}, column_stage,
        column_target(q_t, scales_t, scale_t_stride, width, column, tile, tiles_t, !span.grouped));
    report_wrong_offsets(group_offsets, groups, tokens, error);
}

}  // namespace dsv3
