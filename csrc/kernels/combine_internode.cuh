// Combine across nodes: what the experts of a token returned, added up on each rank, then on each node, then
// at the token's own rank.
//
// The streams are those of the dispatch, backwards, in its layout. The even block of a channel adds the rows
// of each token and sends one BF16 row over NVLink to the forwarder of the token's rank, a warp for each such
// rank; a forwarder keeps what comes from GPU g for node m as source m * gpus + g of its workspace. The odd
// block has two roles. Forwarding: whole chunks, to add what the ranks of this node sent and put one row a
// token into the ring to the token's node. Receiving: tokens in order, to add the nodes' rows; what this
// node's ranks sent is added here and goes through no ring. All sums start at +0 and run in FP32, experts
// ascending, ranks ascending, nodes ascending, each rounded to BF16: bits do not depend on the timing.
//
// Bytes: a (token, expert): a row read; a (token, rank): a row written over NVLink and read; a (token, other
// node): a row written to the staging slot and over InfiniBand, and read; a token: a row written.
#pragma once

#include "combine_internode_node.cuh"

namespace dsv3 {
namespace combine {

// Warp `warp` of `warps`: lane l has the ring to one other node, and of its chunks every `step`th. Warps
// share a ring where they are more than the rings, rings a warp where they are fewer.
__device__ __forceinline__ bool forward_chunks(const Inbound& o, u32 warp, u32 warps) {
    const u32 lane = threadIdx.x % 32, others = o.link.nodes - 1, chunk = o.link.rings.chunk;
    const u32 ring_of_lane = warp % others + lane * warps;
    const bool exists = ring_of_lane < others;
    const u32 node = exists ? o.place.other(ring_of_lane) : 0;
    const u32 step = warps > others ? (warps - ring_of_lane - 1) / others + 1 : 1;
    const u32 total = exists ? o.layout.came(node, o.channel) : 0;
    const u64 base = exists ? *o.link.sent_chunks(node, o.channel) : 0;
    const Ring ring = o.link.rings.at(node, o.channel);
    u32 next = warp / others;  // chunk
    Patience patience;
    while (__any_sync(kFullWarp, next * chunk < total)) {
        const bool open = next * chunk < total;
        const u64 before = ring.turn(base + next) - 1;
        const u64 seen = open ? ptx::load_acquire_system(ring.free(base + next)) : 0;
        bool kept;
        u32 left = patience.look(o.self, open && seen >= before, open, before, seen, o.place.like(node),
                                 o.channel, kept);
        if (!kept) return false;
        for (; left; left &= left - 1) {
            const u32 who = __ffs(left) - 1, n = __shfl_sync(kFullWarp, node, who);
            const u64 position = __shfl_sync(kFullWarp, base + next, who);
            const u32 begin = __shfl_sync(kFullWarp, next, who) * chunk;
            const u32 end = min(begin + chunk, __shfl_sync(kFullWarp, total, who));
            u8* message = o.link.rings.at(n, o.channel).staged(position);
            for (u32 i = begin; i < end; ++i, message += o.message_bytes) {
                i32 slot;
                if (!gather(o, n, o.layout.first(n, o.channel) + i, slot)) return false;
                for (u32 at = 0; at < 2 * o.hidden; at += kPieceBytes)
                    sum_of_node(o, n, slot, at).store(message + at, 2 * o.hidden - at);
                if (o.gradients) join_gradients(o, n, slot, o.behind(message));
            }
            o.place.send_chunk(n, o.channel, position, (end - begin) * o.message_bytes);
            o.self.count_sent(o.place.like(n), o.channel, (end - begin) * o.message_bytes);
            if (lane == who) next += step;
        }
    }
    return true;
}

// Warp `warp` of `warps`: every `warps`th token of a channel. `readers`, shared memory: how many messages of
// each slot of each node's ring have been read.
__device__ __forceinline__ bool receive(const Inbound& o, const HomeTokens& to, u32 warp, u32 warps,
                                        u32* readers) {
    const u32 lane = threadIdx.x % 32, chunk = o.link.rings.chunk;
    const Share share(to.tokens, o.channel, o.layout.channels);
    const bool ring_of_lane = lane < o.link.nodes && lane != o.place.node();
    const u64 base = ring_of_lane ? *o.link.received_chunks(lane, o.channel) : 0;
    for (u32 token = share.first + warp; token < share.last; token += warps) {
        i32 index = -1;  // lane n: the message from node n
        if (lane < o.link.nodes) index = o.layout.sent_index[static_cast<u64>(token) * o.link.nodes + lane];
        const u32 nodes = __ballot_sync(kFullWarp, index >= 0);
        const u8* message = nullptr;
        bool arrived = true;
        const bool rings = ring_of_lane && index >= 0;
        const u32 number = index - share.first;
        const u64 position = base + number / chunk;
        if (rings) {
            const Ring ring = o.link.rings.at(lane, o.channel);
            message = ring.arrived(position) + number % chunk * o.message_bytes;
            arrived = o.self.wait(ring.ready(position), ring.turn(position), Role::kReceive,
                                  o.place.like(lane), o.channel) >= ring.turn(position);
        }
        if (!__all_sync(kFullWarp, arrived)) return false;
        __syncwarp();
        i32 slot = -1;
        if (nodes >> o.place.node() & 1)
            if (!gather(o, o.place.node(), __shfl_sync(kFullWarp, index, o.place.node()), slot)) return false;
        bring_token(o, to, token, nodes, message, slot);
        __syncwarp();
        if (!rings) continue;
        u32* read = readers + lane * o.link.rings.depth + position % o.link.rings.depth;
        const u32 messages = min(chunk, o.layout.sent(lane, o.channel) - number / chunk * chunk);
        if (ptx::fetch_add_block(read, 1) + 1 != messages) continue;
        *read = 0;
        o.place.free_chunk(lane, o.channel, position);
    }
    return true;
}

// The odd block.
__device__ __forceinline__ bool bring_home(const Inbound& o, const HomeTokens& to, u32* readers) {
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32, here = o.place.node();
    const Share share(to.tokens, o.channel, o.layout.channels);
    u32 forwarded = 0, received = share.last - share.first;  // rows read and written
    for (u32 node = 0; node < o.link.nodes; ++node) {
        if (node != here) {
            received += o.layout.sent(node, o.channel);
            forwarded += o.layout.came(node, o.channel);
        }
        for (u32 gpu = 0; gpu < o.self.gpus; ++gpu)
            (node == here ? received : forwarded) +=
                o.layout.forward_counts[(node * o.layout.channels + o.channel) * o.self.gpus + gpu];
    }
    const u32 forwarders = split_warps(warps, {forwarded, o.link.nodes - 1, true}, {received, 1, true}, 1);
    for (u32 i = threadIdx.x; i < o.link.nodes * o.link.rings.depth; i += blockDim.x) readers[i] = 0;
    __syncthreads();
    const bool kept = warp < forwarders ? forward_chunks(o, warp, forwarders)
                                        : receive(o, to, warp - forwarders, warps - forwarders, readers);
    if (__syncthreads_or(!kept)) return false;
    for (u32 node = threadIdx.x; node < o.link.nodes; node += blockDim.x) {
        if (node == here) continue;
        *o.link.sent_chunks(node, o.channel) += o.link.chunks(o.layout.came(node, o.channel));
        *o.link.received_chunks(node, o.channel) += o.link.chunks(o.layout.sent(node, o.channel));
    }
    return true;
}

struct InternodeCall {
    Rank self;
    Link link;
    Experts from;
    HomeTokens to;
    Layout layout;
    u32 hidden, topk;
    u64 message_bytes;
};

// All blocks of a rank; `block` is this one.
__device__ __forceinline__ void run(const InternodeCall& all, u32 block, u32 blocks, u32* shared) {
    const Rank& self = all.self;
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const u64 epoch = self.epoch();
    const bool laid_out = all.from.ranges[1] != kNothing;
    bool kept = true;
    for (u32 channel = block / 2; laid_out && kept && channel < all.layout.channels; channel += blocks / 2) {
        const Inbound o{{self,
                         {self},
                         all.layout,
                         all.hidden,
                         all.topk,
                         channel,
                         epoch,
                         all.message_bytes,
                         all.to.gradients != nullptr},
                        {self, all.link},
                        all.link};
        if (block % 2 == 0)
            for (u32 home = warp; kept && home < self.ranks; home += warps) kept = send(o, all.from, home);
        else
            kept = bring_home(o, all.to, shared);
        kept = !__syncthreads_or(!kept);
    }
    if (!__syncthreads_or(!kept)) Place{self, all.link}.finish(epoch, blocks);
}

}  // namespace combine

// Grid: num_sms blocks for each rank of the launch, num_sms even, all resident; they take the channels of the
// dispatch in turn. 64 to 384 threads. Dynamic shared memory, in words: nodes * depth. hidden is a multiple
// of 8, topk at most 32.
__global__ void __launch_bounds__(384, 1)
    combine_internode(const __grid_constant__ PerRank<combine::InternodeCall> calls, u32 num_sms) {
    extern __shared__ u32 shared[];
    combine::run(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms, shared);
}

}  // namespace dsv3
