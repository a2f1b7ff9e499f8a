// Hopper's warpgroup matrix multiply-accumulate: arithmetic, shared-memory operand layouts, register
// fragments.
//
// Everything here is a pure function of its arguments; who may touch which byte when is the machine's
// business. The arithmetic is that of the published bit-accurate models of Hopper's tensor core (MMA-Sim,
// arXiv 2511.10909).
#pragma once

#include <cstdint>
#include <string>

namespace dsv3 {

enum class OperandType : uint8_t { e4m3, e5m2, f16, bf16, tf32 };
enum class AccumulatorType : uint8_t { f32, f16 };

constexpr int kTileRows = 64;   // M of every wgmma
constexpr int kTileBytes = 32;  // K of every wgmma, in bytes of one row: 32 fp8, 16 half or 8 tf32 elements
constexpr int kMaxTileColumns = 256;

constexpr int element_bytes(OperandType type) {
    return type == OperandType::e4m3 || type == OperandType::e5m2 ? 1 : type == OperandType::tf32 ? 4 : 2;
}

struct MmaConfig {
    int n = 0;  // a multiple of 8, up to 256
    OperandType a = OperandType::e4m3;
    OperandType b = OperandType::e4m3;
    AccumulatorType d = AccumulatorType::f32;
    bool scale_d = true;  // false: D = A·Bᵀ, true: D = A·Bᵀ + D
    bool negate_a = false;
    bool negate_b = false;
    bool exact_accumulate = false;  // instead of the tensor core's truncation: an FP32 FMA chain, k ascending
};

// Empty if PTX has this combination of shape and types, else what is wrong with it.
std::string why_invalid(const MmaConfig& config);

// One wgmma: d[64][n] = a[64][32 bytes] · b[n][32 bytes]ᵀ (+ d), all row-major and contiguous; `d` holds FP32
// values (for an f16 accumulator, values that f16 represents).
//
// The products of a step and the accumulator are added as one: every term is aligned to the largest exponent
// among the nonzero terms, truncated toward zero to F fraction bits at that exponent, and the sum is exact. F
// is 13 for fp8, 25 for the other types. An f32 result is truncated toward zero to 13 fraction bits (fp8) or
// to FP32; an f16 result is rounded to nearest even. NaN gives 0x7FFFFFFF (f16: 0x7FFF); infinities follow
// IEEE 754.
void multiply_accumulate(const MmaConfig& config, const uint8_t* a, const uint8_t* b, float* d);

// ---- Operands in shared memory
// ----------------------------------------------------------------------------------

// The 64-bit matrix descriptor of wgmma. Addresses and strides in bytes.
struct MatrixDescriptor {
    uint32_t start = 0;
    uint32_t leading_offset = 0;  // LBO
    uint32_t stride_offset = 0;   // SBO
    uint32_t base_offset = 0;     // 0..7, in units of 128 bytes: where the swizzle's pattern starts
    uint32_t swizzle = 0;         // 0, 32, 64 or 128

    static MatrixDescriptor decode(uint64_t bits);
};

// An operand of `rows` rows (M or N) by 32 bytes of K is read in chunks of 16 bytes, 2·rows of them.
// K-major: chunk i is half i % 2 of row i / 2. MN-major (16-bit types only): chunk i holds 8 consecutive
// rows, starting at 8·(i % (rows/8)), at k = i / (rows/8). Writes the shared-memory address of every chunk.
void operand_chunk_addresses(const MatrixDescriptor& descriptor, bool mn_major, int rows,
                             uint32_t* addresses);

// Chunks in that order -> the row-major tile of multiply_accumulate.
void assemble_operand(bool mn_major, int rows, const uint8_t* chunks, uint8_t* tile);

// ---- Register fragments
// ----------------------------------------------------------------------------------------- `thread` counts
// within the warpgroup, 0..127.

struct TilePosition {
    int row;
    int column;
};

// Of accumulator register `index` of a thread: an f32, or the lower half of a pair of f16 (the upper is one
// column on).
TilePosition accumulator_position(AccumulatorType type, int thread, int index);
// Row and byte (of the 32-byte row) of A's 32-bit register `index`, 0..3, of a thread.
TilePosition a_fragment_position(int thread, int index);

// ldmatrix of one 8x8 matrix of 16-bit elements: rows of 16 bytes -> the register of each of 32 lanes.
void ldmatrix_distribute(const uint8_t (*rows)[16], bool transposed, uint32_t* registers);
// stmatrix: the inverse.
void stmatrix_collect(const uint32_t* registers, bool transposed, uint8_t (*rows)[16]);

}  // namespace dsv3
