// bar, barrier and barrier.cluster.

#include "ordering.hpp"

namespace dsv3::emulator {
namespace {

enum : uint32_t { arrive_only = 1, reduces = 2, negated = 4, has_count = 8 };
enum Reduction { Popc, And, Or };

bool complete(Cta& cta, NamedBarrier& b) {
    if (b.arrived == 0) return false;
    if (b.expected) return b.arrived == b.expected;
    for (auto& w : cta.warps)
        if (w->live && !(b.warps >> w->number & 1)) return false;
    return true;
}

void complete_now(Context& c, uint32_t id, NamedBarrier& b) {
    b.completed.join(b.arriving);
    b.arriving = {};
    b.arrived = b.warps = 0;
    b.completed_at = b.last_arrival;
    b.stored_at = b.stores_arriving;
    b.last_arrival = b.stores_arriving = 0;
    b.last_result = b.result;
    b.generation++;
    c.m.wake(Wait::Barrier, uint64_t{c.w.cta->id} << 8 | id);
}

std::string barrier_name(uint32_t id, const NamedBarrier& b) {
    return "barrier " + std::to_string(id) + " phase " + std::to_string(b.generation) + ": " + std::to_string(b.arrived) +
           " threads arrived, " + (b.expected ? std::to_string(b.expected) + " expected" : "all of the block expected");
}

uint32_t uniform(Context& c, Ref r, const char* what) {
    const uint32_t* p = c.src(r);
    uint32_t v = p[__builtin_ctz(c.mask)];
    for (uint32_t rest = c.mask; rest; rest &= rest - 1)
        if (p[__builtin_ctz(rest)] != v) c.fail(ErrorKind::Hazard, std::string("lanes disagree on the ") + what, __builtin_ctz(rest));
    return v;
}

Flow leave(Context& c, const Inst& i, uint32_t id, NamedBarrier& b) {
    c.group->stage = 0;
    c.m.wait_until(c.w, i, b.completed_at, {Wait::Barrier, id});
    c.w.stored_at = std::max(c.w.stored_at, b.stored_at);
    if (c.checks) c.w.acquire(c.mask, b.completed);
    if (i.flags & reduces) {
        if (i.imm == Popc) each<uint32_t>(c, i.a[0], [&](int) { return b.last_result; });
        else c.set_pred(i.a[0], b.last_result ? ~0u : 0);
    }
    return Flow::Yield;
}

Flow bar(Context& c, const Inst& i) {
    Cta& cta = *c.w.cta;
    uint32_t id = uniform(c, i.a[1], "barrier");
    if (id >= cta.barriers.size()) c.fail(ErrorKind::Emulation, "barrier " + std::to_string(id) + ", there are 16");
    NamedBarrier& b = cta.barriers[id];
    if (c.group->stage == 1) {
        if (b.generation == c.group->token && complete(cta, b)) complete_now(c, id, b);
        if (b.generation != c.group->token) return leave(c, i, id, b);
        return c.block(Wait::Barrier, uint64_t{cta.id} << 8 | id, [id, &b] { return barrier_name(id, b); });
    }
    uint32_t count = i.flags & has_count ? uniform(c, i.a[2], "number of threads") : 0;
    if (i.flags & has_count && (count == 0 || count % 32))
        c.fail(ErrorKind::Hazard, "thread count " + std::to_string(count) + " is no positive multiple of 32");
    if (b.arrived && b.expected != count)
        c.fail(ErrorKind::Hazard, "comes with " + std::to_string(count) + " threads to " + barrier_name(id, b));
    if (b.arrived == 0) b.expected = count, b.result = i.imm == And ? 1 : 0;
    bool first = !(b.warps >> c.w.number & 1);
    uint32_t threads = c.mask == c.w.live ? 32 : static_cast<uint32_t>(__builtin_popcount(c.mask));
    if (!first && c.mask == c.w.live) c.fail(ErrorKind::Hazard, "the warp arrives twice in one phase of " + barrier_name(id, b));
    b.warps |= 1u << c.w.number;
    b.arrived += threads;
    b.last_arrival = std::max(b.last_arrival, c.w.cycle);
    b.stores_arriving = std::max(b.stores_arriving, c.w.stored_at);
    if (b.expected && b.arrived > b.expected) c.fail(ErrorKind::Hazard, "more threads than expected at " + barrier_name(id, b));
    c.w.effects++;
    c.m.progress++;
    if (c.checks) b.arriving.join(c.w.release(c.mask));
    if (i.flags & reduces) {
        uint32_t p = (i.flags & negated ? ~c.pred(i.a[3]) : c.pred(i.a[3])) & c.mask;
        if (i.imm == Popc) b.result += static_cast<uint32_t>(__builtin_popcount(p));
        else if (i.imm == And) b.result &= p == c.mask;
        else b.result |= p != 0;
    }
    uint32_t generation = b.generation;
    if (complete(cta, b)) complete_now(c, id, b);
    if (i.flags & arrive_only) return Flow::Yield;
    if (b.generation != generation) return leave(c, i, id, b);
    c.group->stage = 1;
    c.group->token = generation;
    return c.block(Wait::Barrier, uint64_t{cta.id} << 8 | id, [id, &b] { return barrier_name(id, b); });
}

void decode_bar(Decode& d, bool aligned_by_name) {
    if (d.take("cluster")) d.malformed("bar has no .cluster form");
    d.take("cta");
    bool aligned = d.take("aligned") || aligned_by_name;
    size_t at = 0;
    if (d.take("red")) {
        d.inst.flags |= reduces;
        const char* names[] = {"popc", "and", "or"};
        d.inst.imm = -1;
        for (int k = 0; k < 3; k++)
            if (d.take(names[k])) d.inst.imm = k;
        Type n = d.take_type();
        if (d.inst.imm < 0 || n != (d.inst.imm == Popc ? Type::U32 : Type::Pred)) d.unsupported("of this form");
        d.expect_count(3, 4);
        at = 1;
    } else if (d.take("arrive")) {
        d.inst.flags |= arrive_only;
        d.expect_count(2, 2);
    } else {
        if (!d.take("sync")) d.unsupported("of this form");
        d.expect_count(1, 2);
    }
    d.inst.a[1] = d.src(at, Type::U32);
    size_t operands_left = d.count() - at - ((d.inst.flags & reduces) ? 1 : 0);
    if (operands_left == 2) {
        d.inst.a[2] = d.src(at + 1, Type::U32);
        d.inst.flags |= has_count;
    }
    if (d.inst.flags & reduces) {
        bool n;
        d.inst.a[3] = d.pred_src(d.at(d.count() - 1), &n);
        if (n) d.inst.flags |= negated;
        d.inst.a[0] = d.dst(0, d.inst.imm == Popc ? Type::U32 : Type::Pred);
    }
    d.inst.convergent = aligned;
    d.finish(bar, Class::Barrier);
}

// ---- barrier.cluster
enum : uint32_t { relaxed = 1 };

void cluster_complete(Context& c) {
    Cluster& k = *c.w.cta->cluster;
    for (Cta* cta : k.ctas)
        for (auto& w : cta->warps)
            if (w->live && w->cluster_arrivals <= k.generation) return;
    k.generation++;
    k.completed_at = k.last_arrival;
    k.last_arrival = 0;
    k.completed.join(k.arriving);
    k.arriving = {};
    c.m.wake(Wait::ClusterBarrier, k.id);
}

Flow cluster_arrive(Context& c, const Inst& i) {
    Warp& w = c.w;
    if (w.cluster_arrivals > w.cluster_waits) c.fail(ErrorKind::Hazard, "the warp arrives twice without a barrier.cluster.wait");
    w.cluster_arrivals++;
    w.cta->cluster->last_arrival = std::max(w.cta->cluster->last_arrival, w.cycle);
    w.effects++;
    c.m.progress++;
    if (!(i.flags & relaxed)) c.make_visible(c.mask, Scope::Cluster);
    if (c.checks) w.cta->cluster->arriving.join(i.flags & relaxed ? fenced_release(c, c.mask, Scope::Cluster) : w.release(c.mask));
    cluster_complete(c);
    return Flow::Yield;
}
Flow cluster_wait(Context& c, const Inst& i) {
    Warp& w = c.w;
    Cluster& k = *w.cta->cluster;
    if (w.cluster_arrivals == w.cluster_waits) c.fail(ErrorKind::Hazard, "waits without a barrier.cluster.arrive before it");
    if (k.generation < w.cluster_arrivals) cluster_complete(c);
    if (k.generation < w.cluster_arrivals) {
        return c.block(Wait::ClusterBarrier, k.id, [&k] {
            uint32_t arrived = 0, live = 0;
            for (Cta* cta : k.ctas)
                for (auto& other : cta->warps)
                    if (other->live) live++, arrived += other->cluster_arrivals > k.generation;
            return "barrier.cluster phase " + std::to_string(k.generation) + ": " + std::to_string(arrived) + " warps arrived, " +
                   std::to_string(live) + " expected";
        });
    }
    w.cluster_waits++;
    c.m.wait_until(w, i, k.completed_at, {Wait::ClusterBarrier, 0});
    if (c.checks) w.acquire(c.mask, k.completed);
    return Flow::Yield;
}

}  // namespace

void register_barrier(OpTable& t) {
    DecodeFn warp = t["bar.warp"];
    t.erase("bar.warp");
    t["bar"] = [=](Decode& d) {
        if (d.take("warp")) return warp(d);
        decode_bar(d, true);
    };
    t["barrier"] = [](Decode& d) {
        if (!d.take("cluster")) return decode_bar(d, false);
        d.expect_count(0, 0);
        d.take("aligned");
        d.inst.convergent = true;
        if (d.take("arrive")) {
            if (!d.take("release") && d.take("relaxed")) d.inst.flags = relaxed;
            return d.finish(cluster_arrive, Class::Barrier);
        }
        if (!d.take("wait")) d.unsupported("of this form");
        d.take("acquire");
        d.finish(cluster_wait, Class::Barrier);
    };
}

}  // namespace dsv3::emulator
