#pragma once

#include "machine.hpp"

namespace dsv3::emulator {

/// The mbarrier at a shared-memory address, whose initialisation must be visible to `by` (a lane, or an asynchronous
/// operation). Fails with a HazardError for none.
Mbarrier& find_mbarrier(const Context& c, const Target& t, int lane);
bool init_visible(const AccessLog& log, const Mbarrier& b, const Knowledge& k, const Warp* by, int lane, bool async);

/// Changes of a phase. They return what is wrong, or an empty string; a completed phase wakes those that wait for it.
std::string expect_bytes(Mbarrier& b, int64_t bytes);
std::string complete_bytes(Machine& m, Cta& cta, Mbarrier& b, int64_t bytes, uint64_t cycle);
std::string arrive(Machine& m, Cta& cta, Mbarrier& b, uint32_t count, uint64_t cycle);
std::string show(const Mbarrier& b);

}  // namespace dsv3::emulator
