// Distributed shared memory. A cluster of 2 blocks of 32 threads; block r copies the floats of the other
// block.
#include "common.cuh"

__device__ __forceinline__ void cluster_sync() {
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

__device__ __forceinline__ void wait_cluster(u64* barrier, u32 parity) {
    u32 done = 0;
    while (!done)
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(ptx::shared_address(barrier)), "r"(parity)
            : "memory");
}

KERNEL(peer_read_before_write) {
    __shared__ float buffer[32];
    const u32 rank = ptx::cluster_rank(), peer = rank ^ 1;
    cluster_sync();
    st_cluster(ptx::cluster_address(&buffer[threadIdx.x], peer), in[rank * 32 + threadIdx.x]);  // BUG
#if BUG
    ptx::cluster_arrive();
    const float v = buffer[threadIdx.x];  // BUG
    ptx::cluster_wait();
#else
    cluster_sync();
    const float v = buffer[threadIdx.x];
#endif
    out[peer * 32 + threadIdx.x] = v;  // BUG
}

// A block must not end while another may still use its shared memory.
KERNEL(peer_exits_early) {
    __shared__ float buffer[32];
    const u32 rank = ptx::cluster_rank();
    buffer[threadIdx.x] = in[rank * 32 + threadIdx.x];
    cluster_sync();
    if (rank == 1) {
        float mine = buffer[threadIdx.x], theirs;
        for (u32 i = 0; i < 20; ++i) __nanosleep(100);
        asm volatile("ld.shared::cluster.f32 %0, [%1];"  // BUG
                     : "=f"(theirs)
                     : "r"(ptx::cluster_address(&buffer[threadIdx.x], 0))
                     : "memory");
        out[threadIdx.x] = theirs;  // BUG
        out[32 + threadIdx.x] = mine;
    }
#if !BUG
    cluster_sync();
#endif
}

KERNEL(st_async_without_wait) {
    __shared__ float buffer[32];
    __shared__ u64 full;
    const u32 rank = ptx::cluster_rank(), peer = rank ^ 1;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect(&full, 128);
    }
    cluster_sync();
    st_async(ptx::cluster_address(&buffer[threadIdx.x], peer), in[rank * 32 + threadIdx.x],  // BUG
             ptx::cluster_address(&full, peer));                                             // BUG
#if !BUG
    wait_cluster(&full, 0);
#endif
    out[peer * 32 + threadIdx.x] = buffer[threadIdx.x];  // BUG
    cluster_sync();
}

// An arrive on the peer's barrier releases this thread's writes to the cluster; a waiter with cluster scope
// acquires them.
KERNEL(remote_arrive_too_early) {
    __shared__ float buffer[32];
    __shared__ u64 full;
    const u32 rank = ptx::cluster_rank(), peer = rank ^ 1;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 32);
        ptx::fence_mbarrier_init();
    }
    cluster_sync();
#if BUG
    ptx::mbarrier_arrive_cluster(ptx::cluster_address(&full, peer));
    st_cluster(ptx::cluster_address(&buffer[threadIdx.x], peer), in[rank * 32 + threadIdx.x]);  // BUG
#else
    st_cluster(ptx::cluster_address(&buffer[threadIdx.x], peer), in[rank * 32 + threadIdx.x]);
    ptx::mbarrier_arrive_cluster(ptx::cluster_address(&full, peer));
#endif
    wait_cluster(&full, 0);
    out[peer * 32 + threadIdx.x] = buffer[threadIdx.x];  // BUG
    cluster_sync();
}

// Each waits for the other before it arrives at the barrier that both need.
KERNEL(cluster_wait_in_a_cycle) {
    const u32 rank = ptx::cluster_rank();
#if BUG
    if (rank == 0)
        while (ld_acquire_gpu(flags) == 0) {  // BUG
        }
    cluster_sync();  // BUG
    if (rank == 1 && threadIdx.x == 0) st_release_gpu(flags, 1);
#else
    if (rank == 1 && threadIdx.x == 0) st_release_gpu(flags, 1);
    if (rank == 0)
        while (ld_acquire_gpu(flags) == 0) {
        }
    cluster_sync();
#endif
    out[rank * 32 + threadIdx.x] = in[rank * 32 + threadIdx.x];
}

KERNEL(arrive_at_an_exited_peer) {
    __shared__ u64 full;
    const u32 rank = ptx::cluster_rank();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::fence_mbarrier_init();
    }
    cluster_sync();
    out[rank * 32 + threadIdx.x] = in[rank * 32 + threadIdx.x];
    if (rank == 1 && threadIdx.x == 0) {
        for (u32 i = 0; i < 20; ++i) __nanosleep(100);
        ptx::mbarrier_arrive_cluster(ptx::cluster_address(&full, 0));  // BUG
    }
#if !BUG
    if (rank == 0) wait_cluster(&full, 0);
#endif
}

// The relaxed arrive needs a fence before it to hand anything over.
KERNEL(relaxed_cluster_arrive) {
    __shared__ float buffer[32];
    const u32 rank = ptx::cluster_rank(), peer = rank ^ 1;
    cluster_sync();
    st_cluster(ptx::cluster_address(&buffer[threadIdx.x], peer), in[rank * 32 + threadIdx.x]);  // BUG
#if !BUG
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    ptx::cluster_wait();
    out[peer * 32 + threadIdx.x] = buffer[threadIdx.x];  // BUG
}

// A copy into the peer's shared memory has landed when its bytes are counted there.
KERNEL(copy_to_peer_without_wait) {
    __shared__ __align__(128) float source[32], buffer[32];
    __shared__ u64 full;
    const u32 rank = ptx::cluster_rank(), peer = rank ^ 1;
    source[threadIdx.x] = in[rank * 32 + threadIdx.x];
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect(&full, 128);
    }
    ptx::fence_proxy_async_shared();
    cluster_sync();
    if (threadIdx.x == 0)
        asm volatile(
            "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];" ::"r"(  // BUG
                ptx::cluster_address(buffer, peer)),
            "r"(ptx::shared_address(source)), "r"(ptx::cluster_address(&full, peer))
            : "memory");
#if !BUG
    wait_cluster(&full, 0);
#endif
    out[peer * 32 + threadIdx.x] = buffer[threadIdx.x];  // BUG
    cluster_sync();
}
