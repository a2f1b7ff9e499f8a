// ld, st and the fences.

#include "ordering.hpp"

namespace dsv3::emulator {

void take_ordering(Decode& d, MemoryOp& op, Order order, Scope scope) {
    op.order = order;
    op.scope = scope;
    if (d.take("weak")) op.order = Order::Weak, op.scope = Scope::None;
    if (d.take("volatile") || d.take("mmio")) op.order = Order::Relaxed, op.scope = Scope::Sys;
    if (d.take("relaxed")) op.order = Order::Relaxed;
    if (d.take("acquire")) op.order = Order::Acquire;
    if (d.take("release")) op.order = Order::Release;
    if (d.take("acq_rel")) op.order = Order::AcqRel;
    if (d.take("cta")) op.scope = Scope::Cta;
    if (d.take("cluster")) op.scope = Scope::Cluster;
    if (d.take("gpu")) op.scope = Scope::Gpu;
    if (d.take("sys")) op.scope = Scope::Sys;
    if (op.order != Order::Weak && op.scope == Scope::None) d.unsupported("without a scope");
}

void take_cache_hints(Decode& d, const Operand** policy) {
    for (const char* m : {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"}) d.take(m);
    while (!d.take_prefix("L1::").empty()) {}
    bool hint = d.take("L2::cache_hint");
    while (!d.take_prefix("L2::").empty()) {}
    if (policy) *policy = hint ? &d.at(d.count() - 1) : nullptr;
    if (hint) d.src(d.count() - 1, Type::B64);
}

namespace {

bool synchronises(const Target& t) { return t.region && t.region->synchronises; }

Warp::Fences& fences(Warp& w) {
    if (!w.fences) w.fences = std::make_unique<Warp::Fences>();
    return *w.fences;
}

uint64_t address_of(const MemoryOp& op, const uint32_t* base, int l) {
    uint64_t a = op.wide ? get<uint64_t>(base, l) : base[l];
    a += static_cast<uint64_t>(op.offset);
    return op.wide || op.space == Space::Generic ? a : static_cast<uint32_t>(a);
}

Target element(Target t, uint32_t at) {
    t.data += at;
    t.offset += at;
    return t;
}

Flow load(Context& c, const Inst& i) {
    const MemoryOp& op = *static_cast<const MemoryOp*>(i.extra);
    uint32_t size = static_cast<uint32_t>(size_of(op.type)), bytes = size * static_cast<uint32_t>(op.vector);
    const uint32_t* base = c.src(i.a[1]);
    Target targets[32];
    uint8_t seen[32][32];  // where others' stores may still be on their way
    uint64_t hash = 0;
    bool strong = op.order != Order::Weak;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        Target& t = targets[l];
        t = c.locate(op.space, address_of(op, base, l), bytes, bytes, l, false);
        if (!strong) continue;
        if (t.region && !t.region->late.empty()) {
            c.see(t, bytes, l, seen[l]);
            t.data = seen[l];
        }
        uint64_t v = 0;
        std::memcpy(&v, targets[l].data, std::min(bytes, 8u));
        hash = (hash ^ v ^ targets[l].watch()) * 0x9E3779B97F4A7C15;
    }
    const Target& first = targets[__builtin_ctz(c.mask)];
    // Each round of a loop that waits would multiply the interleavings; the next write to the word wakes it.
    uint32_t rounds = c.m.options.schedule == "sequential" ? 0 : 2;
    if (strong && (first.region || first.cta) && c.polls(hash, rounds)) {
        c.group->watch_low = UINT64_MAX, c.group->watch_high = 0;
        for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
            const Target& t = targets[__builtin_ctz(rest)];
            c.group->watch_low = std::min(c.group->watch_low, t.watch());
            c.group->watch_high = std::max(c.group->watch_high, t.watch() + bytes);
        }
        uint64_t seen = 0;
        std::memcpy(&seen, first.data, std::min(bytes, 8u));
        return c.block(Wait::Spin, c.w.id, "another value than " + std::to_string(seen) + " in " +
                       (first.cta ? "shared memory at offset " + std::to_string(first.offset) : "'" + first.region->name + "' at byte " + std::to_string(first.offset)));
    }
    uint32_t poison = 0;
    if (c.checks && (first.shadow || op.space == Space::Generic)) {
        uint32_t access = c.m.log_access(c.w, i, false, op.scope);
        for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
            int l = __builtin_ctz(rest);
            if (c.check_read(targets[l], bytes, access, l)) poison |= 1u << l;
        }
    }
    if (strong) acquire_from(c, op, targets, bytes), c.await_values(i, targets, bytes);
    uint64_t back = c.access(targets, bytes, true, false, !strong).back;
    bool sign = is_signed(op.type);
    for (int k = 0; k < op.vector; k++) {
        if (i.list[k] == no_ref) continue;
        if (first.cta || first.region) c.m.expect_result(c.w, i.list[k], back, i);
        uint32_t* d = c.dst(i.list[k]);
        uint32_t unwritten = 0;
        for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
            int l = __builtin_ctz(rest);
            const uint8_t* p = targets[l].data + static_cast<uint32_t>(k) * size;
            uint64_t v = 0;
            std::memcpy(&v, p, size);
            if (sign && size < 8) v = static_cast<uint64_t>(static_cast<int64_t>(v << (64 - 8 * size)) >> (64 - 8 * size));
            op.wide_value ? put<uint64_t>(d, l, v) : put<uint32_t>(d, l, static_cast<uint32_t>(v));
            if ((poison >> l & 1) && targets[l].poison->any(targets[l].offset + static_cast<uint32_t>(k) * size, size)) unwritten |= 1u << l;
        }
        if (c.checks && (unwritten || c.w.poisoned)) c.mark_unwritten(i.list[k], unwritten);
    }
    return strong ? Flow::Yield : Flow::Next;
}

Flow store(Context& c, const Inst& i) {
    const MemoryOp& op = *static_cast<const MemoryOp*>(i.extra);
    uint32_t size = static_cast<uint32_t>(size_of(op.type)), bytes = size * static_cast<uint32_t>(op.vector);
    const uint32_t* base = c.src(i.a[1]);
    Target targets[32];
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        targets[l] = c.locate(op.space, address_of(op, base, l), bytes, bytes, l, true);
    }
    const Target& first = targets[__builtin_ctz(c.mask)];
    if (op.order == Order::Release) c.await_stores(i, op.scope);
    bool tracked = c.checks && (first.shadow || op.space == Space::Generic);
    uint32_t access = tracked ? c.m.log_access(c.w, i, false, op.scope) : 0;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        uint8_t value[32];
        for (int k = 0; k < op.vector; k++) {
            uint64_t v = op.wide_value ? get<uint64_t>(c.src(i.list[k]), l) : c.src(i.list[k])[l];
            std::memcpy(value + static_cast<uint32_t>(k) * size, &v, size);
        }
        bool passes = synchronises(targets[l]);
        if (op.order == Order::Release || passes) c.make_visible(1u << l, op.scope);
        Published released = release_of(c, op, targets[l], l);
        if (Region* r = targets[l].region) {
            // A plain store that another thread could see too early is a race, which the checks report.
            if (op.order == Order::Weak || passes) c.m.settle(*r, targets[l].offset, bytes);
            else for (uint32_t k = 0; k < bytes; k += size) c.delay(element(targets[l], k), size, l);
        }
        bool same = std::memcmp(targets[l].data, value, bytes) == 0;
        // Lanes of one store that agree on the value may share an address.
        bool twin = false;
        if (tracked && same && targets[l].shadow) {
            uint32_t writer = targets[l].shadow->writer(c.m.log, targets[l].offset);
            twin = writer == access && access != 0;
        }
        if (tracked && !twin) c.check_write(targets[l], bytes, access, l);
        std::memcpy(targets[l].data, value, bytes);
        if (!same) c.changed(targets[l], bytes);
        if (targets[l].published) c.publish(targets[l], bytes, std::move(released), false);
    }
    uint64_t there = c.access(targets, bytes, false, true).there;
    if (op.order != Order::Weak && (first.cta || first.region)) each_active(c, [&](int l) { c.m.stamp(targets[l], bytes, there); });
    return op.order != Order::Weak ? Flow::Yield : Flow::Next;
}

void decode_access(Decode& d, bool is_load) {
    MemoryOp& op = d.extra<MemoryOp>();
    take_ordering(d, op, Order::Weak, Scope::None);
    op.space = d.take_space(Space::Generic);
    const Operand* policy;
    take_cache_hints(d, &policy);
    op.vector = d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1;
    d.take("unified");
    op.type = d.take_type();
    if (size_of(op.type) == 0 || size_of(op.type) > 8 || size_of(op.type) * op.vector > 32) d.unsupported("of this type");
    if (op.space == Space::Const && !is_load) d.malformed("constant memory is read-only");
    d.expect_count(policy ? 3 : 2, policy ? 3 : 2);
    const Operand& value = d.at(is_load ? 0 : 1);
    d.inst.a[1] = d.address(d.at(is_load ? 1 : 0), &op.wide, &op.offset);
    std::vector<Ref> refs;
    auto one = [&](const Operand& o) {
        int have = d.register_size(o);
        op.wide_value = have == 8 || (have < 0 && size_of(op.type) == 8);
        if (have >= 0 && (have == 0 || have < size_of(op.type))) d.malformed("register '" + std::string(o.name) + "' is too small");
        Type t = op.wide_value ? Type::B64 : size_of(op.type) == 8 ? op.type : have < 0 ? op.type : Type::B32;
        if (is_load) refs.push_back(o.kind == Operand::Sink && o.items.empty() ? no_ref : d.dst(o, t));
        else refs.push_back(d.src(o, t));
    };
    if (op.vector > 1) {
        const std::vector<Operand>& items = d.items(value, static_cast<size_t>(op.vector), static_cast<size_t>(op.vector));
        bool wide = false, first = true;
        for (const Operand& o : items) {
            one(o);
            if (!first && wide != op.wide_value && o.kind == Operand::Register) d.malformed("registers of different sizes");
            if (o.kind == Operand::Register) wide = op.wide_value, first = false;
        }
        op.wide_value = first ? size_of(op.type) == 8 : wide;
    } else {
        one(value);
    }
    d.set_list(refs);
    d.inst.type = op.type;
    d.finish(is_load ? load : store, Class::Memory);
}

// ---- fences
enum FenceKind : int64_t { fence_memory, fence_proxy_async, fence_map_release, fence_map_acquire, fence_mbarrier_init, fence_none };
constexpr uint32_t of_shared = 1, of_global = 2;  ///< fence.proxy.async, in `flags`
constexpr uint32_t sequential = 8;  ///< fence.sc; beside the scope in `flags`

Flow fence(Context& c, const Inst& i) {
    Warp& w = c.w;
    if (i.imm == fence_memory) {
        Scope scope = static_cast<Scope>(i.flags & 7);
        c.await_stores(i, scope);
        memory_fence(c, scope, i.flags & sequential);
    }
    if (!c.checks || i.imm == fence_memory) return Flow::Yield;
    uint32_t now = w.now++;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        uint32_t bit = 1u << l;
        Knowledge& k = w.known[static_cast<size_t>(l)];
        Clock own = k.generic;
        own.add(w.agent, bit, now);
        switch (i.imm) {
            case fence_proxy_async:
                if (i.flags & of_shared) k.proxy.join(own);
                if (i.flags & of_global) k.proxy_global.join(own);
                break;
            case fence_mbarrier_init: k.init.join(own); break;
            case fence_map_release: k.map_released.join(own); break;
            case fence_map_acquire: k.map_acquired.join(k.map_released); break;
            default: break;
        }
    }
    return Flow::Yield;
}

void decode_fence(Decode& d, bool membar) {
    auto scope = [&] {
        if (d.take("cta")) return Scope::Cta;
        if (d.take("cluster")) return Scope::Cluster;
        if (d.take("gpu") || (membar && d.take("gl"))) return Scope::Gpu;
        if (d.take("sys")) return Scope::Sys;
        d.unsupported("without a scope");
    };
    d.inst.imm = fence_memory;
    if (d.take("proxy")) {
        if (d.take("alias")) d.inst.imm = fence_none;
        else if (d.take("async")) {
            d.inst.imm = fence_proxy_async;
            d.inst.flags = d.take("global") ? of_global : d.take("shared::cta") || d.take("shared::cluster") ? of_shared : of_shared | of_global;
        } else if (d.take("tensormap::generic")) {
            if (d.take("release")) {
                d.inst.imm = fence_map_release;
                d.expect_count(0, 0);
            } else if (d.take("acquire")) {
                d.inst.imm = fence_map_acquire;
                d.expect_count(2, 2);
                bool wide;
                int64_t offset;
                d.address(d.at(0), &wide, &offset);
                if (d.literal(1) != 128) d.malformed("takes 128 bytes");
            } else {
                d.unsupported("without .release or .acquire");
            }
            scope();
        } else {
            d.unsupported("of this proxy");
        }
    } else if (d.take("mbarrier_init")) {
        if (!d.take("release") || !d.take("cluster")) d.unsupported("of this form");
        d.inst.imm = fence_mbarrier_init;
    } else {
        bool strongest = d.take("sc") || membar;  // membar is fence.sc's older name
        for (const char* m : {"acq_rel", "acquire", "release"})
            if (!strongest && d.take(m)) break;
        d.inst.flags = static_cast<uint32_t>(scope()) | (strongest ? sequential : 0);
    }
    d.finish(fence, Class::Barrier);
}

}  // namespace

void memory_fence(Context& c, Scope scope, bool sequential) {
    c.make_visible(c.mask, scope, sequential);
    if (!c.checks) return;
    uint32_t now = c.w.now++;
    Warp::Fences& f = fences(c.w);
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        size_t l = static_cast<size_t>(__builtin_ctz(rest));
        Knowledge& k = c.w.known[l];
        for (int at = 0; at <= reach_of(scope); at++) k.join(f.pending[at][l]);
        f.released[l] = k;
        f.time[l] = now;
        f.scope[l] = scope;
    }
}

void acquire_from(Context& c, const MemoryOp& op, const Target* targets, uint32_t bytes) {
    if (!c.checks) return;
    uint32_t left = c.mask;
    while (left) {
        const Target& t = targets[__builtin_ctz(left)];
        bool acquires = op.order == Order::Acquire || op.order == Order::AcqRel || synchronises(t);
        uint32_t same = 0;
        for (uint32_t rest = left; rest; rest &= rest - 1)
            if (targets[__builtin_ctz(rest)].data == t.data) same |= rest & -rest;
        left &= ~same;
        if (!t.published || (t.published->empty() && !(t.region && !t.region->late.empty()))) continue;
        for (uint64_t word = t.offset / 4; word <= (t.offset + bytes - 1) / 4; word++) {
            const Published* found = c.published_at(t, word, __builtin_ctz(same));
            if (!found || found->scope == Scope::None) continue;
            const Published& p = *found;
            int d = c.w.cta->locality().distance(p.from);
            if (reach_of(p.scope) < d) continue;
            if (acquires && reach_of(op.scope) >= d) {
                c.w.acquire(same, p.knowledge);
            } else if (!acquires) {
                for (uint32_t rest = same; rest; rest &= rest - 1)
                    fences(c.w).pending[d][static_cast<size_t>(__builtin_ctz(rest))].join(p.knowledge);
            }
        }
    }
}

Published release_of(Context& c, const MemoryOp& op, const Target& target, int lane) {
    Published p;
    if (!c.checks || op.order == Order::Weak) return p;
    p.from = c.w.cta->locality();
    if (op.order == Order::Release || op.order == Order::AcqRel || synchronises(target)) {
        p.knowledge = c.w.release(1u << lane);
        p.scope = op.scope;
    } else if (c.w.fences && c.w.fences->time[static_cast<size_t>(lane)]) {
        // fence; st.relaxed: publishes what was done before the fence.
        size_t l = static_cast<size_t>(lane);
        p.knowledge = c.w.fences->released[l];
        p.knowledge.generic.add(c.w.agent, 1u << lane, c.w.fences->time[l]);
        p.scope = std::min(op.scope, c.w.fences->scope[l]);
    }
    return p;
}

Knowledge fenced_release(const Context& c, uint32_t lanes, Scope scope) {
    Knowledge k;
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
        size_t l = static_cast<size_t>(__builtin_ctz(rest));
        k.init.join(c.w.known[l].init);
        const Warp::Fences* f = c.w.fences.get();
        if (!f || !f->time[l] || f->scope[l] < scope) continue;
        k.join(f->released[l]);
        k.generic.add(c.w.agent, rest & -rest, f->time[l]);
    }
    return k;
}

void acquire_by_fence(Context& c, uint32_t lanes, const Knowledge& k) {
    for (uint32_t rest = lanes; rest; rest &= rest - 1) fences(c.w).pending[0][static_cast<size_t>(__builtin_ctz(rest))].join(k);
}

void register_memory(OpTable& t) {
    t["ld"] = [](Decode& d) { decode_access(d, true); };
    t["ldu"] = t["ld"];
    t["st"] = [](Decode& d) {
        decode_access(d, false);
    };
    t["fence"] = [](Decode& d) { decode_fence(d, false); };
    t["membar"] = [](Decode& d) {
        if (d.has("proxy")) d.take("proxy"), d.unsupported("with .proxy");
        decode_fence(d, true);
    };
}

}  // namespace dsv3::emulator
