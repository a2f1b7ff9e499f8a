// mbarrier: phases completed by arrivals and by bytes.

#include "lanes.hpp"
#include "mbarrier.hpp"
#include "ordering.hpp"

namespace dsv3::emulator {
namespace {

constexpr uint32_t max_count = (1u << 20) - 1;

uint64_t key_of(const Cta& cta, const Mbarrier& b) { return uint64_t{cta.id} << 24 | b.offset; }

void complete_phase(Machine& m, Cta& cta, Mbarrier& b) {
    b.completed.join(b.arriving);
    // Copies that completed in this phase have the phase as their time, counted from 1.
    b.completed.generic.add(b.agent, ~0u, b.phase + 1);
    b.completed.proxy.add(b.agent, ~0u, b.phase + 1);
    b.arriving = {};
    b.completed_at = b.last_arrival;
    b.last_arrival = 0;
    b.phase++;
    b.pending = b.expected;
    m.wake(Wait::Mbarrier, key_of(cta, b));
}

std::string settle(Machine& m, Cta& cta, Mbarrier& b) {
    if (b.pending) return {};
    if (b.tx < 0) return "more bytes than the phase expects: " + std::to_string(-b.tx) + " too many at " + show(b);
    if (b.tx == 0) complete_phase(m, cta, b);
    return {};
}

}  // namespace

std::string show(const Mbarrier& b) {
    return "mbarrier at shared offset " + std::to_string(b.offset) + " phase " + std::to_string(b.phase) + " (parity " +
           std::to_string(b.phase & 1) + "): " + std::to_string(b.expected - b.pending) + " of " + std::to_string(b.expected) +
           " arrivals, " + std::to_string(b.tx) + " bytes missing";
}

std::string expect_bytes(Mbarrier& b, int64_t bytes) {
    b.tx += bytes;
    if (b.tx > max_count) return "transaction count over 2^20 - 1 at " + show(b);
    return {};
}
std::string complete_bytes(Machine& m, Cta& cta, Mbarrier& b, int64_t bytes, uint64_t cycle) {
    b.tx -= bytes;
    b.last_arrival = std::max(b.last_arrival, cycle);
    m.progress++;
    if (b.tx < -static_cast<int64_t>(max_count)) return "transaction count under -(2^20 - 1) at " + show(b);
    return settle(m, cta, b);
}
std::string arrive(Machine& m, Cta& cta, Mbarrier& b, uint32_t count, uint64_t cycle) {
    if (count > b.pending) return "more arrivals than the phase expects at " + show(b);
    b.pending -= count;
    b.last_arrival = std::max(b.last_arrival, cycle);
    m.progress++;
    return settle(m, cta, b);
}

bool init_visible(const AccessLog& log, const Mbarrier& b, const Knowledge& k, const Warp* by, int lane, bool async) {
    const Access& a = log[b.init_access];
    if (async) return k.init.knows(a.agent, b.init_lane, a.time) || k.proxy.knows(a.agent, b.init_lane, a.time);
    return (by && by->agent == a.agent && lane == b.init_lane) || k.generic.knows(a.agent, b.init_lane, a.time) ||
           k.init.knows(a.agent, b.init_lane, a.time);
}

Mbarrier& find_mbarrier(const Context& c, const Target& t, int lane) {
    if (!t.cta) c.fail(ErrorKind::MemoryAccess, "an mbarrier lies in shared memory", lane);
    auto it = t.cta->mbarriers.find(static_cast<uint32_t>(t.offset));
    if (it == t.cta->mbarriers.end())
        c.fail(ErrorKind::Hazard, "no mbarrier is initialised at shared offset " + std::to_string(t.offset), lane);
    if (c.checks && !init_visible(c.m.log, it->second, c.w.known[static_cast<size_t>(lane)], &c.w, lane, false))
        c.fail(ErrorKind::Hazard, "the mbarrier's initialisation by " + c.m.place_of(c.m.log[it->second.init_access], it->second.init_lane) +
               " is not ordered before its use", lane);
    return it->second;
}

namespace {

struct MbarrierOp : MemoryOp {
    bool parity = false, drop = false, expects = false, no_complete = false, test = false;
};

Target barrier_at(Context& c, const MbarrierOp& op, const Inst& i, int l) {
    const uint32_t* base = c.src(i.a[1]);
    uint64_t a = (op.wide ? get<uint64_t>(base, l) : base[l]) + static_cast<uint64_t>(op.offset);
    return c.locate(op.space, op.wide ? a : static_cast<uint32_t>(a), 8, 8, l, true);
}

Flow init(Context& c, const Inst& i) {
    const MbarrierOp& op = *static_cast<const MbarrierOp*>(i.extra);
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        Target t = barrier_at(c, op, i, l);
        uint32_t count = c.src(i.a[2])[l], offset = static_cast<uint32_t>(t.offset);
        if (t.cta != c.w.cta) c.fail(ErrorKind::MemoryAccess, "initialises an mbarrier of another block", l);
        if (count == 0 || count > max_count) c.fail(ErrorKind::Hazard, "count " + std::to_string(count) + " is not in 1 to 2^20 - 1", l);
        if (t.cta->mbarriers.count(offset)) c.fail(ErrorKind::Hazard, "an mbarrier lives here already; mbarrier.inval comes first", l);
        uint32_t access = c.checks ? c.m.log_access(c.w, i, false, Scope::None) : 0;
        c.check_write(t, 8, access, l);
        Mbarrier b;
        b.offset = offset;
        b.expected = b.pending = count;
        b.agent = c.m.new_agent(*c.w.cta->launch);
        b.init_access = access;
        b.init_lane = l;
        t.cta->mbarriers[offset] = std::move(b);
        c.w.effects++;
    }
    return Flow::Yield;
}
Flow inval(Context& c, const Inst& i) {
    const MbarrierOp& op = *static_cast<const MbarrierOp*>(i.extra);
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        Target t = barrier_at(c, op, i, l);
        Mbarrier& b = find_mbarrier(c, t, l);
        if (b.tx != 0) c.fail(ErrorKind::Hazard, "bytes are still under way to " + show(b), l);
        t.cta->mbarriers.erase(b.offset);
        c.w.effects++;
    }
    return Flow::Yield;
}

uint64_t state_of(const Mbarrier& b) { return uint64_t{b.phase} << 32 | b.pending; }

Flow arrive_on(Context& c, const Inst& i) {
    const MbarrierOp& op = *static_cast<const MbarrierOp*>(i.extra);
    uint64_t states[32] = {};
    uint32_t left = c.mask;
    while (left) {
        // Lanes that arrive at one barrier hand over what they know together.
        Target t = barrier_at(c, op, i, __builtin_ctz(left));
        uint32_t same = 0;
        for (uint32_t rest = left; rest; rest &= rest - 1) {
            int l = __builtin_ctz(rest);
            if (barrier_at(c, op, i, l).data != t.data) continue;
            find_mbarrier(c, t, l);
            same |= 1u << l;
        }
        left &= ~same;
        Mbarrier& b = t.cta->mbarriers.find(static_cast<uint32_t>(t.offset))->second;
        uint32_t phase = b.phase;
        if (op.order != Order::Relaxed && t.cta != c.w.cta) c.make_visible(same, Scope::Cluster);
        if (c.checks)
            b.arriving.join(op.order == Order::Relaxed ? fenced_release(c, same, t.cta == c.w.cta ? Scope::Cta : Scope::Cluster) : c.w.release(same));
        for (uint32_t rest = same; rest; rest &= rest - 1) {
            int l = __builtin_ctz(rest);
            uint32_t operand = i.a[2] == no_ref ? 1 : c.src(i.a[2])[l];
            std::string wrong;
            states[l] = state_of(b);
            if (op.expects && operand) wrong = expect_bytes(b, operand);
            uint32_t count = op.expects ? 1 : operand;
            if (wrong.empty() && (count == 0 || count > max_count)) wrong = "count " + std::to_string(count);
            if (op.drop && wrong.empty()) {
                if (count > b.expected) wrong = "drops more arrivals than are expected at " + show(b);
                else b.expected -= count;
            }
            uint64_t cycle = c.w.cycle + (t.cta == c.w.cta ? 0 : timing::cluster_latency);
            if (wrong.empty()) wrong = arrive(c.m, *t.cta, b, count, cycle);
            if (wrong.empty() && op.no_complete && b.phase != phase) wrong = "noComplete, but the phase completed";
            if (!wrong.empty()) c.fail(ErrorKind::Hazard, wrong, l);
            c.w.effects++;
        }
    }
    if (i.a[0] != no_ref) each<uint64_t>(c, i.a[0], [&](int l) { return states[l]; });
    return Flow::Yield;
}

/// expect_tx and complete_tx without an arrival.
Flow transact(Context& c, const Inst& i) {
    const MbarrierOp& op = *static_cast<const MbarrierOp*>(i.extra);
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        Target t = barrier_at(c, op, i, l);
        Mbarrier& b = find_mbarrier(c, t, l);
        uint32_t bytes = c.src(i.a[2])[l];
        std::string wrong = op.expects ? expect_bytes(b, bytes) : complete_bytes(c.m, *t.cta, b, bytes, c.w.cycle);
        if (!wrong.empty()) c.fail(ErrorKind::Hazard, wrong, l);
        c.w.effects++;
    }
    return Flow::Yield;
}

Flow wait(Context& c, const Inst& i) {
    const MbarrierOp& op = *static_cast<const MbarrierOp*>(i.extra);
    uint32_t done = 0;
    uint64_t key = 0, hash = 0, completed_at = 0, last = 0;
    std::function<std::string()> missing;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        Target t = barrier_at(c, op, i, l);
        Mbarrier& b = find_mbarrier(c, t, l);
        uint32_t asked = op.parity ? c.src(i.a[2])[l] & 1 : static_cast<uint32_t>(get<uint64_t>(c.src(i.a[2]), l) >> 32);
        bool complete = op.parity ? (b.phase & 1) != asked : b.phase != asked;
        if (!op.parity && b.phase != asked && b.phase != asked + 1)
            c.fail(ErrorKind::Hazard, "waits with the state of phase " + std::to_string(asked) + " at " + show(b), l);
        if (complete) {
            done |= 1u << l;
            if (b.completed_at >= completed_at) completed_at = b.completed_at, last = b.offset;
            continue;
        }
        key = key_of(*t.cta, b);
        hash = hash * 31 + key + b.phase;
        missing = [&phases = *t.cta, offset = b.offset, asked] {
            auto it = phases.mbarriers.find(offset);
            std::string which = it == phases.mbarriers.end() ? "an mbarrier that was invalidated" : show(it->second);
            return "phase of parity " + std::to_string(asked & 1) + " of " + which;
        };
    }
    if (!done) {
        // try_wait suspends the thread; like hardware it may give up at any time, which a caller must bear. test_wait
        // only looks, and counts as blocked when it repeats itself.
        bool gives_up = c.group->timed_out || (!op.test && c.m.options.schedule == "random" && c.m.random.one_in(8));
        bool repeats = c.polls(hash);
        if (op.test ? repeats : !gives_up || repeats) return c.block(Wait::Mbarrier, key, missing);
    }
    c.group->timed_out = false;
    c.set_pred(i.a[0], done);
    c.m.wait_until(c.w, i, completed_at, {Wait::Mbarrier, last});
    if (c.checks) {
        for (uint32_t left = done; left;) {
            Target t = barrier_at(c, op, i, __builtin_ctz(left));
            uint32_t same = 0;
            for (uint32_t rest = left; rest; rest &= rest - 1)
                if (barrier_at(c, op, i, __builtin_ctz(rest)).data == t.data) same |= rest & -rest;
            const Knowledge& completed = t.cta->mbarriers.find(static_cast<uint32_t>(t.offset))->second.completed;
            op.order == Order::Relaxed ? acquire_by_fence(c, same, completed) : c.w.acquire(same, completed);
            left &= ~same;
        }
    }
    return Flow::Yield;
}

Flow pending_count(Context& c, const Inst& i) {
    const uint32_t* a = c.src(i.a[1]);
    each<uint32_t>(c, i.a[0], [=](int l) { return static_cast<uint32_t>(get<uint64_t>(a, l)); });
    return Flow::Next;
}

void decode_mbarrier(Decode& d) {
    MbarrierOp& op = d.extra<MbarrierOp>();
    auto place = [&](size_t at) { d.inst.a[1] = d.address(d.at(at), &op.wide, &op.offset); };
    if (d.take("pending_count")) {
        d.take("b64");
        d.expect_count(2, 2);
        d.inst.a[1] = d.src(1, Type::B64);
        d.inst.a[0] = d.dst(0, Type::U32);
        return d.finish(pending_count, Class::Barrier);
    }
    op.space = d.take_space(Space::Generic);
    if (d.take("init")) {
        d.take("b64");
        d.expect_count(2, 2);
        place(0);
        d.inst.a[2] = d.src(1, Type::U32);
        return d.finish(init, Class::Barrier);
    }
    if (d.take("inval")) {
        d.take("b64");
        d.expect_count(1, 1);
        place(0);
        return d.finish(inval, Class::Barrier);
    }
    bool arrives = d.take("arrive");
    if (!arrives && d.take("arrive_drop")) arrives = op.drop = true;
    if (arrives) {
        op.expects = d.take("expect_tx");
        op.no_complete = d.take("noComplete");
        take_ordering(d, op, Order::Release, Scope::Cta);
        d.take("b64");
        bool state = d.at(0).kind != Operand::Address;
        size_t at = state ? 1 : 0;
        d.expect_count(at + 1 + op.expects, at + 2);
        place(at);
        if (d.count() == at + 2) d.inst.a[2] = d.src(at + 1, Type::U32);
        if (state && d.at(0).kind != Operand::Sink) {
            if (op.space == Space::SharedCluster) d.malformed("a remote arrive returns no state");
            d.inst.a[0] = d.dst(0, Type::B64);
        }
        return d.finish(arrive_on, Class::Barrier);
    }
    bool expects = d.take("expect_tx"), completes = !expects && d.take("complete_tx");
    if (expects || completes) {
        op.expects = expects;
        take_ordering(d, op, Order::Relaxed, Scope::Cta);
        d.take("b64");
        d.expect_count(2, 2);
        place(0);
        d.inst.a[2] = d.src(1, Type::U32);
        return d.finish(transact, Class::Barrier);
    }
    op.test = d.take("test_wait");
    if (!op.test && !d.take("try_wait")) d.unsupported("of this form");
    op.parity = d.take("parity");
    take_ordering(d, op, Order::Acquire, Scope::Cta);
    d.take("b64");
    d.expect_count(3, op.test ? 3 : 4);
    place(1);
    d.inst.a[2] = d.src(2, op.parity ? Type::U32 : Type::B64);
    if (d.count() == 4) d.src(3, Type::U32);
    d.inst.a[0] = d.pred_dst(d.at(0));
    d.finish(wait, Class::Barrier);
}

}  // namespace

void register_mbarrier(OpTable& t) { t["mbarrier"] = decode_mbarrier; }

}  // namespace dsv3::emulator
