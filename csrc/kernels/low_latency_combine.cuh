// Low-latency combine: each row that an expert returned straight to its token's rank, and there the sum of
// weight x row over a token's choices, k ascending, in FP32 from +0, rounded once to BF16: as `unpermute`.
// Included by low_latency.cuh, which says the protocol.
//
// Bytes: a (token, expert): a BF16 row read, written over a link, and read there; a token: a row written.
#pragma once

namespace dsv3 {
namespace low_latency {

// y is BF16 [local experts, ranks * max_tokens, hidden]. kWarpsOfGroup warps take an (expert, home rank).
__device__ __forceinline__ bool combine_send(const Call& call, const u8* y, const i32* segments) {
    const u32 lane = threadIdx.x % 32, ranks = call.peers.ranks;
    const u32 group = threadIdx.x / (32 * kWarpsOfGroup), groups = blockDim.x / (32 * kWarpsOfGroup);
    const u32 member = threadIdx.x / 32 % kWarpsOfGroup;
    const u32 row_bytes = 2 * call.hidden;
    bool kept = true;
    if (threadIdx.x < 32) kept = wait_for_readers(call, lane);
    if (__syncthreads_or(!kept)) return false;

    for (u32 task = call.block.index * groups + group; task < call.experts();
         task += call.block.count * groups) {
        const u32 local = task / ranks, expert = call.peers.rank * call.local_experts + local;
        const u32 home = (task + call.peers.rank) % ranks;  // ranks begin with different ones
        const i32* segment = segments + 3 * (local * ranks + home);
        const u32 first = segment[0], rows = segment[1], place = segment[2];
        if (rows == 0) continue;
        const bool far = call.peers.far(home);
        for (u32 i = member; i < rows; i += kWarpsOfGroup) {
            const u8* from = y + (static_cast<u64>(local) * call.received_rows() + first + i) * row_bytes;
            const u64 slot = call.area.slot(place + i);
            if (!far) {
                copy(call.peers.mapped[home] + slot, from, row_bytes, lane);
                continue;
            }
            const u64 at = static_cast<u64>(home) * call.places() + place + i;
            const u64 staged = call.area.staged(at, static_cast<u64>(ranks) * call.places());
            copy(call.own(staged), from, row_bytes, lane);
            __syncwarp();
            call.peers.put(slot, staged, row_bytes, home, expert);
        }
        ptx::named_barrier_sync(1 + group, 32 * kWarpsOfGroup);
        if (member == 0 && lane == 0) call.peers.set(call.area.flag(expert), call.epoch << 32, home, expert);
    }
    return true;
}

// weights [tokens, topk]; out BF16 [tokens, hidden]. A warp takes 256 columns of a token.
__device__ __forceinline__ bool combine_receive(const Call& call, const i32* places, const float* weights,
                                                u8* out) {
    constexpr u32 kColumnsOfWarp = 32 * kColumns;
    const u32 lane = threadIdx.x % 32;
    const u32 across = (call.hidden + kColumnsOfWarp - 1) / kColumnsOfWarp;
    for (u32 task = call.warp(); task < call.tokens * across; task += call.warps()) {
        const u32 token = task / across, column = task % across * kColumnsOfWarp + lane * kColumns;
        i32 place = -1;  // lane k: of choice k
        float weight = 0.0f;
        bool kept = true;
        if (lane < call.topk) {
            const i32 expert = places[2 * (token * call.topk + lane)];
            place = places[2 * (token * call.topk + lane) + 1];
            weight = weights[token * call.topk + lane];
            if (expert >= 0)
                kept = call.wait(call.area.flag(expert), call.epoch << 32, Role::kReceive,
                                 expert / call.local_experts, expert) >= call.epoch << 32;
        }
        __syncwarp();
        if (!__all_sync(kFullWarp, kept)) return false;

        float sum[kColumns] = {};
        for (u32 k = 0; k < call.topk; k += kInFlight) {
            U32x4 raw[kInFlight];
            i32 from[kInFlight];
#pragma unroll
            for (u32 i = 0; i < kInFlight; ++i) {
                from[i] = __shfl_sync(kFullWarp, place, (k + i) % 32);
                if (k + i >= call.topk) from[i] = -1;
                if (from[i] >= 0 && column < call.hidden)
                    raw[i] = ptx::load_global(call.own(call.area.slot(from[i])) + 2 * column);
            }
#pragma unroll
            for (u32 i = 0; i < kInFlight; ++i) {
                const float w = __shfl_sync(kFullWarp, weight, (k + i) % 32);
                if (from[i] < 0 || column >= call.hidden) continue;
                float values[kColumns];
                quantize::widen(quantize::words(raw[i]), values, Bf16{});
#pragma unroll
                for (u32 c = 0; c < kColumns; ++c) sum[c] = __fadd_rn(sum[c], __fmul_rn(w, values[c]));
            }
        }
        if (column < call.hidden)
            ptx::store_global(out + 2 * (static_cast<u64>(token) * call.hidden + column),
                              U32x4{ptx::bf16x2(sum[0], sum[1]), ptx::bf16x2(sum[2], sum[3]),
                                    ptx::bf16x2(sum[4], sum[5]), ptx::bf16x2(sum[6], sum[7])});
    }
    return true;
}

}  // namespace low_latency
}  // namespace dsv3
