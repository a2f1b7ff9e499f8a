// Combine within a node: what the experts of a token returned, added up on each rank and then on the token's
// own.
//
// The streams are those of the dispatch, backwards: what came from rank s in its channel i goes back there in
// channel i, a token in the slot it had. An even block adds the rows of each token (a warp for each home
// rank) and sends one BF16 row; an odd block waits for a token's ranks and adds them. All sums start at +0
// and run in FP32, experts ascending, then ranks ascending, each rounded to BF16: bits do not depend on the
// timing. The protocol is in channel.cuh; a workspace here has no counts, for the dispatch has told them.
//
// Bytes: a (token, expert): a row read; a (token, rank): a row written over NVLink and read; a token: a row
// written.
#pragma once

#include "channel.cuh"

namespace dsv3 {
namespace combine {

constexpr u32 kChunk = 4;    // tokens that a tail announces at a time
constexpr u32 kColumns = 8;  // of a lane: one access of 16 bytes

__device__ __forceinline__ void add(float (&sum)[kColumns], U32x4 row, float weight, bool weighted) {
    const u32 words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (u32 i = 0; i < kColumns; ++i) {
        float value = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        if (weighted) value = __fmul_rn(value, weight);
        sum[i] = __fadd_rn(sum[i], value);
    }
}

__device__ __forceinline__ U32x4 round(const float (&sum)[kColumns]) {
    return U32x4{ptx::bf16x2(sum[0], sum[1]), ptx::bf16x2(sum[2], sum[3]), ptx::bf16x2(sum[4], sum[5]),
                 ptx::bf16x2(sum[6], sum[7])};
}

// What the experts of this rank returned.
struct Rows {
    const u8* y;             // BF16 [rows, hidden]
    const float* weights;    // [rows], or null
    const float* gradients;  // [rows], or null: travel home as they are
    const i32* rows;         // [ranks, max_tokens, topk], by ascending expert, then -1
    const i32* ranges;       // [ranks, channels, 2]
    u32 hidden, topk;
};

// One warp: the tokens of one home rank's channel.
__device__ __forceinline__ bool send(const Rows& from, Workspace home, const Workspace& mine, u32 rank,
                                     u32 peer, u32 channel, u32 channels, u64 epoch,
                                     const Deadline& deadline) {
    const u32 lane = threadIdx.x % 32;
    const u32 first = from.ranges[2 * (peer * channels + channel)];
    const u32 total = from.ranges[2 * (peer * channels + channel) + 1];
    if (deadline.wait_warp(mine.ack(peer), epoch - 1, Role::kSend, peer, channel) < epoch - 1) return false;
    for (u32 i = 0; i < total; ++i) {
        i32 row = -1;
        if (lane < from.topk)
            row = from.rows[(static_cast<i64>(peer) * mine.max_tokens + first + i) * from.topk + lane];
        const float weight = from.weights && row >= 0 ? from.weights[row] : 1.0f;
        const u32 count = __popc(__ballot_sync(kFullWarp, row >= 0));
        u8* slot = home.slot(rank, first + i);
        for (u32 column = lane * kColumns; column - lane * kColumns < from.hidden; column += 32 * kColumns) {
            float sum[kColumns] = {};
            for (u32 k = 0; k < count; ++k) {
                const i64 r = __shfl_sync(kFullWarp, row, k);
                const float w = __shfl_sync(kFullWarp, weight, k);
                if (column < from.hidden)
                    add(sum, ptx::load_global_nc(from.y + 2 * (r * from.hidden + column)), w,
                        from.weights != nullptr);
            }
            if (column < from.hidden) ptx::store_global(slot + 2 * column, round(sum));
        }
        if (from.gradients && row >= 0)
            reinterpret_cast<float*>(slot + 2 * from.hidden)[lane] = from.gradients[row];
        if ((i + 1) % kChunk == 0 || i + 1 == total) publish(home.tail(rank, channel), epoch << 32 | (i + 1));
    }
    return true;
}

// The tokens of this rank, and where each one went.
struct Home {
    const i64* topk_idx;   // [tokens, topk]
    const i32* sent_slot;  // [tokens, ranks], or -1
    const u8* bias;        // BF16 [tokens, hidden], or null
    u8* out;               // BF16 [tokens, hidden]
    float* gradients;      // [tokens, topk], or null
    u32 tokens, hidden, topk;
};

// Lane k: the gradient of choice k, which stands in its rank's slot behind those of lower experts there.
__device__ __forceinline__ void bring_gradients(const Home& to, const Workspace& mine, u32 token) {
    const u32 lane = threadIdx.x % 32;
    i32 expert = -1;
    if (lane < to.topk) expert = static_cast<i32>(to.topk_idx[static_cast<i64>(token) * to.topk + lane]);
    const u32 rank = max(expert, 0) / mine.local_experts;
    const i32 first = rank * mine.local_experts;
    u32 place = 0;
    for (u32 k = 0; k < to.topk; ++k) {
        const i32 other = __shfl_sync(kFullWarp, expert, k);
        place += other >= first && other < expert;
    }
    if (lane >= to.topk) return;
    float value = 0.0f;
    if (expert >= 0) {
        const u8* slot = mine.slot(rank, to.sent_slot[static_cast<i64>(token) * mine.ranks + rank]);
        value = reinterpret_cast<const float*>(slot + 2 * to.hidden)[place];
    }
    to.gradients[static_cast<i64>(token) * to.topk + lane] = value;
}

// One warp: every `stride`th token of a channel.
__device__ __forceinline__ bool receive(const Home& to, const Workspace& mine, u32 channel, u32 channels,
                                        u32 offset, u32 stride, u64 epoch, const Deadline& deadline) {
    const u32 lane = threadIdx.x % 32;
    const u32 share = (to.tokens + channels - 1) / channels;
    const u32 first = min(channel * share, to.tokens);
    const u32 last = min(first + share, to.tokens);
    for (u32 token = first + offset; token < last; token += stride) {
        i32 slot = -1;  // lane r: at rank r
        if (lane < mine.ranks) slot = to.sent_slot[static_cast<i64>(token) * mine.ranks + lane];
        const u32 ranks = __ballot_sync(kFullWarp, slot >= 0);
        bool arrived = true;
        if (slot >= 0) {
            const u64 expected = epoch << 32 | (slot - first + 1);
            arrived =
                deadline.wait(mine.tail(lane, channel), expected, Role::kReceive, lane, channel) >= expected;
        }
        if (!__all_sync(kFullWarp, arrived)) return false;
        __syncwarp();
        for (u32 column = lane * kColumns; column - lane * kColumns < to.hidden; column += 32 * kColumns) {
            float sum[kColumns] = {};
            for (u32 left = ranks; left; left &= left - 1) {
                const u32 rank = __ffs(left) - 1;
                const u32 index = __shfl_sync(kFullWarp, slot, rank);
                if (column < to.hidden)
                    add(sum, ptx::load_global(mine.slot(rank, index) + 2 * column), 1.0f, false);
            }
            if (column >= to.hidden) continue;
            const u64 at = 2 * (static_cast<u64>(token) * to.hidden + column);
            U32x4 result = round(sum);  // the sum of the node, which here is the only one
            if (to.bias) {
                float total[kColumns] = {};
                add(total, result, 1.0f, false);
                add(total, ptx::load_global_nc(to.bias + at), 1.0f, false);
                result = round(total);
            }
            ptx::store_global(to.out + at, result);
        }
        if (to.gradients) bring_gradients(to, mine, token);
    }
    return true;
}

}  // namespace combine

// Grid: an even number of blocks, all resident; 32 * ranks threads. `channels` is that of the dispatch;
// blocks take them in turn. hidden is a multiple of 8, topk at most 32.
__global__ void __launch_bounds__(256)
    combine_tokens(u8* const* workspaces, Sequence* sequence, Failure* failure, const u8* y,
                   const float* row_weights, const float* row_gradients, const i32* rows, const i32* ranges,
                   const i64* topk_idx, const i32* sent_slot, const u8* bias, u8* out, float* gradients,
                   u32 rank, u32 ranks, u32 tokens, u32 max_tokens, u32 hidden, u32 topk, u32 local_experts,
                   u32 channels, u64 slot_bytes, u64 timeout) {
    const combine::Rows from{y, row_weights, row_gradients, rows, ranges, hidden, topk};
    const combine::Home to{topk_idx, sent_slot, bias, out, gradients, tokens, hidden, topk};
    const Workspace mine{workspaces[rank], ranks, local_experts, max_tokens, slot_bytes};
    const Deadline deadline{failure, timeout};
    const u32 warp = threadIdx.x / 32;
    const u64 epoch = sequence->finished_epochs + 1;

    bool kept = true;
    for (u32 channel = blockIdx.x / 2; kept && channel < channels; channel += gridDim.x / 2) {
        if (blockIdx.x % 2 == 0) {
            Workspace home = mine;
            home.base = workspaces[warp];
            kept = combine::send(from, home, mine, rank, warp, channel, channels, epoch, deadline);
        } else {
            kept = combine::receive(to, mine, channel, channels, warp, blockDim.x / 32, epoch, deadline);
        }
    }
    if (!__syncthreads_or(!kept)) finish(sequence, workspaces, mine, rank, epoch);
}

}  // namespace dsv3
