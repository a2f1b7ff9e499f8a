// What goes over InfiniBand: NVSHMEM's public calls that name a queue pair, and nothing else of NVSHMEM.
//
// Addresses of another rank are named by this rank's own symmetric address of the same thing. Order holds on
// one queue pair to one rank, and nowhere else: a signal behind data of the same queue pair arrives after it.
// Whoever acquires the signal at system scope then sees the data, and what the sender had seen.
//
// DSV3_NVSHMEM_DECLARED: the functions are declared here instead of by NVSHMEM's headers, which take seconds
// to parse. For the emulator alone, which provides them; the device library has them as templates only.
// DSV3_NVSHMEM: what is compiled with NVSHMEM's headers has it. Without these there is DSV3_ONE_NODE: no
// network, and nothing here.
#pragma once

#include "types.cuh"

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

}  // namespace transport
}  // namespace dsv3
#endif
