// Accesses that no memory is there for. 64 threads.
#include "common.cuh"

KERNEL(read_past_the_end) {
    const u32 i = threadIdx.x + (BUG && threadIdx.x == 63);
    out[threadIdx.x] = in[i];  // BUG
}

KERNEL(write_before_the_start) {
    const int i = static_cast<int>(threadIdx.x) - (BUG ? 1 : 0);
    out[i] = in[threadIdx.x];  // BUG
}

KERNEL(misaligned_vector) {
    __shared__ __align__(16) float buffer[kCount + 4];
    buffer[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x < 4) buffer[kCount + threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x < 16) {
        float x, y, z, w;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"  // BUG
                     : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
                     : "r"(ptx::shared_address(buffer + threadIdx.x * 4) + 4 * BUG)
                     : "memory");
        out[threadIdx.x * 4] = x;
        out[threadIdx.x * 4 + 1] = y;
        out[threadIdx.x * 4 + 2] = z;
        out[threadIdx.x * 4 + 3] = w;
    }
}

// The window of shared memory ends at what the launch asked for.
KERNEL(shared_past_the_end) {
    __shared__ float buffer[kCount];
    buffer[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    float v;
    asm volatile("ld.shared.f32 %0, [%1];"  // BUG
                 : "=f"(v)
                 : "r"(ptx::shared_address(buffer + threadIdx.x) + (BUG ? 4 * kCount : 0))
                 : "memory");
    out[threadIdx.x] = v;
}

KERNEL(global_access_to_shared) {
    __shared__ float buffer[kCount];
    buffer[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    float v;
#if BUG
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(buffer + threadIdx.x) : "memory");  // BUG
#else
    asm volatile("ld.f32 %0, [%1];" : "=f"(v) : "l"(buffer + threadIdx.x) : "memory");
#endif
    out[threadIdx.x] = v;
}

KERNEL(bulk_copy_past_the_end) {
    __shared__ __align__(128) float buffer[2 * kCount];
    __shared__ u64 full;
    constexpr u32 bytes = BUG ? kBytes + 16 : kBytes;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect(&full, bytes);
        bulk_load(buffer, in, bytes, &full);  // BUG
    }
    __syncthreads();
    ptx::mbarrier_wait(&full, 0);
    out[threadIdx.x] = buffer[threadIdx.x];
}

KERNEL(box_on_a_misaligned_place) {
    __shared__ __align__(128) float buffer[kCount + 32];
    __shared__ u64 full;
    float* place = buffer + (BUG ? 4 : 0);  // 16 bytes on: a box needs 128
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect(&full, kBytes);
        ptx::tma_load(place, &in_map, &full, 0, 0);  // BUG
    }
    __syncthreads();
    ptx::mbarrier_wait(&full, 0);
    out[threadIdx.x] = place[threadIdx.x];
}
