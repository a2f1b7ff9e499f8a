// The protocol between ranks. A channel is one stream of tokens from a source rank to a destination rank,
// written by one warp there and read by one warp here, through memory of the destination that every rank has
// mapped.
//
// A rank's mapping begins with the words of given_up.cuh. Behind them each op has an area, which holds, for
// what comes from each source s (and its channel c):
//   ack[s]       epoch that rank s has finished reading, as a destination of this rank
//   tail[s][c]   epoch << 32 | tokens written so far; the epoch alone says that the counts stand
//   counts[s][c] tokens of each local expert, then the Announcement, then the rows that go to each rank
//   slots[s][i]  a token: row | scales | local expert and weight of each of the K choices
// An epoch is one call of the op; the first is 1. Invariants:
//   1. A source writes to a destination in epoch n only after its ack >= n - 1: nobody there still reads.
//   2. Counts are written before tail = n << 32 is released; slot i before a tail of more than its index is.
//   3. A destination reads counts or a slot only after it has acquired such a tail. Tails only grow.
//   4. A rank's epoch advances when its last block ends. That block, which by the counter of ended blocks has
//      acquired the end of all others, and so of every read of this epoch, then acknowledges to all.
// There is a slot for every token that a source may have, so that no wait inside an epoch can depend on a
// reader: waits go from reader to writer, and from epoch n to epoch n - 1, and cannot form a circle.
//
// Every wait has a deadline. A rank that misses another past it ends its blocks, and so do all that wait
// then; given_up.cuh says how they come to name the one that did not come, not each other.
#pragma once

#include "given_up.cuh"
#include "ptx.cuh"
#include "transport.cuh"

namespace dsv3 {

constexpr u32 kMaxRanks = 8;      // of a node: a warp each
constexpr u32 kMaxChannels = 32;  // one lane of a warp each
constexpr u32 kFullWarp = 0xffffffffu;

enum class Role : u32 { kSend = 1, kReceive = 2, kForward = 3 };

// In a range of tokens: no dispatch has laid it out, for it was unsound or ended early. Who comes after it in
// the stream reads this before the host knows.
constexpr u32 kNothing = ~0u;

// What a source says to a destination about one channel before any token, with counts.
struct Announcement {
    u32 tokens, first;  // how many will come, and the slot of the first
    u32 form;           // bits of dispatch::Form
    u32 limit;          // rows that the source takes as a destination
    u32 bad;            // 1 + the index in its topk_idx of an expert that is wrong there, or 0
    u32 value[2];       // that expert
};

// Where things lie in a rank's mapping, in bytes. python: dsv3_kernels.ep.kernels.Workspace
struct Workspace {
    u8* base;
    u64 area;  // of this op
    u64 slot_bytes;
    u32 ranks, local_experts, max_tokens;

    __device__ __forceinline__ u64* ack(u32 peer) const { return reinterpret_cast<u64*>(base + area) + peer; }
    __device__ __forceinline__ u64* tail(u32 source, u32 channel) const {
        return ack(ranks) + source * kMaxChannels + channel;
    }
    __device__ __forceinline__ u32 counts_words() const {
        return local_experts + sizeof(Announcement) / 4 + ranks;
    }
    __device__ __forceinline__ u32* counts(u32 source, u32 channel) const {
        return reinterpret_cast<u32*>(tail(ranks, 0)) + (source * kMaxChannels + channel) * counts_words();
    }
    __device__ __forceinline__ Announcement* announcement(u32 source, u32 channel) const {
        return reinterpret_cast<Announcement*>(counts(source, channel) + local_experts);
    }
    __device__ __forceinline__ u32* rows(u32 source, u32 channel) const {
        return reinterpret_cast<u32*>(announcement(source, channel) + 1);
    }
    __device__ __forceinline__ u8* slot(u32 source, u32 index) const {
        const u64 control = 8ull * ranks * (1 + kMaxChannels) + 4ull * ranks * kMaxChannels * counts_words();
        return base + area + ((control + 15) & ~15ull) +
               (static_cast<u64>(source) * max_tokens + index) * slot_bytes;
    }
};

// This rank's place in the sequence of an op's calls; read at the start of a kernel, advanced by its last
// block. The last two are how often a failure and a fault were found: the first one is recorded.
struct Sequence {
    u64 finished_epochs, finished_blocks, failures, faults;
};

// What a wait in vain leaves behind. `missing` is to blame: `peer`, or whom that one missed, and so on.
// `recorded` is released at system scope, last. python: dsv3_kernels.ep.kernels.Failure
struct Failure {
    u64 role, peer, channel, expected, seen, missing, recorded;
};

// How often, and how long, a role of a channel has waited for a peer; and what it has sent there.
struct Counters {
    u64 waits, nanoseconds, bytes;
};

// How a wait has ended: what it saw last; in vain, whether its time was up, or it saw the alarm at its first
// look.
struct Waited {
    u64 seen;
    bool late, came_after;
};

// One rank among the others of its node, as a kernel gets it.
struct Rank {
    u8* const* mappings;  // [ranks], as this rank sees them
    Sequence* sequence;
    Failure* failure;
    Counters* counters;  // [2 roles, kMaxChannels, ranks]
    u64 area, slot_bytes;
    u64 timeout;  // nanoseconds that a wait may last
    u32 rank, ranks, local_experts, max_tokens;
    u32 gpus;                // ranks of a node
    const i32* queue_pairs;  // the first one carries what fail tells other nodes; null if there are none

    __device__ __forceinline__ u32 first_of_node() const { return rank / gpus * gpus; }
    // Whom this rank waits for, as a destination of `source`: the rank of this node that writes what comes
    // from there; where that is this rank itself, the source.
    __device__ __forceinline__ u32 writer(u32 source) const {
        const u32 near = first_of_node() + source % gpus;
        return near == rank ? source : near;
    }
    __device__ __forceinline__ Workspace workspace(u32 of) const {
        return {mappings[of], area, slot_bytes, ranks, local_experts, max_tokens};
    }
    __device__ __forceinline__ Workspace mine() const { return workspace(rank); }
    __device__ __forceinline__ u64 epoch() const { return sequence->finished_epochs + 1; }

    // One lane: until the word at `address` is at least `expected`. Gives what it saw, or less than that in
    // vain.
    __device__ __forceinline__ u64 wait(const u64* address, u64 expected, Role role, u32 peer,
                                        u32 channel) const {
        const Waited waited = wait_quietly(address, expected, role, peer, channel);
        if (waited.seen < expected) fail(expected, waited, role, peer, channel);
        return waited.seen;
    }

    // The same for who may fail only where it holds little in registers, and then does.
    __device__ __forceinline__ Waited wait_quietly(const u64* address, u64 expected, Role role, u32 peer,
                                                   u32 channel) const {
        u64 seen = ptx::load_acquire_system(address);
        if (seen >= expected) return {seen, false, false};
        const u64 start = ptx::global_timer(), pause = GivenUp::pause(timeout);
        u64 waited = 0, look = pause;
        while (seen < expected && waited <= timeout) {
            if (waited > look) {
                if (given_up().alarm()) break;
                look = waited + pause;
            }
            seen = ptx::load_acquire_system(address);
            waited = ptx::global_timer() - start;
        }
        ptx::fetch_add_device(&counters_of(role, peer, channel).waits, 1);
        ptx::fetch_add_device(&counters_of(role, peer, channel).nanoseconds, waited);
        return {seen, waited > timeout, look == pause};
    }
    __device__ __forceinline__ void fail(u64 expected, Waited waited, Role role, u32 peer,
                                         u32 channel) const {
        fail(expected, waited.seen, role, peer, channel, waited.late, waited.came_after);
    }

    // One lane.
    __device__ __forceinline__ void add_sent(u32 peer, u32 channel, u64 bytes) const {
        ptx::fetch_add_device(&counters_of(Role::kSend, peer, channel).bytes, bytes);
    }

    // A whole warp.
    __device__ __forceinline__ void count_sent(u32 peer, u32 channel, u64 bytes) const {
        if (threadIdx.x % 32 == 0) add_sent(peer, channel, bytes);
    }

    // A whole warp: what lane 0 acquired is visible to all lanes after it.
    __device__ __forceinline__ u64 wait_warp(const u64* address, u64 expected, Role role, u32 peer,
                                             u32 channel) const {
        u64 seen = 0;
        if (threadIdx.x % 32 == 0) seen = wait(address, expected, role, peer, channel);
        seen = __shfl_sync(kFullWarp, seen, 0);
        __syncwarp();
        return seen;
    }

    __device__ __forceinline__ GivenUp given_up() const {
        return {reinterpret_cast<u64*>(mappings[rank]), rank, ranks};
    }

    // One lane: its wait ran out of time (`late`), or it has seen the alarm, at the first look if
    // `came_after`.
    __device__ __forceinline__ void fail(u64 expected, u64 seen, Role role, u32 peer, u32 channel, bool late,
                                         bool came_after = false) const {
        const bool told = given_up().tell(peer, late, came_after, timeout, [&](u32 to, u64 word, u64 value) {
            if (to / gpus == rank / gpus) {
                ptx::store_release_system(reinterpret_cast<u64*>(mappings[to]) + word, value);
                return;
            }
#ifndef DSV3_ONE_NODE
            if (queue_pairs) transport::signal(given_up().words + word, value, to, queue_pairs[0]);
#endif
        });
        if (!told || ptx::fetch_add_device(&sequence->failures, 1) != 0) return;
        failure->role = static_cast<u64>(role);
        failure->peer = peer;
        failure->channel = channel;
        failure->expected = expected;
        failure->seen = seen;
        failure->missing = given_up().to_blame();
        ptx::store_release_system(&failure->recorded, 1);
    }

  private:
    __device__ __forceinline__ Counters& counters_of(Role role, u32 peer, u32 channel) const {
        return counters[((static_cast<u32>(role) - 1) * kMaxChannels + channel) * ranks + peer];
    }
};

// A kernel's argument: what each rank of the launch gets. `num_sms` blocks serve a rank.
template <class Call>
struct PerRank {
    Call of[kMaxRanks];
};

// A whole warp, after its writes.
__device__ __forceinline__ void publish(u64* tail, u64 value) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::store_release_system(tail, value);
}

// A contiguous share of a rank's tokens, which one channel carries.
struct Share {
    u32 first, last;

    __device__ __forceinline__ Share(u32 tokens, u32 channel, u32 channels) {
        const u32 share = (tokens + channels - 1) / channels;
        first = min(channel * share, tokens);
        last = min(first + share, tokens);
    }
};

// One lane: this rank, a destination, has read all of this epoch.
__device__ __forceinline__ void acknowledge(const Rank& self, u64 epoch) {
    for (u32 peer = 0; peer < self.ranks; ++peer)
        ptx::store_release_system(self.workspace(peer).ack(self.rank), epoch);
}

// Whether team `number` of a block sends its channel; that of the block's neighbour receives it. Every block
// has teams of either role, in all four quarters of its SM, for one loads where the other stores.
__device__ __forceinline__ bool sends(u32 block, u32 number, u32 ranks) {
    return (block + number / max(1u, 4 / ranks)) % 2 == 0;
}

// By all threads of a block that has kept the protocol, one of `blocks` of this rank, after a barrier. True
// for the thread that has ended the epoch.
__device__ __forceinline__ bool finish(const Rank& self, u64 epoch, u32 blocks) {
    if (threadIdx.x != 0) return false;
    if (ptx::fetch_add_device(&self.sequence->finished_blocks, 1) + 1 != blocks) return false;
    self.sequence->finished_blocks = 0;
    self.sequence->finished_epochs = epoch;
    acknowledge(self, epoch);
    return true;
}

}  // namespace dsv3
