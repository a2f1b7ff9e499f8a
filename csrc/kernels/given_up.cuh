// Who has given up waiting, for whom, and who is to blame: all ranks come to know it, on all nodes, in time.
//
// Every rank's memory begins with words for the others to write:
//   alarm         1 + (rank << 16 | peer): that rank's wait for `peer` ran out of time
//   missed[s][p]  1: rank s has waited for p in vain
//   missed[s][s]  s has given up; 2: it came after the alarm
// Protocol:
//   1. A wait that runs out of time raises the alarm. Whoever waits looks for it now and then, and then gives
//      up too: whom it waits for does not come, or will give up as well.
//   2. Who gives up tells every rank whom it missed, then that it has given up, then the alarm it knows, so
//      that one dead link keeps the alarm from nobody. It tells by what waits for nothing: stores within the
//      node, signals on a queue pair to others. Rings bound what may be under way on a queue pair, and these
//      are a few words more, so that not even a dead one is full.
//   3. Then it lets a while pass, in which all others who wait do the same, and so knows who waits for whom.
//      From those whom it missed itself, and those whom these missed, it comes to one who has not given up:
//      that rank died or stalled. If all have, who came after the alarm is the one. If none did, a link has
//      lost a message and they wait in a circle: two that miss each other, or else the two of the alarm,
//      stand for its ends, of which each rank names one, and an end the other one.
// So a rank ends within its timeout, kLook and kGrace, however many ranks wait for each other in a row.
#pragma once

#include "ptx.cuh"

namespace dsv3 {

constexpr u64 kGrace = 500000000;  // nanoseconds that a rank gives the others to say whom they miss, at most
constexpr u64 kLook = 10000000;    // nanoseconds between looks for the alarm, at most

// As one rank sees it. python: dsv3_kernels.ep.kernels.given_up_bytes
struct GivenUp {
    u64* words;  // where its memory begins
    u32 rank, ranks;

    __device__ __forceinline__ u64 alarm() const { return ptx::load_acquire_system(words); }
    __device__ __forceinline__ u64 missed(u32 by, u32 peer) const {
        return ptx::load_acquire_system(words + place(by, peer));
    }
    __device__ __forceinline__ u64 has_given_up(u32 other) const { return missed(other, other); }
    __device__ __forceinline__ static u64 pause(u64 timeout) { return min(timeout / 16, kLook); }

    // One lane, whose wait for `peer` ran out of time (`late`) or saw the alarm, if it `came_after` that at
    // its first look. set(to, i, value) writes words[i] of a rank. False if this rank has told before it
    // came.
    template <class Set>
    __device__ __forceinline__ bool tell(u32 peer, bool late, bool came_after, u64 timeout, Set set) const {
        came_after &= !late;
        if (came_after && has_given_up(rank)) return false;
        u64 first = alarm();
        if (late && !first) first = 1 + (static_cast<u64>(rank) << 16 | peer);
        // One call of set, for it may be large: whom this rank missed, that it has given up, the alarm.
#pragma unroll 1
        for (u32 i = 0; i < 3 * ranks; ++i) {
            const u32 to = (rank + i / 3) % ranks, word = i % 3;
            const u64 value = word == 0 ? 1 : word == 1 ? (came_after ? 2 : 1) : first;
            set(to, word == 2 ? 0 : place(rank, word == 0 ? peer : rank), value);
        }
        const u64 start = ptx::global_timer();
        while (ptx::global_timer() - start < min(timeout / 4, kGrace)) {
        }
        return true;
    }

    // One lane that has told.
    __device__ __forceinline__ u32 to_blame() const {
        // This rank's own row grows to all whom it needed, by way of others.
        for (bool more = true; more;) {
            more = false;
            for (u32 by = 0; by < ranks; ++by) {
                if (by == rank || !missed(rank, by) || !has_given_up(by)) continue;
                for (u32 peer = 0; peer < ranks; ++peer) {
                    if (!missed(by, peer) || missed(rank, peer)) continue;
                    ptx::store_release_system(words + place(rank, peer), 1);
                    more = true;
                }
            }
        }
        const u64 first = alarm() - 1;
        const u32 who = static_cast<u32>(first >> 16), whom = static_cast<u32>(first & 0xffff);
        u32 late_comer = ranks, end_of_link = ranks;
        for (u32 i = 0; i < ranks; ++i) {
            const u32 other = whom + i - (whom + i < ranks ? 0 : ranks);  // first the one of the alarm
            if (!missed(rank, other)) continue;
            const u64 word = has_given_up(other);
            if (!word) return other;
            if (word == 2 && late_comer == ranks) late_comer = other;
            for (u32 peer = 0; peer < ranks && end_of_link == ranks; ++peer)
                if (peer != other && missed(other, peer) && missed(peer, other))
                    end_of_link = other == rank ? peer : other;
        }
        if (late_comer != ranks) return late_comer;
        if (end_of_link != ranks) return end_of_link;
        return whom == rank ? who : whom;
    }

  private:
    __device__ __forceinline__ u64 place(u32 by, u32 peer) const { return 1 + by * ranks + peer; }
};

}  // namespace dsv3
