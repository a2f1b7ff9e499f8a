// The ring of shared-memory stages between a producer and its consumers.
//
// A stage is filled, used and filled again; one such round is a lap. Two mbarriers a stage:
//   full[s]   completes its phase L when the data of lap L has landed: one arrival by the producer, and all
//             the bytes that it announced;
//   empty[s]  completes its phase L when every consumer has released lap L.
// The producer fills lap L after phase L - 1 of empty[s], a consumer reads lap L after phase L of full[s]. So
// neither is ever more than one phase away from what it waits for, and the parity of L tells that phase from
// its neighbours. Before the first lap there is no phase to wait for: on a fresh barrier the phase of parity
// 1 counts as completed.
//
// Both sides walk the ring in the same order, each with its own RingPosition.
#pragma once

#include "ptx.cuh"

namespace dsv3 {

template <u32 kStages>
struct RingPosition {
    u32 stage = 0;
    u32 parity = 0;  // of the lap

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Lives in shared memory. In a cluster of kBlocks, where a producer fills the stages of all blocks at once,
// empty[s] waits for the consumers of all of them.
template <u32 kStages, u32 kBlocks = 1>
struct Ring {
    using Position = RingPosition<kStages>;

    u64 full[kStages];
    u64 empty[kStages];

    // By one thread; all others, of the whole cluster, pass a barrier after it. `consumers` counts a block's
    // calls of release() a lap.
    __device__ __forceinline__ void init(u32 consumers) {
#pragma unroll
        for (u32 s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(&full[s], 1);
            ptx::mbarrier_init(&empty[s], consumers * kBlocks);
        }
        ptx::fence_mbarrier_init();
    }

    // Producer: waits until the stage is free, then announces the bytes of all copies into this block. Those
    // that another block issues may land before they are announced: the phase waits for this arrival too.
    __device__ __forceinline__ u64* acquire(Position p, u32 bytes) {
        ptx::mbarrier_wait(&empty[p.stage], p.parity ^ 1);
        ptx::mbarrier_arrive_expect(&full[p.stage], bytes);
        return &full[p.stage];
    }

    // Producer: waits until the consumers have released this lap. For a ring that carries data both ways.
    __device__ __forceinline__ void wait_released(Position p) {
        ptx::mbarrier_wait(&empty[p.stage], p.parity);
    }

    // Consumer: waits for the data.
    __device__ __forceinline__ void wait(Position p) { ptx::mbarrier_wait(&full[p.stage], p.parity); }

    // Consumer: everything it read from the stage is in registers, or its wgmma are done. Told to the block
    // of this rank; a consumer tells all kBlocks.
    __device__ __forceinline__ void release(Position p, u32 rank = 0) {
        if constexpr (kBlocks == 1)
            ptx::mbarrier_arrive(&empty[p.stage]);
        else
            ptx::mbarrier_arrive_cluster_reader(ptx::cluster_address(&empty[p.stage], rank));
    }
};

// kRows rows from `row` on of a K-major operand, 128 of K wide, into a stage. Where a cluster of 2 shares
// them: this block's half, into both.
template <bool kShared, u32 kRows>
__device__ __forceinline__ void load_operand(u8* target, const TensorMap* map, u64* full, u32 k, u32 row,
                                             u32 rank) {
    if constexpr (kShared) {
        constexpr u16 kBothBlocks = 0b11;
        const u32 half = rank * (kRows / 2);
        ptx::tma_load_multicast(target + half * 128, map, full, k, row + half, kBothBlocks);
    } else {
        ptx::tma_load(target, map, full, k, row);
    }
}

}  // namespace dsv3
