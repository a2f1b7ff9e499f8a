// E5M6, 12 bits a value with a power-of-two scale for 1x128: activations that the backward of attention reads
// again and that e4m3 would hurt (DeepSeek-V3 report, section 3.3.3).
//
// A code is a sign, 5 bits of exponent with bias 15 and 6 of fraction: the upper 12 bits of an fp16. Two
// values take 3 bytes, the first in the low 12 bits.
//
// Memory bound: an element of b bytes takes b + 1.5 + 1/32, 3.53 from BF16.
#pragma once

#include "e4m3.cuh"

namespace dsv3 {
namespace e5m6 {

using namespace quantize;

constexpr u32 kThreads = 256;  // a block
constexpr u32 kValues = 8;     // of a lane and a step: 12 bytes of codes
constexpr u32 kLanesPerTile = kTile / kValues;
constexpr u32 kSteps = 4;  // of a warp: their codes fill whole lines
constexpr u32 kTilesPerWarp = kSteps * 32 * kValues / kTile;
constexpr u32 kWords = 3;                           // of a lane and a step
constexpr u32 kChunksPerTile = kTile * 3 / 2 / 16;  // of 16 bytes
constexpr u32 kChunksOfLane = kTilesPerWarp * kChunksPerTile / 32;

constexpr float kMax = 65024.0f;
constexpr u32 kNan = 0x7ff;

// On their way between lanes that hold 12 bytes each and memory in chunks of 16.
union Staged {
    u32 words[kSteps][32 * kWords];
    U32x4 chunks[kChunksOfLane * 32];
};

// Nearest, ties to even. A quotient by the scale stays below 65025 and rounds to 65024: nothing has to
// saturate.
__device__ __forceinline__ u32 encode(float v) {
    constexpr u32 kSmallestNormal = (127 - 14) << 23;
    constexpr float kGrid = 8.0f;  // its last bit is 2^-20, that of the subnormal codes
    const u32 bits = __float_as_uint(v), magnitude = bits & 0x7fffffff;
    u32 code = (magnitude - ((127 - 15) << 23) + 0xffff + (magnitude >> 17 & 1)) >> 17;
    if (magnitude < kSmallestNormal) code = __float_as_uint(ptx::abs(v) + kGrid) - __float_as_uint(kGrid);
    return magnitude > kInfinity ? kNan : code | bits >> 31 << 11;
}

__device__ __forceinline__ float decode(u32 code) { return ptx::fp16_to_float(static_cast<u16>(code << 4)); }

__device__ __forceinline__ void pack(const u32 (&c)[kValues], u32* words) {
    words[0] = c[0] | c[1] << 12 | c[2] << 24;
    words[1] = c[2] >> 8 | c[3] << 4 | c[4] << 16 | c[5] << 28;
    words[2] = c[5] >> 4 | c[6] << 8 | c[7] << 20;
}

__device__ __forceinline__ void unpack(const u32* words, u32 (&c)[kValues]) {
    const u32 a = words[0], b = words[1], d = words[2];
    const u32 wide[kValues] = {a,       a >> 12,          a >> 24 | b << 8, b >> 4,
                               b >> 16, b >> 28 | d << 4, d >> 8,           d >> 20};
#pragma unroll
    for (u32 i = 0; i < kValues; ++i) c[i] = wide[i] & 0xfff;
}

// Eight values to memory, as 16 bytes or two times 16.
__device__ __forceinline__ void store(Bf16* target, const float (&v)[kValues]) {
    ptx::store_global(target, U32x4{ptx::bf16x2(v[0], v[1]), ptx::bf16x2(v[2], v[3]), ptx::bf16x2(v[4], v[5]),
                                    ptx::bf16x2(v[6], v[7])});
}

__device__ __forceinline__ void store(float* target, const float (&v)[kValues]) {
#pragma unroll
    for (u32 i = 0; i < kValues; i += 4)
        ptx::store_global(target + i, U32x4{__float_as_uint(v[i]), __float_as_uint(v[i + 1]),
                                            __float_as_uint(v[i + 2]), __float_as_uint(v[i + 3])});
}

}  // namespace e5m6

// x, `tiles` times 128 values -> codes, 192 bytes a tile, and scales, all contiguous. Any grid is right; a
// warp takes 8 tiles at a time.
template <class Input>
__global__ void __launch_bounds__(e5m6::kThreads)
    pack_e5m6(const Input* x, u8* codes, float* scales, u32 tiles) {
    using namespace e5m6;
    constexpr u32 kPerLoad = 16 / sizeof(Input), kLoads = kValues / kPerLoad;
    __shared__ Staged staged_of_warp[kThreads / 32];
    Staged& staged = staged_of_warp[threadIdx.x / 32];
    const u32 lane = threadIdx.x % 32, tile_of_lane = lane / kLanesPerTile;
    const u32 warps = gridDim.x * (kThreads / 32);

    for (u32 first = (blockIdx.x * (kThreads / 32) + threadIdx.x / 32) * kTilesPerWarp; first < tiles;
         first += warps * kTilesPerWarp) {
        U32x4 raw[kSteps][kLoads];
#pragma unroll
        for (u32 step = 0; step < kSteps; ++step) {
            const u32 tile = first + step * 2 + tile_of_lane;
            const Input* address = x + static_cast<i64>(tile) * kTile + lane % kLanesPerTile * kValues;
#pragma unroll
            for (u32 i = 0; i < kLoads; ++i)
                raw[step][i] = tile < tiles ? ptx::load_global_nc(address + i * kPerLoad) : U32x4{0, 0, 0, 0};
        }
#pragma unroll
        for (u32 step = 0; step < kSteps; ++step) {
            const u32 tile = first + step * 2 + tile_of_lane;
            float v[kValues], amax = 0.0f;
#pragma unroll
            for (u32 i = 0; i < kLoads; ++i) widen(words(raw[step][i]), v + i * kPerLoad, Input{});
#pragma unroll
            for (u32 i = 0; i < kValues; ++i) amax = ptx::max_nan(amax, ptx::abs(v[i]));
#pragma unroll
            for (u32 mask = 1; mask < kLanesPerTile; mask *= 2)
                amax = ptx::max_nan(amax, ptx::shuffle_xor(amax, mask));
            const float scale = tile_scale<true>(amax, kMax);
            if (tile < tiles && lane % kLanesPerTile == 0) ptx::store_global(scales + tile, scale);

            divide<true, 0>(v, scale);
            u32 encoded[kValues];
#pragma unroll
            for (u32 i = 0; i < kValues; ++i) encoded[i] = encode(v[i]);
            pack(encoded, staged.words[step] + lane * kWords);
        }
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < kChunksOfLane; ++i) {
            const u32 chunk = i * 32 + lane;
            if (first + chunk / kChunksPerTile < tiles)
                ptx::store_global(codes + (static_cast<i64>(first) * kChunksPerTile + chunk) * 16,
                                  staged.chunks[chunk]);
        }
        __syncwarp();
    }
}

// The other way: codes and scales -> x.
template <class Output>
__global__ void __launch_bounds__(e5m6::kThreads)
    unpack_e5m6(const u8* codes, const float* scales, Output* x, u32 tiles) {
    using namespace e5m6;
    __shared__ Staged staged_of_warp[kThreads / 32];
    Staged& staged = staged_of_warp[threadIdx.x / 32];
    const u32 lane = threadIdx.x % 32, tile_of_lane = lane / kLanesPerTile;
    const u32 warps = gridDim.x * (kThreads / 32);

    for (u32 first = (blockIdx.x * (kThreads / 32) + threadIdx.x / 32) * kTilesPerWarp; first < tiles;
         first += warps * kTilesPerWarp) {
        // The first lanes bring a scale each.
        const bool brings = lane < kTilesPerWarp && first + lane < tiles;
        const float scale_of_lane = brings ? ptx::load_global_nc_float(scales + first + lane) : 1.0f;
#pragma unroll
        for (u32 i = 0; i < kChunksOfLane; ++i) {
            const u32 chunk = i * 32 + lane;
            const u8* address = codes + (static_cast<i64>(first) * kChunksPerTile + chunk) * 16;
            const bool inside = first + chunk / kChunksPerTile < tiles;
            staged.chunks[chunk] = inside ? ptx::load_global_nc(address) : U32x4{0, 0, 0, 0};
        }
        __syncwarp();
#pragma unroll
        for (u32 step = 0; step < kSteps; ++step) {
            const u32 tile = first + step * 2 + tile_of_lane;
            const float scale = __shfl_sync(~0u, scale_of_lane, step * 2 + tile_of_lane);
            u32 encoded[kValues];
            unpack(staged.words[step] + lane * kWords, encoded);
            float v[kValues];
#pragma unroll
            for (u32 i = 0; i < kValues; ++i) v[i] = __fmul_rn(decode(encoded[i]), scale);
            if (tile < tiles) store(x + static_cast<i64>(tile) * kTile + lane % kLanesPerTile * kValues, v);
        }
        __syncwarp();
    }
}

}  // namespace dsv3
