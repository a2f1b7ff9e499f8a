#include "memory.hpp"

#include <algorithm>

namespace dsv3::emulator {

Region& GlobalMemory::map(uint8_t* host, uint64_t size, std::string name, int rank, uint64_t at) {
    uint64_t base = at ? at : next_;
    // A guard of at least 64 KB lies between allocations: an overrun never lands in a neighbour.
    if (!at) next_ += (size + 511) / 512 * 512 + 65536;
    auto region = std::make_unique<Region>(base, size, host, std::move(name));
    region->rank = rank;
    if (!host) {
        region->owned.resize(std::max<uint64_t>(size, 1));
        region->host = region->owned.data();
    }
    return *(regions_[base] = std::move(region));
}

void GlobalMemory::release(uint64_t base) {
    auto it = regions_.find(base);
    if (it == regions_.end()) return;
    // The address stays known as freed, its storage goes.
    Region& r = *it->second;
    r.alive = false;
    r.host = nullptr;
    r.owned = {};
    r.shadow = Shadow(0);
    r.poison.reset();
    r.published.clear();
    r.late.clear();
    last_ = nullptr;
}

Region* GlobalMemory::find(uint64_t address) {
    if (last_ && address - last_->base < last_->size) return last_;
    auto it = regions_.upper_bound(address);
    if (it == regions_.begin()) return nullptr;
    Region* r = std::prev(it)->second.get();
    if (address - r->base >= r->size) return nullptr;
    if (r->alive) last_ = r;
    return r;
}

void GlobalMemory::forget_order() {
    for (auto& [base, region] : regions_) {
        region->shadow.reset();
        region->published.clear();
        region->late.clear();
    }
}

std::string GlobalMemory::describe(uint64_t address) {
    auto it = regions_.upper_bound(address);
    if (it == regions_.begin()) return "no allocation lies below it";
    const Region& r = *std::prev(it)->second;
    uint64_t past = address - r.base;
    return "'" + r.name + "' of " + std::to_string(r.size) + " bytes" + (r.alive ? "" : " (freed)") + " begins " +
           std::to_string(past) + " bytes before it";
}

}  // namespace dsv3::emulator
