// The ring of shared-memory stages between a producer and its consumers.
//
// A stage is filled, used and filled again; one such round is a lap. Two mbarriers a stage:
//   full[s]   completes its phase L when the data of lap L has landed: one arrival by the producer, and all
//   the bytes
//             that it announced;
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

// Lives in shared memory.
template <u32 kStages>
struct Ring {
    using Position = RingPosition<kStages>;

    u64 full[kStages];
    u64 empty[kStages];

    // By one thread; all others pass a __syncthreads() after it. `consumers` counts calls of release() a lap.
    __device__ __forceinline__ void init(u32 consumers) {
#pragma unroll
        for (u32 s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(&full[s], 1);
            ptx::mbarrier_init(&empty[s], consumers);
        }
        ptx::fence_mbarrier_init();
    }

    // Producer: waits until the stage is free, then announces the bytes of the copies that it issues next.
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

    // Consumer: everything it read from the stage is in registers, or its wgmma are done.
    __device__ __forceinline__ void release(Position p) { ptx::mbarrier_arrive(&empty[p.stage]); }
};

}  // namespace dsv3
