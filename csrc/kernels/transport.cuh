// What goes between nodes: over InfiniBand by NVSHMEM's public calls that name a queue pair, and nothing else
// of NVSHMEM; or within one GPU, whose memory then holds what all ranks call theirs.
//
// Addresses of another rank are named by this rank's own symmetric address of the same thing. Order holds on
// one queue pair to one rank, and nowhere else: a signal behind data of the same queue pair arrives after it.
// Whoever acquires the signal at system scope then sees the data, and what the sender had seen.
//
// DSV3_NVSHMEM_DECLARED: the functions are declared here instead of by NVSHMEM's headers, which take seconds
// to parse. For the emulator alone, which provides them; the device library has them as templates only.
// DSV3_ONE_GPU: the ranks of all nodes are virtual and share a GPU. A put is a copy by the warp that asks for
// it, done when it returns, and a signal is released behind it: order holds whatever the queue pair. So
// nothing here can show that two words belong on one queue pair, nor what a network delays.
// DSV3_NVSHMEM: what is compiled with NVSHMEM's headers has it. Without any of these there is DSV3_ONE_NODE:
// no network, and nothing here.
#pragma once

#include "ptx.cuh"

#if !defined(DSV3_NVSHMEM) && !defined(DSV3_NVSHMEM_DECLARED) && !defined(DSV3_ONE_GPU)
#define DSV3_ONE_NODE
#endif

#ifdef DSV3_NVSHMEM_DECLARED
extern "C" __device__ void nvshmemx_qp_char_put_signal_nbi_warp(char* target, const char* source,
                                                                unsigned long long bytes,
                                                                unsigned long long* signal,
                                                                unsigned long long value, int operation,
                                                                int rank, int queue_pair);
extern "C" __device__ void nvshmemx_qp_signal_op(unsigned long long* signal, unsigned long long value,
                                                 int operation, int rank, int queue_pair);
extern "C" __device__ void nvshmemx_qp_char_put_nbi_warp(char* target, const char* source,
                                                         unsigned long long bytes, int rank, int queue_pair);
constexpr int NVSHMEM_SIGNAL_SET = 9;
#elif defined(DSV3_NVSHMEM)
#include <nvshmem.h>
#include <nvshmemx.h>
#endif

#ifndef DSV3_ONE_NODE
namespace dsv3 {
namespace transport {

#ifndef DSV3_ONE_GPU

// One warp: `bytes` of symmetric memory to another rank, then its `signal` becomes `value`. The source is in
// use until that rank says that it has the data.
__device__ __forceinline__ void put_signal_warp(u8* target, const u8* source, u64 bytes, u64* signal,
                                                u64 value, u32 rank, i32 queue_pair) {
    nvshmemx_qp_char_put_signal_nbi_warp(reinterpret_cast<char*>(target),
                                         reinterpret_cast<const char*>(source), bytes, signal, value,
                                         NVSHMEM_SIGNAL_SET, static_cast<int>(rank), queue_pair);
}

// One warp: the same without a word.
__device__ __forceinline__ void put_warp(u8* target, const u8* source, u64 bytes, u32 rank, i32 queue_pair) {
    nvshmemx_qp_char_put_nbi_warp(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(source),
                                  bytes, static_cast<int>(rank), queue_pair);
}

// One lane: the other rank's `signal` becomes `value`, after all that this lane has read and seen.
__device__ __forceinline__ void signal(u64* signal, u64 value, u32 rank, i32 queue_pair) {
    nvshmemx_qp_signal_op(signal, value, NVSHMEM_SIGNAL_SET, static_cast<int>(rank), queue_pair);
}

// One lane, once it has acquired `value` or more in a word that another rank's signal set: on transports that
// need a step more before the data can be read, takes it. Does not wait.
__device__ __forceinline__ void settle(u64* signal, u64 value) {
#ifndef DSV3_NVSHMEM_DECLARED
    nvshmem_signal_wait_until(signal, NVSHMEM_CMP_GE, value);
#endif
}

#else

// Virtual ranks' memories lie at equal distances, so that one number can say where another rank's is: the
// distance in pages, and this rank. python: dsv3_kernels.ep.one_gpu.Heap
constexpr u32 kRankBits = 3, kPageBits = 12;

template <class T>
__device__ __forceinline__ T* of_rank(T* own, u32 rank, i32 queue_pair) {
    const i64 own_rank = queue_pair & ((1 << kRankBits) - 1);
    const i64 distance = static_cast<i64>(queue_pair >> kRankBits) << kPageBits;
    return reinterpret_cast<T*>(reinterpret_cast<u64>(own) + (rank - own_rank) * distance);
}

// A multiple of 4 bytes, both ends aligned to 4; by 16 bytes a lane as far as they go.
__device__ __forceinline__ void put_warp(u8* target, const u8* source, u64 bytes, u32 rank, i32 queue_pair) {
    constexpr u32 kInFlight = 8;
    const u32 lane = threadIdx.x % 32;
    u8* const there = of_rank(target, rank, queue_pair);
    const bool aligned = (reinterpret_cast<u64>(there) | reinterpret_cast<u64>(source)) % 16 == 0;
    const u64 wide = aligned ? bytes / 16 * 16 : 0;
    for (u64 first = lane * 16; first < wide; first += kInFlight * 512) {
        U32x4 held[kInFlight];
#pragma unroll
        for (u32 i = 0; i < kInFlight; ++i)
            if (first + i * 512 < wide) held[i] = ptx::load_global(source + first + i * 512);
#pragma unroll
        for (u32 i = 0; i < kInFlight; ++i)
            if (first + i * 512 < wide) ptx::store_global(there + first + i * 512, held[i]);
    }
    for (u64 at = wide + lane * 4; at < bytes; at += 128)
        *reinterpret_cast<u32*>(there + at) = *reinterpret_cast<const u32*>(source + at);
}

__device__ __forceinline__ void signal(u64* signal, u64 value, u32 rank, i32 queue_pair) {
    ptx::store_release_system(of_rank(signal, rank, queue_pair), value);
}

__device__ __forceinline__ void put_signal_warp(u8* target, const u8* source, u64 bytes, u64* word, u64 value,
                                                u32 rank, i32 queue_pair) {
    put_warp(target, source, bytes, rank, queue_pair);
    __syncwarp();
    if (threadIdx.x % 32 == 0) signal(word, value, rank, queue_pair);
}

__device__ __forceinline__ void settle(u64*, u64) {}

#endif

}  // namespace transport
}  // namespace dsv3
#endif
