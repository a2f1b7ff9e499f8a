// What the kernels of the planted-bug suite share.
//
// Every kernel has the same arguments and, correct, the same effect: out[i] = in[i] for 64 floats. Compiled
// with BUG=1 it has one bug; the lines marked BUG are where the emulator may report it.
#pragma once

#include "ptx.cuh"

using namespace dsv3;

// flags: 16 zeros. in_map, out_map: the same floats as [2, 32], boxes of everything, no swizzle.
#define KERNEL(name)                                                          \
    extern "C" __global__ void name(float* out, const float* in, u32* flags,  \
                                    const __grid_constant__ TensorMap in_map, \
                                    const __grid_constant__ TensorMap out_map)

constexpr u32 kCount = 64;
constexpr u32 kBytes = kCount * sizeof(float);

__device__ __forceinline__ void st_relaxed_gpu(u32* p, u32 v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void st_release_gpu(u32* p, u32 v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void st_release_cta(u32* p, u32 v) {
    asm volatile("st.release.cta.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ u32 ld_relaxed_gpu(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u32 ld_acquire_gpu(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u32 ld_acquire_cta(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.cta.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u32 atomic_add_relaxed_gpu(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}

__device__ __forceinline__ u32 ld_weak_shared(const u32* p) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(ptx::shared_address(p)) : "memory");
    return v;
}

// Non-bulk asynchronous copy of 4 bytes.
__device__ __forceinline__ void cp_async(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(ptx::shared_address(shared)), "l"(global)
                 : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void bulk_load(void* shared, const void* global, u32 bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            ptx::shared_address(shared)),
        "l"(global), "r"(bytes), "r"(ptx::shared_address(barrier))
        : "memory");
}
__device__ __forceinline__ void bulk_store(void* global, const void* shared, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(ptx::shared_address(shared)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void bulk_wait_group() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
__device__ __forceinline__ void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ void arrive_count(u64* barrier, u32 count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(ptx::shared_address(barrier)),
                 "r"(count)
                 : "memory");
}

__device__ __forceinline__ void st_cluster(u32 address, float v) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
// Lands on the peer's barrier as 4 bytes.
__device__ __forceinline__ void st_async(u32 address, float v, u32 barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
        "r"(__float_as_uint(v)), "r"(barrier)
        : "memory");
}

// Tensor maps that a kernel writes.
__device__ __forceinline__ void replace_address_shared(void* map, const void* address) {
    asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" ::"r"(
                     ptx::shared_address(map)),
                 "l"(address)
                 : "memory");
}

// By a whole warp: 128 bytes from shared to global memory, released to the tensor-map proxy.
__device__ __forceinline__ void publish_map(void* map, const void* draft) {
    asm volatile(
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
        "[%0], [%1], 128;" ::"l"(map),
        "r"(ptx::shared_address(draft))
        : "memory");
}

__device__ __forceinline__ void acquire_map(const void* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}
