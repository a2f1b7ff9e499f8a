// The protocol between ranks. A channel is one stream of tokens from a source rank to a destination rank,
// written by one warp there and read by one warp here, through memory of the destination that every rank has
// mapped.
//
// A rank's workspace holds, for what comes to it from each source s (and its channel c):
//   ack[s]       epoch that rank s has finished reading, as a destination of this rank
//   tail[s][c]   epoch << 32 | tokens written so far; the epoch alone says that the counts stand
//   counts[s][c] tokens of each local expert, then the number of tokens, the first slot, and the ErrorCode of
//                what s found wrong in the channel, or 0
//   slots[s][i]  a token: row | scales | local expert and weight of each of the K choices
// An epoch is one call; the first is 1. Invariants:
//   1. A source writes to a destination in epoch n only after its ack >= n - 1: nobody there still reads.
//   2. Counts are written before tail = n << 32 is released; slot i before a tail of more than its index is.
//   3. A destination reads counts or a slot only after it has acquired such a tail. Tails only grow.
//   4. A rank's epoch advances when its last block ends. That block, which by the counter of ended blocks has
//      acquired the end of all others, and so of every read of this epoch, then acknowledges to all.
// There is a slot for every token that a source may have, so that no wait inside an epoch can depend on a
// reader: waits go from reader to writer, and from epoch n to epoch n - 1, and cannot form a circle. Every
// wait has a deadline. One that passes it records what it waited for and ends its block.
#pragma once

#include "ptx.cuh"

namespace dsv3 {

constexpr u32 kMaxChannels = 32;  // one lane of a warp each
constexpr u32 kFullWarp = 0xffffffffu;

enum class Role : u32 { kSend = 1, kReceive = 2, kForward = 3 };

// Where things lie in a workspace, in bytes. python: dsv3_kernels.ep.kernels.Workspace
struct Workspace {
    u8* base;
    u32 ranks, local_experts, max_tokens;
    u64 slot_bytes;

    __device__ __forceinline__ u64* ack(u32 peer) const { return reinterpret_cast<u64*>(base) + peer; }
    __device__ __forceinline__ u64* tail(u32 source, u32 channel) const {
        return reinterpret_cast<u64*>(base) + ranks + source * kMaxChannels + channel;
    }
    __device__ __forceinline__ u32* counts(u32 source, u32 channel) const {
        u32* first = reinterpret_cast<u32*>(reinterpret_cast<u64*>(base) + ranks * (1 + kMaxChannels));
        return first + (source * kMaxChannels + channel) * (local_experts + 3);
    }
    __device__ __forceinline__ u8* slot(u32 source, u32 index) const {
        const u64 control =
            8ull * ranks * (1 + kMaxChannels) + 4ull * ranks * kMaxChannels * (local_experts + 3);
        return base + ((control + 15) & ~15ull) +
               (static_cast<u64>(source) * max_tokens + index) * slot_bytes;
    }
};

// What a wait that ran out of time leaves behind; the first one wins. python: dsv3_kernels.ep.kernels.Failure
struct Failure {
    u64 claimed, role, peer, channel, expected, seen;
};

struct Deadline {
    Failure* failure;
    u64 nanoseconds;  // a wait may last

    // One lane: until the word at `address` is at least `expected`. Gives what it saw, or less than that in
    // vain.
    __device__ __forceinline__ u64 wait(const u64* address, u64 expected, Role role, u32 peer,
                                        u32 channel) const {
        u64 seen = ptx::load_acquire_system(address);
        if (seen >= expected) return seen;
        const u64 start = ptx::global_timer();
        while (seen < expected) {
            if (ptx::global_timer() - start > nanoseconds) {
                give_up(role, peer, channel, expected, seen);
                break;
            }
            seen = ptx::load_acquire_system(address);
        }
        return seen;
    }

    __device__ __forceinline__ void give_up(Role role, u32 peer, u32 channel, u64 expected, u64 seen) const {
        if (ptx::fetch_add_device(&failure->claimed, 1) != 0) return;
        failure->role = static_cast<u64>(role);
        failure->peer = peer;
        failure->channel = channel;
        failure->expected = expected;
        failure->seen = seen;
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
};

// A whole warp, after its writes.
__device__ __forceinline__ void publish(u64* tail, u64 value) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::store_release_system(tail, value);
}

// This rank's place in the sequence of calls; read at the start of a kernel, advanced by its last block.
struct Sequence {
    u64 finished_epochs, finished_blocks;
};

// One lane: this rank, a destination, has read all of this epoch.
__device__ __forceinline__ void acknowledge(u8* const* workspaces, Workspace mine, u32 rank, u64 epoch) {
    for (u32 peer = 0; peer < mine.ranks; ++peer) {
        Workspace theirs = mine;
        theirs.base = workspaces[peer];
        ptx::store_release_system(theirs.ack(rank), epoch);
    }
}

// By all threads of a block that has kept the protocol, after a barrier.
__device__ __forceinline__ void finish(Sequence* sequence, u8* const* workspaces, Workspace mine, u32 rank,
                                       u64 epoch) {
    if (threadIdx.x != 0) return;
    if (ptx::fetch_add_device(&sequence->finished_blocks, 1) + 1 != gridDim.x) return;
    sequence->finished_blocks = 0;
    sequence->finished_epochs = epoch;
    acknowledge(workspaces, mine, rank, epoch);
}

}  // namespace dsv3
