// Stores that other blocks see late, each at a moment of its own, unless a release makes them visible.

#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace dsv3::emulator {
namespace {

uint64_t last_word(uint64_t offset, uint64_t bytes) { return (offset + bytes - 1) / 4; }

/// The oldest write of a word that is hidden from this place, null if none.
LateWord* first_hidden(std::vector<LateWord>& list, const Locality& to) {
    size_t next = list.size();
    while (next > 0 && !list[next - 1].write->visible(to)) next--;
    return next < list.size() ? &list[next] : nullptr;
}

/// The write becomes visible to all, and with it those that it replaced.
void forget(const std::shared_ptr<LateWrite>& write) {
    LateWords& late = write->region->late;
    for (uint64_t word = write->offset / 4; word <= last_word(write->offset, write->bytes); word++) {
        auto it = late.find(word);
        if (it == late.end()) continue;
        std::vector<LateWord>& list = it->second;
        auto at = std::find_if(list.begin(), list.end(), [&](const LateWord& x) { return x.write == write; });
        if (at != list.end()) list.erase(list.begin(), at + 1);
        if (list.empty()) late.erase(it);
    }
}

}  // namespace

void Machine::view(Region& region, uint64_t offset, uint32_t bytes, const Locality& to, Agent agent, int lane, uint8_t* out) {
    std::memcpy(out, region.host + offset, bytes);
    if (region.late.empty() || bytes == 0) return;
    for (uint64_t word = offset / 4; word <= last_word(offset, bytes); word++) {
        auto it = region.late.find(word);
        if (it == region.late.end()) continue;
        LateWord* hidden = first_hidden(it->second, to);
        LateWord* seen = hidden ? hidden : it->second.data() + it->second.size();
        if (seen != it->second.data()) {
            LateWrite& write = *(seen - 1)->write;
            write.observed |= write.agent != agent || write.lane != lane;
        }
        if (!hidden) continue;
        uint64_t low = std::max(offset, word * 4), high = std::min(offset + bytes, word * 4 + 4);
        std::memcpy(out + (low - offset), hidden->before + (low - word * 4), high - low);
    }
}

void Machine::settle(Region& region, uint64_t offset, uint64_t bytes) {
    if (region.late.empty() || bytes == 0) return;
    bool any = false;
    for (uint64_t word = offset / 4; word <= last_word(offset, bytes); word++) any |= region.late.erase(word) != 0;
    if (!any) return;
    progress++;
    if (spinners) wake_watchers(region.base + offset, region.base + offset + bytes);
}

/// A late write arrives, now.
void Machine::arrive_late(size_t i) {
    std::shared_ptr<LateWrite> write = std::move(late_[i]);
    late_.erase(late_.begin() + static_cast<std::ptrdiff_t>(i));
    progress++;
    time++;
    forget(write);
    uint64_t at = write->region->base + write->offset;
    if (spinners) wake_watchers(at, at + write->bytes);
}

void Machine::make_all_visible(uint32_t device) {
    for (size_t i = late_.size(); i-- > 0;)
        if (late_[i]->from.device == device) arrive_late(i);
}

void Context::delay(const Target& t, uint32_t bytes, int lane) const {
    std::shared_ptr<LateWrite> write;
    LateWrite fresh{t.region, t.offset, bytes, w.agent, lane, w.now, locality(), 0, false, m.steps, 0};
    if (m.options.schedule == "pct") fresh.priority = m.random.next() >> 1;
    write = std::make_shared<LateWrite>(fresh);
    for (uint64_t word = t.offset / 4; word <= last_word(t.offset, bytes); word++) {
        LateWord late{write, {}, {}};
        std::memcpy(late.before, t.region->host + word * 4, std::min<uint64_t>(4, t.region->size - word * 4));
        auto it = t.region->published.find(word);
        if (it != t.region->published.end()) late.published = it->second;
        t.region->late[word].push_back(std::move(late));
    }
    m.late_.push_back(std::move(write));
}

void Context::make_visible(uint32_t lanes, Scope scope) const {
    if (m.late_.empty() || scope <= Scope::Cta) return;
    Locality here = locality();
    int reach = static_cast<int>(scope) - static_cast<int>(Scope::Cta);
    auto releases = [&](const LateWrite& write) {
        if (!write.visible(here) || write.reach >= reach) return false;
        if (!checks || write.observed || (write.agent == w.agent && (lanes >> write.lane & 1))) return true;
        for (uint32_t rest = lanes; rest; rest &= rest - 1)
            if (w.known[static_cast<size_t>(__builtin_ctz(rest))].generic.knows(write.agent, write.lane, write.time)) return true;
        return false;
    };
    bool everywhere = scope == Scope::Sys || (scope == Scope::Gpu && m.devices.size() == 1);
    for (size_t i = m.late_.size(); i-- > 0;) {
        LateWrite& write = *m.late_[i];
        if (!releases(write)) continue;
        if (everywhere) {
            m.arrive_late(i);
            continue;
        }
        write.reach = reach;
        m.progress++;
        uint64_t at = write.region->base + write.offset;
        if (m.spinners) m.wake_watchers(at, at + write.bytes);
    }
}

const Published* Context::published_at(const Target& t, uint64_t word) const {
    if (t.region && !t.region->late.empty()) {
        auto late = t.region->late.find(word);
        if (late != t.region->late.end())
            if (const LateWord* hidden = first_hidden(late->second, locality()))
                return hidden->published.scope == Scope::None ? nullptr : &hidden->published;
    }
    auto it = t.published->find(word);
    return it == t.published->end() ? nullptr : &it->second;
}

}  // namespace dsv3::emulator
