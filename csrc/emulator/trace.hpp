#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace dsv3::emulator {

struct Inst;
struct Program;

/// What things cost in virtual time, in SM cycles: round figures of an H200, not measurements. Issue slots, caches and
/// the SMs' share of memory are not modelled.
namespace timing {
constexpr uint64_t copy_latency = 600;         ///< from issue to the first byte, or to the last byte's visibility
constexpr uint64_t copy_bytes_per_cycle = 64;  ///< the port of an SM
constexpr uint64_t remote_store_latency = 200; ///< st.async and red.async in a cluster
constexpr uint64_t megahertz = 1755;
}  // namespace timing

/// A unit that does one thing at a time. Work comes in any order of virtual time, since the order in which agents move
/// is the scheduler's: each piece takes the first gap that is wide enough.
class Engine {
  public:
    struct Slot { uint64_t start, end; };
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

/// What warps and engines did when, for Perfetto / chrome://tracing.
class Trace {
  public:
    enum class Kind : uint8_t { Run, Wait, Copy, Store, Tensor };
    enum Unit : int { copy_engine = -2, tensor_core = -1 };  ///< or the number of a warp
    struct Row {
        int device;
        uint32_t sm;
        int unit;
        uint32_t launch;  ///< the rest for warps only
        std::string kernel;
        uint32_t block[3];
    };
    struct Span { uint32_t row; Kind kind; uint64_t start, end; const Program* program; const Inst* inst; };
    static constexpr size_t max_spans = 1 << 18;

    void span(uint32_t row, Kind kind, uint64_t start, uint64_t end, const std::shared_ptr<const Program>& program, const Inst& inst) {
        if (programs_.empty() || programs_.back() != program) programs_.push_back(program);
        spans.push_back({row, kind, start, end, program.get(), &inst});
    }
    bool full() {
        bool f = spans.size() >= max_spans;
        dropped += f;
        return f;
    }
    std::vector<Span> spans;
    std::vector<Row> rows;
    uint64_t dropped = 0;

  private:
    std::vector<std::shared_ptr<const Program>> programs_;  ///< kept, for spans name their instructions
};

}  // namespace dsv3::emulator
