// Bits and predicates: logic, shifts, fields, setp, selp.

#include <cmath>

#include "lanes.hpp"
#include "numerics.hpp"

namespace dsv3::emulator {
namespace {

struct And { template <class T> T operator()(T a, T b) const { return static_cast<T>(a & b); } };
struct Or { template <class T> T operator()(T a, T b) const { return static_cast<T>(a | b); } };
struct Xor { template <class T> T operator()(T a, T b) const { return static_cast<T>(a ^ b); } };

template <class F>
Flow logic_pred(Context& c, const Inst& i) {
    uint32_t a = c.pred(i.a[1]), b = c.pred(i.a[2]);
    if (i.flags & 1) a = ~a;
    if (i.flags & 2) b = ~b;
    c.set_pred(i.a[0], F()(a, b));
    return Flow::Next;
}
template <class F>
void logic(Decode& d) {
    Type t = d.take_type();
    if (t == Type::Pred) {
        d.expect_count(3, 3);
        bool na, nb;
        d.inst.a[1] = d.pred_src(d.at(1), &na);
        d.inst.a[2] = d.pred_src(d.at(2), &nb);
        d.inst.a[0] = d.pred_dst(d.at(0));
        d.inst.flags = na | nb << 1;
        return d.finish(logic_pred<F>, Class::Integer);
    }
    operands(d, t, {t, t});
    switch (t) {
        case Type::B16: return d.finish(binary<uint16_t, uint16_t, uint16_t, F>, Class::Integer);
        case Type::B32: return d.finish(binary<uint32_t, uint32_t, uint32_t, F>, Class::Integer);
        case Type::B64: return d.finish(binary<uint64_t, uint64_t, uint64_t, F>, Class::Integer);
        default: d.unsupported("of this type");
    }
}
Flow not_pred(Context& c, const Inst& i) {
    c.set_pred(i.a[0], i.flags & 1 ? c.pred(i.a[1]) : ~c.pred(i.a[1]));
    return Flow::Next;
}

template <class T, template <class> class F>
void shift_of(Decode& d) { d.finish(binary<T, T, uint32_t, F<T>>, Class::Integer); }
template <class T> struct Shl { T operator()(T a, uint32_t n) const { return n >= sizeof(T) * 8 ? T(0) : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << n); } };
template <class T> struct Shr { T operator()(T a, uint32_t n) const {
    constexpr uint32_t bits = sizeof(T) * 8;
    if (n >= bits) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
    return static_cast<T>(a >> n);
} };
template <template <class> class F>
void shift(Decode& d) {
    Type t = d.take_type();
    operands(d, t, {t, Type::U32});
    if (!with_integer(t, [&](auto x) { shift_of<decltype(x), F>(d); })) d.unsupported("of this type");
}

template <bool left, bool wrapped> struct Funnel { uint32_t operator()(uint32_t a, uint32_t b, uint32_t n) const {
    n = wrapped ? n & 31 : std::min(n, 32u);
    uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    return left ? static_cast<uint32_t>((both << n) >> 32) : static_cast<uint32_t>(both >> n);
} };

template <class T> struct Bfe { T operator()(T a, uint32_t b, uint32_t c) const {
    constexpr uint32_t bits = sizeof(T) * 8;
    uint32_t pos = b & 0xFF, len = c & 0xFF;
    using V = std::make_unsigned_t<T>;
    bool sign = false;
    if (std::is_signed_v<T> && len) sign = static_cast<V>(a) >> std::min(pos + len - 1, bits - 1) & 1;
    V r = 0;
    for (uint32_t i = 0; i < bits; i++) {
        V bit = i < len && pos + i < bits ? static_cast<V>(a) >> (pos + i) & 1 : sign;
        r |= bit << i;
    }
    return static_cast<T>(r);
} };
template <class T>
Flow bfi(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]), *p = c.src(i.a[3]), *n = c.src(i.a[4]);
    each<T>(c, i.a[0], [=](int l) {
        constexpr uint32_t bits = sizeof(T) * 8;
        uint32_t pos = p[l] & 0xFF, len = n[l] & 0xFF;
        T x = get<T>(a, l), y = get<T>(b, l);
        for (uint32_t k = 0; k < len && pos + k < bits; k++) {
            T bit = static_cast<T>(T(1) << (pos + k));
            y = static_cast<T>((y & ~bit) | (static_cast<T>(x >> k & 1) << (pos + k)));
        }
        return y;
    });
    return Flow::Next;
}

template <class T> struct Popc { uint32_t operator()(T a) const { return static_cast<uint32_t>(__builtin_popcountll(a)); } };
template <class T> struct Clz { uint32_t operator()(T a) const { return a ? static_cast<uint32_t>(__builtin_clzll(a)) - (64 - sizeof(T) * 8) : sizeof(T) * 8; } };
template <class T> struct Brev { T operator()(T a) const {
    T r = 0;
    for (size_t i = 0; i < sizeof(T) * 8; i++) r = static_cast<T>(r << 1 | (a >> i & 1));
    return r;
} };
template <class T, bool shift> struct Bfind { uint32_t operator()(T a) const {
    using V = std::make_unsigned_t<T>;
    V x = static_cast<V>(a);
    if (std::is_signed_v<T> && a < 0) x = static_cast<V>(~x);
    if (x == 0) return UINT32_MAX;
    uint32_t at = 63 - static_cast<uint32_t>(__builtin_clzll(x));
    return shift ? static_cast<uint32_t>(sizeof(T) * 8 - 1) - at : at;
} };

Flow lop3(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]), *e = c.src(i.a[3]);
    uint32_t table = static_cast<uint32_t>(i.imm);
    each<uint32_t>(c, i.a[0], [=](int l) {
        uint32_t r = 0, x = a[l], y = b[l], z = e[l];
        for (uint32_t k = 0; k < 8; k++)
            if (table >> k & 1) r |= (k & 4 ? x : ~x) & (k & 2 ? y : ~y) & (k & 1 ? z : ~z);
        return r;
    });
    return Flow::Next;
}

template <int mode> struct Prmt { uint32_t operator()(uint32_t a, uint32_t b, uint32_t sel) const {
    uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t r = 0;
    for (uint32_t k = 0; k < 4; k++) {
        uint32_t s = sel >> (4 * k) & 0xF, n = sel & 3, at;
        bool sign = false;
        switch (mode) {
            case 0: at = s & 7, sign = s & 8; break;
            case 1: at = n + k; break;                                  // f4e
            case 2: at = (n - k) & 7; break;                            // b4e
            case 3: at = n; break;                                      // rc8
            case 4: at = std::max(n, k); break;                         // ecl
            case 5: at = std::min(n, k); break;                         // ecr
            default: at = (n & 1) * 2 + (k & 1); break;                 // rc16
        }
        uint32_t byte = static_cast<uint32_t>(bytes >> (8 * at)) & 0xFF;
        if (sign) byte = byte & 0x80 ? 0xFF : 0;
        r |= byte << (8 * k);
    }
    return r;
} };

// ---- comparison
enum Compare { Eq, Ne, Lt, Le, Gt, Ge, Lo, Ls, Hi, Hs, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan, CompareCount };
constexpr const char* compare_names[] = {"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs",
                                         "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
template <class T, int op> bool compare(T a, T b) {
    bool nan = false;
    if constexpr (std::is_floating_point_v<T>) nan = a != a || b != b;
    switch (op) {
        case Eq: return a == b;
        case Ne: return a != b && !nan;
        case Lt: case Lo: return a < b;
        case Le: case Ls: return a <= b;
        case Gt: case Hi: return a > b;
        case Ge: case Hs: return a >= b;
        case Equ: return a == b || nan;
        case Neu: return a != b || nan;
        case Ltu: return a < b || nan;
        case Leu: return a <= b || nan;
        case Gtu: return a > b || nan;
        case Geu: return a >= b || nan;
        case Num: return !nan;
        default: return nan;
    }
}
struct HalfF16 { static constexpr bool bf = false; };
struct HalfBF16 { static constexpr bool bf = true; };
template <class T> struct Load { static T at(const uint32_t* p, int l) { return get<T>(p, l); } };
template <> struct Load<HalfF16> { static float at(const uint32_t* p, int l) { return f16_to_float(static_cast<uint16_t>(p[l])); } };
template <> struct Load<HalfBF16> { static float at(const uint32_t* p, int l) { return bf16_to_float(static_cast<uint16_t>(p[l])); } };

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

enum : uint32_t { ftz = 1, negate_c = 2, combine_and = 4, combine_or = 8, combine_xor = 16 };
template <class T, int op>
uint32_t compared(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[2]), *b = c.src(i.a[3]);
    bool f = i.flags & ftz;
    uint32_t r = each_bit(c, [=](int l) {
        auto x = Load<T>::at(a, l), y = Load<T>::at(b, l);
        if constexpr (std::is_same_v<decltype(x), float>) if (f) x = flush(x), y = flush(y);
        return compare<decltype(x), op>(x, y);
    });
    return r;
}
template <class T, int op>
Flow setp(Context& c, const Inst& i) {
    uint32_t r = compared<T, op>(c, i), other = ~r;
    if (i.flags & (combine_and | combine_or | combine_xor)) {
        uint32_t p = i.flags & negate_c ? ~c.pred(i.a[4]) : c.pred(i.a[4]);
        auto join = [&](uint32_t x) { return i.flags & combine_and ? x & p : i.flags & combine_or ? x | p : x ^ p; };
        r = join(r), other = join(other);
    }
    c.set_pred(i.a[0], r);
    if (i.a[1] != no_ref) c.set_pred(i.a[1], other);
    return Flow::Next;
}
template <class T, int op>
Flow set(Context& c, const Inst& i) {
    uint32_t r = compared<T, op>(c, i);
    if (i.flags & (combine_and | combine_or | combine_xor)) {
        uint32_t p = i.flags & negate_c ? ~c.pred(i.a[4]) : c.pred(i.a[4]);
        r = i.flags & combine_and ? r & p : i.flags & combine_or ? r | p : r ^ p;
    }
    uint32_t yes = static_cast<uint32_t>(i.imm);
    each<uint32_t>(c, i.a[0], [=](int l) { return r >> l & 1 ? yes : 0; });
    return Flow::Next;
}
template <class T, bool to_pred, int op = 0>
Execute pick(int which) {
    if constexpr (op == CompareCount) return nullptr;
    else return which == op ? (to_pred ? setp<T, op> : set<T, op>) : pick<T, to_pred, op + 1>(which);
}
template <bool to_pred>
Execute pick_type(Type t, int which) {
    switch (t) {
        case Type::B16: case Type::U16: return pick<uint16_t, to_pred>(which);
        case Type::S16: return pick<int16_t, to_pred>(which);
        case Type::B32: case Type::U32: return pick<uint32_t, to_pred>(which);
        case Type::S32: return pick<int32_t, to_pred>(which);
        case Type::B64: case Type::U64: return pick<uint64_t, to_pred>(which);
        case Type::S64: return pick<int64_t, to_pred>(which);
        case Type::F32: return pick<float, to_pred>(which);
        case Type::F64: return pick<double, to_pred>(which);
        case Type::F16: return pick<HalfF16, to_pred>(which);
        case Type::BF16: return pick<HalfBF16, to_pred>(which);
        default: return nullptr;
    }
}
void comparison(Decode& d, bool to_pred) {
    int which = -1;
    for (int k = 0; k < CompareCount && which < 0; k++)
        if (d.take(compare_names[k])) which = k;
    if (which < 0) d.unsupported("without a comparison");
    if (d.take("ftz")) d.inst.flags |= ftz;
    bool combined = true;
    if (d.take("and")) d.inst.flags |= combine_and;
    else if (d.take("or")) d.inst.flags |= combine_or;
    else if (d.take("xor")) d.inst.flags |= combine_xor;
    else combined = false;
    Type result = to_pred ? Type::Pred : d.take_type(), t = d.take_type();
    d.expect_count(combined ? 4 : 3, combined ? 4 : 3);
    d.inst.a[2] = d.src(1, t);
    d.inst.a[3] = d.src(2, t);
    bool negated = false;
    if (combined) d.inst.a[4] = d.pred_src(d.at(3), &negated);
    if (negated) d.inst.flags |= negate_c;
    if (to_pred) {
        const Operand& o = d.at(0);
        bool pair = o.kind == Operand::Pair;
        d.inst.a[0] = d.pred_dst(pair ? o.items[0] : o);
        if (pair) d.inst.a[1] = d.pred_dst(o.items[1]);
    } else {
        if (size_of(result) != 4 || (is_float(result) && result != Type::F32)) d.unsupported("with this result type");
        d.inst.a[0] = d.dst(0, result);
        d.inst.imm = result == Type::F32 ? 0x3F800000 : 0xFFFFFFFF;
    }
    Execute e = to_pred ? pick_type<true>(t, which) : pick_type<false>(t, which);
    if (!e || (which >= Lo && which <= Hs && is_signed(t)) || (which >= Equ && !is_float(t))) d.unsupported("of this type");
    d.finish(e, Class::Integer);
}

template <class T>
Flow selp(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]);
    uint32_t p = i.flags ? ~c.pred(i.a[3]) : c.pred(i.a[3]);
    each<T>(c, i.a[0], [=](int l) { return p >> l & 1 ? get<T>(a, l) : get<T>(b, l); });
    return Flow::Next;
}
template <class T, class S>
Flow slct(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]), *e = c.src(i.a[3]);
    each<T>(c, i.a[0], [=](int l) { return get<S>(e, l) >= 0 ? get<T>(a, l) : get<T>(b, l); });
    return Flow::Next;
}
template <class F>
bool sized(Type t, F f) {
    if (t == Type::Pred || t == Type::None || size_of(t) < 2 || size_of(t) > 8) return false;
    if (size_of(t) == 2) f(uint16_t{});
    else if (size_of(t) == 4) f(uint32_t{});
    else f(uint64_t{});
    return true;
}

}  // namespace

void register_logic(OpTable& t) {
    t["and"] = logic<And>;
    t["or"] = logic<Or>;
    t["xor"] = logic<Xor>;
    t["not"] = [](Decode& d) {
        Type n = d.take_type();
        if (n == Type::Pred) {
            bool negated;
            d.expect_count(2, 2);
            d.inst.a[1] = d.pred_src(d.at(1), &negated);
            d.inst.a[0] = d.pred_dst(d.at(0));
            d.inst.flags = negated;
            return d.finish(not_pred, Class::Integer);
        }
        operands(d, n, {n});
        if (!with_integer(n, [&](auto x) { using T = decltype(x); struct Not { T operator()(T a) const { return static_cast<T>(~a); } }; d.finish(unary<T, T, Not>, Class::Integer); }))
            d.unsupported("of this type");
    };
    t["cnot"] = [](Decode& d) {
        Type n = d.take_type();
        operands(d, n, {n});
        if (!with_integer(n, [&](auto x) { using T = decltype(x); struct Not { T operator()(T a) const { return a == 0; } }; d.finish(unary<T, T, Not>, Class::Integer); }))
            d.unsupported("of this type");
    };
    t["shl"] = shift<Shl>;
    t["shr"] = shift<Shr>;
    t["shf"] = [](Decode& d) {
        bool left = d.take("l");
        if (!left && !d.take("r")) d.unsupported("without a direction");
        bool wrapped = d.take("wrap");
        if (!wrapped && !d.take("clamp")) d.unsupported("without .wrap or .clamp");
        if (d.take_type() != Type::B32) d.unsupported("of this type");
        operands(d, Type::B32, {Type::B32, Type::B32, Type::U32});
        using V = uint32_t;
        d.finish(left ? (wrapped ? ternary<V, V, V, V, Funnel<true, true>> : ternary<V, V, V, V, Funnel<true, false>>)
                      : (wrapped ? ternary<V, V, V, V, Funnel<false, true>> : ternary<V, V, V, V, Funnel<false, false>>), Class::Integer);
    };
    t["bfe"] = [](Decode& d) {
        Type n = d.take_type();
        operands(d, n, {n, Type::U32, Type::U32});
        if (size_of(n) < 4 || !with_integer(n, [&](auto x) { using T = decltype(x); d.finish(ternary<T, T, uint32_t, uint32_t, Bfe<T>>, Class::Integer); }))
            d.unsupported("of this type");
    };
    t["bfi"] = [](Decode& d) {
        Type n = d.take_type();
        operands(d, n, {n, n, Type::U32, Type::U32});
        if (n != Type::B32 && n != Type::B64) d.unsupported("of this type");
        d.finish(n == Type::B32 ? bfi<uint32_t> : bfi<uint64_t>, Class::Integer);
    };
    auto counting = [](auto pick_execute) {
        return [=](Decode& d) {
            Type n = d.take_type();
            operands(d, Type::U32, {n});
            if (n != Type::B32 && n != Type::B64) d.unsupported("of this type");
            d.finish(pick_execute(n == Type::B64), Class::Integer);
        };
    };
    t["popc"] = counting([](bool w) { return w ? unary<uint32_t, uint64_t, Popc<uint64_t>> : unary<uint32_t, uint32_t, Popc<uint32_t>>; });
    t["clz"] = counting([](bool w) { return w ? unary<uint32_t, uint64_t, Clz<uint64_t>> : unary<uint32_t, uint32_t, Clz<uint32_t>>; });
    t["brev"] = [](Decode& d) {
        Type n = d.take_type();
        operands(d, n, {n});
        if (n != Type::B32 && n != Type::B64) d.unsupported("of this type");
        d.finish(n == Type::B32 ? unary<uint32_t, uint32_t, Brev<uint32_t>> : unary<uint64_t, uint64_t, Brev<uint64_t>>, Class::Integer);
    };
    t["bfind"] = [](Decode& d) {
        bool amount = d.take("shiftamt");
        Type n = d.take_type();
        operands(d, Type::U32, {n});
        if (size_of(n) < 4 || !with_integer(n, [&](auto x) {
                using T = decltype(x);
                d.finish(amount ? unary<uint32_t, T, Bfind<T, true>> : unary<uint32_t, T, Bfind<T, false>>, Class::Integer);
            })) d.unsupported("of this type");
    };
    t["lop3"] = [](Decode& d) {
        if (d.take_type() != Type::B32) d.unsupported("of this type");
        d.expect_count(5, 5);
        for (size_t k = 1; k < 4; k++) d.inst.a[k] = d.src(k, Type::B32);
        d.inst.a[0] = d.dst(0, Type::B32);
        d.inst.imm = static_cast<int64_t>(d.literal(4) & 0xFF);
        d.finish(lop3, Class::Integer);
    };
    t["prmt"] = [](Decode& d) {
        if (d.take_type() != Type::B32) d.unsupported("of this type");
        using V = uint32_t;
        Execute e = ternary<V, V, V, V, Prmt<0>>;
        if (d.take("f4e")) e = ternary<V, V, V, V, Prmt<1>>;
        else if (d.take("b4e")) e = ternary<V, V, V, V, Prmt<2>>;
        else if (d.take("rc8")) e = ternary<V, V, V, V, Prmt<3>>;
        else if (d.take("ecl")) e = ternary<V, V, V, V, Prmt<4>>;
        else if (d.take("ecr")) e = ternary<V, V, V, V, Prmt<5>>;
        else if (d.take("rc16")) e = ternary<V, V, V, V, Prmt<6>>;
        operands(d, Type::B32, {Type::B32, Type::B32, Type::B32});
        d.inst.propagates = true;
        d.finish(e, Class::Move);
    };
    t["setp"] = [](Decode& d) { comparison(d, true); };
    t["set"] = [](Decode& d) { comparison(d, false); };
    t["selp"] = [](Decode& d) {
        Type n = d.take_type();
        d.expect_count(4, 4);
        d.inst.a[1] = d.src(1, n);
        d.inst.a[2] = d.src(2, n);
        bool negated;
        d.inst.a[3] = d.pred_src(d.at(3), &negated);
        d.inst.flags = negated;
        d.inst.a[0] = d.dst(0, n);
        d.inst.selects = d.inst.propagates = true;
        if (!sized(n, [&](auto x) { d.finish(selp<decltype(x)>, Class::Move); })) d.unsupported("of this type");
    };
    t["slct"] = [](Decode& d) {
        d.take("ftz");
        Type n = d.take_type(), s = d.take_type();
        if (s != Type::S32 && s != Type::F32) d.unsupported("of this type");
        operands(d, n, {n, n, s});
        if (!sized(n, [&](auto x) { using T = decltype(x); d.finish(s == Type::S32 ? slct<T, int32_t> : slct<T, float>, Class::Move); }))
            d.unsupported("of this type");
    };
}

}  // namespace dsv3::emulator
