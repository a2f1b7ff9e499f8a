#pragma once

#include "lanes.hpp"

namespace dsv3::emulator {

enum class Order : uint8_t { Weak, Relaxed, Acquire, Release, AcqRel };

struct MemoryOp {
    Space space;
    Type type;
    bool wide;         ///< 64-bit address register
    bool wide_value;   ///< 64-bit destination register
    Order order = Order::Weak;
    Scope scope = Scope::None;
    int64_t offset;
    int vector = 1;
    int op = 0;        ///< of an atomic
    bool no_result = false;
};

/// .relaxed, .acquire, ... and the scope; `otherwise` where neither is written.
void take_ordering(Decode& d, MemoryOp& op, Order order, Scope scope);
void take_cache_hints(Decode& d, const Operand** policy_from = nullptr);

/// Release and acquire of lanes at addresses. `lanes` and `targets` of the active lanes of one instruction.
void acquire_from(Context& c, const MemoryOp& op, const Target* targets, uint32_t bytes);
Published release_of(Context& c, const MemoryOp& op, const Target& target, int lane);
/// fence.acq_rel of the active lanes, or fence.sc: also what functions do that the machine provides.
void memory_fence(Context& c, Scope scope, bool sequential = false);
/// What a relaxed arrival hands over: what lay before the lanes' fences of this scope or more, and fence.mbarrier_init.
Knowledge fenced_release(const Context& c, uint32_t lanes, Scope scope);
/// After a relaxed wait: a fence behind it acquires this.
void acquire_by_fence(Context& c, uint32_t lanes, const Knowledge& k);

}  // namespace dsv3::emulator
