// Whole rows through shared memory by the copy engine: a warp has a ring of stages, and lane 0 issues every
// copy, so that the other lanes and the registers are free, and as many rows are under way as there are
// stages.
//
// A stage is loaded; once the row has come the lanes may read and change it; it may be stored, to any number
// of places. Then it is loaded again. Loads come in the order in which they were issued.
//
// Sizes and addresses, of stages too, are multiples of 16 bytes; a copy is at least 16 bytes and less than
// 1 MiB (a barrier counts no more).
//
// The copy engine is a proxy apart: what it and the lanes do to the same bytes is ordered only so:
//   1. memory -> load: rows that others wrote during this kernel, over NVLink or by a network card: after
//      the word that announces them is acquired, lane 0 or all pass acquired(). Rows of kernels before need
//      nothing.
//   2. load -> lanes: wait().
//   3. lanes' writes -> store: lanes_done(). Also before the stage is loaded again, had it not been stored.
//   4. lanes' reads -> the next load of the stage: load() itself. The stores' reads of it: stores_read().
//   5. store -> a flag or a put that says so: stores_done(), the full wait, and then by lane 0. When a store
//      has only read its source nobody may see yet what it writes.
#pragma once

#include "ptx.cuh"

namespace dsv3 {
namespace bulk {

// All lanes, here and below. Lane 0 does what is done.
__device__ __forceinline__ bool leads() { return threadIdx.x % 32 == 0; }

// What lane 0 knows of memory by now, its copies after this see.
__device__ __forceinline__ void acquired() {
    if (leads()) ptx::fence_proxy_async_global();
}

// The lanes' writes to shared memory come before copies after this.
__device__ __forceinline__ void lanes_done() {
    ptx::fence_proxy_async_shared();
    __syncwarp();
}

// From shared memory. Stores up to the next commit() are one group.
__device__ __forceinline__ void store(u8* target, const u8* stage, u32 bytes) {
    if (leads()) ptx::bulk_store(target, stage, bytes);
}

__device__ __forceinline__ void commit() {
    if (leads()) ptx::bulk_commit_group();
}

// Until all groups but the last kPending have read their stages.
template <u32 kPending = 0>
__device__ __forceinline__ void stores_read() {
    if (leads()) ptx::bulk_wait_group_read<kPending>();
    __syncwarp();
}

// Until what all groups but the last kPending wrote can be seen by lane 0, and by whom it tells.
template <u32 kPending = 0>
__device__ __forceinline__ void stores_done() {
    if (leads()) ptx::bulk_wait_group<kPending>();
    __syncwarp();
}

// Of one warp; each lane has the same. The caller sees to it that no more loads are under way than there are
// stages, and that a stage is not loaded before its stores have read it.
class Ring {
  public:
    static constexpr u32 kBarrierBytes = 16;  // behind each stage

    // Shared memory: stages * (stage_bytes + kBarrierBytes), which nobody uses for anything else.
    __device__ __forceinline__ Ring(u8* shared, u32 stages, u32 stage_bytes)
        : shared_(shared), stages_(stages), stage_bytes_(stage_bytes) {
        if (leads()) {
            for (u32 s = 0; s < stages; ++s) ptx::mbarrier_init(full(s), 1);
            ptx::fence_mbarrier_init();
        }
        __syncwarp();
    }

    // The next stage, which is free, from its byte `at` on, from `source`; perhaps nothing. Lanes have come
    // here after their reads of it.
    __device__ __forceinline__ void load(const u8* source, u32 bytes, u32 at = 0) {
        __syncwarp();
        if (leads()) {
            ptx::mbarrier_arrive_expect(full(loads_), bytes);
            if (bytes) ptx::bulk_load(stage(loads_) + at, source, bytes, full(loads_));
        }
        if (++loads_ == stages_) loads_ = 0;
    }

    // The stage that wait() gives next. Lanes may already write where its load does not.
    __device__ __forceinline__ u8* coming() const { return stage(waits_); }

    // The stage of the oldest load that was not waited for, once it has come.
    __device__ __forceinline__ u8* wait() {
        u8* const row = stage(waits_);
        ptx::mbarrier_wait(full(waits_), parity_);
        if (++waits_ == stages_) waits_ = 0, parity_ ^= 1;
        return row;
    }

    __device__ __forceinline__ u32 stages() const { return stages_; }

  private:
    __device__ __forceinline__ u8* stage(u32 s) const { return shared_ + s * (stage_bytes_ + kBarrierBytes); }
    __device__ __forceinline__ u64* full(u32 s) const {
        return reinterpret_cast<u64*>(stage(s) + stage_bytes_);
    }

    u8* shared_;
    u32 stages_, stage_bytes_;
    u32 loads_ = 0, waits_ = 0, parity_ = 0;
};

}  // namespace bulk
}  // namespace dsv3
