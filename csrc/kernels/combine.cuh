// Combine within a node: what the experts of a token returned, added up on each rank and then on the token's
// own.
//
// The streams are those of the dispatch, backwards: what came from rank s in its channel i goes back there in
// channel i, a token in the slot it had. An even block adds the rows of each token (a warp for each home
// rank) and sends one BF16 row; an odd block waits for a token's ranks and adds them. All sums start at +0
// and run in FP32, experts ascending, then ranks ascending, each rounded to BF16: bits do not depend on the
// timing. The protocol is in channel.cuh; no counts travel, for the dispatch
// has told them.
//
// Bytes: a (token, expert): a row read; a (token, rank): a row written over NVLink and read; a token: a row
// written.
#pragma once

#include "channel.cuh"
#include "sums.cuh"

namespace dsv3 {
namespace combine {

constexpr u32 kChunk = 4;  // tokens that a tail announces at a time

// What the experts of this rank returned.
struct Rows {
    const u8* y;             // BF16 [rows, hidden]
    const float* weights;    // [rows], or null
    const float* gradients;  // [rows], in token order [rows, topk], or null: travel home as they are
    const i32* rows;         // [ranks, max_tokens, topk], by ascending expert, then -1
    const i32* ranges;       // [ranks, channels, 2]
};

// The tokens of this rank, and where each one went.
struct Home {
    const i64* topk_idx;   // [tokens, topk]
    const i32* sent_slot;  // [tokens, ranks], or -1
    const u8* bias;        // BF16 [tokens, hidden], or null
    u8* out;               // BF16 [tokens, hidden]
    float* gradients;      // [tokens, topk], or null
};

struct Call {
    Rank self;
    Rows from;
    Home to;
    u32 tokens, hidden, topk, channels, token_order;
};

// One warp: the tokens of one home rank's channel.
__device__ __forceinline__ bool send(const Call& call, u32 peer, u32 channel, u64 epoch) {
    const Rank& self = call.self;
    const Rows& from = call.from;
    const Workspace home = self.workspace(peer);
    const u32 lane = threadIdx.x % 32, row_bytes = 2 * call.hidden, topk = call.topk;
    const u32 first = from.ranges[2 * (peer * call.channels + channel)];
    const u32 total = from.ranges[2 * (peer * call.channels + channel) + 1];
    if (total == kNothing) return true;
    const u64* ack = self.mine().ack(peer);
    if (self.wait_warp(ack, epoch - 1, Role::kSend, peer, channel) < epoch - 1) return false;
    u64 bytes = 0;
    for (u32 i = 0; i < total; ++i) {
        i32 row = -1;
        if (lane < topk)
            row = from.rows[(static_cast<i64>(peer) * self.max_tokens + first + i) * topk + lane];
        u8* slot = home.slot(self.rank, first + i);
        put_sum(from.y, from.weights, row, row_bytes, slot);
        if (from.gradients) {
            const i64 only = __shfl_sync(kFullWarp, row, 0);
            const i64 at = call.token_order && lane < topk ? only * topk + lane : row;
            if (at >= 0) reinterpret_cast<float*>(slot + row_bytes)[lane] = from.gradients[at];
            bytes += 4 * __popc(__ballot_sync(kFullWarp, at >= 0));
        }
        bytes += row_bytes;
        if ((i + 1) % kChunk == 0 || i + 1 == total)
            publish(home.tail(self.rank, channel), epoch << 32 | (i + 1));
    }
    self.count_sent(peer, channel, bytes);
    return true;
}

// Lane k: the gradient of choice k. In its rank's slot it stands at k in token order, in expert order behind
// those of lower experts there.
__device__ __forceinline__ void bring_gradients(const Call& call, const Workspace& mine, u32 token) {
    const u32 lane = threadIdx.x % 32, topk = call.topk;
    const i64 at = static_cast<i64>(token) * topk + lane;
    i32 expert = -1;
    if (lane < topk) expert = static_cast<i32>(call.to.topk_idx[at]);
    const u32 rank = max(expert, 0) / mine.local_experts;
    const i32 first = rank * mine.local_experts;
    u32 place = 0;
    for (u32 k = 0; k < topk; ++k) {
        const i32 other = __shfl_sync(kFullWarp, expert, k);
        place += other >= first && other < expert;
    }
    if (lane >= topk) return;
    float value = 0.0f;
    if (expert >= 0) {
        const u8* slot = mine.slot(rank, call.to.sent_slot[static_cast<i64>(token) * mine.ranks + rank]);
        value = reinterpret_cast<const float*>(slot + 2 * call.hidden)[call.token_order ? lane : place];
    }
    call.to.gradients[at] = value;
}

// One warp: every `stride`th token of a channel.
__device__ __forceinline__ bool receive(const Call& call, u32 channel, u32 offset, u32 stride, u64 epoch) {
    const Rank& self = call.self;
    const Home& to = call.to;
    const Workspace mine = self.mine();
    const u32 lane = threadIdx.x % 32, row_bytes = 2 * call.hidden;
    const Share share(call.tokens, channel, call.channels);
    for (u32 token = share.first + offset; token < share.last; token += stride) {
        i32 slot = -1;  // lane r: at rank r
        if (lane < mine.ranks) slot = to.sent_slot[static_cast<i64>(token) * mine.ranks + lane];
        const u32 ranks = __ballot_sync(kFullWarp, slot >= 0);
        bool arrived = true;
        if (slot >= 0) {
            const u64 expected = epoch << 32 | (slot - share.first + 1);
            arrived =
                self.wait(mine.tail(lane, channel), expected, Role::kReceive, lane, channel) >= expected;
        }
        if (!__all_sync(kFullWarp, arrived)) return false;
        __syncwarp();
        const u64 start = static_cast<u64>(token) * row_bytes;
        for (u32 at = 0; at < row_bytes; at += kPieceBytes) {
            Sums sums;
            Piece piece;
            for (u32 left = ranks; left; left &= left - 1) {
                const u32 rank = __ffs(left) - 1;
                const u32 index = __shfl_sync(kFullWarp, slot, rank);
                piece.load<false>(mine.slot(rank, index) + at, row_bytes - at);
                sums.add(piece, 1.0f, false);
            }
            piece = sums.rounded();  // the sum of the node, which here is the only one
            if (to.bias) {
                Sums total;
                total.add(piece, 1.0f, false);
                piece.load<true>(to.bias + start + at, row_bytes - at);
                total.add(piece, 1.0f, false);
                piece = total.rounded();
            }
            piece.store(to.out + start + at, row_bytes - at);
        }
        if (to.gradients) bring_gradients(call, mine, token);
    }
    return true;
}

// All blocks of a rank; `block` is this one.
__device__ __forceinline__ void run(const Call& call, u32 block, u32 blocks) {
    const u32 ranks = call.self.ranks, teams = blockDim.x / (32 * ranks);  // as in dispatch.cuh
    const u32 warp = threadIdx.x / 32 % ranks, first = block / 2 * teams + threadIdx.x / (32 * ranks);
    const u64 epoch = call.self.epoch();
    const bool laid_out = call.from.ranges[1] != kNothing;
    bool kept = true;
    for (u32 channel = first; laid_out && kept && channel < call.channels; channel += blocks / 2 * teams)
        kept = block % 2 == 0 ? send(call, warp, channel, epoch) : receive(call, channel, warp, ranks, epoch);
    if (!__syncthreads_or(!kept)) finish(call.self, epoch, blocks);
}

}  // namespace combine

// Grid: num_sms blocks for each rank of the launch, num_sms even, all resident; 32 * ranks threads a
// team. `channels` is that of the dispatch; teams take them in turn. hidden is a multiple of 8, topk at
// most 32.
__global__ void __launch_bounds__(512, 1)
    combine_tokens(const __grid_constant__ PerRank<combine::Call> calls, u32 num_sms) {
    combine::run(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms);
}

}  // namespace dsv3
