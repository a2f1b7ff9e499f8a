#include "tensor_core.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "numerics.hpp"

namespace dsv3 {

namespace {

// Exponent of a zero operand: low enough that a product with it never is the largest term.
constexpr int kZeroExponent = -2000;

struct Element {
    double value;
    int exponent;  // of the significand's leading place; a subnormal has its format's smallest
};

Element element(double value, int min_exponent) {
    if (value == 0 || !std::isfinite(value)) return {value, kZeroExponent};
    return {value, std::max(std::ilogb(value), min_exponent)};
}

Element load_element(OperandType type, const uint8_t* source) {
    uint16_t half;
    uint32_t word;
    switch (type) {
        case OperandType::e4m3: return element(e4m3_to_float(*source), kE4M3.min_exponent());
        case OperandType::e5m2: return element(e5m2_to_float(*source), kE5M2.min_exponent());
        case OperandType::f16:
            std::memcpy(&half, source, sizeof half);
            return element(f16_to_float(half), kF16.min_exponent());
        case OperandType::bf16:
            std::memcpy(&half, source, sizeof half);
            return element(bf16_to_float(half), kBF16.min_exponent());
        case OperandType::tf32:
            std::memcpy(&word, source, sizeof word);
            return element(bits_float(word & ~0x1FFFu), kTF32.min_exponent());
    }
    return {};
}

// One operand, decoded once: values[k][row] (a row per k, so that a loop over rows runs over consecutive
// memory). A row with a NaN or an infinity is marked and left out of the fast path.
template <class Real>
struct Operand {
    int rows;
    std::vector<Real> values;
    std::vector<int16_t> exponents;
    std::vector<uint8_t> not_finite;

    Operand(OperandType type, bool negate, int rows, const uint8_t* tile)
        : rows(rows), not_finite(size_t(rows)) {
        int size = element_bytes(type);
        int depth = kTileBytes / size;
        values.resize(size_t(depth) * size_t(rows));
        exponents.resize(values.size());
        for (int row = 0; row < rows; ++row) {
            for (int k = 0; k < depth; ++k) {
                Element e = decoded(type, tile + row * kTileBytes + k * size);
                not_finite[size_t(row)] |= uint8_t(!std::isfinite(e.value));
                size_t at = size_t(k) * size_t(rows) + size_t(row);
                values[at] = Real(negate ? -e.value : e.value);
                exponents[at] = int16_t(e.exponent);
            }
        }
    }

private:
    static Element decoded(OperandType type, const uint8_t* source) {
        if (type != OperandType::e4m3) return load_element(type, source);
        static const std::vector<Element> table = [] {
            std::vector<Element> elements(256);
            for (int code = 0; code < 256; ++code) {
                uint8_t byte = uint8_t(code);
                elements[size_t(code)] = load_element(OperandType::e4m3, &byte);
            }
            return elements;
        }();
        return table[*source];
    }
};

// 2^exponent of a double by its bits; exponent within the normal range.
double power_of_two(int exponent) {
    uint64_t bits = uint64_t(exponent + 1023) << 52;
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Truncated toward zero to `fraction_bits` bits below FP32's leading place (the smallest one for a
// subnormal).
float truncate_to_float(double x, int fraction_bits) {
    if (x == 0) return 0;  // a sum of zero is +0, whatever the signs of its terms
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    int exponent = int(bits >> 52 & 0x7FF) - 1023;
    if (exponent >= -126) {
        bits &= ~((uint64_t(1) << (52 - fraction_bits)) - 1);
        std::memcpy(&x, &bits, sizeof x);
        return exponent > 127
                   ? std::copysign(std::numeric_limits<float>::infinity(), float(bits >> 63 ? -1 : 1))
                   : float(x);
    }
    double quantum = power_of_two(-126 - fraction_bits);
    return float(std::trunc(x / quantum) * quantum) + 0.0f;
}

float round_result(const MmaConfig& config, double sum) {
    if (config.d == AccumulatorType::f32)
        return truncate_to_float(sum, element_bytes(config.a) == 1 ? 13 : 23);
    uint32_t code = encode(sum, kF16);
    return f16_to_float(uint16_t(code)) + 0.0f;
}

float special_result(const MmaConfig& config, double sum) {
    if (std::isnan(sum)) return bits_float(config.d == AccumulatorType::f32 ? 0x7FFFFFFF : 0x7FFFE000);
    return float(sum);
}

// Vectors of the compiler's own extension (g++, clang++): the same code for every instruction set.
constexpr int kLanes = 8;

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class Real>
using Vector = typename VectorOf<Real>::type;
using IntVector = Vector<int32_t>;
using ShortVector = Vector<int16_t>;

template <class V, class T>
inline void load(V& vector, const T* source) {
    std::memcpy(&vector, source, sizeof vector);
}

// Row `i` of the tile: sums[j] = Σ_k of the truncated products, in units of 2^(max_exponents[j] - F).
template <class Real, int F>
void sum_row(const Operand<Real>& a, const Operand<Real>& b, int i, int depth,
             const int16_t* accumulator_exponents, int16_t* max_exponents, double* sums) {
    // Below this the scale would leave the type's range; only an accumulator can have a smaller exponent.
    constexpr int kMinScaleExponent = sizeof(Real) == 4 ? -100 : -900;
    const int n = b.rows;
    for (int j = 0; j < n; j += kLanes) {
        ShortVector largest, exponents;
        load(largest, accumulator_exponents + j);
        for (int k = 0; k < depth; ++k) {
            int16_t ea = a.exponents[size_t(k * kTileRows + i)];
            load(exponents, &b.exponents[size_t(k * n + j)]);
            exponents += ea;
            largest = exponents > largest ? exponents : largest;
        }
        std::memcpy(max_exponents + j, &largest, sizeof largest);

        Real scales[kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
            scales[lane] = Real(power_of_two(F - std::max(int(largest[lane]), kMinScaleExponent)));
        Vector<Real> scale, values;
        load(scale, scales);
        // A term has F + 2 bits: 32-bit sums hold 32 terms of fp8, not 16 of the wider types.
        IntVector low{}, high{};
        for (int k = 0; k < depth; ++k) {
            Real va = a.values[size_t(k * kTileRows + i)];
            load(values, &b.values[size_t(k * n + j)]);
            IntVector term =
                __builtin_convertvector(values * va * scale, IntVector);  // truncates toward zero
            if (F <= 13 || k % 2 == 0)
                low += term;
            else
                high += term;
        }
        for (int lane = 0; lane < kLanes; ++lane) sums[j + lane] = double(low[lane]) + double(high[lane]);
    }
}

template <class Real, int F>
void truncated_multiply(const MmaConfig& config, const uint8_t* a_tile, const uint8_t* b_tile, float* d) {
    const int depth = kTileBytes / element_bytes(config.a);
    const int n = config.n;
    Operand<Real> a(config.a, config.negate_a, kTileRows, a_tile);
    Operand<Real> b(config.b, config.negate_b, n, b_tile);
    const int min_exponent = config.d == AccumulatorType::f32 ? -126 : kF16.min_exponent();
    int16_t accumulator_exponents[kMaxTileColumns], max_exponents[kMaxTileColumns];
    double sums[kMaxTileColumns];

    for (int i = 0; i < kTileRows; ++i) {
        float* row = d + i * n;
        for (int j = 0; j < n; ++j) {
            float c = config.scale_d ? row[j] : 0.0f;
            int field = int(float_bits(c) >> 23 & 0xFF);
            accumulator_exponents[j] =
                int16_t(c == 0 || field == 255 ? kZeroExponent : std::max(field - 127, min_exponent));
        }
        sum_row<Real, F>(a, b, i, depth, accumulator_exponents, max_exponents, sums);
        for (int j = 0; j < n; ++j) {
            double c = config.scale_d ? row[j] : 0.0;
            if (a.not_finite[size_t(i)] || b.not_finite[size_t(j)] || !std::isfinite(c)) {
                double sum = c;
                for (int k = 0; k < depth; ++k)
                    sum += double(a.values[size_t(k * kTileRows + i)]) * double(b.values[size_t(k * n + j)]);
                if (!std::isfinite(sum)) {
                    row[j] = special_result(config, sum);
                    continue;
                }
            }
            int largest = max_exponents[j];
            if (largest <= kZeroExponent / 2) {
                row[j] = 0;
                continue;
            }
            double sum = sums[j] + std::trunc(c * power_of_two(F - largest));
            row[j] = round_result(config, sum * power_of_two(largest - F));
        }
    }
}

void exact_multiply(const MmaConfig& config, const uint8_t* a_tile, const uint8_t* b_tile, float* d) {
    const int depth = kTileBytes / element_bytes(config.a);
    Operand<float> a(config.a, config.negate_a, kTileRows, a_tile);
    Operand<float> b(config.b, config.negate_b, config.n, b_tile);
    for (int i = 0; i < kTileRows; ++i) {
        for (int j = 0; j < config.n; ++j) {
            float& out = d[i * config.n + j];
            float sum = config.scale_d ? out : 0.0f;
            for (int k = 0; k < depth; ++k)
                sum = std::fma(a.values[size_t(k * kTileRows + i)], b.values[size_t(k * config.n + j)], sum);
            if (config.d == AccumulatorType::f16) sum = f16_to_float(uint16_t(encode(sum, kF16)));
            out = std::isnan(sum) ? special_result(config, sum) : sum;
        }
    }
}

}  // namespace

std::string why_invalid(const MmaConfig& config) {
    bool fp8 = element_bytes(config.a) == 1;
    if (config.n < 8 || config.n > kMaxTileColumns || config.n % 8 != 0)
        return "n = " + std::to_string(config.n) + ", expected a multiple of 8 from 8 to 256";
    if (fp8 ? element_bytes(config.b) != 1 : config.a != config.b)
        return "operand types differ; only e4m3 and e5m2 may be mixed";
    if (config.d == AccumulatorType::f16 && !fp8 && config.a != OperandType::f16)
        return "an f16 accumulator needs f16, e4m3 or e5m2 operands";
    return "";
}

void multiply_accumulate(const MmaConfig& config, const uint8_t* a, const uint8_t* b, float* d) {
    if (config.exact_accumulate)
        exact_multiply(config, a, b, d);
    else if (element_bytes(config.a) == 1)
        truncated_multiply<float, 13>(config, a, b, d);
    else
        truncated_multiply<double, 25>(config, a, b, d);
}

// ---- Operands in shared memory
// ----------------------------------------------------------------------------------

MatrixDescriptor MatrixDescriptor::decode(uint64_t bits) {
    constexpr uint32_t kSwizzles[4] = {0, 128, 64, 32};
    auto field = [bits](int at) { return uint32_t(bits >> at & 0x3FFF) << 4; };
    MatrixDescriptor descriptor;
    descriptor.start = field(0);
    descriptor.leading_offset = field(16);
    descriptor.stride_offset = field(32);
    descriptor.base_offset = uint32_t(bits >> 49 & 7);
    descriptor.swizzle = kSwizzles[bits >> 62];
    return descriptor;
}

void operand_chunk_addresses(const MatrixDescriptor& descriptor, bool mn_major, int rows,
                             uint32_t* addresses) {
    // The swizzle permutes the 16-byte columns of a pattern of 8 lines of 128 bytes: column bits 4..6 of the
    // address are xored with line bits 7..9 (fewer of them for the narrower patterns), counted from the
    // pattern's start.
    const uint32_t column_mask = descriptor.swizzle == 0 ? 0 : descriptor.swizzle / 16 - 1;
    const uint32_t atom = std::max(descriptor.swizzle, 16u);
    const uint32_t columns = atom / 16;
    auto place = [&](uint32_t offset) {
        uint32_t address = (descriptor.start + offset) & 0x3FFFF;
        return address ^ (((address >> 7) - descriptor.base_offset) & column_mask) << 4;
    };
    const uint32_t lbo = descriptor.leading_offset, sbo = descriptor.stride_offset;
    const uint32_t count = uint32_t(rows) * 2;
    for (uint32_t i = 0; i < count; ++i) {
        if (!mn_major) {
            uint32_t row = i / 2, half = i % 2;
            uint32_t along_k = descriptor.swizzle == 0 ? half * lbo : half * 16;
            addresses[i] = place(row / 8 * sbo + row % 8 * atom + along_k);
        } else {
            uint32_t groups = uint32_t(rows) / 8;
            uint32_t k = i / groups, group = i % groups;
            addresses[i] =
                descriptor.swizzle == 0
                    ? place(group * sbo + k / 8 * lbo + k % 8 * 16)
                    : place(group / columns * lbo + group % columns * 16 + k / 8 * sbo + k % 8 * atom);
        }
    }
}

void assemble_operand(bool mn_major, int rows, const uint8_t* chunks, uint8_t* tile) {
    if (!mn_major) {
        std::memcpy(tile, chunks, size_t(rows) * kTileBytes);
        return;
    }
    const int groups = rows / 8;
    for (int i = 0; i < rows * 2; ++i) {
        int k = i / groups, first = i % groups * 8;
        for (int r = 0; r < 8; ++r)
            std::memcpy(tile + (first + r) * kTileBytes + k * 2, chunks + i * 16 + r * 2, 2);
    }
}

// ---- Register fragments
// -----------------------------------------------------------------------------------------

TilePosition accumulator_position(AccumulatorType type, int thread, int index) {
    if (type == AccumulatorType::f16) index *= 2;  // a register holds two columns
    int lane = thread % 32;
    return {thread / 32 * 16 + lane / 4 + index / 2 % 2 * 8, index / 4 * 8 + lane % 4 * 2 + index % 2};
}

TilePosition a_fragment_position(int thread, int index) {
    int lane = thread % 32;
    return {thread / 32 * 16 + lane / 4 + index % 2 * 8, index / 2 * 16 + lane % 4 * 4};
}

void ldmatrix_distribute(const uint8_t (*rows)[16], bool transposed, uint32_t* registers) {
    auto at = [rows](int row, int column) {
        uint16_t value;
        std::memcpy(&value, rows[row] + column * 2, sizeof value);
        return uint32_t(value);
    };
    for (int lane = 0; lane < 32; ++lane) {
        int line = lane / 4, pair = lane % 4 * 2;
        registers[lane] = transposed ? at(pair, line) | at(pair + 1, line) << 16
                                     : at(line, pair) | at(line, pair + 1) << 16;
    }
}

void stmatrix_collect(const uint32_t* registers, bool transposed, uint8_t (*rows)[16]) {
    for (int lane = 0; lane < 32; ++lane) {
        int line = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            uint16_t value = uint16_t(registers[lane] >> (16 * i));
            uint8_t* target = transposed ? rows[pair + i] + line * 2 : rows[line] + (pair + i) * 2;
            std::memcpy(target, &value, sizeof value);
        }
    }
}

}  // namespace dsv3
