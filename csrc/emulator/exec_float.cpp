// f32 and f64 arithmetic. IEEE 754 where PTX is; the .approx functions are the correctly computed ones, which lie
// within PTX's stated error but need not have Hopper's bits.

#include <cfenv>
#include <cmath>

#include "lanes.hpp"

namespace dsv3::emulator {
namespace {

enum : uint32_t { ftz = 1, sat = 2, round_shift = 2, round_mask = 3 << round_shift, nan_wins = 16, xor_sign = 32 };
enum Round : uint32_t { rn, rz, rm, rp };

template <class T> T canonical_nan();
template <> float canonical_nan<float>() { uint32_t b = 0x7FFFFFFF; float f; std::memcpy(&f, &b, 4); return f; }
template <> double canonical_nan<double>() { uint64_t b = 0x7FF8000000000000; double f; std::memcpy(&f, &b, 8); return f; }

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
double flush(double x) { return x; }

class WithRounding {
  public:
    explicit WithRounding(uint32_t flags) : mode_((flags & round_mask) >> round_shift) {
        static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
        if (mode_ != rn) std::fesetround(modes[mode_]);
    }
    ~WithRounding() { if (mode_ != rn) std::fesetround(FE_TONEAREST); }

  private:
    uint32_t mode_;
};

// The volatile operands keep the compiler from moving arithmetic across the change of rounding mode.
struct Add { template <class T> T operator()(volatile T a, volatile T b, T) const { return a + b; } };
struct Sub { template <class T> T operator()(volatile T a, volatile T b, T) const { return a - b; } };
struct Mul { template <class T> T operator()(volatile T a, volatile T b, T) const { return a * b; } };
struct Div { template <class T> T operator()(volatile T a, volatile T b, T) const { return a / b; } };
struct Fma { template <class T> T operator()(volatile T a, volatile T b, T c) const { volatile T e = c; return std::fma(a, b, e); } };
struct Sqrt { template <class T> T operator()(volatile T a, T, T) const { return std::sqrt(a); } };
struct Rcp { template <class T> T operator()(volatile T a, T, T) const { return T(1) / a; } };
template <double (*f)(double)> struct Approx { template <class T> T operator()(T a, T, T) const { return static_cast<T>(f(static_cast<double>(a))); } };
double rsqrt_of(double x) { return 1.0 / std::sqrt(x); }

template <class T, class F, int arity>
Flow arithmetic(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = arity > 1 ? c.src(i.a[2]) : a, *e = arity > 2 ? c.src(i.a[3]) : a;
    WithRounding rounding(i.flags);
    uint32_t flags = i.flags;
    each<T>(c, i.a[0], [=](int l) {
        T x = get<T>(a, l), y = get<T>(b, l), z = get<T>(e, l);
        if (flags & ftz) x = flush(x), y = flush(y), z = flush(z);
        T r = F()(x, y, z);
        if (flags & ftz) r = flush(r);
        if (flags & sat) r = r > T(0) ? (r < T(1) ? r : T(1)) : T(0);
        return r == r ? r : canonical_nan<T>();
    });
    return Flow::Next;
}

// Round to nearest without modifiers, in a form that vectorises.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("default", "arch=haswell")))
#endif
void fma_rows(const float* a, const float* b, const float* e, float* r) {
    for (int l = 0; l < 32; l++) r[l] = __builtin_fmaf(a[l], b[l], e[l]);
}
Flow fma_plain(Context& c, const Inst& i) {
    float a[32], b[32], e[32], r[32];
    std::memcpy(a, c.src(i.a[1]), sizeof a);
    std::memcpy(b, c.src(i.a[2]), sizeof b);
    std::memcpy(e, c.src(i.a[3]), sizeof e);
    fma_rows(a, b, e, r);
    each<float>(c, i.a[0], [&](int l) { return r[l] == r[l] ? r[l] : canonical_nan<float>(); });
    return Flow::Next;
}
template <int op>
Flow plain(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]);
    each<uint32_t>(c, i.a[0], [=](int l) {
        float x = get<float>(a, l), y = get<float>(b, l);
        float r = op == 0 ? x + y : op == 1 ? x - y : x * y;
        uint32_t bits;
        std::memcpy(&bits, &r, 4);
        return r == r ? bits : 0x7FFFFFFFu;
    });
    return Flow::Next;
}

uint32_t take_rounding(Decode& d) {
    if (d.take("rz")) return rz << round_shift;
    if (d.take("rm")) return rm << round_shift;
    if (d.take("rp")) return rp << round_shift;
    d.take("rn");
    return 0;
}
void take_flags(Decode& d) {
    d.inst.flags |= take_rounding(d);
    if (d.take("ftz")) d.inst.flags |= ftz;
    if (d.take("sat")) d.inst.flags |= sat;
}
void finish_as(Decode& d, Type t, int arity, Execute single, Execute twice) {
    if (arity == 1) operands(d, t, {t});
    else if (arity == 2) operands(d, t, {t, t});
    else operands(d, t, {t, t, t});
    if (t != Type::F32 && t != Type::F64) d.unsupported("of this type");
    if (t == Type::F64 && (d.inst.flags & (ftz | sat))) d.unsupported("with .ftz or .sat for .f64");
    d.finish(t == Type::F32 ? single : twice, Class::Float);
}
template <class F, int arity>
void decode_arithmetic(Decode& d, Execute fast = nullptr) {
    take_flags(d);
    Type t = d.take_type();
    bool fits = fast && d.inst.flags == 0;
    finish_as(d, t, arity, fits ? fast : arithmetic<float, F, arity>, arithmetic<double, F, arity>);
}

template <class T> T least(T a, T b, bool nan) {
    if (a != a || b != b) return nan || (a != a && b != b) ? canonical_nan<T>() : a != a ? b : a;
    return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T> T greatest(T a, T b, bool nan) {
    if (a != a || b != b) return nan || (a != a && b != b) ? canonical_nan<T>() : a != a ? b : a;
    return a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <class T, bool max>
Flow extreme(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]);
    uint32_t flags = i.flags;
    each<T>(c, i.a[0], [=](int l) {
        T x = get<T>(a, l), y = get<T>(b, l);
        if (flags & ftz) x = flush(x), y = flush(y);
        bool sign = std::signbit(x) != std::signbit(y);
        if (flags & xor_sign) x = std::fabs(x), y = std::fabs(y);
        T r = max ? greatest(x, y, flags & nan_wins) : least(x, y, flags & nan_wins);
        return flags & xor_sign && r == r ? std::copysign(r, sign ? T(-1) : T(1)) : r;
    });
    return Flow::Next;
}
template <bool max>
void decode_extreme(Decode& d) {
    if (d.take("ftz")) d.inst.flags |= ftz;
    if (d.take("NaN")) d.inst.flags |= nan_wins;
    if (d.take("xorsign")) {
        if (!d.take("abs")) d.unsupported("with .xorsign but no .abs");
        d.inst.flags |= xor_sign;
    }
    Type t = d.take_type();
    finish_as(d, t, 2, extreme<float, max>, extreme<double, max>);
}

template <class T, bool absolute>
Flow sign_bit(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    bool f = i.flags & ftz;
    each<T>(c, i.a[0], [=](int l) {
        T x = get<T>(a, l);
        if (f) x = flush(x);
        return absolute ? std::fabs(x) : -x;
    });
    return Flow::Next;
}
template <bool absolute>
void decode_sign(Decode& d) {
    if (d.take("ftz")) d.inst.flags |= ftz;
    Type t = d.take_type();
    finish_as(d, t, 1, sign_bit<float, absolute>, sign_bit<double, absolute>);
}

template <class F>
void decode_approx(Decode& d, bool always = true) {
    if (!d.take("approx") && always) d.unsupported("without .approx");
    if (d.take("ftz")) d.inst.flags |= ftz;
    Type t = d.take_type();
    if (t != Type::F32) d.unsupported("of this type");
    finish_as(d, t, 1, arithmetic<float, F, 1>, nullptr);
}

enum Testp { Finite, Infinite, Number, NotANumber, Normal, Subnormal };
template <class T>
Flow testp(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    c.set_pred(i.a[0], each_bit(c, [&](int l) {
        T x = get<T>(a, l);
        switch (i.imm) {
            case Finite: return std::isfinite(x);
            case Infinite: return std::isinf(x);
            case Number: return !std::isnan(x);
            case NotANumber: return std::isnan(x);
            case Normal: return std::isnormal(x);
            default: return std::fpclassify(x) == FP_SUBNORMAL;
        }
    }));
    return Flow::Next;
}
struct CopySign { template <class T> T operator()(T a, T b) const { return std::copysign(b, a); } };

}  // namespace

void register_float(OpTable& t) {
    t["add"] = [](Decode& d) { decode_arithmetic<Add, 2>(d, plain<0>); };
    t["sub"] = [](Decode& d) { decode_arithmetic<Sub, 2>(d, plain<1>); };
    t["mul"] = [](Decode& d) { decode_arithmetic<Mul, 2>(d, plain<2>); };
    t["fma"] = [](Decode& d) { decode_arithmetic<Fma, 3>(d, fma_plain); };
    t["mad"] = t["fma"];
    t["div"] = [](Decode& d) {
        if (!d.take("approx")) d.take("full");
        decode_arithmetic<Div, 2>(d);
    };
    t["rcp"] = [](Decode& d) { d.take("approx"); decode_arithmetic<Rcp, 1>(d); };
    t["sqrt"] = [](Decode& d) { d.take("approx"); decode_arithmetic<Sqrt, 1>(d); };
    t["rsqrt"] = [](Decode& d) { decode_approx<Approx<rsqrt_of>>(d); };
    t["sin"] = [](Decode& d) { decode_approx<Approx<std::sin>>(d); };
    t["cos"] = [](Decode& d) { decode_approx<Approx<std::cos>>(d); };
    t["lg2"] = [](Decode& d) { decode_approx<Approx<std::log2>>(d); };
    t["ex2"] = [](Decode& d) { decode_approx<Approx<std::exp2>>(d); };
    t["tanh"] = [](Decode& d) { decode_approx<Approx<std::tanh>>(d); };
    t["min"] = decode_extreme<false>;
    t["max"] = decode_extreme<true>;
    t["neg"] = decode_sign<false>;
    t["abs"] = decode_sign<true>;
    t["copysign"] = [](Decode& d) {
        Type n = d.take_type();
        operands(d, n, {n, n});
        if (n == Type::F32) d.finish(binary<float, float, float, CopySign>, Class::Float);
        else if (n == Type::F64) d.finish(binary<double, double, double, CopySign>, Class::Float);
        else d.unsupported("of this type");
    };
    t["testp"] = [](Decode& d) {
        const char* names[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
        d.inst.imm = -1;
        for (int k = 0; k < 6; k++)
            if (d.take(names[k])) d.inst.imm = k;
        Type n = d.take_type();
        if (d.inst.imm < 0 || (n != Type::F32 && n != Type::F64)) d.unsupported("of this kind");
        d.expect_count(2, 2);
        d.inst.a[1] = d.src(1, n);
        d.inst.a[0] = d.pred_dst(d.at(0));
        d.finish(n == Type::F32 ? testp<float> : testp<double>, Class::Float);
    };
}

}  // namespace dsv3::emulator
