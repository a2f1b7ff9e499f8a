// Races and barriers in shared memory. 64 threads.
#include "common.cuh"

KERNEL(missing_syncthreads) {
    __shared__ float buffer[kCount];
    buffer[threadIdx.x] = in[threadIdx.x];  // BUG
#if !BUG
    __syncthreads();
#endif
    out[kCount - 1 - threadIdx.x] = buffer[kCount - 1 - threadIdx.x];  // BUG
}

// A buffer used twice needs a second barrier: the first orders writes before reads, not reads before the next
// writes.
KERNEL(missing_second_syncthreads) {
    __shared__ float buffer[32];
    for (u32 half = 0; half < 2; ++half) {
        if (threadIdx.x < 32) buffer[threadIdx.x] = in[half * 32 + threadIdx.x];  // BUG
        __syncthreads();
        if (threadIdx.x >= 32) out[half * 32 + threadIdx.x - 32] = buffer[threadIdx.x - 32];  // BUG
#if !BUG
        __syncthreads();
#endif
    }
}

KERNEL(shuffle_orders_nothing) {
    __shared__ float buffer[kCount];
    const u32 neighbour = threadIdx.x ^ 1;
    buffer[threadIdx.x] = in[threadIdx.x];  // BUG
    __shfl_xor_sync(0xffffffff, 0, 1);
#if !BUG
    __syncwarp();
#endif
    out[neighbour] = buffer[neighbour];  // BUG
}

// Two warps share a named barrier; a third party's barrier does not help them.
KERNEL(named_barrier_of_others) {
    __shared__ float buffer[kCount];
    buffer[threadIdx.x] = in[threadIdx.x];  // BUG
#if BUG
    ptx::named_barrier_sync(1 + threadIdx.x / 32, 32);
#else
    ptx::named_barrier_sync(1, 64);
#endif
    out[kCount - 1 - threadIdx.x] = buffer[kCount - 1 - threadIdx.x];  // BUG
}

// bar.arrive does not wait: the arriving warp may not read what the others write before the barrier.
KERNEL(arrive_is_no_wait) {
    __shared__ float buffer[kCount];
    if (threadIdx.x >= 32) buffer[threadIdx.x - 32] = in[threadIdx.x - 32];  // BUG
    if (threadIdx.x < 32) buffer[32 + threadIdx.x] = in[32 + threadIdx.x];
#if BUG
    if (threadIdx.x < 32)
        asm volatile("bar.arrive 1, 64;" ::: "memory");
    else
#endif
        ptx::named_barrier_sync(1, 64);
    if (threadIdx.x < 32)
        out[threadIdx.x] = buffer[threadIdx.x];  // BUG
    else
        out[threadIdx.x] = buffer[threadIdx.x];
}

KERNEL(cp_async_without_wait) {
    __shared__ float buffer[kCount];
    cp_async(&buffer[threadIdx.x], &in[threadIdx.x]);  // BUG
#if !BUG
    cp_async_wait_all();
#endif
    out[threadIdx.x] = buffer[threadIdx.x];  // BUG
}

// cp.async.wait is the waiting thread's own: others need a barrier too.
KERNEL(cp_async_wait_is_private) {
    __shared__ float buffer[kCount];
    cp_async(&buffer[threadIdx.x], &in[threadIdx.x]);  // BUG
    cp_async_wait_all();
#if !BUG
    __syncthreads();
#endif
    out[kCount - 1 - threadIdx.x] = buffer[kCount - 1 - threadIdx.x];  // BUG
}

KERNEL(read_of_unwritten_shared) {
    __shared__ float buffer[kCount];
#if BUG
    if (threadIdx.x != 7)
#endif
        buffer[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    const float v = buffer[threadIdx.x];  // BUG
    out[threadIdx.x] = v;                 // BUG
}

// What nobody wrote stays so through a copy.
KERNEL(unwritten_bytes_travel) {
    __shared__ __align__(16) float buffer[kCount];
#if BUG
    if (threadIdx.x != 9)
#endif
        buffer[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x < 16) {
        const float4 four = reinterpret_cast<float4*>(buffer)[threadIdx.x];  // BUG
        reinterpret_cast<float4*>(out)[threadIdx.x] = four;                  // BUG
    }
}

// Atomics do not race with each other, a plain (weak) read of theirs does.
KERNEL(plain_read_of_atomic) {
    __shared__ u32 counter;
    if (threadIdx.x == 0) counter = 0;
    __syncthreads();
    atomicAdd(&counter, 1);  // BUG
#if !BUG
    __syncthreads();
#endif
    const u32 count = ld_weak_shared(&counter);  // BUG
    out[threadIdx.x] = in[threadIdx.x] + (count > kCount ? 1.0f : 0.0f);
}

// An arrive hands over what came before it.
KERNEL(write_behind_the_arrive) {
    __shared__ float buffer[kCount];
    __shared__ u64 full;
    if (threadIdx.x == 0) ptx::mbarrier_init(&full, 64);
    __syncthreads();
#if BUG
    ptx::mbarrier_arrive(&full);
    buffer[threadIdx.x] = in[threadIdx.x];  // BUG
#else
    buffer[threadIdx.x] = in[threadIdx.x];
    ptx::mbarrier_arrive(&full);
#endif
    ptx::mbarrier_wait(&full, 0);
    out[kCount - 1 - threadIdx.x] = buffer[kCount - 1 - threadIdx.x];  // BUG
}

// A relaxed arrive counts, and orders nothing.
KERNEL(relaxed_arrive) {
    __shared__ float buffer[kCount];
    __shared__ u64 full;
    if (threadIdx.x == 0) ptx::mbarrier_init(&full, 64);
    __syncthreads();
    buffer[threadIdx.x] = in[threadIdx.x];  // BUG
#if BUG
    asm volatile("mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%0];" ::"r"(ptx::shared_address(&full))
                 : "memory");
#else
    ptx::mbarrier_arrive(&full);
#endif
    ptx::mbarrier_wait(&full, 0);
    out[kCount - 1 - threadIdx.x] = buffer[kCount - 1 - threadIdx.x];  // BUG
}

// Threads may write neighbouring bytes of one word, not the same byte.
KERNEL(one_byte_of_two_threads) {
    __shared__ unsigned char bytes[kCount];
    bytes[threadIdx.x % 32 * 2 + (BUG ? 0 : threadIdx.x / 32)] = threadIdx.x;  // BUG
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x] + (bytes[threadIdx.x % 32 * 2 + threadIdx.x / 32] - int(threadIdx.x));
}

// The launch marks the second half of `in` as never written: a copy of it may lie in shared memory.
KERNEL(cp_async_of_floats_nobody_wrote) {
    __shared__ float buffer[kCount];
    cp_async(&buffer[threadIdx.x], &in[threadIdx.x]);
    cp_async_wait_all();
    __syncthreads();
    if (BUG || threadIdx.x < 32) out[threadIdx.x] = buffer[threadIdx.x];  // BUG
}

// Two 8x8 matrices of 16-bit elements are 32 floats each; the second was never written.
KERNEL(ldmatrix_of_rows_nobody_wrote) {
    __shared__ __align__(16) float buffer[kCount];
    if (threadIdx.x >= 32) return;
    buffer[threadIdx.x] = in[threadIdx.x];
    __syncwarp();
    u32 first, second;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(first), "=r"(second)
                 : "r"(ptx::shared_address(buffer) + threadIdx.x % 16 * 16)
                 : "memory");
    out[threadIdx.x] = __uint_as_float(first);
    out[32 + threadIdx.x] = BUG ? __uint_as_float(second) : in[32 + threadIdx.x];  // BUG
}
