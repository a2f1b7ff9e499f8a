#include "network.hpp"

#include <algorithm>
#include <cstring>

#include "copy.hpp"
#include "numerics.hpp"
#include "nvshmem_layout.hpp"

namespace dsv3::emulator {
namespace {

constexpr uint32_t default_queue_pairs = 4, max_pieces = 4;
constexpr uint64_t for_good = UINT64_MAX;
constexpr int every = INT32_MIN;

/// Does a list of queue pairs, as a caller named them, hold this one? An empty list holds all.
bool names(const std::vector<int>& queue_pairs, int index) {
    return queue_pairs.empty() || std::any_of(queue_pairs.begin(), queue_pairs.end(), [&](int q) {
        return q == index || (q == static_cast<int>(nvshmem::qp_default) && index < 0);
    });
}

uint64_t sum(Type type, uint64_t a, uint64_t b) {
    switch (type) {
        case Type::F32: return float_bits(bits_float(static_cast<uint32_t>(a)) + bits_float(static_cast<uint32_t>(b)));
        case Type::F16: return float_to_f16(f16_to_float(static_cast<uint16_t>(a)) + f16_to_float(static_cast<uint16_t>(b)));
        case Type::F64: {
            double x, y;
            std::memcpy(&x, &a, 8);
            std::memcpy(&y, &b, 8);
            x += y;
            std::memcpy(&a, &x, 8);
            return a;
        }
        default: return a + b;
    }
}

/// What an atomic leaves in memory.
uint64_t result_of(const Network::Atomic& atomic, uint64_t old) {
    switch (atomic.op) {
        case nvshmem::amo_inc: case nvshmem::amo_fetch_inc: return old + 1;
        case nvshmem::amo_add: case nvshmem::amo_fetch_add: case nvshmem::amo_signal_add: return sum(atomic.type, old, atomic.value);
        case nvshmem::amo_and: case nvshmem::amo_fetch_and: return old & atomic.value;
        case nvshmem::amo_or: case nvshmem::amo_fetch_or: return old | atomic.value;
        case nvshmem::amo_xor: case nvshmem::amo_fetch_xor: return old ^ atomic.value;
        case nvshmem::amo_fetch: return old;
        case nvshmem::amo_compare_swap: return old == atomic.compare ? atomic.value : old;
        default: return atomic.value;
    }
}

bool known(int op) {
    return (op >= static_cast<int>(nvshmem::amo_inc) && op <= static_cast<int>(nvshmem::amo_signal_add)) ||
           (op >= static_cast<int>(nvshmem::amo_fetch) && op <= static_cast<int>(nvshmem::amo_compare_swap));
}
bool replaces(int op) {
    return op == nvshmem::amo_set || op == nvshmem::amo_signal || op == nvshmem::amo_signal_set;
}

}  // namespace

/// Moves one queue pair; listed while anything is in it.
class Network::Delivery : public Operation {
  public:
    Delivery(Network& network, QueuePair& qp) : network_(network), qp_(qp) { cycle = qp.queue.front()->ends; }
    bool step(Machine& m) override {
        bool finished = network_.step(m, qp_);
        if (!qp_.queue.empty()) cycle = qp_.queue.front()->ends;
        return finished;
    }

  private:
    Network& network_;
    QueuePair& qp_;
};

Network::Network(int ranks, int ranks_per_node, LinkModel nvlink, LinkModel infiniband)
    : ranks_(ranks), ranks_per_node_(ranks_per_node), nvlink_(nvlink), infiniband_(infiniband), dead_(static_cast<size_t>(ranks)) {}

uint64_t Network::translate(const Context& c, uint64_t address, int to, int lane) const {
    if (to < 0 || to >= ranks_)
        c.fail(ErrorKind::MemoryAccess, "rank " + std::to_string(to) + " of " + std::to_string(ranks_), lane);
    uint64_t offset = address - heap_base - static_cast<uint64_t>(c.w.cta->launch->device) * heap_stride;
    if (offset >= heap_stride)
        c.fail(ErrorKind::MemoryAccess, "the remote address is not symmetric memory of the calling rank; " + c.m.memory.describe(address), lane);
    return heap_base + static_cast<uint64_t>(to) * heap_stride + offset;
}

int Network::choose_queue_pair(const Context& c, int queue_pair, int lane) const {
    if (queue_pair == static_cast<int>(nvshmem::qp_default) || queue_pair == static_cast<int>(nvshmem::qp_any))
        return -1 - static_cast<int>(c.m.random.below(default_queue_pairs));
    if (queue_pair <= static_cast<int>(nvshmem::qp_host))
        c.fail(ErrorKind::MemoryAccess, "queue pair " + std::to_string(queue_pair) + ": expected NVSHMEMX_QP_DEFAULT, NVSHMEMX_QP_ANY or a handle of 2 and more", lane);
    return queue_pair;
}

std::unique_ptr<Network::Request> Network::copy_request(Context& c, Kind kind, int lane, uint64_t bytes) {
    auto r = std::make_unique<Request>();
    r->kind = kind;
    r->lane = lane;
    r->bytes = bytes;
    uint64_t parts = c.m.options.schedule == "random" || c.m.options.schedule == "pct" ? 1 + c.m.random.below(max_pieces) : 1;
    parts = std::min(parts, bytes);
    for (uint64_t i = 0; i < parts; i++) r->pieces.push_back({bytes * i / parts, bytes * (i + 1) / parts});
    for (uint64_t i = parts; i > 1; i--) std::swap(r->pieces[i - 1], r->pieces[c.m.random.below(static_cast<uint32_t>(i))]);
    return r;
}

void Network::put(Context& c, const Inst& inst, int lane, uint64_t to, uint64_t from, uint64_t bytes, Route route) {
    uint64_t remote = translate(c, to, route.rank, lane);
    if (bytes == 0) return;
    auto r = copy_request(c, Kind::Put, lane, bytes);
    r->to = remote;
    r->from = from;
    Region* source = c.m.memory.find(from);
    if (!source || !source->alive || from + bytes > source->base + source->size)
        c.fail(ErrorKind::MemoryAccess, "sends " + std::to_string(bytes) + " bytes from outside all allocations; " + c.m.memory.describe(from), lane);
    post(c, inst, route, std::move(r));
}

void Network::put_value(Context& c, const Inst& inst, int lane, uint64_t to, uint64_t value, uint64_t bytes, Route route) {
    auto r = std::make_unique<Request>();
    r->kind = Kind::Value;
    r->lane = lane;
    r->to = translate(c, to, route.rank, lane);
    r->bytes = bytes;
    r->atomic.value = value;
    post(c, inst, route, std::move(r));
}

/// Reads rank's `from`, a symmetric address, into `to`; without memory to write to (`to` is 0) it is the call's answer.
void Network::get(Context& c, const Inst& inst, int lane, uint64_t to, uint64_t from, uint64_t bytes, Route route) {
    uint64_t remote = translate(c, from, route.rank, lane);
    if (bytes == 0) return;
    auto r = copy_request(c, Kind::Get, lane, bytes);
    r->to = to;
    r->from = remote;
    r->answers = true;
    Region* destination = to ? c.m.memory.find(to) : nullptr;
    if (to && (!destination || !destination->alive || destination->constant || to + bytes > destination->base + destination->size))
        c.fail(ErrorKind::MemoryAccess, "gets " + std::to_string(bytes) + " bytes to outside all allocations; " + c.m.memory.describe(to), lane);
    post(c, inst, route, std::move(r));
}

void Network::atomic(Context& c, const Inst& inst, int lane, uint64_t to, const Atomic& atomic, Route route) {
    if (!known(atomic.op)) c.fail(ErrorKind::Unsupported, "NVSHMEM's atomic operation " + std::to_string(atomic.op), lane);
    auto r = std::make_unique<Request>();
    r->kind = Kind::Atomic;
    r->lane = lane;
    r->to = translate(c, to, route.rank, lane);
    r->bytes = static_cast<uint64_t>(size_of(atomic.type));
    r->atomic = atomic;
    r->answers = atomic.op >= static_cast<int>(nvshmem::amo_fetch);
    if (r->to % r->bytes) c.fail(ErrorKind::MemoryAccess, "the target of the atomic is not aligned to " + std::to_string(r->bytes) + " bytes", lane);
    post(c, inst, route, std::move(r));
}

uint64_t Network::send(int from, int to, uint64_t bytes, uint64_t at, Request& r) {
    LinkCounts& count = counts[{from, to}];
    Link& link = links_[{from, to}];
    const LinkModel& model = same_node(from, to) ? nvlink_ : infiniband_;
    link.free_at = std::max(link.free_at, at) + static_cast<uint64_t>(static_cast<double>(bytes) / model.bytes_per_nanosecond);
    r.lost |= dead_[static_cast<size_t>(from)] || dead_[static_cast<size_t>(to)] || link.drops.count(count.messages);
    r.lost_on = {from, to};
    count.messages++;
    count.bytes += bytes;
    return link.free_at + model.latency;
}

void Network::post(Context& c, const Inst& inst, Route route, std::unique_ptr<Request> request) {
    Machine& m = c.m;
    Launch& launch = *c.w.cta->launch;
    int from = launch.device;
    QueuePair& qp = queue_pairs_.try_emplace({from, route.rank, route.queue_pair}, QueuePair{from, route.rank, route.queue_pair}).first->second;
    if (qp.launch != launch.id) {
        qp.launch = launch.id;
        qp.reads = m.new_agent(launch);
        qp.writes = m.new_agent(launch);
        qp.gets = m.new_agent(launch);
    }
    c.make_visible(c.mask, Scope::Sys);
    Request& r = *request;
    r.warp = &c.w;
    r.inst = &inst;
    r.call = route.call;
    r.serial = ++serial_;
    for (int index : {every, route.queue_pair}) {
        auto fence = fences_.find({from, route.rank, index});
        if (fence != fences_.end()) r.fences.push_back(fence->second);
    }
    r.number = ++qp.issued;
    // A reliable connection that lost a message delivers nothing behind it.
    r.lost = qp.broken;
    r.ready_at = send(from, route.rank, r.kind == Kind::Get ? 0 : r.bytes, m.time, r);
    if (r.answers && !r.lost) r.ready_at = send(route.rank, from, r.bytes, r.ready_at, r);
    // Queue pairs take different ways: their messages overtake each other in time, too.
    uint64_t spread = (same_node(from, route.rank) ? nvlink_ : infiniband_).latency / 4;
    if (m.options.schedule == "random" || m.options.schedule == "pct") r.ready_at += m.random.below(static_cast<uint32_t>(std::min(spread, uint64_t{UINT32_MAX - 1})) + 1);
    schedule(m, r, qp, route.rides);
    qp.broken |= r.lost;
    if (r.call) {
        Call& call = calls_[r.call];
        call.open++;
        call.what = std::to_string(r.bytes) + (r.answers ? " bytes from rank " : " bytes to rank ") + std::to_string(route.rank) +
                    (r.lost ? ", lost on the link from rank " + std::to_string(r.lost_on.first) + " to rank " + std::to_string(r.lost_on.second) : "");
    }
    if (m.options.checks) {
        r.knowledge = c.w.release(c.mask);
        if (r.kind != Kind::Get)
            for (const Fence& fence : r.fences) r.knowledge.generic.join(fence.before);
        uint32_t code = static_cast<uint32_t>(&inst - launch.program->code.data());
        bool atomic = r.kind == Kind::Atomic;
        Access a{r.kind == Kind::Get ? qp.gets : qp.reads, r.number, code, static_cast<int32_t>(c.w.id), launch.program_index, false, atomic,
                 atomic ? Scope::Sys : Scope::None, c.w.cta->id, c.w.cta->cluster->id, static_cast<uint32_t>(from)};
        r.read_access = m.log.add(a);
        if (r.kind != Kind::Get) a.agent = qp.writes;
        r.write_access = m.log.add(a);
    }
    c.w.effects++;
    launch.operations++;
    qp.queue.push_back(std::move(request));
    if (qp.active || stands_still(qp)) return;
    qp.active = true;
    m.start(std::make_unique<Delivery>(*this, qp));
}

/// In virtual time: behind what the queue pair carries and what a fence says, over the ports of both ranks.
void Network::schedule(Machine& m, Request& r, QueuePair& qp, bool rides) const {
    m.issue(*r.warp);
    uint64_t posting = rides ? 0 : timing::cycles(posting_[same_node(qp.from, qp.to) ? 0 : 1]);
    m.wait_until(*r.warp, *r.inst, r.warp->cycle + posting, {Wait::Network, 2});
    r.there = m.message(*r.warp, qp.from, qp.to, r.kind == Kind::Get ? 0 : r.bytes, r.warp->cycle, *r.inst);
    r.there = qp.last_there = std::max(qp.last_there, r.there);
    for (const Fence& fence : r.fences) r.there = qp.last_there = std::max(r.there, fence.cycle);
    r.ends = r.answers ? m.message(*r.warp, qp.to, qp.from, r.bytes, r.there, *r.inst) : r.there;
    r.known = r.answers ? r.ends : r.there + m.one_way(qp.from, qp.to);
}

uint64_t Network::stalled_until(const QueuePair& qp) const {
    auto until = [&](int from, int to) {
        auto link = links_.find({from, to});
        return link == links_.end() ? 0 : link->second.stalled_until;
    };
    bool answers = !qp.queue.empty() && qp.queue.front()->answers;
    return std::max(until(qp.from, qp.to), answers ? until(qp.to, qp.from) : 0);
}

bool Network::stands_still(const QueuePair& qp) const { return stalled_until(qp) == for_good; }

uint64_t Network::ready_at(const QueuePair& qp) const { return std::max(qp.queue.front()->ready_at, stalled_until(qp)); }

/// Another queue pair to the same rank with a request from before a fence that this one's next is behind; or null.
Network::QueuePair* Network::goes_first(const QueuePair& qp) {
    const std::vector<Fence>& fences = qp.queue.front()->fences;
    if (fences.empty()) return nullptr;
    for (auto& [key, other] : queue_pairs_) {
        if (other.from != qp.from || other.to != qp.to || &other == &qp || other.queue.empty()) continue;
        uint64_t serial = other.queue.front()->serial;
        for (const Fence& fence : fences)
            if (serial <= fence.serial && names(fence.queue_pairs, other.index)) return &other;
    }
    return nullptr;
}

/// True when nothing is left to move.
bool Network::step(Machine& m, QueuePair& qp) {
    if (qp.queue.empty() || stands_still(qp)) {
        qp.active = false;
        return true;
    }
    Request& r = *qp.queue.front();
    if (r.lost) {
        finish(m, qp, false);
        return false;
    }
    if (m.time < ready_at(qp)) {
        uint64_t earliest = for_good;
        for (auto& [key, other] : queue_pairs_)
            if (other.active && !other.queue.empty()) earliest = std::min(earliest, ready_at(other));
        if (m.only_operations()) m.time = std::max(m.time, earliest);
        return false;
    }
    if (QueuePair* first = goes_first(qp)) {
        // Where that one stands still for good, so does this one: only a deadlock follows.
        qp.active = !stands_still(*first);
        if (qp.active) step(m, *first);
        return !qp.active;
    }
    if (r.kind == Kind::Atomic) {
        apply_atomic(m, qp, r);
    } else if (r.kind == Kind::Value) {
        write_value(m, r);
    } else {
        auto [first, last] = r.pieces.back();
        r.pieces.pop_back();
        move_piece(m, r, first, last);
        if (!r.pieces.empty()) return false;
    }
    finish(m, qp, true);
    return false;
}

void Network::finish(Machine& m, QueuePair& qp, bool delivered) {
    Request& r = *qp.queue.front();
    Launch& launch = *r.warp->cta->launch;
    launch.ends_at = std::max(launch.ends_at, r.ends);
    qp.done_at = std::max(qp.done_at, r.known);
    if (delivered) qp.done = r.number;
    else counts[r.lost_on].lost++;
    auto call = calls_.find(r.call);
    if (delivered && call != calls_.end()) {
        call->second.open--;
        call->second.done_at = std::max(call->second.done_at, r.known);
        Call::Answer& answer = call->second.answers[r.lane];
        answer.done.generic.add(r.kind == Kind::Get ? qp.gets : qp.reads, ~0u, r.number);
        if (r.answers && r.kind == Kind::Atomic) answer.done.generic.add(qp.writes, ~0u, r.number);
    }
    launch.operations--;
    qp.queue.pop_front();
    m.wake(Wait::Network, static_cast<uint64_t>(qp.from));
}

Target Network::target(Machine& m, const Request& r, uint64_t address, uint64_t bytes, bool write) const {
    Region* region = m.memory.find(address);
    if (!region || !region->alive || address + bytes > region->base + region->size)
        m.fail(ErrorKind::MemoryAccess, std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes outside all allocations; " +
               m.memory.describe(address), *r.warp, *r.inst, r.lane);
    uint64_t at = address - region->base;
    return {region->host + at, at, region->constant ? nullptr : &region->shadow, region->poison.get(), &region->published, nullptr, region};
}

void Network::check(Machine& m, const Request& r, const Target& t, uint64_t bytes, uint32_t access, bool write) const {
    if (!m.options.checks || !t.shadow) return;
    Accessor by{{&r.knowledge}, 1, access, 0};
    Conflict conflict = write ? t.shadow->write(m.log, by, t.offset, bytes) : t.shadow->read(m.log, by, t.offset, bytes);
    if (conflict.found) m.fail(ErrorKind::Hazard, m.describe_race(conflict, t, write), *r.warp, *r.inst, r.lane);
}

/// After plain bytes landed.
void Network::written(Machine& m, const Target& t, uint64_t bytes) const {
    if (t.poison) t.poison->set(t.offset, bytes, false);
    for (uint64_t word = t.offset / 4; word <= (t.offset + bytes - 1) / 4; word++) t.published->erase(word);
    m.progress++;
    if (m.spinners) m.wake_watchers(t.watch(), t.watch() + bytes);
}

void Network::move_piece(Machine& m, Request& r, uint64_t first, uint64_t last) {
    uint64_t bytes = last - first;
    Target from = target(m, r, r.from + first, bytes, false);
    check(m, r, from, bytes, r.read_access, false);
    if (from.poison && from.poison->any(from.offset, bytes))
        m.fail(ErrorKind::Hazard, (r.kind == Kind::Get ? "gets bytes of '" : "sends bytes of '") + from.region->name + "' that nobody wrote", *r.warp, *r.inst, r.lane);
    if (!r.to) {
        auto call = calls_.find(r.call);
        if (call != calls_.end()) std::memcpy(reinterpret_cast<uint8_t*>(&call->second.answers[r.lane].value) + first, from.data, bytes);
        m.progress++;
        return;
    }
    Target to = target(m, r, r.to + first, bytes, true);
    check(m, r, to, bytes, r.write_access, true);
    m.settle(*to.region, to.offset, bytes);
    std::memmove(to.data, from.data, bytes);
    written(m, to, bytes);
}

void Network::write_value(Machine& m, Request& r) {
    Target to = target(m, r, r.to, r.bytes, true);
    check(m, r, to, r.bytes, r.write_access, true);
    m.settle(*to.region, to.offset, r.bytes);
    std::memcpy(to.data, &r.atomic.value, r.bytes);
    m.stamp(to, static_cast<uint32_t>(r.bytes), r.there);
    written(m, to, r.bytes);
}

void Network::apply_atomic(Machine& m, QueuePair& qp, Request& r) {
    Target t = target(m, r, r.to, r.bytes, true);
    check(m, r, t, r.bytes, r.write_access, true);
    if (t.poison) t.poison->set(t.offset, r.bytes, false);
    m.settle(*t.region, t.offset, r.bytes);
    uint64_t old = 0;
    std::memcpy(&old, t.data, r.bytes);
    uint64_t value = result_of(r.atomic, old);
    std::memcpy(t.data, &value, r.bytes);
    m.stamp(t, static_cast<uint32_t>(r.bytes), r.there);
    auto call = calls_.find(r.call);
    if (call != calls_.end()) call->second.answers[r.lane].value = old;
    if (m.options.checks) {
        Knowledge k = r.knowledge;
        k.generic.add(qp.reads, ~0u, r.number);
        k.generic.add(qp.writes, ~0u, r.number);
        for (uint64_t word = t.offset / 4; word <= (t.offset + r.bytes - 1) / 4; word++) {
            Published& at = (*t.published)[word];
            if (call != calls_.end()) call->second.answers[r.lane].published.join(at.knowledge);
            if (replaces(r.atomic.op)) at = {};
            at.knowledge.join(k);
            at.scope = Scope::Sys;
            at.from = {UINT32_MAX, UINT32_MAX, static_cast<uint32_t>(qp.from)};
        }
    }
    m.progress++;
    if (m.spinners) m.wake_watchers(t.watch(), t.watch() + r.bytes);
}

std::string Network::pending(int from, int to, const std::vector<int>& queue_pairs, Knowledge* completed, uint64_t* done_at) const {
    std::string text;
    for (auto& [key, qp] : queue_pairs_) {
        if (qp.from != from || (to != static_cast<int>(nvshmem::pe_all) && qp.to != to) || !names(queue_pairs, qp.index)) continue;
        if (qp.issued != qp.done)
            text += (text.empty() ? "" : ", ") + std::to_string(qp.issued - qp.done) + " message(s) to rank " + std::to_string(qp.to) +
                    (qp.broken ? ", of which some were lost" : "");
        *done_at = std::max(*done_at, qp.done_at);
        if (!qp.reads || !completed) continue;
        completed->generic.add(qp.reads, ~0u, qp.done);
        completed->generic.add(qp.writes, ~0u, qp.done);
        completed->generic.add(qp.gets, ~0u, qp.done);
    }
    return text;
}

/// Orders what was sent to each rank before what will be sent to that rank, on the queue pairs named; not across ranks.
void Network::fence(int from, int to, const std::vector<int>& queue_pairs) {
    for (int rank = 0; rank < ranks_; rank++) {
        if (to != static_cast<int>(nvshmem::pe_all) && rank != to) continue;
        Clock before;
        uint64_t there = 0;
        for (auto& [key, qp] : queue_pairs_) {
            if (qp.from != from || qp.to != rank || !names(queue_pairs, qp.index) || !qp.reads) continue;
            there = std::max(there, qp.last_there);
            before.add(qp.reads, ~0u, qp.issued);
            before.add(qp.writes, ~0u, qp.issued);
        }
        std::vector<int> later;
        for (int q : queue_pairs) {
            if (q != static_cast<int>(nvshmem::qp_default)) later.push_back(q);
            else for (uint32_t i = 0; i < default_queue_pairs; i++) later.push_back(-1 - static_cast<int>(i));
        }
        if (later.empty()) later.push_back(every);
        for (int index : later) {
            Fence& fence = fences_[{from, rank, index}];
            fence.serial = serial_;
            fence.before.join(before);
            fence.cycle = std::max(fence.cycle, there);
            for (int q : queue_pairs)
                if (std::find(fence.queue_pairs.begin(), fence.queue_pairs.end(), q) == fence.queue_pairs.end()) fence.queue_pairs.push_back(q);
        }
    }
}

void Network::kill(int rank) {
    dead_[static_cast<size_t>(rank)] = true;
    for (auto& [key, qp] : queue_pairs_) {
        if (qp.from != rank && qp.to != rank) continue;
        qp.broken = true;
        for (auto& r : qp.queue) r->lost = true, r->lost_on = {qp.from, qp.to};
    }
}

std::string Network::troubles() const {
    std::string text;
    for (auto& [link, count] : counts)
        if (count.lost)
            text += "\n  " + std::to_string(count.lost) + " message(s) from rank " + std::to_string(link.first) + " to rank " + std::to_string(link.second) + " were lost";
    for (auto& [key, qp] : queue_pairs_)
        if (!qp.queue.empty() && stands_still(qp))
            text += "\n  " + std::to_string(qp.queue.size()) + " message(s) stand still on the link from rank " + std::to_string(qp.from) + " to rank " + std::to_string(qp.to);
    for (size_t r = 0; r < dead_.size(); r++)
        if (dead_[r]) text += "\n  rank " + std::to_string(r) + " died";
    return text;
}

void Network::forget_order() {
    calls_.clear();
    fences_.clear();
    for (auto& [key, qp] : queue_pairs_) {
        qp.queue.clear();
        qp.active = false;
        qp.launch = 0;
        qp.reads = qp.writes = qp.gets = 0;
    }
}

}  // namespace dsv3::emulator
