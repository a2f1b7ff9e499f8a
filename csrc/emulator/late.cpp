// Strong stores to global memory that other blocks and ranks see late.
//
// Memory always holds the newest value; beside it, each word keeps the stores that have not reached everybody, in
// coherence order, with the bytes that they replaced. A thread sees the last of them that is visible to it:
//   - its block's own, at once (an SM's threads share an L1);
//   - those that have arrived: the scheduler lets each arrive at a moment of its own, at its device and then at others;
//   - those that happened before the read: the reader's vector clock knows them, by whatever release, fence or barrier.
// All three only grow, so nobody goes back to an older value. What a thread has merely seen is in no clock; its releases
// and fences make that visible as far as their scope. fence.sc does so for all that it orders, which is what forbids
// store buffering. A read-modify-write, an engine's write, a plain store and the host act on the newest value, which
// then is everybody's.

#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace dsv3::emulator {
namespace {

constexpr uint32_t usual_delay = 32, long_delay = 2048;  // instructions, of all warps

uint64_t last_word(uint64_t offset, uint64_t bytes) { return (offset + bytes - 1) / 4; }

/// The list's first entry behind all that this reader sees; its end if it sees the newest.
size_t hidden_from(const std::vector<LateWord>& list, const Locality& to, const Knowledge* known) {
    size_t next = list.size();
    while (next > 0 && !list[next - 1].write->visible(to, known)) next--;
    return next;
}

/// The write is visible to all, and so are those that it followed.
void forget(const LateWrite& write) {
    LateWords& late = write.region->late;
    for (uint64_t word = write.offset / 4; word <= last_word(write.offset, write.bytes); word++) {
        auto it = late.find(word);
        if (it == late.end()) continue;
        std::vector<LateWord>& list = it->second;
        auto at = std::find_if(list.begin(), list.end(), [&](const LateWord& x) { return x.write.get() == &write; });
        if (at != list.end()) list.erase(list.begin(), at + 1);
        if (list.empty()) late.erase(it);
    }
}

}  // namespace

void Machine::settle(Region& region, uint64_t offset, uint64_t bytes) {
    if (region.late.empty() || bytes == 0) return;
    bool any = false;
    for (uint64_t word = offset / 4; word <= last_word(offset, bytes); word++) any |= region.late.erase(word) != 0;
    if (!any) return;
    progress++;
    if (spinners) wake_watchers(region.base + offset, region.base + offset + bytes);
}

void Machine::arrive_late(size_t i) {
    const LateWrite* write = late_[i].get();
    if (write->due > steps && !runnable_.empty() && late_.size() <= most_late) return;
    time++;
    // Other devices, if there are any, may see it later than its own.
    int distance = devices.size() > 1 && write->reach < same_device && choose(2) ? same_device : everywhere;
    extend(*late_[i], distance);
    if (distance == everywhere) late_.erase(late_.begin() + static_cast<std::ptrdiff_t>(i));
}

void Machine::extend(LateWrite& write, int reach) {
    if (reach <= write.reach) return;
    write.reach = reach >= same_device && devices.size() == 1 ? everywhere : reach;
    if (write.reach == everywhere) forget(write);
    progress++;
    uint64_t at = write.region->base + write.offset;
    if (spinners) wake_watchers(at, at + write.bytes);
}

void Machine::release(uint64_t base) {
    spread_late([=](const LateWrite& w) { return w.region->base == base ? everywhere : w.reach; });
    memory.release(base);
}

void Machine::spread_late(const std::function<int(const LateWrite&)>& distance) {
    if (late_.empty()) return;
    for (const std::shared_ptr<LateWrite>& write : late_) extend(*write, distance(*write));
    auto arrived = [](const auto& write) { return write->reach == everywhere; };
    late_.erase(std::remove_if(late_.begin(), late_.end(), arrived), late_.end());
}

void Context::delay(const Target& t, uint32_t bytes, int lane) const {
    Region& region = *t.region;
    if (m.options.schedule == "timed" || m.options.schedule == "sequential") return m.settle(region, t.offset, bytes);
    // Some arrive soon and some long after: with one rate for all, hardly two would change places.
    uint64_t due = m.options.schedule == "random" ? m.steps + m.random.below(m.random.one_in(2) ? usual_delay : long_delay) : 0;
    uint64_t priority = m.options.schedule == "pct" ? m.random.next() >> 1 : 0;
    auto write = std::make_shared<LateWrite>(
        LateWrite{&region, t.offset, bytes, w.agent, lane, w.now, w.cta->locality(), m.steps, due, priority});
    for (uint64_t word = t.offset / 4; word <= last_word(t.offset, bytes); word++) {
        LateWord late{write, {}, 0, {}};
        for (uint64_t b = std::max(word * 4, t.offset); b < std::min(word * 4 + 4, t.offset + bytes); b++) {
            late.before[b % 4] = region.host[b];
            late.mask |= static_cast<uint8_t>(1 << b % 4);
        }
        auto it = region.published.find(word);
        if (it != region.published.end()) late.published = it->second;
        region.late[word].push_back(std::move(late));
    }
    m.late_.push_back(std::move(write));
}

void Context::see(const Target& t, uint32_t bytes, int lane, uint8_t* out) const {
    Locality here = w.cta->locality();
    const Knowledge* known = checks ? &w.known[static_cast<size_t>(lane)] : nullptr;
    std::memcpy(out, t.data, bytes);
    for (uint64_t word = t.offset / 4; word <= last_word(t.offset, bytes); word++) {
        auto it = t.region->late.find(word);
        if (it == t.region->late.end()) continue;
        const std::vector<LateWord>& list = it->second;
        size_t hidden = hidden_from(list, here, known);
        if (hidden > 0) {
            LateWrite& seen = *list[hidden - 1].write;
            bool own = seen.agent == w.agent && seen.lane == lane;
            seen.observed |= !own && !(known && known->generic.knows(seen.agent, seen.lane, seen.time));
        }
        for (size_t i = list.size(); i-- > hidden;)
            for (uint64_t b = std::max(word * 4, t.offset); b < std::min(word * 4 + 4, t.offset + bytes); b++)
                if (list[i].mask >> b % 4 & 1) out[b - t.offset] = list[i].before[b % 4];
    }
}

const Published* Context::published_at(const Target& t, uint64_t word, int lane) const {
    if (t.region && !t.region->late.empty()) {
        auto late = t.region->late.find(word);
        if (late != t.region->late.end()) {
            size_t hidden = hidden_from(late->second, w.cta->locality(), &w.known[static_cast<size_t>(lane)]);
            if (hidden < late->second.size()) return &late->second[hidden].published;
        }
    }
    auto it = t.published->find(word);
    return it == t.published->end() ? nullptr : &it->second;
}

void Context::make_visible(uint32_t lanes, Scope scope, bool sequential) const {
    if (m.late_.empty() || scope <= Scope::Cta) return;
    Locality here = w.cta->locality();
    m.spread_late([&](const LateWrite& write) {
        bool carries = write.from.distance(here) <= write.reach && (write.observed || !checks);
        if (sequential && !carries) {
            carries = write.agent == w.agent && (lanes >> write.lane & 1);
            for (uint32_t rest = lanes; rest && !carries; rest &= rest - 1)
                carries = w.known[static_cast<size_t>(__builtin_ctz(rest))].generic.knows(write.agent, write.lane, write.time);
        }
        return carries ? std::max(reach_of(scope), write.from.distance(here)) : write.reach;
    });
}

}  // namespace dsv3::emulator
