// Conversions between the number formats of Hopper's PTX, bit for bit.
//
// encode() is the definition: any finite double, any format, any rounding. The functions below it are the
// packed forms of PTX's cvt and fast paths for the conversions that sit in inner loops; the tests hold them
// to encode().
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace dsv3 {

enum class Rounding : uint8_t { nearest_even, nearest_away, toward_zero, down, up };

// A binary format below FP32. A code is sign | exponent | fraction; exponent 0 holds zero and the subnormals.
struct FloatFormat {
    int exponent_bits;
    int fraction_bits;
    int bias;
    uint32_t max_finite;  // code of the largest finite magnitude
    uint32_t infinity;    // 0: the format has none (E4M3)
    uint32_t nan;         // what PTX writes for NaN, whatever the sign and payload of the source

    constexpr uint32_t sign_bit() const { return 1u << (exponent_bits + fraction_bits); }
    constexpr int min_exponent() const { return 1 - bias; }
};

inline constexpr FloatFormat kE4M3{4, 3, 7, 0x7E, 0, 0x7F};
inline constexpr FloatFormat kE5M2{5, 2, 15, 0x7B, 0x7C, 0x7F};
inline constexpr FloatFormat kF16{5, 10, 15, 0x7BFF, 0x7C00, 0x7FFF};
inline constexpr FloatFormat kBF16{8, 7, 127, 0x7F7F, 0x7F80, 0x7FFF};
// TF32 proper is 19 bits wide; PTX keeps it in the upper 19 bits of a 32-bit register (see cvt_tf32).
inline constexpr FloatFormat kTF32{8, 10, 127, 0x3FBFF, 0x3FC00, 0x3FFFF};
inline constexpr FloatFormat kF32{8, 23, 127, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF};

struct ConversionOptions {
    Rounding rounding = Rounding::nearest_even;
    bool saturate =
        false;          // .satfinite: overflow and infinity give the largest finite magnitude; NaN stays NaN
    bool relu = false;  // .relu: negative results give +0; NaN stays NaN
};

// The code of `x` rounded once. Overflow without saturation follows IEEE 754: infinity or the largest finite
// value, by the rounding mode; NaN in a format without infinity.
uint32_t encode(double x, const FloatFormat& format, ConversionOptions options = {});

// The exact value of a code. Bits above the sign are ignored.
double decode(uint32_t code, const FloatFormat& format);

// Exact FP32 values of all 256 codes.
const std::array<float, 256>& e4m3_table();
const std::array<float, 256>& e5m2_table();

// ---- Packed forms of cvt: the first source goes to the upper half, as in PTX's `cvt d, a, b`
// --------------------

// cvt.rn.satfinite{.relu}.{e4m3x2,e5m2x2}.f32
uint16_t cvt_fp8x2_f32(float upper, float lower, const FloatFormat& format, bool relu = false);
// cvt.rn.satfinite{.relu}.{e4m3x2,e5m2x2}.f16x2
uint16_t cvt_fp8x2_f16x2(uint32_t pair, const FloatFormat& format, bool relu = false);
// cvt.rn{.relu}.f16x2.{e4m3x2,e5m2x2}; exact
uint32_t cvt_f16x2_fp8x2(uint16_t pair, const FloatFormat& format, bool relu = false);
// cvt.{rn,rz}{.relu}{.satfinite}.{f16x2,bf16x2}.f32
uint32_t cvt_half2_f32(float upper, float lower, const FloatFormat& format, ConversionOptions options = {});
// cvt.{rna,rn,rz}{.relu}{.satfinite}.tf32.f32: the 32-bit register, its low 13 bits zero (NaN: 0x7FFFFFFF)
uint32_t cvt_tf32_f32(float x, ConversionOptions options);

// ---- Fast paths
// -------------------------------------------------------------------------------------------------

inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float bf16_to_float(uint16_t code) { return bits_float(uint32_t(code) << 16); }

inline uint16_t float_to_bf16(float x) {
    uint32_t bits = float_bits(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float f16_to_float(uint16_t code);  // exact; a NaN keeps sign and payload
uint16_t float_to_f16(float x);     // round to nearest even; NaN gives 0x7FFF
uint8_t float_to_e4m3(float x);     // round to nearest even, saturating; NaN gives 0x7F
inline float e4m3_to_float(uint8_t code) { return e4m3_table()[code]; }
inline float e5m2_to_float(uint8_t code) { return e5m2_table()[code]; }

}  // namespace dsv3
