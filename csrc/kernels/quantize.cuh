// Quantisation to e4m3 with one FP32 scale a tile of 1x128 (activations and gradients; DeepSeek-V3 report,
// section 3.3.2).
//
// Memory bound: of an element it reads b bytes (b = 2 or 4) and writes 1, and a tile has a scale of 4 bytes,
// so it moves rows * width * (b + 1 + 1/32) bytes: 3.03 bytes an element from BF16. Nothing is read or
// written twice.
#pragma once

#include "e4m3.cuh"

namespace dsv3 {
namespace quantize {

constexpr u32 kThreads = 256;         // a block
constexpr u32 kRowsPerWarp = 32;      // one scale a lane: a warp's scales fill one 128-byte line
constexpr u32 kSteps = kLanesOfTile;  // a step takes one row from each of the warp's 4 lane groups
constexpr u32 kLoadsInFlight = 4;     // 16-byte loads a lane issues before it waits

}  // namespace quantize

// x [batches, rows, width], strides in elements (.., x_row_stride, 1), 16-byte aligned rows -> q e4m3,
// contiguous, and scales [batches, rows, ceil(width / 128)] with strides (scale_batch_stride, 1,
// scale_tile_stride). width is a multiple of 16. Any grid is right; a warp takes 32 rows of one column of
// tiles at a time.
template <class Input, bool kPowerOf2Scales, class Scale = float>
__global__ void __launch_bounds__(quantize::kThreads, 3)
    quantize_1x128(const Input* x, u8* q, Scale* scales, u32 batches, u32 rows, u32 width, i64 x_batch_stride,
                   i64 x_row_stride, i64 scale_batch_stride, i64 scale_tile_stride) {
    using namespace quantize;
    constexpr u32 kElementsPerLoad = 16 / sizeof(Input);
    constexpr u32 kLoads = kValuesOfLane / kElementsPerLoad;
    constexpr u32 kStepsInFlight = kLoadsInFlight / kLoads;

    const u32 lane = threadIdx.x % 32;
    const u32 group = lane / kLanesOfTile;
    const u32 part = lane % kLanesOfTile;
    const u32 tiles = (width + kTile - 1) / kTile;
    const u32 row_blocks = (rows + kRowsPerWarp - 1) / kRowsPerWarp;
    const u32 tasks = batches * row_blocks * tiles;
    const u32 warps = gridDim.x * (kThreads / 32);

    // Neighbouring warps take neighbouring tiles of the same rows.
    for (u32 task = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; task < tasks; task += warps) {
        const u32 tile = task % tiles;
        const u32 batch = task / tiles / row_blocks;
        const u32 first_row = task / tiles % row_blocks * kRowsPerWarp;
        const u32 column = tile * kTile + part * kValuesOfLane;
        const Input* x_lane = x + batch * x_batch_stride + column;
        u8* q_lane = q + static_cast<i64>(batch) * rows * width + column;

        float scale_of_lane = 1.0f;  // of row first_row + lane
#pragma unroll 1
        for (u32 step = 0; step < kSteps; step += kStepsInFlight) {
            const u32 row = first_row + group * kSteps + step;
            U32x4 raw[kStepsInFlight][kLoads];
#pragma unroll
            for (u32 s = 0; s < kStepsInFlight; ++s) {
                const bool inside = row + s < rows && column < width;
#pragma unroll
                for (u32 i = 0; i < kLoads; ++i) {
                    const Input* address = x_lane + (row + s) * x_row_stride + i * kElementsPerLoad;
                    raw[s][i] = inside ? ptx::load_global_nc(address) : U32x4{0, 0, 0, 0};
                }
            }
#pragma unroll
            for (u32 s = 0; s < kStepsInFlight; ++s) {
                float v[kValuesOfLane];
#pragma unroll
                for (u32 i = 0; i < kLoads; ++i) widen(words(raw[s][i]), v + i * kElementsPerLoad, Input{});

                float scale;
                const U32x4 codes = encode_across_lanes<kPowerOf2Scales, kCorrections<Input>>(v, scale);
                if (part == step + s) scale_of_lane = scale;
                if (row + s < rows && column < width)
                    ptx::store_global(q_lane + static_cast<i64>(row + s) * width, codes);
            }
        }
        if (first_row + lane < rows)
            store_scale(scales + batch * scale_batch_stride + tile * scale_tile_stride + first_row + lane,
                        scale_of_lane);
    }
}

}  // namespace dsv3
