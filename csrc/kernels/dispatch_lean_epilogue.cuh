// Dispatch across nodes on few SMs, second launch: what came into the slots of this rank, in the rows that
// the experts read. It starts when dispatch_lean has ended, so that it waits for nobody and may take all SMs.
//
// A block has one channel and some of the ranks that sent. From all counts it learns whether the call is
// sound and where the rows of its streams begin; a warp a stream gives each token its rows; then its warps
// copy tokens in turn, by bulk copies through shared memory. The layout is that of dispatch_internode.cuh.
//
// Bytes: a (token, rank): message read; a row that arrives: row + scales written.
#pragma once

#include "dispatch_lean_channel.cuh"

namespace dsv3 {
namespace dispatch {

// A block's shared memory, in words. python: dsv3_kernels.ep.lean_dispatch
struct Plan {
    u32 *next, *totals, *sizes;  // [ranks * local experts] twice, [local experts or ranks]

    __device__ __forceinline__ Plan(u32* words, const Rank& self)
        : next(words), totals(next + self.ranks * self.local_experts), sizes(totals + (totals - next)) {}

    __device__ __forceinline__ static u32 words(const Rank& self) {
        return 2 * self.ranks * self.local_experts + max(self.ranks, self.local_experts);
    }

    // All threads: the row that the next token of a source takes in this channel, next[source][local expert],
    // in token order next[source][0]. `writes`: group_offsets too.
    __device__ __forceinline__ void make(const Call& call, const Workspace& mine, u32 channel, bool writes) {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
        const u32 channels = call.to.channels, local = mine.local_experts;
        const bool by_token = call.from.form & kTokenOrder;
        for (u32 i = warp; i < mine.ranks * local; i += warps) {
            const u32 came = lane < channels ? mine.counts(i / local, lane)[i % local] : 0;
            const u32 before = __reduce_add_sync(kFullWarp, lane < channel ? came : 0);
            const u32 all = __reduce_add_sync(kFullWarp, came);
            if (lane == 0) next[i] = before, totals[i] = all;
        }
        __syncthreads();
        for (u32 e = threadIdx.x; e < local; e += blockDim.x) {
            u32 running = 0;
            for (u32 i = e; i < mine.ranks * local; i += local) {
                next[i] += running;
                running += totals[i];
            }
            sizes[e] = running;
        }
        __syncthreads();
        if (warp == 0) start(call, local, writes);
        __syncthreads();
        for (u32 i = threadIdx.x; !by_token && i < mine.ranks * local; i += blockDim.x)
            next[i] += sizes[i % local];
        u32 running = 0;
        for (u32 source = 0; by_token && warp == 0 && source < mine.ranks; ++source) {
            const u32 came = lane < channels ? mine.announcement(source, lane)->tokens : 0;
            const u32 before = __reduce_add_sync(kFullWarp, lane < channel ? came : 0);
            if (lane == 0) next[source * local] = running + before;
            running += __reduce_add_sync(kFullWarp, came);
        }
        __syncthreads();
    }

  private:
    // One warp: sizes of groups to where they begin.
    __device__ __forceinline__ void start(const Call& call, u32 local, bool writes) {
        const u32 lane = threadIdx.x % 32;
        u32 begin = 0;
        for (u32 first = 0; first < local; first += 32) {
            const u32 e = first + lane, size = e < local ? sizes[e] : 0;
            u32 end = size;
            for (u32 reach = 1; reach < 32; reach *= 2) {
                const u32 below = __shfl_up_sync(kFullWarp, end, reach);
                if (lane >= reach) end += below;
            }
            if (e < local) {
                sizes[e] = begin + end - size;
                if (writes) call.to.group_offsets[e] = begin + end - size;
            }
            begin += __shfl_sync(kFullWarp, end, 31);
        }
        if (writes && lane == 0) call.to.group_offsets[local] = begin;
    }
};

// The slots of one source in one channel, as this rank received them.
struct Stream {
    const LeanCall& all;
    const Message& message;
    const Workspace& mine;
    u32 source, first, total;

    __device__ __forceinline__ Stream(const LeanCall& all, const Message& message, const Workspace& mine,
                                      u32 source, u32 channel)
        : all(all), message(message), mine(mine), source(source) {
        const i32* range = all.call.to.ranges + 2 * (source * all.layout.channels + channel);
        first = range[0];
        total = range[1];
    }

    __device__ __forceinline__ const u8* slot(u32 i) const { return mine.slot(source, first + i); }
    __device__ __forceinline__ i32* rows(u32 i) const {
        return all.call.to.rows +
               (static_cast<i64>(source) * mine.max_tokens + first + i) * all.call.from.topk;
    }
};

// One warp: the rows of a stream's tokens, which are written down with their experts and weights. A step
// takes as many tokens as have lanes for all their choices, kBatch steps are read at once. next: its part of
// Plan's.
__device__ __forceinline__ void take_rows(const Stream& s, u32* next) {
    const Call& call = s.all.call;
    const u32 lane = threadIdx.x % 32, topk = call.from.topk, tokens = 32 / topk;
    const u32 token = lane / topk, k = lane % topk, local = call.self.local_experts;
    const bool by_token = call.from.form & kTokenOrder;
    for (u32 base = 0; base < s.total; base += kBatch * tokens) {
        i32 experts[kBatch];
        float weights[kBatch];
#pragma unroll
        for (u32 b = 0; b < kBatch; ++b) {
            const u32 i = base + b * tokens + token;
            experts[b] = -1;
            if (token >= tokens || i >= s.total) continue;
            const float* routing = reinterpret_cast<const float*>(s.slot(i)) + 2 * k;
            const u32 expert = __float_as_int(routing[0]) - call.self.rank * local;
            weights[b] = routing[1];
            if (expert < local) experts[b] = static_cast<i32>(expert);
        }
#pragma unroll
        for (u32 b = 0; b < kBatch; ++b) {
            const u32 i = base + b * tokens + token;
            const i32 expert = experts[b];
            i32 row = -1;
            i64 at = 0;
            u32 place = k;
            if (by_token) {
                at = static_cast<i64>(next[0] + i) * topk + k;
                if (k == 0) row = next[0] + i;
            } else {
                const u32 same = __match_any_sync(kFullWarp, expert);
                if (expert >= 0) at = row = next[expert] + __popc(same & ((1u << lane) - 1));
                __syncwarp();
                if (expert >= 0 && lane + 1 == __ffs(same)) next[expert] += __popc(same);
                __syncwarp();
                // By ascending expert: this choice comes behind those with a lower one, and none last.
                place = 0;
                for (u32 j = 0; j < topk; ++j) {
                    const i32 other = __shfl_sync(kFullWarp, expert, token * topk + j);
                    place += other >= 0 ? expert < 0 || other < expert : expert < 0 && j < k;
                }
            }
            if (token >= tokens || i >= s.total) continue;
            s.rows(i)[place] = row;
            if (expert < 0 && !by_token) continue;
            call.to.topk_idx[at] = expert;
            if (call.to.topk_weights) call.to.topk_weights[at] = expert < 0 ? 0.0f : weights[b];
        }
    }
}

// One warp: every `step`th token of a stream, from number `from` on, into its rows.
__device__ __forceinline__ void copy_rows(const Stream& s, u32 from, u32 step, bulk::Ring& ring) {
    const Received& out = s.all.call.to;
    const Tokens& shape = s.all.call.from;
    const Message& m = s.message;
    const u32 lane = threadIdx.x % 32;
    Message body = m;  // without its routing
    body.bytes -= m.routing_bytes;
    Cursor next{from};
    const auto load = [&] {
        if (next.item >= s.total) return;
        const u32 item = next.item;
        ring.load(s.slot(item) + m.routing_bytes + next.begin, next.end(body) - next.begin);
        next.advance(body);
        if (next.item != item) next.item = item + step;
    };
    bulk::stores_read();
    for (u32 i = 1; i < ring.stages(); ++i) load();
    i32 after = from < s.total && lane < shape.topk ? s.rows(from)[lane] : -1;
    for (u32 i = from; i < s.total; i += step) {
        const i32 row = after;
        if (i + step < s.total && lane < shape.topk) after = s.rows(i + step)[lane];
        const u32 targets = __ballot_sync(kFullWarp, row >= 0);
        for (Cursor at{i}; at.item == i; at.advance(body)) {
            const u32 end = at.end(body), row_end = min(end, shape.row_bytes);
            const u8* stage = ring.wait();
            for (u32 left = targets; left; left &= left - 1) {
                const u64 to = __shfl_sync(kFullWarp, row, __ffs(left) - 1);
                if (row_end > at.begin)
                    bulk::store(out.data + to * shape.row_bytes + at.begin, stage, row_end - at.begin);
                for (u32 t = lane; t < shape.tiles; t += 32) {
                    const u32 byte = shape.row_bytes + 4 * t;
                    if (byte >= at.begin && byte < end)
                        out.scales[t * out.scale_stride + to] =
                            reinterpret_cast<const float*>(stage)[(byte - at.begin) / 4];
                }
            }
            bulk::commit();
            bulk::stores_read<1>();
            load();
        }
    }
}

// All blocks of a rank; `block` is this one. A channel has several where there are more blocks than channels;
// else blocks take channels in turn.
template <bool kAgain>
__device__ __forceinline__ void put_in_order(const LeanCall& all, u32 block, u32 blocks, u32 moved,
                                             Pieces pieces, u8* shared) {
    const Call& call = all.call;
    const Rank& self = call.self;
    const Message m{all.message_bytes, all.routing_bytes, pieces};
    const Workspace mine = self.mine();
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32, channels = all.layout.channels;
    bulk::Ring ring(shared + warp * pieces.bytes_of_warp(), pieces.stages, pieces.bytes);
    Plan plan(reinterpret_cast<u32*>(shared + warps * pieces.bytes_of_warp()), self);
    ptx::grid_dependency_wait();
    // Blocks of the first launch that have kept the protocol: else not all has come.
    if (ptx::load_acquire_system(&self.sequence->finished_blocks) < moved) return;
    const u64 epoch = self.epoch();
    bool go = !kAgain || call.to.ranges[1] != kNothing;
    if (!kAgain) go = sound(call, mine, block, plan.sizes);
    __syncthreads();
    const u32 parts = max(1u, blocks / channels);
    for (u32 unit = block; go && unit < parts * channels; unit += blocks) {
        const u32 channel = unit % channels, part = unit / channels;
        if (!kAgain) {
            plan.make(call, mine, channel, unit == 0);
            for (u32 source = part + warp * parts; source < self.ranks; source += warps * parts) {
                const Announcement* said = mine.announcement(source, channel);
                i32* range = call.to.ranges + 2 * (source * channels + channel);
                if (threadIdx.x % 32 == 0) range[0] = said->first, range[1] = said->tokens;
                __syncwarp();
                take_rows(Stream(all, m, mine, source, channel), plan.next + source * self.local_experts);
            }
        }
        __syncthreads();
        u32 before = 0;  // tokens of the streams before, so that all warps have as many
        for (u32 source = part; source < self.ranks; source += parts) {
            const Stream s(all, m, mine, source, channel);
            const u32 form = mine.announcement(source, channel)->form;
            if (kAgain && form != call.from.form) {
                if (threadIdx.x == 0) record(call, ErrorCode::kDispatchForm, source, 0, form, call.from.form);
                continue;
            }
            copy_rows(s, (warp + warps - before % warps) % warps, warps, ring);
            before += s.total;
        }
    }
    bulk::stores_done();
    __syncthreads();
    Rank on_node = self;
    on_node.ranks = self.gpus;
    finish(on_node, epoch, moved + blocks);
}

}  // namespace dispatch

// Grid: `blocks` of them for each rank of the launch, behind dispatch_lean of the same call, which had
// `moved` of them, and dependent on it. Whole warps, at most 512 threads. Dynamic shared memory: a warp's
// stages, then 4 * Plan::words bytes.
template <bool kAgain>
__global__ void __launch_bounds__(512, 1)
    dispatch_lean_epilogue(const __grid_constant__ PerRank<dispatch::LeanCall> calls, u32 blocks, u32 moved,
                           u32 piece_bytes, u32 stages) {
    extern __shared__ __align__(128) u8 shared[];
    dispatch::put_in_order<kAgain>(calls.of[blockIdx.x / blocks], blockIdx.x % blocks, blocks, moved,
                                   {piece_bytes, stages}, shared);
}

}  // namespace dsv3
