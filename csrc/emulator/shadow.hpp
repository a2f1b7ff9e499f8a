#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clock.hpp"

namespace dsv3::emulator {

enum class Scope : uint8_t { None, Cta, Cluster, Gpu, Sys };

/// One executed access (of a warp's instruction or an asynchronous operation); cells of shadow memory point here.
struct Access {
    Agent agent;
    uint32_t time;      ///< of the agent; in_flight until an asynchronous operation has an end that one can wait for
    uint32_t code;      ///< index of the instruction, for messages
    int32_t warp;       ///< global number of the issuing warp, for messages
    uint32_t program;
    bool async;         ///< through the async proxy
    bool atomic;
    Scope scope;        ///< None: a weak access; else a strong one, racing only outside this scope
    uint32_t cta = 0, cluster = 0, device = 0;  ///< where it was issued, to judge scopes
    /// Do both scopes reach the other's place?
    static bool reach(const Access& a, const Access& b) { return reaches(a.scope, a, b) && reaches(b.scope, a, b); }
    static bool reaches(Scope s, const Access& a, const Access& b) {
        return s == Scope::Sys || (s == Scope::Gpu && a.device == b.device) ||
               (s == Scope::Cluster && a.cluster == b.cluster) || (s == Scope::Cta && a.cta == b.cta);
    }
};

/// A lane's (or an asynchronous operation's) access on its way through the checks.
struct Accessor {
    const Knowledge* knowledge[4];  ///< of each issuing warp: an order must hold for all of them
    int count;
    uint32_t access;  ///< index into the log
    int lane;         ///< of its agent
    bool global = false;  ///< the memory is global, not shared
    bool proxy_reads_map = false;  ///< reads a tensor map: needs map_acquired
};

/// Log of the accesses that cells refer to, and the sets of readers.
class AccessLog {
  public:
    AccessLog() { clear(); }
    void clear();
    uint32_t add(const Access& a);
    Access& operator[](uint32_t i) { return log_[i]; }
    const Access& operator[](uint32_t i) const { return log_[i]; }
    struct Reader { uint32_t access; uint32_t mask; };
    using Readers = std::vector<Reader>;
    const Readers& readers(uint32_t id) const { return sets_[id]; }
    uint32_t make_set(Readers readers);
    std::vector<std::array<uint32_t, 8>> splits;  ///< cells whose bytes differ: writers, then readers, of 4 bytes
    size_t size() const { return log_.size(); }

  private:
    std::vector<Access> log_;
    std::vector<Readers> sets_;
};

struct Conflict {
    bool found = false;
    uint32_t other = 0;  ///< the earlier access
    int other_lane = 0;
    bool other_wrote = false;
    bool missing_fence = false;  ///< ordered, but without the proxy fence
    uint64_t offset = 0;
};

/// Who wrote and who read each byte last, of one allocation or one block's shared memory.
class Shadow {
  public:
    explicit Shadow(uint64_t bytes) : pages_((bytes + page_bytes - 1) / page_bytes) {}
    /// Forgets everything: all that went before is ordered before all that comes (a launch boundary).
    void reset() { epoch_++; }
    Conflict read(AccessLog& log, const Accessor& by, uint64_t offset, uint64_t bytes);
    Conflict write(AccessLog& log, const Accessor& by, uint64_t offset, uint64_t bytes);
    /// The access that wrote this byte last, 0 if none since the last reset.
    uint32_t writer(const AccessLog& log, uint64_t offset) const;

  private:
    static constexpr uint64_t page_bytes = 4096;
    struct Cell { uint32_t writer = 0, readers = 0; };  ///< of 4 bytes: (access << 5 | lane) + 1, or a set, see .cpp
    struct Page { uint32_t epoch = 0; std::array<Cell, page_bytes / 4> cells; };
    Page& page(uint64_t index);
    template <bool is_write>
    Conflict walk(AccessLog& log, const Accessor& by, uint64_t offset, uint64_t bytes);
    template <bool is_write>
    bool visit(AccessLog& log, const Accessor& by, uint32_t& writer, uint32_t& readers, Conflict& conflict);

    std::vector<std::unique_ptr<Page>> pages_;
    uint32_t epoch_ = 1;
    uint32_t ordered_writer_ = 0;   ///< memo within one walk
    uint32_t from_readers_ = 0, to_readers_ = 0;
};

/// One bit a byte: never written.
class Poison {
  public:
    Poison(uint64_t bytes, bool value) : bits_((bytes + 63) / 64, value ? ~uint64_t{0} : 0), any_(value) {}
    bool any() const { return any_; }
    bool any(uint64_t offset, uint64_t bytes) const;
    void set(uint64_t offset, uint64_t bytes, bool value);

  private:
    std::vector<uint64_t> bits_;
    bool any_;
};

}  // namespace dsv3::emulator
