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

/// What a released value publishes to those that acquire it.
struct Published {
    Knowledge knowledge;
    Scope scope = Scope::None;
    Locality from;
};
using PublishedMap = std::unordered_map<uint64_t, Published>;  ///< by byte offset / 4; never iterated

/// A store whose value has not reached everybody. Memory holds the newest value; who may not see this store yet
/// reads the bytes it replaced.
struct LateWrite {
    Region* region;
    uint64_t offset;
    uint32_t bytes;
    Agent agent;
    int lane;
    uint32_t time;         ///< of the agent
    Locality from;
    int reach = 0;         ///< distance up to which it is visible
    bool observed = false; ///< another thread has read it: that thread's releases carry it along
    uint64_t step = 0, priority = 0;
    bool visible(const Locality& to) const { return from.distance(to) <= reach; }
};

/// One word of a late write: what was there before it. A word's list is in coherence order, and a reader sees the last
/// one that is visible to it: visibility only grows, so no reader ever goes back to an older value.
struct LateWord {
    std::shared_ptr<LateWrite> write;
    uint8_t before[4];
    Published published;
};
using LateWords = std::unordered_map<uint64_t, std::vector<LateWord>>;  ///< by byte offset / 4; never iterated

}  // namespace dsv3::emulator
