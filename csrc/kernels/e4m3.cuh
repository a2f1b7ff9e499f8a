// From floats to e4m3 and back: the scale of a tile, the division by it, the codes (DeepSeek-V3 report,
// section 3.3.2). What every quantiser shares.
#pragma once

#include "ptx.cuh"

namespace dsv3 {

// A code of one byte.
struct E4m3 {
    u8 bits;
};

// A power of two as the exponent field of its FP32, UE8M0; 255 is NaN.
struct E8m0 {
    u8 bits;
};

namespace quantize {

constexpr u32 kTile = 128;  // elements that share a scale, along one axis or both

constexpr float kE4m3Max = 448.0f;
constexpr float kSmallestScale = 1.17549435e-38f;  // 2^-126, the smallest normal float
constexpr float kLargestFloat = 3.40282347e+38f;
constexpr float kTinyScale = 8.67361738e-19f;  // 2^-60
constexpr float kLift = 1.84467441e+19f;       // 2^64
constexpr u32 kMantissa = 0x007fffff;
constexpr u32 kInfinity = 0x7f800000;

template <u32 kCount>
struct alignas(4 * kCount) Words {
    u32 word[kCount];
};

__device__ __forceinline__ Words<4> words(U32x4 v) { return {{v.x, v.y, v.z, v.w}}; }

// The values in some words, as floats.
template <u32 kCount>
__device__ __forceinline__ void widen(const Words<kCount>& v, float* out, Bf16) {
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) {
        out[2 * i] = __uint_as_float(v.word[i] << 16);
        out[2 * i + 1] = __uint_as_float(v.word[i] & 0xffff0000u);
    }
}

template <u32 kCount>
__device__ __forceinline__ void widen(const Words<kCount>& v, float* out, Fp16) {
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) {
        out[2 * i] = ptx::fp16_to_float(static_cast<u16>(v.word[i]));
        out[2 * i + 1] = ptx::fp16_to_float(static_cast<u16>(v.word[i] >> 16));
    }
}

template <u32 kCount>
__device__ __forceinline__ void widen(const Words<kCount>& v, float* out, float) {
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) out[i] = __uint_as_float(v.word[i]);
}

template <u32 kCount>
__device__ __forceinline__ void widen(const Words<kCount>& v, float* out, E4m3) {
#pragma unroll
    for (u32 i = 0; i < 2 * kCount; ++i) {
        const u32 halves = ptx::e4m3x2_to_fp16x2(static_cast<u16>(v.word[i / 2] >> 16 * (i % 2)));
        out[2 * i] = ptx::fp16_to_float(static_cast<u16>(halves));
        out[2 * i + 1] = ptx::fp16_to_float(static_cast<u16>(halves >> 16));
    }
}

// amax / largest (the largest code), at least 2^-126; 1 for a tile of zeros. NaN and infinity pass through,
// and so every value of such a tile dequantises to NaN: x / NaN is NaN, inf / inf is NaN, and a finite x /
// inf is 0, whose product with the scale is NaN.
template <bool kPowerOf2>
__device__ __forceinline__ float tile_scale(float amax, float largest = kE4m3Max) {
    if (amax == 0.0f) return 1.0f;
    const float scale = ptx::max_nan(ptx::div_rn(amax, largest), kSmallestScale);
    const u32 bits = __float_as_uint(scale);
    if (kPowerOf2 && bits < kInfinity) return __uint_as_float((bits + kMantissa) & ~kMantissa);  // rounded up
    return scale;
}

// How often `divide` corrects a quotient: values of 16 bits and scales made of them have so few significant
// bits that once is enough (tests/test_quantize_kernel.py tries every pair).
template <class Input>
constexpr u32 kCorrections = sizeof(Input) == 2 ? 1 : 2;

// Divides the values of a tile by its scale, rounded as IEEE division rounds, at 3 or 5 operations a value
// instead of the 15 or so and a branch of div.rn.f32: r = rn(1 / scale) serves the whole tile, and after one
// correction the quotient x * r is within one ulp, so that the next one makes it the nearest float
// (Markstein). Three things keep that true at the edges:
// - scales below 2^-60 are lifted together with their values, or the residue would be subnormal and inexact;
// - the residue is written q * scale - x and subtracted, which keeps the sign of a zero;
// - an infinite scale has r = 0, and corrections with a finite scale leave x * 0 alone.
// A power of two has an exact reciprocal and needs no correction.
template <bool kPowerOf2, u32 kCorrections, u32 kCount>
__device__ __forceinline__ void divide(float (&values)[kCount], float scale) {
    if (!kPowerOf2 && scale < kTinyScale) {
        scale *= kLift;
#pragma unroll
        for (u32 i = 0; i < kCount; ++i) values[i] *= kLift;
    }
    const float r = ptx::rcp_rn(scale);
    const float finite_scale = fminf(scale, kLargestFloat);
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) {
        const float x = values[i];
        float q = x * r;
#pragma unroll
        for (u32 c = 0; c < (kPowerOf2 ? 0 : kCorrections); ++c)
            q = __fmaf_rn(__fmaf_rn(q, finite_scale, -x), -r, q);
        values[i] = q;
    }
}

__device__ __forceinline__ u32 e4m3x4(float a, float b, float c, float d) {
    return ptx::e4m3x2(a, b) | static_cast<u32>(ptx::e4m3x2(c, d)) << 16;
}

constexpr u32 kValuesOfLane = 16;  // one 16-byte store of e4m3
constexpr u32 kLanesOfTile = kTile / kValuesOfLane;

// The codes of a lane's 16 values of a tile of 1x128 that 8 neighbouring lanes hold, and the tile's scale. By
// whole warps.
template <bool kPowerOf2, u32 kCorrections>
__device__ __forceinline__ U32x4 encode_across_lanes(float (&v)[kValuesOfLane], float& scale) {
    float amax = 0.0f;
#pragma unroll
    for (u32 i = 0; i < kValuesOfLane; ++i) amax = ptx::max_nan(amax, ptx::abs(v[i]));
#pragma unroll
    for (u32 mask = 1; mask < kLanesOfTile; mask *= 2)
        amax = ptx::max_nan(amax, ptx::shuffle_xor(amax, mask));
    scale = tile_scale<kPowerOf2>(amax);
    divide<kPowerOf2, kCorrections>(v, scale);
    return {e4m3x4(v[0], v[1], v[2], v[3]), e4m3x4(v[4], v[5], v[6], v[7]), e4m3x4(v[8], v[9], v[10], v[11]),
            e4m3x4(v[12], v[13], v[14], v[15])};
}

// The scale of a tile to memory.
__device__ __forceinline__ void store_scale(float* address, float scale) {
    ptx::store_global(address, scale);
}

// A power of two, NaN or infinity, which becomes NaN.
__device__ __forceinline__ void store_scale(E8m0* address, float scale) {
    ptx::store_global(&address->bits, __float_as_uint(scale) >> 23 & 0xff);
}

}  // namespace quantize
}  // namespace dsv3
