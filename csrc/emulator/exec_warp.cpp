// Between the lanes of a warp: shfl, vote, match, redux, elect, activemask, bar.warp.sync. None of them but
// bar.warp.sync orders memory.

#include "lanes.hpp"

namespace dsv3::emulator {
namespace {

/// The member mask of a .sync instruction, which all its lanes must agree on; blocks until they are here. An exited
/// lane is not waited for.
bool members_here(Context& c, Ref mask_ref, uint32_t* members) {
    const uint32_t* m = c.src(mask_ref);
    int first = __builtin_ctz(c.mask);
    *members = m[first];
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        if (!(m[l] >> l & 1)) c.fail(ErrorKind::Hazard, "the lane is not in its own member mask", l);
        if (m[l] != *members) return c.fail(ErrorKind::Hazard, "lanes name different member masks", l), false;
    }
    return c.converged(*members);
}
Flow wait_for_lanes(Context& c, uint32_t members) {
    return c.block(Wait::Lanes, c.w.id, "lanes " + std::to_string(members & c.w.live & ~c.mask) + " (mask) of its warp");
}

enum Shuffle { Up, Down, Bfly, Idx };
Flow shfl(Context& c, const Inst& i) {
    uint32_t members;
    if (!members_here(c, i.a[4], &members)) return wait_for_lanes(c, members);
    const uint32_t *a = c.src(i.a[1]), *b = c.src(i.a[2]), *e = c.src(i.a[3]);
    uint32_t valid = 0, r[32];
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        int bval = static_cast<int>(b[l] & 31), cval = static_cast<int>(e[l] & 31), seg = static_cast<int>(e[l] >> 8 & 31);
        int max_lane = (l & seg) | (cval & ~seg), min_lane = l & seg, j;
        bool p;
        switch (i.imm) {
            case Up: j = l - bval; p = j >= max_lane; break;
            case Down: j = l + bval; p = j <= max_lane; break;
            case Bfly: j = l ^ bval; p = j <= max_lane; break;
            default: j = min_lane | (bval & ~seg); p = j <= max_lane; break;
        }
        if (!p) j = l;
        if (!(members >> j & 1) || !(c.w.live >> j & 1))
            c.fail(ErrorKind::Hazard, "reads lane " + std::to_string(j) + ", which takes no part", l);
        r[l] = a[j];
        valid |= static_cast<uint32_t>(p) << l;
    }
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) c.dst(i.a[0])[__builtin_ctz(rest)] = r[__builtin_ctz(rest)];
    if (i.a[5] != no_ref) c.set_pred(i.a[5], valid);
    return Flow::Next;
}

enum Vote { All, Any, Uni, Ballot };
Flow vote(Context& c, const Inst& i) {
    uint32_t members;
    if (!members_here(c, i.a[2], &members)) return wait_for_lanes(c, members);
    uint32_t p = c.pred(i.a[1]);
    if (i.flags) p = ~p;
    uint32_t here = members & c.mask, yes = p & here;
    if (i.imm == Ballot) {
        each<uint32_t>(c, i.a[0], [=](int) { return yes; });
        return Flow::Next;
    }
    bool r = i.imm == All ? yes == here : i.imm == Any ? yes != 0 : yes == here || yes == 0;
    c.set_pred(i.a[0], r ? ~0u : 0);
    return Flow::Next;
}

template <class T>
Flow match(Context& c, const Inst& i) {
    uint32_t members;
    if (!members_here(c, i.a[2], &members)) return wait_for_lanes(c, members);
    const uint32_t* a = c.src(i.a[1]);
    uint32_t r[32], here = members & c.mask, all = ~0u;
    for (uint32_t rest = here; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        uint32_t same = 0;
        for (uint32_t other = here; other; other &= other - 1)
            if (get<T>(a, __builtin_ctz(other)) == get<T>(a, l)) same |= other & -other;
        r[l] = i.imm ? (same == here ? here : 0) : same;
        if (same != here) all = 0;
    }
    each<uint32_t>(c, i.a[0], [&](int l) { return r[l]; });
    if (i.a[3] != no_ref) c.set_pred(i.a[3], all);
    return Flow::Next;
}

enum Redux { Add, Min, Max, And, Or, Xor };
Flow redux(Context& c, const Inst& i) {
    uint32_t members;
    if (!members_here(c, i.a[2], &members)) return wait_for_lanes(c, members);
    const uint32_t* a = c.src(i.a[1]);
    bool sign = i.flags, first = true;
    uint32_t r = 0;
    for (uint32_t rest = members & c.mask; rest; rest &= rest - 1) {
        uint32_t x = a[__builtin_ctz(rest)];
        bool less = sign ? static_cast<int32_t>(x) < static_cast<int32_t>(r) : x < r;
        if (first) r = x;
        else switch (i.imm) {
            case Add: r += x; break;
            case Min: r = less ? x : r; break;
            case Max: r = less ? r : x; break;
            case And: r &= x; break;
            case Or: r |= x; break;
            default: r ^= x; break;
        }
        first = false;
    }
    each<uint32_t>(c, i.a[0], [=](int) { return r; });
    return Flow::Next;
}

Flow elect(Context& c, const Inst& i) {
    uint32_t members;
    if (!members_here(c, i.a[2], &members)) return wait_for_lanes(c, members);
    uint32_t leader = static_cast<uint32_t>(__builtin_ctz(members & c.mask));
    if (i.a[0] != no_ref) each<uint32_t>(c, i.a[0], [=](int) { return leader; });
    c.set_pred(i.a[1], 1u << leader);
    return Flow::Next;
}

Flow activemask(Context& c, const Inst& i) {
    uint32_t m = c.mask;
    each<uint32_t>(c, i.a[0], [=](int) { return m; });
    return Flow::Next;
}

/// Lanes may arrive at different instructions, so arrivals gather in the groups: stage 1 waits, stage 2 may leave.
Flow warp_sync(Context& c, const Inst& i) {
    Group& g = *c.group;
    if (g.stage == 2) {
        g.stage = 0;
        return Flow::Next;
    }
    const uint32_t* m = c.src(i.a[1]);
    uint32_t members = m[__builtin_ctz(c.mask)];
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        if (!(m[l] >> l & 1)) c.fail(ErrorKind::Hazard, "the lane is not in its own member mask", l);
        if (m[l] != members) c.fail(ErrorKind::Hazard, "lanes name different member masks", l);
    }
    uint32_t needed = members & c.w.live, here = c.mask;
    if (g.mask != c.mask) {
        // Lanes switched off by the guard go on alone.
        Group rest;
        rest.pc = g.pc + 1;
        rest.mask = g.mask & ~c.mask;
        g.mask = c.mask;
        g.stage = 1;
        g.token = members;
        c.w.groups.push_back(std::move(rest));
        return Flow::Jump;
    }
    for (const Group& other : c.w.groups)
        if (&other != &g && other.stage == 1 && other.token == members) here |= other.mask;
    g.token = members;
    if ((here & needed) != needed) {
        g.stage = 1;
        return wait_for_lanes(c, members);
    }
    Knowledge k;
    if (c.checks) {
        k = c.w.release(here);
        c.w.acquire(here, k);
    }
    for (Group& other : c.w.groups) {
        if (&other == &g || other.stage != 1 || other.token != members) continue;
        other.stage = 2;
        other.wait = Wait::None;
    }
    g.stage = 0;
    return Flow::Next;
}

void need_sync(Decode& d) {
    if (!d.take("sync")) d.unsupported("without .sync");
}

}  // namespace

void register_warp(OpTable& t) {
    t["shfl"] = [](Decode& d) {
        need_sync(d);
        const char* names[] = {"up", "down", "bfly", "idx"};
        d.inst.imm = -1;
        for (int k = 0; k < 4; k++)
            if (d.take(names[k])) d.inst.imm = k;
        if (d.inst.imm < 0 || d.take_type() != Type::B32) d.unsupported("of this form");
        d.expect_count(5, 5);
        d.inst.a[1] = d.src(1, Type::B32);
        d.inst.a[2] = d.src(2, Type::U32);
        d.inst.a[3] = d.src(3, Type::U32);
        d.inst.a[4] = d.src(4, Type::U32);
        const Operand& o = d.at(0);
        bool pair = o.kind == Operand::Pair;
        d.inst.a[0] = d.dst(pair ? o.items[0] : o, Type::B32);
        if (pair) d.inst.a[5] = d.pred_dst(o.items[1]);
        d.finish(shfl, Class::Warp);
    };
    t["vote"] = [](Decode& d) {
        need_sync(d);
        const char* names[] = {"all", "any", "uni", "ballot"};
        d.inst.imm = -1;
        for (int k = 0; k < 4; k++)
            if (d.take(names[k])) d.inst.imm = k;
        if (d.inst.imm < 0 || d.take_type() != (d.inst.imm == Ballot ? Type::B32 : Type::Pred)) d.unsupported("of this form");
        d.expect_count(3, 3);
        bool negated;
        d.inst.a[1] = d.pred_src(d.at(1), &negated);
        d.inst.flags = negated;
        d.inst.a[2] = d.src(2, Type::U32);
        d.inst.a[0] = d.dst(0, d.inst.imm == Ballot ? Type::B32 : Type::Pred);
        d.finish(vote, Class::Warp);
    };
    t["match"] = [](Decode& d) {
        bool all = d.take("all");
        if (!all && !d.take("any")) d.unsupported("without .all or .any");
        need_sync(d);
        Type n = d.take_type();
        if (n != Type::B32 && n != Type::B64) d.unsupported("of this type");
        d.expect_count(3, 3);
        d.inst.imm = all;
        d.inst.a[1] = d.src(1, n);
        d.inst.a[2] = d.src(2, Type::U32);
        const Operand& o = d.at(0);
        bool pair = o.kind == Operand::Pair;
        d.inst.a[0] = d.dst(pair ? o.items[0] : o, Type::B32);
        if (pair) d.inst.a[3] = d.pred_dst(o.items[1]);
        d.finish(n == Type::B32 ? match<uint32_t> : match<uint64_t>, Class::Warp);
    };
    t["redux"] = [](Decode& d) {
        need_sync(d);
        const char* names[] = {"add", "min", "max", "and", "or", "xor"};
        d.inst.imm = -1;
        for (int k = 0; k < 6; k++)
            if (d.take(names[k])) d.inst.imm = k;
        Type n = d.take_type();
        if (d.inst.imm < 0 || size_of(n) != 4 || !is_integer(n)) d.unsupported("of this form");
        operands(d, n, {n, Type::U32});
        d.inst.flags = is_signed(n);
        d.finish(redux, Class::Warp);
    };
    t["elect"] = [](Decode& d) {
        need_sync(d);
        d.expect_count(2, 2);
        const Operand& o = d.at(0);
        if (o.kind != Operand::Pair) d.malformed("expected d|p");
        d.inst.a[2] = d.src(1, Type::U32);
        if (o.items[0].kind != Operand::Sink) d.inst.a[0] = d.dst(o.items[0], Type::B32);
        d.inst.a[1] = d.pred_dst(o.items[1]);
        d.finish(elect, Class::Warp);
    };
    t["activemask"] = [](Decode& d) {
        if (d.take_type() != Type::B32) d.unsupported("of this type");
        d.expect_count(1, 1);
        d.inst.a[0] = d.dst(0, Type::B32);
        d.finish(activemask, Class::Warp);
    };
    t["bar.warp"] = [](Decode& d) {
        need_sync(d);
        d.expect_count(1, 1);
        d.inst.a[1] = d.src(0, Type::U32);
        d.finish(warp_sync, Class::Warp);
    };
}

}  // namespace dsv3::emulator
