// The quantisers that take a tile of 128x128 elements a block, because they write it transposed: weights in
// blocks of 128x128, and activations and gradients in tiles of 128 tokens (DeepSeek-V3 report, section
// 3.3.2).
//
// Memory bound: an element of b bytes is read once and written once an orientation, 3 bytes from BF16, 4 in
// both orientations. The whole tile is in flight at once, in registers: a thread loads 16 rows of 16 bytes.
#pragma once

#include "quantize.cuh"

namespace dsv3 {
namespace quantize {

constexpr u32 kRows = 16;  // of a thread: one 16-byte store of e4m3 in the transposed orientation
constexpr u32 kRowGroups = kTile / kRows;
constexpr u32 kChunks = kTile / 16;  // 16-byte chunks of e4m3 in a line of a tile

// Which part of the tile a thread holds: rows row().. and columns column().., kRows x kColumns.
template <class Input>
struct Part {
    static constexpr u32 kColumns = 16 / sizeof(Input);  // one 16-byte load
    static constexpr u32 kPositions = kTile / kColumns;
    static constexpr u32 kThreads = kPositions * kRowGroups;

    __device__ __forceinline__ static u32 row_group() { return threadIdx.x / kPositions; }
    __device__ __forceinline__ static u32 row() { return row_group() * kRows; }
    __device__ __forceinline__ static u32 position() { return threadIdx.x % kPositions; }
    __device__ __forceinline__ static u32 column() { return position() * kColumns; }
};

// The thread's part of the tile that begins at `tile`; zeros from row `rows` and column `columns` on, counted
// from there.
template <class Input>
__device__ __forceinline__ void load_part(const Input* tile, i64 row_stride, u32 rows, u32 columns,
                                          U32x4 (&raw)[kRows]) {
    using P = Part<Input>;
    const Input* source = tile + P::row() * row_stride + P::column();
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
        const bool inside = P::row() + r < rows && P::column() < columns;
        raw[r] = inside ? ptx::load_global_nc(source + r * row_stride) : U32x4{0, 0, 0, 0};
    }
}

// The largest magnitude in each of the thread's columns, NaN if any. Encoding widens `raw` again: 128 floats
// kept from here to there would not fit the registers.
template <class Input>
__device__ __forceinline__ void column_amax(U32x4 (&raw)[kRows], float (&amax)[Part<Input>::kColumns]) {
#pragma unroll
    for (u32 i = 0; i < Part<Input>::kColumns; ++i) amax[i] = 0.0f;
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
        float v[Part<Input>::kColumns];
        widen(raw[r], v, Input{});
#pragma unroll
        for (u32 i = 0; i < Part<Input>::kColumns; ++i) amax[i] = ptx::max_nan(amax[i], ptx::abs(v[i]));
        ptx::forget_derived(raw[r]);
    }
}

// Column i of the thread's part in e4m3, 16 bytes down the rows.
template <class Input, bool kPowerOf2>
__device__ __forceinline__ U32x4 encode_column(const U32x4 (&raw)[kRows], u32 i, float scale) {
    float v[kRows];
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
        float row[Part<Input>::kColumns];
        widen(raw[r], row, Input{});
        v[r] = row[i];
    }
    divide<kPowerOf2>(v, scale);
    return {e4m3x4(v[0], v[1], v[2], v[3]), e4m3x4(v[4], v[5], v[6], v[7]),
            e4m3x4(v[8], v[9], v[10], v[11]), e4m3x4(v[12], v[13], v[14], v[15])};
}

// The transposed tile on its way through shared memory: line c holds column c, 128 bytes, all 32 banks. The 8
// lanes that share a pass of 16-byte stores hold the same rows of 8 neighbouring parts, and the exclusive or
// spreads their chunks over the banks; 8 lanes that load take a line.
template <class Input>
struct TransposedTile {
    U32x4 chunks[kTile * kChunks];

    __device__ __forceinline__ U32x4& at(u32 line, u32 chunk) {
        return chunks[line * kChunks + (chunk ^ line / Part<Input>::kColumns % kChunks)];
    }

    // Writes lines of 128 bytes; what lies from line `lines` and byte `bytes` on stays unwritten.
    __device__ __forceinline__ void store(u8* target, i64 line_stride, u32 lines, u32 bytes) {
        const u32 chunk = threadIdx.x % kChunks;
#pragma unroll
        for (u32 first = 0; first < kTile; first += Part<Input>::kThreads / kChunks) {
            const u32 line = first + threadIdx.x / kChunks;
            if (line < lines && chunk * 16 < bytes)
                ptx::store_global(target + line * line_stride + chunk * 16, at(line, chunk));
        }
    }
};

// 4x4 bytes, a word a row, transposed.
__device__ __forceinline__ void transpose_bytes(u32 (&w)[4]) {
    const u32 low01 = __byte_perm(w[0], w[1], 0x5140), high01 = __byte_perm(w[0], w[1], 0x7362);
    const u32 low23 = __byte_perm(w[2], w[3], 0x5140), high23 = __byte_perm(w[2], w[3], 0x7362);
    w[0] = __byte_perm(low01, low23, 0x5410);
    w[1] = __byte_perm(low01, low23, 0x7632);
    w[2] = __byte_perm(high01, high23, 0x5410);
    w[3] = __byte_perm(high01, high23, 0x7632);
}

template <u32 kCount>
struct alignas(4 * kCount) Words {
    u32 word[kCount];
};

// The tile in the orientation it came in; a warp's stores fill whole lines, and so do its loads.
template <class Input>
struct RowMajorTile {
    static constexpr u32 kWords = Part<Input>::kColumns / 4;  // of a thread in a row

    union {
        Words<kWords> parts[kTile][Part<Input>::kPositions];
        U32x4 chunks[kTile][kChunks];
    };

    // From the columns of the thread's part.
    __device__ __forceinline__ void put(const U32x4 (&columns)[Part<Input>::kColumns]) {
#pragma unroll
        for (u32 r = 0; r < kRows; r += 4) {
            Words<kWords> rows[4];
#pragma unroll
            for (u32 w = 0; w < kWords; ++w) {
                u32 bytes[4];
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    const U32x4 c = columns[4 * w + i];
                    bytes[i] = r == 0 ? c.x : r == 4 ? c.y : r == 8 ? c.z : c.w;
                }
                transpose_bytes(bytes);
#pragma unroll
                for (u32 i = 0; i < 4; ++i) rows[i].word[w] = bytes[i];
            }
#pragma unroll
            for (u32 i = 0; i < 4; ++i) parts[Part<Input>::row() + r + i][Part<Input>::position()] = rows[i];
        }
    }

    // Writes rows of 128 bytes; what lies from row `rows` and byte `bytes` on stays unwritten.
    __device__ __forceinline__ void store(u8* target, i64 row_stride, u32 rows, u32 bytes) {
        const u32 chunk = threadIdx.x % kChunks;
#pragma unroll
        for (u32 first = 0; first < kTile; first += Part<Input>::kThreads / kChunks) {
            const u32 row = first + threadIdx.x / kChunks;
            if (row < rows && chunk * 16 < bytes)
                ptx::store_global(target + row * row_stride + chunk * 16, chunks[row][chunk]);
        }
    }
};

// The tokens of a tile.
struct Tokens {
    u32 first, count;
};

// Tiles restart at each group and follow one another without a gap. Every lane of a warp calls; each takes a
// group. Offsets are clamped to `tokens`, a group that ends before it begins is empty, and a tile past the
// last group has no tokens: no offsets make a thread read outside x.
__device__ __forceinline__ Tokens tokens_of_tile(const i32* group_offsets, u32 groups, u32 tokens, u32 tile) {
    const u32 lane = threadIdx.x % 32;
    const auto clamped = [=](u32 g) {
        return min(static_cast<u32>(max(group_offsets[min(g, groups)], 0)), tokens);
    };
    u32 before = 0;  // tiles of the groups before `base`
    for (u32 base = 0; base < groups; base += 32) {
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
            return {__shfl_sync(~0u, first, owner), __shfl_sync(~0u, count, owner)};
        }
        before = __shfl_sync(~0u, end, 31);
    }
    return {0, 0};
}

}  // namespace quantize

// w [batches, n, k] -> q e4m3 of the same shape and scales [batches, ceil(n / 128), ceil(k / 128)], all
// contiguous; with kTranspose also q_t [batches, k, n] and scales_t [batches, ceil(k / 128), ceil(n / 128)],
// the same codes and scales. k is a multiple of 16, and n with kTranspose. A block takes a tile.
template <class Input, bool kPowerOf2Scales, bool kTranspose>
__global__ void __launch_bounds__(quantize::Part<Input>::kThreads, 512 / quantize::Part<Input>::kThreads)
    quantize_128x128(const Input* w, u8* q, float* scales, u8* q_t, float* scales_t, u32 n, u32 k) {
    using namespace quantize;
    using P = Part<Input>;
    __shared__ RowMajorTile<Input> tile;
    __shared__ TransposedTile<Input> tile_t;
    __shared__ float amax_of_warp[P::kThreads / 32];

    const u32 tiles_k = (k + kTile - 1) / kTile, tiles_n = (n + kTile - 1) / kTile;
    const u32 tile_k = blockIdx.x % tiles_k, tile_n = blockIdx.x / tiles_k % tiles_n;
    const i64 batch = blockIdx.x / tiles_k / tiles_n;
    const u32 row = tile_n * kTile, column = tile_k * kTile;
    const i64 matrix = batch * n * k;

    U32x4 raw[kRows];
    load_part(w + matrix + static_cast<i64>(row) * k + column, k, n - row, k - column, raw);

    float of_column[P::kColumns], amax = 0.0f;
    column_amax<Input>(raw, of_column);
#pragma unroll
    for (u32 i = 0; i < P::kColumns; ++i) amax = ptx::max_nan(amax, of_column[i]);
#pragma unroll
    for (u32 mask = 1; mask < 32; mask *= 2) amax = ptx::max_nan(amax, ptx::shuffle_xor(amax, mask));
    if (threadIdx.x % 32 == 0) amax_of_warp[threadIdx.x / 32] = amax;
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < P::kThreads / 32; ++i) amax = ptx::max_nan(amax, amax_of_warp[i]);
    const float scale = tile_scale<kPowerOf2Scales>(amax);

    U32x4 columns[P::kColumns];
#pragma unroll
    for (u32 i = 0; i < P::kColumns; ++i) {
        columns[i] = encode_column<Input, kPowerOf2Scales>(raw, i, scale);
        if (kTranspose) tile_t.at(P::column() + i, P::row_group()) = columns[i];
    }
    tile.put(columns);
    __syncthreads();

    tile.store(q + matrix + static_cast<i64>(row) * k + column, k, n - row, k - column);
    if (kTranspose) tile_t.store(q_t + matrix + static_cast<i64>(column) * n + row, n, k - column, n - row);
    if (threadIdx.x == 0) {
        ptx::store_global(scales + blockIdx.x, scale);
        if (kTranspose) ptx::store_global(scales_t + (batch * tiles_k + tile_k) * tiles_n + tile_n, scale);
    }
}

// x [tokens, width], contiguous -> q_t e4m3 [width, 128 * tiles], contiguous, and scales [width, tiles] with
// strides (1, scale_tile_stride). group_offsets [groups + 1] may be null: one group. width is a multiple of
// 8. A block takes a tile; neighbouring blocks take neighbouring features of the same tokens.
template <class Input, bool kPowerOf2Scales>
__global__ void __launch_bounds__(quantize::Part<Input>::kThreads, 512 / quantize::Part<Input>::kThreads)
    quantize_1x128_t(const Input* x, const i32* group_offsets, u8* q_t, float* scales, u32 tokens, u32 width,
                     u32 groups, u32 tiles, i64 scale_tile_stride) {
    using namespace quantize;
    using P = Part<Input>;
    // Per column, in an order that makes every access free of bank conflicts: by a thread, which holds
    // neighbouring columns, and by the thread of one column.
    constexpr u32 kStep = P::kPositions + P::kPositions / 4;
    const auto slot = [](u32 i, u32 position) { return i * kStep + position; };
    __shared__ TransposedTile<Input> tile_t;
    __shared__ float amaxes[kRowGroups][P::kColumns * kStep + 16];
    __shared__ float scale_of[P::kColumns * kStep];

    const u32 across = (width + kTile - 1) / kTile;
    const u32 tile = blockIdx.x / across, column = blockIdx.x % across * kTile;
    Tokens span{tile * kTile, min(tokens - tile * kTile, kTile)};
    if (group_offsets) span = tokens_of_tile(group_offsets, groups, tokens, tile);

    U32x4 raw[kRows];
    load_part(x + static_cast<i64>(span.first) * width + column, width, span.count, width - column, raw);

    float amax[P::kColumns];
    column_amax<Input>(raw, amax);
#pragma unroll
    for (u32 i = 0; i < P::kColumns; ++i) amaxes[P::row_group()][slot(i, P::position())] = amax[i];
    __syncthreads();

    if (threadIdx.x < kTile) {
        const u32 mine = slot(threadIdx.x % P::kColumns, threadIdx.x / P::kColumns);
        float of_column = 0.0f;
#pragma unroll
        for (u32 g = 0; g < kRowGroups; ++g) of_column = ptx::max_nan(of_column, amaxes[g][mine]);
        const float scale = tile_scale<kPowerOf2Scales>(of_column);
        scale_of[mine] = scale;
        if (column + threadIdx.x < width)
            ptx::store_global(scales + tile * scale_tile_stride + column + threadIdx.x, scale);
    }
    __syncthreads();

#pragma unroll
    for (u32 i = 0; i < P::kColumns; ++i)
        tile_t.at(P::column() + i, P::row_group()) =
            encode_column<Input, kPowerOf2Scales>(raw, i, scale_of[slot(i, P::position())]);
    __syncthreads();

    const i64 line_stride = static_cast<i64>(tiles) * kTile;
    tile_t.store(q_t + column * line_stride + static_cast<i64>(tile) * kTile, line_stride, width - column,
                 kTile);
}

}  // namespace dsv3
