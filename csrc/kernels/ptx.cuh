// The only inline PTX in the tree, but for a chapter that stands apart, ptx_wgmma.cuh: one small function an
// instruction, ordered by the chapters of the PTX ISA manual. No CUDA or standard header is included, so that
// NVRTC needs no toolkit.
#pragma once

#include "types.cuh"

namespace dsv3 {
namespace ptx {

// ---- Floating point instructions

// IEEE division, whatever --use_fast_math says.
__device__ __forceinline__ float div_rn(float a, float b) {
    float d;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

__device__ __forceinline__ float rcp_rn(float a) {
    float d;
    asm("rcp.rn.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// Within the last bits; subnormal operands and results are 0.
__device__ __forceinline__ float rcp_approx_ftz(float a) {
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// 2^a, within the last bits; subnormal operands and results are 0.
__device__ __forceinline__ float ex2_approx_ftz(float a) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// NaN if either operand is NaN; plain fmaxf would drop it.
__device__ __forceinline__ float max_nan(float a, float b) {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

__device__ __forceinline__ float abs(float a) {
    float d;
    asm("abs.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// ---- Data movement and conversion instructions

// No instruction; but what was computed from v before is not kept in registers for use after it.
__device__ __forceinline__ void forget_derived(u32& v) { asm volatile("" : "+r"(v)); }

// 16 bytes that another GPU or block may have written during this kernel; they stay out of L1.
__device__ __forceinline__ U32x4 load_global(const void* address) {
    U32x4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return v;
}

// 16 bytes that no thread of this kernel writes; they are read once, so they need no place in L1.
__device__ __forceinline__ U32x4 load_global_nc(const void* address) {
    U32x4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(address)));
    return v;
}

__device__ __forceinline__ u64 load_global_nc_u64(const void* address) {
    u64 v;
    asm volatile("ld.global.nc.u64 %0, [%1];" : "=l"(v) : "l"(__cvta_generic_to_global(address)));
    return v;
}

__device__ __forceinline__ u32 load_global_nc_u32(const void* address) {
    u32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(address)));
    return v;
}

__device__ __forceinline__ void store_global(void* address, U32x4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_global(u8* address, u32 v) {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(v) : "memory");
}

__device__ __forceinline__ void store_global(float* address, float v) {
    asm volatile("st.global.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "f"(v) : "memory");
}

__device__ __forceinline__ float shuffle_xor(float value, u32 lane_mask) {
    float d;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(d) : "f"(value), "r"(lane_mask));
    return d;
}

// Two floats to two e4m3 bytes, round to nearest even, saturating; NaN becomes 0x7F. `low` lands in bits 0
// to 7.
__device__ __forceinline__ u16 e4m3x2(float low, float high) {
    u16 d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
    return d;
}

// Two e4m3 bytes to two fp16, exactly.
__device__ __forceinline__ u32 e4m3x2_to_fp16x2(u16 codes) {
    u32 d;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(codes));
    return d;
}

__device__ __forceinline__ float fp16_to_float(u16 bits) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(bits));
    return d;
}

// Two floats to two bf16, round to nearest even. `low` lands in bits 0 to 15.
__device__ __forceinline__ u32 bf16x2(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ float load_global_nc_float(const float* address) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(__cvta_generic_to_global(address)));
    return v;
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float load_shared(const float* address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(shared_address(address)));
    return v;
}

__device__ __forceinline__ Float2 load_shared(const Float2* address) {
    Float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(shared_address(address)));
    return v;
}

__device__ __forceinline__ void store_shared(Float2* address, Float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared_address(address)), "f"(v.x), "f"(v.y)
                 : "memory");
}

__device__ __forceinline__ U32x4 load_shared(const U32x4* address) {
    U32x4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared_address(address)));
    return v;
}

__device__ __forceinline__ void store_shared(U32x4* address, U32x4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(address)), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// The address of the same variable in the shared memory of another block of the cluster.
__device__ __forceinline__ u32 cluster_address(const void* pointer, u32 rank) {
    u32 d;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(shared_address(pointer)), "r"(rank));
    return d;
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- Data movement: bulk copies by the copy engine (TMA)

// One box to shared memory; its bytes, those outside the tensor included, are completed on `barrier`.
// Coordinates count elements, innermost first.
__device__ __forceinline__ void tma_load(void* target, const TensorMap* map, u64* barrier, u32 x, u32 y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
        "%4}], [%2];" ::"r"(shared_address(target)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void tma_load(void* target, const TensorMap* map, u64* barrier, u32 x, u32 y,
                                         u32 z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
        "%4, %5}], [%2];" ::"r"(shared_address(target)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// One box to the same place in the shared memory of every block of the cluster in `blocks`, a bit a rank;
// each block's `barrier` completes the bytes that landed there.
__device__ __forceinline__ void tma_load_multicast(void* target, const TensorMap* map, u64* barrier, u32 x,
                                                   u32 y, u16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], "
        "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(target)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
        : "memory");
}

// One box from shared memory; what lies outside the tensor is not written. Belongs to the thread's open bulk
// group.
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* source, u32 x, u32 y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        "r"(shared_address(source)), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap* map, const void* source, u32 x, u32 y, u32 z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
        "r"(shared_address(source)), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// `bytes`, a multiple of 16, of global memory to shared memory, both at multiples of 16; completed on
// `barrier`.
__device__ __forceinline__ void bulk_load(void* target, const void* source, u32 bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(target)),
        "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// The same the other way. Belongs to the thread's open bulk group.
__device__ __forceinline__ void bulk_store(void* target, const void* source, u32 bytes) {
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(target)),
        "r"(shared_address(source)), "r"(bytes)
        : "memory");
}

__device__ __forceinline__ void bulk_commit_group() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most `kPending` of the thread's bulk groups may still read their source.
template <u32 kPending>
__device__ __forceinline__ void bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until at most `kPending` of them are under way: what the others wrote, this thread sees, and may release.
template <u32 kPending>
__device__ __forceinline__ void bulk_wait_group() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Parallel synchronization and communication instructions

// Barrier `id` (0 is __syncthreads') among `threads` threads, whole warps.
__device__ __forceinline__ void named_barrier_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Makes no writes visible but those that a fence has released.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 d;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(d));
    return d;
}

// This thread's writes to shared memory before it come before bulk copies' and wgmma's accesses after it.
__device__ __forceinline__ void fence_proxy_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory; and what this thread has acquired comes before its bulk copies after it.
__device__ __forceinline__ void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Makes mbarrier initialisations visible to the copy engine and to the cluster, after a barrier that both
// sides pass.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Programmatic dependent launch: until the grids this one depends on have ended and their writes are visible.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The dependent grid may start once every block has come here or ended.
__device__ __forceinline__ void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// What other GPUs wrote before they released this value is visible to this thread after it.
__device__ __forceinline__ u64 load_acquire_system(const u64* address) {
    u64 v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];"
                 : "=l"(v)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return v;
}

// What this thread wrote before, or saw by a barrier, is visible to whoever acquires this value.
__device__ __forceinline__ void store_release_system(u64* address, u64 v) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "l"(v)
                 : "memory");
}

// The value before; orders this thread's accesses among the blocks of the GPU, both ways.
__device__ __forceinline__ u64 fetch_add_device(u64* address, u64 v) {
    u64 before;
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
                 : "=l"(before)
                 : "l"(__cvta_generic_to_global(address)), "l"(v)
                 : "memory");
    return before;
}

// The value before; of a word in shared memory, orders this thread's accesses within the block, both ways.
__device__ __forceinline__ u32 fetch_add_block(u32* address, u32 v) {
    u32 before;
    asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "r"(shared_address(address)), "r"(v)
                 : "memory");
    return before;
}

// Nanoseconds.
__device__ __forceinline__ u64 global_timer() {
    u64 d;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(d));
    return d;
}

// True for one lane of the calling warp, all of whose lanes must call.
__device__ __forceinline__ bool elect_one() {
    u32 elected;
    asm volatile(
        "{\n.reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(elected));
    return elected != 0;
}

__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the barrier of another block of the cluster; the address is cluster_address()'s.
__device__ __forceinline__ void mbarrier_arrive_cluster(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same for a thread that has only read, and has no writes to make visible in the other block: without the
// release at cluster scope, which would cost a membar.gpu.
__device__ __forceinline__ void mbarrier_arrive_cluster_reader(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and the phase also waits for `bytes` bytes of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// True once the phase of this parity has completed; may suspend the thread for a while before it gives up.
__device__ __forceinline__ bool mbarrier_try_wait(u64* barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

// ---- Warp-level matrix instructions

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void stmatrix(void* row, u32 m0, u32 m1, u32 m2, u32 m3) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
        "r"(m0), "r"(m1), "r"(m2), "r"(m3)
        : "memory");
}

// The same, each matrix transposed: lane i gives the address of column i % 8 of matrix i / 8.
__device__ __forceinline__ void stmatrix_transposed(void* column, u32 m0, u32 m1, u32 m2, u32 m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(column)),
                 "r"(m0), "r"(m1), "r"(m2), "r"(m3)
                 : "memory");
}

// ---- Special registers

// Of dynamic shared memory, that the block was launched with.
__device__ __forceinline__ u32 dynamic_shared_bytes() {
    u32 d;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(d));
    return d;
}

// ---- Miscellaneous instructions

// A warpgroup's registers a thread; called by all its warps. Given-up registers are free for the others to
// take.
template <u32 kRegisters>
__device__ __forceinline__ void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <u32 kRegisters>
__device__ __forceinline__ void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace ptx
}  // namespace dsv3
