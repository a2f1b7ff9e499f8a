// cp.async and cp.async.bulk, their groups, st.async and red.async.

#include "copy.hpp"
#include "mbarrier.hpp"
#include "ordering.hpp"

namespace dsv3::emulator {
namespace {

struct BulkOp {
    Space to, from;
    bool to_wide = false, from_wide = false, barrier_wide = false;
    int64_t to_offset = 0, from_offset = 0, barrier_offset = 0;
    bool multicast = false, zero_fill = false;
    int reduce = -1;
    Type type = Type::None;
    int vector = 1;
};

uint64_t at(const Context& c, Ref r, bool wide, int64_t offset, int l) {
    uint64_t a = c.value(r, l, wide) + static_cast<uint64_t>(offset);
    return wide ? a : static_cast<uint32_t>(a);
}

template <class F>
Flow for_lanes(Context& c, F f) {
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) f(__builtin_ctz(rest));
    return Flow::Yield;
}

std::vector<Cta*> multicast_targets(Context& c, uint32_t mask, int lane) {
    std::vector<Cta*> targets;
    const std::vector<Cta*>& ctas = c.w.cta->cluster->ctas;
    if (mask == 0 || mask >> ctas.size())
        c.fail(ErrorKind::MemoryAccess, "block mask " + std::to_string(mask) + " in a cluster of " + std::to_string(ctas.size()), lane);
    for (size_t i = 0; i < ctas.size(); i++) {
        if (!(mask >> i & 1)) continue;
        if (ctas[i]->exited) c.fail(ErrorKind::Hazard, "block rank " + std::to_string(i) + " of the cluster has exited", lane);
        targets.push_back(ctas[i]);
    }
    return targets;
}

/// a[0] destination, a[1] source, a[2] bytes, a[3] mbarrier, a[4] block mask.
Flow bulk_load(Context& c, const Inst& i) {
    const BulkOp& op = *static_cast<const BulkOp*>(i.extra);
    return for_lanes(c, [&](int l) {
        uint32_t bytes = c.src(i.a[2])[l];
        if (bytes % 16) c.fail(ErrorKind::MemoryAccess, "copies " + std::to_string(bytes) + " bytes, no multiple of 16", l);
        auto copy = std::make_unique<Copy>(c, i, l);
        Target to = c.locate(op.to, at(c, i.a[0], op.to_wide, op.to_offset, l), std::max(bytes, 1u), 16, l, true);
        Target barrier = barrier_of(c, Space::SharedCluster, at(c, i.a[3], op.barrier_wide, op.barrier_offset, l), l, copy->knowledge);
        if (barrier.cta != to.cta) c.fail(ErrorKind::MemoryAccess, "the mbarrier lies in another block than the destination", l);
        if (bytes == 0) return;
        uint64_t source = at(c, i.a[1], op.from_wide, op.from_offset, l);
        Target from = c.locate(op.from, source, bytes, 16, l, false);
        if (op.from == Space::Shared) {
            copy->chunks = {{0, 0, bytes, true}};
            copy->reduce = op.reduce;
            copy->reduce_type = op.type;
            copy->between_blocks(c, static_cast<uint32_t>(from.offset), to.cta, static_cast<uint32_t>(to.offset), static_cast<uint32_t>(barrier.offset));
        } else {
            for (uint32_t b = 0; b < bytes; b += 256)
                copy->chunks.push_back({source + b, static_cast<uint32_t>(to.offset) + b, std::min(256u, bytes - b), true});
            std::vector<Cta*> targets{to.cta};
            if (op.multicast) targets = multicast_targets(c, c.src(i.a[4])[l] & 0xFFFF, l);
            copy->to_shared(c, static_cast<uint32_t>(barrier.offset), targets);
        }
        Copy& ref = *copy;
        ref.launch(c, std::move(copy));
    });
}
Flow bulk_store(Context& c, const Inst& i) {
    const BulkOp& op = *static_cast<const BulkOp*>(i.extra);
    return for_lanes(c, [&](int l) {
        uint32_t bytes = c.src(i.a[2])[l];
        if (bytes % 16) c.fail(ErrorKind::MemoryAccess, "copies " + std::to_string(bytes) + " bytes, no multiple of 16", l);
        if (bytes == 0) return;
        auto copy = std::make_unique<Copy>(c, i, l);
        uint64_t to = at(c, i.a[0], op.to_wide, op.to_offset, l);
        c.locate(Space::Global, to, bytes, 16, l, true);
        Target from = c.locate(Space::Shared, at(c, i.a[1], op.from_wide, op.from_offset, l), bytes, 16, l, false);
        for (uint32_t b = 0; b < bytes; b += 256)
            copy->chunks.push_back({to + b, static_cast<uint32_t>(from.offset) + b, std::min(256u, bytes - b), true});
        copy->reduce = op.reduce;
        copy->reduce_type = op.type;
        copy->to_global(c);
        Copy& ref = *copy;
        ref.launch(c, std::move(copy));
    });
}
Flow bulk_prefetch(Context& c, const Inst& i) {
    const BulkOp& op = *static_cast<const BulkOp*>(i.extra);
    return for_lanes(c, [&](int l) { c.locate(Space::Global, at(c, i.a[1], op.from_wide, op.from_offset, l), std::max(c.src(i.a[2])[l], 1u), 16, l, false); });
}

Flow bulk_commit(Context& c, const Inst&) {
    return for_lanes(c, [&](int l) { c.w.bulk[l].group++; });
}
Flow bulk_wait(Context& c, const Inst& i) {
    bool read = i.flags;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        BulkState& s = c.w.bulk[l];
        int64_t done = static_cast<int64_t>(s.group) - 1 - i.imm;
        const std::map<uint32_t, int>& open = read ? s.reading : s.writing;
        if (!open.empty() && open.begin()->first <= done)
            return c.block(Wait::BulkGroup, c.w.id, "bulk group " + std::to_string(open.begin()->first) + " of lane " + std::to_string(l) + (read ? " to be read" : " to complete"));
    }
    uint64_t done_at = 0;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        BulkState& s = c.w.bulk[__builtin_ctz(rest)];
        done_at = std::max(done_at, BulkState::done_at(read ? s.read_at : s.written_at, static_cast<int64_t>(s.group) - 1 - i.imm));
    }
    c.m.wait_until(c.w, i, done_at, {Wait::BulkGroup, read});
    if (!c.checks) return Flow::Yield;
    return for_lanes(c, [&](int l) {
        BulkState& s = c.w.bulk[l];
        if (static_cast<int64_t>(s.group) - 1 - i.imm <= 0) return;
        uint32_t done = s.group - 1 - static_cast<uint32_t>(i.imm);
        Clock& k = c.w.known[static_cast<size_t>(l)].generic;
        if (c.w.bulk_read_agent) k.add(c.w.bulk_read_agent, 1u << l, done);
        if (!read && c.w.bulk_write_agent) k.add(c.w.bulk_write_agent, 1u << l, done);
    });
}

// ---- cp.async: 4, 8 or 16 bytes a lane
class SmallCopy : public Operation {
  public:
    SmallCopy(Warp& w, const Inst& inst, int lane, uint32_t group) : warp(w), inst(inst), lane(lane), group(group) {
        w.cta->operations++;
        w.cta->launch->operations++;
    }
    bool step(Machine& m) override {
        Cta& cta = *warp.cta;
        uint8_t data[16] = {};
        uint32_t unwritten = 0;
        auto check = [&](const Target& t, bool write, uint32_t n) {
            if (!m.options.checks || !t.shadow || n == 0) return;
            Accessor by{{&knowledge}, 1, access, lane};
            Conflict conflict = write ? t.shadow->write(m.log, by, t.offset, n) : t.shadow->read(m.log, by, t.offset, n);
            if (conflict.found) m.fail(ErrorKind::Hazard, m.describe_race(conflict, t, write), warp, inst, lane);
        };
        if (source_bytes) {
            Region* r = m.memory.find(from);
            if (!r || !r->alive || from + source_bytes > r->base + r->size)
                m.fail(ErrorKind::MemoryAccess, "reads outside all allocations", warp, inst, lane);
            Target t{r->host + (from - r->base), from - r->base, r->constant ? nullptr : &r->shadow, r->poison.get(), nullptr, nullptr, r};
            check(t, false, source_bytes);
            std::memcpy(data, t.data, source_bytes);
            bool any = cta.poison && t.poison && t.poison->any(t.offset, source_bytes);
            for (uint32_t b = 0; any && b < source_bytes; b++) unwritten |= uint32_t{t.poison->any(t.offset + b, 1)} << b;
        }
        Target t{cta.shared.data() + to, to, cta.shadow.get(), cta.poison.get(), nullptr, &cta, nullptr};
        check(t, true, bytes);
        if (cta.poison) cta.poison->set(to, bytes, false);
        for (uint32_t rest = unwritten; rest; rest &= rest - 1) cta.poison->set(to + static_cast<uint32_t>(__builtin_ctz(rest)), 1, true);
        std::memcpy(t.data, data, bytes);
        m.counts.copy_read += source_bytes;
        BulkState& s = warp.copies[lane];
        if (--s.writing[group] == 0) s.writing.erase(group);
        s.written_at[group] = std::max(s.written_at[group], cycle);
        m.wake(Wait::CpAsync, warp.id);
        cta.operations--;
        cta.launch->operations--;
        return true;
    }
    bool uses_shared(const Cta& cta, Issuer& by) const override {
        by = {&warp, &inst, lane};
        return &cta == warp.cta;
    }
    Warp& warp;
    const Inst& inst;
    int lane;
    uint32_t group, to = 0, bytes = 0, source_bytes = 0, access = 0;
    uint64_t from = 0;
    Knowledge knowledge;
};

Flow cp_async(Context& c, const Inst& i) {
    const BulkOp& op = *static_cast<const BulkOp*>(i.extra);
    uint32_t bytes = static_cast<uint32_t>(i.imm);
    uint64_t landed = c.m.reach_memory(*c.w.cta, c.w.cta->launch->device, c.w.cycle, uint64_t{bytes} * static_cast<uint32_t>(__builtin_popcount(c.mask)), false).back;
    return for_lanes(c, [&](int l) {
        uint32_t n = i.a[2] == no_ref ? bytes : std::min(c.src(i.a[2])[l], bytes);
        if (op.zero_fill && i.a[3] != no_ref && (c.pred(i.a[3]) >> l & 1)) n = 0;
        Target to = c.locate(Space::Shared, at(c, i.a[0], op.to_wide, op.to_offset, l), bytes, bytes, l, true);
        uint64_t from = at(c, i.a[1], op.from_wide, op.from_offset, l);
        if (n) c.locate(Space::Global, from, n, 1, l, false);
        if (from % bytes) c.fail(ErrorKind::MemoryAccess, "the source is not aligned to " + std::to_string(bytes) + " bytes", l);
        BulkState& s = c.w.copies[l];
        auto copy = std::make_unique<SmallCopy>(c.w, i, l, s.group);
        copy->to = static_cast<uint32_t>(to.offset);
        copy->from = from;
        copy->bytes = bytes;
        copy->source_bytes = n;
        copy->cycle = s.last_at = std::max(s.last_at, landed);
        if (c.checks) {
            copy->knowledge = c.w.release(1u << l);
            Access a = c.m.log[c.m.log_access(c.w, i, false, Scope::None)];
            a.agent = agent_of(c.m, c.w, c.w.copy_agent);
            a.time = s.group;
            copy->access = c.m.log.add(a);
        }
        s.writing[s.group]++;
        c.w.effects++;
        c.m.start(std::move(copy));
    });
}
Flow copy_commit(Context& c, const Inst&) {
    return for_lanes(c, [&](int l) { c.w.copies[l].group++; });
}
/// `imm` groups may stay open; -1: all copies, committed or not, must be done.
Flow copy_wait(Context& c, const Inst& i) {
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        BulkState& s = c.w.copies[l];
        int64_t done = static_cast<int64_t>(s.group) - 1 - i.imm;
        if (!s.writing.empty() && s.writing.begin()->first <= done)
            return c.block(Wait::CpAsync, c.w.id, "cp.async group " + std::to_string(s.writing.begin()->first) + " of lane " + std::to_string(l));
    }
    uint64_t done_at = 0;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        BulkState& s = c.w.copies[__builtin_ctz(rest)];
        done_at = std::max(done_at, BulkState::done_at(s.written_at, static_cast<int64_t>(s.group) - 1 - i.imm));
    }
    c.m.wait_until(c.w, i, done_at, {Wait::CpAsync, 0});
    if (!c.checks || !c.w.copy_agent) return Flow::Yield;
    return for_lanes(c, [&](int l) {
        BulkState& s = c.w.copies[l];
        int64_t done = static_cast<int64_t>(s.group) - 1 - i.imm;
        if (i.imm < 0) s.group++;
        if (done > 0) c.w.known[static_cast<size_t>(l)].generic.add(c.w.copy_agent, 1u << l, static_cast<uint32_t>(done));
    });
}

/// The arrival of cp.async.mbarrier.arrive: once the lane's copies so far have landed.
class LateArrival : public Operation {
  public:
    LateArrival(Warp& w, const Inst& inst, int lane, Cta* cta, uint32_t barrier, uint32_t group)
        : warp(w), inst(inst), lane(lane), cta(cta), barrier(barrier), group(group) {
        cta->operations++;
        w.cta->launch->operations++;
        cycle = std::max(w.cycle, w.copies[lane].last_at + 1);  // behind the copies, should time decide who moves
    }
    bool step(Machine& m) override {
        BulkState& s = warp.copies[lane];
        if (!s.writing.empty() && s.writing.begin()->first <= group) return false;
        auto it = cta->mbarriers.find(barrier);
        if (it == cta->mbarriers.end()) m.fail(ErrorKind::Hazard, "its mbarrier was invalidated", warp, inst, lane);
        if (m.options.checks) {
            it->second.arriving.join(knowledge);
            if (warp.copy_agent) it->second.arriving.generic.add(warp.copy_agent, 1u << lane, group);
        }
        for (auto& [at_group, at] : s.written_at)
            if (at_group <= group) cycle = std::max(cycle, at);
        std::string wrong = arrive(m, *cta, it->second, 1, cycle);
        if (!wrong.empty()) m.fail(ErrorKind::Hazard, wrong, warp, inst, lane);
        cta->operations--;
        warp.cta->launch->operations--;
        return true;
    }
    bool uses_shared(const Cta& other, Issuer& by) const override {
        by = {&warp, &inst, lane};
        return &other == cta;
    }
    Warp& warp;
    const Inst& inst;
    int lane;
    Cta* cta;
    uint32_t barrier, group;
    Knowledge knowledge;
};
Flow copy_arrive(Context& c, const Inst& i) {
    const BulkOp& op = *static_cast<const BulkOp*>(i.extra);
    return for_lanes(c, [&](int l) {
        Target t = c.locate(op.to, at(c, i.a[0], op.to_wide, op.to_offset, l), 8, 8, l, true);
        Mbarrier& b = find_mbarrier(c, t, l);
        if (!i.flags) b.pending++;  // without .noinc the arrival is one more than the phase counted
        BulkState& s = c.w.copies[l];
        auto late = std::make_unique<LateArrival>(c.w, i, l, t.cta, b.offset, s.group);
        if (c.checks) late->knowledge = c.w.release(1u << l);
        s.group++;
        c.m.start(std::move(late));
    });
}

void decode_cp_bulk(Decode& d, bool reduces);
void decode_cp(Decode& d) {
    bool reduces = d.take("reduce");
    if (!d.take("async")) d.unsupported("of this form");
    if (d.take("bulk")) return decode_cp_bulk(d, reduces);
    if (reduces) d.unsupported("without .bulk");
    BulkOp& op = d.extra<BulkOp>();
    if (d.take("commit_group")) return d.finish(copy_commit, Class::Async);
    if (d.take("wait_all")) {
        d.inst.imm = -1;
        return d.finish(copy_wait, Class::Async);
    }
    if (d.take("wait_group")) {
        d.inst.imm = static_cast<int64_t>(d.literal(0));
        return d.finish(copy_wait, Class::Async);
    }
    if (d.take("mbarrier")) {
        if (!d.take("arrive")) d.unsupported("of this form");
        d.inst.flags = d.take("noinc");
        op.to = d.take_space(Space::Generic);
        d.take("b64");
        d.expect_count(1, 1);
        d.inst.a[0] = d.address(d.at(0), &op.to_wide, &op.to_offset);
        return d.finish(copy_arrive, Class::Async);
    }
    if (!d.take("ca") && !d.take("cg")) d.unsupported("of this form");
    if ((!d.take("shared") && !d.take("shared::cta")) || !d.take("global")) d.unsupported("of these state spaces");
    const Operand* policy;
    take_cache_hints(d, &policy);
    d.expect_count(3, 5);
    d.inst.a[0] = d.address(d.at(0), &op.to_wide, &op.to_offset);
    d.inst.a[1] = d.address(d.at(1), &op.from_wide, &op.from_offset);
    d.inst.imm = static_cast<int64_t>(d.literal(2));
    if (d.inst.imm != 4 && d.inst.imm != 8 && d.inst.imm != 16) d.malformed("copies 4, 8 or 16 bytes");
    size_t more = d.count() - 3 - (policy != nullptr);
    if (more > 1) d.unsupported("with so many operands");
    if (more == 1) {
        if (d.register_size(d.at(3)) == 0) {
            bool negated;
            d.inst.a[3] = d.pred_src(d.at(3), &negated);
            op.zero_fill = true;
            if (negated) d.unsupported("with a negated predicate");
        } else {
            d.inst.a[2] = d.src(3, Type::U32);
        }
    }
    d.finish(cp_async, Class::Async);
}

void decode_cp_bulk(Decode& d, bool reduces) {
    if (d.take("commit_group")) return d.finish(bulk_commit, Class::Async);
    if (d.take("wait_group")) {
        d.inst.flags = d.take("read");
        d.expect_count(1, 1);
        d.inst.imm = static_cast<int64_t>(d.literal(0));
        return d.finish(bulk_wait, Class::Async);
    }
    if (d.take("tensor")) d.unsupported("of this order of modifiers");
    BulkOp& op = d.extra<BulkOp>();
    if (d.take("prefetch")) {
        d.take("L2");
        if (d.take_space(Space::Generic) != Space::Global) d.unsupported("of this state space");
        const Operand* policy;
        take_cache_hints(d, &policy);
        d.expect_count(policy ? 3 : 2, policy ? 3 : 2);
        d.inst.a[1] = d.address(d.at(0), &op.from_wide, &op.from_offset);
        d.inst.a[2] = d.src(1, Type::U32);
        return d.finish(bulk_prefetch, Class::Async);
    }
    bool to_global = d.statement.opcode.find(".global.shared::cta") != std::string_view::npos;
    op.to = to_global ? Space::Global : d.take("shared::cluster") ? Space::SharedCluster : d.take("shared::cta") ? Space::Shared : Space::Generic;
    if (to_global) d.take("global");
    op.from = d.take_space(Space::Generic);
    if (reduces) {
        op.reduce = reduce_op(d);
        d.take("noftz");
        op.type = d.take_type();
        if (op.type == Type::F64 || size_of(op.type) > 8) d.unsupported("of this type");
    }
    const Operand* policy;
    take_cache_hints(d, &policy);
    if (op.to == Space::Global) {
        if (op.from != Space::Shared || !d.take("bulk_group")) d.unsupported("of this form");
        d.expect_count(policy ? 4 : 3, policy ? 4 : 3);
        d.inst.a[0] = d.address(d.at(0), &op.to_wide, &op.to_offset);
        d.inst.a[1] = d.address(d.at(1), &op.from_wide, &op.from_offset);
        d.inst.a[2] = d.src(2, Type::U32);
        return d.finish(bulk_store, Class::Async);
    }
    if (!d.take("mbarrier::complete_tx::bytes") || op.to == Space::Generic || (op.from != Space::Global && op.from != Space::Shared))
        d.unsupported("of this form");
    op.multicast = d.take("multicast::cluster");
    size_t n = 4 + op.multicast + (policy != nullptr);
    d.expect_count(n, n);
    d.inst.a[0] = d.address(d.at(0), &op.to_wide, &op.to_offset);
    d.inst.a[1] = d.address(d.at(1), &op.from_wide, &op.from_offset);
    d.inst.a[2] = d.src(2, Type::U32);
    d.inst.a[3] = d.address(d.at(3), &op.barrier_wide, &op.barrier_offset);
    if (op.multicast) d.inst.a[4] = d.src(4, Type::U16);
    d.finish(bulk_load, Class::Async);
}

/// st.async and red.async: a[0] destination, a[3] mbarrier, the list the values.
Flow store_async(Context& c, const Inst& i) {
    const BulkOp& op = *static_cast<const BulkOp*>(i.extra);
    uint32_t size = static_cast<uint32_t>(size_of(op.type)), bytes = size * static_cast<uint32_t>(op.vector);
    Target targets[32];
    for_lanes(c, [&](int l) { targets[l] = c.locate(Space::SharedCluster, at(c, i.a[0], op.to_wide, op.to_offset, l), bytes, bytes, l, true); });
    uint64_t there = c.access(targets, bytes, op.reduce >= 0, true).there;
    return for_lanes(c, [&](int l) {
        auto copy = std::make_unique<Copy>(c, i, l);
        copy->generic = true;
        copy->cycle = there;
        const Target& to = targets[l];
        Target barrier = barrier_of(c, Space::SharedCluster, at(c, i.a[3], op.barrier_wide, op.barrier_offset, l), l, copy->knowledge);
        if (barrier.cta != to.cta) c.fail(ErrorKind::MemoryAccess, "the mbarrier lies in another block than the destination", l);
        copy->payload.resize(bytes);
        for (int k = 0; k < op.vector; k++) {
            uint64_t v = size == 8 ? get<uint64_t>(c.src(i.list[k]), l) : c.src(i.list[k])[l];
            std::memcpy(copy->payload.data() + static_cast<uint32_t>(k) * size, &v, size);
        }
        copy->chunks = {{0, 0, bytes, true}};
        copy->reduce = op.reduce;
        copy->reduce_type = op.type;
        copy->to_shared(c, static_cast<uint32_t>(barrier.offset), {to.cta});
        copy->shift_destination(static_cast<uint32_t>(to.offset));
        Copy& ref = *copy;
        ref.launch(c, std::move(copy));
    });
}
void decode_store_async(Decode& d, bool reduces) {
    BulkOp& op = d.extra<BulkOp>();
    d.take("async");
    d.take("weak");
    if (reduces) d.take("relaxed"), d.take("cluster");
    if (d.take_space(Space::SharedCluster) != Space::SharedCluster || !d.take("mbarrier::complete_tx::bytes")) d.unsupported("of this form");
    if (reduces) op.reduce = reduce_op(d);
    op.vector = d.take("v2") ? 2 : d.take("v4") ? 4 : 1;
    op.type = d.take_type();
    if (size_of(op.type) < 4 || size_of(op.type) > 8 || size_of(op.type) * op.vector > 16 || (reduces && is_float(op.type))) d.unsupported("of this type");
    d.expect_count(3, 3);
    d.inst.a[0] = d.address(d.at(0), &op.to_wide, &op.to_offset);
    d.inst.a[3] = d.address(d.at(2), &op.barrier_wide, &op.barrier_offset);
    std::vector<Ref> refs;
    if (op.vector == 1) refs.push_back(d.src(1, op.type));
    else for (const Operand& o : d.items(d.at(1), static_cast<size_t>(op.vector), static_cast<size_t>(op.vector))) refs.push_back(d.src(o, op.type));
    d.set_list(refs);
    d.finish(store_async, Class::Async);
}

}  // namespace

void register_bulk(OpTable& t) {
    t["cp"] = decode_cp;
    for (const char* name : {"st", "red"}) {
        DecodeFn other = t[name];
        bool reduces = name[0] == 'r';
        t[name] = [=](Decode& d) { d.has("async") ? decode_store_async(d, reduces) : other(d); };
    }
}

}  // namespace dsv3::emulator
