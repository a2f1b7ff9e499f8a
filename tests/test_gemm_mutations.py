"""gemm.cuh with one line of its protocol broken at a time: the emulator must say so.

What these tests show is that the GEMM's other tests would fail without each fence, wait, barrier and count.
"""

import re

import pytest
import torch
from mutate import source

from dsv3_kernels import emulator, gemm
from dsv3_kernels.jit.compile import compile_source, source_options

SEEDS = 20
CONFIG = gemm.GemmConfig(block_m=128, block_n=32, stages=2, strip=2)
HAZARD, DEADLOCK, WRONG = "HazardError", "DeadlockError", "wrong result"

# name: (what to replace, by what, what some schedule out of 20 must give)
MUTATIONS = {
    "data is not waited for": ("ptx::mbarrier_wait(&full[p.stage], p.parity);", "", {HAZARD}),
    "the parity of the wait is wrong": (
        "ptx::mbarrier_wait(&full[p.stage], p.parity);",
        "ptx::mbarrier_wait(&full[p.stage], p.parity ^ 1);",
        {HAZARD},
    ),
    "a stage is refilled without a wait": (
        "ptx::mbarrier_wait(&empty[p.stage], p.parity ^ 1);",
        "",
        {HAZARD, DEADLOCK},
    ),
    "the producer waits for a lap too many": (
        "ptx::mbarrier_wait(&empty[p.stage], p.parity ^ 1);",
        "ptx::mbarrier_wait(&empty[p.stage], p.parity);",
        {DEADLOCK},
    ),
    "the lap's parity never changes": ("parity ^= 1;", "", {HAZARD, DEADLOCK}),
    "one consumer too many is expected": ("&empty[s], consumers", "&empty[s], consumers + 1", {DEADLOCK}),
    "a stage is never released": ("if (lane == 0) shared.ring.release(position);", "", {DEADLOCK}),
    "every lane releases": ("if (lane == 0) shared.ring.release", "shared.ring.release", {HAZARD, DEADLOCK}),
    "lanes may still read their scales": (
        "__syncwarp();  // the other lanes",
        "// the other lanes",
        {HAZARD},
    ),
    "the scales' bytes are not expected": (
        "+ kBlockM * sizeof(float);",
        ";",
        {HAZARD},
    ),
    "more bytes are expected than come": (
        "+ kBlockM * sizeof(float);",
        "+ kBlockM * sizeof(float) + 16;",
        {DEADLOCK},
    ),
    "barriers are not made known to the copy engine": ("ptx::fence_mbarrier_init();", "", {HAZARD}),
    "barriers are used before they are set up": ("__syncthreads();\n", "", {HAZARD}),
    "wgmma is not waited for": ("ptx::wgmma_wait(partial);", "", {HAZARD}),
    "wgmma is not fenced": ("ptx::wgmma_fence();", "", {HAZARD}),
    "a stage is released while wgmma reads it": (
        re.compile(r"ptx::wgmma_wait\(partial\);(.*?)(?=promote<kSpansBlocks>\()", re.DOTALL),
        r"\1 ptx::wgmma_wait(partial);",
        {HAZARD},
    ),
    "panels are overwritten while the last store reads them": (
        "if (stores) ptx::bulk_wait_group_read<0>();",
        "",
        {HAZARD},
    ),
    "only one thread knows that the last store has read": (
        "if (stores) ptx::bulk_wait_group_read<0>();\n        ptx::named_barrier_sync(barrier, kWarpgroup);",
        "if (stores) ptx::bulk_wait_group_read<0>();",
        {HAZARD},
    ),
    "panels are stored before the copy engine sees them": ("ptx::fence_proxy_async_shared();", "", {HAZARD}),
    "panels are stored before all warps have staged": (
        "ptx::fence_proxy_async_shared();\n        ptx::named_barrier_sync(barrier, kWarpgroup);",
        "ptx::fence_proxy_async_shared();",
        {HAZARD},
    ),
    "stores are never committed": ("ptx::bulk_commit_group();", "", {HAZARD}),
    "both warpgroups share a named barrier": ("1 + warpgroup;", "1;", {HAZARD, DEADLOCK}),
    "the block ends while stores read": (
        "if (threadIdx.x % kWarpgroup == 0) ptx::bulk_wait_group_read<0>();",
        "",
        {HAZARD},
    ),
    "the wrong scale of B": ("tile.column / kScaleBlock;", "0;", {WRONG}),
    "a sum is not cleared": ("step > 0", "true", {HAZARD, WRONG}),
}


def outcomes(text, seeds):
    """What running the kernel gives, by seed: the name of an error, "wrong result", or "right"."""
    m, n, k = 136, 168, 640
    template = f"{CONFIG.block_m}, {CONFIG.block_n}, {CONFIG.stages}, {CONFIG.strip}"
    compiled = compile_source(text, [f"dsv3::fp8_gemm<{template}>"], source_options())
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(0, 0x50, (rows, k), generator=generator, dtype=torch.uint8) for rows in (m, n))
    a_scales = torch.rand(k // 128, m, generator=generator).t()
    b_scales = torch.rand(2, k // 128, generator=generator)
    a, b = (x.view(torch.float8_e4m3fn) for x in (a, b))
    expected = gemm.fp8_gemm((a, a_scales), (b, b_scales)).float()
    for seed in range(seeds):
        out = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
        gpu = emulator.VirtualGPU(num_sms=2, seed=seed)
        arguments = gemm.arguments(CONFIG, a, a_scales, b, b_scales, out)
        try:
            gpu.launch(
                compiled.ptx,
                compiled.names[0],
                grid=(2, 1, 1),
                block=(CONFIG.threads, 1, 1),
                args=arguments,
                shared_bytes=CONFIG.shared_bytes,
            )
        except emulator.EmulationError as error:
            yield type(error).__name__
        else:
            yield "right" if torch.allclose(out.float(), expected, rtol=0.02) else WRONG


def test_the_kernel_as_it_is():
    assert set(outcomes(source("gemm.cuh"), 3)) == {"right"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_protocol_is_noticed(name):
    old, new, expected = MUTATIONS[name]
    seen = []
    for outcome in outcomes(source("gemm.cuh", old, new), SEEDS):
        seen.append(outcome)
        if outcome in expected:
            return
    pytest.fail(f"{SEEDS} seeds gave {sorted(set(seen))}, expected {sorted(expected)}")
