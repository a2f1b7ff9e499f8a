// What never ends. 64 threads.
#include "common.cuh"

KERNEL(wrong_arrive_count) {
    __shared__ u64 barrier;
    if (threadIdx.x == 0) ptx::mbarrier_init(&barrier, BUG ? 65 : 64);
    __syncthreads();
    ptx::mbarrier_arrive(&barrier);
    ptx::mbarrier_wait(&barrier, 0);  // BUG
    out[threadIdx.x] = in[threadIdx.x];
}

KERNEL(wrong_phase) {
    __shared__ u64 barrier;
    if (threadIdx.x == 0) ptx::mbarrier_init(&barrier, 64);
    __syncthreads();
    ptx::mbarrier_arrive(&barrier);
    ptx::mbarrier_wait(&barrier, 0);
    ptx::mbarrier_wait(&barrier, BUG);  // BUG
    out[threadIdx.x] = in[threadIdx.x];
}

// The producer fills two laps of a one-stage ring; a consumer that forgets to release it stops the second.
KERNEL(lost_arrive) {
    __shared__ float buffer[32];
    __shared__ u64 full, empty;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 32);
        ptx::mbarrier_init(&empty, 32);
    }
    __syncthreads();
    for (u32 lap = 0; lap < 2; ++lap) {
        if (threadIdx.x < 32) {
            ptx::mbarrier_wait(&empty, lap ^ 1);  // BUG
            buffer[threadIdx.x] = in[lap * 32 + threadIdx.x];
            ptx::mbarrier_arrive(&full);
        } else {
            ptx::mbarrier_wait(&full, lap);  // BUG
            out[lap * 32 + threadIdx.x - 32] = buffer[threadIdx.x - 32];
#if BUG
            if (threadIdx.x != 40)
#endif
                ptx::mbarrier_arrive(&empty);
        }
    }
}

KERNEL(missing_bytes) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect(&full, BUG ? 2 * kBytes : kBytes);
        bulk_load(buffer, in, kBytes, &full);
    }
    __syncthreads();
    ptx::mbarrier_wait(&full, 0);  // BUG
    out[threadIdx.x] = buffer[threadIdx.x];
}

KERNEL(named_barrier_of_another_name) {
#if BUG
    ptx::named_barrier_sync(1 + threadIdx.x / 32, 64);  // BUG
#else
    ptx::named_barrier_sync(1, 64);
#endif
    out[threadIdx.x] = in[threadIdx.x];
}

KERNEL(named_barrier_of_more_threads) {
    ptx::named_barrier_sync(1, BUG ? 96 : 64);  // BUG
    out[threadIdx.x] = in[threadIdx.x];
}

// A warp that has ended counts as arrived at __syncthreads, not at a barrier with a thread count.
KERNEL(exited_warp_at_a_counted_barrier) {
    out[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x >= 32) return;
#if BUG
    ptx::named_barrier_sync(1, 64);  // BUG
#else
    __syncthreads();
#endif
    out[threadIdx.x] = in[threadIdx.x];
}

// Lane 16 is asked for, but waits for what comes after.
KERNEL(lane_missing_from_its_mask) {
    out[threadIdx.x] = in[threadIdx.x];
    const u32 lane = threadIdx.x % 32;
    if (lane < 16) {
        __syncwarp(BUG ? 0x1ffff : 0xffff);  // BUG
        if (lane == 0) st_release_gpu(flags, 1);
    } else if (lane == 16) {
        while (ld_acquire_gpu(flags) == 0) {  // BUG
        }
    }
}

KERNEL(flag_that_nobody_sets) {
    if (threadIdx.x == 0) st_release_gpu(flags + BUG, 1);
    while (ld_acquire_gpu(flags) == 0) {  // BUG
    }
    out[threadIdx.x] = in[threadIdx.x];
}

// Warp 0 waits at barrier 1 for warp 1, which waits at barrier 2 for warp 0.
KERNEL(barriers_in_opposite_order) {
    const bool swap = BUG && threadIdx.x >= 32;
    ptx::named_barrier_sync(swap ? 2 : 1, 64);  // BUG
    ptx::named_barrier_sync(swap ? 1 : 2, 64);
    out[threadIdx.x] = in[threadIdx.x];
}
