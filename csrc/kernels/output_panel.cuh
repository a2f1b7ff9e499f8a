// How a wave's output, 64 rows of a wgmma, leaves a warpgroup's registers: as BF16 in panels in shared
// memory, each as wide as the span of a swizzle, from there in one bulk store a panel, or where its rows are
// not all the tile's by stores of 16 bytes.
#pragma once

#include "ptx.cuh"

namespace dsv3 {
namespace gemm {

constexpr u32 kWarpgroup = 128;  // threads

// Where 16 bytes of a panel lie, in the swizzle that the copy engine expects.
template <u32 kWidth>
__device__ __forceinline__ U32x4* panel_chunk(Bf16* panel, u32 row, u32 column) {
    const u32 offset = (row * kWidth + column) * sizeof(Bf16);
    return reinterpret_cast<U32x4*>(panel) + (offset / 16 ^ (offset >> 7 & (kWidth / 8 - 1)));
}

// One wave's FP32 sums as BF16 to its panels in shared memory.
template <class L, bool kSwap>
__device__ __forceinline__ void stage_output(Bf16 (*panels)[L::kPanelRows * L::kPanel],
                                             const float (&sum)[L::kColumns / 2]) {
    const u32 lane = threadIdx.x % 32;
    const u32 warp_row = threadIdx.x % kWarpgroup / 32 * 16;
#pragma unroll
    for (u32 column = 0; column < L::kColumns; column += 16) {
        const float* v = &sum[column / 2];
        const u32 m0 = ptx::bf16x2(v[0], v[1]), m1 = ptx::bf16x2(v[2], v[3]);
        const u32 m2 = ptx::bf16x2(v[4], v[5]), m3 = ptx::bf16x2(v[6], v[7]);
        // Matrices m0 and m1 hold 16 rows by 8 columns, m2 and m3 the 8 columns after them.
        if constexpr (kSwap) {
            U32x4* chunk = panel_chunk<L::kPanel>(panels[0], column + lane / 16 * 8 + lane % 8,
                                                  warp_row + lane / 8 % 2 * 8);
            ptx::stmatrix_transposed(chunk, m0, m1, m2, m3);
        } else {
            U32x4* chunk = panel_chunk<L::kPanel>(panels[column / L::kPanel], warp_row + lane % 16,
                                                  column % L::kPanel + lane / 16 * 8);
            ptx::stmatrix(chunk, m0, m1, m2, m3);
        }
    }
}

// The first `rows` rows and `columns` columns of a panel to D, by the whole warpgroup.
template <class L>
__device__ __forceinline__ void store_tail(Bf16* panel, Bf16* d, u32 rows, u32 columns, u32 row_stride) {
    constexpr u32 kChunks = L::kPanel / 8;  // of 16 bytes in a row
    for (u32 i = threadIdx.x % kWarpgroup; i < L::kPanelRows * kChunks; i += kWarpgroup) {
        const u32 row = i / kChunks, column = i % kChunks * 8;
        if (row < rows && column < columns)
            ptx::store_global(d + static_cast<u64>(row) * row_stride + column,
                              ptx::load_shared(panel_chunk<L::kPanel>(panel, row, column)));
    }
}

}  // namespace gemm
}  // namespace dsv3
