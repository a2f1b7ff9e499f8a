"""The trace: virtual time in which warps and engines work side by side."""

import itertools
import json

import pytest
import torch
from test_sync import cuda

import dsv3_kernels as dsv3
from dsv3_kernels import emulator, gemm


def read(gpu, path):
    """Row name -> its slices in order, as (start, end, category, name); also checks the file's form."""
    gpu.trace(path)
    trace = json.loads(path.read_text())
    assert trace["otherData"]["dropped_slices"] == 0
    names = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"
    }
    rows = {name: [] for name in names.values()}
    for e in trace["traceEvents"]:
        assert e["ph"] in "MX" and isinstance(e["name"], str)
        if e["ph"] == "M":
            continue
        start, end = e["args"]["cycles"]
        assert e["ts"] == start / 1e3 and e["dur"] == (end - start) / 1e3 and end > start
        rows[names[e["pid"], e["tid"]]].append((start, end, e["cat"], e["name"]))
    for slices in rows.values():
        slices.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(slices))
    return rows


def gemm_rows(tmp_path, m, n, k, tile, seed, schedule="random"):
    a, b = dsv3.quantize_1x128(torch.randn(m, k)), dsv3.quantize_128x128(torch.randn(n, k))
    out = torch.empty(m, n, dtype=torch.bfloat16)
    with emulator.virtual_gpu(num_sms=1, seed=seed, schedule=schedule) as gpu:
        gemm._launch(gemm.config_of_tile(*tile), a.data, a.scales, b.data, b.scales, out, 1)
    return read(gpu, tmp_path / "trace.json"), gpu


@pytest.mark.parametrize(("seed", "schedule"), [(0, "random"), (1, "random"), (0, "pct"), (0, "round_robin")])
def test_engines_of_a_gemm_are_busy_as_long_as_their_work_takes(tmp_path, seed, schedule):
    m, n, k = 128, 128, 512
    rows, gpu = gemm_rows(tmp_path, m, n, k, (128, 128), seed, schedule)
    tensor, copy = rows["tensor core"], rows["copy engine"]
    assert len(tensor) == gpu.counters["wgmma"] == 2 * k // 32
    assert sum(end - start for start, end, *_ in tensor) == m * n * k // 4096
    loads = [end - start for start, end, category, _ in copy if category == "load"]
    stores = [end - start for start, end, category, _ in copy if category == "store"]
    assert sum(loads) == k // 128 * ((m + n) * 128 + 4 * m) // 64
    assert sum(stores) == m * n * 2 // 64
    assert {f"block 0 / warp {w}" for w in range(9)} <= rows.keys()


def test_a_gemm_overlaps_copies_and_tensor_core(tmp_path):
    rows, _ = gemm_rows(tmp_path, 128, 128, 1024, (128, 128), 0)
    tensor, copy = rows["tensor core"], [s for s in rows["copy engine"] if s[2] == "load"]
    both = sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in tensor for b in copy)
    assert both > 1000
    # Nothing is multiplied before the first stage has landed, nothing stored before the last product.
    assert tensor[0][0] >= copy[2][1]
    assert min(s[0] for s in rows["copy engine"] if s[2] == "store") >= tensor[-1][1] - 256
    # Each warp's slices follow each other without a gap, and a promotion has the name of its line.
    warp = rows["block 0 / warp 0"]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(warp))
    assert any(s[2] == "wait" and s[3].startswith("wgmma.wait_group") for s in warp)
    assert any(s[2] == "run" and s[3].startswith("gemm.cuh:") for s in warp)


@pytest.mark.parametrize("seed", range(6))
def test_a_wait_ends_when_the_bytes_are_there(tmp_path, seed):
    source = """k(const int* x) { __shared__ __align__(128) int s[1024]; __shared__ u64 b;
        if (threadIdx.x == 0) { ptx::mbarrier_init(&b, 1); ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(&b, 4096);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 4096, [%2];" ::
    "r"(ptx::shared_address(s)), "l"(x), "r"(ptx::shared_address(&b)) : "memory"); }
    __syncthreads(); ptx::mbarrier_wait(&b, 0); }"""
    gpu = cuda(source, torch.zeros(1024, dtype=torch.int32), seed=seed, block=64)
    rows = read(gpu, tmp_path / "t.json")
    ((start, end, _, _),) = rows["copy engine"]
    assert end - start == 4096 // 64 and start >= 600
    for warp in (0, 1):
        waits = [s for s in rows[f"block 0 / warp {warp}"] if s[2] == "wait" and s[3].startswith("mbarrier")]
        assert [s[1] for s in waits] == [end]
    barrier = [s for s in rows["block 0 / warp 1"] if s[3].startswith("bar")]
    assert len(barrier) == 1 and barrier[0][1] < end


def test_launches_follow_each_other(tmp_path):
    gpu = emulator.VirtualGPU(num_sms=1)
    for _ in range(2):
        cuda("k(int* o) { atomicAdd(o, 1); __syncthreads(); }", torch.zeros(1, dtype=torch.int32), gpu=gpu)
    rows = read(gpu, tmp_path / "t.json")
    first, second = (rows[f"launch {i} k / block 0 / warp 0"] for i in (1, 2))
    assert first[-1][1] <= second[0][0]


def test_a_seed_gives_the_same_trace(tmp_path):
    first, second = (gemm_rows(tmp_path, 64, 32, 256, (64, 32), 5)[0] for _ in range(2))
    assert first == second
