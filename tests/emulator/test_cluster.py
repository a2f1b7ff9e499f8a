"""Thread-block clusters, and clusters of virtual GPUs."""

import pytest
import torch
from test_sync import cuda

from dsv3_kernels import emulator, jit


@pytest.mark.parametrize("seed", range(6))
def test_distributed_shared_memory_and_remote_arrive(seed):
    out = torch.zeros(4, 32, dtype=torch.int32)
    gpu = cuda(
        """k(int* o) { __shared__ int s[32]; __shared__ u64 b; u32 r = ptx::cluster_rank();
    if (threadIdx.x == 0) { ptx::mbarrier_init(&b, 32); ptx::fence_mbarrier_init(); }
    ptx::cluster_arrive(); ptx::cluster_wait();
    u32 next = (r + 1) % 4;
    asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(ptx::cluster_address(s,
    next) + 4 * threadIdx.x), "r"(r * 100 + threadIdx.x) : "memory");
    ptx::mbarrier_arrive_cluster(ptx::cluster_address(&b, next));
    ptx::mbarrier_wait(&b, 0); o[blockIdx.x * 32 + threadIdx.x] = s[threadIdx.x]; ptx::cluster_arrive();
    ptx::cluster_wait(); }""",
        out,
        grid=4,
        cluster=4,
        seed=seed,
    )
    assert out.tolist() == [[(r + 3) % 4 * 100 + t for t in range(32)] for r in range(4)]
    assert gpu.counters["distributed_shared_bytes"] == 4 * 32 * 4


def test_cluster_registers():
    out = torch.zeros(12, 4, dtype=torch.int32)
    cuda(
        """k(int* o) { u32 a, b, c, d; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(a));
            asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(b));
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(c)); asm("mov.u32 %0, %%nclusterid.x;" : "=r"(d));
    int* p = o + 4 * blockIdx.x;
    p[0] = a; p[1] = b; p[2] = c; p[3] = d; }""",
        out,
        grid=12,
        cluster=3,
        block=1,
    )
    assert out.tolist() == [[i % 3, 3, i // 3, 4] for i in range(12)]


def ring():
    """Each rank writes to its right neighbour and raises its flag."""
    return jit.compile_ptx("""
    extern "C" __global__ void k(int** data, int** flags, int* out, int rank, int size) {
    int next = (rank + 1) % size, v;
    data[next][threadIdx.x] = rank * 1000 + threadIdx.x;
    __syncwarp();
    if (threadIdx.x == 0) {
        asm volatile("st.release.sys.global.u32 [%0], 1;" :: "l"(flags[next]) : "memory");
        do { asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(flags[rank]) : "memory"); }
        while (!v);
    }
    __syncwarp();
    out[threadIdx.x] = data[rank][threadIdx.x]; }""")


def buffers(cluster, size):
    data, flags, out = ([torch.zeros(32, dtype=torch.int32) for _ in range(size)] for _ in range(3))
    tables = [torch.tensor([cluster.address_of(t, r) for r, t in enumerate(ts)]) for ts in (data, flags)]
    return out, tables, (data, flags)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("together", [True, False])
def test_ranks_pass_messages(seed, together):
    cluster = emulator.VirtualCluster(nodes=2, gpus_per_node=2, seed=seed)
    out, tables, _kept = buffers(cluster, 4)
    shape = {"grid": (1, 1, 1), "block": (32, 1, 1)}
    if together:
        cluster.launch(ring(), "k", args=[[*tables, out[r], r, 4] for r in range(4)], **shape)
    else:

        def program(rank, group):
            assert group.all_gather_object(rank * rank) == [0, 1, 4, 9]
            emulator.current().launch(ring(), "k", args=[*tables, out[rank], rank, 4], **shape)
            group.barrier()
            return out[rank][0].item()

        assert cluster.run(program) == [3000, 0, 1000, 2000]
    assert [o.tolist() for o in out] == [[(r + 3) % 4 * 1000 + t for t in range(32)] for r in range(4)]
    assert cluster.counters["launches"] == 4 and cluster.counters["peer_bytes"] > 0


def test_a_rank_that_does_not_launch_leaves_the_others_stuck():
    cluster = emulator.VirtualCluster(nodes=1, gpus_per_node=2)
    out, tables, _kept = buffers(cluster, 2)

    def program(rank, group):
        if rank == 0:
            emulator.current().launch(
                ring(), "k", grid=(1, 1, 1), block=(32, 1, 1), args=[*tables, out[0], 0, 2]
            )

    with pytest.raises(emulator.DeadlockError, match="rank 0"):
        cluster.run(program)
    with pytest.raises(emulator.DeadlockError, match="have ended"):
        emulator.VirtualCluster(1, 2).run(lambda rank, group: group.barrier() if rank == 0 else None)
    with pytest.raises(ValueError, match="expected 2"):
        cluster.launch(ring(), "k", grid=(1, 1, 1), block=(32, 1, 1), args=[[]])


def test_an_error_in_a_rank_is_raised():
    def program(rank, group):
        if rank == 1:
            raise KeyError("broken")
        group.barrier()

    with pytest.raises((KeyError, emulator.EmulationError)):
        emulator.VirtualCluster(1, 3).run(program)


@pytest.mark.parametrize("op", ["add.u32", "min.s32", "max.u32", "and.b32", "or.b32", "xor.b32", "inc.u32"])
def test_asynchronous_reductions_into_a_peer(op):
    """32 lanes of block 0 reduce into one word of block 1, which waits for the bytes of all of them."""
    name, kind = op.split(".")
    for seed in range(4):
        out = torch.zeros(1, dtype=torch.int32)
        cuda(
            f"""k(int* o) {{ __shared__ u32 s; __shared__ u64 b;
    if (threadIdx.x == 0) {{ s = 12; ptx::mbarrier_init(&b, 1); ptx::fence_mbarrier_init();
        if (blockIdx.x == 1) ptx::mbarrier_arrive_expect(&b, 32 * 4); }}
    ptx::cluster_arrive(); ptx::cluster_wait();
    if (blockIdx.x == 0) asm volatile(
        "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.{name}.{kind} [%0], %1, [%2];"
        :: "r"(ptx::cluster_address(&s, 1)), "r"(threadIdx.x + 5), "r"(ptx::cluster_address(&b, 1)) : "memory");
    if (blockIdx.x == 1) {{ ptx::mbarrier_wait(&b, 0); if (threadIdx.x == 0) *o = s; }}
    ptx::cluster_arrive(); ptx::cluster_wait(); }}""",
            out,
            grid=2,
            cluster=2,
            block=32,
            seed=seed,
        )
        value = 12
        for x in range(5, 37):
            value = {
                "add": value + x,
                "min": min(value, x),
                "max": max(value, x),
                "and": value & x,
                "or": value | x,
                "xor": value ^ x,
                "inc": 0 if value >= x else value + 1,
            }[name]
        if name == "inc":  # depends on the order
            assert 0 <= out.item() <= 36
        else:
            assert out.item() == value
