// Races in global memory between blocks. 2 blocks of 32 threads: block 0 writes a scratch that block 1 copies
// to out.
#include "common.cuh"

__device__ __forceinline__ float* scratch_of(u32* flags) { return reinterpret_cast<float*>(flags + 16); }

KERNEL(flag_without_release) {
    float* scratch = scratch_of(flags);
    if (blockIdx.x == 0) {
        scratch[threadIdx.x] = in[threadIdx.x];  // BUG
        out[32 + threadIdx.x] = in[32 + threadIdx.x];
        __syncwarp();
#if BUG
        if (threadIdx.x == 0) st_relaxed_gpu(flags, 1);
#else
        if (threadIdx.x == 0) st_release_gpu(flags, 1);
#endif
    } else {
        while (ld_acquire_gpu(flags) == 0) {
        }
        out[threadIdx.x] = scratch[threadIdx.x];  // BUG
    }
}

KERNEL(flag_without_acquire) {
    float* scratch = scratch_of(flags);
    if (blockIdx.x == 0) {
        scratch[threadIdx.x] = in[threadIdx.x];  // BUG
        out[32 + threadIdx.x] = in[32 + threadIdx.x];
        __syncwarp();
        if (threadIdx.x == 0) st_release_gpu(flags, 1);
    } else {
        while (ld_relaxed_gpu(flags) == 0) {
        }
#if !BUG
        __threadfence();
#endif
        out[threadIdx.x] = scratch[threadIdx.x];  // BUG
    }
}

// Release and acquire of .cta scope order nothing between blocks.
KERNEL(scope_too_small) {
    float* scratch = scratch_of(flags);
    if (blockIdx.x == 0) {
        scratch[threadIdx.x] = in[threadIdx.x];  // BUG
        out[32 + threadIdx.x] = in[32 + threadIdx.x];
        __syncwarp();
#if BUG
        if (threadIdx.x == 0) st_release_cta(flags, 1);  // BUG
    } else {
        while (ld_acquire_cta(flags) == 0) {  // BUG
        }
#else
        if (threadIdx.x == 0) st_release_gpu(flags, 1);
    } else {
        while (ld_acquire_gpu(flags) == 0) {
        }
#endif
        out[threadIdx.x] = scratch[threadIdx.x];  // BUG
    }
}

// Lane 0 releases for the warp: legal after __syncwarp, which orders the other lanes' writes before it.
KERNEL(release_without_syncwarp) {
    float* scratch = scratch_of(flags);
    if (blockIdx.x == 0) {
        scratch[threadIdx.x] = in[threadIdx.x];  // BUG
        out[32 + threadIdx.x] = in[32 + threadIdx.x];
#if !BUG
        __syncwarp();
#endif
        if (threadIdx.x == 0) st_release_gpu(flags, 1);
    } else {
        if (threadIdx.x == 0)
            while (ld_acquire_gpu(flags) == 0) {
            }
        __syncwarp();
        out[threadIdx.x] = scratch[threadIdx.x];  // BUG
    }
}

// The last block to come takes over: lane 0 fences for its warp, before and after its relaxed atomic.
KERNEL(counter_without_fence) {
    float* scratch = scratch_of(flags);
    scratch[blockIdx.x * 32 + threadIdx.x] = in[blockIdx.x * 32 + threadIdx.x];  // BUG
    __syncwarp();
    u32 arrived = 0;
    if (threadIdx.x == 0) {
#if !BUG
        __threadfence();
#endif
        arrived = atomic_add_relaxed_gpu(flags, 1);
        __threadfence();
    }
    __syncwarp();
    arrived = __shfl_sync(0xffffffff, arrived, 0);
    if (arrived == 1)
        for (u32 i = threadIdx.x; i < kCount; i += 32) out[i] = scratch[i];  // BUG
}

KERNEL(both_blocks_write) {
#if BUG
    for (u32 i = threadIdx.x; i < kCount; i += 32) out[i] = in[i];  // BUG
#else
    out[blockIdx.x * 32 + threadIdx.x] = in[blockIdx.x * 32 + threadIdx.x];
#endif
}

// The flag's scope reaches the other block, the fence's does not.
KERNEL(fence_scope_too_small) {
    float* scratch = scratch_of(flags);
    if (blockIdx.x == 0) {
        scratch[threadIdx.x] = in[threadIdx.x];  // BUG
        out[32 + threadIdx.x] = in[32 + threadIdx.x];
        __syncwarp();
        if (threadIdx.x == 0) {
#if BUG
            __threadfence_block();
#else
            __threadfence();
#endif
            st_relaxed_gpu(flags, 1);
        }
    } else {
        while (ld_acquire_gpu(flags) == 0) {
        }
        out[threadIdx.x] = scratch[threadIdx.x];  // BUG
    }
}

// Relaxed accesses do not race, they show old values: here a count that its flag overtakes.
KERNEL(relaxed_data_behind_a_relaxed_flag) {
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) {
            st_relaxed_gpu(flags + 8, 1);
#if BUG
            st_relaxed_gpu(flags, 1);
#else
            st_release_gpu(flags, 1);
#endif
        }
        out[threadIdx.x] = in[threadIdx.x];
    } else {
        while (ld_acquire_gpu(flags) == 0) {
        }
        while (true) {
            if (ld_relaxed_gpu(flags + 8) == 1) break;
            asm volatile("trap;");  // BUG
        }
        out[32 + threadIdx.x] = in[32 + threadIdx.x];
    }
}
