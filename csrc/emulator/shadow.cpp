#include "shadow.hpp"

#include <algorithm>

#include "error.hpp"

namespace dsv3::emulator {
namespace {

// A cell names an access and a lane in 32 bits: (access << 5 | lane), access 0 meaning nobody. Readers are one such
// name, or a set with the top bit on. A cell whose bytes differ has `split` as its writer and an index as its readers.
constexpr uint32_t set_bit = 0x80000000u;
constexpr uint32_t split = 0xFFFFFFFFu;
constexpr uint32_t max_accesses = 1u << 26;

}  // namespace

void AccessLog::clear() {
    log_.assign(1, Access{});
    sets_.clear();
    splits.clear();
}

uint32_t AccessLog::add(const Access& a) {
    if (log_.size() >= max_accesses)
        throw Error(ErrorKind::Emulation, "more than 2^26 memory instructions in one launch: run it with checks=False");
    log_.push_back(a);
    return static_cast<uint32_t>(log_.size() - 1);
}

uint32_t AccessLog::make_set(Readers readers) {
    if (!sets_.empty() && sets_.back().size() == readers.size() &&
        std::equal(readers.begin(), readers.end(), sets_.back().begin(),
                   [](const Reader& a, const Reader& b) { return a.access == b.access && a.mask == b.mask; }))
        return static_cast<uint32_t>(sets_.size() - 1);
    sets_.push_back(std::move(readers));
    return static_cast<uint32_t>(sets_.size() - 1);
}

Shadow::Page& Shadow::page(uint64_t index) {
    std::unique_ptr<Page>& p = pages_[index];
    if (!p) {
        p = std::make_unique<Page>();
        p->epoch = epoch_;
    } else if (p->epoch != epoch_) {
        p->cells.fill({});
        p->epoch = epoch_;
    }
    return *p;
}

uint32_t Shadow::writer(const AccessLog& log, uint64_t offset) const {
    const std::unique_ptr<Page>& p = pages_[offset / page_bytes];
    if (!p || p->epoch != epoch_) return 0;
    const Cell& cell = p->cells[offset % page_bytes / 4];
    return (cell.writer == split ? log.splits[cell.readers][offset % 4] : cell.writer) >> 5;
}

/// True if `earlier` by `lane` is ordered before the accessor. A write needs a proxy fence on its way to the async
/// proxy; a read before an asynchronous write does not (the consumer's arrive is enough).
static bool ordered(const AccessLog& log, const Accessor& by, uint32_t earlier, int lane, bool earlier_wrote, bool* fence) {
    const Access &a = log[earlier], &b = log[by.access];
    bool needs_fence = earlier_wrote && b.async && !a.async;
    if (a.agent == b.agent && !a.async && !b.async && lane == by.lane) return true;  // program order
    if (earlier == by.access && lane == by.lane) return true;                        // another piece of one operation
    bool known = true, fenced = true;
    for (int i = 0; i < by.count; i++) {
        const Knowledge& k = *by.knowledge[i];
        known &= k.generic.knows(a.agent, lane, a.time);
        const Clock& flavour = by.proxy_reads_map ? k.map_acquired : by.global ? k.proxy_global : k.proxy;
        fenced &= !needs_fence || flavour.knows(a.agent, lane, a.time);
    }
    *fence = known && !fenced;
    return known && fenced;
}

/// The lanes of an earlier read that are ordered before the accessor: `ordered` for all of them at once.
static uint32_t ordered_reads(const AccessLog& log, const Accessor& by, uint32_t earlier) {
    const Access &a = log[earlier], &b = log[by.access];
    uint32_t lanes = ~0u;
    for (int i = 0; i < by.count; i++) lanes &= by.knowledge[i]->generic.known_lanes(a.agent, a.time);
    if (earlier == by.access || (a.agent == b.agent && !a.async && !b.async)) lanes |= 1u << by.lane;
    return lanes;
}

template <bool is_write>
bool Shadow::visit(AccessLog& log, const Accessor& by, uint32_t& writer, uint32_t& readers, Conflict& conflict) {
    const Access& me = log[by.access];
    auto clash = [&](uint32_t name, bool wrote) {
        uint32_t access = name >> 5;
        int lane = static_cast<int>(name & 31);
        const Access& other = log[access];
        bool fence = false;
        if (ordered(log, by, access, lane, wrote, &fence)) return false;
        if (!fence && Access::reach(me, other)) return false;
        conflict = {true, access, lane, wrote, fence, 0};
        return true;
    };
    if (writer && writer != ordered_writer_) {
        if (clash(writer, true)) return false;
        ordered_writer_ = writer;
    }
    uint32_t name = by.access << 5 | static_cast<uint32_t>(by.lane);
    if (is_write) {
        if (readers && readers != from_readers_) {
            if (readers & set_bit) {
                for (const AccessLog::Reader& r : log.readers(readers & ~set_bit))
                    for (uint32_t rest = r.mask; rest; rest &= rest - 1)
                        if (clash(r.access << 5 | static_cast<uint32_t>(__builtin_ctz(rest)), false)) return false;
            } else if (clash(readers, false)) {
                return false;
            }
            from_readers_ = readers;
        }
        writer = name;
        readers = 0;
        return true;
    }
    if (readers == name) return true;
    if (readers == from_readers_ && to_readers_) {
        readers = to_readers_;
        return true;
    }
    // Earlier readers that are ordered before this one need not be kept: a writer ordered behind this one is ordered
    // behind them.
    AccessLog::Readers kept;
    bool merged = false;
    auto keep = [&](const AccessLog::Reader& r) {
        uint32_t mask = log[r.access].async == me.async ? r.mask & ~ordered_reads(log, by, r.access) : r.mask;
        if (r.access == by.access) mask = r.mask | 1u << by.lane, merged = true;
        if (mask) kept.push_back({r.access, mask});
    };
    if (readers & set_bit) {
        AccessLog::Readers copy = log.readers(readers & ~set_bit);
        for (const AccessLog::Reader& r : copy) keep(r);
    } else if (readers) {
        keep({readers >> 5, 1u << (readers & 31)});
    }
    if (!merged) kept.push_back({by.access, 1u << by.lane});
    from_readers_ = readers;
    readers = kept.size() == 1 && !(kept[0].mask & (kept[0].mask - 1)) ? name : set_bit | log.make_set(std::move(kept));
    to_readers_ = readers;
    return true;
}

template <bool is_write>
Conflict Shadow::walk(AccessLog& log, const Accessor& by, uint64_t offset, uint64_t bytes) {
    Conflict conflict;
    ordered_writer_ = 0;
    from_readers_ = is_write ? 0 : split;
    to_readers_ = 0;
    uint64_t end = offset + bytes;
    while (offset < end) {
        Page& p = page(offset / page_bytes);
        uint64_t stop = std::min(end, (offset / page_bytes + 1) * page_bytes);
        while (offset < stop) {
            Cell& cell = p.cells[offset % page_bytes / 4];
            uint64_t cell_end = std::min(stop, offset / 4 * 4 + 4);
            bool whole = cell_end - offset == 4;
            if (cell.writer != split && whole) {
                if (!visit<is_write>(log, by, cell.writer, cell.readers, conflict)) return conflict.offset = offset, conflict;
            } else {
                if (cell.writer != split) {
                    std::array<uint32_t, 8> s;
                    std::fill_n(s.begin(), 4, cell.writer);
                    std::fill_n(s.begin() + 4, 4, cell.readers);
                    log.splits.push_back(s);
                    cell = {split, static_cast<uint32_t>(log.splits.size() - 1)};
                }
                for (uint64_t b = offset; b < cell_end; b++) {
                    std::array<uint32_t, 8>& s = log.splits[cell.readers];
                    if (!visit<is_write>(log, by, s[b % 4], s[4 + b % 4], conflict)) return conflict.offset = b, conflict;
                }
                const std::array<uint32_t, 8>& s = log.splits[cell.readers];
                if (is_write && whole) cell = {s[0], s[4]};  // all bytes agree again
            }
            offset = cell_end;
        }
    }
    return conflict;
}

Conflict Shadow::read(AccessLog& log, const Accessor& by, uint64_t offset, uint64_t bytes) {
    return walk<false>(log, by, offset, bytes);
}
Conflict Shadow::write(AccessLog& log, const Accessor& by, uint64_t offset, uint64_t bytes) {
    return walk<true>(log, by, offset, bytes);
}

bool Poison::any(uint64_t offset, uint64_t bytes) const {
    if (!any_) return false;
    for (uint64_t end = offset + bytes; offset < end;) {
        uint64_t n = std::min(end - offset, 64 - offset % 64);
        uint64_t mask = (n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1) << (offset % 64);
        if (bits_[offset / 64] & mask) return true;
        offset += n;
    }
    return false;
}

void Poison::set(uint64_t offset, uint64_t bytes, bool value) {
    if (!value && !any_) return;
    any_ |= value;
    for (uint64_t end = offset + bytes; offset < end;) {
        uint64_t n = std::min(end - offset, 64 - offset % 64);
        uint64_t mask = (n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1) << (offset % 64);
        if (value) bits_[offset / 64] |= mask;
        else bits_[offset / 64] &= ~mask;
        offset += n;
    }
}

}  // namespace dsv3::emulator
