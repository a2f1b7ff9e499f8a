#include "network.hpp"

#include <algorithm>
#include <cstring>

#include "copy.hpp"

namespace dsv3::emulator {
namespace {

constexpr uint32_t default_queue_pairs = 4, max_pieces = 4;
constexpr uint64_t for_good = UINT64_MAX;

}  // namespace

/// Moves one queue pair; listed while anything is in it.
class Network::Delivery : public Operation {
  public:
    Delivery(Network& network, QueuePair& qp) : network_(network), qp_(qp) {}
    bool step(Machine& m) override { return network_.step(m, qp_); }

  private:
    Network& network_;
    QueuePair& qp_;
};

Network::Network(int ranks, int ranks_per_node, LinkModel nvlink, LinkModel infiniband)
    : ranks_(ranks), ranks_per_node_(ranks_per_node), nvlink_(nvlink), infiniband_(infiniband),
      fences_(static_cast<size_t>(ranks)), dead_(static_cast<size_t>(ranks)) {}

uint64_t Network::translate(const Context& c, uint64_t address, int to, int lane) const {
    if (to < 0 || to >= ranks_)
        c.fail(ErrorKind::MemoryAccess, "rank " + std::to_string(to) + " of " + std::to_string(ranks_), lane);
    uint64_t offset = address - heap_base - static_cast<uint64_t>(c.w.cta->launch->device) * heap_stride;
    if (offset >= heap_stride)
        c.fail(ErrorKind::MemoryAccess, "the remote address is not symmetric memory of the calling rank; " + c.m.memory.describe(address), lane);
    return heap_base + static_cast<uint64_t>(to) * heap_stride + offset;
}

int Network::choose_queue_pair(Machine& m, int queue_pair) const {
    if (queue_pair != default_queue_pair && queue_pair != any_queue_pair) return queue_pair;
    return -1 - static_cast<int>(m.random.below(default_queue_pairs));
}

void Network::put(Context& c, const Inst& inst, int lane, uint64_t to, uint64_t from, uint64_t bytes, int rank, int queue_pair) {
    if (bytes == 0) return;
    auto r = std::make_unique<Request>();
    r->to = translate(c, to, rank, lane);
    r->from = from;
    r->bytes = bytes;
    Region* source = c.m.memory.find(from);
    if (!source || !source->alive || from + bytes > source->base + source->size)
        c.fail(ErrorKind::MemoryAccess, "sends " + std::to_string(bytes) + " bytes from outside all allocations; " + c.m.memory.describe(from), lane);
    uint64_t parts = c.m.options.schedule == "random" || c.m.options.schedule == "pct" ? 1 + c.m.random.below(max_pieces) : 1;
    parts = std::min(parts, bytes);
    for (uint64_t i = 0; i < parts; i++) r->pieces.push_back({bytes * i / parts, bytes * (i + 1) / parts});
    for (uint64_t i = parts; i > 1; i--) std::swap(r->pieces[i - 1], r->pieces[c.m.random.below(static_cast<uint32_t>(i))]);
    post(c, inst, lane, rank, queue_pair, std::move(r));
}

void Network::atomic(Context& c, const Inst& inst, int lane, uint64_t to, const Atomic& atomic, int rank, int queue_pair) {
    auto r = std::make_unique<Request>();
    r->to = translate(c, to, rank, lane);
    r->bytes = atomic.bytes;
    r->is_atomic = true;
    r->atomic = atomic;
    if (r->to % atomic.bytes) c.fail(ErrorKind::MemoryAccess, "the signal is not aligned to " + std::to_string(atomic.bytes) + " bytes", lane);
    post(c, inst, lane, rank, queue_pair, std::move(r));
}

void Network::post(Context& c, const Inst& inst, int lane, int rank, int queue_pair, std::unique_ptr<Request> request) {
    Machine& m = c.m;
    Launch& launch = *c.w.cta->launch;
    int from = launch.device;
    QueuePair& qp = queue_pairs_.try_emplace({from, rank, queue_pair}, QueuePair{from, rank, queue_pair}).first->second;
    if (qp.launch != launch.id) {
        qp.launch = launch.id;
        qp.reads = m.new_agent(launch);
        qp.writes = m.new_agent(launch);
    }
    c.make_visible(c.mask, Scope::Sys);
    Request& r = *request;
    r.warp = &c.w;
    r.inst = &inst;
    r.lane = lane;
    r.serial = ++serial_;
    r.fence = fences_[static_cast<size_t>(from)];
    r.number = ++qp.issued;
    LinkCounts& count = counts[{from, rank}];
    Link& link = links_[{from, rank}];
    const LinkModel& model = same_node(from, rank) ? nvlink_ : infiniband_;
    link.free_at = std::max(link.free_at, m.time) + static_cast<uint64_t>(static_cast<double>(r.bytes) / model.bytes_per_nanosecond);
    r.ready_at = link.free_at + model.latency;
    r.lost = dead_[static_cast<size_t>(rank)] || qp.broken || link.drops.count(count.messages);
    // A reliable connection that lost a message delivers nothing behind it.
    qp.broken |= r.lost;
    count.messages++;
    count.bytes += r.bytes;
    if (m.options.checks) {
        r.knowledge = c.w.release(c.mask);
        uint32_t code = static_cast<uint32_t>(&inst - launch.program->code.data());
        Access a{qp.reads, r.number, code, static_cast<int32_t>(c.w.id), launch.program_index, false, r.is_atomic,
                 r.is_atomic ? Scope::Sys : Scope::None, c.w.cta->id, c.w.cta->cluster->id, static_cast<uint32_t>(from)};
        r.read_access = m.log.add(a);
        a.agent = qp.writes;
        r.write_access = m.log.add(a);
    }
    c.w.effects++;
    launch.operations++;
    qp.queue.push_back(std::move(request));
    if (qp.active || stands_still(qp)) return;
    qp.active = true;
    m.start(std::make_unique<Delivery>(*this, qp));
}

bool Network::stands_still(const QueuePair& qp) const {
    auto link = links_.find({qp.from, qp.to});
    return link != links_.end() && link->second.stalled_until == for_good;
}

uint64_t Network::ready_at(const QueuePair& qp) const {
    auto link = links_.find({qp.from, qp.to});
    return std::max(qp.queue.front()->ready_at, link == links_.end() ? 0 : link->second.stalled_until);
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
    // What went to the same rank before a fence goes first.
    for (auto& [key, other] : queue_pairs_) {
        if (other.from != qp.from || other.to != qp.to || &other == &qp || other.queue.empty()) continue;
        if (other.queue.front()->serial <= r.fence.serial) return step(m, other), false;
    }
    if (r.is_atomic) {
        apply_atomic(m, qp, r);
    } else {
        auto [first, last] = r.pieces.back();
        r.pieces.pop_back();
        move_piece(m, qp, r, first, last);
        if (!r.pieces.empty()) return false;
    }
    finish(m, qp, true);
    return false;
}

void Network::finish(Machine& m, QueuePair& qp, bool delivered) {
    Request& r = *qp.queue.front();
    if (delivered) qp.done = r.number;
    else counts[{qp.from, qp.to}].lost++;
    r.warp->cta->launch->operations--;
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

void Network::move_piece(Machine& m, QueuePair&, Request& r, uint64_t first, uint64_t last) {
    uint64_t bytes = last - first;
    Target from = target(m, r, r.from + first, bytes, false), to = target(m, r, r.to + first, bytes, true);
    check(m, r, from, bytes, r.read_access, false);
    check(m, r, to, bytes, r.write_access, true);
    if (to.poison) to.poison->set(to.offset, bytes, false);
    if (from.poison && from.poison->any(from.offset, bytes))
        m.fail(ErrorKind::Hazard, "sends bytes of '" + from.region->name + "' that nobody wrote", *r.warp, *r.inst, r.lane);
    m.settle(*to.region, to.offset, bytes);
    std::memmove(to.data, from.data, bytes);
    for (uint64_t word = to.offset / 4; word <= (to.offset + bytes - 1) / 4; word++) to.published->erase(word);
    m.progress++;
    if (m.spinners) m.wake_watchers(to.watch(), to.watch() + bytes);
}

void Network::apply_atomic(Machine& m, QueuePair& qp, Request& r) {
    Target t = target(m, r, r.to, r.bytes, true);
    check(m, r, t, r.bytes, r.write_access, true);
    if (t.poison) t.poison->set(t.offset, r.bytes, false);
    m.settle(*t.region, t.offset, r.bytes);
    uint64_t old = 0, value = r.atomic.value;
    std::memcpy(&old, t.data, r.bytes);
    switch (r.atomic.op) {
        case 2: value = old + 1; break;
        case 4: case 10: value += old; break;
        case 5: value &= old; break;
        case 6: value |= old; break;
        case 7: value ^= old; break;
        default: break;
    }
    std::memcpy(t.data, &value, r.bytes);
    if (m.options.checks) {
        Knowledge k = r.knowledge;
        k.generic.join(r.fence.before);
        k.generic.add(qp.reads, ~0u, r.number);
        k.generic.add(qp.writes, ~0u, r.number);
        bool sets = r.atomic.op == 3 || r.atomic.op == 9;
        for (uint64_t word = t.offset / 4; word <= (t.offset + r.bytes - 1) / 4; word++) {
            Published& at = (*t.published)[word];
            if (sets) at = {};
            at.knowledge.join(k);
            at.scope = Scope::Sys;
            at.from = {UINT32_MAX, UINT32_MAX, static_cast<uint32_t>(qp.from)};
        }
    }
    m.progress++;
    if (m.spinners) m.wake_watchers(t.watch(), t.watch() + r.bytes);
}

std::string Network::pending(int from, int to, const std::vector<int>& queue_pairs, Knowledge* completed) const {
    std::string text;
    for (auto& [key, qp] : queue_pairs_) {
        if (qp.from != from || (to != all_ranks && qp.to != to)) continue;
        bool named = queue_pairs.empty();
        for (int q : queue_pairs) named |= q == qp.index || (q == default_queue_pair && qp.index < 0);
        if (!named) continue;
        if (qp.issued != qp.done)
            text += (text.empty() ? "" : ", ") + std::to_string(qp.issued - qp.done) + " message(s) to rank " + std::to_string(qp.to) +
                    (qp.broken ? ", of which some were lost" : "");
        if (!qp.reads || !completed) continue;
        completed->generic.add(qp.reads, ~0u, qp.done);
        completed->generic.add(qp.writes, ~0u, qp.done);
    }
    return text;
}

void Network::fence(int from) {
    Fence& fence = fences_[static_cast<size_t>(from)];
    fence.serial = serial_;
    for (auto& [key, qp] : queue_pairs_) {
        if (qp.from != from || !qp.reads) continue;
        fence.before.add(qp.reads, ~0u, qp.issued);
        fence.before.add(qp.writes, ~0u, qp.issued);
    }
}

/// The table that NVSHMEM 3.x's headers read: offsets of nvshmemi_device_host_state_v1. Peers of the node are mapped,
/// so the headers store to them directly; other ranks are reached through nvshmemi_transfer_*.
void Network::fill_device_state(Machine& m, int rank, Region& state) const {
    size_t ranks = static_cast<size_t>(ranks_);
    Region& peers = m.memory.map(nullptr, 8 * ranks, "NVSHMEM's peer addresses", rank);
    peers.constant = true;
    for (int peer = 0; peer < ranks_; peer++) {
        uint64_t base = same_node(rank, peer) ? heap_base + static_cast<uint64_t>(peer) * heap_stride : 0;
        std::memcpy(peers.host + 8 * static_cast<size_t>(peer), &base, 8);
    }
    auto set = [&](size_t offset, auto value) {
        if (offset + sizeof value <= state.size) std::memcpy(state.host + offset, &value, sizeof value);
    };
    set(0, int32_t{1});
    set(4, int32_t{rank});
    set(8, int32_t{ranks_});
    set(12, int32_t{rank % ranks_per_node_});
    set(16, int32_t{ranks_per_node_});
    set(40, heap_base + static_cast<uint64_t>(rank) * heap_stride);
    set(48, heap_stride);
    set(56, peers.base);
}

void Network::kill(int rank) {
    dead_[static_cast<size_t>(rank)] = true;
    for (auto& [key, qp] : queue_pairs_) {
        if (qp.from != rank && qp.to != rank) continue;
        qp.broken = true;
        for (auto& r : qp.queue) r->lost = true;
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
    for (Fence& fence : fences_) fence.before = {};
    for (auto& [key, qp] : queue_pairs_) {
        qp.queue.clear();
        qp.active = false;
        qp.launch = 0;
        qp.reads = qp.writes = 0;
    }
}

}  // namespace dsv3::emulator
