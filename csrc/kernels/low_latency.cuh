// All-to-all for decoding: few tokens, so what counts is latency. Each (token, expert) goes straight to the
// expert's rank, by a store over NVLink or a put over InfiniBand, and its result straight back.
//
// An op is two launches, of which only the second waits: between them a rank may compute. A rank's memory
// begins with the words of given_up.cuh, and holds, for each op and for the peers to write:
//   ack[r]         epoch that rank r has finished reading, of what this rank sent
//   flag[p][f]     epoch << 32 | first << 16 | count: the rows of parity p that it speaks of are there. Of
//                  dispatch, one a (local expert, source): so many tokens, whose results go home to places
//                  from `first` on. Of combine, one an expert: the epoch alone
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
// circle, and no block waits for a block of its own launch. Every wait has a deadline, past which it fails as
// given_up.cuh says.
//
// One kernel serves all launches: an image that links NVSHMEM takes seconds to make. Order of rows and sums
// depends on the routing alone, never on the timing.
#pragma once

#include "e4m3.cuh"
#include "given_up.cuh"
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
constexpr u32 kInFlight = 8;      // 16-byte loads that a lane issues before it waits

// How this rank reaches the memory of the others, which all have alike: an address in its own stands for the
// same place in theirs. python: dsv3_kernels.ep.low_latency_kernels.Connection
struct Peers {
    u8* own;                 // this rank's memory
    u8* const* mapped;       // [ranks]: that rank's memory, or null where only the network reaches it
    const i32* queue_pairs;  // [queue_pair_count], as nvshmemx_qp_create made them
    u32 rank, ranks, queue_pair_count;

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
        transport::put_warp(own + to, own + from, bytes, peer, queue_pair(stream));
#endif
    }

    // One lane: the word at `offset` there, behind this thread's stores or what went by the same stream.
    __device__ __forceinline__ void set(u64 offset, u64 value, u32 peer, u32 stream) const {
#ifndef DSV3_ONE_NODE
        if (far(peer)) {
            transport::signal(reinterpret_cast<u64*>(own + offset), value, peer, queue_pair(stream));
            return;
        }
#endif
        ptx::store_release_system(reinterpret_cast<u64*>(mapped[peer] + offset), value);
    }

    // One lane, which has acquired `value` at `offset` here.
    __device__ __forceinline__ void settle(u64 offset, u64 value, u32 peer) const {
#ifndef DSV3_ONE_NODE
        if (far(peer)) transport::settle(reinterpret_cast<u64*>(own + offset), value);
#endif
    }
};

// This rank's place in the sequence of calls. Sends and receives may be one apart. failures, faults: how
// often one was found; the first is recorded.
struct Progress {
    u64 sent, received, ended_senders, ended_receivers, failures, faults;
};

// What a wait in vain leaves behind. `missing` is to blame: `peer`, or whom that one missed, and so on.
// `recorded` is released at system scope, last. python: dsv3_kernels.ep.low_latency_kernels.Failure
struct Failure {
    u64 role, peer, expert, expected, seen, missing, recorded;
};

// An expert that is wrong, at `index` of topk_idx; there may be more. `recorded` as above.
struct Fault {
    u64 index, value, recorded;
};

// Where things lie in a rank's memory, in bytes. python: dsv3_kernels.ep.low_latency_kernels.Area
struct Area {
    u64 start, slot_bytes;
    u32 ranks, flags, slots;
    u32 parity;  // of the epoch

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

// This block among those of its rank.
struct Block {
    u32 index, count;
};

struct Sizes {
    u32 local_experts, max_tokens, topk, hidden, tokens;
};

// What all phases share.
struct Call : Sizes {
    Peers peers;
    Area area;
    Progress* progress;
    Failure* failure;
    u64 timeout;  // nanoseconds that a wait may last
    u64 epoch;
    Block block;

    __device__ __forceinline__ Call(const Peers& peers, const Area& area, Progress* progress,
                                    Failure* failure, u64 timeout, u64 epoch, Block block, Sizes sizes)
        : Sizes(sizes),
          peers(peers),
          area(area),
          progress(progress),
          failure(failure),
          timeout(timeout),
          epoch(epoch),
          block(block) {
        this->area.parity = epoch % 2;
    }

    // This warp among those of its rank.
    __device__ __forceinline__ u32 warp() const { return block.index * (blockDim.x / 32) + threadIdx.x / 32; }
    __device__ __forceinline__ u32 warps() const { return block.count * (blockDim.x / 32); }
    __device__ __forceinline__ u32 experts() const { return peers.ranks * local_experts; }
    __device__ __forceinline__ u32 places() const { return max_tokens * topk; }
    __device__ __forceinline__ u32 received_rows() const { return peers.ranks * max_tokens; }
    __device__ __forceinline__ u8* own(u64 offset) const { return peers.own + offset; }

    // One lane: until the word at `offset` of this rank's memory, which `peer` sets, is at least `expected`.
    // Gives what it saw, or less than that in vain.
    __device__ __forceinline__ u64 wait(u64 offset, u64 expected, Role role, u32 peer, u32 expert) const {
        const u64* word = reinterpret_cast<const u64*>(own(offset));
        u64 seen = ptx::load_acquire_system(word);
        if (seen < expected) {
            const u64 start = ptx::global_timer(), pause = GivenUp::pause(timeout);
            u64 waited = 0, look = pause;
            while (seen < expected && waited <= timeout) {
                if (waited > look) {
                    if (given_up().alarm()) break;
                    look = waited + pause;
                }
                seen = ptx::load_acquire_system(word);
                waited = ptx::global_timer() - start;
            }
            if (seen < expected) fail(role, peer, expert, expected, seen, waited > timeout, look == pause);
        }
        if (seen >= expected) peers.settle(offset, expected, peer);
        return seen;
    }

  private:
    __device__ __forceinline__ GivenUp given_up() const {
        return {reinterpret_cast<u64*>(peers.own), peers.rank, peers.ranks};
    }

    // As channel.cuh's.
    __device__ __forceinline__ void fail(Role role, u32 peer, u32 expert, u64 expected, u64 seen, bool late,
                                         bool came_after) const {
        const auto set = [&](u32 to, u64 word, u64 value) { peers.set(8 * word, value, to, 0); };
        const bool told = given_up().tell(peer, late, came_after, timeout, set);
        if (!told || ptx::fetch_add_device(&progress->failures, 1) != 0) return;
        failure->role = static_cast<u64>(role);
        failure->peer = peer;
        failure->expert = expert;
        failure->expected = expected;
        failure->seen = seen;
        failure->missing = given_up().to_blame();
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
    if (ptx::fetch_add_device(&call.progress->ended_senders, 1) + 1 != call.block.count) return;
    call.progress->ended_senders = 0;
    call.progress->sent = call.epoch;
}

__device__ __forceinline__ void end_receive(const Call& call) {
    bool last = false;
    if (threadIdx.x == 0)
        last = ptx::fetch_add_device(&call.progress->ended_receivers, 1) + 1 == call.block.count;
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

// What a rank of a launch does. Which of input, output and lists a phase takes is said at its function.
// python: dsv3_kernels.ep.low_latency_kernels.KernelLowLatency
struct LowLatencyStep {
    low_latency::Peers peers;
    low_latency::Area area;
    low_latency::Progress* progress;
    low_latency::Failure* failure;
    u64 timeout;
    low_latency::Routing routing;
    low_latency::Fault* fault;
    const float* topk_weights;
    const u8* input;
    low_latency::Received received;
    low_latency::Phase phase;
    low_latency::Format format;
    u32 local_experts, max_tokens, topk, hidden, tokens;
};

// One GPU runs a rank, or for tests several.
struct LowLatencySteps {
    LowLatencyStep of[8];
};

// Grid: num_sms blocks for each rank of the launch, any number, which need not be resident together; threads:
// a multiple of 32 * kWarpsOfGroup.
__global__ void __launch_bounds__(512, 1)
    low_latency_step(const __grid_constant__ LowLatencySteps steps, u32 num_sms) {
    using namespace low_latency;
    const LowLatencyStep& step = steps.of[blockIdx.x / num_sms];
    const bool sends = step.phase == Phase::kDispatchSend || step.phase == Phase::kCombineSend;
    const Call call(step.peers, step.area, step.progress, step.failure, step.timeout,
                    (sends ? step.progress->sent : step.progress->received) + 1,
                    {blockIdx.x % num_sms, num_sms},
                    {step.local_experts, step.max_tokens, step.topk, step.hidden, step.tokens});
    bool kept = true;
    switch (step.phase) {
        case Phase::kDispatchSend:
            kept = dispatch_send(call, step.routing, step.fault, step.input, step.format);
            break;
        case Phase::kDispatchReceive:
            kept = dispatch_receive(call, step.received, step.format);
            break;
        case Phase::kCombineSend:
            kept = combine_send(call, step.input, step.received.segments);
            break;
        case Phase::kCombineReceive:
            kept = combine_receive(call, step.routing.places, step.topk_weights, step.received.out);
    }
    if (__syncthreads_or(!kept)) return;
    if (sends)
        end_send(call);
    else
        end_receive(call);
}

}  // namespace dsv3
