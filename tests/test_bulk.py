"""csrc/kernels/bulk.cuh: rows through shared memory, from block to block, as it is and broken."""

import functools
import random

import mutate
import pytest
import torch
from fp8_helpers import fresh_generator

from dsv3_kernels import emulator, jit

# Block 0: warp w takes every warps-th row, changes its last 16 bytes and stores it twice: to `there`, and to
# `middle` but for these 16 bytes, which lanes write; a flag every `every` rows. Block 1: the same warp loads
# the rows from `middle`, and its lanes write them to `out`.
KERNEL = """
using namespace dsv3;
struct Task {
    u8 *there, *middle, *out;
    u64* flags;
    const u8* rows;
    u32 count, row_bytes, stride, stages, every;
};

__device__ void send(const Task& o, bulk::Ring& ring, u32 warp, u32 warps) {
    const u32 mine = warp < o.count ? (o.count - warp - 1) / warps + 1 : 0, lane = threadIdx.x % 32;
    const u32 ahead = o.stages > 1 ? o.stages - 1 : 1, end = o.row_bytes - 16;
    u32 loaded = 0;
    for (u32 i = 0; i < mine; ++i) {
        for (; loaded < min(i + ahead, mine); ++loaded)
            ring.load(o.rows + (warp + loaded * warps) * o.stride, o.row_bytes);
        const u32 at = (warp + i * warps) * o.stride;
        u8* row = ring.wait();
        if (lane < 4) {
            u32* word = reinterpret_cast<u32*>(row + end) + lane;
            *word ^= lane + i;
            reinterpret_cast<u32*>(o.middle + at + end)[lane] = *word;
        }
        bulk::lanes_done();
        bulk::store(o.there + at, row, o.row_bytes);
        if (end) bulk::store(o.middle + at, row, end);
        bulk::commit();
        if ((i + 1) % o.every == 0 || i + 1 == mine) {
            bulk::stores_done();
            if (lane == 0) ptx::store_release_system(o.flags + warp, i + 1);
        }
        if (o.stages > 1)
            bulk::stores_read<1>();
        else
            bulk::stores_read();
    }
}

__device__ void receive(const Task& o, bulk::Ring& ring, u32 warp, u32 warps) {
    const u32 mine = warp < o.count ? (o.count - warp - 1) / warps + 1 : 0, lane = threadIdx.x % 32;
    u64 came = 0;
    u32 loaded = 0;
    for (u32 i = 0; i < mine; ++i) {
        for (; loaded < min(i + o.stages, mine); ++loaded) {
            while (came <= loaded) {
                if (lane == 0) came = ptx::load_acquire_system(o.flags + warp);
                came = __shfl_sync(0xffffffffu, came, 0);
                bulk::acquired();
            }
            ring.load(o.middle + (warp + loaded * warps) * o.stride, o.row_bytes);
        }
        const u8* row = ring.wait();
        for (u32 at = 4 * lane; at < o.row_bytes; at += 128)
            *reinterpret_cast<u32*>(o.out + (warp + i * warps) * o.stride + at) =
                *reinterpret_cast<const u32*>(row + at);
    }
}

extern "C" __global__ void relay(u8* there, u8* middle, u8* out, u64* flags, const u8* rows, u32 count,
                                 u32 row_bytes, u32 stride, u32 stages, u32 every) {
    extern __shared__ __align__(16) u8 shared[];
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Task task{there, middle, out, flags, rows, count, row_bytes, stride, stages, every};
    bulk::Ring ring(shared + warp * stages * (row_bytes + bulk::Ring::kBarrierBytes), stages, row_bytes);
    blockIdx.x == 0 ? send(task, ring, warp, warps) : receive(task, ring, warp, warps);
}
"""


@functools.cache
def relay(old="", new=""):
    source = mutate.source("bulk.cuh") + KERNEL
    assert not old or source.count(old) == 1, f"{old!r} is not once in the kernel: mend this table"
    return jit.compile_ptx(source.replace(old, new), lineinfo=True)


def run(ptx, seed):
    """Some rows of a random number of 16-byte pieces: what is expected, and the three copies of it."""
    chance = random.Random(seed)
    count, warps, stages = chance.randrange(24), chance.choice([1, 2, 4]), chance.choice([1, 2, 3, 5])
    pieces, every = chance.choice([1, 2, 3, 31, 33, 57, 101]), chance.choice([1, 2, 6])
    row, stride = 16 * pieces, 16 * (pieces + chance.choice([0, 1, 4]))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(256, (count, stride), generator=generator, dtype=torch.uint8)
    gpu = emulator.VirtualGPU(num_sms=2, seed=seed, schedule="pct" if seed % 2 else "random")
    copies = [torch.full((count + 1, stride), 0xA5, dtype=torch.uint8) for _ in range(3)]
    for copy in copies:
        gpu.mark_unwritten(copy)
    gpu.launch(
        ptx,
        "relay",
        grid=(2, 1, 1),
        block=(32 * warps, 1, 1),
        shared_bytes=warps * stages * (row + 16),
        args=(*copies, torch.zeros(warps, dtype=torch.int64), rows, count, row, stride, stages, every),
    )
    want = torch.full((count + 1, stride), 0xA5, dtype=torch.uint8)  # nothing beside the rows
    want[:-1, :row] = rows[:, :row]
    changed = want[:-1, row - 16 : row].contiguous().view(torch.int32)
    changed ^= (torch.arange(4)[None] + torch.arange(count)[:, None] // warps).int()
    want[:-1, row - 16 : row] = changed.view(torch.uint8)
    return want, copies


def test_rows_arrive_bit_by_bit():
    first = fresh_generator().initial_seed() % (1 << 30)
    for seed in range(first, first + 40):
        want, copies = run(relay(), seed)
        assert all(torch.equal(copy, want) for copy in copies), seed


FENCED = "    ptx::fence_proxy_async_shared();\n    __syncwarp();"
DONE = "bulk::stores_done();\n            if (lane == 0)"
STORE = "if (end) bulk::store(o.middle + at, row, end);"

# name: (what to replace, by what)
PLANTED = {
    "a flag when the stores have only read": (DONE, DONE.replace("done", "read")),
    "a flag before the last group is done": (DONE, DONE.replace("done", "done<1>")),
    "a store outside the group that is waited for": (
        STORE + "\n        bulk::commit();",
        f"bulk::commit(); {STORE}",
    ),
    "no fence between the lanes' writes and a store": (FENCED, "__syncwarp();"),
    "the lanes do not wait for each other": (FENCED, "ptx::fence_proxy_async_shared();"),
    "no fence between a flag and a load": ("bulk::acquired();", ""),
    "a stage is loaded before its store has read it": ("bulk::stores_read<1>();", "bulk::stores_read<2>();"),
    "a stage is loaded while lanes read it": (
        "        __syncwarp();\n        if (leads()) {\n            ptx::mbarrier_arrive",
        "        if (leads()) {\n            ptx::mbarrier_arrive",
    ),
    "the parity of a lap is forgotten": ("waits_ = 0, parity_ ^= 1;", "waits_ = 0;"),
    "barriers are not fenced": ("ptx::fence_mbarrier_init();", ""),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_broken_order_is_noticed(name):
    for seed in range(200):
        try:
            want, copies = run(relay(*PLANTED[name]), seed)
        except emulator.EmulationError:
            return
        if not all(torch.equal(copy, want) for copy in copies):
            return
    pytest.fail("nobody noticed in 200 runs")
