#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "late.hpp"

namespace dsv3::emulator {

/// One allocation in the machine's global address space. Kernels see virtual addresses, so a run does not depend on
/// where the host placed a tensor.
struct Region {
    Region(uint64_t base, uint64_t size, uint8_t* host, std::string name)
        : base(base), size(size), host(host), name(std::move(name)), shadow(size) {}
    uint64_t base, size;
    uint8_t* host;
    std::string name;
    bool alive = true;
    bool constant = false;
    bool synchronises = false;  ///< volatile accesses release and acquire: NVSHMEM's barrier passes here without fences
    int rank = 0;
    std::vector<uint8_t> owned;
    Shadow shadow;
    std::unique_ptr<Poison> poison;
    PublishedMap published;
    LateWords late;
};

class GlobalMemory {
  public:
    /// Maps host bytes, or bytes of its own (zeroed) if `host` is null. The base is aligned to 512 bytes; `at` chooses it.
    Region& map(uint8_t* host, uint64_t size, std::string name, int rank, uint64_t at = 0);
    void release(uint64_t base);
    Region* find(uint64_t address);      ///< null between allocations
    void forget_order();                 ///< nothing runs: all accesses so far are ordered before what comes
    std::string describe(uint64_t address);  ///< nearest allocation, for messages

  private:
    std::map<uint64_t, std::unique_ptr<Region>> regions_;
    Region* last_ = nullptr;
    uint64_t next_ = 0x0300'0000'0000;
};

}  // namespace dsv3::emulator
