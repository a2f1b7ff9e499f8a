// Combine across nodes without rings: what combine_internode.cuh does, with its bits, in two launches.
//
// combine_lean, on few SMs, moves. A channel is two warps, each with a few stages of shared memory, a piece
// of a row each. One sends: it adds the rows of each token of this rank and stores the sum over NVLink into
// the slot at the forwarder of the token's rank. The other forwards: it adds what the ranks of this node sent
// for another node's token, and puts the sum to the token's rank, whose static slot has the number that the
// message had on its way there (lean.cuh). Then it watches until all that is meant for its own tokens has
// come. Both load rows ahead, by the copy engine, and never wait for a reader of this epoch. Both take the
// other nodes in the same order, the next one first, this one last: so forwarders have work early, and no two
// nodes begin with the same. On the way to a node a sender takes its forwarders in turn.
//
// combine_lean_epilogue, on all SMs, launched dependently, finds all rows here: a token's nodes' rows and the
// bias, added. Its last block says that the slots are free. Where the first launch has failed it does
// nothing.
//
// Bytes: as combine_internode, but no credits: over InfiniBand a word for each kChunk messages, and one a
// node and call.
#pragma once

#include "combine_lean_walks.cuh"

namespace dsv3 {
namespace lean {

using combine::Sums;

// Shared memory of one warp: stages that hold pieces of rows, and one for a piece of their sum.
struct Stages {
    bulk::Ring rows;
    u8* sum;
};

// Loads pieces of a walk's rows, in the order in which they are added: token, piece, row.
template <class Walk>
struct Loader {
    Walk walk;
    u32 at = 0, rows_left = 0, under_way = 0;
    bool more, readable = false;

    __device__ __forceinline__ explicit Loader(const Walk& begin) : walk(begin) {
        more = walk.next();
        if (more) rows_left = walk.rows();
    }

    // As many as there are stages; with `miss`, it waits for rows where nothing is under way. False if they
    // do not come.
    __device__ __forceinline__ bool fill(bulk::Ring& stages, u32 row_bytes, Miss* miss) {
        while (more && under_way < stages.stages()) {
            const bool waits = miss && under_way == 0;
            if (!readable) readable = walk.may_read(waits ? miss : nullptr);
            if (!readable) return !waits;
            if (rows_left) {
                const u64 row =
                    __shfl_sync(kFullWarp, reinterpret_cast<u64>(walk.row()), __ffs(rows_left) - 1);
                stages.load(reinterpret_cast<const u8*>(row) + at, min(kPieceBytes, row_bytes - at));
                rows_left &= rows_left - 1;
                ++under_way;
                continue;
            }
            at += kPieceBytes;
            if (at >= row_bytes) {
                more = walk.next();
                at = 0;
                readable = false;
            }
            if (more) rows_left = walk.rows();
        }
        return true;
    }
};

// Part by part, for the registers.
__device__ __forceinline__ void add_stage(Sums& sums, const u8* stage, u32 left, float weight,
                                          bool weighted) {
#pragma unroll
    for (u32 i = 0; i < kAhead; ++i) {
        const u32 at = (i * 32 + threadIdx.x % 32) * 16;
        if (at >= left) continue;
        sums.add(i, ptx::load_shared(reinterpret_cast<const U32x4*>(stage + at)), weight, weighted);
    }
}

__device__ __forceinline__ void write_stage(u8* stage, const Piece& piece, u32 left) {
#pragma unroll
    for (u32 i = 0; i < kAhead; ++i) {
        const u32 at = (i * 32 + threadIdx.x % 32) * 16;
        if (at < left) ptx::store_shared(reinterpret_cast<U32x4*>(stage + at), piece.part[i]);
    }
}

// One warp: the sum of each token's rows to its target. What was stored is told one piece later, when it has
// long arrived. Whatever may wait or call stands where no sums are in registers.
template <class Walk>
__device__ __forceinline__ bool add_rows(const Walk& begin, Stages& stages, u32 row_bytes, Miss& miss) {
    Walk walk = begin;
    Loader<Walk> ahead(begin);
    while (walk.next()) {
        const u32 rows = walk.rows();
        for (u32 at = 0; at < row_bytes; at += kPieceBytes) {
            const u32 bytes = min(kPieceBytes, row_bytes - at);
            if (ahead.under_way == 0 && walk.owes()) {
                bulk::stores_done();
                walk.tell();
            }
            if (!ahead.fill(stages.rows, row_bytes, &miss)) return false;
            Sums sums;
            for (u32 left = rows; left; left &= left - 1) {
                const float weight = walk.weight(__ffs(left) - 1);
                add_stage(sums, stages.rows.wait(), bytes, weight, walk.weighted());
                --ahead.under_way;
                ahead.fill(stages.rows, row_bytes, nullptr);
            }
            const bool owes = walk.owes();
            if (owes)
                bulk::stores_done();
            else
                bulk::stores_read();
            write_stage(stages.sum, sums.rounded(), bytes);
            bulk::lanes_done();
            bulk::store(walk.target() + at, stages.sum, bytes);
            bulk::commit();
            if (owes) walk.tell();
        }
        walk.added();
    }
    if (walk.owes()) {
        bulk::stores_done();
        walk.tell();
    }
    return true;
}

// One warp: the tokens that this rank's experts have seen, to the forwarders.
__device__ __forceinline__ bool send(const Inbound& o, const Experts& from, Stages& stages, Miss& miss) {
    const u32 lane = threadIdx.x % 32;
    bool free = true;
    if (lane < o.self.gpus) {
        const u32 peer = o.where.near(lane);
        free = miss.wait(o, o.self.mine().ack(peer), o.epoch - 1, Role::kSend, peer);
    }
    if (!__all_sync(kFullWarp, free)) return false;
    __syncwarp();
    for (u32 i = 0; i < o.self.ranks; ++i) {
        const u32 tokens = from.ranges[2 * (i * o.layout.channels + o.channel) + 1];
        o.self.count_sent(o.where.near(i % o.self.gpus), o.channel,
                          tokens * (o.message_bytes + (o.gradients ? 4 : 0)));
    }
    return add_rows(Sending(o, from), stages, 2 * o.hidden, miss);
}

// One warp: what has come for other nodes, there.
__device__ __forceinline__ bool forward(const Inbound& o, Stages& stages, Miss& miss) {
    const u32 lane = threadIdx.x % 32;
    bool free = true;
    if (lane + 1 < o.place.link.nodes) {
        const u32 to = o.node_of_turn(lane);
        const u64* ack = o.place.link.slots.ack(o.place.number(to));
        free = miss.wait(o, ack, o.epoch - 1, Role::kSend, o.where.like(to));
    }
    if (!__all_sync(kFullWarp, free)) return false;
    __syncwarp();
    return add_rows(Forwarding(o), stages, 2 * o.hidden, miss);
}

// One warp: until what is meant for the tokens of this rank has come, from the ranks of this node and from
// its like on the others.
__device__ __forceinline__ bool watch(const Inbound& o, Miss& miss) {
    const u32 lane = threadIdx.x % 32, here = o.where.node(), gpus = o.self.gpus;
    bool came = true;
    if (lane < gpus) {
        const u32 total = o.layout.forward_counts[(here * o.layout.channels + o.channel) * gpus + lane];
        const u64* tail = o.self.mine().tail(here * gpus + lane, o.channel);
        if (total) came = miss.wait(o, tail, o.epoch << 32 | total, Role::kReceive, o.where.near(lane));
    }
    if (came && lane + 1 < o.place.link.nodes) {
        const u32 from = o.node_of_turn(lane), total = o.layout.sent(from, o.channel);
        const u64 expected = o.epoch << 32 | kFinished | total;
        u64* tail = o.place.link.slots.tail(o.place.number(from), o.channel);
        if (total) came = miss.wait(o, tail, expected, Role::kReceive, o.where.like(from));
        if (total && came) transport::settle(tail, expected);
    }
    return __all_sync(kFullWarp, came);
}

// One warp of a block: all its channels.
__device__ __forceinline__ bool serve(const CombineCall& call, u32 first, u32 step, Stages& stages) {
    const bool sends = threadIdx.x / 32 % 2 == 0;
    const u32 channels = call.layout.channels;
    bool kept = true;
    Miss miss;
    u32 channel = first;
    for (; kept && channel < channels; channel += step) {
        const Inbound o = call.channel(channel);
        kept = sends ? send(o, call.from, stages, miss) : forward(o, stages, miss);
    }
    if (kept && !sends)
        for (channel = first; kept && channel < channels; channel += step)
            kept = watch(call.channel(channel), miss);
    if (miss.happened) call.self.fail(miss.expected, miss.waited, miss.role, miss.peer, channel - step);
    return kept;
}

// All blocks of a rank; `block` is this one.
__device__ __forceinline__ void run(const CombineCall& call, u32 block, u32 blocks, u32 stages, u8* shared) {
    const u32 warp = threadIdx.x / 32, pairs = blockDim.x / 64;
    bool kept = true;
    if (call.laid_out()) {
        shared += warp * (stages * (kPieceBytes + bulk::Ring::kBarrierBytes) + kPieceBytes);
        Stages mine{bulk::Ring(shared + kPieceBytes, stages, kPieceBytes), shared};
        kept = serve(call, block + warp / 2 * blocks, blocks * pairs, mine);
    }
    // Of all blocks of both launches the last one ends the epoch.
    if (!__syncthreads_or(!kept) && threadIdx.x == 0)
        ptx::fetch_add_device(&call.self.sequence->finished_blocks, 1);
}

}  // namespace lean

// Grid: num_sms blocks for each rank of the launch, all resident; 64 threads a channel that a block has under
// way, 512 at most. Dynamic shared memory: for each warp stages * (kPieceBytes + kBarrierBytes) +
// kPieceBytes. hidden is a multiple of 8, topk at most 32.
__global__ void __launch_bounds__(512, 1)
    combine_lean(const __grid_constant__ PerRank<lean::CombineCall> calls, u32 num_sms, u32 stages) {
    extern __shared__ __align__(16) u8 shared[];
    lean::run(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms, stages, shared);
}

}  // namespace dsv3
