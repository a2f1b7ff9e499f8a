// What combine adds: BF16 rows in FP32, from +0 on, in the order given, rounded to BF16 at the end.
#pragma once

#include "channel.cuh"
#include "rows.cuh"

namespace dsv3 {
namespace combine {

// FP32 sums of the BF16 values of a piece.
struct Sums {
    float part[kAhead][8];

    __device__ __forceinline__ Sums() : part{} {}

    // The i-th 16 bytes of each lane.
    __device__ __forceinline__ void add(u32 i, const U32x4& values, float weight, bool weighted) {
        const u32 words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            float value = __uint_as_float(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
            if (weighted) value = __fmul_rn(value, weight);
            part[i][j] = __fadd_rn(part[i][j], value);
        }
    }

    __device__ __forceinline__ void add(const Piece& row, float weight, bool weighted) {
#pragma unroll
        for (u32 i = 0; i < kAhead; ++i) add(i, row.part[i], weight, weighted);
    }

    // Of a piece in shared memory.
    __device__ __forceinline__ void add_shared(const u8* row, float weight, bool weighted) {
        const U32x4* mine = reinterpret_cast<const U32x4*>(row) + threadIdx.x % 32;
        U32x4 next = ptx::load_shared(mine);
#pragma unroll
        for (u32 i = 0; i < kAhead; ++i) {
            const U32x4 values = next;
            if (i + 1 < kAhead) next = ptx::load_shared(mine + 32 * (i + 1));
            add(i, values, weight, weighted);
        }
    }

    // Of one that ends after `left` bytes; lanes past that add something that was loaded, of no use.
    __device__ __forceinline__ void add_shared(const u8* row, float weight, u32 left) {
#pragma unroll
        for (u32 i = 0; i < kAhead; ++i) {
            const u32 at = (i * 32 + threadIdx.x % 32) * 16;
            add(i, ptx::load_shared(reinterpret_cast<const U32x4*>(row + (at < left ? at : 0))), weight,
                true);
        }
    }

    __device__ __forceinline__ Piece rounded() const {
        Piece row;
#pragma unroll
        for (u32 i = 0; i < kAhead; ++i)
            row.part[i] = {ptx::bf16x2(part[i][0], part[i][1]), ptx::bf16x2(part[i][2], part[i][3]),
                           ptx::bf16x2(part[i][4], part[i][5]), ptx::bf16x2(part[i][6], part[i][7])};
        return row;
    }
};

// One warp: the sum of rows of `y`, BF16 of row_bytes, each times its weight if there are any, to `target`.
// row: lane k's is the k-th to add, or -1 behind the last.
__device__ __forceinline__ void put_sum(const u8* y, const float* weights, i32 row, u32 row_bytes,
                                        u8* target) {
    const float weight = weights && row >= 0 ? weights[row] : 1.0f;
    const u32 count = __popc(__ballot_sync(kFullWarp, row >= 0));
    for (u32 at = 0; at < row_bytes; at += kPieceBytes) {
        Sums sums;
        Piece piece;
        for (u32 k = 0; k < count; ++k) {
            const u64 r = __shfl_sync(kFullWarp, row, k);
            const float w = __shfl_sync(kFullWarp, weight, k);
            piece.load<true>(y + r * row_bytes + at, row_bytes - at);
            sums.add(piece, w, weights != nullptr);
        }
        sums.rounded().store(target + at, row_bytes - at);
    }
}

}  // namespace combine
}  // namespace dsv3
