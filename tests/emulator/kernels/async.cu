// The copy engine: proxies, stages, byte counts. 64 threads.
#include "common.cuh"

// Sets up one barrier of one arrival, as it should be.
__device__ __forceinline__ void init_barrier(u64* barrier, u32 arrivals) {
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, arrivals);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
}

KERNEL(store_without_proxy_fence) {
    __shared__ __align__(128) float buffer[kCount];
    buffer[threadIdx.x] = in[threadIdx.x];  // BUG
#if !BUG
    ptx::fence_proxy_async_shared();
#endif
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::tma_store(&out_map, buffer, 0, 0);  // BUG
        ptx::bulk_commit_group();
        ptx::bulk_wait_group_read<0>();
    }
}

// The same fence on the other side of the barrier, by the thread that issues the copy: legal too.
KERNEL(proxy_fence_after_barrier) {
    __shared__ __align__(128) float buffer[kCount];
    buffer[threadIdx.x] = in[threadIdx.x];  // BUG
    __syncthreads();
    if (threadIdx.x == 0) {
#if !BUG
        ptx::fence_proxy_async_shared();
#endif
        bulk_store(out, buffer, kBytes);  // BUG
        ptx::bulk_commit_group();
        ptx::bulk_wait_group_read<0>();
    }
}

KERNEL(global_write_then_bulk_load) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    float* scratch = reinterpret_cast<float*>(flags + 16);
    init_barrier(&full, 1);
    scratch[threadIdx.x] = in[threadIdx.x];  // BUG
#if !BUG
    fence_proxy_async_global();
#endif
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&full, kBytes);
        bulk_load(buffer, scratch, kBytes, &full);  // BUG
    }
    ptx::mbarrier_wait(&full, 0);
    out[threadIdx.x] = buffer[threadIdx.x];
}

KERNEL(read_before_the_data) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    init_barrier(&full, 1);
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&full, kBytes);
        ptx::tma_load(buffer, &in_map, &full, 0, 0);  // BUG
    }
#if BUG
    ptx::mbarrier_wait(&full, 1);  // the phase before the first one
#else
    ptx::mbarrier_wait(&full, 0);
#endif
    out[threadIdx.x] = buffer[threadIdx.x];  // BUG
}

KERNEL(two_copies_to_one_place) {
    __shared__ __align__(128) float buffer[2][kCount];
    __shared__ u64 full;
    init_barrier(&full, 1);
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&full, 2 * kBytes);
        ptx::tma_load(buffer[0], &in_map, &full, 0, 1);        // BUG
        ptx::tma_load(buffer[1 - BUG], &in_map, &full, 0, 0);  // BUG
    }
    ptx::mbarrier_wait(&full, 0);
    out[threadIdx.x] = buffer[1 - BUG][threadIdx.x];  // BUG
}

// A ring of one stage. The consumer's arrive on `empty` is all the copy engine needs before it refills: no
// proxy fence.
KERNEL(refill_without_empty_wait) {
    __shared__ __align__(128) float buffer[32];
    __shared__ u64 full, empty;
    if (threadIdx.x == 0) ptx::mbarrier_init(&empty, 32);
    init_barrier(&full, 1);
    if (threadIdx.x == 0) {
        for (u32 lap = 0; lap < 2; ++lap) {
#if !BUG
            ptx::mbarrier_wait(&empty, (lap & 1) ^ 1);
#endif
            ptx::mbarrier_arrive_expect(&full, 128);       // BUG
            bulk_load(buffer, in + lap * 32, 128, &full);  // BUG
#if BUG
            ptx::mbarrier_wait(&full, lap);
#endif
        }
    } else if (threadIdx.x >= 32) {
        for (u32 lap = 0; lap < 2; ++lap) {
            ptx::mbarrier_wait(&full, lap & 1);                           // BUG
            out[lap * 32 + threadIdx.x - 32] = buffer[threadIdx.x - 32];  // BUG
            ptx::mbarrier_arrive(&empty);
        }
    }
}

KERNEL(overwrite_while_store_reads) {
    __shared__ __align__(128) float buffer[32];
    if (threadIdx.x < 32)
        for (u32 half = 0; half < 2; ++half) {
            buffer[threadIdx.x] = in[half * 32 + threadIdx.x];  // BUG
            ptx::fence_proxy_async_shared();
            __syncwarp();
            if (threadIdx.x == 0) {
                bulk_store(out + half * 32, buffer, 128);  // BUG
                ptx::bulk_commit_group();
#if !BUG
                ptx::bulk_wait_group_read<0>();
#endif
            }
            __syncwarp();
        }
    if (threadIdx.x == 0) ptx::bulk_wait_group_read<0>();
}

// wait_group.read says that the source may be reused, not that the destination is written.
KERNEL(read_back_too_early) {
    __shared__ __align__(128) float buffer[kCount];
    float* scratch = reinterpret_cast<float*>(flags + 16);
    buffer[threadIdx.x] = in[threadIdx.x];
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        bulk_store(scratch, buffer, kBytes);  // BUG
        ptx::bulk_commit_group();
#if BUG
        ptx::bulk_wait_group_read<0>();
#else
        bulk_wait_group();
#endif
        for (u32 i = 0; i < kCount; ++i) out[i] = scratch[i];  // BUG
    }
}

KERNEL(more_bytes_than_expected) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    init_barrier(&full, 1);
    if (threadIdx.x == 0) {
#if BUG
        ptx::mbarrier_arrive_expect(&full, kBytes / 2);  // BUG
#else
        ptx::mbarrier_arrive_expect(&full, kBytes);
#endif
        ptx::tma_load(buffer, &in_map, &full, 0, 0);  // BUG
    }
    ptx::mbarrier_wait(&full, 0);
    out[threadIdx.x] = buffer[threadIdx.x];  // BUG
}

KERNEL(more_arrivals_than_expected) {
    __shared__ u64 barrier;
    init_barrier(&barrier, 2);
    if (threadIdx.x % 32 == 0) {
#if BUG
        arrive_count(&barrier, 1 + 2 * (threadIdx.x / 32));  // BUG
#else
        arrive_count(&barrier, 1);
#endif
    }
    ptx::mbarrier_wait(&barrier, 0);
    out[threadIdx.x] = in[threadIdx.x];
}

KERNEL(barrier_used_before_init_is_visible) {
    __shared__ u64 barrier;
    if (threadIdx.x == 0) ptx::mbarrier_init(&barrier, 2);  // BUG
#if !BUG
    __syncthreads();
#endif
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&barrier);  // BUG
    ptx::mbarrier_wait(&barrier, 0);                            // BUG
    out[threadIdx.x] = in[threadIdx.x];
}

// The copy engine has its own view of memory: fence.mbarrier_init makes the barrier known to it.
KERNEL(init_without_fence) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);  // BUG
#if !BUG
        ptx::fence_mbarrier_init();
#endif
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&full, kBytes);
        bulk_load(buffer, in, kBytes, &full);  // BUG
    }
    ptx::mbarrier_wait(&full, 0);
    out[threadIdx.x] = buffer[threadIdx.x];
}

// A load whose box lies partly (here from row 1 on) outside the tensor still completes the whole box's bytes;
// the rest of the box is zeros.
KERNEL(box_beyond_the_tensor) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    init_barrier(&full, 1);
    if (threadIdx.x == 0) {
#if BUG
        ptx::mbarrier_arrive_expect(&full, kBytes / 2);  // BUG
#else
        ptx::mbarrier_arrive_expect(&full, kBytes);
#endif
        ptx::tma_load(buffer, &in_map, &full, 0, 1);  // BUG
    }
    ptx::mbarrier_wait(&full, 0);
    const float v = buffer[threadIdx.x];  // BUG
    if (threadIdx.x < 32) {
        out[threadIdx.x] = in[threadIdx.x];
        out[32 + threadIdx.x] = v;
    } else if (v != 0) {
        out[0] = -1;
    }
}

// What lies beyond a group's rows may never have been written: loading it is harmless, using it is not. The
// launch marks the second row of `in` as unwritten.
KERNEL(rows_nobody_wrote) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    init_barrier(&full, 1);
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&full, kBytes);
        ptx::tma_load(buffer, &in_map, &full, 0, 0);
    }
    ptx::mbarrier_wait(&full, 0);
    if (BUG || threadIdx.x < 32) out[threadIdx.x] = buffer[threadIdx.x];  // BUG
}

// What threads wrote, a copy may overwrite only behind a proxy fence.
KERNEL(copy_over_writes_without_proxy_fence) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    buffer[threadIdx.x] = 0;  // BUG
#if !BUG
    ptx::fence_proxy_async_shared();
#endif
    init_barrier(&full, 1);
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&full, kBytes);
        ptx::tma_load(buffer, &in_map, &full, 0, 0);  // BUG
    }
    ptx::mbarrier_wait(&full, 0);
    out[threadIdx.x] = buffer[threadIdx.x];
}

// A proxy fence names the state space that it is for.
KERNEL(proxy_fence_of_the_other_space) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    float* scratch = reinterpret_cast<float*>(flags + 16);
    init_barrier(&full, 1);
    scratch[threadIdx.x] = in[threadIdx.x];  // BUG
#if BUG
    ptx::fence_proxy_async_shared();
#else
    asm volatile("fence.proxy.async;" ::: "memory");  // for both
#endif
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&full, kBytes);
        bulk_load(buffer, scratch, kBytes, &full);  // BUG
    }
    ptx::mbarrier_wait(&full, 0);
    out[threadIdx.x] = buffer[threadIdx.x];
}

// Two stores of one thread have no order, not even in one bulk group.
KERNEL(two_stores_to_one_place) {
    __shared__ __align__(128) float buffer[kCount];
    buffer[threadIdx.x] = in[threadIdx.x];
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        bulk_store(BUG ? out : reinterpret_cast<float*>(flags + 16), buffer, kBytes);  // BUG
        bulk_store(out, buffer, kBytes);                                              // BUG
        ptx::bulk_commit_group();
        ptx::bulk_wait_group_read<0>();
    }
}

KERNEL(store_of_floats_nobody_wrote) {
    __shared__ __align__(128) float buffer[kCount];
    if (!BUG || threadIdx.x != 7) buffer[threadIdx.x] = in[threadIdx.x];
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        bulk_store(out, buffer, kBytes);  // BUG
        ptx::bulk_commit_group();
        ptx::bulk_wait_group_read<0>();
    }
}

// Shared memory is somebody else's once the block has ended.
KERNEL(exit_while_a_copy_lands) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    init_barrier(&full, 1);
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&full, kBytes);
        ptx::tma_load(buffer, &in_map, &full, 0, 0);  // BUG
    }
#if !BUG
    ptx::mbarrier_wait(&full, 0);
#endif
    out[threadIdx.x] = in[threadIdx.x];
}

KERNEL(exit_while_a_store_reads) {
    __shared__ __align__(128) float buffer[kCount];
    buffer[threadIdx.x] = in[threadIdx.x];
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::tma_store(&out_map, buffer, 0, 0);  // BUG
        ptx::bulk_commit_group();
#if !BUG
        ptx::bulk_wait_group_read<0>();
#endif
    }
}
