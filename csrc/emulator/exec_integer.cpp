// Integer arithmetic: two's complement with wrap, except where PTX saturates.

#include <limits>

#include "lanes.hpp"

namespace dsv3::emulator {
namespace {

template <class T> using U = std::make_unsigned_t<T>;
/// Arithmetic never overflows as it is done in a wide unsigned type.
template <class T> T wrap(uint64_t x) { return static_cast<T>(static_cast<U<T>>(x)); }
template <class T> uint64_t ext(T x) { return static_cast<uint64_t>(static_cast<int64_t>(x)); }
template <class T> T high(T a, T b) {
    using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((static_cast<W>(a) * static_cast<W>(b)) >> (sizeof(T) * 8));
}
template <class T> T saturate(int64_t x) {
    return static_cast<T>(std::min<int64_t>(std::max<int64_t>(x, std::numeric_limits<T>::min()), std::numeric_limits<T>::max()));
}
template <class T> T divide(T a, T b) {
    if (b == 0) return static_cast<T>(-1);  // PTX leaves it unspecified; Hopper gives all ones
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return wrap<T>(0 - ext(a));
    return static_cast<T>(a / b);
}
template <class T> T remain(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
}

#define OP(name, expr) template <class T> struct name { T operator()(T a, T b) const { return expr; } }
OP(Add, wrap<T>(ext(a) + ext(b)));
OP(Sub, wrap<T>(ext(a) - ext(b)));
OP(MulLo, wrap<T>(ext(a) * ext(b)));
OP(MulHi, high<T>(a, b));
OP(Div, divide<T>(a, b));
OP(Rem, remain<T>(a, b));
OP(Min, a < b ? a : b);
OP(Max, a < b ? b : a);
OP(AddSat, saturate<T>(static_cast<int64_t>(a) + b));
OP(SubSat, saturate<T>(static_cast<int64_t>(a) - b));
OP(Mul24Lo, wrap<T>((ext(a) << 40 >> 40) * (ext(b) << 40 >> 40)));
#undef OP
template <class T> struct MinRelu { T operator()(T a, T b) const { return std::max<T>(std::min(a, b), 0); } };
template <class T> struct MaxRelu { T operator()(T a, T b) const { return std::max<T>(std::max(a, b), 0); } };

template <template <class> class F>
void simple(Decode& d, Type t) {
    operands(d, t, {t, t});
    if (!with_integer(t, [&](auto x) { using T = decltype(x); d.finish(binary<T, T, T, F<T>>, Class::Integer); }))
        d.unsupported("of this type");
}

template <class T, class W> struct MulWide { W operator()(T a, T b) const { return static_cast<W>(static_cast<W>(a) * static_cast<W>(b)); } };
template <class T, class W> struct MadWide {
    W operator()(T a, T b, W c) const { return wrap<W>(static_cast<U<W>>(static_cast<W>(a) * static_cast<W>(b)) + static_cast<U<W>>(c)); }
};
template <class T> struct MadLo { T operator()(T a, T b, T c) const { return wrap<T>(ext(a) * ext(b) + ext(c)); } };
template <class T> struct MadHi { T operator()(T a, T b, T c) const { return wrap<T>(ext(high<T>(a, b)) + ext(c)); } };
template <class T> struct Sad { T operator()(T a, T b, T c) const { return wrap<T>(ext(c) + (a < b ? ext(b) - ext(a) : ext(a) - ext(b))); } };

Type widened(Type t) {
    switch (t) {
        case Type::U16: return Type::U32;
        case Type::S16: return Type::S32;
        case Type::U32: return Type::U64;
        case Type::S32: return Type::S64;
        default: return Type::None;
    }
}
template <class F> bool with_widening(Type t, F f) {
    switch (t) {
        case Type::U16: f(uint16_t{}, uint32_t{}); return true;
        case Type::S16: f(int16_t{}, int32_t{}); return true;
        case Type::U32: f(uint32_t{}, uint64_t{}); return true;
        case Type::S32: f(int32_t{}, int64_t{}); return true;
        default: return false;
    }
}

// add.cc and its kin: the carry is one bit a lane.
enum : uint32_t { carry_in = 1, carry_out = 2, subtract = 4 };
template <class T>
Flow add_carry(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]);
    uint32_t in = c.w.carry, out = 0;
    bool sub = i.flags & subtract;
    each<T>(c, i.a[0], [&](int l) {
        unsigned __int128 x = get<T>(a, l), y = get<T>(b, l);
        unsigned __int128 carry = i.flags & carry_in ? in >> l & 1 : 0u;
        // The carry of a subtraction is a borrow.
        unsigned __int128 r = sub ? x - y - carry : x + y + carry;
        out |= static_cast<uint32_t>(r >> (sizeof(T) * 8) & 1) << l;
        return static_cast<T>(r);
    });
    if (i.flags & carry_out) c.w.carry = (in & ~c.mask) | (out & c.mask);
    return Flow::Next;
}
template <class T, bool hi>
Flow mad_carry(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]), *e = c.src(i.a[3]);
    uint32_t in = c.w.carry, out = 0;
    each<std::make_unsigned_t<T>>(c, i.a[0], [&](int l) {
        T x = get<T>(a, l), y = get<T>(b, l);
        U<T> product = static_cast<U<T>>(hi ? high<T>(x, y) : MulLo<T>()(x, y));
        unsigned __int128 r = static_cast<unsigned __int128>(product) + get<U<T>>(e, l) + (i.flags & carry_in ? in >> l & 1 : 0);
        out |= static_cast<uint32_t>(r >> (sizeof(T) * 8) & 1) << l;
        return static_cast<U<T>>(r);
    });
    if (i.flags & carry_out) c.w.carry = (in & ~c.mask) | (out & c.mask);
    return Flow::Next;
}

void with_carry(Decode& d, uint32_t flags) {
    if (d.take("cc")) flags |= carry_out;
    d.inst.flags = flags;
    Type t = d.take_type();
    operands(d, t, {t, t});
    if (!is_integer(t) || size_of(t) < 4) d.unsupported("of this type");
    d.finish(size_of(t) == 4 ? add_carry<uint32_t> : add_carry<uint64_t>, Class::Integer);
}
void mad_with_carry(Decode& d, uint32_t flags) {
    if (d.take("cc")) flags |= carry_out;
    d.inst.flags = flags;
    bool hi = d.take("hi");
    if (!hi && !d.take("lo")) d.unsupported("without .lo or .hi");
    Type t = d.take_type();
    operands(d, t, {t, t, t});
    bool known = with_integer(t, [&](auto x) {
        using T = decltype(x);
        if constexpr (sizeof(T) >= 4) d.finish(hi ? mad_carry<T, true> : mad_carry<T, false>, Class::Integer);
    });
    if (!known || !d.inst.execute) d.unsupported("of this type");
}

void add_or_sub(Decode& d, bool sub) {
    if (d.has("cc")) return with_carry(d, sub ? uint32_t{subtract} : 0);
    bool sat = d.take("sat");
    Type t = d.take_type();
    if (t == Type::U16 || t == Type::S16 || t == Type::U32 || t == Type::S32 || t == Type::U64 || t == Type::S64 ) {
        if (!sat) return sub ? simple<Sub>(d, t) : simple<Add>(d, t);
        if (t != Type::S32) d.unsupported("with .sat for a type other than .s32");
        return sub ? simple<SubSat>(d, t) : simple<AddSat>(d, t);
    }
    d.unsupported("of this type");
}

template <class T> struct Dp4a;
template <bool sa, bool sb>
Flow dp4a(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]), *e = c.src(i.a[3]);
    each<uint32_t>(c, i.a[0], [=](int l) {
        uint32_t sum = e[l];
        for (int k = 0; k < 4; k++) {
            uint8_t x = static_cast<uint8_t>(a[l] >> (8 * k)), y = static_cast<uint8_t>(b[l] >> (8 * k));
            int p = sa ? static_cast<int8_t>(x) : x, q = sb ? static_cast<int8_t>(y) : y;
            sum += static_cast<uint32_t>(p * q);
        }
        return sum;
    });
    return Flow::Next;
}

void min_or_max(Decode& d, bool max) {
    bool relu = d.take("relu");
    Type t = d.take_type();
    if (relu && t != Type::S32) d.unsupported("with .relu for this type");
    if (relu) return max ? simple<MaxRelu>(d, t) : simple<MinRelu>(d, t);
    max ? simple<Max>(d, t) : simple<Min>(d, t);
}

bool float_type(const Decode& d) {
    for (const char* t : {"f16", "f16x2", "bf16", "bf16x2"})
        if (d.has(t)) return true;
    return false;
}

/// One opcode serves integers, floats and halves: the type decides.
void dispatch(OpTable& t, const char* name, DecodeFn integer) {
    DecodeFn floating = t.count(name) ? t[name] : nullptr;
    t[name] = [=](Decode& d) {
        if ((d.has("f32") || d.has("f64") || float_type(d)) && floating) return floating(d);
        integer(d);
    };
}

}  // namespace

void register_integer(OpTable& t) {
    dispatch(t, "add", [](Decode& d) { add_or_sub(d, false); });
    dispatch(t, "sub", [](Decode& d) { add_or_sub(d, true); });
    t["addc"] = [](Decode& d) { with_carry(d, carry_in); };
    t["subc"] = [](Decode& d) { with_carry(d, carry_in | subtract); };
    t["madc"] = [](Decode& d) { mad_with_carry(d, carry_in); };
    dispatch(t, "mul", [](Decode& d) {
        if (d.take("wide")) {
            Type n = d.take_type();
            if (!with_widening(n, [&](auto x, auto w) {
                    using T = decltype(x); using W = decltype(w);
                    operands(d, widened(n), {n, n});
                    d.finish(binary<W, T, T, MulWide<T, W>>, Class::Integer);
                })) d.unsupported("of this type");
            return;
        }
        bool hi = d.take("hi");
        if (!hi && !d.take("lo")) d.unsupported("without .lo, .hi or .wide");
        Type n = d.take_type();
        hi ? simple<MulHi>(d, n) : simple<MulLo>(d, n);
    });
    t["mul24"] = [](Decode& d) {
        if (!d.take("lo")) d.unsupported("without .lo");
        Type n = d.take_type();
        if (n == Type::S32) return simple<Mul24Lo>(d, n);
        if (n != Type::U32) d.unsupported("of this type");
        operands(d, n, {n, n});
        struct Lo { uint32_t operator()(uint32_t a, uint32_t b) const { return (a & 0xFFFFFF) * (b & 0xFFFFFF); } };
        d.finish(binary<uint32_t, uint32_t, uint32_t, Lo>, Class::Integer);
    };
    dispatch(t, "mad", [](Decode& d) {
        if (d.has("cc")) return mad_with_carry(d, 0);
        if (d.take("wide")) {
            Type n = d.take_type();
            if (!with_widening(n, [&](auto x, auto w) {
                    using T = decltype(x); using W = decltype(w);
                    operands(d, widened(n), {n, n, widened(n)});
                    d.finish(ternary<W, T, T, W, MadWide<T, W>>, Class::Integer);
                })) d.unsupported("of this type");
            return;
        }
        bool hi = d.take("hi");
        if (!hi && !d.take("lo")) d.unsupported("without .lo, .hi or .wide");
        Type n = d.take_type();
        operands(d, n, {n, n, n});
        if (!with_integer(n, [&](auto x) {
                using T = decltype(x);
                d.finish(hi ? ternary<T, T, T, T, MadHi<T>> : ternary<T, T, T, T, MadLo<T>>, Class::Integer);
            })) d.unsupported("of this type");
    });
    t["sad"] = [](Decode& d) {
        Type n = d.take_type();
        operands(d, n, {n, n, n});
        if (!with_integer(n, [&](auto x) { using T = decltype(x); d.finish(ternary<T, T, T, T, Sad<T>>, Class::Integer); }))
            d.unsupported("of this type");
    };
    dispatch(t, "div", [](Decode& d) { simple<Div>(d, d.take_type()); });
    t["rem"] = [](Decode& d) { simple<Rem>(d, d.take_type()); };
    dispatch(t, "min", [](Decode& d) { min_or_max(d, false); });
    dispatch(t, "max", [](Decode& d) { min_or_max(d, true); });
    auto negative = [](bool absolute) {
        return [=](Decode& d) {
            Type n = d.take_type();
            operands(d, n, {n});
            if (!is_signed(n) || !with_integer(n, [&](auto x) {
                    using T = decltype(x);
                    struct Neg { T operator()(T a) const { return wrap<T>(0 - ext(a)); } };
                    struct Abs { T operator()(T a) const { return a < 0 ? wrap<T>(0 - ext(a)) : a; } };
                    d.finish(absolute ? unary<T, T, Abs> : unary<T, T, Neg>, Class::Integer);
                })) d.unsupported("of this type");
        };
    };
    dispatch(t, "neg", negative(false));
    dispatch(t, "abs", negative(true));
    t["dp4a"] = [](Decode& d) {
        // Operand types differ and the same word may stand twice, so they are read in order.
        Type a = d.take_type(), b = d.take_type();
        if (size_of(a) != 4 || size_of(b) != 4 || !is_integer(a) || !is_integer(b)) d.unsupported("of this type");
        operands(d, Type::U32, {Type::U32, Type::U32, Type::U32});
        bool sa = is_signed(a), sb = is_signed(b);
        d.finish(sa ? (sb ? dp4a<true, true> : dp4a<true, false>) : (sb ? dp4a<false, true> : dp4a<false, false>), Class::Integer);
    };
}

}  // namespace dsv3::emulator
