// SwiGLU fused with the quantisers around it: y = silu(gate) * up of x = [gate, up] straight to e4m3, and the
// gradient of x straight to e4m3 from the codes of x that the forward kept (DeepSeek-V3 report, section
// 3.3.3).
//
// y and the gradients are rounded to BF16 before they are quantised, as they would be between two kernels:
// the fusion changes no bit. Everything else is FP32, each operation rounded by itself.
//
// Memory bound. Forward: 4 bytes of x an element of y, and 1 written an orientation: 5, or 6 with both.
// Backward: 2 of dy and 2 codes of x read, 4 codes of dx written and 1 of y if asked: 8, or 9.
#pragma once

#include "sigmoid.cuh"
#include "tile.cuh"

namespace dsv3 {
namespace swiglu {

using namespace quantize;

__device__ __forceinline__ float silu(float x) { return __fmul_rn(x, sigmoid(x)); }

// Of a thread of the backward, which holds three inputs at once: 16 rows of four columns.
constexpr u32 kColumns = 4;
using GradientPart = Part<kColumns>;

// A row of a thread: what the gradients come from, and then the gradients.
struct Sources {
    u64 dy;        // BF16
    u32 gate, up;  // e4m3
};

__device__ __forceinline__ void widen_bf16(u64 values, float (&v)[kColumns]) {
    widen(Words<2>{{static_cast<u32>(values), static_cast<u32>(values >> 32)}}, v, Bf16{});
}

__device__ __forceinline__ Words<2> to_bf16(const float (&v)[kColumns]) {
    return {{ptx::bf16x2(v[0], v[1]), ptx::bf16x2(v[2], v[3])}};
}

__device__ __forceinline__ void dequantize(u32 codes, float scale, float (&v)[kColumns]) {
    widen(Words<1>{{codes}}, v, E4m3{});
#pragma unroll
    for (float& value : v) value = __fmul_rn(value, scale);
}

}  // namespace swiglu

// x [tokens, 2 * width] BF16, contiguous -> y = silu(x[:, :width]) * x[:, width:], times weights[token] if
// not null, as q and scales of quantize_1x128, and with kTranspose as q_t and scales_t of quantize_1x128_t.
// width is a multiple of 16. A block takes a tile of y.
template <bool kPowerOf2Scales, bool kTranspose, class Scale = float>
__global__ void __launch_bounds__(quantize::PartOf<Bf16>::kThreads, quantize::PartOf<Bf16>::kBlocksPerSm)
    swiglu_quantize(const Bf16* x, const float* weights, const i32* group_offsets, u32* error, u8* q,
                    Scale* scales, u8* q_t, Scale* scales_t, u32 tokens, u32 width, u32 groups, u32 tiles_t,
                    i64 scale_stride, i64 scale_t_stride) {
    using namespace swiglu;
    using P = PartOf<Bf16>;
    constexpr u32 kStep = 4;  // rows whose loads are in flight together
    __shared__ RowStage<P::kColumns> row_stage;
    __shared__ ColumnStage<P::kColumns> column_stage;

    const u32 across = (width + kTile - 1) / kTile;
    const u32 tile = blockIdx.x / across, column = blockIdx.x % across * kTile;
    const Tokens span = tokens_of_tile<true>(group_offsets, groups, tokens, tile);
    const Bf16* source = x + (span.first + P::row()) * (2ll * width) + column + P::column();

    Held<Bf16> y;
#pragma unroll
    for (u32 first = 0; first < kRows; first += kStep) {
        U32x4 gates[kStep], ups[kStep];
        float weight[kStep];
#pragma unroll
        for (u32 r = 0; r < kStep; ++r) {
            const u32 row = P::row() + first + r;
            const bool inside = row < span.count && column + P::column() < width;
            const Bf16* address = source + (first + r) * (2ll * width);
            gates[r] = inside ? ptx::load_global_nc(address) : U32x4{0, 0, 0, 0};
            ups[r] = inside ? ptx::load_global_nc(address + width) : U32x4{0, 0, 0, 0};
            weight[r] = inside && weights ? ptx::load_global_nc_float(weights + span.first + row) : 1.0f;
        }
#pragma unroll
        for (u32 r = 0; r < kStep; ++r) {
            float gate[P::kColumns], up[P::kColumns];
            widen(words(gates[r]), gate, Bf16{});
            widen(words(ups[r]), up, Bf16{});
#pragma unroll
            for (u32 i = 0; i < P::kColumns; ++i)
                gate[i] = __fmul_rn(__fmul_rn(silu(gate[i]), up[i]), weight[r]);
#pragma unroll
            for (u32 w = 0; w < P::kColumns / 2; ++w)
                y.raw[first + r].word[w] = ptx::bf16x2(gate[2 * w], gate[2 * w + 1]);
        }
    }
    quantize_tile<kPowerOf2Scales, true, kTranspose>(
        y, row_stage, row_target(q, scales, scale_stride, width, span, column), column_stage,
        column_target(q_t, scales_t, scale_t_stride, width, column, tile, tiles_t, !span.grouped));
    if (kTranspose) report_wrong_offsets(group_offsets, groups, tokens, error);
}

// dy [tokens, width] BF16 and x e4m3 [tokens, 2 * width] with scales of strides (x_row_stride,
// x_tile_stride), one for 1x128, both contiguous -> dx = [d gate, d up] as q and scales of quantize_1x128 and
// as q_t and scales_t of quantize_1x128_t; with kRecompute also y_t and y_scales_t, those of y. The scales of
// y_t and q_t have strides (1, width) and (1, 2 * width). width is a multiple of 128. A block takes a tile of
// y. With kWeighted y was multiplied by weights[token], and weight_gradients [width / 128, tokens] takes the
// sums of dy * silu(gate) * up over the rows of each tile.
template <bool kPowerOf2Scales, bool kRecompute, bool kWeighted, class Scale = float>
__global__ void __launch_bounds__(swiglu::GradientPart::kThreads, swiglu::GradientPart::kBlocksPerSm)
    swiglu_backward_quantize(const Bf16* dy, const E4m3* x, const float* x_scales, const float* weights,
                             const i32* group_offsets, u32* error, u8* q, Scale* scales, u8* q_t,
                             Scale* scales_t, u8* y_t, Scale* y_scales_t, float* weight_gradients, u32 tokens,
                             u32 width, u32 groups, u32 tiles_t, i64 x_row_stride, i64 x_tile_stride,
                             i64 scale_stride) {
    using namespace swiglu;
    using P = GradientPart;
    using Half = Held<Bf16, kColumns>;
    __shared__ RowStage<kColumns> row_stage;
    __shared__ ColumnStage<kColumns> column_stage;
    __shared__ float gate_scale[kTile], up_scale[kTile], weight[kWeighted ? kTile : 1];

    const u32 across = width / kTile;
    const u32 tile = blockIdx.x / across, column = blockIdx.x % across * kTile;
    const Tokens span = tokens_of_tile<true>(group_offsets, groups, tokens, tile);
    const Bf16* tile_dy = dy + (span.first + P::row()) * static_cast<i64>(width) + column + P::column();
    const E4m3* tile_x = x + (span.first + P::row()) * (2ll * width) + column + P::column();

    Sources sources[kRows];
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
        const bool inside = P::row() + r < span.count;
        const E4m3* gate = tile_x + r * (2ll * width);
        sources[r].gate = inside ? ptx::load_global_nc_u32(gate) : 0;
        sources[r].up = inside ? ptx::load_global_nc_u32(gate + width) : 0;
    }
    const auto load_dy = [&] {
#pragma unroll
        for (u32 r = 0; r < kRows; ++r) {
            const bool inside = P::row() + r < span.count;
            sources[r].dy = inside ? ptx::load_global_nc_u64(tile_dy + r * static_cast<i64>(width)) : 0;
        }
    };
    if (!kRecompute) load_dy();
    if (threadIdx.x < 2 * kTile) {  // the first half of the threads for the gate
        const u32 row = threadIdx.x % kTile, half = threadIdx.x / kTile;
        const float* scale =
            x_scales + (span.first + row) * x_row_stride + (half * across + column / kTile) * x_tile_stride;
        (half ? up_scale : gate_scale)[row] = row < span.count ? ptx::load_global_nc_float(scale) : 1.0f;
        if (kWeighted && half == 0)
            weight[row] = row < span.count ? ptx::load_global_nc_float(weights + span.first + row) : 1.0f;
    }
    __syncthreads();

    if constexpr (kRecompute) {
        Half y;
#pragma unroll
        for (u32 r = 0; r < kRows; ++r) {
            float gate[kColumns], up[kColumns];
            dequantize(sources[r].gate, gate_scale[P::row() + r], gate);
            dequantize(sources[r].up, up_scale[P::row() + r], up);
#pragma unroll
            for (u32 i = 0; i < kColumns; ++i) {
                up[i] = __fmul_rn(silu(gate[i]), up[i]);
                if (kWeighted) up[i] = __fmul_rn(up[i], weight[P::row() + r]);
            }
            y.raw[r] = to_bf16(up);
        }
        quantize_tile<kPowerOf2Scales, false, true>(
            y, row_stage, RowTarget<Scale>{}, column_stage,
            column_target(y_t, y_scales_t, width, width, column, tile, tiles_t, !span.grouped));
        load_dy();  // not sooner: beside y it would not fit the registers
    }

    Half d_gate, d_up;
    float weight_gradient_of_lane = 0.0f;  // of row P::row() + P::position()
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
        float gate[kColumns], up[kColumns], d[kColumns];
        dequantize(sources[r].gate, gate_scale[P::row() + r], gate);
        dequantize(sources[r].up, up_scale[P::row() + r], up);
        widen_bf16(sources[r].dy, d);
        float weight_gradient = 0.0f;
#pragma unroll
        for (u32 i = 0; i < kColumns; ++i) {
            const float s = sigmoid(gate[i]);
            if (kWeighted) {
                const float unweighted = __fmul_rn(__fmul_rn(gate[i], s), up[i]);
                weight_gradient = __fadd_rn(weight_gradient, __fmul_rn(d[i], unweighted));
                d[i] = __fmul_rn(d[i], weight[P::row() + r]);
            }
            const float slope = __fmul_rn(s, __fadd_rn(1.0f, __fmul_rn(gate[i], __fsub_rn(1.0f, s))));
            const float d_silu = __fmul_rn(d[i], up[i]);
            d[i] = __fmul_rn(d[i], __fmul_rn(gate[i], s));
            gate[i] = __fmul_rn(d_silu, slope);
        }
        d_gate.raw[r] = to_bf16(gate);
        d_up.raw[r] = to_bf16(d);
        if constexpr (kWeighted) {
            static_assert(P::kPositions == 32, "a warp holds whole rows");
#pragma unroll
            for (u32 mask = 16; mask > 0; mask /= 2)
                weight_gradient = __fadd_rn(weight_gradient, ptx::shuffle_xor(weight_gradient, mask));
            if (P::position() == r) weight_gradient_of_lane = weight_gradient;
        }
    }
    if (kWeighted && P::position() < kRows && P::row() + P::position() < span.count)
        weight_gradients[static_cast<i64>(column / kTile) * tokens + span.first + P::row() + P::position()] =
            weight_gradient_of_lane;
    const auto quantize_half = [&](Half& half, u32 at) {
        quantize_tile<kPowerOf2Scales, true, true>(
            half, row_stage, row_target(q, scales, scale_stride, 2 * width, span, at), column_stage,
            column_target(q_t, scales_t, 2 * width, 2 * width, at, tile, tiles_t, !span.grouped));
    };
    quantize_half(d_gate, column);
    quantize_half(d_up, width + column);
    report_wrong_offsets(group_offsets, groups, tokens, error);
}

}  // namespace dsv3
