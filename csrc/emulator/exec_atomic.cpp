// atom and red: read-modify-write, one lane after the other.

#include <cmath>

#include "copy.hpp"
#include "numerics.hpp"
#include "ordering.hpp"

namespace dsv3::emulator {
namespace {

enum Op : int { add, exch, cas, min, max, inc, dec, op_and, op_or, op_xor };
constexpr std::pair<const char*, Op> op_names[] = {{"add", add}, {"exch", exch}, {"cas", cas}, {"min", min}, {"max", max},
                                                   {"inc", inc}, {"dec", dec}, {"and", op_and}, {"or", op_or}, {"xor", op_xor}};

template <class T> T apply_integer(int op, T old, T a, T b) {
    switch (op) {
        case add: return static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(a));
        case exch: return a;
        case cas: return old == a ? b : old;
        case min: return a < old ? a : old;
        case max: return a > old ? a : old;
        case inc: return old >= a ? T(0) : static_cast<T>(old + 1);
        case dec: return old == 0 || old > a ? a : static_cast<T>(old - 1);
        case op_and: return static_cast<T>(old & a);
        case op_or: return static_cast<T>(old | a);
        default: return static_cast<T>(old ^ a);
    }
}
uint32_t add_f32(uint32_t x, uint32_t y) {
    float r = bits_float(x) + bits_float(y);
    return r != r ? 0x7FFFFFFF : float_bits(r);
}
uint16_t half_op(Type t, int op, uint16_t x, uint16_t y) {
    bool f16 = t == Type::F16 || t == Type::F16x2;
    float a = f16 ? f16_to_float(x) : bf16_to_float(x), b = f16 ? f16_to_float(y) : bf16_to_float(y);
    if (a != a || b != b) {
        if (op == add || (a != a && b != b)) return 0x7FFF;
        return a != a ? y : x;
    }
    float r = op == add ? a + b : op == min ? std::fmin(a, b) : std::fmax(a, b);
    return f16 ? float_to_f16(r) : float_to_bf16(r);
}

}  // namespace

uint64_t reduce_value(Type type, int op, uint64_t old, uint64_t a, uint64_t b) {
    switch (type) {
        case Type::F32: return add_f32(static_cast<uint32_t>(old), static_cast<uint32_t>(a));
        case Type::F64: {
            double x, y;
            std::memcpy(&x, &old, 8);
            std::memcpy(&y, &a, 8);
            x += y;
            uint64_t r;
            std::memcpy(&r, &x, 8);
            return x != x ? 0x7FF8000000000000 : r;
        }
        case Type::F16: case Type::BF16: return half_op(type, op, static_cast<uint16_t>(old), static_cast<uint16_t>(a));
        case Type::F16x2: case Type::BF16x2:
            return half_op(type, op, static_cast<uint16_t>(old), static_cast<uint16_t>(a)) |
                   static_cast<uint64_t>(half_op(type, op, static_cast<uint16_t>(old >> 16), static_cast<uint16_t>(a >> 16))) << 16;
        case Type::S32: return static_cast<uint32_t>(apply_integer<int32_t>(op, static_cast<int32_t>(old), static_cast<int32_t>(a), static_cast<int32_t>(b)));
        case Type::S64: return static_cast<uint64_t>(apply_integer<int64_t>(op, static_cast<int64_t>(old), static_cast<int64_t>(a), static_cast<int64_t>(b)));
        case Type::B16: return apply_integer<uint16_t>(op, static_cast<uint16_t>(old), static_cast<uint16_t>(a), static_cast<uint16_t>(b));
        default:
            if (size_of(type) == 8) return apply_integer<uint64_t>(op, old, a, b);
            return apply_integer<uint32_t>(op, static_cast<uint32_t>(old), static_cast<uint32_t>(a), static_cast<uint32_t>(b));
    }
}

int reduce_op(Decode& d) {
    for (auto& [name, value] : op_names)
        if (d.take(name)) return value;
    d.unsupported("without an operation it knows");
}

namespace {

Flow atomic(Context& c, const Inst& i) {
    const MemoryOp& op = *static_cast<const MemoryOp*>(i.extra);
    uint32_t size = static_cast<uint32_t>(size_of(op.type)), bytes = size * static_cast<uint32_t>(op.vector);
    const uint32_t* base = c.src(i.a[1]);
    Target targets[32];
    uint64_t olds[32][8], hash = 0;
    uint32_t access = c.checks ? c.m.log_access(c.w, i, true, op.scope) : 0;
    bool any_change = false;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        uint64_t address = (op.wide ? get<uint64_t>(base, l) : base[l]) + static_cast<uint64_t>(op.offset);
        Target& t = targets[l];
        t = c.locate(op.space, op.wide ? address : static_cast<uint32_t>(address), bytes, bytes, l, true);
        if (!t.cta && !t.region) c.fail(ErrorKind::MemoryAccess, "atomics work on global and shared memory only", l);
        if (t.region && !t.region->late.empty()) c.m.settle(*t.region, t.offset, bytes);
        if (op.order == Order::Release || op.order == Order::AcqRel) c.make_visible(1u << l, op.scope);
        if (c.check_read(t, bytes, access, l)) c.fail(ErrorKind::Hazard, "reads bytes that nobody wrote", l);
        c.check_write(t, bytes, access, l);
        bool change = false;
        for (int k = 0; k < op.vector; k++) {
            Ref value = i.list[k];
            uint64_t old = 0, a = size == 8 ? get<uint64_t>(c.src(value), l) : c.src(value)[l];
            uint64_t b = i.a[2] == no_ref ? 0 : size == 8 ? get<uint64_t>(c.src(i.a[2]), l) : c.src(i.a[2])[l];
            std::memcpy(&old, t.data + static_cast<uint32_t>(k) * size, size);
            uint64_t next = reduce_value(op.type, op.op, old, a, b);
            if (size < 8) next &= (uint64_t{1} << (8 * size)) - 1;
            std::memcpy(t.data + static_cast<uint32_t>(k) * size, &next, size);
            change |= next != old;
            olds[l][k] = old;
            hash = (hash ^ old ^ t.watch()) * 0x9E3779B97F4A7C15;
        }
        any_change |= change;
        if (change) c.changed(t, bytes);
    }
    // An atomic that changes nothing again and again is a poll.
    if (!any_change && !op.no_result && c.polls(hash)) {
        c.group->watch_low = UINT64_MAX, c.group->watch_high = 0;
        for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
            const Target& t = targets[__builtin_ctz(rest)];
            c.group->watch_low = std::min(c.group->watch_low, t.watch());
            c.group->watch_high = std::max(c.group->watch_high, t.watch() + bytes);
        }
        return c.block(Wait::Spin, c.w.id, "another value in memory that it polls with an atomic");
    }
    if (op.order == Order::Release || op.order == Order::AcqRel) c.await_stores(i, op.scope);
    if (!op.no_result) c.await_values(i, targets, bytes);
    Context::Arrival arrival = c.access(targets, bytes, true, true);
    each_active(c, [&](int l) { c.m.stamp(targets[l], bytes, arrival.there); });
    // What the value published is acquired before this operation adds its own.
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        Context one = c;
        one.mask = 1u << l;
        acquire_from(one, op, targets, bytes);
        if (c.checks) c.publish(targets[l], bytes, release_of(c, op, targets[l], l), true);
    }
    if (!op.no_result) {
        for (int k = 0; k < op.vector; k++) {
            Ref d = i.list[op.vector + k];
            if (d == no_ref) continue;
            c.m.expect_result(c.w, d, arrival.back, i);
            for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
                int l = __builtin_ctz(rest);
                size == 8 ? put<uint64_t>(c.dst(d), l, olds[l][k]) : put<uint32_t>(c.dst(d), l, static_cast<uint32_t>(olds[l][k]));
            }
        }
    }
    return Flow::Yield;
}

bool allowed(const MemoryOp& op) {
    bool half = op.type == Type::F16 || op.type == Type::BF16 || op.type == Type::F16x2 || op.type == Type::BF16x2;
    switch (op.op) {
        case add: return half || op.type == Type::F32 || op.type == Type::F64 || op.type == Type::U32 || op.type == Type::S32 ||
                         op.type == Type::U64 || op.type == Type::S64;
        case exch: return op.type == Type::B32 || op.type == Type::B64;
        case cas: return op.type == Type::B16 || op.type == Type::B32 || op.type == Type::B64;
        case min: case max: return op.type == Type::U32 || op.type == Type::S32 || op.type == Type::U64 || op.type == Type::S64 ||
                                   (half && op.vector > 1);
        case inc: case dec: return op.type == Type::U32;
        default: return op.type == Type::B32 || op.type == Type::B64;
    }
}

void decode_atomic(Decode& d, bool result) {
    MemoryOp& op = d.extra<MemoryOp>();
    take_ordering(d, op, Order::Relaxed, Scope::Gpu);
    op.space = d.take_space(Space::Generic);
    op.op = reduce_op(d);
    const Operand* policy;
    take_cache_hints(d, &policy);
    d.take("noftz");
    op.vector = d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1;
    op.type = d.take_type();
    op.no_result = !result;
    if (!allowed(op) || size_of(op.type) * op.vector > 16) d.unsupported("of this type");
    size_t at = result ? 1 : 0, n = at + 2 + (op.op == cas) + (policy != nullptr);
    d.expect_count(n, n);
    d.inst.a[1] = d.address(d.at(at), &op.wide, &op.offset);
    std::vector<Ref> refs;
    auto list = [&](const Operand& o, bool destination) {
        auto one = [&](const Operand& e) {
            refs.push_back(!destination ? d.src(e, op.type) : e.kind == Operand::Sink && e.items.empty() ? no_ref : d.dst(e, op.type));
        };
        if (op.vector == 1) return one(o);
        for (const Operand& e : d.items(o, static_cast<size_t>(op.vector), static_cast<size_t>(op.vector))) one(e);
    };
    list(d.at(at + 1), false);
    if (op.op == cas) d.inst.a[2] = d.src(at + 2, op.type);
    if (result) list(d.at(0), true);
    d.set_list(refs);
    d.finish(atomic, Class::Atomic);
}

}  // namespace

void register_atomic(OpTable& t) {
    t["atom"] = [](Decode& d) { decode_atomic(d, true); };
    t["red"] = [](Decode& d) { decode_atomic(d, false); };
}

}  // namespace dsv3::emulator
