// f16, bf16 and their pairs. Every result is rounded once: sums of products go through a double rounded to odd.

#include <cmath>

#include "lanes.hpp"
#include "numerics.hpp"

namespace dsv3::emulator {
namespace {

enum : uint32_t { ftz = 1, sat = 2, relu = 4, nan_wins = 8 };

struct F16 {
    static float load(uint16_t x) { return f16_to_float(x); }
    static uint16_t round(double x) { return x != x ? 0x7FFF : static_cast<uint16_t>(encode(x, kF16)); }
    static constexpr float smallest_normal = 6.103515625e-05f;
};
struct BF16 {
    static float load(uint16_t x) { return bf16_to_float(x); }
    static uint16_t round(double x) { return x != x ? 0x7FFF : static_cast<uint16_t>(encode(x, kBF16)); }
    static constexpr float smallest_normal = 0;
};

/// a·b + c with the error of the sum folded into the last bit, so that a second rounding is harmless.
double fma_to_odd(double a, double b, double c) {
    double p = a * b, s = p + c;  // the product of two halves is exact
    if (!std::isfinite(s)) return s;
    double t = s - p, error = (p - (s - t)) + (c - t);
    uint64_t bits;
    std::memcpy(&bits, &s, 8);
    if (error != 0 && !(bits & 1)) bits += (error > 0) == (s > 0) ? 1 : -1;
    std::memcpy(&s, &bits, 8);
    return s;
}

struct Add { double operator()(float a, float b, float) const { return fma_to_odd(a, 1, b); } };
struct Sub { double operator()(float a, float b, float) const { return fma_to_odd(a, 1, -b); } };
struct Mul { double operator()(float a, float b, float) const { return static_cast<double>(a) * b; } };
struct Fma { double operator()(float a, float b, float c) const { return fma_to_odd(a, b, c); } };
struct Neg { double operator()(float a, float, float) const { return -a; } };
struct Abs { double operator()(float a, float, float) const { return std::fabs(a); } };
struct Ex2 { double operator()(float a, float, float) const { return std::exp2(static_cast<double>(a)); } };
struct Tanh { double operator()(float a, float, float) const { return std::tanh(static_cast<double>(a)); } };
template <bool max, bool nan> struct Extreme { double operator()(float a, float b, float) const {
    if (a != a || b != b) return nan || (a != a && b != b) ? NAN : a != a ? b : a;
    bool first = max ? a > b || (a == b && !std::signbit(a)) : a < b || (a == b && std::signbit(a));
    return first ? a : b;
} };

template <class H, class F>
uint16_t one(uint32_t flags, uint16_t a, uint16_t b, uint16_t c) {
    float x = H::load(a), y = H::load(b), z = H::load(c);
    auto flush = [](float v) { return std::fabs(v) < H::smallest_normal ? std::copysign(0.0f, v) : v; };
    if (flags & ftz) x = flush(x), y = flush(y), z = flush(z);
    double r = F()(x, y, z);
    if (flags & sat) r = r > 0 ? std::min(r, 1.0) : 0.0;
    if (flags & relu && r == r && !(r > 0)) r = 0.0;
    uint16_t code = H::round(r);
    return flags & ftz && std::fabs(H::load(code)) < H::smallest_normal ? code & 0x8000 : code;
}
template <class H, class F, int lanes>
Flow half(Context& c, const Inst& i) {
    int n = static_cast<int>(i.imm);
    const uint32_t *a = c.src(i.a[1]), *b = n > 1 ? c.src(i.a[2]) : a, *e = n > 2 ? c.src(i.a[3]) : a;
    each<uint32_t>(c, i.a[0], [&](int l) {
        uint32_t r = one<H, F>(i.flags, static_cast<uint16_t>(a[l]), static_cast<uint16_t>(b[l]), static_cast<uint16_t>(e[l]));
        if (lanes == 2)
            r |= static_cast<uint32_t>(one<H, F>(i.flags, static_cast<uint16_t>(a[l] >> 16), static_cast<uint16_t>(b[l] >> 16),
                                                 static_cast<uint16_t>(e[l] >> 16))) << 16;
        return r;
    });
    return Flow::Next;
}

template <class F>
void decode(Decode& d, int arity) {
    d.take("rn");
    if (d.take("ftz")) d.inst.flags |= ftz;
    if (d.take("sat")) d.inst.flags |= sat;
    if (d.take("relu")) d.inst.flags |= relu;
    Type t = d.take_type();
    if (arity == 1) operands(d, t, {t});
    else if (arity == 2) operands(d, t, {t, t});
    else operands(d, t, {t, t, t});
    d.inst.imm = arity;
    switch (t) {
        case Type::F16: return d.finish(half<F16, F, 1>, Class::Float);
        case Type::F16x2: return d.finish(half<F16, F, 2>, Class::Float);
        case Type::BF16: return d.finish(half<BF16, F, 1>, Class::Float);
        case Type::BF16x2: return d.finish(half<BF16, F, 2>, Class::Float);
        default: d.unsupported("of this type");
    }
}

bool is_half(const Decode& d) { return d.has("f16") || d.has("f16x2") || d.has("bf16") || d.has("bf16x2"); }

}  // namespace

void register_half(OpTable& t) {
    auto add = [&](const char* name, DecodeFn half) {
        DecodeFn other = t[name];
        t[name] = [=](Decode& d) { is_half(d) ? half(d) : other(d); };
    };
    add("add", [](Decode& d) { decode<Add>(d, 2); });
    add("sub", [](Decode& d) { decode<Sub>(d, 2); });
    add("mul", [](Decode& d) { decode<Mul>(d, 2); });
    add("fma", [](Decode& d) { decode<Fma>(d, 3); });
    add("neg", [](Decode& d) { decode<Neg>(d, 1); });
    add("abs", [](Decode& d) { decode<Abs>(d, 1); });
    add("min", [](Decode& d) { d.take("NaN") ? decode<Extreme<false, true>>(d, 2) : decode<Extreme<false, false>>(d, 2); });
    add("max", [](Decode& d) { d.take("NaN") ? decode<Extreme<true, true>>(d, 2) : decode<Extreme<true, false>>(d, 2); });
    add("ex2", [](Decode& d) { d.take("approx"); decode<Ex2>(d, 1); });
    add("tanh", [](Decode& d) { d.take("approx"); decode<Tanh>(d, 1); });
}

}  // namespace dsv3::emulator
