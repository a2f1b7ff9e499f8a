// cvt: between integers, floats and the packed formats of machine learning.

#include <cfenv>
#include <cmath>
#include <limits>

#include "lanes.hpp"
#include "numerics.hpp"

namespace dsv3::emulator {
namespace {

enum : uint32_t { ftz = 1, sat = 2, satfinite = 4, relu = 8, to_integer = 16 };
enum Round : uint32_t { rn, rz, rm, rp, rna };

struct Plan {
    Type to, from;
    Round round = rn;
    bool wide_destination = false;  ///< an 8 or 16 bit result extended into a 32-bit register
};

int fe_mode(Round r) { return r == rz ? FE_TOWARDZERO : r == rm ? FE_DOWNWARD : r == rp ? FE_UPWARD : FE_TONEAREST; }
Rounding leaf_mode(Round r) {
    return r == rz ? Rounding::toward_zero : r == rm ? Rounding::down : r == rp ? Rounding::up
         : r == rna ? Rounding::nearest_away : Rounding::nearest_even;
}

class RoundingMode {
  public:
    explicit RoundingMode(Round r) : mode_(fe_mode(r)) { if (mode_ != FE_TONEAREST) std::fesetround(mode_); }
    ~RoundingMode() { if (mode_ != FE_TONEAREST) std::fesetround(FE_TONEAREST); }

  private:
    int mode_;
};

double load_float(Type t, const uint32_t* p, int l) {
    switch (t) {
        case Type::F16: return f16_to_float(static_cast<uint16_t>(p[l]));
        case Type::BF16: return bf16_to_float(static_cast<uint16_t>(p[l]));
        case Type::F32: return get<float>(p, l);
        default: return get<double>(p, l);
    }
}
__int128 load_integer(Type t, const uint32_t* p, int l) {
    switch (t) {
        case Type::U8: return static_cast<uint8_t>(p[l]);
        case Type::S8: return static_cast<int8_t>(p[l]);
        case Type::U16: return static_cast<uint16_t>(p[l]);
        case Type::S16: return static_cast<int16_t>(p[l]);
        case Type::U32: return p[l];
        case Type::S32: return static_cast<int32_t>(p[l]);
        case Type::U64: return get<uint64_t>(p, l);
        default: return get<int64_t>(p, l);
    }
}
__int128 least(Type t) { return is_signed(t) ? -(static_cast<__int128>(1) << (size_of(t) * 8 - 1)) : 0; }
__int128 greatest(Type t) { return (static_cast<__int128>(1) << (size_of(t) * 8 - is_signed(t))) - 1; }

void store_integer(const Plan& plan, uint32_t* p, int l, __int128 v) {
    if (size_of(plan.to) == 8) return put<uint64_t>(p, l, static_cast<uint64_t>(v));
    if (size_of(plan.to) == 4) return put<uint32_t>(p, l, static_cast<uint32_t>(v));
    int64_t narrow = plan.to == Type::U8 ? static_cast<uint8_t>(v) : plan.to == Type::S8 ? static_cast<int8_t>(v)
                   : plan.to == Type::U16 ? static_cast<uint16_t>(v) : static_cast<int64_t>(static_cast<int16_t>(v));
    plan.wide_destination ? put<uint32_t>(p, l, static_cast<uint32_t>(narrow)) : put<uint16_t>(p, l, static_cast<uint16_t>(narrow));
}
float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

void store_float(const Plan& plan, uint32_t flags, uint32_t* p, int l, double v) {
    if (flags & sat) v = v > 0 ? (v < 1 ? v : 1) : 0.0;
    if (flags & relu && v == v && !(v > 0)) v = 0;
    switch (plan.to) {
        case Type::F64: return put<double>(p, l, v);
        case Type::F32: {
            volatile double exact = v;
            float r = static_cast<float>(exact);
            if (r != r) return put<uint32_t>(p, l, 0x7FFFFFFF);
            if (flags & satfinite && std::isinf(r)) r = std::copysign(std::numeric_limits<float>::max(), r);
            return put<float>(p, l, flags & ftz ? flush(r) : r);
        }
        default: {
            const FloatFormat& format = plan.to == Type::F16 ? kF16 : kBF16;
            ConversionOptions options{leaf_mode(plan.round), (flags & satfinite) != 0, false};
            put<uint16_t>(p, l, v == v ? static_cast<uint16_t>(encode(v, format, options)) : uint16_t{0x7FFF});
        }
    }
}

Flow generic(Context& c, const Inst& i) {
    const Plan& plan = *static_cast<const Plan*>(i.extra);
    const uint32_t* a = c.src(i.a[1]);
    uint32_t* d = c.dst(i.a[0]);
    RoundingMode mode(plan.round);
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        if (is_float(plan.from)) {
            double v = load_float(plan.from, a, l);
            if (i.flags & ftz && plan.from == Type::F32) v = flush(static_cast<float>(v));
            if (i.flags & to_integer) {
                volatile double exact = v;
                v = std::nearbyint(exact);
            }
            if (is_float(plan.to)) {
                store_float(plan, i.flags, d, l, v);
            } else if (v != v) {
                bool wide = plan.from == Type::F64 || size_of(plan.to) == 8;
                store_integer(plan, d, l, wide ? static_cast<__int128>(1) << (size_of(plan.to) * 8 - 1) : 0);
            } else {
                double low = static_cast<double>(least(plan.to)), high = static_cast<double>(greatest(plan.to));
                __int128 r = v <= low ? least(plan.to) : v >= high ? greatest(plan.to) : static_cast<__int128>(v);
                store_integer(plan, d, l, r);
            }
        } else {
            __int128 v = load_integer(plan.from, a, l);
            if (!is_float(plan.to)) {
                if (i.flags & sat) v = std::min(std::max(v, least(plan.to)), greatest(plan.to));
                store_integer(plan, d, l, v);
            } else if (plan.to == Type::F64 || size_of(plan.from) < 8) {
                volatile __int128 exact = v;
                store_float(plan, i.flags, d, l, plan.from == Type::U64 ? static_cast<double>(static_cast<uint64_t>(exact))
                                                                         : static_cast<double>(static_cast<int64_t>(exact)));
            } else if (plan.to == Type::F32) {
                volatile uint64_t u = static_cast<uint64_t>(v);
                float r = plan.from == Type::U64 ? static_cast<float>(u) : static_cast<float>(static_cast<int64_t>(u));
                store_float(plan, i.flags, d, l, r);
            } else {
                // To half: FP32 cannot hold all bits, so fold what it drops into its last bit.
                bool minus = v < 0;
                uint64_t m = static_cast<uint64_t>(minus ? -v : v);
                int shift = m ? std::max(0, 64 - __builtin_clzll(m) - 50) : 0;
                uint64_t kept = m >> shift, lost = m & ((uint64_t{1} << shift) - 1);
                double r = std::ldexp(static_cast<double>(kept | (lost != 0)), shift);
                store_float(plan, i.flags, d, l, minus ? -r : r);
            }
        }
    }
    return Flow::Next;
}

Flow f32_to_half2(Context& c, const Inst& i) {
    const Plan& plan = *static_cast<const Plan*>(i.extra);
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]);
    const FloatFormat& format = plan.to == Type::F16x2 ? kF16 : kBF16;
    ConversionOptions options{leaf_mode(plan.round), (i.flags & satfinite) != 0, (i.flags & relu) != 0};
    bool fast = plan.to == Type::BF16x2 && plan.round == rn && !(i.flags & (satfinite | relu));
    each<uint32_t>(c, i.a[0], [&](int l) {
        float x = get<float>(a, l), y = get<float>(b, l);
        if (fast) return static_cast<uint32_t>(float_to_bf16(x)) << 16 | float_to_bf16(y);
        return cvt_half2_f32(x, y, format, options);
    });
    return Flow::Next;
}
Flow f32_to_fp8(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]);
    const Plan& plan = *static_cast<const Plan*>(i.extra);
    const FloatFormat& format = plan.to == Type::E4M3x2 ? kE4M3 : kE5M2;
    bool fast = plan.to == Type::E4M3x2 && !(i.flags & relu);
    each<uint16_t>(c, i.a[0], [&](int l) {
        float x = get<float>(a, l), y = get<float>(b, l);
        if (fast) return static_cast<uint16_t>(float_to_e4m3(x) << 8 | float_to_e4m3(y));
        return cvt_fp8x2_f32(x, y, format, i.flags & relu);
    });
    return Flow::Next;
}
Flow half2_to_fp8(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    const Plan& plan = *static_cast<const Plan*>(i.extra);
    const FloatFormat& format = plan.to == Type::E4M3x2 ? kE4M3 : kE5M2;
    each<uint16_t>(c, i.a[0], [&](int l) { return cvt_fp8x2_f16x2(a[l], format, i.flags & relu); });
    return Flow::Next;
}
Flow fp8_to_half2(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    const Plan& plan = *static_cast<const Plan*>(i.extra);
    const FloatFormat& format = plan.from == Type::E4M3x2 ? kE4M3 : kE5M2;
    each<uint32_t>(c, i.a[0], [&](int l) { return cvt_f16x2_fp8x2(static_cast<uint16_t>(a[l]), format, i.flags & relu); });
    return Flow::Next;
}
Flow f32_to_tf32(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    const Plan& plan = *static_cast<const Plan*>(i.extra);
    ConversionOptions options{leaf_mode(plan.round), (i.flags & satfinite) != 0, (i.flags & relu) != 0};
    each<uint32_t>(c, i.a[0], [&](int l) { return cvt_tf32_f32(get<float>(a, l), options); });
    return Flow::Next;
}

bool is_half2(Type t) { return t == Type::F16x2 || t == Type::BF16x2; }
bool is_fp8(Type t) { return t == Type::E4M3x2 || t == Type::E5M2x2; }

void decode_cvt(Decode& d) {
    Plan& plan = d.extra<Plan>();
    bool rounds = true;
    if (d.take("rn")) plan.round = rn;
    else if (d.take("rz")) plan.round = rz;
    else if (d.take("rm")) plan.round = rm;
    else if (d.take("rp")) plan.round = rp;
    else if (d.take("rna")) plan.round = rna;
    else {
        rounds = false;
        if (d.take("rni")) plan.round = rn, d.inst.flags |= to_integer;
        else if (d.take("rzi")) plan.round = rz, d.inst.flags |= to_integer;
        else if (d.take("rmi")) plan.round = rm, d.inst.flags |= to_integer;
        else if (d.take("rpi")) plan.round = rp, d.inst.flags |= to_integer;
    }
    if (d.take("ftz")) d.inst.flags |= ftz;
    if (d.take("sat")) d.inst.flags |= sat;
    if (d.take("satfinite")) d.inst.flags |= satfinite;
    if (d.take("relu")) d.inst.flags |= relu;
    plan.to = d.take_type();
    plan.from = d.take_type();
    if (is_half2(plan.to) && plan.from == Type::F32) {
        if (plan.round != rn && plan.round != rz) d.unsupported("with this rounding");
        operands(d, plan.to, {Type::F32, Type::F32});
        return d.finish(f32_to_half2, Class::Convert);
    }
    if (is_fp8(plan.to)) {
        if (!(d.inst.flags & satfinite) || plan.round != rn || !rounds) d.unsupported("without .rn.satfinite");
        if (plan.from == Type::F32) {
            operands(d, plan.to, {Type::F32, Type::F32});
            return d.finish(f32_to_fp8, Class::Convert);
        }
        if (plan.from != Type::F16x2) d.unsupported("of these types");
        operands(d, plan.to, {Type::F16x2});
        return d.finish(half2_to_fp8, Class::Convert);
    }
    if (plan.to == Type::F16x2 && is_fp8(plan.from)) {
        operands(d, plan.to, {plan.from});
        return d.finish(fp8_to_half2, Class::Convert);
    }
    if (plan.to == Type::TF32 && plan.from == Type::F32) {
        operands(d, Type::B32, {Type::F32});
        return d.finish(f32_to_tf32, Class::Convert);
    }
    auto plain = [](Type t) { return (t >= Type::U8 && t <= Type::S64) || t == Type::F16 || t == Type::BF16 || t == Type::F32 || t == Type::F64; };
    if (!plain(plan.to) || !plain(plan.from) || plan.round == rna) d.unsupported("of these types");
    if (is_float(plan.from) && !is_float(plan.to) && !(d.inst.flags & to_integer)) d.unsupported("without integer rounding");
    if (is_float(plan.to) && (!is_float(plan.from) || size_of(plan.to) < size_of(plan.from)) && !rounds)
        d.unsupported("without rounding");
    operands(d, plan.to, {plan.from});
    plan.wide_destination = d.register_size(d.at(0)) == 4;
    d.finish(generic, Class::Convert);
}

}  // namespace

void register_convert(OpTable& t) { t["cvt"] = decode_cvt; }

}  // namespace dsv3::emulator
