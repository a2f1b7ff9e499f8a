"""wgrad.cuh with one line of its protocol broken at a time: the emulator must say so.

What these tests show is that the weight gradient's other tests would fail without each fence, wait, barrier
and count.
"""

import re

import pytest
import torch
from mutate import source

from dsv3_kernels import emulator, reference, wgrad
from dsv3_kernels.jit.compile import compile_source, source_options
from dsv3_kernels.quantized import ROW, QuantizedTensor, empty_mn_major

SEEDS = 20
ALONE = wgrad.WgradConfig(block_n=64, stages=2, cluster=1, strip=2)
PAIR = wgrad.WgradConfig(block_n=64, stages=2, cluster=2, strip=2)
HAZARD, DEADLOCK, WRONG = "HazardError", "DeadlockError", "wrong result"

PROMOTION = "promote(sum, partial, a_scale, shared.b_scales[s]);"
RELEASE = "if (lane < kCluster) shared.ring.release(position, lane);"
STAGED = """            ptx::fence_proxy_async_shared();
            __syncwarp();
            if (lane == 0) shared.panels[warpgroup].release(panel_position);"""
READ = "ptx::bulk_wait_group_read<0>();  // the previous tile's stores have read the panels"
BYTES = "accumulate ? sizeof(shared.d[half]) : 0"

CLUSTER_BARRIER = "        ptx::cluster_arrive_relaxed();\n        ptx::cluster_wait();\n"

# name: (what to replace, by what, what some schedule out of 20 must give)
MUTATIONS = {
    "data is not waited for": ("shared.ring.wait(position);", "", {HAZARD}),
    "a stage is refilled without a wait": (
        "ptx::mbarrier_wait(&empty[p.stage], p.parity ^ 1);",
        "",
        {HAZARD, DEADLOCK},
    ),
    "the lap's parity never changes": ("parity ^= 1;", "", {HAZARD, DEADLOCK}),
    "a stage is never released": (RELEASE, "", {DEADLOCK}),
    "one warpgroup's release frees the stage": (
        "shared.ring.init(kMathWarpgroups * kWarpgroup / 32)",
        "shared.ring.init(kWarpgroup / 32)",
        {HAZARD},
    ),
    "lanes may still read their scales": (
        "__syncwarp();  // the other lanes have read their scales too",
        "",
        {HAZARD},
    ),
    "a stage is released before the scales of columns are read": (
        re.compile(re.escape(PROMOTION) + r"(.*?)" + re.escape(RELEASE), re.DOTALL),
        rf"\1 {RELEASE} {PROMOTION}",
        {HAZARD},
    ),
    "the scales of columns are not expected": (
        "(kBlockM + kBlockN) * (kTokens + sizeof(float));",
        "(kBlockM + kBlockN) * kTokens + kBlockM * sizeof(float);",
        {HAZARD},
    ),
    "more bytes are expected than come": (
        "(kBlockM + kBlockN) * (kTokens + sizeof(float));",
        "(kBlockM + kBlockN) * (kTokens + sizeof(float)) + 16;",
        {DEADLOCK},
    ),
    "barriers are not made known to the copy engine": ("ptx::fence_mbarrier_init();", "", {HAZARD}),
    "barriers are used before they are set up": ("__syncthreads();\n", "", {HAZARD}),
    "wgmma is not waited for": ("ptx::wgmma_wait(partial);", "", {HAZARD}),
    "wgmma is not fenced": ("ptx::wgmma_fence();", "", {HAZARD}),
    "a sum is not cleared": ("step > 0", "true", {HAZARD, WRONG}),
    "the panels are not waited for": ("shared.panels[warpgroup].wait(panel_position);", "", {HAZARD}),
    "what the gradient held is not waited for": (BYTES, "0", {HAZARD}),
    "more of the gradient is expected than comes": (
        BYTES,
        "accumulate ? sizeof(shared.d[half]) + 16 : 0",
        {DEADLOCK},
    ),
    "panels are filled while the last store reads them": (READ, "", {HAZARD}),
    "panels are stored before they are staged": (
        "shared.panels[half].wait_released(panel_position);",
        "",
        {HAZARD},
    ),
    "panels are stored before the copy engine sees them": (
        STAGED,
        STAGED.replace("ptx::fence_proxy_async_shared();", ""),
        {HAZARD},
    ),
    "other lanes have not staged": (STAGED, STAGED.replace("__syncwarp();", ""), {HAZARD}),
    "one warp's staging is enough": ("panels.init(kWarpgroup / 32)", "panels.init(1)", {HAZARD, DEADLOCK}),
    "panels are never handed over": (STAGED, "", {DEADLOCK}),
    "panels keep their phase": ("panel_position.advance();\n            }", "}", {HAZARD, DEADLOCK}),
    "stores are never committed": ("ptx::bulk_commit_group();", "", {HAZARD}),
    "the block ends while stores read": (
        "            }\n            ptx::bulk_wait_group_read<0>();",
        "            }",
        {HAZARD},
    ),
    "both halves use the same panels": (
        "const u32 half = warp - 1;",
        "const u32 half = 0;",
        {HAZARD, DEADLOCK},
    ),
    "a group begins where it does not": ("first_ += count_;", "first_ += 1;", {WRONG}),
    "groups are not told apart": (
        "tile.column + p * kPanel, row, tile.group);\n                ptx::bulk_commit",
        "tile.column + p * kPanel, row, 0);\n                ptx::bulk_commit",
        {HAZARD, WRONG},
    ),
    "the scale of another row": ("ptx::load_shared(scales + 8)", "ptx::load_shared(scales)", {WRONG}),
    "the scale of another column": ("j % 2 ? b_scale.y : b_scale.x", "b_scale.x", {WRONG}),
}
# Of blocks in pairs.
PAIR_MUTATIONS = {
    "the peer's consumers are not waited for": ("consumers * kBlocks", "consumers", {HAZARD, DEADLOCK}),
    "a stage is released to its own block only": (
        RELEASE,
        "if (lane == 0) shared.ring.release(position, rank);",
        {DEADLOCK},
    ),
    "a stage is released to the peer only": (
        RELEASE,
        "if (lane == 0) shared.ring.release(position, rank ^ 1);",
        {DEADLOCK},
    ),
    "barriers are used before the peer has set up its own": (
        CLUSTER_BARRIER + "    }\n    ptx::grid_dependency_wait();",
        "        __syncthreads();\n    }\n    ptx::grid_dependency_wait();",
        {HAZARD},
    ),
    "the block ends while its peer still needs it": (
        "        __syncwarp();\n" + CLUSTER_BARRIER + "    }\n}",
        "    }\n}",
        {HAZARD},
    ),
    "both load the same half": ("rank * (kRows / 2)", "0", {HAZARD, DEADLOCK, WRONG}),
    "only one of them gets the halves": ("kBothBlocks = 0b11", "kBothBlocks = 0b01", {HAZARD, DEADLOCK}),
    "both compute the same tile": ("tile.row += rank * kBlockM;", "", {HAZARD, WRONG}),
    "pairs are taken by single blocks": (
        "blockIdx.x / kCluster, gridDim",
        "blockIdx.x, gridDim",
        {HAZARD, WRONG, DEADLOCK},
    ),
}


def outcomes(text, config, seeds):
    """What running the kernel gives, by seed: the name of an error, "wrong result", or "right"."""
    groups, n, k, token_tiles = 2, 136, 136, 7
    template = f"{config.block_n}, {config.stages}, {config.cluster}"
    blocks = 2 * config.cluster
    compiled = compile_source(text, [f"dsv3::fp8_wgrad<{template}>"], source_options())
    generator = torch.Generator().manual_seed(1)
    operands = []
    for rows in (n, k):
        codes = torch.randint(0, 0x50, (rows, token_tiles * 128), generator=generator, dtype=torch.uint8)
        scales = empty_mn_major((rows, token_tiles), torch.device("cpu"))
        scales.copy_(torch.rand(rows, token_tiles, generator=generator))
        operands.append(QuantizedTensor(codes.view(torch.float8_e4m3fn), scales, ROW))
    dy_t, x_t = operands
    offsets = torch.tensor([0, 290, 750], dtype=torch.int32)
    before = torch.randn(groups, n, k, generator=generator)
    expected = reference.fp8_wgrad(dy_t, x_t, before.clone(), True, offsets)
    for seed in range(seeds):
        out = before.clone()
        # Only one schedule or the other brings some faults out.
        gpu = emulator.VirtualGPU(num_sms=blocks, seed=seed, schedule="pct" if seed % 2 else "random")
        with emulator.virtual_gpu():  # whose error word the arguments hold
            prepared = wgrad.prepare(config, tuple(out.shape), token_tiles * 128, True, True, blocks)
            arguments = prepared.arguments((dy_t.data, x_t.data, dy_t.scales, x_t.scales, out, offsets))
        try:
            gpu.launch(
                compiled.ptx,
                compiled.names[0],
                grid=(blocks, 1, 1),
                block=(wgrad.THREADS, 1, 1),
                cluster=(config.cluster, 1, 1),
                args=arguments,
                shared_bytes=config.shared_bytes,
            )
        except emulator.EmulationError as error:
            yield type(error).__name__
        else:
            yield "right" if torch.allclose(out, expected, rtol=0.02, atol=1) else WRONG


@pytest.mark.parametrize("config", [ALONE, PAIR], ids=["alone", "pair"])
def test_the_kernel_as_it_is(config):
    assert set(outcomes(source("wgrad.cuh"), config, 3)) == {"right"}


@pytest.mark.parametrize("name", [*MUTATIONS, *PAIR_MUTATIONS])
def test_broken_protocol_is_noticed(name):
    old, new, expected = (MUTATIONS | PAIR_MUTATIONS)[name]
    config = PAIR if name in PAIR_MUTATIONS else ALONE
    seen = []
    for outcome in outcomes(source("wgrad.cuh", old, new), config, SEEDS):
        seen.append(outcome)
        if outcome in expected:
            return
    pytest.fail(f"{SEEDS} seeds gave {sorted(set(seen))}, expected {sorted(expected)}")
