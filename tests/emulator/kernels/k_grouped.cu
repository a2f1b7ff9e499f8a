// How weight gradients over groups of tokens are commonly done, and go wrong: a tensor map in global memory
// describes one group's tokens and is rewritten for the next. Here two groups of 32 floats. 64 threads, of
// which one warp loads. (csrc/kernels/wgrad.cuh needs none of this: its tiles restart at each group, and one
// map serves all.)
#include "common.cuh"

// By a whole warp: a map of the 32 floats at `rows` in `draft`, in shared memory.
__device__ __forceinline__ void draft_map(u64* draft, const TensorMap& model, const float* rows) {
    __syncwarp();  // the last draft has been copied out
    if (threadIdx.x < 16) draft[threadIdx.x] = model.opaque[threadIdx.x];
    __syncwarp();
    if (threadIdx.x == 0) {
        replace_address_shared(draft, rows);
        asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, 1;" ::"r"(
                         ptx::shared_address(draft))
                     : "memory");
    }
    __syncwarp();
}

// A group's floats and, from beyond the map's one row, as many zeros.
struct Groups {
    alignas(128) u64 draft[16];
    alignas(128) float rows[2][kCount];
    u64 full[2];

    __device__ __forceinline__ void init() {
        if (threadIdx.x == 0) {
            ptx::mbarrier_init(&full[0], 1);
            ptx::mbarrier_init(&full[1], 1);
            ptx::fence_mbarrier_init();
        }
        __syncthreads();
    }

    __device__ __forceinline__ void load(u32 group, const void* map) {
        if (threadIdx.x != 0) return;
        ptx::mbarrier_arrive_expect(&full[group], kBytes);
        ptx::tma_load(rows[group], static_cast<const TensorMap*>(map), &full[group], 0, 0);  // BUG
    }

    __device__ __forceinline__ void copy_out(float* out) {
        const u32 group = threadIdx.x / 32;
        ptx::mbarrier_wait(&full[group], 0);
        out[threadIdx.x] = rows[group][threadIdx.x % 32];
    }
};

// The map is rewritten while the copy engine may still read it for the group before. Twin: a map a group.
KERNEL(map_rewritten_while_copies_use_it) {
    __shared__ Groups groups;
    groups.init();
    for (u32 g = 0; g < 2 && threadIdx.x < 32; ++g) {
        void* map = flags + 96 + (BUG ? 0 : g * 32);
        draft_map(groups.draft, in_map, in + g * 32);
        publish_map(map, groups.draft);  // BUG
        acquire_map(map);
        groups.load(g, map);
    }
    groups.copy_out(out);
}

// The copies are waited for, but the new map is not released to the copy engine: it may use the old one from
// its cache. Twin: tensormap.cp_fenceproxy.
KERNEL(map_rewritten_without_release) {
    __shared__ Groups groups;
    groups.init();
    void* map = flags + 96;
    for (u32 g = 0; g < 2 && threadIdx.x < 32; ++g) {
        if (g == 1) ptx::mbarrier_wait(&groups.full[0], 0);
        draft_map(groups.draft, in_map, in + g * 32);
        if (BUG && g == 1) {
            if (threadIdx.x < 16) static_cast<u64*>(map)[threadIdx.x] = groups.draft[threadIdx.x];  // BUG
        } else {
            publish_map(map, groups.draft);
        }
        __syncwarp();
        acquire_map(map);
        groups.load(g, map);
    }
    groups.copy_out(out);
}

// Released, but acquired for the first group only.
KERNEL(map_rewritten_without_acquire) {
    __shared__ Groups groups;
    groups.init();
    void* map = flags + 96;
    for (u32 g = 0; g < 2 && threadIdx.x < 32; ++g) {
        if (g == 1) ptx::mbarrier_wait(&groups.full[0], 0);
        draft_map(groups.draft, in_map, in + g * 32);
        publish_map(map, groups.draft);  // BUG
        if (!BUG || g == 0) acquire_map(map);
        groups.load(g, map);
    }
    groups.copy_out(out);
}
