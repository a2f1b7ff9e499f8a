#include "numerics.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dsv3 {

namespace {

bool rounds_away(Rounding rounding, bool negative, bool odd, double remainder) {
    switch (rounding) {
        case Rounding::nearest_even: return remainder > 0.5 || (remainder == 0.5 && odd);
        case Rounding::nearest_away: return remainder >= 0.5;
        case Rounding::toward_zero: return false;
        case Rounding::down: return negative && remainder > 0;
        case Rounding::up: return !negative && remainder > 0;
    }
    return false;
}

uint32_t overflowed(const FloatFormat& format, const ConversionOptions& options, bool negative) {
    if (options.saturate) return format.max_finite;
    bool stays_finite = options.rounding == Rounding::toward_zero ||
                        (options.rounding == Rounding::down && !negative) ||
                        (options.rounding == Rounding::up && negative);
    if (stays_finite) return format.max_finite;
    return format.infinity != 0 ? format.infinity : format.nan;
}

std::array<float, 256> fp8_table(const FloatFormat& format) {
    std::array<float, 256> table;
    for (uint32_t code = 0; code < 256; ++code) table[code] = float(decode(code, format));
    return table;
}

}  // namespace

uint32_t encode(double x, const FloatFormat& format, ConversionOptions options) {
    if (std::isnan(x)) return format.nan;
    bool negative = std::signbit(x);
    if (options.relu && negative) return 0;
    uint32_t sign = negative ? format.sign_bit() : 0;
    if (std::isinf(x)) {
        if (options.saturate) return sign | format.max_finite;
        return format.infinity != 0 ? sign | format.infinity : format.nan;
    }
    double magnitude = std::fabs(x);
    if (magnitude == 0) return sign;

    int exponent = std::max(std::ilogb(magnitude), format.min_exponent());
    double scaled =
        std::ldexp(magnitude, format.fraction_bits - exponent);  // exact: at most 53 bits, or below 1
    double whole = std::floor(scaled);
    uint64_t significand = uint64_t(whole);
    if (rounds_away(options.rounding, negative, significand & 1, scaled - whole)) ++significand;
    // The implicit leading bit adds 1 to the exponent field, and so does a carry; a subnormal has neither.
    uint64_t code = (uint64_t(exponent - format.min_exponent()) << format.fraction_bits) + significand;
    if (code <= format.max_finite) return sign | uint32_t(code);
    uint32_t over = overflowed(format, options, negative);
    return over == format.nan ? over : sign | over;
}

double decode(uint32_t code, const FloatFormat& format) {
    double sign = code & format.sign_bit() ? -1.0 : 1.0;
    uint32_t magnitude = code & (format.sign_bit() - 1);
    if (magnitude > format.max_finite) {
        bool infinite = format.infinity != 0 && magnitude == format.infinity;
        return sign * (infinite ? std::numeric_limits<double>::infinity()
                                : std::numeric_limits<double>::quiet_NaN());
    }
    uint32_t field = magnitude >> format.fraction_bits;
    uint32_t fraction = magnitude & ((1u << format.fraction_bits) - 1);
    int exponent = format.min_exponent();
    if (field > 0) {
        fraction |= 1u << format.fraction_bits;
        exponent += int(field) - 1;
    }
    return sign * std::ldexp(double(fraction), exponent - format.fraction_bits);
}

const std::array<float, 256>& e4m3_table() {
    static const std::array<float, 256> table = fp8_table(kE4M3);
    return table;
}

const std::array<float, 256>& e5m2_table() {
    static const std::array<float, 256> table = fp8_table(kE5M2);
    return table;
}

uint16_t cvt_fp8x2_f32(float upper, float lower, const FloatFormat& format, bool relu) {
    ConversionOptions options{Rounding::nearest_even, true, relu};
    return uint16_t(encode(upper, format, options) << 8 | encode(lower, format, options));
}

uint16_t cvt_fp8x2_f16x2(uint32_t pair, const FloatFormat& format, bool relu) {
    return cvt_fp8x2_f32(f16_to_float(uint16_t(pair >> 16)), f16_to_float(uint16_t(pair)), format, relu);
}

uint32_t cvt_f16x2_fp8x2(uint16_t pair, const FloatFormat& format, bool relu) {
    ConversionOptions options{Rounding::nearest_even, false, relu};
    return encode(decode(pair >> 8, format), kF16, options) << 16 |
           encode(decode(pair & 0xFF, format), kF16, options);
}

uint32_t cvt_half2_f32(float upper, float lower, const FloatFormat& format, ConversionOptions options) {
    return encode(upper, format, options) << 16 | encode(lower, format, options);
}

uint32_t cvt_tf32_f32(float x, ConversionOptions options) {
    return std::isnan(x) ? 0x7FFFFFFF : encode(x, kTF32, options) << 13;
}

float f16_to_float(uint16_t code) {
    uint32_t sign = uint32_t(code & 0x8000) << 16;
    uint32_t field = (code >> 10) & 0x1F;
    uint32_t fraction = code & 0x3FF;
    if (field == 0x1F) return bits_float(sign | 0x7F800000 | fraction << 13);
    if (field == 0) return bits_float(sign | float_bits(float(fraction) * 0x1p-24f));
    return bits_float(sign | (field + 112) << 23 | fraction << 13);
}

uint16_t float_to_f16(float x) {
    uint32_t bits = float_bits(x);
    uint32_t sign = (bits >> 16) & 0x8000;
    uint32_t magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return 0x7FFF;
    if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {
        // Below 2^-14: adding 0.5 lets the FPU round to multiples of 2^-24, to nearest even.
        uint32_t rounded = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
        return uint16_t(sign | rounded);
    }
    return uint16_t(sign | ((magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13));
}

uint8_t float_to_e4m3(float x) {
    uint32_t bits = float_bits(x);
    uint32_t sign = (bits >> 24) & 0x80;
    uint32_t magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return 0x7F;
    if (magnitude >= float_bits(448.0f)) return uint8_t(sign | 0x7E);
    if (magnitude < float_bits(0x1p-6f)) {
        // Below 2^-6: adding 2^14 lets the FPU round to multiples of 2^-9, to nearest even.
        uint32_t rounded = float_bits(bits_float(magnitude) + 0x1p14f) - float_bits(0x1p14f);
        return uint8_t(sign | rounded);
    }
    return uint8_t(sign | ((magnitude - (120u << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20));
}

}  // namespace dsv3
