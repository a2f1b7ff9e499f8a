"""gemm.cuh with one line of its protocol broken at a time: the emulator must say so.

What these tests show is that the GEMM's other tests would fail without each fence, wait, barrier and count.
"""

import re
from dataclasses import dataclass

import pytest
import torch
from gemm_helpers import POISON, operands, owned_rows, schedule_of
from mutate import source

from dsv3_kernels import emulator, gemm, reference
from dsv3_kernels.jit.compile import compile_source, source_options

SEEDS = 20
HAZARD, DEADLOCK, MEMORY = "HazardError", "DeadlockError", "MemoryAccessError"
WRONG, OUTSIDE, RIGHT = "wrong result", "wrote what no group owns", "right"


@dataclass(frozen=True)
class Problem:
    """What a mutant runs: several tiles a block, so that stages, panels and barriers are used again."""

    config: gemm.GemmConfig
    m: int
    n: int
    sizes: tuple[int, ...] = ()
    k: int = 640
    num_sms: int = 2
    chain: bool = False  # twice, by programmatic dependent launch


def config(block_m, block_n, grouping="none", **options):
    return gemm.GemmConfig(grouping, block_m, block_n, stages=2, strip=2, **options)


DENSE = Problem(config(128, 32), 136, 168)
WIDE = Problem(config(128, 192), 64, 392, k=256)
SWAPPED = Problem(config(16, 64, swap=True), 40, 200)
SWAPPED_PAIR = Problem(config(16, 128, swap=True), 16, 320, k=256)
SHARES_A = Problem(config(128, 32, multicast="a"), 136, 192)
SHARES_B = Problem(config(128, 32, multicast="b"), 512, 72)
CLUSTERS = Problem(config(128, 32, multicast="a"), 136, 192, num_sms=4)
OFFSETS = Problem(config(128, 32, "offsets"), 155, 72, (0, 70, 1, 64, 9))
COUNTS = Problem(config(128, 32, "counts"), 72, 72, (72, 0, 5), k=256)
CHAIN = Problem(config(128, 32), 64, 32, k=256, chain=True)
PROBLEMS = {name: value for name, value in globals().items() if isinstance(value, Problem)}


@dataclass(frozen=True)
class Mutation:
    old: "str | re.Pattern[str]"
    new: str
    expected: frozenset[str]  # some schedule out of SEEDS must give one of them
    problem: Problem


def breaks(old, new, *expected, on=DENSE):
    return Mutation(old, new, frozenset(expected), on)


WAIT_FULL = "ptx::mbarrier_wait(&full[p.stage], p.parity);"
WAIT_EMPTY = "ptx::mbarrier_wait(&empty[p.stage], p.parity ^ 1);"
RELEASE = "if (lane < L::kCluster) shared.ring.release(position, lane);"
CLUSTER_SYNC = r" +ptx::cluster_arrive_relaxed\(\);\n +ptx::cluster_wait\(\);\n"
STAGED = re.compile(
    r"(ptx::fence_proxy_async_shared\(\);\n) +ptx::named_barrier_sync\(barrier, kWarpgroup\);"
)
LAST_READ = "if (stores) ptx::bulk_wait_group_read<0>();"
SCALES_READ = "__syncwarp();  // the other lanes"

MUTATIONS = {
    # The ring
    "data is not waited for": breaks(WAIT_FULL, "", HAZARD),
    "the parity of the wait is wrong": breaks(WAIT_FULL, WAIT_FULL.replace("parity)", "parity ^ 1)"), HAZARD),
    "a stage is refilled without a wait": breaks(WAIT_EMPTY, "", HAZARD, DEADLOCK),
    "the producer waits for a lap too many": breaks(WAIT_EMPTY, WAIT_EMPTY.replace(" ^ 1", ""), DEADLOCK),
    "the lap's parity never changes": breaks("parity ^= 1;", "", HAZARD, DEADLOCK),
    "one consumer too many is expected": breaks("consumers * kBlocks", "consumers * kBlocks + 1", DEADLOCK),
    "a stage is never released": breaks(RELEASE, "", DEADLOCK),
    "every lane releases": breaks(RELEASE, "shared.ring.release(position);", HAZARD, DEADLOCK),
    "lanes may still read their scales": breaks(SCALES_READ, "//", HAZARD),
    "lanes may still read their columns' scales": breaks(SCALES_READ, "//", HAZARD, on=SWAPPED),
    "the scales' bytes are not expected": breaks("+ kBlockM * sizeof(float);", ";", HAZARD),
    "more bytes are expected than come": breaks(
        "+ kBlockM * sizeof(float);", "+ kBlockM * sizeof(float) + 16;", DEADLOCK
    ),
    "barriers are not made known to the copy engine": breaks("ptx::fence_mbarrier_init();", "", HAZARD),
    "barriers are used before they are set up": breaks("__syncthreads();\n", "", HAZARD),
    # Clusters
    "the peer's consumers are not counted": breaks("consumers * kBlocks", "consumers", HAZARD, on=SHARES_A),
    "consumers tell only their own block": breaks(
        "lane < L::kCluster", "lane == rank", DEADLOCK, on=SHARES_A
    ),
    "consumers tell only the peer": breaks("lane < L::kCluster", "lane == (rank ^ 1)", DEADLOCK, on=SHARES_B),
    "halves go to one block": breaks(
        "kBothBlocks = 0b11;", "kBothBlocks = 0b01;", HAZARD, DEADLOCK, on=SHARES_A
    ),
    "halves land in one place": breaks("target + half * 128", "target", HAZARD, on=SHARES_B),
    "both halves are the first": breaks("k, row + half,", "k, row,", WRONG, on=SHARES_B),
    "only the own copies are expected": breaks(
        "acquire(position, L::kStageBytes)",
        "acquire(position, L::kStageBytes - kBlockM * kBlockK / 2)",
        *(HAZARD, DEADLOCK),
        on=SHARES_A,
    ),
    "a block ends before its peer's last arrive": breaks(
        re.compile(r"( +__syncwarp\(\);\n)" + CLUSTER_SYNC), r"\1", HAZARD, MEMORY, on=SHARES_A
    ),
    "a cluster begins before its barriers are set up": breaks(
        re.compile(r"(\} else \{\n)" + CLUSTER_SYNC), r"\1", HAZARD, on=SHARES_A
    ),
    "both blocks take the same columns": breaks(
        "kSharesA ? rank * kBlockN : 0", "0", HAZARD, WRONG, on=SHARES_A
    ),
    "both blocks take the same rows": breaks(
        "kSharesB ? rank * kBlockM : 0", "0", HAZARD, WRONG, on=SHARES_B
    ),
    "blocks of a cluster take tiles of their own": breaks(
        re.compile(r"blockIdx.x / L::kCluster,\s+gridDim.x / L::kCluster"),
        "blockIdx.x, gridDim.x",
        *(HAZARD, DEADLOCK, WRONG),
        on=CLUSTERS,
    ),
    # The tensor core and the promotion
    "wgmma is not waited for": breaks("ptx::wgmma_wait(partial);", "", HAZARD),
    "wgmma is not fenced": breaks("ptx::wgmma_fence();", "", HAZARD),
    "a stage is released while wgmma reads it": breaks(
        re.compile(r"ptx::wgmma_wait\(partial\);(.*?)(?=if constexpr \(kSwap\)\s+promote)", re.DOTALL),
        r"\1 ptx::wgmma_wait(partial);",
        HAZARD,
    ),
    "a sum is not cleared": breaks("step > 0", "true", HAZARD, WRONG),
    "the wrong scale of B": breaks("min(b_row / kScaleBlock, scale_rows - 1)", "0", WRONG),
    "a tile across two blocks of B takes one scale": breaks("column >= split;", "false;", WRONG, on=WIDE),
    "a scale past B's last is read": breaks(
        "b_row / kScaleBlock + 1 < scale_rows", "true", WRONG, MEMORY, on=WIDE
    ),
    "columns in pairs share a scale": breaks(
        "a_scale[i / 4 * 2 + i % 2]", "a_scale[i / 4 * 2]", WRONG, on=SWAPPED
    ),
    "lanes take other columns' scales": breaks(
        "(shared.a_scales[s]) + lane % 4", "(shared.a_scales[s]) + lane % 2", WRONG, on=SWAPPED
    ),
    "warpgroups multiply the same rows": breaks(
        "u32 operand_row = (first_row + wave * kWaveRows)",
        "u32 operand_row = (wave * kWaveRows)",
        WRONG,
        on=SWAPPED_PAIR,
    ),
    # The output
    "panels are overwritten while the last store reads them": breaks(LAST_READ, "", HAZARD),
    "only one thread knows that the last store has read": breaks(
        re.compile(re.escape(LAST_READ) + r"\s+ptx::named_barrier_sync\(barrier, kWarpgroup\);"),
        LAST_READ,
        HAZARD,
    ),
    "panels are stored before the copy engine sees them": breaks(
        "ptx::fence_proxy_async_shared();", "", HAZARD
    ),
    "panels are stored before all warps have staged": breaks(STAGED, r"\1", HAZARD),
    "tails are stored before all warps have staged": breaks(STAGED, r"\1", HAZARD, on=COUNTS),
    "stores are never committed": breaks("if (stores) ptx::bulk_commit_group();", "", HAZARD),
    "both warpgroups share a named barrier": breaks("1 + warpgroup;", "1;", HAZARD, DEADLOCK),
    "the block ends while stores read": breaks(
        "if (threadIdx.x % kWarpgroup == 0) ptx::bulk_wait_group_read<0>();", "", HAZARD
    ),
    "D is not transposed": breaks("ptx::stmatrix_transposed(chunk", "ptx::stmatrix(chunk", WRONG, on=SWAPPED),
    "a tail's rows are not counted": breaks(
        "row < rows && column < columns", "column < columns", HAZARD, WRONG, on=OFFSETS
    ),
    "a tail's columns are not counted": breaks(
        "row < rows && column < columns", "row < rows", HAZARD, WRONG, on=OFFSETS
    ),
    "a tail reaches the next group": breaks(
        "row < rows && column < columns", "column < columns", OUTSIDE, on=COUNTS
    ),
    "tails leave by bulk stores": breaks(
        "row + L::kPanelRows <= tile.row_end;", "true;", HAZARD, WRONG, on=OFFSETS
    ),
    "a last tile leaves by a bulk store": breaks(
        "row + L::kPanelRows <= tile.row_end;", "true;", OUTSIDE, on=COUNTS
    ),
    # Groups
    "all groups take the first weight": breaks(
        "tile.group * n + tile.column;", "tile.column;", WRONG, on=OFFSETS
    ),
    "all groups take the first scales": breaks("tile.group * scale_rows + ", "", WRONG, on=OFFSETS),
    "counted groups take the first scales of A": breaks(
        "counted ? tile.group * k_blocks : 0", "0", WRONG, on=COUNTS
    ),
    "counted groups take scales at their rows of A": breaks(
        "counted ? tile.row - tile.group * m : tile.row", "tile.row", WRONG, on=COUNTS
    ),
    "groups begin where the list does not say": breaks(
        "begin_ = kGrouping == Grouping::kCounts ? group_ * m_ : end_;",
        "begin_ = end_;",
        WRONG,
        OUTSIDE,
        on=COUNTS,
    ),
    "a group's last rows are left out": breaks(
        "(end_ - begin_ + kRows - 1) / kRows", "(end_ - begin_) / kRows", WRONG, on=OFFSETS
    ),
    "a tail's last wave is left out": breaks(
        "(rows_left + kWaveRows - 1) / kWaveRows", "rows_left / kWaveRows", WRONG, on=OFFSETS
    ),
    "a warpgroup without rows keeps the stage": breaks(
        "if (waves == 0) release();", "", DEADLOCK, on=OFFSETS
    ),
    # The kernel before
    "the kernel before is not waited for": breaks("ptx::grid_dependency_wait();", "", HAZARD, on=CHAIN),
}


def outcomes(text, p, seeds):
    """What running the kernel gives, by seed: the name of an error, or one of WRONG, OUTSIDE and RIGHT."""
    compiled = compile_source(text, [str(p.config.kernel)], source_options())
    counted = p.config.grouping == "counts"
    groups = (len(p.sizes),) if p.sizes else ()
    a, b = operands(((*groups, p.m, p.k) if counted else (p.m, p.k)), (*groups, p.n, p.k), seed=1)
    group_list = torch.tensor(p.sizes if counted else [0, *p.sizes], dtype=torch.int32)
    group_list = None if not p.sizes else group_list if counted else group_list.cumsum(0).int()
    op = {"none": reference.fp8_gemm, "offsets": reference.grouped_fp8_gemm}.get(
        p.config.grouping, reference.masked_grouped_fp8_gemm
    )
    expected = op(a, b, *([] if group_list is None else [group_list])).float()
    owned = owned_rows(p.config.grouping, p.m, group_list)
    for seed in range(seeds):
        out = torch.full(expected.shape, POISON, dtype=torch.bfloat16)
        with emulator.virtual_gpu(p.num_sms, seed, schedule_of(seed)) as gpu:
            launch = {
                "ptx": compiled.ptx,
                "kernel": compiled.names[0],
                "grid": (p.num_sms, 1, 1),
                "block": (p.config.threads, 1, 1),
                "cluster": (p.config.cluster, 1, 1),
                "args": gemm.prepare(p.config, *a.shape[-2:], p.n, len(p.sizes) or 1, 1).arguments(
                    gemm.operands(a.data, a.scales, b.data, b.scales, out, group_list)
                ),
                "shared_bytes": p.config.shared_bytes,
            }
            try:
                gpu.launch_chain([launch] * (2 if p.chain else 1))
            except emulator.EmulationError as error:
                yield type(error).__name__
                continue
        if not out[~owned].isnan().all():
            yield OUTSIDE
        elif torch.allclose(
            out[owned].float(), expected[owned], rtol=0.02, atol=0.02 * expected.abs().mean()
        ):
            yield RIGHT
        else:
            yield WRONG


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernel_as_it_is(name):
    assert set(outcomes(source("gemm.cuh"), PROBLEMS[name], 3)) == {RIGHT}


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_protocol_is_noticed(name):
    mutation = MUTATIONS[name]
    seen = []
    for outcome in outcomes(source("gemm.cuh", mutation.old, mutation.new), mutation.problem, SEEDS):
        seen.append(outcome)
        if outcome in mutation.expected:
            return
    pytest.fail(f"{SEEDS} seeds gave {sorted(set(seen))}, expected {sorted(mutation.expected)}")
