// Which output tiles a block computes, and in what order. Every thread that asks gets the same sequence.
#pragma once

#include "types.cuh"

namespace dsv3 {

// How the rows of A and D belong to the weights.
enum class Grouping : u32 {
    kNone,     // all to one
    kOffsets,  // rows list[g] to list[g + 1] to weight g
    kCounts,   // the first list[g] of the m rows that are set aside for group g to weight g
};

struct Tile {
    u32 group;
    u32 row;      // first row of A and D
    u32 column;   // first row of the group's weight, first column of D
    u32 row_end;  // of the group: rows from here on belong to others, or to nobody
};

struct TilePosition {
    u32 row, column;  // in tiles
};

// Tile `index` of `rows` by `columns` in strips `strip` wide, row by row within a strip. What runs at the
// same time then reads the operands of a rectangle of tiles, which stay in L2.
__device__ __forceinline__ TilePosition strip_tile(u32 rows, u32 columns, u32 strip, u32 index) {
    const u32 first_column = index / (rows * strip) * strip;
    const u32 within = index % (rows * strip);
    const u32 width = min(strip, columns - first_column);
    return {within / width, first_column + within % width};
}

// Blocks take tiles in turn, through the groups one after the other, and through a group in strips.
//
// Lists that are wrong are bent into ones that are right: group g begins where g - 1 ended, no row is taken
// twice and none past the last.
template <Grouping kGrouping, u32 kRows, u32 kColumns>
class TileScheduler {
  public:
    // m: rows in all, or in a group where they are counted. `block` of `blocks` asks.
    __device__ __forceinline__ TileScheduler(u32 m, u32 n, u32 strip, const i32* list, u32 groups, u32 block,
                                             u32 blocks)
        : m_(m),
          columns_((n + kColumns - 1) / kColumns),
          strip_(strip),
          list_(list),
          groups_(kGrouping == Grouping::kNone ? 1 : groups),
          blocks_(blocks),
          next_(block) {}

    // False when the block is done.
    __device__ __forceinline__ bool next(Tile& tile) {
        while (next_ - first_ >= rows_ * columns_) {
            if (++group_ >= groups_) return false;
            enter_group();
        }
        const TilePosition at = strip_tile(rows_, columns_, strip_, next_ - first_);
        tile = {group_, begin_ + at.row * kRows, at.column * kColumns, end_};
        next_ += blocks_;
        return true;
    }

  private:
    __device__ __forceinline__ void enter_group() {
        first_ += rows_ * columns_;
        begin_ = kGrouping == Grouping::kCounts ? group_ * m_ : end_;
        if constexpr (kGrouping == Grouping::kNone) end_ = m_;
        if constexpr (kGrouping == Grouping::kOffsets) end_ = max(begin_, clamped(list_[group_ + 1]));
        if constexpr (kGrouping == Grouping::kCounts) end_ = begin_ + clamped(list_[group_]);
        rows_ = (end_ - begin_ + kRows - 1) / kRows;
    }

    __device__ __forceinline__ u32 clamped(i32 rows) const { return min(static_cast<u32>(max(rows, 0)), m_); }

    const u32 m_, columns_, strip_;
    const i32* const list_;
    const u32 groups_, blocks_;
    u32 next_;                 // number of the tile that comes next
    u32 group_ = ~0u;          // before the first
    u32 first_ = 0;            // number of the group's first tile
    u32 rows_ = 0;             // of tiles in the group
    u32 begin_ = 0, end_ = 0;  // its rows
};

// Whether the entries of the list that fall to this lane of 32 are as they should be.
template <Grouping kGrouping>
__device__ __forceinline__ bool list_is_valid(const i32* list, u32 groups, u32 m, u32 lane) {
    constexpr bool kOffsets = kGrouping == Grouping::kOffsets;
#pragma unroll 1
    for (u32 i = lane; i < groups + kOffsets; i += 32) {
        const i32 least = kOffsets && i > 0 ? list[i - 1] : 0;
        const i32 most = kOffsets && i == 0 ? 0 : static_cast<i32>(m);
        if (list[i] < least || list[i] > most) return false;
    }
    return true;
}

}  // namespace dsv3
