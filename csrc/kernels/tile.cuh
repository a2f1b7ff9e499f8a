// A tile of 128x128 values that a block holds in registers and writes as e4m3 in either orientation or both.
// Every quantiser that transposes is a way to fill the registers followed by what is here.
//
// The values stay in the 16 bits (or 32, or 8) that they have in memory and are widened each time they are
// needed: 128 floats a thread would not fit the registers.
#pragma once

#include "e4m3.cuh"
#include "token_tiles.cuh"

namespace dsv3 {
namespace quantize {

constexpr u32 kRows = 16;  // of a thread: one 16-byte store of e4m3 in the transposed orientation
constexpr u32 kRowGroups = kTile / kRows;
constexpr u32 kChunks = kTile / 16;  // 16-byte chunks of e4m3 in a line of a tile

// Which part of the tile a thread holds: rows row().. and columns column().., 16 x kColumns.
template <u32 kColumnsOfThread>
struct Part {
    static constexpr u32 kColumns = kColumnsOfThread;
    static constexpr u32 kPositions = kTile / kColumns;
    static constexpr u32 kThreads = kPositions * kRowGroups;
    static constexpr u32 kBlocksPerSm = 512 / kThreads;

    __device__ __forceinline__ static u32 row_group() { return threadIdx.x / kPositions; }
    __device__ __forceinline__ static u32 row() { return row_group() * kRows; }
    __device__ __forceinline__ static u32 position() { return threadIdx.x % kPositions; }
    __device__ __forceinline__ static u32 column() { return position() * kColumns; }
};

// One 16-byte load a row.
template <class Input>
using PartOf = Part<16 / sizeof(Input)>;

// What a thread holds of the tile.
template <class Input, u32 kColumnsOfThread = 16 / sizeof(Input)>
struct Held {
    static constexpr u32 kColumns = kColumnsOfThread;
    static constexpr u32 kCorrections = quantize::kCorrections<Input>;

    Words<kColumns * sizeof(Input) / 4> raw[kRows];

    __device__ __forceinline__ void widen_row(u32 r, float (&v)[kColumns]) const {
        widen(raw[r], v, Input{});
    }

    __device__ __forceinline__ void forget_widened(u32 r) {
#pragma unroll
        for (u32& word : raw[r].word) ptx::forget_derived(word);
    }

    // From the tile that begins at `tile`; zeros from row `rows` and column `columns` on, counted from there.
    __device__ __forceinline__ void load(const Input* tile, i64 row_stride, u32 rows, u32 columns) {
        using P = Part<kColumns>;
        const Input* source = tile + P::row() * row_stride + P::column();
#pragma unroll
        for (u32 r = 0; r < kRows; ++r) {
            const bool inside = P::row() + r < rows && P::column() < columns;
            raw[r] = words(inside ? ptx::load_global_nc(source + r * row_stride) : U32x4{0, 0, 0, 0});
        }
    }
};

// Column i of the thread's part in e4m3, 16 bytes down the rows.
template <bool kPowerOf2, class Values>
__device__ __forceinline__ U32x4 encode_column(const Values& held, u32 i, float scale) {
    constexpr u32 kColumns = Values::kColumns;
    float v[kRows];
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
        float row[kColumns];
        held.widen_row(r, row);
        v[r] = row[i];
    }
    divide<kPowerOf2, Values::kCorrections>(v, scale);
    return {e4m3x4(v[0], v[1], v[2], v[3]), e4m3x4(v[4], v[5], v[6], v[7]), e4m3x4(v[8], v[9], v[10], v[11]),
            e4m3x4(v[12], v[13], v[14], v[15])};
}

// The transposed tile on its way through shared memory: line c holds column c, 128 bytes, all 32 banks. The 8
// lanes that share a pass of 16-byte stores hold the same rows of 8 neighbouring parts, and the exclusive or
// spreads their chunks over the banks; 8 lanes that load take a line.
template <u32 kColumns>
struct TransposedTile {
    U32x4 chunks[kTile * kChunks];

    __device__ __forceinline__ U32x4& at(u32 line, u32 chunk) {
        return chunks[line * kChunks + (chunk ^ line / kColumns % kChunks)];
    }

    // Writes lines of 128 bytes; what lies from line `lines` and byte `bytes` on stays unwritten.
    __device__ __forceinline__ void store(u8* target, i64 line_stride, u32 lines, u32 bytes) {
        const u32 chunk = threadIdx.x % kChunks;
#pragma unroll
        for (u32 first = 0; first < kTile; first += Part<kColumns>::kThreads / kChunks) {
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

// The tile in the orientation it came in; a warp's stores fill whole lines, and so do its loads.
template <u32 kColumns>
struct RowMajorTile {
    static constexpr u32 kWords = kColumns / 4;  // of a thread in a row

    union {
        Words<kWords> parts[kTile][Part<kColumns>::kPositions];
        U32x4 chunks[kTile][kChunks];
    };

    // From the columns of the thread's part.
    __device__ __forceinline__ void put(const U32x4 (&columns)[kColumns]) {
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
            for (u32 i = 0; i < 4; ++i)
                parts[Part<kColumns>::row() + r + i][Part<kColumns>::position()] = rows[i];
        }
    }

    // Writes rows of 128 bytes; what lies from row `rows` and byte `bytes` on stays unwritten.
    __device__ __forceinline__ void store(u8* target, i64 row_stride, u32 rows, u32 bytes) {
        const u32 chunk = threadIdx.x % kChunks;
#pragma unroll
        for (u32 first = 0; first < kTile; first += Part<kColumns>::kThreads / kChunks) {
            const u32 row = first + threadIdx.x / kChunks;
            if (row < rows && chunk * 16 < bytes)
                ptx::store_global(target + row * row_stride + chunk * 16, chunks[row][chunk]);
        }
    }
};

// Row-wise: where the tile goes, and what it takes on the way.
template <u32 kColumns>
struct RowStage {
    RowMajorTile<kColumns> tile;
    float amax[kTile], scale[kTile];
};

template <class Scale>
struct RowTarget {
    u8* q;          // of the tile's first element
    i64 stride;     // from row to row
    Scale* scales;  // of the tile's first row; neighbours follow
    u32 rows, bytes;
};

// Transposed. Maxima and scales lie in an order that makes every access free of bank conflicts: by a thread,
// which holds neighbouring columns, and by the thread of one column.
template <u32 kColumns>
struct ColumnStage {
    static constexpr u32 kPositions = Part<kColumns>::kPositions;
    static constexpr u32 kStep = kPositions + kPositions / 4;
    static constexpr u32 kPad = kPositions < 16 ? kPositions : 16;

    TransposedTile<kColumns> tile;
    float amaxes[kRowGroups][kColumns * kStep + kPad];
    float scale[kColumns * kStep];

    __device__ __forceinline__ static u32 slot(u32 i, u32 position) { return i * kStep + position; }
    __device__ __forceinline__ static u32 slot_of(u32 column) {
        return slot(column % kColumns, column / kColumns);
    }
};

template <class Scale>
struct ColumnTarget {
    u8* q_t;        // of the tile's first column
    i64 stride;     // from column to column
    Scale* scales;  // of the tile's first column; neighbours follow
    u32 columns;
    bool empty;  // all zeros, whatever is held
};

// Of the tokens of `span` and the 128 columns from `column` on, in q [.., width] and its scales.
template <class Scale>
__device__ __forceinline__ RowTarget<Scale> row_target(u8* q, Scale* scales, i64 scale_stride, u32 width,
                                                       const Tokens& span, u32 column) {
    return {q + static_cast<i64>(span.first) * width + column, width,
            scales + column / kTile * scale_stride + span.first, span.count, width - column};
}

// Of the 128 columns from `column` on and tile `tile` of tokens, in q_t [width, 128 * tiles] and its scales;
// nothing past the last tile.
template <class Scale>
__device__ __forceinline__ ColumnTarget<Scale> column_target(u8* q_t, Scale* scales, i64 scale_stride,
                                                             u32 width, u32 column, u32 tile, u32 tiles,
                                                             bool empty) {
    const i64 stride = static_cast<i64>(tiles) * kTile;
    return {q_t + column * stride + static_cast<i64>(tile) * kTile, stride,
            scales + tile * scale_stride + column, tile < tiles ? width - column : 0, empty};
}

// Of 16 rows, each over the lanes that share them: lane p of those ends with row p % 16.
template <u32 kPositions>
__device__ __forceinline__ float amax_of_row(float (&amax)[kRows]) {
    static_assert(kPositions >= kRows, "a row for each lane");
#pragma unroll
    for (u32 step = 2; step <= kRows; step *= 2) {
        const u32 half = kRows / step;
        const bool upper = threadIdx.x & half;
#pragma unroll
        for (u32 i = 0; i < half; ++i) {
            const float keep = upper ? amax[i + half] : amax[i], give = upper ? amax[i] : amax[i + half];
            amax[i] = ptx::max_nan(keep, ptx::shuffle_xor(give, half));
        }
    }
    if (kPositions > kRows) amax[0] = ptx::max_nan(amax[0], ptx::shuffle_xor(amax[0], kRows));
    return amax[0];
}

// Quantises what the threads hold of a tile and writes it, row-wise in tiles of 1x128 or transposed in tiles
// of 128 tokens or both. All threads of the block call, and may call again: what one call reads of a stage,
// the next overwrites only behind its own barriers.
template <bool kPowerOf2, bool kRowWise, bool kTransposed, class Values, class Scale>
__device__ __forceinline__ void quantize_tile(Values& held, RowStage<Values::kColumns>& row_stage,
                                              const RowTarget<Scale>& rows,
                                              ColumnStage<Values::kColumns>& column_stage,
                                              const ColumnTarget<Scale>& columns) {
    constexpr u32 kColumns = Values::kColumns;
    using P = Part<kColumns>;
    using Stage = ColumnStage<kColumns>;

    float row_amax[kRows], column_amax[kColumns];
#pragma unroll
    for (u32 i = 0; i < kColumns; ++i) column_amax[i] = 0.0f;
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
        float v[kColumns];
        held.widen_row(r, v);
        row_amax[r] = 0.0f;
#pragma unroll
        for (u32 i = 0; i < kColumns; ++i) {
            const float magnitude = ptx::abs(v[i]);
            if (kRowWise) row_amax[r] = ptx::max_nan(row_amax[r], magnitude);
            if (kTransposed) column_amax[i] = ptx::max_nan(column_amax[i], magnitude);
        }
        held.forget_widened(r);
    }
    if constexpr (kRowWise) {
        const float amax = amax_of_row<P::kPositions>(row_amax);
        if (P::position() < kRows) row_stage.amax[P::row() + P::position()] = amax;
    }
    if (kTransposed) {
#pragma unroll
        for (u32 i = 0; i < kColumns; ++i)
            column_stage.amaxes[P::row_group()][Stage::slot(i, P::position())] = column_amax[i];
    }
    __syncthreads();

    for (u32 line = threadIdx.x; line < kTile; line += P::kThreads) {
        if (kRowWise) {
            const float scale = tile_scale<kPowerOf2>(row_stage.amax[line]);
            row_stage.scale[line] = scale;
            if (line < rows.rows) store_scale(rows.scales + line, scale);
        }
        if (kTransposed) {
            float amax = 0.0f;
#pragma unroll
            for (u32 g = 0; g < kRowGroups; ++g)
                amax = ptx::max_nan(amax, column_stage.amaxes[g][Stage::slot_of(line)]);
            const float scale = columns.empty ? 1.0f : tile_scale<kPowerOf2>(amax);
            column_stage.scale[Stage::slot_of(line)] = scale;
            if (line < columns.columns) store_scale(columns.scales + line, scale);
        }
    }
    __syncthreads();

    if (kRowWise) {
#pragma unroll
        for (u32 r = 0; r < kRows; ++r) {
            float v[kColumns];
            held.widen_row(r, v);
            divide<kPowerOf2, Values::kCorrections>(v, row_stage.scale[P::row() + r]);
            Words<kColumns / 4> codes;
#pragma unroll
            for (u32 w = 0; w < kColumns / 4; ++w)
                codes.word[w] = e4m3x4(v[4 * w], v[4 * w + 1], v[4 * w + 2], v[4 * w + 3]);
            row_stage.tile.parts[P::row() + r][P::position()] = codes;
            held.forget_widened(r);
        }
    }
    if (kTransposed) {
#pragma unroll
        for (u32 i = 0; i < kColumns; ++i) {
            const float scale = column_stage.scale[Stage::slot(i, P::position())];
            const U32x4 codes = encode_column<kPowerOf2>(held, i, scale);
            column_stage.tile.at(P::column() + i, P::row_group()) = columns.empty ? U32x4{0, 0, 0, 0} : codes;
            if (i % 2) {  // two columns share a conversion; more would only hold on to registers
#pragma unroll
                for (u32 r = 0; r < kRows; ++r) held.forget_widened(r);
            }
        }
    }
    __syncthreads();

    if (kRowWise) row_stage.tile.store(rows.q, rows.stride, rows.rows, rows.bytes);
    if (kTransposed) column_stage.tile.store(columns.q_t, columns.stride, columns.columns, kTile);
}

}  // namespace quantize
}  // namespace dsv3
