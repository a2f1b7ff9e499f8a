#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <unordered_map>

namespace dsv3::emulator {

/// What things cost in virtual time, in cycles of an SM: round figures of a Hopper, not measurements. They serve to
/// compare schedules and protocols. Not modelled: L2, pipes slower than the issue rate, clocks that throttle, and what
/// ptxas makes of the PTX (an instruction counts as one; a move as none, for most of them leave no trace).
///
/// Device memory and the links between GPUs are parameters: see LinkModel and dsv3_kernels/emulator/links.py.
namespace timing {
constexpr uint64_t megahertz = 1755;
constexpr uint32_t partitions = 4;               ///< of an SM: each issues one instruction of one warp a cycle
constexpr uint64_t tensor_columns_per_cycle = 2; ///< m64nN by 32 bytes of K: N / 2 cycles, which is 4096 FMA of FP8 a cycle
constexpr uint64_t shared_bytes_per_cycle = 128; ///< 32 banks; what wgmma reads counts for itself
constexpr uint64_t shared_latency = 30;
constexpr uint64_t cluster_latency = 200;        ///< to the shared memory of another block, one way
constexpr uint64_t sm_bytes_per_cycle = 64;      ///< between an SM and memory: copy engine, bulk stores, loads, stores, each
constexpr uint64_t sector_bytes = 32;            ///< what global memory moves at least
constexpr uint64_t l1_latency = 35;
constexpr size_t l1_sectors = 1024;              ///< direct-mapped; weak loads only. A GEMM's rings leave little more

constexpr uint64_t cycles(uint64_t nanoseconds) { return nanoseconds * megahertz / 1000; }
}  // namespace timing

/// When a piece of work begins and ends.
struct Slot { uint64_t start, end; };

/// A unit that does one thing at a time. Work comes in any order of virtual time, since the order in which agents move
/// is the scheduler's: each piece takes the first gap that is wide enough.
class Engine {
  public:
    Slot reserve(uint64_t ready, uint64_t cycles) {
        auto next = busy_.upper_bound(ready);
        if (next != busy_.begin()) ready = std::max(ready, std::prev(next)->second);
        while (next != busy_.end() && next->first < ready + cycles) ready = next->second, ++next;
        Slot slot{ready, ready + cycles};
        auto it = busy_.emplace(slot.start, slot.end).first;
        if (next != busy_.end() && next->first == slot.end) it->second = next->second, busy_.erase(next);
        if (it != busy_.begin() && std::prev(it)->second == slot.start) std::prev(it)->second = it->second, busy_.erase(it);
        return slot;
    }
    void forget() { busy_.clear(); }

  private:
    std::map<uint64_t, uint64_t> busy_;  ///< start to end, touching intervals joined
};

/// Something that many use at once, so many units a cycle: each request takes what the others have left, from `ready` on.
/// Counted by windows of a few cycles; exact for a single user of whole units.
class Rate {
  public:
    explicit Rate(double units_per_cycle = 1) { set(units_per_cycle); }
    void set(double units_per_cycle) { capacity_ = std::max(uint64_t{1}, static_cast<uint64_t>(units_per_cycle * window * parts)); }
    Slot reserve(uint64_t ready, uint64_t units) {
        units *= parts;
        Slot slot{UINT64_MAX, ready};
        for (uint64_t at = ready / window; units; at++) {
            at = free_from(at);
            Window& w = windows_[at];
            uint64_t begin = std::max(ready, at * window + w.used * window / capacity_);
            uint64_t taken = std::min({units, capacity_ - w.used, capacity_ * ((at + 1) * window - begin) / window});
            if (taken == 0) continue;
            w.used += taken;
            units -= taken;
            if (w.used == capacity_) w.next = at + 1;
            slot.start = std::min(slot.start, begin);
            slot.end = begin + (taken * window + capacity_ - 1) / capacity_;
        }
        slot.start = std::min(slot.start, slot.end);
        return slot;
    }
    void forget() { windows_.clear(); }

  private:
    static constexpr uint64_t window = 32, parts = 1024;  ///< cycles; of a unit, for slow links
    struct Window { uint64_t used = 0, next = 0; };  ///< next: of a full one, where to look on
    uint64_t free_from(uint64_t at) {
        uint64_t found = at;
        for (auto w = windows_.find(found); w != windows_.end() && w->second.next; w = windows_.find(found)) found = w->second.next;
        while (at != found) {
            uint64_t& next = windows_[at].next;
            at = next;
            next = found;
        }
        return found;
    }
    uint64_t capacity_;
    std::unordered_map<uint64_t, Window> windows_;
};

}  // namespace dsv3::emulator
