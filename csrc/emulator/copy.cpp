#include "copy.hpp"

#include <algorithm>
#include <cstring>

#include "mbarrier.hpp"
#include "network.hpp"

namespace dsv3::emulator {
namespace {

constexpr uint32_t max_pieces = 4;

}  // namespace

Agent agent_of(Machine& m, Warp& w, Agent& slot) {
    if (!slot) slot = m.new_agent(*w.cta->launch);
    return slot;
}

Target barrier_of(Context& c, Space space, uint64_t address, int lane, const Knowledge& k) {
    Target t = c.locate(space, address, 8, 8, lane, true);
    Mbarrier& b = find_mbarrier(c, t, lane);
    if (c.checks && !init_visible(c.m.log, b, k, nullptr, lane, true))
        c.fail(ErrorKind::Hazard, "the copy engine may not see the mbarrier's initialisation by " +
               c.m.place_of(c.m.log[b.init_access], b.init_lane) + ": no fence.mbarrier_init or fence.proxy.async before it", lane);
    return t;
}

Copy::Copy(Context& c, const Inst& inst, int lane)
    : warp_(c.w), inst_(inst), lane_(lane), code_(static_cast<uint32_t>(&inst - c.w.cta->launch->program->code.data())) {
    issued_at_ = c.w.cycle;
    if (c.checks) knowledge = c.w.release(1u << lane);
    c.w.effects++;
}

Copy::~Copy() = default;

uint32_t Copy::new_access(Machine& m, Agent agent, uint32_t time) {
    const Launch& l = *warp_.cta->launch;
    return m.log.add({agent, time, code_, static_cast<int32_t>(warp_.id), l.program_index, !generic, reduce >= 0,
                      reduce >= 0 ? Scope::Gpu : Scope::None, warp_.cta->id, warp_.cta->cluster->id, static_cast<uint32_t>(l.device)});
}

bool Copy::uses_shared(const Cta& cta, Issuer& by) const {
    by = {&warp_, &inst_, lane_};
    return std::find(used_.begin(), used_.end(), &cta) != used_.end();
}

void Copy::use(Cta* cta) {
    cta->operations++;
    used_.push_back(cta);
}

void Copy::to_shared(const Context& c, uint32_t barrier_offset, const std::vector<Cta*>& targets) {
    for (Cta* cta : targets) {
        auto it = cta->mbarriers.find(barrier_offset);
        if (it == cta->mbarriers.end())
            c.fail(ErrorKind::Hazard, "no mbarrier is initialised at shared offset " + std::to_string(barrier_offset) +
                   " of block rank " + std::to_string(cta->rank), lane_);
        // In flight until the bytes are counted: then its time is the phase that they complete.
        uint32_t access = c.checks ? new_access(c.m, it->second.agent, in_flight) : 0;
        if (destinations_.empty()) read_access = access;
        destinations_.push_back({cta, 0, barrier_offset, access});
        use(cta);
    }
}

void Copy::between_blocks(const Context& c, uint32_t source, Cta* target, uint32_t destination, uint32_t barrier_offset) {
    from_shared_ = true;
    source_shift_ = source;
    to_shared(c, barrier_offset, {target});
    destinations_[0].shift = destination;
    use(warp_.cta);
}

void Copy::to_global(const Context& c) {
    store_ = from_shared_ = true;
    BulkState& state = c.w.bulk[lane_];
    group_ = state.group;
    state.reading[group_]++;
    state.writing[group_]++;
    if (c.checks) {
        read_access = new_access(c.m, agent_of(c.m, c.w, c.w.bulk_read_agent), group_);
        write_access_ = new_access(c.m, agent_of(c.m, c.w, c.w.bulk_write_agent), group_);
    }
    use(warp_.cta);
}

void Copy::launch(Context& c, std::unique_ptr<Copy> self) {
    uint64_t total = 0;
    for (const Chunk& chunk : chunks) total += chunk.bytes;
    if (from_shared_ && !store_) {
        cycle = c.m.transfer_between_blocks(*warp_.cta, issued_at_, total, inst_);
    } else if (!generic) {
        auto global = std::find_if(chunks.begin(), chunks.end(), [](const Chunk& x) { return x.in_bounds; });
        const Region* region = global == chunks.end() ? nullptr : c.m.memory.find(global->global);
        Machine::Transfer t = c.m.transfer(used_, region ? region->rank : warp_.cta->launch->device, issued_at_, total, store_, inst_);
        read_at_ = t.through;
        cycle = t.there;
        if (store_) warp_.stored_at = std::max(warp_.stored_at, cycle);
    }
    size_t n = chunks.size(), parts = 1;
    if (c.m.options.schedule == "random" || c.m.options.schedule == "pct") parts = 1 + c.m.random.below(max_pieces);
    parts = std::max<size_t>(1, std::min(parts, n));
    for (size_t i = 0; i < parts; i++) pieces_.push_back({n * i / parts, n * (i + 1) / parts});
    for (size_t i = parts; i > 1; i--) std::swap(pieces_[i - 1], pieces_[c.m.random.below(static_cast<uint32_t>(i))]);
    if (store_) {
        later_ = pieces_;
        payload.resize(total);
    }
    warp_.cta->launch->operations++;
    c.m.start(std::move(self));
}

void Copy::fail(Machine& m, ErrorKind kind, const std::string& what) const { m.fail(kind, what, warp_, inst_, lane_); }

void Copy::read_chunk(Machine& m, size_t i, uint8_t* into, bool* poison) {
    const Chunk& chunk = chunks[i];
    *poison = false;
    if (!payload.empty() && !store_) {
        std::memcpy(into, payload.data() + chunk.shared, chunk.bytes);
        return;
    }
    if (!chunk.in_bounds) {
        fill_out_of_bounds(map, into, chunk.bytes);
        return;
    }
    Accessor by{{&knowledge}, 1, read_access, store_ ? lane_ : 0};
    Target t;
    if (from_shared_) {
        Cta* cta = warp_.cta;
        uint64_t at = chunk.shared + source_shift_;
        t = {cta->shared.data() + at, at, cta->shadow.get(), cta->poison.get(), nullptr, cta, nullptr};
    } else {
        Region* r = m.memory.find(chunk.global);
        if (!r || !r->alive || chunk.global + chunk.bytes > r->base + r->size)
            fail(m, ErrorKind::MemoryAccess, "reads " + std::to_string(chunk.bytes) + " bytes outside all allocations; " + m.memory.describe(chunk.global));
        t = {r->host + (chunk.global - r->base), chunk.global - r->base, r->constant ? nullptr : &r->shadow, r->poison.get(), nullptr, nullptr, r};
        by.global = true;
        m.counts.copy_read += chunk.bytes;
        if (r->rank != warp_.cta->launch->device) m.network->count_direct(r->rank, warp_.cta->launch->device, chunk.bytes);
    }
    if (m.options.checks && t.shadow) {
        Conflict conflict = t.shadow->read(m.log, by, t.offset, chunk.bytes);
        if (conflict.found) fail(m, ErrorKind::Hazard, m.describe_race(conflict, t, false));
        *poison = t.poison && t.poison->any(t.offset, chunk.bytes);
    }
    std::memcpy(into, t.data, chunk.bytes);
}

void Copy::write_shared(Machine& m, const Chunk& chunk, const Destination& d, const uint8_t* data) {
    uint64_t at = chunk.shared + d.shift;
    Target t{d.cta->shared.data() + at, at, d.cta->shadow.get(), d.cta->poison.get(), nullptr, d.cta, nullptr};
    if (m.options.checks) {
        Accessor by{{&knowledge}, 1, d.access, 0};
        Conflict conflict = t.shadow->write(m.log, by, at, chunk.bytes);
        if (conflict.found) fail(m, ErrorKind::Hazard, m.describe_race(conflict, t, true));
        t.poison->set(at, chunk.bytes, false);
    }
    if (reduce >= 0) {
        uint32_t size = static_cast<uint32_t>(size_of(reduce_type));
        for (uint32_t b = 0; b + size <= chunk.bytes; b += size) {
            uint64_t old = 0, x = 0;
            std::memcpy(&old, t.data + b, size);
            std::memcpy(&x, data + b, size);
            old = reduce_value(reduce_type, reduce, old, x, 0);
            std::memcpy(t.data + b, &old, size);
        }
    } else {
        std::memcpy(t.data, data, chunk.bytes);
    }
    if (m.spinners) m.wake_watchers(t.watch(), t.watch() + chunk.bytes);
}

void Copy::write_global(Machine& m, const Chunk& chunk, const uint8_t* data) {
    if (!chunk.in_bounds) return;
    Region* r = m.memory.find(chunk.global);
    if (!r || !r->alive || r->constant || chunk.global + chunk.bytes > r->base + r->size)
        fail(m, ErrorKind::MemoryAccess, "writes " + std::to_string(chunk.bytes) + " bytes outside all allocations; " + m.memory.describe(chunk.global));
    uint64_t at = chunk.global - r->base;
    Target t{r->host + at, at, &r->shadow, r->poison.get(), nullptr, nullptr, r};
    m.counts.copy_write += chunk.bytes;
    m.settle(*r, at, chunk.bytes);
    if (r->rank != warp_.cta->launch->device) m.network->count_direct(warp_.cta->launch->device, r->rank, chunk.bytes);
    if (m.options.checks) {
        Accessor by{{&knowledge}, 1, write_access_, lane_, true};
        Conflict conflict = t.shadow->write(m.log, by, at, chunk.bytes);
        if (conflict.found) fail(m, ErrorKind::Hazard, m.describe_race(conflict, t, true));
        if (t.poison) t.poison->set(at, chunk.bytes, false);
    }
    if (reduce >= 0) {
        uint32_t size = static_cast<uint32_t>(size_of(reduce_type));
        for (uint32_t b = 0; b + size <= chunk.bytes; b += size) {
            uint64_t old = 0, x = 0;
            std::memcpy(&old, t.data + b, size);
            std::memcpy(&x, data + b, size);
            old = reduce_value(reduce_type, reduce, old, x, 0);
            std::memcpy(t.data + b, &old, size);
        }
    } else {
        std::memcpy(t.data, data, chunk.bytes);
    }
    if (m.spinners) m.wake_watchers(t.watch(), t.watch() + chunk.bytes);
}

bool Copy::step(Machine& m) {
    static thread_local std::vector<uint8_t> buffer;
    bool poison;
    if (store_) {
        std::vector<size_t> at(chunks.size() + 1, 0);
        for (size_t i = 0; i < chunks.size(); i++) at[i + 1] = at[i] + chunks[i].bytes;
        if (!pieces_.empty()) {
            auto [first, last] = pieces_.back();
            pieces_.pop_back();
            for (size_t i = first; i < last; i++) {
                if (!chunks[i].in_bounds) continue;
                read_chunk(m, i, payload.data() + at[i], &poison);
                if (poison) fail(m, ErrorKind::Hazard, "copies bytes of shared memory that nobody wrote, at offset " + std::to_string(chunks[i].shared));
            }
            if (!pieces_.empty()) return false;
            BulkState& state = warp_.bulk[lane_];
            if (--state.reading[group_] == 0) state.reading.erase(group_);
            state.read_at[group_] = std::max(state.read_at[group_], read_at_);
            for (Cta* cta : used_) cta->operations--;
            used_.clear();
            m.wake(Wait::BulkGroup, warp_.id);
            return false;
        }
        auto [first, last] = later_.back();
        later_.pop_back();
        for (size_t i = first; i < last; i++) write_global(m, chunks[i], payload.data() + at[i]);
        if (!later_.empty()) return false;
        BulkState& state = warp_.bulk[lane_];
        if (--state.writing[group_] == 0) state.writing.erase(group_);
        state.written_at[group_] = std::max(state.written_at[group_], cycle);
        m.wake(Wait::BulkGroup, warp_.id);
        finish();
        return true;
    }
    auto [first, last] = pieces_.back();
    pieces_.pop_back();
    uint64_t bytes = 0;
    for (size_t i = first; i < last; i++) {
        const Chunk& chunk = chunks[i];
        buffer.resize(std::max<size_t>(buffer.size(), chunk.bytes));
        read_chunk(m, i, buffer.data(), &poison);
        bytes += chunk.bytes;
        for (const Destination& d : destinations_) {
            write_shared(m, chunk, d, buffer.data());
            if (!poison) continue;
            // What nobody wrote stays so in its copy.
            const Poison& from = from_shared_ ? *warp_.cta->poison : *m.memory.find(chunk.global)->poison;
            uint64_t source = from_shared_ ? chunk.shared + source_shift_ : chunk.global - m.memory.find(chunk.global)->base;
            for (uint32_t b = 0; b < chunk.bytes; b++)
                if (from.any(source + b, 1)) d.cta->poison->set(chunk.shared + d.shift + b, 1, true);
        }
    }
    if (destinations_.size() > 1) m.counts.multicast += bytes * destinations_.size();
    for (const Destination& d : destinations_) {
        auto it = d.cta->mbarriers.find(d.barrier);
        if (it == d.cta->mbarriers.end()) fail(m, ErrorKind::Hazard, "its mbarrier was invalidated while the copy was under way");
        if (pieces_.empty() && d.access) m.log[d.access].time = it->second.phase + 1;
        std::string wrong = complete_bytes(m, *d.cta, it->second, static_cast<int64_t>(bytes), cycle);
        if (!wrong.empty()) fail(m, ErrorKind::Hazard, wrong);
    }
    if (!pieces_.empty()) return false;
    finish();
    return true;
}

void Copy::finish() {
    for (Cta* cta : used_) cta->operations--;
    warp_.cta->launch->operations--;
    warp_.cta->launch->ends_at = std::max(warp_.cta->launch->ends_at, cycle);
}

}  // namespace dsv3::emulator
