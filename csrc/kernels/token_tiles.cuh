// Which tokens a tile of 128 holds, where they lie in groups: what token-transposed operands and their
// quantisers agree on (quantize_1x128_t).
#pragma once

#include "e4m3.cuh"
#include "error.cuh"
#include "tile_scheduler.cuh"

namespace dsv3 {
namespace quantize {

// The tokens of a tile, and whether a group holds them.
struct Tokens {
    u32 first, count;
    bool grouped;
};

// Tiles restart at each group and follow one another without a gap; with kRest the tokens past the last group
// come last, as if they were one more. Every lane of a warp calls; each takes a group. Offsets are clamped to
// `tokens`, a group that ends before it begins is empty, and a tile past all of them has no tokens: no
// offsets make a thread read outside x. Without offsets one group holds all.
template <bool kRest>
__device__ __forceinline__ Tokens tokens_of_tile(const i32* group_offsets, u32 groups, u32 tokens, u32 tile) {
    if (!group_offsets) return {tile * kTile, min(tokens - tile * kTile, kTile), true};
    const u32 lane = threadIdx.x % 32;
    const u32 spans = groups + kRest;
    const auto clamped = [=](u32 g) {
        if (kRest && g > groups) return tokens;
        return min(static_cast<u32>(max(group_offsets[min(g, groups)], 0)), tokens);
    };
    u32 before = 0;  // tiles of the groups before `base`
    for (u32 base = 0; base < spans; base += 32) {
        const u32 low = clamped(base + lane), high = max(low, clamped(base + lane + 1));
        const u32 tiles = (high - low + kTile - 1) / kTile;
        u32 end = tiles;
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2) {
            const u32 lower = __shfl_up_sync(~0u, end, distance);
            if (lane >= distance) end += lower;
        }
        end += before;
        const u32 ends_later = __ballot_sync(~0u, end > tile);
        if (ends_later) {
            const u32 first = low + (tile - (end - tiles)) * kTile;
            const u32 count = first < high ? min(high - first, kTile) : 0;
            const u32 owner = __ffs(ends_later) - 1;
            return {__shfl_sync(~0u, first, owner), __shfl_sync(~0u, count, owner), base + owner < groups};
        }
        before = __shfl_sync(~0u, end, 31);
    }
    return {0, 0, false};
}

// Every thread calls, once, with what it gave tokens_of_tile; the first warp of the grid looks.
__device__ __forceinline__ void report_wrong_offsets(const i32* group_offsets, u32 groups, u32 tokens,
                                                     u32* error) {
    if (group_offsets && blockIdx.x == 0 && threadIdx.x < 32 &&
        !list_is_valid<Grouping::kOffsets>(group_offsets, groups, tokens, threadIdx.x))
        report_error(error, ErrorCode::kQuantizeOffsets);
}

}  // namespace quantize
}  // namespace dsv3
