// Registers that warpgroups hand over. 384 threads, launched with 168 registers each (65536 / 384, in steps of 8).
#include "common.cuh"

#undef KERNEL
#define KERNEL(name)                                                                                    \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                \
        name(float* out, const float* in, u32* flags, const __grid_constant__ TensorMap in_map,         \
             const __grid_constant__ TensorMap out_map)

// One warpgroup gives, two take 64 a thread each: what it gives must suffice for both.
KERNEL(increase_beyond_the_pool) {
    if (threadIdx.x < 128) {
        ptx::decrease_registers<BUG ? 48 : 40>();
        return;
    }
    ptx::increase_registers<232>();  // BUG
    if (threadIdx.x < 128 + kCount) out[threadIdx.x - 128] = in[threadIdx.x - 128];
}

// The pool is empty until another warpgroup has given.
KERNEL(increase_before_the_decrease) {
    if (threadIdx.x < 256) {
#if BUG
        ptx::named_barrier_sync(1, 384);
        ptx::decrease_registers<104>();
#else
        ptx::decrease_registers<104>();
        ptx::named_barrier_sync(1, 384);
#endif
    } else {
        ptx::increase_registers<232>();  // BUG
        ptx::named_barrier_sync(1, 384);
    }
    if (threadIdx.x < kCount) out[threadIdx.x] = in[threadIdx.x];
}

KERNEL(setmaxnreg_by_one_warp) {
    if (threadIdx.x < (BUG ? 32 : 128)) ptx::decrease_registers<40>();  // BUG
    if (threadIdx.x < kCount) out[threadIdx.x] = in[threadIdx.x];
}

KERNEL(setmaxnreg_of_different_counts) {
    if (BUG && threadIdx.x < 64)
        ptx::decrease_registers<40>();  // BUG
    else if (threadIdx.x < 128)
        ptx::decrease_registers<48>();  // BUG
    if (threadIdx.x < kCount) out[threadIdx.x] = in[threadIdx.x];
}

// Between two setmaxnreg the warps of the warpgroup must meet.
KERNEL(setmaxnreg_twice_without_barrier) {
    if (threadIdx.x < 128) {
        ptx::decrease_registers<104>();
#if !BUG
        ptx::named_barrier_sync(1, 128);
#endif
        ptx::decrease_registers<40>();  // BUG
    }
    if (threadIdx.x < kCount) out[threadIdx.x] = in[threadIdx.x];
}

KERNEL(decrease_to_more) {
    if (threadIdx.x < 128) ptx::decrease_registers<BUG ? 176 : 168>();  // BUG
    if (threadIdx.x < kCount) out[threadIdx.x] = in[threadIdx.x];
}
