// Combine across nodes, what happens within one: a rank's experts' rows of a token, added, go over NVLink
// into a slot of the forwarder of the token's rank, which adds what the ranks of its node sent. And what is
// the same however rows cross InfiniBand. combine_internode.cuh and combine_lean.cuh say what for.
#pragma once

#include "combine.cuh"
#include "internode.cuh"

namespace dsv3 {
namespace combine {

// One channel of one call.
struct Channel {
    const Rank& self;
    Where where;
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

// The same with its rings.
struct Inbound : Channel {
    Place place;
    const Link& link;
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
__device__ __forceinline__ void put_gradients(const Channel& o, const Experts& from, i32 row, float* target) {
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
        u8* slot = theirs.slot(source, first + i);
        put_sum(from.y, from.weights, row, row_bytes, slot);
        if (o.gradients) put_gradients(o, from, row, o.behind(slot));
        if ((i + 1) % kChunk == 0 || i + 1 == total)
            publish(theirs.tail(source, o.channel), o.epoch << 32 | (i + 1));
    }
    return true;
}

// Lane g: the slot of a message that GPU g has sent here for `node`, or -1; until all have come. False if one
// did not.
__device__ __forceinline__ bool gather(const Channel& o, u32 node, u32 message, i32& slot) {
    const u32 lane = threadIdx.x % 32;
    slot = lane < o.self.gpus ? o.layout.slots(node, message, o.self.gpus)[lane] : -1;
    bool arrived = true;
    if (slot >= 0) {
        const u64 expected = o.epoch << 32 | (slot - o.layout.first(node, o.channel) + 1);
        arrived = o.self.wait(o.self.mine().tail(node * o.self.gpus + lane, o.channel), expected,
                              Role::kForward, o.where.near(lane), o.channel) >= expected;
    }
    const bool all = __all_sync(kFullWarp, arrived);
    __syncwarp();
    return all;
}

// A piece, from byte `at` on, of the sum over this node's ranks, rounded; `slot` as from gather.
__device__ __forceinline__ Piece sum_of_node(const Channel& o, u32 node, i32 slot, u32 at) {
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
__device__ __forceinline__ void join_gradients(const Channel& o, u32 node, i32 slot, float* target) {
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
__device__ __forceinline__ void bring_gradients(const Channel& o, const HomeTokens& to, u32 token,
                                                const u8* message, i32 slot) {
    const u32 lane = threadIdx.x % 32, local = o.self.local_experts;
    const u32 width = o.self.gpus * local;
    i32 expert = -1;
    if (lane < o.topk) expert = static_cast<i32>(to.topk_idx[static_cast<u64>(token) * o.topk + lane]);
    const u32 node = max(expert, 0) / width, gpu = max(expert, 0) % width / local;
    const bool here = node == o.where.node();
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

// One warp: a token, once all its rows have come. nodes, a bit each: where it was; the rest as above.
__device__ __forceinline__ void bring_token(const Channel& o, const HomeTokens& to, u32 token, u32 nodes,
                                            const u8* message, i32 slot) {
    const u32 row_bytes = 2 * o.hidden;
    const u64 start = static_cast<u64>(token) * row_bytes;
    for (u32 at = 0; at < row_bytes; at += kPieceBytes) {
        const Piece here = sum_of_node(o, o.where.node(), slot, at);
        Sums total;
        Piece piece;
        for (u32 left = nodes; left; left &= left - 1) {
            const u32 node = __ffs(left) - 1;
            if (node == o.where.node()) {
                total.add(here, 1.0f, false);
                continue;
            }
            const u64 row = __shfl_sync(kFullWarp, reinterpret_cast<u64>(message), node);
            piece.load<false>(reinterpret_cast<const u8*>(row) + at, row_bytes - at);
            total.add(piece, 1.0f, false);
        }
        if (to.bias) {
            piece.load<true>(to.bias + start + at, row_bytes - at);
            total.add(piece, 1.0f, false);
        }
        total.rounded().store(to.out + start + at, row_bytes - at);
    }
    if (to.gradients) bring_gradients(o, to, token, message, slot);
}

}  // namespace combine
}  // namespace dsv3
