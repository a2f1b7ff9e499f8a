#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace dsv3::emulator {

/// Whoever accesses memory in an order of its own: a warp, a warpgroup's tensor core, an mbarrier's copies, ...
using Agent = uint32_t;
constexpr uint32_t in_flight = UINT32_MAX;  ///< time of an access whose end nobody can know yet

/// A vector clock: for each agent the time up to which its accesses happened before. `all` holds for all 32 lanes of an
/// agent, `some` says more of single lanes. Immutable once shared, so that the lanes of a warp share one.
struct ClockData {
    struct Entry { Agent agent; uint32_t mask; uint32_t time; };
    uint32_t references = 0;
    std::vector<uint32_t> all;
    std::vector<Entry> some;  ///< by ascending agent

    std::vector<Entry>::const_iterator of(Agent agent) const {
        return std::lower_bound(some.begin(), some.end(), agent, [](const Entry& e, Agent a) { return e.agent < a; });
    }
};

class Clock {
  public:
    Clock() = default;
    Clock(const Clock& o) : data_(o.data_) { if (data_) data_->references++; }
    Clock(Clock&& o) noexcept : data_(std::exchange(o.data_, nullptr)) {}
    Clock& operator=(Clock o) noexcept { std::swap(data_, o.data_); return *this; }
    ~Clock() { if (data_ && --data_->references == 0) delete data_; }

    bool empty() const { return !data_; }
    bool same(const Clock& o) const { return data_ == o.data_; }
    /// Did the accesses of this lane up to `time` happen before?
    bool knows(Agent agent, int lane, uint32_t time) const { return known_lanes(agent, time) >> lane & 1; }
    /// The lanes whose accesses up to `time` happened before.
    uint32_t known_lanes(Agent agent, uint32_t time) const {
        if (!data_ || time == in_flight) return 0;
        if (agent < data_->all.size() && data_->all[agent] >= time) return ~0u;
        uint32_t lanes = 0;
        for (auto e = data_->of(agent); e != data_->some.end() && e->agent == agent; ++e)
            if (e->time >= time) lanes |= e->mask;
        return lanes;
    }
    void join(const Clock& other);
    void add(Agent agent, uint32_t mask, uint32_t time);

  private:
    bool covers(const Clock& other) const;
    void make_own();
    ClockData* data_ = nullptr;
};

/// What a lane knows. Each flavour answers another question about an earlier access; see Shadow's checks.
struct Knowledge {
    Clock generic;     ///< it happened before
    Clock proxy;       ///< ... and a proxy fence for shared memory lies between, so the async proxy sees it
    Clock proxy_global;  ///< ... for global memory
    Clock init;        ///< ... for mbarrier.init only: fence.mbarrier_init lies between
    Clock map_released, map_acquired;  ///< ... for tensor maps: fence.proxy.tensormap

    void join(const Knowledge& o) {
        generic.join(o.generic);
        proxy.join(o.proxy);
        proxy_global.join(o.proxy_global);
        init.join(o.init);
        map_released.join(o.map_released);
        map_acquired.join(o.map_acquired);
    }
    bool same(const Knowledge& o) const {
        return generic.same(o.generic) && proxy.same(o.proxy) && proxy_global.same(o.proxy_global) && init.same(o.init) && map_released.same(o.map_released) &&
               map_acquired.same(o.map_acquired);
    }
};

}  // namespace dsv3::emulator
