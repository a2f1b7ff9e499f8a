// Which output tiles a block computes, and in what order. Every warp that asks gets the same sequence.
//
// A scheduler is a class with `bool next(Tile&)`: false when the block is done.
#pragma once

#include "ptx.cuh"

namespace dsv3 {

struct Tile {
    u32 row;     // first row of A and D
    u32 column;  // first row of B, first column of D
};

// One problem. Blocks that run at the same time take neighbouring tiles of a strip kStrip tiles wide, row by
// row: their operands, about kStrip * kBlockN rows of B and gridDim.x / kStrip * kBlockM rows of A, stay in
// L2.
template <u32 kBlockM, u32 kBlockN, u32 kStrip>
class DenseScheduler {
public:
    __device__ __forceinline__ DenseScheduler(u32 m, u32 n)
        : rows_((m + kBlockM - 1) / kBlockM), columns_((n + kBlockN - 1) / kBlockN), next_(blockIdx.x) {}

    __device__ __forceinline__ bool next(Tile& tile) {
        if (next_ >= rows_ * columns_) return false;
        const u32 first_column = next_ / (rows_ * kStrip) * kStrip;
        const u32 within = next_ % (rows_ * kStrip);
        const u32 width = min(kStrip, columns_ - first_column);
        tile = {within / width * kBlockM, (first_column + within % width) * kBlockN};
        next_ += gridDim.x;
        return true;
    }

private:
    u32 rows_, columns_;  // of tiles
    u32 next_;
};

}  // namespace dsv3
