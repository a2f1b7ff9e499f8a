// Combine across nodes, what happens within one: a rank's experts' rows of a token, added, go over NVLink
// into a slot of the forwarder of the token's rank, which adds what the ranks of its node sent.
// combine_internode.cuh says what for.
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

}  // namespace combine
}  // namespace dsv3
