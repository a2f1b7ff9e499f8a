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

#include "combine.cuh"
#include "internode.cuh"

namespace dsv3 {
namespace combine {

// One channel of one call.
struct Inbound {
    const Rank& self;
    Place place;
    const Link& link;
    const Layout& layout;
    u32 hidden, topk, channel;
    u64 epoch, message_bytes;
    bool gradients;  // travel behind a row: its token's experts' numbers; over NVLink, how many they are, too

    __device__ __forceinline__ float* behind(u8* row) const {
        return reinterpret_cast<float*>(row + 2 * hidden);
    }
    __device__ __forceinline__ const float* behind(const u8* row) const {
        return reinterpret_cast<const float*>(row + 2 * hidden);
    }
};

// What the experts of this rank returned, in the rows of the dispatch.
struct Experts {
    const u8* y;             // BF16 [rows, hidden]
    const float* weights;    // [rows], or null
    const float* gradients;  // [rows], in token order [rows, topk], or null: travel home as they are
    const i64* topk_idx;     // local experts in the same form
    const i32* rows;         // [ranks, max_tokens, topk], by ascending expert, then -1
    const i32* ranges;       // [ranks, channels, 2]
    u32 token_order;
};

// One warp: a token's numbers, by ascending expert, and how many they are. row: lane k's, as in
// Experts::rows.
__device__ __forceinline__ void put_gradients(const Inbound& o, const Experts& from, i32 row, float* target) {
    const u32 lane = threadIdx.x % 32;
    i64 at = row;
    u32 place = lane;
    if (from.token_order) {
        at = static_cast<i64>(__shfl_sync(kFullWarp, row, 0)) * o.topk + lane;
        const i64 expert = lane < o.topk ? from.topk_idx[at] : -1;
        place = 0;
        for (u32 k = 0; k < o.topk; ++k) {
            const i64 other = __shfl_sync(kFullWarp, expert, k);
            place += other >= 0 && other < expert;
        }
        if (expert < 0) at = -1;
    }
    if (at >= 0) target[place] = from.gradients[at];
    const u32 count = __popc(__ballot_sync(kFullWarp, at >= 0));
    if (lane == 0) target[o.topk] = __int_as_float(count);
}

// One warp: the tokens of one rank's channel, to that rank's forwarder.
__device__ __forceinline__ bool send(const Inbound& o, const Experts& from, u32 home) {
    const u32 lane = threadIdx.x % 32, stream = home * o.layout.channels + o.channel;
    const u32 row_bytes = 2 * o.hidden, first = from.ranges[2 * stream], total = from.ranges[2 * stream + 1];
    const u32 to = home % o.self.gpus, source = home - to + o.place.gpu(), peer = o.place.near(to);
    const Workspace theirs = o.place.peer(to);
    if (o.self.wait_warp(o.self.mine().ack(peer), o.epoch - 1, Role::kSend, peer, o.channel) < o.epoch - 1)
        return false;
    o.self.count_sent(peer, o.channel, total * (o.message_bytes + (o.gradients ? 4 : 0)));
    for (u32 i = 0; i < total; ++i) {
        i32 row = -1;
        if (lane < o.topk)
            row = from.rows[(static_cast<u64>(home) * o.layout.max_tokens + first + i) * o.topk + lane];
        const float weight = from.weights && row >= 0 ? from.weights[row] : 1.0f;
        const u32 count = __popc(__ballot_sync(kFullWarp, row >= 0));
        u8* slot = theirs.slot(source, first + i);
        for (u32 at = 0; at < row_bytes; at += kPieceBytes) {
            Sums sums;
            Piece piece;
            for (u32 k = 0; k < count; ++k) {
                const u64 r = __shfl_sync(kFullWarp, row, k);
                const float w = __shfl_sync(kFullWarp, weight, k);
                piece.load<true>(from.y + r * row_bytes + at, row_bytes - at);
                sums.add(piece, w, from.weights != nullptr);
            }
            sums.rounded().store(slot + at, row_bytes - at);
        }
        if (o.gradients) put_gradients(o, from, row, o.behind(slot));
        if ((i + 1) % kChunk == 0 || i + 1 == total)
            publish(theirs.tail(source, o.channel), o.epoch << 32 | (i + 1));
    }
    return true;
}

// Lane g: the slot of a message that GPU g has sent here for `node`, or -1; until all have come. False if one
// did not.
__device__ __forceinline__ bool gather(const Inbound& o, u32 node, u32 message, i32& slot) {
    const u32 lane = threadIdx.x % 32;
    slot = lane < o.self.gpus ? o.layout.slots(node, message, o.self.gpus)[lane] : -1;
    bool arrived = true;
    if (slot >= 0) {
        const u64 expected = o.epoch << 32 | (slot - o.layout.first(node, o.channel) + 1);
        arrived = o.self.wait(o.self.mine().tail(node * o.self.gpus + lane, o.channel), expected,
                              Role::kForward, o.place.near(lane), o.channel) >= expected;
    }
    const bool all = __all_sync(kFullWarp, arrived);
    __syncwarp();
    return all;
}

// A piece, from byte `at` on, of the sum over this node's ranks, rounded; `slot` as from gather.
__device__ __forceinline__ Piece sum_of_node(const Inbound& o, u32 node, i32 slot, u32 at) {
    const Workspace mine = o.self.mine();
    Sums sums;
    for (u32 left = __ballot_sync(kFullWarp, slot >= 0); left; left &= left - 1) {
        const u32 gpu = __ffs(left) - 1, index = __shfl_sync(kFullWarp, slot, gpu);
        Piece piece;
        piece.load<false>(mine.slot(node * o.self.gpus + gpu, index) + at, 2 * o.hidden - at);
        sums.add(piece, 1.0f, false);
    }
    return sums.rounded();
}

// The gradients of a message, one behind another by ascending expert, to `target`.
__device__ __forceinline__ void join_gradients(const Inbound& o, u32 node, i32 slot, float* target) {
    const u32 lane = threadIdx.x % 32;
    u32 before = 0;
    for (u32 left = __ballot_sync(kFullWarp, slot >= 0); left; left &= left - 1) {
        const u32 gpu = __ffs(left) - 1, index = __shfl_sync(kFullWarp, slot, gpu);
        const float* from = o.behind(o.self.mine().slot(node * o.self.gpus + gpu, index));
        const u32 count = __float_as_int(from[o.topk]);
        if (lane < count) target[before + lane] = from[lane];
        before += count;
    }
}

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

// The tokens of this rank.
struct HomeTokens {
    const i64* topk_idx;  // [tokens, topk]
    const u8* bias;       // BF16 [tokens, hidden], or null
    u8* out;              // BF16 [tokens, hidden]
    float* gradients;     // [tokens, topk], or null
    u32 tokens;
};

// Lane k: the gradient of choice k, which stands behind those of lower experts: of its node in a ring's
// message, of its rank in a slot. `message`, lane n: that of node n. `slot`, lane g: that of GPU g of this
// node.
__device__ __forceinline__ void bring_gradients(const Inbound& o, const HomeTokens& to, u32 token,
                                                const u8* message, i32 slot) {
    const u32 lane = threadIdx.x % 32, local = o.self.local_experts;
    const u32 width = o.self.gpus * local;
    i32 expert = -1;
    if (lane < o.topk) expert = static_cast<i32>(to.topk_idx[static_cast<u64>(token) * o.topk + lane]);
    const u32 node = max(expert, 0) / width, gpu = max(expert, 0) % width / local;
    const bool here = node == o.place.node();
    const i32 lowest = here ? node * width + gpu * local : node * width;
    u32 place = 0;
    for (u32 k = 0; k < o.topk; ++k) {
        const i32 other = __shfl_sync(kFullWarp, expert, k);
        place += other >= lowest && other < expert;
    }
    const u8* from =
        reinterpret_cast<const u8*>(__shfl_sync(kFullWarp, reinterpret_cast<u64>(message), node));
    const i32 index = __shfl_sync(kFullWarp, slot, gpu);
    if (here && index >= 0) from = o.self.mine().slot(node * o.self.gpus + gpu, index);
    if (lane < o.topk)
        to.gradients[static_cast<u64>(token) * o.topk + lane] = expert < 0 ? 0.0f : o.behind(from)[place];
}

// Warp `warp` of `warps`: every `warps`th token of a channel. `readers`, shared memory: how many messages of
// each slot of each node's ring have been read.
__device__ __forceinline__ bool receive(const Inbound& o, const HomeTokens& to, u32 warp, u32 warps,
                                        u32* readers) {
    const u32 lane = threadIdx.x % 32, chunk = o.link.rings.chunk, row_bytes = 2 * o.hidden;
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
        const u64 start = static_cast<u64>(token) * row_bytes;
        for (u32 at = 0; at < row_bytes; at += kPieceBytes) {
            const Piece here = sum_of_node(o, o.place.node(), slot, at);
            Sums total;
            Piece piece;
            for (u32 left = nodes; left; left &= left - 1) {
                const u32 node = __ffs(left) - 1;
                if (node == o.place.node()) {
                    total.add(here, 1.0f, false);
                    continue;
                }
                piece.load<false>(reinterpret_cast<const u8*>(
                                      __shfl_sync(kFullWarp, reinterpret_cast<u64>(message), node)) +
                                      at,
                                  row_bytes - at);
                total.add(piece, 1.0f, false);
            }
            if (to.bias) {
                piece.load<true>(to.bias + start + at, row_bytes - at);
                total.add(piece, 1.0f, false);
            }
            total.rounded().store(to.out + start + at, row_bytes - at);
        }
        if (to.gradients) bring_gradients(o, to, token, message, slot);
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
        const Inbound o{self,     {self, all.link}, all.link, all.layout,        all.hidden,
                        all.topk, channel,          epoch,    all.message_bytes, all.to.gradients != nullptr};
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
