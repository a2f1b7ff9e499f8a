#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "shadow.hpp"

namespace dsv3::emulator {

struct Region;

/// Where a thread runs: what decides whether a scope reaches it.
struct Locality {
    uint32_t cta = 0, cluster = 0, device = 0;
    /// 0: the same block, 1: the same cluster, 2: the same device, 3: another one.
    int distance(const Locality& o) const {
        return cta == o.cta ? 0 : cluster == o.cluster ? 1 : device == o.device ? 2 : 3;
    }
};
/// Bounds, in writes and in instructions of all warps: behind them the oldest arrives.
constexpr size_t most_late = 512;
constexpr uint64_t latest = 65536;
constexpr int same_block = 0, same_device = 2, everywhere = 3;
inline int reach_of(Scope s) { return static_cast<int>(s) - static_cast<int>(Scope::Cta); }

/// What a released value publishes to those that acquire it.
struct Published {
    Knowledge knowledge;
    Scope scope = Scope::None;
    Locality from;
};
using PublishedMap = std::unordered_map<uint64_t, Published>;  ///< by byte offset / 4; never iterated

/// A strong store to global memory on its way to those who do not see it yet: they read the bytes that it replaced.
struct LateWrite {
    Region* region;
    uint64_t offset;
    uint32_t bytes;
    Agent agent;
    int lane;
    uint32_t time;          ///< of the agent
    Locality from;
    uint64_t step;          ///< when it was executed
    uint64_t due;           ///< "random": the step before which it does not arrive while a warp can run
    uint64_t priority;      ///< "pct"
    int reach = same_block; ///< how far away it is visible
    bool observed = false;  ///< another thread has read it: that thread's releases carry it along
    bool visible(const Locality& to, const Knowledge* known) const {
        return from.distance(to) <= reach || (known && known->generic.knows(agent, lane, time));
    }
};

/// What a late write replaced in one word. A word's list is in coherence order.
struct LateWord {
    std::shared_ptr<LateWrite> write;
    uint8_t before[4], mask;  ///< mask: the bytes that were written, a bit each
    Published published;      ///< by the value that was there before
};
using LateWords = std::unordered_map<uint64_t, std::vector<LateWord>>;  ///< by byte offset / 4; never iterated

}  // namespace dsv3::emulator
