// Node-limited routing (DeepSeek-V3 report, section 2.1.2) as one kernel: the scores of a token's experts to
// its best groups, its experts, their weights, and how many tokens each expert gets.
//
// A warp takes a token and holds its scores in registers, entry i of a lane being expert 32i + lane. What is
// best is found by maxima over the warp of integers that order as the scores do, so that NaN has a place too
// and every choice is an expert that exists, whatever the scores are.
#pragma once

#include "ptx.cuh"
#include "sigmoid.cuh"

namespace dsv3 {
namespace gate {

constexpr u32 kThreads = 256;
constexpr u32 kFullWarp = ~0u;
constexpr u32 kMinusInfinity = 0x007fffff;  // as a key

// An integer that orders as v does, -0 as 0 and NaN above all.
__device__ __forceinline__ u32 key_of(float v) {
    const u32 bits = __float_as_uint(__fadd_rn(v, 0.0f));
    if (v != v) return ~0u;
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

__device__ __forceinline__ float value_of(u32 key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffff : ~key);
}

// The entries of this lane whose index is one of the `size` from `first` on, a bit each.
template <u32 kCount>
__device__ __forceinline__ u32 entries(u32 first, u32 size) {
    u32 mask = 0;
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) mask |= static_cast<u32>(32 * i + threadIdx.x % 32 - first < size) << i;
    return mask;
}

struct Best {
    u32 key, index;
};

// The highest key among the warp's entries in `open`, of equal ones that with the lowest index; it leaves
// `open`, which must not be empty in every lane.
template <u32 kCount>
__device__ __forceinline__ Best take_best(const u32 (&keys)[kCount], u32& open) {
    const u32 lane = threadIdx.x % 32;
    u32 highest = 0, index = ~0u;
#pragma unroll
    for (u32 i = 0; i < kCount; ++i)
        if (open >> i & 1) highest = max(highest, keys[i]);
    const u32 key = __reduce_max_sync(kFullWarp, highest);
#pragma unroll
    for (u32 i = kCount; i-- > 0;)
        if ((open >> i & 1) && keys[i] == key) index = 32 * i + lane;
    index = __reduce_min_sync(kFullWarp, index);
    if (index % 32 == lane) open &= ~(1u << index / 32);
    return {key, index};
}

// The entries of the `count` best groups; a group's score is the sum of its `summed` highest.
template <u32 kCount>
__device__ __forceinline__ u32 entries_of_best_groups(const u32 (&keys)[kCount], u32 groups, u32 size,
                                                      u32 count, u32 summed) {
    u32 group_keys[kCount] = {};
    for (u32 group = 0; group < groups; ++group) {
        u32 open = entries<kCount>(group * size, size);
        float score = 0;
        for (u32 s = 0; s < summed; ++s) score = __fadd_rn(score, value_of(take_best(keys, open).key));
#pragma unroll
        for (u32 i = 0; i < kCount; ++i)
            if (group == 32 * i + threadIdx.x % 32) group_keys[i] = key_of(score);
    }
    u32 open = entries<kCount>(0, groups), allowed = 0;
    for (u32 g = 0; g < count; ++g)
        allowed |= entries<kCount>(take_best(group_keys, open).index * size, size);
    return allowed;
}

}  // namespace gate

// scores [tokens, experts], or logits whose sigmoids they are, and bias [experts] -> of each token the top_k
// experts with the highest score + bias among those of its best_groups groups, ascending; their weights,
// score over the sum of the chosen scores, times scaling; and counts, to which each choice adds 1. experts is
// at most 32 * kCount and a multiple of groups, top_k at most the experts of best_groups groups. Any grid is
// right.
template <u32 kCount, bool kFromLogits>
__global__ void __launch_bounds__(gate::kThreads)
    route(const float* scores, const float* bias, i64* chosen_experts, float* weights, i32* counts,
          u32 tokens, u32 experts, u32 groups, u32 best_groups, u32 top_k, float scaling) {
    using namespace gate;
    const u32 lane = threadIdx.x % 32, warps = gridDim.x * (kThreads / 32);
    const u32 size = experts / groups;
    for (u64 token = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; token < tokens; token += warps) {
        float score[kCount];
        u32 keys[kCount];
#pragma unroll
        for (u32 i = 0; i < kCount; ++i) {
            const u32 expert = 32 * i + lane;
            const bool exists = expert < experts;
            const float v = exists ? ptx::load_global_nc_float(scores + token * experts + expert) : 0.0f;
            score[i] = kFromLogits ? sigmoid(v) : v;
            keys[i] = key_of(__fadd_rn(score[i], exists ? ptx::load_global_nc_float(bias + expert) : 0.0f));
        }
        if (best_groups < groups) {
            const u32 summed = min(top_k / best_groups, size);
            const u32 allowed = entries_of_best_groups(keys, groups, size, best_groups, summed);
#pragma unroll
            for (u32 i = 0; i < kCount; ++i)
                if (!(allowed >> i & 1)) keys[i] = kMinusInfinity;
        }
        const u32 all = entries<kCount>(0, experts);
        u32 open = all;
        for (u32 k = 0; k < top_k; ++k) take_best(keys, open);
        const u32 chosen = all & ~open;

        float sum = 0;
#pragma unroll
        for (u32 i = 0; i < kCount; ++i)
            for (u32 lanes = __ballot_sync(kFullWarp, chosen >> i & 1); lanes != 0; lanes &= lanes - 1)
                sum = __fadd_rn(sum, __shfl_sync(kFullWarp, score[i], __ffs(lanes) - 1));
        sum = __fadd_rn(sum, 1e-20f);
        u64 row = token * top_k;
#pragma unroll
        for (u32 i = 0; i < kCount; ++i) {
            const u32 lanes = __ballot_sync(kFullWarp, chosen >> i & 1);
            if (chosen >> i & 1) {
                const u64 place = row + __popc(lanes & ((1u << lane) - 1));
                chosen_experts[place] = 32 * i + lane;
                weights[place] = __fmul_rn(ptx::div_rn(score[i], sum), scaling);
                atomicAdd(counts + 32 * i + lane, 1);
            }
            row += __popc(lanes);
        }
    }
}

}  // namespace dsv3
