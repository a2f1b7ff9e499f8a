// What an access of a warp costs: banks of shared memory, sectors of global memory, bytes by where they go.

#include <algorithm>

#include "network.hpp"

namespace dsv3::emulator {
namespace {

struct Passes { uint64_t least = 0, conflicts = 0; };

/// Passes through the 32 banks of 4 bytes: lanes at one word share one, and wide accesses go in groups of 128 bytes.
Passes passes(const Target* t, uint32_t mask, uint32_t bytes) {
    Passes n;
    uint32_t group = bytes <= 4 ? 32 : 128 / bytes;
    for (uint32_t from = 0; from < 32; from += group) {
        uint32_t used[32] = {}, words[32][32], most = 0;
        for (uint32_t l = from; l < from + group; l++) {
            if (!(mask >> l & 1)) continue;
            uint32_t word = static_cast<uint32_t>(t[l].offset / 4), bank = word % 32;
            if (std::find(words[bank], words[bank] + used[bank], word) != words[bank] + used[bank]) continue;
            words[bank][used[bank]++] = word;
            most = std::max(most, used[bank]);
        }
        if (most) n.least++, n.conflicts += most - 1;
    }
    return n;
}

constexpr size_t most_sectors = 64;  // of 32 lanes by 32 bytes

/// The distinct sectors that the lanes touch; returns how many.
size_t sectors(const Target* t, uint32_t mask, uint32_t bytes, uint64_t* seen) {
    size_t n = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const Target& x = t[__builtin_ctz(rest)];
        for (uint64_t s = x.watch() / timing::sector_bytes; s <= (x.watch() + bytes - 1) / timing::sector_bytes; s++)
            if ((n == 0 || seen[n - 1] != s) && n < most_sectors && std::find(seen, seen + n, s) == seen + n) seen[n++] = s;
    }
    return n;
}

}  // namespace

Context::Arrival Context::access(const Target* t, uint32_t bytes, bool reads, bool writes, bool cached) const {
    const Target& first = t[__builtin_ctz(mask)];
    uint64_t now = w.cycle;
    if (!first.cta && !first.region) return {now, now};
    uint64_t total = static_cast<uint64_t>(__builtin_popcount(mask)) * bytes;
    Counts& n = m.counts;
    if (first.cta) {
        if (reads) n.shared_read += total;
        if (writes) n.shared_write += total;
        bool remote = first.cta != w.cta;
        if (remote) n.distributed_shared += total;
        Passes p = passes(t, mask, bytes);
        n.bank_conflicts += p.conflicts;
        uint64_t way = remote ? timing::cluster_latency : 0;
        uint64_t there = m.sm_of(*first.cta).shared_memory.reserve(now + way, p.least + p.conflicts).end;
        return {there, there + way + timing::shared_latency};
    }
    if (reads) n.global_read += total;
    if (writes) n.global_write += total;
    int device = w.cta->launch->device, owner = first.region->rank;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {  // lanes may go to several ranks
        const Region* region = t[__builtin_ctz(rest)].region;
        if (!region || region->rank == device) continue;
        if (reads) m.network->count_direct(region->rank, device, bytes);
        if (writes) m.network->count_direct(device, region->rank, bytes);
    }
    uint64_t touched[most_sectors], moved = sectors(t, mask, bytes, touched), found = now + timing::l1_latency;
    n.sectors += moved;
    std::vector<Device::Sm::Cached>& l1 = m.sm_of(*w.cta).l1;
    if (cached) {
        l1.resize(timing::l1_sectors);
        uint64_t* missing = std::partition(touched, touched + moved, [&](uint64_t s) { return l1[s % l1.size()].sector != s; });
        for (uint64_t* s = missing; s != touched + moved; s++) found = std::max(found, l1[*s % l1.size()].at);
        moved = static_cast<uint64_t>(missing - touched);
        if (moved == 0) return {now, found};
    }
    Arrival arrival = m.reach_memory(*w.cta, owner, now, moved * timing::sector_bytes, writes);
    if (writes) w.stored_at = std::max(w.stored_at, arrival.there);
    if (!cached) return arrival;
    for (uint64_t* s = touched; s != touched + moved; s++) l1[*s % l1.size()] = {*s, arrival.back};
    return {arrival.there, std::max(found, arrival.back)};
}

}  // namespace dsv3::emulator
