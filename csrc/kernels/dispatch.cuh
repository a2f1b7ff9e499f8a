// Dispatch within a node: every token once to each rank that holds one of its experts, there by expert.
//
// Two blocks a channel: the even one sends a contiguous share of this rank's tokens, a warp for each
// destination; the odd one receives that channel, a warp for each source. Senders count first; from the
// counts of all sources and channels a receiver knows the final row of every (token, expert) before any token
// arrives: the order is by expert, source, token, whatever the timing. The protocol is in channel.cuh.
// dispatch_again takes all that from an earlier dispatch and moves rows and scales alone.
//
// Bytes: a (token, rank): row + scales + 8 K written over NVLink, and read once there; a (token, expert):
// row + scales written.
#pragma once

#include "channel.cuh"
#include "error.cuh"

namespace dsv3 {
namespace dispatch {

constexpr u32 kChunk = 4;  // tokens that a tail announces at a time

// The tokens to move, and where they go.
struct Tokens {
    const u8* data;       // [tokens, row_bytes]
    const float* scales;  // [tokens, tiles] of any strides, or null
    i64 scale_row_stride, scale_tile_stride;
    const i64* topk_idx;        // [tokens, topk]
    const float* topk_weights;  // [tokens, topk], or null
    u32 count, row_bytes, tiles, topk;
};

struct Received {
    u8* data;       // [max_rows, row_bytes]
    float* scales;  // [tiles, scale_stride], MN-major
    i64 scale_stride;
    i64* topk_idx;        // [max_rows]
    float* topk_weights;  // [max_rows], or null
    i32* group_offsets;   // [local_experts + 1]
    i32* rows;            // [ranks, max_tokens, topk]: rows of each slot's token by ascending expert, then -1
    i32* ranges;          // [ranks, channels, 2]: first slot and number of tokens
    u32 max_rows;
};

// Lane k: the expert of choice k, or -1 for one that is none, out of range, or in the row already. The last
// two set `fault`.
__device__ __forceinline__ i32 choice(const Tokens& tokens, u32 token, u32 lane, i32 experts, bool& fault) {
    i64 expert = -1;
    if (lane < tokens.topk) expert = tokens.topk_idx[static_cast<i64>(token) * tokens.topk + lane];
    bool bad = expert < -1 || expert >= experts;
    i32 mine = bad ? -1 : static_cast<i32>(expert);
    for (u32 k = 0; k + 1 < tokens.topk; ++k) {
        const i32 earlier = __shfl_sync(kFullWarp, mine, k);
        bad |= lane > k && mine >= 0 && mine == earlier;
    }
    fault |= bad;
    return bad ? -1 : mine;
}

// A token's row and scales into its slot.
__device__ __forceinline__ void put(const Tokens& tokens, u32 token, u8* slot, u32 lane) {
    const u8* row = tokens.data + static_cast<i64>(token) * tokens.row_bytes;
    for (u32 i = lane * 16; i < tokens.row_bytes; i += 32 * 16)
        ptx::store_global(slot + i, ptx::load_global_nc(row + i));
    float* scales = reinterpret_cast<float*>(slot + tokens.row_bytes);
    for (u32 i = lane; i < tokens.tiles; i += 32)
        scales[i] = tokens.scales[token * tokens.scale_row_stride + i * tokens.scale_tile_stride];
}

// A slot's row and scales into the rows of the lanes in `targets`.
__device__ __forceinline__ void spread(const Tokens& shape, const Received& out, const u8* slot, u32 row,
                                       u32 targets, u32 lane) {
    for (u32 b = lane * 16; b - lane * 16 < shape.row_bytes; b += 32 * 16) {
        U32x4 value{0, 0, 0, 0};
        if (b < shape.row_bytes) value = ptx::load_global(slot + b);
        for (u32 left = targets; left; left &= left - 1) {
            const u32 to = __shfl_sync(kFullWarp, row, __ffs(left) - 1);
            if (b < shape.row_bytes)
                ptx::store_global(out.data + static_cast<u64>(to) * shape.row_bytes + b, value);
        }
    }
    const float* scales = reinterpret_cast<const float*>(slot + shape.row_bytes);
    for (; targets; targets &= targets - 1) {
        const u32 to = __shfl_sync(kFullWarp, row, __ffs(targets) - 1);
        for (u32 t = lane; t < shape.tiles; t += 32) out.scales[t * out.scale_stride + to] = scales[t];
    }
}

// Until token i of a stream is in its slot; `seen` is the last tail.
__device__ __forceinline__ bool arrived(const Workspace& mine, u32 source, u32 channel, u64 epoch, u32 i,
                                        u64& seen, const Deadline& deadline) {
    const u64 expected = epoch << 32 | (i + 1);
    if (seen < expected)
        seen = deadline.wait_warp(mine.tail(source, channel), expected, Role::kReceive, source, channel);
    return seen >= expected;
}

// One warp: its tokens for one destination. `counts` is shared memory of this warp, [local_experts].
__device__ __forceinline__ bool send(const Tokens& tokens, Workspace theirs, const Workspace& mine, u32 rank,
                                     u32 peer, u32 channel, u32 channels, u64 epoch, u32* counts,
                                     i32* sent_slot, const Deadline& deadline) {
    const u32 lane = threadIdx.x % 32;
    const u32 share = (tokens.count + channels - 1) / channels;
    const u32 first = min(channel * share, tokens.count);
    const u32 last = min(first + share, tokens.count);
    const i32 low = peer * mine.local_experts, experts = mine.ranks * mine.local_experts;

    for (u32 e = lane; e < mine.local_experts; e += 32) counts[e] = 0;
    __syncwarp();
    u32 total = 0;
    bool fault = false;
    for (u32 token = first; token < last; ++token) {
        const i32 local = choice(tokens, token, lane, experts, fault) - low;
        const bool here = local >= 0 && local < static_cast<i32>(mine.local_experts);
        if (here) ++counts[local];  // a token's experts differ, so no two lanes meet
        total += __ballot_sync(kFullWarp, here) != 0;
        __syncwarp();
    }

    if (deadline.wait_warp(mine.ack(peer), epoch - 1, Role::kSend, peer, channel) < epoch - 1) return false;
    fault = __any_sync(kFullWarp, fault);
    u32* announced = theirs.counts(rank, channel);
    for (u32 e = lane; e < mine.local_experts; e += 32) announced[e] = counts[e];
    if (lane == 0) {
        announced[mine.local_experts] = total;
        announced[mine.local_experts + 1] = first;
        announced[mine.local_experts + 2] = fault ? static_cast<u32>(ErrorCode::kDispatchExperts) : 0;
    }
    u64* tail = theirs.tail(rank, channel);
    publish(tail, epoch << 32);

    u32 sent = 0;
    for (u32 token = first; token < last; ++token) {
        const i32 local = choice(tokens, token, lane, experts, fault) - low;
        const bool here = local >= 0 && local < static_cast<i32>(mine.local_experts);
        const bool goes = __ballot_sync(kFullWarp, here) != 0;
        if (lane == 0) sent_slot[static_cast<i64>(token) * mine.ranks + peer] = goes ? first + sent : -1;
        if (!goes) continue;
        u8* slot = theirs.slot(rank, first + sent);
        put(tokens, token, slot, lane);
        float* scales = reinterpret_cast<float*>(slot + tokens.row_bytes);
        if (lane < tokens.topk) {
            float weight = 0.0f;
            if (tokens.topk_weights)
                weight = tokens.topk_weights[static_cast<i64>(token) * tokens.topk + lane];
            scales[tokens.tiles + 2 * lane] = __int_as_float(here ? local : -1);
            scales[tokens.tiles + 2 * lane + 1] = weight;
        }
        if (++sent % kChunk == 0 || sent == total) publish(tail, epoch << 32 | sent);
    }
    return true;
}

// One warp: the tokens of one source, in order. `next` is shared memory of this warp: the row that the next
// token of each local expert takes.
__device__ __forceinline__ bool receive(const Tokens& shape, const Received& out, const Workspace& mine,
                                        u32 source, u32 channel, u32 channels, u64 epoch, u32* next,
                                        const Deadline& deadline) {
    const u32 lane = threadIdx.x % 32;
    const u32* counts = mine.counts(source, channel);
    const u32 total = counts[mine.local_experts], first = counts[mine.local_experts + 1];
    if (lane == 0) {
        out.ranges[2 * (source * channels + channel)] = first;
        out.ranges[2 * (source * channels + channel) + 1] = total;
    }
    u64 seen = 0;
    for (u32 i = 0; i < total; ++i) {
        if (!arrived(mine, source, channel, epoch, i, seen, deadline)) return false;
        const u8* slot = mine.slot(source, first + i);
        const float* scales = reinterpret_cast<const float*>(slot + shape.row_bytes);
        i32 local = -1;
        float weight = 0.0f;
        if (lane < shape.topk) {
            local = __float_as_int(scales[shape.tiles + 2 * lane]);
            weight = scales[shape.tiles + 2 * lane + 1];
        }
        u32 row = ~0u;
        if (local >= 0) row = next[local]++;
        __syncwarp();
        const bool fits = row < out.max_rows;
        if (fits) {
            out.topk_idx[row] = local;
            if (out.topk_weights) out.topk_weights[row] = weight;
        }
        // By ascending expert: this choice comes behind those with a lower one.
        u32 place = 0;
        for (u32 k = 0; k < shape.topk; ++k) {
            const i32 other = __shfl_sync(kFullWarp, local, k);
            place += other >= 0 && (local < 0 || other < local || (other == local && k < lane));
        }
        const u32 behind = __popc(__ballot_sync(kFullWarp, local < 0) & ((1u << lane) - 1));
        if (lane < shape.topk)
            out.rows[(static_cast<i64>(source) * mine.max_tokens + first + i) * shape.topk + place +
                     (local < 0 ? behind : 0)] = fits ? static_cast<i32>(row) : -1;

        spread(shape, out, slot, row, __ballot_sync(kFullWarp, fits), lane);
    }
    return true;
}

// One block, after all counts have come: the first row of each (source, expert) of this channel, into
// next[source][e]. What any rank found wrong is reported here on every rank.
__device__ __forceinline__ void plan(const Received& out, const Workspace& mine, u32 channel, u32 channels,
                                     u32* next, u32* starts, u32* error) {
    for (u32 e = threadIdx.x; e < mine.local_experts; e += blockDim.x) {
        u32 running = 0;
        for (u32 source = 0; source < mine.ranks; ++source)
            for (u32 c = 0; c < channels; ++c) {
                if (c == channel) next[source * mine.local_experts + e] = running;
                running += mine.counts(source, c)[e];
            }
        starts[e] = running;
    }
    if (channel == 0)
        for (u32 i = threadIdx.x; i < mine.ranks * channels; i += blockDim.x) {
            const u32 code = mine.counts(i / channels, i % channels)[mine.local_experts + 2];
            if (code) report_error(error, static_cast<ErrorCode>(code));
        }
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 running = 0;
        for (u32 e = 0; e < mine.local_experts; ++e) {
            const u32 size = starts[e];
            starts[e] = running;
            if (channel == 0) out.group_offsets[e] = min(running, out.max_rows);
            running += size;
        }
        if (channel == 0) {
            out.group_offsets[mine.local_experts] = min(running, out.max_rows);
            if (running > out.max_rows) report_error(error, ErrorCode::kDispatchOverflow);
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < mine.ranks * mine.local_experts; i += blockDim.x)
        next[i] += starts[i % mine.local_experts];
    __syncthreads();
}

// As `send` and `receive`, of a layout that an earlier dispatch has left in sent_slot, rows and ranges: no
// counts travel, and of a token only its row and scales.
__device__ __forceinline__ bool send_again(const Tokens& tokens, Workspace theirs, const Workspace& mine,
                                           u32 rank, u32 peer, u32 channel, u32 channels, u64 epoch,
                                           const i32* sent_slot, const Deadline& deadline) {
    const u32 lane = threadIdx.x % 32;
    const u32 share = (tokens.count + channels - 1) / channels;
    const u32 first = min(channel * share, tokens.count);
    const u32 last = min(first + share, tokens.count);
    if (deadline.wait_warp(mine.ack(peer), epoch - 1, Role::kSend, peer, channel) < epoch - 1) return false;
    u64* tail = theirs.tail(rank, channel);
    const u64 begun = epoch << 32;
    u32 sent = 0;
    for (u32 token = first; token < last; ++token) {
        const i32 slot = sent_slot[static_cast<i64>(token) * mine.ranks + peer];
        if (slot < 0) continue;
        put(tokens, token, theirs.slot(rank, slot), lane);
        if (++sent % kChunk == 0) publish(tail, begun | sent);
    }
    if (sent % kChunk) publish(tail, begun | sent);
    return true;
}

__device__ __forceinline__ bool receive_again(const Tokens& shape, const Received& out, const Workspace& mine,
                                              u32 source, u32 channel, u32 channels, u64 epoch,
                                              const Deadline& deadline) {
    const u32 lane = threadIdx.x % 32;
    const u32 first = out.ranges[2 * (source * channels + channel)];
    const u32 total = out.ranges[2 * (source * channels + channel) + 1];
    u64 seen = 0;
    for (u32 i = 0; i < total; ++i) {
        if (!arrived(mine, source, channel, epoch, i, seen, deadline)) return false;
        i32 row = -1;
        if (lane < shape.topk)
            row = out.rows[(static_cast<i64>(source) * mine.max_tokens + first + i) * shape.topk + lane];
        spread(shape, out, mine.slot(source, first + i), row, __ballot_sync(kFullWarp, row >= 0), lane);
    }
    return true;
}

}  // namespace dispatch

// Grid: 2 * channels blocks, all resident; 32 * ranks threads. Dynamic shared memory: 4 * (ranks + 1) *
// local_experts bytes. row_bytes is a multiple of 16, topk at most 32.
__global__ void __launch_bounds__(256)
    dispatch_tokens(u8* const* workspaces, Sequence* sequence, Failure* failure, u32* error, const u8* x,
                    const float* scales, i64 scale_row_stride, i64 scale_tile_stride, const i64* topk_idx,
                    const float* topk_weights, u8* out, float* out_scales, i64 out_scale_stride, i64* out_idx,
                    float* out_weights, i32* group_offsets, i32* sent_slot, i32* rows, i32* ranges, u32 rank,
                    u32 ranks, u32 tokens, u32 max_tokens, u32 row_bytes, u32 tiles, u32 topk,
                    u32 local_experts, u32 max_rows, u64 slot_bytes, u64 timeout) {
    extern __shared__ u32 shared[];
    const dispatch::Tokens from{x,        scales,       scale_row_stride, scale_tile_stride,
                                topk_idx, topk_weights, tokens,           row_bytes,
                                tiles,    topk};
    const dispatch::Received to{out,           out_scales, out_scale_stride, out_idx, out_weights,
                                group_offsets, rows,       ranges,           max_rows};
    const Workspace mine{workspaces[rank], ranks, local_experts, max_tokens, slot_bytes};
    const Deadline deadline{failure, timeout};
    const u32 channel = blockIdx.x / 2, channels = gridDim.x / 2;
    const u32 peer = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 epoch = sequence->finished_epochs + 1;
    u32* per_peer = shared + peer * local_experts;

    bool kept = true;
    if (blockIdx.x % 2 == 0) {
        Workspace theirs = mine;
        theirs.base = workspaces[peer];
        kept = dispatch::send(from, theirs, mine, rank, peer, channel, channels, epoch, per_peer, sent_slot,
                              deadline);
    } else {
        const u64 counted = epoch << 32;
        if (lane < channels)
            kept = deadline.wait(mine.tail(peer, lane), counted, Role::kReceive, peer, lane) >= counted;
        if (__syncthreads_or(!kept)) return;
        dispatch::plan(to, mine, channel, channels, shared, shared + ranks * local_experts, error);
        kept = dispatch::receive(from, to, mine, peer, channel, channels, epoch, per_peer, deadline);
    }
    if (!__syncthreads_or(!kept)) finish(sequence, workspaces, mine, rank, epoch);
}

// The same tokens' places, other rows. Grid: an even number of blocks, all resident; 32 * ranks threads.
// `channels` is that of the dispatch that left sent_slot, rows and ranges; blocks take them in turn.
__global__ void __launch_bounds__(256)
    dispatch_again(u8* const* workspaces, Sequence* sequence, Failure* failure, const u8* x,
                   const float* scales, i64 scale_row_stride, i64 scale_tile_stride, u8* out,
                   float* out_scales, i64 out_scale_stride, const i32* sent_slot, i32* rows, i32* ranges,
                   u32 rank, u32 ranks, u32 tokens, u32 max_tokens, u32 row_bytes, u32 tiles, u32 topk,
                   u32 local_experts, u32 channels, u64 slot_bytes, u64 timeout) {
    const dispatch::Tokens from{x,       scales,  scale_row_stride, scale_tile_stride, nullptr,
                                nullptr, tokens,  row_bytes,        tiles,             topk};
    const dispatch::Received to{out,     out_scales, out_scale_stride, nullptr, nullptr,
                                nullptr, rows,       ranges,           0};
    const Workspace mine{workspaces[rank], ranks, local_experts, max_tokens, slot_bytes};
    const Deadline deadline{failure, timeout};
    const u32 peer = threadIdx.x / 32;
    const u64 epoch = sequence->finished_epochs + 1;

    bool kept = true;
    for (u32 channel = blockIdx.x / 2; kept && channel < channels; channel += gridDim.x / 2) {
        if (blockIdx.x % 2 == 0) {
            Workspace theirs = mine;
            theirs.base = workspaces[peer];
            kept = dispatch::send_again(from, theirs, mine, rank, peer, channel, channels, epoch, sent_slot,
                                        deadline);
        } else {
            kept = dispatch::receive_again(from, to, mine, peer, channel, channels, epoch, deadline);
        }
    }
    if (!__syncthreads_or(!kept)) finish(sequence, workspaces, mine, rank, epoch);
}

}  // namespace dsv3
