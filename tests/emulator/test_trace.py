"""The trace: rows of warps, engines and links, and slices that stand for what they did in virtual time."""

import itertools
import json

import pytest
import torch
from gemm_runs import run_gemm
from test_sync import cuda
from test_virtual_time import LATENCY, MEGAHERTZ, exchange

from dsv3_kernels import emulator, jit


def read(gpu, path):
    """(process, row) -> its slices in order, as (start, end, category, name, args); also checks the file's form."""
    gpu.trace(path)
    trace = json.loads(path.read_text())
    assert trace["otherData"]["dropped_slices"] == 0
    processes = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    names = {
        e["tid"]: (processes[e["pid"]], e["args"]["name"])
        for e in trace["traceEvents"]
        if e["name"] == "thread_name"
    }
    assert len(set(names.values())) == len(names)
    rows = {name: [] for name in names.values()}
    for e in trace["traceEvents"]:
        assert e["ph"] in "MX" and isinstance(e["name"], str)
        if e["ph"] == "M":
            continue
        start, end = e["args"]["cycles"]
        assert e["ts"] == start / 1e3 and e["dur"] == (end - start) / 1e3 and end > start
        rows[names[e["tid"]]].append((start, end, e["cat"], e["name"], e["args"]))
    for slices in rows.values():
        assert slices and all(a[1] <= b[0] for a, b in itertools.pairwise(slices))
    return rows


def of_one_block(rows):
    assert len({process for process, _ in rows}) == 1
    return {row: slices for (_, row), slices in rows.items()}


def gemm_rows(tmp_path, m, n, k, tile, seed, schedule="random"):
    gpu, _ = run_gemm(m, n, k, tile=tile, seed=seed, schedule=schedule)
    return of_one_block(read(gpu, tmp_path / "trace.json")), gpu


@pytest.mark.parametrize(
    ("seed", "schedule"), [(0, "random"), (1, "random"), (0, "pct"), (0, "round_robin"), (0, "timed")]
)
def test_engines_of_a_gemm_are_busy_as_long_as_their_work_takes(tmp_path, seed, schedule):
    m, n, k = 128, 128, 512
    rows, gpu = gemm_rows(tmp_path, m, n, k, (128, 128), seed, schedule)
    tensor, loads, stores = rows["tensor core"], rows["copy engine"], rows["bulk stores"]
    assert (
        {s[2] for s in tensor} == {"wgmma"}
        and {s[2] for s in loads} == {"load"}
        and {s[2] for s in stores} == {"store"}
    )
    assert len(tensor) == gpu.counters["wgmma"] == 2 * k // 32
    assert sum(end - start for start, end, *_ in tensor) == m * n * k // 4096
    assert sorted({s[4]["warpgroup"] for s in tensor}) == [0, 1]
    assert all(end - start == args["bytes"] // 64 for start, end, _, _, args in loads + stores)
    assert sum(s[4]["bytes"] for s in loads) == k // 128 * ((m + n) * 128 + 4 * m)
    assert sum(s[4]["bytes"] for s in stores) == m * n * 2
    assert {f"warp {w}" for w in range(9)} <= rows.keys()
    # Everything has ended when the launch has, and the last store has reached memory.
    assert max(s[1] for slices in rows.values() for s in slices) <= gpu.counters["cycles"]
    assert stores[-1][1] + LATENCY // 2 <= gpu.counters["cycles"]


@pytest.mark.parametrize("schedule", ["random", "timed"])
def test_a_gemm_overlaps_copies_tensor_core_and_promotion(tmp_path, schedule):
    rows, _ = gemm_rows(tmp_path, 128, 128, 1024, (128, 128), 0, schedule)
    tensor, loads = rows["tensor core"], rows["copy engine"]

    def common(some, others):
        return sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in some for b in others)

    assert common(tensor, loads) > 2000
    # One warpgroup promotes while the other's wgmma run.
    for warp, other in (("warp 0", 1), ("warp 4", 0)):
        promotions = [s for s in rows[warp] if s[3].startswith("float gemm.cuh:")]
        assert len(promotions) == 1024 // 128 and all(64 <= s[1] - s[0] < 140 for s in promotions)
        assert common(promotions, [s for s in tensor if s[4]["warpgroup"] == other]) > 0.6 * 66 * len(
            promotions
        )
    # Nothing is multiplied before the first stage has landed, nothing stored before a warpgroup's last product.
    assert tensor[0][0] >= loads[2][1]
    assert rows["bulk stores"][0][0] >= min(
        max(s[1] for s in tensor if s[4]["warpgroup"] == g) for g in (0, 1)
    )
    for warp in ("warp 0", "warp 4", "warp 8"):
        assert all(a[1] == b[0] for a, b in itertools.pairwise(rows[warp]))  # no gap
        assert any(s[3].startswith("wait for mbarrier at shared offset") for s in rows[warp])


@pytest.mark.parametrize(("seed", "schedule"), [(0, "random"), (1, "random"), (2, "pct"), (0, "timed")])
def test_waits_of_a_gemm_end_with_what_they_wait_for(tmp_path, seed, schedule):
    rows, _ = gemm_rows(tmp_path, 128, 128, 768, (128, 128), seed, schedule)
    landed = {s[1] for s in rows["copy engine"]}
    for first_warp, warpgroup in ((0, 0), (4, 1)):
        ends = [s[1] for s in rows["tensor core"] if s[4]["warpgroup"] == warpgroup]
        for warp in range(first_warp, first_warp + 4):
            for _, end, category, name, args in rows[f"warp {warp}"]:
                if category != "wait":
                    continue
                if name.startswith("wait for wgmma "):
                    assert end == ends[int(name.split()[3]) - 1] and args["instruction"].startswith(
                        "wgmma.wait_group"
                    )
                elif name.startswith("wait for mbarrier"):
                    assert end in landed and "pipeline.cuh" in args["source"]
    # The producer goes on when the last warp has released a stage: never before the wgmma that read it are done.
    released = [s[1] for s in rows["warp 8"] if s[3].startswith("wait for mbarrier")]
    assert released and min(released) >= rows["tensor core"][3][1]


@pytest.mark.parametrize("seed", range(6))
def test_a_wait_ends_when_the_bytes_are_there(tmp_path, seed):
    source = """k(const int* x) { __shared__ __align__(128) int s[1024]; __shared__ u64 b;
        if (threadIdx.x == 0) { ptx::mbarrier_init(&b, 1); ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(&b, 4096);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 4096, [%2];" ::
    "r"(ptx::shared_address(s)), "l"(x), "r"(ptx::shared_address(&b)) : "memory"); }
    __syncthreads(); ptx::mbarrier_wait(&b, 0); }"""
    gpu = cuda(source, torch.zeros(1024, dtype=torch.int32), seed=seed, block=64)
    rows = of_one_block(read(gpu, tmp_path / "t.json"))
    ((start, end, *_),) = rows["copy engine"]
    assert end - start == 4096 // 64 and start >= LATENCY
    for warp in (0, 1):
        waits = [s for s in rows[f"warp {warp}"] if s[3].startswith("wait for mbarrier")]
        assert [s[1] for s in waits] == [end]
    barrier = [s for s in rows["warp 1"] if s[3] == "wait for barrier 0"]
    assert len(barrier) == 1 and barrier[0][1] < end


def test_launches_blocks_and_ranks_have_processes(tmp_path):
    gpu = emulator.VirtualGPU(num_sms=1)
    for _ in range(2):
        cuda(
            "k(int* o) { atomicAdd(o, 1); __syncthreads(); }",
            torch.zeros(1, dtype=torch.int32),
            gpu=gpu,
            grid=2,
        )
    rows = read(gpu, tmp_path / "t.json")
    assert sorted(rows) == [
        (f"block ({i}, 0, 0) of k, launch {n}, SM 0", "warp 0") for i in (0, 1) for n in (1, 2)
    ]
    first, second = (rows[f"block (0, 0, 0) of k, launch {n}, SM 0", "warp 0"] for n in (1, 2))
    assert first[-1][1] <= second[0][0]


@pytest.mark.parametrize(("nodes", "kind"), [(1, "NVLink"), (2, "IB")])
def test_links_show_their_messages(tmp_path, nodes, kind):
    size, link = 1 << 16, emulator.Link(latency=1000, bandwidth=100.0)
    _, cluster = exchange(link, size, nodes=nodes)
    rows = read(cluster, tmp_path / "t.json")
    for rank in (0, 1):
        ((start, end, category, _, args),) = rows[f"rank {rank} / network", f"{kind} to rank {1 - rank}"]
        assert category == "message" and args["bytes"] == size
        assert end - start == pytest.approx(size / 100.0 * MEGAHERTZ / 1000, rel=0.01)
        wait = rows[f"rank {rank} / block (0, 0, 0) of k, launch {rank + 1}, SM 0", "warp 0"][-1]
        assert wait[3] == "wait for quiet" or wait[2] == "run"


def test_slices_have_names_without_line_information(tmp_path):
    ptx = jit.compile_ptx("""extern "C" __global__ void k(float* x) { float v = threadIdx.x;
    for (int i = 0; i < 100; i++) v = __fmaf_rn(v, 0.5f, 1.0f);
    x[threadIdx.x] = v; __syncthreads(); }""")
    gpu = emulator.VirtualGPU()
    gpu.launch(ptx, "k", grid=(1, 1, 1), block=(64, 1, 1), args=[torch.zeros(64)])
    rows = of_one_block(read(gpu, tmp_path / "t.json"))
    assert any(s[3] == "float" and s[1] - s[0] >= 100 for s in rows["warp 0"])
    assert {s[3] for s in rows["warp 0"]} <= {"float", "integer", "convert", "memory", "control", "barrier"}


def test_a_seed_gives_the_same_trace(tmp_path):
    first, second = (gemm_rows(tmp_path, 64, 32, 256, (64, 32), 5)[0] for _ in range(2))
    assert first == second


@pytest.mark.long
def test_a_long_run_keeps_its_first_slices(tmp_path):
    gpu = emulator.VirtualGPU(num_sms=1, checks=False)
    source = "k(int* o, int n) { for (int i = 0; i < n; i++) __syncthreads(); if (n < 0) *o = 1; }"
    for _ in range(12):
        cuda(source, torch.zeros(1, dtype=torch.int32), 4000, gpu=gpu, block=256)
    gpu.trace(tmp_path / "t.json")
    trace = json.loads((tmp_path / "t.json").read_text())
    slices = sum(e["ph"] == "X" for e in trace["traceEvents"])
    assert slices == 2**18 and trace["otherData"]["dropped_slices"] > 0
