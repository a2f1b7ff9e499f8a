#include "clock.hpp"

#include <algorithm>

namespace dsv3::emulator {

void Clock::make_own() {
    if (!data_) {
        data_ = new ClockData;
        data_->references = 1;
    } else if (data_->references > 1) {
        data_->references--;
        data_ = new ClockData(*data_);
        data_->references = 1;
    }
}

bool Clock::covers(const Clock& other) const {
    if (!other.data_ || same(other)) return true;
    if (!data_) return false;
    const std::vector<uint32_t>&a = data_->all, &b = other.data_->all;
    size_t common = std::min(a.size(), b.size());
    for (size_t i = 0; i < common; i++)
        if (a[i] < b[i]) return false;
    for (size_t i = common; i < b.size(); i++)
        if (b[i]) return false;
    auto mine = data_->some.cbegin();
    for (const ClockData::Entry& e : other.data_->some) {
        if (e.agent < a.size() && a[e.agent] >= e.time) continue;
        while (mine != data_->some.cend() && mine->agent < e.agent) ++mine;
        uint32_t rest = e.mask;
        for (auto same = mine; same != data_->some.cend() && same->agent == e.agent; ++same)
            if (same->time >= e.time) rest &= ~same->mask;
        if (rest) return false;
    }
    return true;
}

void Clock::join(const Clock& other) {
    if (covers(other)) return;
    if (!data_ || other.covers(*this)) {
        *this = other;
        return;
    }
    make_own();
    std::vector<uint32_t>& all = data_->all;
    const std::vector<uint32_t>& theirs = other.data_->all;
    if (all.size() < theirs.size()) all.resize(theirs.size());
    for (size_t i = 0; i < theirs.size(); i++) all[i] = std::max(all[i], theirs[i]);
    for (const ClockData::Entry& e : other.data_->some) add(e.agent, e.mask, e.time);
    auto& some = data_->some;
    some.erase(std::remove_if(some.begin(), some.end(),
                              [&](const ClockData::Entry& e) { return e.agent < all.size() && all[e.agent] >= e.time; }),
               some.end());
}

void Clock::add(Agent agent, uint32_t mask, uint32_t time) {
    make_own();
    std::vector<uint32_t>& all = data_->all;
    if (agent < all.size() && all[agent] >= time) return;
    std::vector<ClockData::Entry>& some = data_->some;
    auto begin = some.begin() + (data_->of(agent) - some.cbegin());
    auto end = std::find_if(begin, some.end(), [&](const ClockData::Entry& e) { return e.agent != agent; });
    if (mask != ~0u) {
        // Entries of one agent stay disjoint in (lane, time): a later time takes the lanes from an earlier one.
        uint32_t rest = mask;
        auto equal = end;
        for (auto e = begin; e != end; ++e) {
            if (e->time > time) rest &= ~e->mask;
            else if (e->time < time) e->mask &= ~mask;
            else equal = e;
        }
        if (equal != end) {
            equal->mask |= rest;
        } else if (rest) {
            const auto first = begin - some.begin(), last = end - some.begin() + 1;
            some.insert(end, {agent, rest, time});
            begin = some.begin() + first, end = some.begin() + last;
        }
        uint32_t covered = 0, least = UINT32_MAX;
        for (auto e = begin; e != end; ++e)
            if (e->mask) covered |= e->mask, least = std::min(least, e->time);
        if (covered != ~0u) {
            some.erase(std::remove_if(begin, end, [](const ClockData::Entry& e) { return e.mask == 0; }), end);
            return;
        }
        time = least;
    }
    if (agent >= all.size()) all.resize(agent + 1);
    all[agent] = std::max(all[agent], time);
    some.erase(std::remove_if(begin, end, [&](const ClockData::Entry& e) { return e.mask == 0 || e.time <= all[agent]; }), end);
}

}  // namespace dsv3::emulator
