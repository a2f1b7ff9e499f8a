// The first half of dispatch: which token goes to which slot, rank and row. A cached handle skips it.
//
// Senders count before they send. What a channel's announcements say, of all sources, lets every receiver
// compute the same: the first row of each (expert, source, channel), and so the final row of every
// (token, expert) before any token arrives; and whether the call is sound, before anything is written.
#pragma once

#include "channel.cuh"
#include "error.cuh"

namespace dsv3 {
namespace dispatch {

constexpr u32 kBatch = 4;          // tokens whose experts are read at once
constexpr u32 kCountsAtOnce = 16;  // channels whose counts are

// What is dispatched and how; all ranks pass the same. python: dsv3_kernels.ep.kernels.Form
enum Form : u32 { kFp8 = 1, kWeights = 2, kTokenOrder = 4 };

// The tokens to move, and where they go.
struct Tokens {
    const u8* data;       // [count, row_bytes]
    const float* scales;  // [count, tiles] of any strides, or null
    i64 scale_row_stride, scale_tile_stride;
    const i64* topk_idx;        // [count, topk]
    const float* topk_weights;  // [count, topk], or null
    i32* sent_slot;             // [count, ranks]: the slot of a token at each rank, or -1
    u32 count, row_bytes, tiles, topk, form;
};

// In expert order a row is a (token, expert), in token order a token.
struct Received {
    u8* data;       // [max_rows, row_bytes]
    float* scales;  // [tiles, scale_stride], MN-major
    i64 scale_stride;
    i64* topk_idx;        // [max_rows], in token order [max_rows, topk]: local experts
    float* topk_weights;  // the same, or null
    i32* group_offsets;   // [local_experts + 1]
    i32* rows;    // [ranks, max_tokens, topk]: the rows of each slot's token by ascending expert, then -1
    i32* ranges;  // [ranks, channels, 2]: first slot and number of tokens, or kNothing
    u32 max_rows, channels;
};

// Something wrong with the call, as every rank finds it: what `rank` passed. kDispatchExperts: value, at
// index of topk_idx. kDispatchForm: form value, where `rank` 0 or this one has form `expected`.
// kDispatchOverflow: value rows, more than `expected`. python: dsv3_kernels.ep.kernels.Fault
struct Fault {
    u64 code, rank, index, value, expected, recorded;
};

struct Call {
    Rank self;
    Tokens from;
    Received to;
    Fault* fault;
    u32* error;  // as in error.cuh
};

__device__ __forceinline__ void record(const Call& call, ErrorCode code, u32 rank, u64 index, u64 value,
                                       u64 expected) {
    report_error(call.error, code);
    if (ptx::fetch_add_device(&call.self.sequence->faults, 1) != 0) return;
    Fault* fault = call.fault;
    fault->code = static_cast<u64>(code);
    fault->rank = rank;
    fault->index = index;
    fault->value = value;
    fault->expected = expected;
    ptx::store_release_system(&fault->recorded, 1);
}

// One warp: its channel's tokens for one destination take slots in ascending order. Gives their number.
// counts: [local_experts] in shared memory. rows: how many they make there. bad: lane k's first choice that
// is out of range, or in its row already, as in Announcement.
__device__ __forceinline__ u32 lay_out(const Tokens& tokens, const Rank& self, Share share, u32 peer,
                                       u32* counts, u32& rows, u32& bad) {
    const u32 lane = threadIdx.x % 32, local_experts = self.local_experts;
    const i64 num_experts = self.ranks * local_experts;
    for (u32 e = lane; e < local_experts; e += 32) counts[e] = 0;
    __syncwarp();
    u32 total = 0;
    rows = bad = 0;
    for (u32 first = share.first; first < share.last; first += kBatch) {
        i64 experts[kBatch];
#pragma unroll
        for (u32 i = 0; i < kBatch; ++i) {
            const u64 at = static_cast<u64>(first + i) * tokens.topk + lane;
            experts[i] = lane < tokens.topk && first + i < share.last ? tokens.topk_idx[at] : -1;
        }
#pragma unroll
        for (u32 i = 0; i < kBatch; ++i) {
            const u32 token = first + i;
            if (token >= share.last) break;
            const i64 expert = experts[i];
            bool wrong = expert < -1 || expert >= num_experts;
            for (u32 k = 0; k + 1 < tokens.topk; ++k) {
                const i64 earlier = __shfl_sync(kFullWarp, expert, k);
                wrong |= lane > k && expert >= 0 && expert == earlier;
            }
            if (wrong && !bad) bad = token * tokens.topk + lane + 1;
            const u64 local = static_cast<u64>(expert) - peer * local_experts;
            const bool here = !wrong && local < local_experts;
            if (here) ++counts[local];  // a token's experts differ, so no two lanes meet
            const u32 copies = __popc(__ballot_sync(kFullWarp, here));
            if (lane == 0)
                tokens.sent_slot[static_cast<u64>(token) * self.ranks + peer] =
                    copies ? share.first + total : -1;
            total += copies != 0;
            rows += copies;
            __syncwarp();
        }
    }
    if (tokens.form & kTokenOrder) rows = total;
    return total;
}

// One warp: counts and announcement of its channel. rows: of each rank, in shared memory.
__device__ __forceinline__ void announce(const Call& call, const Workspace& theirs, u32 channel, u32 tokens,
                                         u32 first, u32 bad, const u32* counts, const u32* rows) {
    const Rank& self = call.self;
    const u32 lane = threadIdx.x % 32;
    u32* announced_counts = theirs.counts(self.rank, channel);
    for (u32 e = lane; e < self.local_experts; e += 32) announced_counts[e] = counts[e];
    Announcement* announced = theirs.announcement(self.rank, channel);
    if (lane < self.ranks) theirs.rows(self.rank, channel)[lane] = rows[lane];
    u32 first_bad = bad - 1;  // that none is wrong makes it the highest
    for (u32 other = 16; other; other /= 2)
        first_bad = min(first_bad, __shfl_xor_sync(kFullWarp, first_bad, other));
    if (lane == 0) {
        announced->tokens = tokens;
        announced->first = first;
        announced->form = call.from.form;
        announced->limit = call.to.max_rows;
        announced->bad = first_bad + 1;
    }
    if (bad && bad - 1 == first_bad) {
        const u64 value = call.from.topk_idx[first_bad];
        announced->value[0] = static_cast<u32>(value);
        announced->value[1] = static_cast<u32>(value >> 32);
    }
}

// The threads that serve one channel: a whole block, or one of several such groups in it.
struct Team {
    u32 thread, threads, barrier;

    __device__ __forceinline__ void sync() const {
        if (threads == 32)
            __syncwarp();
        else
            ptx::named_barrier_sync(barrier, threads);
    }
};

__device__ __forceinline__ Team whole_block() { return {threadIdx.x, blockDim.x, 0}; }

// One team, before anything can fail: the layout says that nothing came.
__device__ __forceinline__ void forget(const Call& call, u32 channel, Team team = whole_block()) {
    for (u32 source = team.thread; source < call.self.ranks; source += team.threads)
        call.to.ranges[2 * (source * call.to.channels + channel) + 1] = kNothing;
    if (channel == 0)
        for (u32 e = team.thread; e <= call.self.local_experts; e += team.threads)
            call.to.group_offsets[e] = 0;
}

// What one rank's announcements say, a lane a channel; one warp.
struct Said {
    const Announcement* at;  // lane c: in channel c
    u32 bad;                 // lanes whose channel has a wrong expert
    u64 rows;                // that come to the rank
    ErrorCode code;

    __device__ __forceinline__ Said(const Workspace& mine, u32 rank, u32 channels, u32 form) {
        const u32 lane = threadIdx.x % 32;
        at = mine.announcement(rank, min(lane, channels - 1));
        bad = __ballot_sync(kFullWarp, at->bad != 0);
        rows = 0;
        for (u32 source = 0; source < mine.ranks; ++source)
            if (lane < channels) rows += mine.rows(source, lane)[rank];
        for (u32 other = 16; other; other /= 2) rows += __shfl_xor_sync(kFullWarp, rows, other);
        code = rows > at->limit ? ErrorCode::kDispatchOverflow : ErrorCode::kNone;
        if (at->form != form) code = ErrorCode::kDispatchForm;
        if (bad) code = ErrorCode::kDispatchExperts;
    }
};

// One team, after all counts have come: whether the call is sound, on every rank alike. `found` is shared
// memory, [ranks].
__device__ __forceinline__ bool sound(const Call& call, const Workspace& mine, u32 channel, u32* found,
                                      Team team = whole_block()) {
    const u32 warp = team.thread / 32, warps = team.threads / 32, channels = call.to.channels;
    const u32 form = mine.announcement(0, 0)->form;
    for (u32 rank = warp; rank < mine.ranks; rank += warps) {
        const Said said(mine, rank, channels, form);
        if (threadIdx.x % 32 == 0) found[rank] = static_cast<u32>(said.code);
    }
    team.sync();
    // The first kind of fault that any rank has, and of that the first rank.
    u32 first = 0;
    for (u32 rank = 1; rank < mine.ranks; ++rank)
        if (found[rank] && (!found[first] || found[rank] < found[first])) first = rank;
    const bool any = found[first];
    team.sync();
    if (!any) return true;
    if (channel != 0 || warp != 0) return false;

    const Said said(mine, first, channels, form);
    if (threadIdx.x % 32 != (said.bad ? __ffs(said.bad) - 1 : 0)) return false;
    u64 index = 0, value = said.at->form, expected = form;
    if (said.code == ErrorCode::kDispatchExperts) {
        index = said.at->bad - 1;
        value = said.at->value[0] | static_cast<u64>(said.at->value[1]) << 32;
    } else if (said.code == ErrorCode::kDispatchOverflow) {
        value = said.rows;
        expected = said.at->limit;
    }
    record(call, said.code, first, index, value, expected);
    return false;
}

// One team, for its channel: the row that the next token there takes,
// next[source][local expert], in token order next[source][0]. starts: shared memory, [local_experts].
__device__ __forceinline__ void plan(const Call& call, const Workspace& mine, u32 channel, u32* next,
                                     u32* starts, Team team = whole_block()) {
    const u32 channels = call.to.channels;
    for (u32 e = team.thread; e < mine.local_experts; e += team.threads) {
        u32 running = 0;
        for (u32 source = 0; source < mine.ranks; ++source)
            for (u32 begin = 0; begin < channels; begin += kCountsAtOnce) {
                u32 counts[kCountsAtOnce];
#pragma unroll
                for (u32 i = 0; i < kCountsAtOnce; ++i)
                    counts[i] = begin + i < channels ? mine.counts(source, begin + i)[e] : 0;
#pragma unroll
                for (u32 i = 0; i < kCountsAtOnce; ++i) {
                    if (begin + i == channel) next[source * mine.local_experts + e] = running;
                    running += counts[i];
                }
            }
        starts[e] = running;
    }
    team.sync();
    if (team.thread < 32) {
        u32 running = 0;
        for (u32 base = 0; base <= mine.local_experts; base += 32) {
            const u32 e = base + team.thread, size = e < mine.local_experts ? starts[e] : 0;
            u32 end = size;  // of the lanes up to this one
            for (u32 below = 1; below < 32; below *= 2) {
                const u32 sum = __shfl_up_sync(kFullWarp, end, below);
                if (team.thread >= below) end += sum;
            }
            const u32 start = running + end - size;
            if (e < mine.local_experts) starts[e] = start;
            if (channel == 0 && e <= mine.local_experts) call.to.group_offsets[e] = start;
            running += __shfl_sync(kFullWarp, end, 31);
        }
    }
    team.sync();
    if (call.from.form & kTokenOrder) {
        if (team.thread == 0) {
            u32 running = 0;
            for (u32 source = 0; source < mine.ranks; ++source)
                for (u32 c = 0; c < channels; ++c) {
                    if (c == channel) next[source * mine.local_experts] = running;
                    running += mine.announcement(source, c)->tokens;
                }
        }
    } else {
        for (u32 i = team.thread; i < mine.ranks * mine.local_experts; i += team.threads)
            next[i] += starts[i % mine.local_experts];
    }
    team.sync();
}

// One warp: the rows of the token in a slot, which it takes and remembers. Lane k: that of choice k, or -1;
// in token order lane 0's is the only one. `routing`: (local expert, weight) of each choice.
__device__ __forceinline__ i32 take_rows(const Call& call, const float* routing, u32* next, i32* rows) {
    const u32 lane = threadIdx.x % 32, topk = call.from.topk;
    i32 local = -1;
    float weight = 0.0f;
    if (lane < topk) {
        local = __float_as_int(routing[2 * lane]);
        weight = routing[2 * lane + 1];
    }
    i32 row = -1;
    u32 place = lane;
    i64 at = 0;
    if (call.from.form & kTokenOrder) {
        const u32 taken = next[0];
        __syncwarp();
        if (lane == 0) {
            row = taken;
            next[0] = taken + 1;
        }
        at = static_cast<i64>(taken) * topk + lane;
    } else {
        if (local >= 0) at = row = next[local]++;
        // By ascending expert: this choice comes behind those with a lower one, and those with none last.
        place = 0;
        for (u32 k = 0; k < topk; ++k) {
            const i32 other = __shfl_sync(kFullWarp, local, k);
            place += other >= 0 ? local < 0 || other < local : local < 0 && k < lane;
        }
    }
    __syncwarp();
    if (lane < topk) {
        rows[place] = row;
        if (local >= 0 || call.from.form & kTokenOrder) {
            call.to.topk_idx[at] = local;
            if (call.to.topk_weights) call.to.topk_weights[at] = local < 0 ? 0.0f : weight;
        }
    }
    return row;
}

}  // namespace dispatch
}  // namespace dsv3
