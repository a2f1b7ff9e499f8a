// Moves: mov with packing, addresses between state spaces, clocks, cache policies.

#include "lanes.hpp"

namespace dsv3::emulator {
namespace {

template <class T>
Flow mov(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    each<T>(c, i.a[0], [=](int l) { return get<T>(a, l); });
    return Flow::Next;
}
Flow mov_pred(Context& c, const Inst& i) {
    uint32_t p = i.a[1] >= 0 ? c.pred(i.a[1]) : static_cast<uint32_t>(i.imm);
    c.set_pred(i.a[0], i.flags ? ~p : p);
    return Flow::Next;
}
/// {parts} <-> one register; `imm` is the size of a part.
Flow pack(Context& c, const Inst& i) {
    uint32_t bits = static_cast<uint32_t>(i.imm) * 8;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        uint64_t v = 0;
        for (uint32_t k = 0; k < i.list_size; k++) {
            uint64_t part = c.src(i.list[k])[l] & (bits == 32 ? 0xFFFFFFFFu : (1u << bits) - 1);
            v |= part << (k * bits);
        }
        i.flags ? put<uint64_t>(c.dst(i.a[0]), l, v) : put<uint32_t>(c.dst(i.a[0]), l, static_cast<uint32_t>(v));
    }
    return Flow::Next;
}
Flow unpack(Context& c, const Inst& i) {
    uint32_t bits = static_cast<uint32_t>(i.imm) * 8;
    const uint32_t* a = c.src(i.a[1]);
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        uint64_t v = i.flags ? get<uint64_t>(a, l) : a[l];
        for (uint32_t k = 0; k < i.list_size; k++)
            if (i.list[k] != no_ref)
                c.dst(i.list[k])[l] = static_cast<uint32_t>(v >> (k * bits) & (bits == 32 ? 0xFFFFFFFFu : (1u << bits) - 1));
    }
    return Flow::Next;
}

enum Clock : int64_t { clock_low, clock_high, clock_64, timer_low, timer_high, timer_64 };
/// Reads of a clock that repeat with nothing done in between wait for time to pass.
Flow read_clock(Context& c, const Inst& i) {
    if (c.polls(0)) {
        c.group->watch_low = c.group->watch_high = 0;
        return c.block(Wait::Spin, c.w.id, "time to pass");
    }
    bool timer = i.imm >= timer_low;
    uint64_t now = timer ? c.m.time : c.m.time * 1755 / 1000;
    each<uint32_t>(c, i.a[0], [&](int) { return static_cast<uint32_t>(i.imm % 3 == 1 ? now >> 32 : now); });
    return Flow::Next;
}
Flow read_clock_64(Context& c, const Inst& i) {
    if (c.polls(0)) {
        c.group->watch_low = c.group->watch_high = 0;
        return c.block(Wait::Spin, c.w.id, "time to pass");
    }
    uint64_t now = i.imm == timer_64 ? c.m.time : c.m.time * 1755 / 1000;
    each<uint64_t>(c, i.a[0], [&](int) { return now; });
    return Flow::Next;
}

void decode_mov(Decode& d) {
    Type t = d.take_type();
    d.expect_count(2, 2);
    const Operand &to = d.at(0), &from = d.at(1);
    d.inst.propagates = true;
    d.inst.type = t;
    if (t == Type::Pred) {
        bool negated = false;
        if (from.kind == Operand::Integer) d.inst.imm = from.bits ? -1 : 0;
        else d.inst.a[1] = d.pred_src(from, &negated);
        d.inst.flags = negated;
        d.inst.a[0] = d.pred_dst(to);
        return d.finish(mov_pred, Class::Move);
    }
    int size = size_of(t);
    if (size < 2 || size > 8) d.unsupported("of this type");
    if (to.kind == Operand::Vector || from.kind == Operand::Vector) {
        bool packs = from.kind == Operand::Vector;
        const std::vector<Operand>& parts = d.items(packs ? from : to, 2, 4);
        size_t part = static_cast<size_t>(size) / parts.size();
        if (parts.size() == 3 || part * parts.size() != static_cast<size_t>(size) || part == 0) d.malformed("parts of no whole size");
        Type part_type = part == 1 ? Type::B8 : part == 2 ? Type::B16 : Type::B32;
        std::vector<Ref> refs;
        for (const Operand& o : parts)
            refs.push_back(packs ? d.src(o, part_type) : o.kind == Operand::Sink ? no_ref : d.dst(o, part_type));
        packs ? d.inst.a[0] = d.dst(to, t) : d.inst.a[1] = d.src(from, t);
        d.set_list(refs);
        d.inst.imm = static_cast<int64_t>(part);
        d.inst.flags = size == 8;
        return d.finish(packs ? pack : unpack, Class::Move);
    }
    if (from.kind == Operand::Special) {
        static constexpr std::pair<std::string_view, Clock> clocks[] = {
            {"%clock", clock_low}, {"%clock_hi", clock_high}, {"%clock64", clock_64},
            {"%globaltimer_lo", timer_low}, {"%globaltimer_hi", timer_high}, {"%globaltimer", timer_64}};
        for (auto& [name, clock] : clocks) {
            if (name != from.name) continue;
            bool wide = clock == clock_64 || clock == timer_64;
            if ((size == 8) != wide) d.malformed("'" + std::string(name) + "' has another size");
            d.inst.imm = clock;
            d.inst.a[0] = d.dst(to, t);
            return d.finish(wide ? read_clock_64 : read_clock, Class::Control);
        }
    }
    if (from.kind == Operand::Address) d.malformed("an address in brackets");
    d.inst.a[1] = d.src(from, t);
    d.inst.a[0] = d.dst(to, t);
    d.finish(size == 8 ? mov<uint64_t> : size == 4 ? mov<uint32_t> : mov<uint16_t>, Class::Move);
}

Flow add_constant(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    uint64_t k = static_cast<uint64_t>(i.imm);
    each<uint64_t>(c, i.a[0], [=](int l) { return get<uint64_t>(a, l) + k; });
    return Flow::Next;
}
uint64_t window(Space s) {
    switch (s) {
        case Space::Shared: case Space::SharedCluster: return shared_window;
        case Space::Local: return local_window;
        case Space::Param: return param_window;
        default: return 0;
    }
}
void decode_cvta(Decode& d) {
    bool to = d.take("to");
    Space s = d.take_space(Space::Generic);
    if (s == Space::Generic) d.unsupported("without a state space");
    if (size_of(d.take_type()) != 8) d.unsupported("of this type");
    operands(d, Type::U64, {Type::U64});
    d.inst.imm = static_cast<int64_t>(to ? 0 - window(s) : window(s));
    d.inst.propagates = true;
    d.finish(add_constant, Class::Move);
}

Flow isspacep(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    Space s = static_cast<Space>(i.imm);
    c.set_pred(i.a[0], each_bit(c, [&](int l) {
        uint64_t x = get<uint64_t>(a, l);
        bool shared = x - shared_window < window_size;
        switch (s) {
            case Space::Shared: return shared && (x - shared_window) >> 24 == 0;
            case Space::SharedCluster: return shared;
            case Space::Local: return x - local_window < window_size;
            case Space::Param: return x - param_window < window_size;
            default: return x < shared_window;
        }
    }));
    return Flow::Next;
}

/// Shared addresses of a cluster: block rank + 1 in bits 24 and up; 0 there means the reader's own block.
template <class T>
Flow mapa(Context& c, const Inst& i) {
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]);
    uint32_t size = static_cast<uint32_t>(c.w.cta->cluster->ctas.size());
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        if (b[l] >= size)
            c.fail(ErrorKind::MemoryAccess, "block rank " + std::to_string(b[l]) + " in a cluster of " + std::to_string(size), l);
    }
    uint64_t base = i.flags ? shared_window : 0;
    each<T>(c, i.a[0], [=](int l) {
        uint64_t x = static_cast<uint64_t>(get<T>(a, l)) - base;
        return static_cast<T>((x & 0xFFFFFF) | (static_cast<uint64_t>(b[l]) + 1) << 24) + static_cast<T>(base);
    });
    return Flow::Next;
}
void decode_mapa(Decode& d) {
    bool generic = d.take_space(Space::Generic) == Space::Generic;
    Type t = d.take_type();
    operands(d, t, {t, Type::U32});
    if (t != Type::U32 && t != Type::U64) d.unsupported("of this type");
    d.inst.flags = generic;
    d.finish(t == Type::U32 ? mapa<uint32_t> : mapa<uint64_t>, Class::Move);
}
template <class T>
Flow getctarank(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    uint64_t base = i.flags ? shared_window : 0;
    uint32_t own = c.w.cta->rank;
    each<uint32_t>(c, i.a[0], [=](int l) {
        uint64_t rank = (static_cast<uint64_t>(get<T>(a, l)) - base) >> 24;
        return rank == 0 ? own : static_cast<uint32_t>(rank - 1);
    });
    return Flow::Next;
}
void decode_getctarank(Decode& d) {
    bool generic = d.take_space(Space::Generic) == Space::Generic;
    Type t = d.take_type();
    operands(d, Type::U32, {t});
    d.inst.flags = generic;
    if (t != Type::U32 && t != Type::U64) d.unsupported("of this type");
    d.finish(t == Type::U32 ? getctarank<uint32_t> : getctarank<uint64_t>, Class::Move);
}

Flow nothing(Context&, const Inst&) { return Flow::Next; }
Flow zero_64(Context& c, const Inst& i) {
    each<uint64_t>(c, i.a[0], [](int) { return uint64_t{0x12F0000000000000}; });
    return Flow::Next;
}
/// Hints: the operands are checked and nothing happens.
void decode_prefetch(Decode& d) {
    d.take_space(Space::Generic);
    for (const char* m : {"tensormap", "L1", "L2", "L2::evict_last", "L2::evict_normal"}) d.take(m);
    d.expect_count(1, 2);
    bool wide;
    int64_t offset;
    d.inst.a[0] = d.address(d.at(0), &wide, &offset);
    d.finish(nothing, Class::Memory);
}
void decode_createpolicy(Decode& d) {
    for (const char* m : {"fractional", "range", "cvt", "L2", "global", "L2::evict_last", "L2::evict_normal", "L2::evict_first",
                          "L2::evict_unchanged", "b64"})
        while (d.take(m)) {}
    d.expect_count(1, 4);
    d.inst.a[0] = d.dst(0, Type::B64);
    d.finish(zero_64, Class::Move);
}

}  // namespace

void register_move(OpTable& t) {
    t["mov"] = decode_mov;
    t["cvta"] = decode_cvta;
    t["isspacep"] = [](Decode& d) {
        Space s = d.take_space(Space::Generic);
        if (s == Space::Generic) d.unsupported("without a state space");
        d.expect_count(2, 2);
        d.inst.a[1] = d.src(1, Type::U64);
        d.inst.a[0] = d.pred_dst(d.at(0));
        d.inst.imm = static_cast<int64_t>(s);
        d.finish(isspacep, Class::Move);
    };
    t["mapa"] = decode_mapa;
    t["getctarank"] = decode_getctarank;
    t["prefetch"] = decode_prefetch;
    t["prefetchu"] = decode_prefetch;
    t["createpolicy"] = decode_createpolicy;
}

}  // namespace dsv3::emulator
