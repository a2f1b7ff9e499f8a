// Virtual time: when things happen if warps, engines and links work side by side. It describes a run and decides nothing:
// every agent has a clock of its own, and whoever waits goes on at the later of its clock and of what it waited for.

#include <algorithm>

#include "network.hpp"

namespace dsv3::emulator {
namespace {

constexpr uint32_t shortest_run = 16;

/// The most telling instruction names a run, and the most telling run a slice of several.
int tells(Class k) {
    switch (k) {
        case Class::Wgmma: return 9;
        case Class::Async: return 8;
        case Class::Barrier: return 7;
        case Class::Atomic: return 6;
        case Class::Memory: return 5;
        case Class::Float: return 4;
        case Class::Warp: return 3;
        case Class::Convert: return 2;
        case Class::Integer: return 1;
        default: return 0;
    }
}

bool tells_more(const Warp::Run& a, const Warp::Run& b) {
    if (!a.inst || !b.inst) return a.inst;
    int x = tells(a.inst->klass), y = tells(b.inst->klass);
    return x != y ? x > y : a.length > b.length;
}

Trace::Row row_of(const Cta& cta, int unit) {
    const Launch& l = *cta.launch;
    return {l.device, unit, 0, cta.id, cta.sm, l.id, l.function->name, {cta.index[0], cta.index[1], cta.index[2]}};
}

uint32_t row_of_warp(Trace& trace, Warp& w) {
    if (w.row == Trace::no_row) w.row = trace.add(row_of(*w.cta, static_cast<int>(w.number)));
    return w.row;
}

uint64_t port_cycles(uint64_t bytes) { return std::max<uint64_t>(1, bytes / timing::sm_bytes_per_cycle); }

bool at_barrier(Wait wait) { return wait == Wait::Mbarrier || wait == Wait::Barrier || wait == Wait::ClusterBarrier; }

}  // namespace

/// Gives the instructions that the warp has executed since the last call their issue slots.
void Machine::issue(Warp& w) {
    if (w.issued == 0) return;
    w.cycle = sm_of(*w.cta).issue[w.partition].reserve(w.cycle, w.issued).end;
    w.issued = 0;
}

/// An executed instruction takes an issue slot; see timing.hpp for moves. Slices of running end where a warp waits, and
/// around runs of instructions from one place that are long enough to be seen.
void Machine::advance(Warp& w, const Inst& inst) {
    if (inst.klass == Class::Move) return;
    uint32_t key = inst.place ? inst.place : ~static_cast<uint32_t>(inst.klass);
    if (key != w.run.key) {
        if (w.run.length >= shortest_run) slice(w, w.cycle + w.issued, w.run.inst);
        else if (tells_more(w.run, w.short_run)) w.short_run = w.run;
        w.run = {&inst, key, 0, w.cycle + w.issued};
    }
    if (tells(inst.klass) > tells(w.run.inst->klass)) w.run.inst = &inst;
    w.issued++;
    if (++w.run.length == shortest_run && w.short_run.inst) slice(w, w.run.start, w.short_run.inst);
}

void Machine::slice(Warp& w, uint64_t end, const Inst* named) {
    if (end > w.slice_start && !trace.full())
        trace.span(row_of_warp(trace, w), Trace::Kind::Run, w.slice_start, end, w.cta->launch->program, *named);
    w.slice_start = end;
    w.short_run = {};
}

/// Ends the slice of running that is open.
void Machine::close_slice(Warp& w) {
    issue(w);
    if (w.run.inst) slice(w, w.cycle, tells_more(w.run, w.short_run) ? w.run.inst : w.short_run.inst);
    w.slice_start = w.cycle;
    w.run = w.short_run = {};
}

/// What `inst` waits for happened at `at`.
void Machine::wait_until(Warp& w, const Inst& inst, uint64_t at, Cause cause) {
    issue(w);
    if (at <= w.cycle) return;
    if (at_barrier(cause.wait)) counts.barrier_waits++, counts.barrier_wait_cycles += at - w.cycle;
    close_slice(w);
    if (!trace.full()) trace.span(row_of_warp(trace, w), Trace::Kind::Wait, w.cycle, at, w.cta->launch->program, inst, cause);
    w.cycle = w.slice_start = at;
}

/// A load's result is there at `at`; the warp goes on until an instruction names the register.
void Machine::expect_result(Warp& w, Ref destination, uint64_t at, const Inst& inst) {
    if (destination >= 0) w.loading.push_back({static_cast<uint32_t>(destination), at, &inst});
}

void Machine::await_results(Warp& w, const Inst& inst) {
    const Program& p = *w.cta->launch->program;
    const uint32_t* touched = p.touched.data() + inst.touched;
    const Warp::Loading* last = nullptr;
    for (uint32_t i = 0; i < uint32_t{inst.reads} + inst.writes; i++)
        for (const Warp::Loading& x : w.loading)
            if (x.word == touched[i] && (!last || x.at > last->at)) last = &x;
    if (!last) return;
    wait_until(w, inst, last->at, {Wait::Load, static_cast<uint64_t>(last->inst - p.code.data())});
    w.loading.erase(std::remove_if(w.loading.begin(), w.loading.end(), [&](const Warp::Loading& x) { return x.at <= w.cycle; }), w.loading.end());
}

Slot Machine::occupy(Cta& cta, Trace::Kind kind, uint64_t ready, uint64_t cycles, const Inst& inst, uint64_t object) {
    Device::Sm& sm = sm_of(cta);
    bool tensor = kind == Trace::Kind::Tensor, store = kind == Trace::Kind::Store;
    Slot slot = (tensor ? sm.tensor_core : store ? sm.bulk_stores : sm.copy_engine).reserve(ready, cycles);
    if (tensor) counts.tensor_core_cycles += cycles;
    if (trace.full()) return slot;
    int unit = tensor ? Trace::tensor_core : store ? Trace::bulk_stores : Trace::copy_engine;
    uint32_t& row = cta.rows[-1 - unit];
    if (row == Trace::no_row) row = trace.add(row_of(cta, unit));
    trace.span(row, kind, slot.start, slot.end, cta.launch->program, inst, {Wait::None, object});
    return slot;
}

Device::Sm& Machine::sm_of(const Cta& cta) { return devices[static_cast<size_t>(cta.launch->device)].sms[cta.sm]; }

/// Bytes on their way from one device to another: from when the first leaves one port until the last is through the other.
Slot Machine::cross(int from, int to, uint64_t ready, uint64_t bytes) {
    size_t kind = network->same_node(from, to) ? 0 : 1;
    uint64_t latency = timing::cycles(network->link(from, to).latency);
    Slot out = devices[static_cast<size_t>(from)].out[kind].reserve(ready, bytes);
    Slot in = devices[static_cast<size_t>(to)].in[kind].reserve(out.start + latency, bytes);
    return {out.start, std::max(in.end, out.end + latency)};
}

uint64_t Machine::one_way(int device, int owner) const {
    return device == owner ? timing::cycles(memory_model.latency) / 2 : timing::cycles(network->link(device, owner).latency);
}

/// An access to a device's memory, of a warp that has it ready at `ready`.
Machine::Arrival Machine::reach_memory(const Cta& cta, int owner, uint64_t ready, uint64_t bytes, bool write) {
    int device = cta.launch->device;
    Device::Sm& sm = sm_of(cta);
    uint64_t through = (write ? sm.stores : sm.loads).reserve(ready, bytes).end;
    uint64_t way = one_way(device, owner);
    if (device == owner) {
        uint64_t served = std::max(through, devices[static_cast<size_t>(device)].memory.reserve(ready, bytes).end);
        return {served + way, served + 2 * way};
    }
    if (write) {
        uint64_t there = std::max(cross(device, owner, ready, bytes).end, through + way);
        return {there, there + way};
    }
    return {ready + way, std::max(cross(owner, device, ready + way, bytes).end, through + 2 * way)};
}

/// A bulk copy between a device's memory and blocks of one cluster: when its bytes are through the port of an SM, and when
/// all is there.
Machine::Transfer Machine::transfer(const std::vector<Cta*>& ctas, int owner, uint64_t ready, uint64_t bytes, bool store, const Inst& inst) {
    uint64_t cycles = port_cycles(bytes);
    int device = ctas[0]->launch->device;
    uint64_t way = one_way(device, owner);
    Device& d = devices[static_cast<size_t>(device)];
    if (store) {
        Slot slot = occupy(*ctas[0], Trace::Kind::Store, ready, cycles, inst, bytes);
        uint64_t there = device != owner ? cross(device, owner, slot.start, bytes).end : d.memory.reserve(slot.start, bytes).end + way;
        return {slot.end, std::max(there, slot.end + way)};
    }
    uint64_t served = device != owner ? cross(owner, device, ready + way, bytes).end : d.memory.reserve(ready, bytes).end + 2 * way;
    uint64_t begin = std::max(ready + 2 * way, served - std::min(served, cycles)), end = 0;
    for (Cta* cta : ctas) end = std::max(end, occupy(*cta, Trace::Kind::Load, begin, cycles, inst, bytes).end);
    return {end, end};
}

/// A message over the network, or within a device; says when it is there.
uint64_t Machine::message(const Warp& w, int from, int to, uint64_t bytes, uint64_t ready, const Inst& inst) {
    if (from == to) return devices[static_cast<size_t>(from)].memory.reserve(ready, bytes).end + one_way(from, from);
    Slot slot = cross(from, to, ready, bytes);
    uint64_t left = slot.end - one_way(from, to);
    if (left > slot.start && !trace.full()) {
        auto [row, added] = link_rows_.try_emplace({from, to}, 0);
        if (added) row->second = trace.add({from, Trace::link, to});
        trace.span(row->second, Trace::Kind::Message, slot.start, left, w.cta->launch->program, inst, {Wait::None, bytes});
    }
    return slot.end;
}

/// Between the shared memories of two blocks.
uint64_t Machine::transfer_between_blocks(Cta& from, uint64_t ready, uint64_t bytes, const Inst& inst) {
    return occupy(from, Trace::Kind::Store, ready, port_cycles(bytes), inst, bytes).end + timing::cluster_latency;
}

/// Values that others may poll or acquire carry the cycle at which they lie in memory.
void Machine::stamp(const Target& t, uint32_t bytes, uint64_t at) {
    for (uint64_t word = t.watch() / 4; word <= (t.watch() + bytes - 1) / 4; word++) {
        uint64_t& known = stamps_[word];
        known = std::max(known, at);
    }
}
uint64_t Machine::stamp_of(const Target& t, uint32_t bytes) const {
    uint64_t at = 0;
    if (stamps_.empty()) return at;
    for (uint64_t word = t.watch() / 4; word <= (t.watch() + bytes - 1) / 4; word++) {
        auto it = stamps_.find(word);
        if (it != stamps_.end()) at = std::max(at, it->second);
    }
    return at;
}

/// Before an instruction reads values that others may have written meanwhile: it cannot see them before they are there.
void Context::await_values(const Inst& inst, const Target* targets, uint32_t bytes) const {
    uint64_t at = 0, watched = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const Target& t = targets[__builtin_ctz(rest)];
        if (!t.cta && !t.region) continue;
        uint64_t stamp = m.stamp_of(t, bytes);
        uint64_t way = t.region ? m.one_way(w.cta->launch->device, t.region->rank) : t.cta != w.cta ? timing::cluster_latency : 0;
        if (stamp > at + way) at = stamp - way, watched = t.watch();
    }
    m.wait_until(w, inst, at, {Wait::Spin, watched});
}

/// A release at this scope goes behind the stores that it releases.
void Context::await_stores(const Inst& inst, Scope scope) const {
    if (scope >= Scope::Gpu) m.wait_until(w, inst, w.stored_at, {Wait::Stores, 0});
}

/// Nothing runs: time goes on from here for all devices, and nothing keeps the engines busy.
void Machine::align_clocks() {
    uint64_t now = 0;
    for (Device& d : devices) now = std::max(now, d.cycle);
    stamps_.clear();
    for (Device& d : devices) {
        d.cycle = now;
        d.memory.forget();
        for (size_t kind = 0; kind < 2; kind++) d.out[kind].forget(), d.in[kind].forget();
        for (Device::Sm& sm : d.sms) {
            for (Engine* e : {&sm.copy_engine, &sm.bulk_stores, &sm.tensor_core}) e->forget();
            for (Rate* r : {&sm.loads, &sm.stores, &sm.shared_memory}) r->forget();
            for (Rate& r : sm.issue) r.forget();
            sm.freed.clear();
            sm.l1.clear();
        }
    }
}

/// Rates of memory and links, from their models.
void Machine::set_rates() {
    auto bytes_per_cycle = [](double bytes_per_nanosecond) { return bytes_per_nanosecond * 1000 / timing::megahertz; };
    for (Device& d : devices) {
        d.memory.set(bytes_per_cycle(memory_model.bytes_per_nanosecond));
        for (size_t kind = 0; kind < 2; kind++) {
            double rate = bytes_per_cycle((kind ? network->infiniband() : network->nvlink()).bytes_per_nanosecond);
            d.out[kind].set(rate);
            d.in[kind].set(rate);
        }
    }
}

}  // namespace dsv3::emulator
