// Low-latency dispatch: quantise a token once, and write its row to the rank of each of its experts. Included
// by low_latency.cuh, which says the protocol.
//
// Every block counts the routing of all tokens: so it knows the slot of each of its own without asking, and
// tokens arrive in order. Bytes: a (token, expert): row and scales over a link, read and written once there.
#pragma once

namespace dsv3 {
namespace low_latency {

struct Routing {
    const i64* topk_idx;  // [tokens, topk]
    i32* places;          // [tokens, topk, 2]: expert, or -1 for none; place among this rank's pairs
    u64* sent_rows;       // [experts], zeros between launches: rows of each expert that are on their way
};

// A warp, each lane with choice k of a token, those of a token side by side: the expert of this lane's, or -1
// for one that is none, out of range, or in its token's row already. The last two set `bad`.
__device__ __forceinline__ i32 choice(const Call& call, const Routing& routing, u32 token, u32 k, bool inside,
                                      bool& bad) {
    const i64 expert = inside ? routing.topk_idx[token * call.topk + k] : -1;
    bad = expert < -1 || expert >= static_cast<i64>(call.experts());
    const i32 mine = bad ? -1 : static_cast<i32>(expert);
    for (u32 step = 1; step < call.topk; ++step) {
        const i32 earlier = __shfl_up_sync(kFullWarp, mine, step);
        bad |= k >= step && mine >= 0 && earlier == mine;
    }
    return bad ? -1 : mine;
}

// One lane.
__device__ __forceinline__ void report(const Call& call, const Routing& routing, u32 index, Fault* fault) {
    if (ptx::fetch_add_device(&call.progress->faults, 1) != 0) return;
    fault->index = index;
    fault->value = routing.topk_idx[index];
    ptx::store_release_system(&fault->recorded, 1);
}

// What a block knows of the routing; in its shared memory.
struct Plan {
    u32 *total, *first, *next;  // [experts]: rows of the expert; its first place; the slot its next row takes
    u8** targets;               // [2][topk + 1]: slots of a token in mapped memory, then where it is staged
    i32* expert;                // [2][topk]
    u32* slot;                  // [2][topk], of (local expert, source)

    __device__ __forceinline__ Plan(u32* shared, u32 experts, u32 topk)
        : total(shared),
          first(shared + experts),
          next(shared + 2 * experts),
          targets(reinterpret_cast<u8**>(shared + 3 * experts + experts % 2)),
          expert(reinterpret_cast<i32*>(targets + 2 * (topk + 1))),
          slot(reinterpret_cast<u32*>(expert + 2 * topk)) {}
};

// By a whole block, with a barrier at the end: rows of each expert, and of those that come before this
// block's tokens. The first warp then adds up.
__device__ __forceinline__ void count(const Call& call, const Routing& routing, const Plan& plan,
                                      u32 first_token, Fault* fault) {
    const u32 lane = threadIdx.x % 32, experts = call.experts();
    for (u32 e = threadIdx.x; e < experts; e += blockDim.x) plan.total[e] = plan.next[e] = 0;
    __syncthreads();
    const u32 tokens_of_warp = 32 / call.topk, k = lane % call.topk;
    const u32 stride = blockDim.x / 32 * tokens_of_warp;
    for (u32 base = threadIdx.x / 32 * tokens_of_warp; base < call.tokens; base += stride) {
        const u32 token = base + lane / call.topk;
        const bool inside = lane < tokens_of_warp * call.topk && token < call.tokens;
        bool bad;
        const i32 expert = choice(call, routing, token, k, inside, bad);
        if (bad) report(call, routing, token * call.topk + k, fault);
        if (expert < 0) continue;
        atomicAdd(plan.total + expert, 1u);
        if (token < first_token) atomicAdd(plan.next + expert, 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        u32 before = 0;
        for (u32 base = 0; base < experts; base += 32) {
            const u32 mine = base + lane < experts ? plan.total[base + lane] : 0;
            u32 sum = mine;
#pragma unroll
            for (u32 step = 1; step < 32; step *= 2) {
                const u32 lower = __shfl_up_sync(kFullWarp, sum, step);
                if (lane >= step) sum += lower;
            }
            if (base + lane < experts) plan.first[base + lane] = before + sum - mine;
            before += __shfl_sync(kFullWarp, sum, 31);
        }
    }
}

// One lane: the rows of `expert` are all on their way.
__device__ __forceinline__ void announce(const Call& call, const Plan& plan, u32 expert) {
    const u64 word = call.epoch << 32 | plan.first[expert] << 16 | plan.total[expert];
    const u32 local = expert % call.local_experts;
    call.peers.set(call.area.flag(local * call.peers.ranks + call.peers.rank), word,
                   expert / call.local_experts, expert);
}

// The first warp: where a token goes. Plan's entries of `turn`; of the last turn others may still read.
__device__ __forceinline__ void aim(const Call& call, const Routing& routing, const Plan& plan, u32 token,
                                    u32 turn, u32 lane) {
    u8* target = nullptr;
    bool far = false, bad;
    const i32 expert = choice(call, routing, token, lane, lane < call.topk, bad);
    if (lane < call.topk) {
        i32 place = -1;
        if (expert >= 0) {
            const u32 slot = plan.next[expert]++;  // a token's experts differ, so no two lanes meet
            const u32 local = expert % call.local_experts;
            place = plan.first[expert] + slot;
            const u32 at = (local * call.peers.ranks + call.peers.rank) * call.max_tokens + slot;
            plan.slot[turn * call.topk + lane] = at;
            const u32 peer = expert / call.local_experts;
            far = call.peers.far(peer);
            if (!far) target = call.peers.mapped[peer] + call.area.slot(at);
        }
        plan.expert[turn * call.topk + lane] = expert;
        plan.targets[turn * (call.topk + 1) + lane] = target;
        routing.places[2 * (token * call.topk + lane)] = expert;
        routing.places[2 * (token * call.topk + lane) + 1] = place;
    }
    far = __any_sync(kFullWarp, far);
    if (lane == 0)
        plan.targets[turn * (call.topk + 1) + call.topk] =
            far ? call.own(call.area.staged(token, call.max_tokens)) : nullptr;
}

// A whole block: a token's row, quantised if kFormat says so, to all its targets.
template <Format kFormat>
__device__ __forceinline__ void write_row(const Call& call, const u8* x, u32 token, u8* const* targets) {
    constexpr u32 kValues = quantize::kValuesOfLane;
    const u32 lane = threadIdx.x % 32;
    const u32 tiles = (call.hidden + quantize::kTile - 1) / quantize::kTile;
    const u32 pieces = tiles * quantize::kLanesOfTile;
    for (u32 piece = threadIdx.x; piece - lane < pieces; piece += blockDim.x) {
        const u32 column = piece * kValues;
        const bool inside = column < call.hidden;
        const u8* from = x + 2 * (static_cast<u64>(token) * call.hidden + column);
        const U32x4 zero{0, 0, 0, 0};
        const U32x4 low = inside ? ptx::load_global_nc(from) : zero;
        const U32x4 high = inside ? ptx::load_global_nc(from + 16) : zero;
        U32x4 codes = low;
        float scale = 0.0f;
        if constexpr (kFormat != Format::kBf16) {
            float values[kValues];
            quantize::widen(quantize::words(low), values, Bf16{});
            quantize::widen(quantize::words(high), values + kColumns, Bf16{});
            codes = quantize::encode_across_lanes < kFormat == Format::kFp8PowerOf2,
            quantize::kCorrections < Bf16 >> (values, scale);
        }
        for (u32 k = 0; k <= call.topk; ++k) {
            u8* to = targets[k];
            if (to == nullptr) continue;
            if constexpr (kFormat == Format::kBf16) {
                if (inside) {
                    ptx::store_global(to + 2 * column, low);
                    ptx::store_global(to + 2 * column + 16, high);
                }
            } else {
                if (inside) ptx::store_global(to + column, codes);
                if (piece < pieces && piece % quantize::kLanesOfTile == 0)
                    ptx::store_global(
                        reinterpret_cast<float*>(to + call.hidden) + piece / quantize::kLanesOfTile, scale);
            }
        }
    }
}

// x is BF16 [tokens, hidden]. Sends all of it, and the flag of every expert.
__device__ __forceinline__ bool dispatch_send(const Call& call, const Routing& routing, Fault* fault,
                                              const u8* x, Format format) {
    extern __shared__ u32 shared[];
    const Plan plan(shared, call.experts(), call.topk);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const bool quantised = format != Format::kBf16;
    const u32 row_bytes = quantised ? call.hidden : 2 * call.hidden;
    const u32 tiles = quantised ? (call.hidden + quantize::kTile - 1) / quantize::kTile : 0;
    const u32 share = (call.tokens + call.block.count - 1) / call.block.count;
    const u32 first = min(call.block.index * share, call.tokens), last = min(first + share, call.tokens);

    count(call, routing, plan, first, fault);
    bool kept = true;
    if (warp == warps - 1) kept = wait_for_readers(call, lane);
    if (__syncthreads_or(!kept)) return false;

    for (u32 e = 32 * call.warp() + lane; e < call.experts(); e += 32 * call.warps())
        if (plan.total[e] == 0) announce(call, plan, e);

    for (u32 token = first; token < last; ++token) {
        const u32 turn = token % 2;
        if (warp == 0) aim(call, routing, plan, token, turn, lane);
        __syncthreads();
        u8* const* targets = plan.targets + turn * (call.topk + 1);
        if (format == Format::kBf16)
            write_row<Format::kBf16>(call, x, token, targets);
        else if (format == Format::kFp8)
            write_row<Format::kFp8>(call, x, token, targets);
        else
            write_row<Format::kFp8PowerOf2>(call, x, token, targets);
        __syncthreads();
        for (u32 k = warp; k < call.topk; k += warps) {
            const i32 expert = plan.expert[turn * call.topk + k];
            if (expert < 0) continue;
            if (targets[k] == nullptr)
                call.peers.put(call.area.slot(plan.slot[turn * call.topk + k]),
                               call.area.staged(token, call.max_tokens), row_bytes + 4 * tiles,
                               expert / call.local_experts, expert);
            __syncwarp();
            // Whoever sends the last row has acquired that all others are on their way.
            if (lane == 0 && ptx::fetch_add_device(routing.sent_rows + expert, 1) + 1 == plan.total[expert]) {
                routing.sent_rows[expert] = 0;
                announce(call, plan, expert);
            }
        }
    }
    return true;
}

struct Received {
    u8* out;        // [local experts, ranks * max_tokens, hidden], of the format on the wire
    float* scales;  // the same, tiles for hidden; MN-major
    i64 scale_group_stride, scale_tile_stride;
    i32* counts;    // [local experts]
    i32* segments;  // [local experts, ranks, 3]: first row, rows, first place at home
};

// Rows of an expert come by source, then token. kWarpsOfGroup warps take an (expert, source).
__device__ __forceinline__ bool dispatch_receive(const Call& call, const Received& to, Format format) {
    const u32 lane = threadIdx.x % 32, ranks = call.peers.ranks;
    const bool quantised = format != Format::kBf16;
    const u32 row_bytes = quantised ? call.hidden : 2 * call.hidden;
    const u32 tiles = quantised ? (call.hidden + quantize::kTile - 1) / quantize::kTile : 0;
    for (u32 task = call.warp(); task < call.experts() * kWarpsOfGroup; task += call.warps()) {
        const u32 segment = task / kWarpsOfGroup, part = task % kWarpsOfGroup;
        const u32 expert = segment / ranks, source = segment % ranks;

        bool kept = true;
        u32 before = 0, mine = 0;  // rows of lower sources; this source's word
        for (u32 base = 0; base <= source; base += 32) {
            const u32 peer = base + lane;
            if (peer > source) continue;
            const u64 word = call.wait(call.area.flag(expert * ranks + peer), call.epoch << 32,
                                       Role::kReceive, peer, expert);
            kept &= word >= call.epoch << 32;
            if (peer == source)
                mine = static_cast<u32>(word);
            else
                before += static_cast<u32>(word) & 0xffff;
        }
        __syncwarp();
        if (!__all_sync(kFullWarp, kept)) return false;
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) before += __shfl_xor_sync(kFullWarp, before, step);
        mine = __shfl_sync(kFullWarp, mine, source % 32);
        const u32 rows = mine & 0xffff;
        if (part == 0 && lane == 0) {
            to.segments[3 * segment] = before;
            to.segments[3 * segment + 1] = rows;
            to.segments[3 * segment + 2] = mine >> 16;
            if (source == ranks - 1) to.counts[expert] = before + rows;
        }

        for (u32 i = part; i < rows; i += kWarpsOfGroup) {
            const u8* slot = call.own(call.area.slot(static_cast<u64>(segment) * call.max_tokens + i));
            const u64 row = before + i;
            const float* scales = reinterpret_cast<const float*>(slot + row_bytes);
            float held[2] = {};  // under way with the row
#pragma unroll
            for (u32 t = 0; t < 2; ++t)
                if (lane + 32 * t < tiles) held[t] = scales[lane + 32 * t];
            copy(to.out + (static_cast<u64>(expert) * call.received_rows() + row) * row_bytes, slot,
                 row_bytes, lane);
            for (u32 t = lane; t < tiles; t += 32)
                to.scales[expert * to.scale_group_stride + t * to.scale_tile_stride + row] = t < 32 ? held[0]
                                                                                             : t < 64
                                                                                                 ? held[1]
                                                                                                 : scales[t];
        }
    }
    return true;
}

}  // namespace low_latency
}  // namespace dsv3
