// Tensor maps that a kernel writes. 64 threads.
#include "common.cuh"

__device__ __forceinline__ void replace_address_global(void* map, const void* address) {
    asm volatile("tensormap.replace.tile.global_address.global.b1024.b64 [%0], %1;" ::"l"(map), "l"(address)
                 : "memory");
}

__device__ __forceinline__ void load_and_copy(float* out, const TensorMap* map) {
    __shared__ __align__(128) float buffer[kCount];
    __shared__ u64 full;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect(&full, kBytes);
        ptx::tma_load(buffer, map, &full, 0, 0);  // BUG
    }
    __syncthreads();
    ptx::mbarrier_wait(&full, 0);
    out[threadIdx.x] = buffer[threadIdx.x];
}

// A map in global memory, changed in place: release by the writer, acquire by the user.
KERNEL(map_changed_without_fence) {
    u64* map = reinterpret_cast<u64*>(flags + 96);
    if (threadIdx.x < 16) map[threadIdx.x] = out_map.opaque[threadIdx.x];  // BUG
    __syncwarp();
    if (threadIdx.x == 0) {
        replace_address_global(map, in);  // BUG
#if !BUG
        asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory");
        acquire_map(map);
#endif
    }
    load_and_copy(out, reinterpret_cast<TensorMap*>(map));  // BUG
}

// A map edited in shared memory, then copied out by tensormap.cp_fenceproxy.
KERNEL(map_used_without_acquire) {
    __shared__ __align__(128) u64 draft[16];
    void* map = flags + 96;
    if (threadIdx.x < 32) {
        if (threadIdx.x < 16) draft[threadIdx.x] = out_map.opaque[threadIdx.x];
        __syncwarp();
        if (threadIdx.x == 0) replace_address_shared(draft, in);
        __syncwarp();
        publish_map(map, draft);  // BUG
    }
    __syncthreads();
#if !BUG
    acquire_map(map);
#endif
    load_and_copy(out, reinterpret_cast<TensorMap*>(map));  // BUG
}
