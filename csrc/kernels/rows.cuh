// A warp moves rows of 16-byte multiples in pieces: every lane has several accesses under way, for one at a
// time would pay memory's latency each time.
#pragma once

#include "ptx.cuh"

namespace dsv3 {

constexpr u32 kAhead = 7;  // accesses of a lane under way; a row of 7168 values is 14 or 28 of them

template <u32 kCount>
struct PieceOf {
    static constexpr u32 kBytes = kCount * 32 * 16;

    U32x4 part[kCount];

    // The first `left` bytes at `row`, at most a piece; the rest is zero. kConstant: nobody writes them now.
    template <bool kConstant>
    __device__ __forceinline__ void load(const u8* row, u32 left) {
#pragma unroll
        for (u32 i = 0; i < kCount; ++i) {
            const u32 at = (i * 32 + threadIdx.x % 32) * 16;
            part[i] = U32x4{0, 0, 0, 0};
            if (at < left) part[i] = kConstant ? ptx::load_global_nc(row + at) : ptx::load_global(row + at);
        }
    }

    __device__ __forceinline__ void store(u8* row, u32 left) const {
        if (left >= kBytes) {
#pragma unroll
            for (u32 i = 0; i < kCount; ++i)
                ptx::store_global(row + (i * 32 + threadIdx.x % 32) * 16, part[i]);
            return;
        }
#pragma unroll
        for (u32 i = 0; i < kCount; ++i) {
            const u32 at = (i * 32 + threadIdx.x % 32) * 16;
            if (at < left) ptx::store_global(row + at, part[i]);
        }
    }
};

using Piece = PieceOf<kAhead>;
constexpr u32 kPieceBytes = Piece::kBytes;

}  // namespace dsv3
