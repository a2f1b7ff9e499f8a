#pragma once

#include <cstdint>
#include <string_view>

namespace dsv3::emulator {

/// PTX fundamental types. Packed forms keep the name of the element with the count behind.
enum class Type : uint8_t {
    None, Pred,
    B8, B16, B32, B64, B128,
    U8, U16, U32, U64,
    S8, S16, S32, S64,
    F16, F16x2, BF16, BF16x2, F32, F64, TF32,
    E4M3, E5M2, E4M3x2, E5M2x2,
};

enum class Space : uint8_t { Generic, Global, Shared, SharedCluster, Local, Param, Const, Reg };

inline int size_of(Type t) {
    switch (t) {
        case Type::B8: case Type::U8: case Type::S8: case Type::E4M3: case Type::E5M2: return 1;
        case Type::B16: case Type::U16: case Type::S16: case Type::F16: case Type::BF16:
        case Type::E4M3x2: case Type::E5M2x2: return 2;
        case Type::B64: case Type::U64: case Type::S64: case Type::F64: return 8;
        case Type::B128: return 16;
        case Type::None: case Type::Pred: return 0;
        default: return 4;
    }
}

inline bool is_signed(Type t) { return t >= Type::S8 && t <= Type::S64; }
inline bool is_float(Type t) { return t >= Type::F16; }
inline bool is_integer(Type t) { return t >= Type::B8 && t <= Type::S64; }

/// None for a word that names no type.
inline Type parse_type(std::string_view s) {
    struct Row { std::string_view name; Type type; };
    static constexpr Row rows[] = {
        {"pred", Type::Pred}, {"b8", Type::B8}, {"b16", Type::B16}, {"b32", Type::B32}, {"b64", Type::B64},
        {"b128", Type::B128}, {"u8", Type::U8}, {"u16", Type::U16}, {"u32", Type::U32}, {"u64", Type::U64},
        {"s8", Type::S8}, {"s16", Type::S16}, {"s32", Type::S32}, {"s64", Type::S64}, {"f16", Type::F16},
        {"f16x2", Type::F16x2}, {"bf16", Type::BF16}, {"bf16x2", Type::BF16x2}, {"f32", Type::F32},
        {"f64", Type::F64}, {"tf32", Type::TF32}, {"e4m3", Type::E4M3}, {"e5m2", Type::E5M2},
        {"e4m3x2", Type::E4M3x2}, {"e5m2x2", Type::E5M2x2}};
    for (const Row& row : rows)
        if (row.name == s) return row.type;
    return Type::None;
}

}  // namespace dsv3::emulator
