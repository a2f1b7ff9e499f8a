// Quantisation to e4m3 with one FP32 scale a tile of 1x128 (activations and gradients; DeepSeek-V3 report, section 3.3.2).
//
// Memory bound: of M x K elements it reads b bytes each (b = 2 or 4) and writes 1, and writes a scale of 4 bytes a tile:
// M * K * (b + 1 + 1/32) bytes, so 3.03 bytes an element from BF16. Nothing is read twice.
#pragma once

#include "ptx.cuh"

namespace dsv3 {

constexpr u32 kWarp = 32;
constexpr u32 kTile = 128;            // elements that share a scale
constexpr u32 kThreads = 256;         // of a block
constexpr u32 kElementsPerLane = 16;  // one 16-byte store of e4m3
constexpr u32 kLanesPerTile = kTile / kElementsPerLane;
constexpr u32 kRowsPerWarp = 32;      // so that a warp's scales fill one 128-byte line
constexpr u32 kRowsPerStep = kWarp / kLanesPerTile;
constexpr u32 kSteps = kRowsPerWarp / kRowsPerStep;

constexpr float kE4m3Max = 448.0f;
constexpr float kSmallestScale = 1.17549435e-38f;  // 2^-126, the smallest normal float

__device__ __forceinline__ u32 float_bits(float value) { return __float_as_uint(value); }

// `count` floats from the 16 bytes at v; the element type decides how many.
__device__ __forceinline__ void widen(U32x4 v, Bf16, float* out) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void widen(U32x4 v, Fp16, float* out) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        out[2 * i] = ptx::fp16_to_float(static_cast<u16>(words[i]));
        out[2 * i + 1] = ptx::fp16_to_float(static_cast<u16>(words[i] >> 16));
    }
}

__device__ __forceinline__ void widen(U32x4 v, float, float* out) {
    out[0] = __uint_as_float(v.x);
    out[1] = __uint_as_float(v.y);
    out[2] = __uint_as_float(v.z);
    out[3] = __uint_as_float(v.w);
}
}  // namespace dsv3
