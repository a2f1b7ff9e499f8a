// Dispatch within a node: every token once to each rank that holds one of its experts, there by expert or by
// token.
//
// Two teams of warps a channel, in neighbouring blocks: one sends a contiguous share of this rank's tokens, a
// warp for each destination; the other receives that channel, a warp for each source. Every block has teams
// of either kind. What goes where is in dispatch_layout.cuh, the protocol in channel.cuh. dispatch_again
// takes the layout of an earlier dispatch and moves rows and scales alone.
//
// A slot passes a warp's shared memory by bulk copies. A sender's lanes put scales and routing behind the row
// there; a receiver stores the row from there to each of its places.
//
// Bytes: a (token, rank): row + scales + 8 K written over NVLink, and read once there; a row that arrives:
// row + scales written.
#pragma once

#include "bulk.cuh"
#include "channel.cuh"
#include "dispatch_layout.cuh"

namespace dsv3 {
namespace dispatch {

constexpr u32 kChunk = 4;      // tokens that a tail announces at a time
constexpr u32 kMaxStages = 4;  // of a warp

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

__device__ __forceinline__ void put_scales(const Tokens& tokens, u32 token, float* to) {
    const float* scales = tokens.scales + token * tokens.scale_row_stride;
    copy_scales(
        tokens.tiles, [&](u32 t) { return scales[t * tokens.scale_tile_stride]; },
        [&](u32 t, float scale) {
            if (t < tokens.tiles) to[t] = scale;
        });
}

// A slot's scales to the rows of all lanes that have one.
__device__ __forceinline__ void spread_scales(const Tokens& shape, const Received& out, const float* scales,
                                              i32 row) {
    const u32 targets = __ballot_sync(kFullWarp, row >= 0);
    copy_scales(
        shape.tiles, [&](u32 t) { return scales[t]; },
        [&](u32 t, float scale) {
            for (u32 left = targets; left; left &= left - 1) {
                const u32 to = __shfl_sync(kFullWarp, row, __ffs(left) - 1);
                if (t < shape.tiles) out.scales[t * out.scale_stride + to] = scale;
            }
        });
}

// How slots lie in the stages of a warp: whole, or where they are too large in pieces, the last one first,
// for behind the row it has the rest.
struct Stages {
    u32 bytes;  // of a slot, so many as travel
    u32 piece;
    u32 before, room;  // shared memory: what lies before the first warp's stages, and of each warp

    __device__ __forceinline__ Stages(const Tokens& tokens, bool again, u32 words_before, u32 warps) {
        bytes = (tokens.row_bytes + 4 * tokens.tiles + (again ? 0 : 8 * tokens.topk) + 15) / 16 * 16;
        before = (4 * words_before + 15) / 16 * 16;
        room = (ptx::dynamic_shared_bytes() - before) / warps / 16 * 16;
        const u32 pieces = (bytes - 1) / (room - bulk::Ring::kBarrierBytes) + 1;
        piece = (bytes + 16 * pieces - 1) / (16 * pieces) * 16;
    }
    __device__ __forceinline__ bulk::Ring ring(u32* shared, u32 warp) const {
        const u32 fit = room / (piece + bulk::Ring::kBarrierBytes);
        return {reinterpret_cast<u8*>(shared) + before + warp * room, min(fit, kMaxStages), piece};
    }
    // Of the piece that ends there.
    __device__ __forceinline__ u32 begin(u32 end) const { return end > piece ? end - piece : 0; }
};

// One warp: the tokens of one channel to one destination, in the order of their slots.
template <bool kAgain>
__device__ __forceinline__ void send(const Call& call, bulk::Ring& ring, const Stages& stages,
                                     const Workspace& theirs, u32 peer, u32 channel, Share share, u64 epoch) {
    const Tokens& tokens = call.from;
    const Rank& self = call.self;
    const u32 lane = threadIdx.x % 32;
    u64* tail = theirs.tail(self.rank, channel);
    u32 sent = 0;
    for (u32 next = share.first; next < share.last; next += 32) {
        i32 slots = -1;  // lane i: of token next + i
        if (next + lane < share.last)
            slots = tokens.sent_slot[static_cast<u64>(next + lane) * self.ranks + peer];
        u32 left = __ballot_sync(kFullWarp, slots >= 0);
        u32 to_load = left, load_end = stages.bytes, under_way = 0;
        for (; left; left &= left - 1) {
            const u32 i = __ffs(left) - 1, token = next + i;
            u8* slot = theirs.slot(self.rank, __shfl_sync(kFullWarp, slots, i));
            for (u32 end = stages.bytes, begin; end; end = begin) {
                for (; under_way < ring.stages() && to_load; ++under_way) {
                    const u8* row =
                        tokens.data + static_cast<u64>(next + __ffs(to_load) - 1) * tokens.row_bytes;
                    const u32 load_begin = stages.begin(load_end);
                    bulk::stores_read();
                    ring.load(row + load_begin, min(load_end, tokens.row_bytes) - load_begin);
                    load_end = load_begin;
                    if (load_begin) continue;
                    load_end = stages.bytes;
                    to_load &= to_load - 1;
                }
                begin = stages.begin(end);
                if (end == stages.bytes) {
                    float* rest = reinterpret_cast<float*>(ring.coming() + tokens.row_bytes - begin);
                    put_scales(tokens, token, rest);
                    rest += tokens.tiles;
                    if (!kAgain) {
                        put_routing(tokens, token, peer * self.local_experts, self.local_experts, rest);
                        rest += 2 * tokens.topk;
                    }
                    const u8* stage_end = ring.coming() + end - begin;
                    if (reinterpret_cast<u8*>(rest + lane) < stage_end) rest[lane] = 0.0f;
                }
                u8* stage = ring.wait();
                --under_way;
                bulk::lanes_done();
                bulk::store(slot + begin, stage, end - begin);
                bulk::commit();
            }
            if (++sent % kChunk || sent == kChunk) continue;
            bulk::stores_done<kChunk>();  // a token has a store or more
            publish(tail, epoch << 32 | (sent - kChunk));
        }
    }
    bulk::stores_done();
    if (sent) publish(tail, epoch << 32 | sent);
    const u32 routing = kAgain ? 0 : 8 * tokens.topk;
    self.count_sent(peer, channel, static_cast<u64>(sent) * (tokens.row_bytes + 4 * tokens.tiles + routing));
}

// One team, a warp a destination. shared: [words_of_team].
template <bool kAgain>
__device__ __forceinline__ bool send_channel(const Call& call, bulk::Ring& ring, const Stages& stages,
                                             Team team, u32 channel, u64 epoch, u32* shared) {
    const Rank& self = call.self;
    const u32 lane = threadIdx.x % 32, peer = team.thread / 32;
    const Share share(call.from.count, channel, call.to.channels);
    const Workspace theirs = self.workspace(peer);
    u32* counts = shared + peer * self.local_experts;
    u32* rows = shared + self.ranks * self.local_experts;
    u32 tokens = 0, bad = 0;
    if (!kAgain) {
        u32 mine;
        tokens = lay_out(call.from, self, share, peer, counts, mine, bad);
        if (lane == 0) rows[peer] = mine;
        team.sync();
    }
    const u64* ack = self.mine().ack(peer);
    if (self.wait_warp(ack, epoch - 1, Role::kSend, peer, channel) < epoch - 1) return false;
    bulk::acquired();
    if (kAgain && lane == 0) theirs.announcement(self.rank, channel)->form = call.from.form;
    if (!kAgain) announce(call, theirs, channel, tokens, share.first, bad, counts, rows);
    publish(theirs.tail(self.rank, channel), epoch << 32);
    send<kAgain>(call, ring, stages, theirs, peer, channel, share, epoch);
    return true;
}

// One warp: the tokens of one source, in order. `next` is its part of what `plan` left.
template <bool kAgain>
__device__ __forceinline__ bool receive(const Call& call, bulk::Ring& ring, const Stages& stages, u32 source,
                                        u32 channel, u64 epoch, u32* next) {
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
    if (kAgain) {  // from whom no rows come, too: so all ranks find what differs
        const u64 begun = epoch << 32;
        seen =
            self.wait_warp(mine.tail(source, channel), begun, Role::kReceive, self.writer(source), channel);
        if (seen < begun) return false;
        if (said->form != call.from.form) {
            if (lane == 0) record(call, ErrorCode::kDispatchForm, source, 0, said->form, call.from.form);
            return true;  // nothing of this source is read
        }
        bulk::acquired();
    }
    u32 loading = 0, load_end = stages.bytes, under_way = 0;
    for (u32 i = 0; i < total; ++i) {
        i32* rows = out.rows + (static_cast<i64>(source) * mine.max_tokens + first + i) * topk;
        i32 row = -1;
        if (kAgain && lane < topk) row = rows[lane];
        for (u32 end = stages.bytes, begin; end; end = begin) {
            for (; under_way < ring.stages() && loading < total; ++under_way) {
                const u64 expected = epoch << 32 | (loading + 1);
                if (seen < expected) {
                    if (under_way) break;
                    seen = self.wait_warp(mine.tail(source, channel), expected, Role::kReceive,
                                          self.writer(source), channel);
                    if (seen < expected) return false;
                    bulk::acquired();
                }
                const u32 load_begin = stages.begin(load_end);
                bulk::stores_read();
                ring.load(mine.slot(source, first + loading) + load_begin, load_end - load_begin);
                load_end = load_begin;
                if (load_begin) continue;
                load_end = stages.bytes;
                ++loading;
            }
            begin = stages.begin(end);
            const u8* stage = ring.wait();
            --under_way;
            if (end == stages.bytes) {
                const float* scales = reinterpret_cast<const float*>(stage + call.from.row_bytes - begin);
                if (!kAgain) row = take_rows(call, scales + call.from.tiles, next, rows);
                spread_scales(call.from, out, scales, row);
            }
            for (u32 left = __ballot_sync(kFullWarp, row >= 0); left; left &= left - 1) {
                const u64 to = __shfl_sync(kFullWarp, row, __ffs(left) - 1);
                bulk::store(out.data + to * call.from.row_bytes + begin, stage,
                            min(end, call.from.row_bytes) - begin);
            }
            bulk::commit();
        }
    }
    return true;
}

// Of shared memory. python: dsv3_kernels.ep.kernels.shape_of_launch
__device__ __forceinline__ u32 words_of_team(const Rank& self) {
    return self.ranks * self.local_experts + max(self.ranks, self.local_experts);
}

// One team, once its channel's and all other counts have come: the rows to take, or nothing at all. `kept`:
// whether they came.
__device__ __forceinline__ bool prepare(const Call& call, u32 channel, u64 epoch, u32* next, Team team,
                                        bool& kept) {
    const Rank& self = call.self;
    const Workspace mine = self.mine();
    const u32 lane = threadIdx.x % 32, warp = team.thread / 32;
    const u64 counted = epoch << 32;
    u32* scratch = next + self.ranks * self.local_experts;
    forget(call, channel, team);
    if (lane < call.to.channels)
        kept = self.wait(mine.tail(warp, lane), counted, Role::kReceive, warp, lane) >= counted;
    kept = __all_sync(kFullWarp, kept);
    if (lane == 0) scratch[warp] = kept;
    team.sync();
    for (u32 source = 0; source < self.ranks; ++source) kept &= scratch[source] != 0;
    team.sync();
    if (!kept || !sound(call, mine, channel, scratch, team)) return false;
    plan(call, mine, channel, next, scratch, team);
    return true;
}

// All blocks of a rank; `block` is this one. A block has one or more teams, so that more accesses are under
// way.
template <bool kAgain>
__device__ __forceinline__ void run(const Call& call, u32 block, u32 blocks, u32* shared) {
    const Rank& self = call.self;
    const u64 epoch = self.epoch();
    const u32 number = threadIdx.x / (32 * self.ranks), teams = blockDim.x / (32 * self.ranks);
    const Team team{threadIdx.x % (32 * self.ranks), 32 * self.ranks, 1 + number};
    const u32 warp = team.thread / 32, channels = call.to.channels;
    const u32 first = block / 2 * teams + number;  // channel of this team
    u32* words = shared + number * words_of_team(self);
    const Stages stages(call.from, kAgain, teams * words_of_team(self), blockDim.x / 32);
    bulk::Ring ring = stages.ring(shared, threadIdx.x / 32);
    const bool sender = sends(block, number, self.ranks);
    bool kept = true, go = !kAgain || call.to.ranges[1] != kNothing;
    if (!kAgain && !sender) go = prepare(call, first, epoch, words, team, kept);
    // A first dispatch has a team for each end of each channel.
    for (u32 channel = first; go && kept && channel < channels; channel += blocks / 2 * teams) {
        if (sender)
            kept = send_channel<kAgain>(call, ring, stages, team, channel, epoch, words);
        else
            kept =
                receive<kAgain>(call, ring, stages, warp, channel, epoch, words + warp * self.local_experts);
    }
    bulk::stores_read();
    if (!__syncthreads_or(!kept)) finish(self, epoch, blocks);
}

}  // namespace dispatch

// Grid: num_sms blocks for each rank of the launch, num_sms even, all resident; 32 * ranks threads a team.
// Dynamic shared memory: 4 * words_of_team bytes a team. row_bytes is a multiple of 16, topk at most 32,
// channels num_sms / 2 * teams.
__global__ void __launch_bounds__(512, 1)
    dispatch_tokens(const __grid_constant__ PerRank<dispatch::Call> calls, u32 num_sms) {
    extern __shared__ __align__(16) u32 shared[];
    dispatch::run<false>(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms, shared);
}

// The same tokens' places, other rows. `channels` is that of the dispatch that left sent_slot, rows and
// ranges; teams take them in turn.
__global__ void __launch_bounds__(512, 1)
    dispatch_again(const __grid_constant__ PerRank<dispatch::Call> calls, u32 num_sms) {
    extern __shared__ __align__(16) u32 shared[];
    dispatch::run<true>(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms, shared);
}

}  // namespace dsv3
