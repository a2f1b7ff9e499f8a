// Dispatch within a node: every token once to each rank that holds one of its experts, there by expert or by
// token.
//
// Two blocks a channel: the even one sends a contiguous share of this rank's tokens, a warp for each
// destination; the odd one receives that channel, a warp for each source. What goes where is in
// dispatch_layout.cuh, the protocol in channel.cuh. dispatch_again takes the layout of an earlier dispatch
// and moves rows and scales alone.
//
// Bytes: a (token, rank): row + scales + 8 K written over NVLink, and read once there; a row that arrives:
// row + scales written.
#pragma once

#include "channel.cuh"
#include "dispatch_layout.cuh"
#include "rows.cuh"

namespace dsv3 {
namespace dispatch {

constexpr u32 kChunk = 4;      // tokens that a tail announces at a time
constexpr u32 kFarAhead = 14;  // as kAhead, where a block has few warps and so many registers for each

// The scales of a row, of which a lane reads several at once. `get(t)` and `set(t, scale)` are of tile t.
template <class Get, class Set>
__device__ __forceinline__ void copy_scales(u32 tiles, Get get, Set set) {
    constexpr u32 kAtOnce = 2;
    const u32 lane = threadIdx.x % 32;
    for (u32 first = 0; first < tiles; first += 32 * kAtOnce) {
        float scales[kAtOnce] = {};
#pragma unroll
        for (u32 i = 0; i < kAtOnce; ++i)
            if (first + 32 * i + lane < tiles) scales[i] = get(first + 32 * i + lane);
#pragma unroll
        for (u32 i = 0; i < kAtOnce; ++i) set(first + 32 * i + lane, scales[i]);
    }
}

// A token's row and scales into its slot. Gives the end of them.
template <u32 kCount = kAhead>
__device__ __forceinline__ float* put(const Tokens& tokens, u32 token, u8* slot) {
    const u8* row = tokens.data + static_cast<i64>(token) * tokens.row_bytes;
    float* to = reinterpret_cast<float*>(slot + tokens.row_bytes);
    const float* from = tokens.scales + token * tokens.scale_row_stride;
    PieceOf<kCount> piece;
    piece.template load<true>(row, tokens.row_bytes);
    copy_scales(
        tokens.tiles, [&](u32 t) { return from[t * tokens.scale_tile_stride]; },
        [&](u32 t, float scale) {
            if (t < tokens.tiles) to[t] = scale;
        });
    for (u32 at = 0; at < tokens.row_bytes; at += piece.kBytes) {
        if (at) piece.template load<true>(row + at, tokens.row_bytes - at);
        piece.store(slot + at, tokens.row_bytes - at);
    }
    return to + tokens.tiles;
}

// A token's experts at one rank, and their weights.
__device__ __forceinline__ void put_routing(const Tokens& tokens, u32 token, u32 first_expert,
                                            u32 local_experts, float* routing) {
    const u32 lane = threadIdx.x % 32;
    if (lane >= tokens.topk) return;
    const u64 at = static_cast<u64>(token) * tokens.topk + lane;
    const u64 local = static_cast<u64>(tokens.topk_idx[at]) - first_expert;
    routing[2 * lane] = __int_as_float(local < local_experts ? static_cast<i32>(local) : -1);
    routing[2 * lane + 1] = tokens.topk_weights ? tokens.topk_weights[at] : 0.0f;
}

// A slot's row and scales into the rows of all lanes that have one. piece: the row's first.
template <u32 kCount>
__device__ __forceinline__ void spread(const Tokens& shape, const Received& out, const u8* slot, i32 row,
                                       PieceOf<kCount>& piece) {
    const u32 targets = __ballot_sync(kFullWarp, row >= 0);
    const float* scales = reinterpret_cast<const float*>(slot + shape.row_bytes);
    copy_scales(
        shape.tiles, [&](u32 t) { return scales[t]; },
        [&](u32 t, float scale) {
            for (u32 left = targets; left; left &= left - 1) {
                const u32 to = __shfl_sync(kFullWarp, row, __ffs(left) - 1);
                if (t < shape.tiles) out.scales[t * out.scale_stride + to] = scale;
            }
        });
    for (u32 at = 0; at < shape.row_bytes; at += piece.kBytes) {
        if (at) piece.template load<false>(slot + at, shape.row_bytes - at);
        for (u32 left = targets; left; left &= left - 1) {
            const u64 to = __shfl_sync(kFullWarp, row, __ffs(left) - 1);
            piece.store(out.data + to * shape.row_bytes + at, shape.row_bytes - at);
        }
    }
}

// One warp: the tokens of one channel to one destination, in the order of their slots.
template <bool kAgain>
__device__ __forceinline__ void send(const Call& call, const Workspace& theirs, u32 peer, u32 channel,
                                     Share share, u64 epoch) {
    const Tokens& tokens = call.from;
    const Rank& self = call.self;
    const u32 lane = threadIdx.x % 32;
    u64* tail = theirs.tail(self.rank, channel);
    u32 sent = 0;
    for (u32 next = share.first; next < share.last; next += 32) {
        i32 slots = -1;  // lane i: of token next + i
        if (next + lane < share.last)
            slots = tokens.sent_slot[static_cast<u64>(next + lane) * self.ranks + peer];
        for (u32 left = __ballot_sync(kFullWarp, slots >= 0); left; left &= left - 1) {
            const u32 i = __ffs(left) - 1, token = next + i;
            float* routing =
                put<kFarAhead>(tokens, token, theirs.slot(self.rank, __shfl_sync(kFullWarp, slots, i)));
            if (!kAgain) put_routing(tokens, token, peer * self.local_experts, self.local_experts, routing);
            if (++sent % kChunk == 0) publish(tail, epoch << 32 | sent);
        }
    }
    if (sent % kChunk) publish(tail, epoch << 32 | sent);
    const u32 routing = kAgain ? 0 : 8 * tokens.topk;
    self.count_sent(peer, channel, static_cast<u64>(sent) * (tokens.row_bytes + 4 * tokens.tiles + routing));
}

// All teams of a block, each its channel.
template <bool kAgain>
__device__ __forceinline__ bool send_channel(const Call& call, u32 peer, u32 channel, u64 epoch,
                                             u32* shared) {
    const Rank& self = call.self;
    const u32 lane = threadIdx.x % 32;
    const Share share(call.from.count, channel, call.to.channels);
    const Workspace theirs = self.workspace(peer);
    u32* counts = shared + peer * self.local_experts;
    u32* rows = shared + self.ranks * self.local_experts;
    u32 tokens = 0, bad = 0;
    if (!kAgain) {
        u32 mine;
        tokens = lay_out(call.from, self, share, peer, counts, mine, bad);
        if (lane == 0) rows[peer] = mine;
        __syncthreads();
    }
    const u64* ack = self.mine().ack(peer);
    if (self.wait_warp(ack, epoch - 1, Role::kSend, peer, channel) < epoch - 1) return false;
    if (kAgain) {
        if (lane == 0) theirs.announcement(self.rank, channel)->form = call.from.form;
    } else {
        announce(call, theirs, channel, tokens, share.first, bad, counts, rows);
        publish(theirs.tail(self.rank, channel), epoch << 32);
    }
    send<kAgain>(call, theirs, peer, channel, share, epoch);
    return true;
}

// One warp: the tokens of one source, in order. `next` is its part of what `plan` left.
template <bool kAgain, u32 kCount = kAhead>
__device__ __forceinline__ bool receive(const Call& call, u32 source, u32 channel, u64 epoch, u32* next) {
    const Rank& self = call.self;
    const Received& out = call.to;
    const Workspace mine = self.mine();
    const u32 lane = threadIdx.x % 32, topk = call.from.topk;
    const Announcement* said = mine.announcement(source, channel);
    i32* range = out.ranges + 2 * (source * out.channels + channel);
    if (!kAgain && lane == 0) {
        range[0] = said->first;
        range[1] = said->tokens;
    }
    const u32 first = kAgain ? range[0] : said->first, total = kAgain ? range[1] : said->tokens;
    if (total == kNothing) return true;
    u64 seen = 0;
    for (u32 i = 0; i < total; ++i) {
        const u64 expected = epoch << 32 | (i + 1);
        if (seen < expected)
            seen = self.wait_warp(mine.tail(source, channel), expected, Role::kReceive, self.writer(source),
                                  channel);
        if (seen < expected) return false;
        const u8* slot = mine.slot(source, first + i);
        i32* rows = out.rows + (static_cast<i64>(source) * mine.max_tokens + first + i) * topk;
        PieceOf<kCount> piece;  // on its way while the rows are looked up
        piece.template load<false>(slot, call.from.row_bytes);
        i32 row = -1;
        if (!kAgain) {
            const float* scales = reinterpret_cast<const float*>(slot + call.from.row_bytes);
            row = take_rows(call, scales + call.from.tiles, next, rows);
        } else {
            if (lane < topk) row = rows[lane];
            if (said->form != call.from.form) {
                if (lane == 0) record(call, ErrorCode::kDispatchForm, source, 0, said->form, call.from.form);
                return true;  // nothing of this source is read
            }
        }
        spread(call.from, out, slot, row, piece);
    }
    return true;
}

// Of shared memory. python: dsv3_kernels.ep.kernels.shape_of_launch
__device__ __forceinline__ u32 words_of_team(const Rank& self) {
    return self.ranks * self.local_experts + max(self.ranks, self.local_experts);
}

// All blocks of a rank; `block` is this one. A block has one or more teams, so that more accesses are under
// way.
template <bool kAgain>
__device__ __forceinline__ void run(const Call& call, u32 block, u32 blocks, u32* shared) {
    const Rank& self = call.self;
    const u64 epoch = self.epoch();
    const Team team{threadIdx.x % (32 * self.ranks), 32 * self.ranks};
    const u32 number = threadIdx.x / team.threads, teams = blockDim.x / team.threads;
    const u32 warp = team.thread / 32, lane = threadIdx.x % 32, channels = call.to.channels;
    const u32 first = block / 2 * teams + number;  // channel of this team
    u32* next = shared + number * words_of_team(self);
    u32* scratch = next + self.ranks * self.local_experts;
    bool kept = true, go = !kAgain || call.to.ranges[1] != kNothing;
    if (!kAgain && block % 2 == 1) {
        const u64 counted = epoch << 32;
        const Workspace mine = self.mine();
        forget(call, first, team);
        if (lane < channels && lane % teams == number)
            kept = self.wait(mine.tail(warp, lane), counted, Role::kReceive, warp, lane) >= counted;
        if (__syncthreads_or(!kept)) return;
        go = sound(call, mine, block / 2 * teams, shared);
        __syncthreads();
        if (go) plan(call, mine, first, next, scratch, team);
    }
    // A first dispatch has a team for each end of each channel.
    for (u32 channel = first; go && kept && channel < channels; channel += blocks / 2 * teams) {
        if (block % 2 == 0)
            kept = send_channel<kAgain>(call, warp, channel, epoch, next);
        else
            kept = receive<kAgain, kFarAhead>(call, warp, channel, epoch, next + warp * self.local_experts);
    }
    if (!__syncthreads_or(!kept)) finish(self, epoch, blocks);
}

}  // namespace dispatch

// Grid: num_sms blocks for each rank of the launch, num_sms even, all resident; 32 * ranks threads a team.
// Dynamic shared memory: 4 * words_of_team bytes a team. row_bytes is a multiple of 16, topk at most 32,
// channels num_sms / 2 * teams.
__global__ void __launch_bounds__(512, 1)
    dispatch_tokens(const __grid_constant__ PerRank<dispatch::Call> calls, u32 num_sms) {
    extern __shared__ u32 shared[];
    dispatch::run<false>(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms, shared);
}

// The same tokens' places, other rows. `channels` is that of the dispatch that left sent_slot, rows and
// ranges; teams take them in turn.
__global__ void __launch_bounds__(512, 1)
    dispatch_again(const __grid_constant__ PerRank<dispatch::Call> calls, u32 num_sms) {
    extern __shared__ u32 shared[];
    dispatch::run<true>(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms, shared);
}

}  // namespace dsv3
