#pragma once

#include <cstring>
#include <type_traits>

#include "decode.hpp"
#include "machine.hpp"

namespace dsv3::emulator {

// A register holds 32 lanes of 4 or 8 bytes; a type of 1 or 2 bytes lies in the low bits of 4.
template <class T>
inline T get(const uint32_t* p, int lane) {
    T v;
    if constexpr (sizeof(T) == 8) {
        std::memcpy(&v, p + 2 * lane, 8);
    } else if constexpr (sizeof(T) == 4) {
        std::memcpy(&v, p + lane, 4);
    } else {
        std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t> low =
            static_cast<std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>(p[lane]);
        std::memcpy(&v, &low, sizeof(T));
    }
    return v;
}

template <class T>
inline void put(uint32_t* p, int lane, T v) {
    if constexpr (sizeof(T) == 8) {
        std::memcpy(p + 2 * lane, &v, 8);
    } else if constexpr (sizeof(T) == 4) {
        std::memcpy(p + lane, &v, 4);
    } else {
        std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t> low;
        std::memcpy(&low, &v, sizeof(T));
        p[lane] = low;
    }
}

/// d[lane] = f(lane) for the active lanes. Results gather in a buffer first, so that a destination may be a source and
/// the compiler can vectorise.
template <class T, class F>
inline void each(const Context& c, Ref d, F f) {
    uint32_t* out = c.dst(d);
    if (c.mask == ~0u) {
        T r[32];
        for (int l = 0; l < 32; l++) r[l] = f(l);
        for (int l = 0; l < 32; l++) put<T>(out, l, r[l]);
    } else {
        for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
            int l = __builtin_ctz(rest);
            put<T>(out, l, f(l));
        }
    }
}

template <class F>
inline void each_active(const Context& c, F f) {
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) f(__builtin_ctz(rest));
}

template <class F>
inline uint32_t each_bit(const Context& c, F f) {
    uint32_t bits = 0;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        bits |= static_cast<uint32_t>(f(l) ? 1 : 0) << l;
    }
    return bits;
}

// F is a stateless functor type: D F::operator()(A, B, C).
template <class D, class A, class F>
Flow unary(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    each<D>(c, i.a[0], [=](int l) { return F()(get<A>(a, l)); });
    return Flow::Next;
}
template <class D, class A, class B, class F>
Flow binary(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]);
    each<D>(c, i.a[0], [=](int l) { return F()(get<A>(a, l), get<B>(b, l)); });
    return Flow::Next;
}
template <class D, class A, class B, class C, class F>
Flow ternary(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]), *e = c.src(i.a[3]);
    each<D>(c, i.a[0], [=](int l) { return F()(get<A>(a, l), get<B>(b, l), get<C>(e, l)); });
    return Flow::Next;
}

inline void operands(Decode& d, Type result, std::initializer_list<Type> sources) {
    d.expect_count(sources.size() + 1, sources.size() + 1);
    size_t i = 1;
    for (Type t : sources) d.inst.a[i] = d.src(i, t), i++;
    d.inst.a[0] = d.dst(0, result);
    d.inst.type = result;
}

/// Calls f with a value of the C++ type of a PTX integer type.
template <class F>
bool with_integer(Type t, F f) {
    switch (t) {
        case Type::U16: case Type::B16: f(uint16_t{}); return true;
        case Type::S16: f(int16_t{}); return true;
        case Type::U32: case Type::B32: f(uint32_t{}); return true;
        case Type::S32: f(int32_t{}); return true;
        case Type::U64: case Type::B64: f(uint64_t{}); return true;
        case Type::S64: f(int64_t{}); return true;
        default: return false;
    }
}

}  // namespace dsv3::emulator
