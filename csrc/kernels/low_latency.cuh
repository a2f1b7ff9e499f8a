// All-to-all for decoding: few tokens, so what counts is latency. Each (token, expert) goes straight to the
// expert's rank, by a store over NVLink or a put over InfiniBand, and its result straight back.
//
// An op is two launches, of which only the second waits: between them a rank may compute. A rank's memory
// holds, for each op and for the peers to write:
//   ack[r]         epoch that rank r has finished reading, of what this rank sent
//   flag[p][f]     epoch << 32 | first << 16 | count: what the slots of parity p hold stands. Dispatch has
//   one
//                  a (local expert, source): so many tokens, whose results go home to places from `first` on.
//                  Combine has one an expert, of which the upper half counts
//   slots[p][i]    rows: of dispatch, token `i` of a (local expert, source), with its scales; of combine, the
//                  result for place i of this rank's (token, expert) pairs, sorted by expert, then token
//   staged[p][i]   rows on their way to far ranks, which only read memory that is symmetric
// An epoch is one call, the first is 1, and p is its parity. Invariants:
//   1. Epoch n is sent to a peer only once its ack >= n - 2: nobody there reads slots of that parity, and
//      nothing here is staged for it. So two epochs may be under way at a time.
//   2. A flag is set behind its rows: stores by a release that has acquired the ends of all blocks that wrote
//      rows of it, puts on one queue pair.
//   3. Slots are read after their flag was acquired, and every flag of rows that came is waited for.
//   4. The last block of a receive has acquired, by the counter of ended blocks, the end of all others; it
//      advances the epoch and acknowledges to all.
// Waits go from receive to send of one epoch, and from send to receive two epochs before: they form no
// circle, and no block waits for a block of its own launch. Every wait has a deadline.
//
// One kernel serves all launches: an image that links NVSHMEM takes seconds to make. Order of rows and sums
// depends on the routing alone, never on the timing.
#pragma once

#include "e4m3.cuh"
#include "error.cuh"
#include "ptx.cuh"
#include "transport.cuh"

namespace dsv3 {
namespace low_latency {

enum class Phase : u32 { kDispatchSend, kDispatchReceive, kCombineSend, kCombineReceive };
enum class Role : u32 { kSend = 1, kReceive = 2 };
enum class Format : u32 { kBf16, kFp8, kFp8PowerOf2 };  // of a row on the wire

constexpr u32 kFullWarp = 0xffffffffu;
constexpr u32 kWarpsOfGroup = 4;  // share the rows of an (expert, rank)
constexpr u32 kColumns = 8;       // of BF16 in one access of 16 bytes
constexpr u32 kInFlight = 4;      // 16-byte loads that a lane issues before it waits

// How this rank reaches the memory of the others, which all have alike: an address in its own stands for the
// same place in theirs. python: dsv3_kernels.ep.low_latency_kernels.Connection
struct Peers {
    u8* const* mapped;       // [ranks]: that rank's memory, or null where only the network reaches it
    const i32* queue_pairs;  // [queue_pair_count], as nvshmemx_qp_create made them
    u32 rank, ranks, queue_pair_count;

    __device__ __forceinline__ u8* own() const { return mapped[rank]; }

    __device__ __forceinline__ bool far(u32 peer) const {
#ifdef DSV3_ONE_NODE
        return false;
#else
        return mapped[peer] == nullptr;
#endif
    }

    // The queue pair of stream `i`, whatever i.
    __device__ __forceinline__ i32 queue_pair(u32 stream) const {
        return queue_pair_count ? queue_pairs[stream % queue_pair_count] : 0;
    }

    // A warp, to a far rank: what lies at `from` here to `to` there.
    __device__ __forceinline__ void put(u64 to, u64 from, u64 bytes, u32 peer, u32 stream) const {
#ifndef DSV3_ONE_NODE
        transport::put_warp(own() + to, own() + from, bytes, peer, queue_pair(stream));
#endif
    }

    // One lane: the word at `offset` there, behind this thread's stores or what went by the same stream.
    __device__ __forceinline__ void set(u64 offset, u64 value, u32 peer, u32 stream) const {
#ifndef DSV3_ONE_NODE
        if (far(peer)) {
            transport::signal(reinterpret_cast<u64*>(own() + offset), value, peer, queue_pair(stream));
            return;
        }
#endif
        ptx::store_release_system(reinterpret_cast<u64*>(mapped[peer] + offset), value);
    }

    // One lane, which has acquired `value` at `offset` here.
    __device__ __forceinline__ void settle(u64 offset, u64 value, u32 peer) const {
#ifndef DSV3_ONE_NODE
        if (far(peer)) transport::settle(reinterpret_cast<u64*>(own() + offset), value);
#endif
    }
};

// This rank's place in the sequence of calls. Sends and receives may be one apart. failures: waits in vain.
struct Progress {
    u64 sent, received, ended_senders, ended_receivers, failures;
};

// What the first wait that ran out of time leaves behind; `recorded` is released at system scope, last.
// python: dsv3_kernels.ep.low_latency_kernels.Failure
struct Failure {
    u64 role, peer, expert, expected, seen, recorded;
};

// Where things lie in a rank's memory, in bytes. python: dsv3_kernels.ep.low_latency_kernels.Area
struct Area {
    u64 start;
    u32 ranks, flags, slots, parity;
    u64 slot_bytes;

    __device__ __forceinline__ u64 ack(u32 peer) const { return start + 8ull * peer; }
    __device__ __forceinline__ u64 flag(u32 i) const { return start + 8ull * (ranks + parity * flags + i); }
    __device__ __forceinline__ u64 rows() const {
        return start + ((8ull * (ranks + 2 * flags) + 15) & ~15ull);
    }
    __device__ __forceinline__ u64 slot(u64 i) const {
        return rows() + (parity * static_cast<u64>(slots) + i) * slot_bytes;
    }
    __device__ __forceinline__ u64 staged(u64 i, u64 count) const {
        return rows() + (2ull * slots + parity * count + i) * slot_bytes;
    }
};

// What all phases share.
struct Call {
    Peers peers;
    Area area;
    Progress* progress;
    Failure* failure;
    u64 timeout;  // nanoseconds that a wait may last
    u64 epoch;
    u32 local_experts, max_tokens, topk, hidden, tokens;

    __device__ __forceinline__ u32 experts() const { return peers.ranks * local_experts; }
    __device__ __forceinline__ u32 places() const { return max_tokens * topk; }
    __device__ __forceinline__ u32 received_rows() const { return peers.ranks * max_tokens; }
    __device__ __forceinline__ u8* own(u64 offset) const { return peers.own() + offset; }

    // One lane: until the word at `offset` of this rank's memory, which `peer` sets, is at least `expected`.
    // Gives what it saw, or less than that in vain.
    __device__ __forceinline__ u64 wait(u64 offset, u64 expected, Role role, u32 peer, u32 expert) const {
        const u64* word = reinterpret_cast<const u64*>(own(offset));
        u64 seen = ptx::load_acquire_system(word);
        if (seen < expected) {
            const u64 start = ptx::global_timer();
            do {
                seen = ptx::load_acquire_system(word);
            } while (seen < expected && ptx::global_timer() - start <= timeout);
        }
        if (seen < expected)
            fail(role, peer, expert, expected, seen);
        else
            peers.settle(offset, expected, peer);
        return seen;
    }

  private:
    __device__ __forceinline__ void fail(Role role, u32 peer, u32 expert, u64 expected, u64 seen) const {
        if (ptx::fetch_add_device(&progress->failures, 1) != 0) return;
        failure->role = static_cast<u64>(role);
        failure->peer = peer;
        failure->expert = expert;
        failure->expected = expected;
        failure->seen = seen;
        ptx::store_release_system(&failure->recorded, 1);
    }
};

// A warp: until every peer has read what this rank sent two epochs ago.
__device__ __forceinline__ bool wait_for_readers(const Call& call, u32 lane) {
    bool kept = true;
    if (call.epoch > 2) {
        for (u32 peer = lane; peer < call.peers.ranks; peer += 32)
            kept &= call.wait(call.area.ack(peer), call.epoch - 2, Role::kSend, peer, 0) >= call.epoch - 2;
    }
    return kept;
}

// By all threads of a block that has kept the protocol, after a barrier.
__device__ __forceinline__ void end_send(const Call& call) {
    if (threadIdx.x != 0) return;
    if (ptx::fetch_add_device(&call.progress->ended_senders, 1) + 1 != gridDim.x) return;
    call.progress->ended_senders = 0;
    call.progress->sent = call.epoch;
}

__device__ __forceinline__ void end_receive(const Call& call) {
    bool last = false;
    if (threadIdx.x == 0) last = ptx::fetch_add_device(&call.progress->ended_receivers, 1) + 1 == gridDim.x;
    if (!__syncthreads_or(last)) return;
    for (u32 peer = threadIdx.x; peer < call.peers.ranks; peer += blockDim.x)
        call.peers.set(call.area.ack(call.peers.rank), call.epoch, peer, peer);
    if (threadIdx.x == 0) {
        call.progress->ended_receivers = 0;
        call.progress->received = call.epoch;
    }
}

// A warp: `bytes`, a multiple of 16.
__device__ __forceinline__ void copy(u8* to, const u8* from, u32 bytes, u32 lane) {
    for (u32 first = lane * 16; first < bytes; first += kInFlight * 32 * 16) {
        U32x4 held[kInFlight];
#pragma unroll
        for (u32 i = 0; i < kInFlight; ++i)
            if (first + i * 512 < bytes) held[i] = ptx::load_global(from + first + i * 512);
#pragma unroll
        for (u32 i = 0; i < kInFlight; ++i)
            if (first + i * 512 < bytes) ptx::store_global(to + first + i * 512, held[i]);
    }
}

}  // namespace low_latency
}  // namespace dsv3

#include "low_latency_combine.cuh"
#include "low_latency_dispatch.cuh"

namespace dsv3 {

// Grid: any number of blocks, which need not be resident together; threads: a multiple of 32 * kWarpsOfGroup.
// What a phase takes of input, output and the lists is said at its function.
__global__ void __launch_bounds__(512, 1)
    low_latency_step(u8* const* mapped, const i32* queue_pairs, low_latency::Progress* progress,
                     low_latency::Failure* failure, u32* error, u64* sent_rows, const u8* input,
                     const i64* topk_idx, const float* topk_weights, u8* out, float* out_scales,
                     i64 scale_group_stride, i64 scale_tile_stride, i32* counts, i32* segments, i32* places,
                     u32 phase, u32 format, u32 rank, u32 ranks, u32 queue_pair_count, u32 local_experts,
                     u32 max_tokens, u32 topk, u32 hidden, u32 tokens, u32 flags, u32 slots, u64 area_start,
                     u64 slot_bytes, u64 timeout) {
    using namespace low_latency;
    const Phase step = static_cast<Phase>(phase);
    const bool sends = step == Phase::kDispatchSend || step == Phase::kCombineSend;
    Call call{{mapped, queue_pairs, rank, ranks, queue_pair_count},
              {area_start, ranks, flags, slots, 0, slot_bytes},
              progress,
              failure,
              timeout,
              (sends ? progress->sent : progress->received) + 1,
              local_experts,
              max_tokens,
              topk,
              hidden,
              tokens};
    call.area.parity = call.epoch % 2;

    bool kept = true;
    switch (step) {
        case Phase::kDispatchSend:
            kept = dispatch_send(call, Routing{topk_idx, places, sent_rows}, error, input,
                                 static_cast<Format>(format));
            break;
        case Phase::kDispatchReceive:
            kept = dispatch_receive(
                call, Received{out, out_scales, scale_group_stride, scale_tile_stride, counts, segments},
                static_cast<Format>(format));
            break;
        case Phase::kCombineSend:
            kept = combine_send(call, input, segments);
            break;
        case Phase::kCombineReceive:
            kept = combine_receive(call, places, topk_weights, out);
    }
    if (__syncthreads_or(!kept)) return;
    if (sends)
        end_send(call);
    else
        end_receive(call);
}

}  // namespace dsv3
