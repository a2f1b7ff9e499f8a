"""Small kernels with one planted bug each: every bug is reported, every correct twin passes.

The kernels are in kernels/*.cu. Compiled with BUG=1 a kernel is wrong in one way; some schedule out of 20
must raise the error of the table, at a line marked `// BUG`. Compiled with BUG=0 no schedule may raise
anything, and `out` equals `in`.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dsv3_kernels import emulator, jit
from dsv3_kernels.tensor_map import TensorMap

KERNELS = Path(__file__).parent / "kernels"
BUG_SEEDS = 20
TWIN_SEEDS = 200

HAZARD, DEADLOCK, ACCESS = "HazardError", "DeadlockError", "MemoryAccessError"
OLD_VALUE = "EmulationError"  # the kernel saw one, and trapped


@dataclass(frozen=True)
class Case:
    file: str
    name: str
    error: str
    grid: int = 1
    block: int = 64
    cluster: int = 1
    also: str = ""  # what another schedule may raise first
    written: int = (
        64  # of the input's floats; the others are marked as never written, and `out` keeps its own
    )

    def __str__(self) -> str:
        return self.name


CASES = [
    *(
        Case("shared.cu", name, HAZARD)
        for name in (
            "missing_syncthreads",
            "missing_second_syncthreads",
            "shuffle_orders_nothing",
            "named_barrier_of_others",
            "arrive_is_no_wait",
            "cp_async_without_wait",
            "cp_async_wait_is_private",
            "read_of_unwritten_shared",
            "unwritten_bytes_travel",
            "plain_read_of_atomic",
            "write_behind_the_arrive",
            "relaxed_arrive",
            "one_byte_of_two_threads",
            "ldmatrix_of_rows_nobody_wrote",
        )
    ),
    Case("shared.cu", "cp_async_of_floats_nobody_wrote", HAZARD, written=32),
    *(
        Case("global.cu", name, HAZARD, grid=2, block=32)
        for name in (
            "flag_without_release",
            "flag_without_acquire",
            "scope_too_small",
            "release_without_syncwarp",
            "counter_without_fence",
            "both_blocks_write",
            "fence_scope_too_small",
        )
    ),
    Case("global.cu", "relaxed_data_behind_a_relaxed_flag", OLD_VALUE, grid=2, block=32),
    *(
        Case("async.cu", name, HAZARD)
        for name in (
            "store_without_proxy_fence",
            "proxy_fence_after_barrier",
            "global_write_then_bulk_load",
            "read_before_the_data",
            "two_copies_to_one_place",
            "overwrite_while_store_reads",
            "read_back_too_early",
            "more_bytes_than_expected",
            "more_arrivals_than_expected",
            "barrier_used_before_init_is_visible",
            "init_without_fence",
            "box_beyond_the_tensor",
            "copy_over_writes_without_proxy_fence",
            "proxy_fence_of_the_other_space",
            "two_stores_to_one_place",
            "store_of_floats_nobody_wrote",
            "exit_while_a_copy_lands",
            "exit_while_a_store_reads",
        )
    ),
    Case("async.cu", "refill_without_empty_wait", HAZARD, also=DEADLOCK),
    Case("async.cu", "rows_nobody_wrote", HAZARD, written=32),
    *(
        Case("wgmma.cu", name, HAZARD, block=128)
        for name in (
            "operands_without_proxy_fence",
            "accumulators_read_before_wait",
            "accumulators_written_without_fence",
            "a_registers_written_before_wait",
            "operand_overwritten_before_wait",
            "product_of_rows_nobody_wrote",
            "accumulators_written_before_wait",
            "a_registers_written_without_fence",
        )
    ),
    Case("wgmma.cu", "stage_released_before_wait", HAZARD, block=160),
    Case("wgmma.cu", "operand_past_the_end", ACCESS, block=128),
    *(
        Case("cluster.cu", name, HAZARD, grid=2, block=32, cluster=2)
        for name in (
            "peer_read_before_write",
            "peer_exits_early",
            "st_async_without_wait",
            "remote_arrive_too_early",
            "arrive_at_an_exited_peer",
            "relaxed_cluster_arrive",
            "copy_to_peer_without_wait",
        )
    ),
    Case("cluster.cu", "cluster_wait_in_a_cycle", DEADLOCK, grid=2, block=32, cluster=2),
    *(
        Case("tensor_map.cu", name, HAZARD)
        for name in ("map_changed_without_fence", "map_used_without_acquire")
    ),
    *(
        Case("k_grouped.cu", name, HAZARD)
        for name in (
            "map_rewritten_while_copies_use_it",
            "map_rewritten_without_release",
            "map_rewritten_without_acquire",
        )
    ),
    *(
        Case("deadlock.cu", name, DEADLOCK)
        for name in (
            "wrong_arrive_count",
            "wrong_phase",
            "lost_arrive",
            "missing_bytes",
            "named_barrier_of_another_name",
            "named_barrier_of_more_threads",
            "exited_warp_at_a_counted_barrier",
            "lane_missing_from_its_mask",
            "flag_that_nobody_sets",
            "barriers_in_opposite_order",
        )
    ),
    *(
        Case("registers.cu", name, DEADLOCK, block=384)
        for name in ("increase_beyond_the_pool", "increase_before_the_decrease")
    ),
    *(
        Case("registers.cu", name, HAZARD, block=384)
        for name in (
            "setmaxnreg_by_one_warp",
            "setmaxnreg_of_different_counts",
            "setmaxnreg_twice_without_barrier",
            "decrease_to_more",
        )
    ),
    *(
        Case("memory.cu", name, ACCESS)
        for name in (
            "read_past_the_end",
            "write_before_the_start",
            "misaligned_vector",
            "shared_past_the_end",
            "global_access_to_shared",
            "bulk_copy_past_the_end",
            "box_on_a_misaligned_place",
        )
    ),
]


@functools.cache
def ptx_of(file: str, bug: int) -> str:
    source = (KERNELS / file).read_text()
    return jit.compile_ptx(source, include_dirs=[KERNELS], defines={"BUG": bug}, lineinfo=True)


def marked_lines(case: Case) -> set[int]:
    """The lines marked BUG in the kernel and in the helpers before the file's first kernel."""
    lines, inside = set(), True
    for number, line in enumerate((KERNELS / case.file).read_text().splitlines(), 1):
        if line.startswith("KERNEL("):
            inside = line.startswith(f"KERNEL({case.name})")
        if inside and line.endswith("// BUG"):
            lines.add(number)
    return lines


def launch(case: Case, ptx: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel; returns what it was given and what it wrote."""
    given = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    out = torch.full((64,), torch.nan)
    flags = torch.zeros(640, dtype=torch.int32)
    flags[128:] = 0x38383838  # ones in e4m3, for wgmma.cu
    maps = [TensorMap(t.view(2, 32), (2, 32), 0) for t in (given, out)]
    gpu = emulator.VirtualGPU(num_sms=4, seed=seed)
    if case.written < 64:
        gpu.mark_unwritten(given[case.written :])
    gpu.launch(
        ptx,
        case.name,
        grid=(case.grid, 1, 1),
        block=(case.block, 1, 1),
        cluster=(case.cluster, 1, 1),
        args=[out, given, flags, *maps],
    )
    return given, out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bug_is_reported(case):
    ptx, raised = ptx_of(case.file, 1), []
    for seed in range(BUG_SEEDS):
        try:
            launch(case, ptx, seed)
        except emulator.EmulationError as error:
            raised.append(error)
            assert type(error).__name__ in (case.error, case.also), f"seed {seed}: {error}"
            if type(error).__name__ == case.error:
                break
    assert raised and type(raised[-1]).__name__ == case.error, f"{BUG_SEEDS} seeds raised {raised}"
    reported = {int(line) for line in re.findall(r"instance\.cu:(\d+)", str(raised[-1]))}
    expected = marked_lines(case)
    assert reported & expected, f"lines {reported}, expected one of {expected}:\n{raised[-1]}"
    assert case.name in str(raised[-1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twin_passes(case):
    ptx = ptx_of(case.file, 0)
    for seed in range(TWIN_SEEDS):
        given, out = launch(case, ptx, seed)
        wrong = (out != given)[: case.written].nonzero().flatten().tolist()
        assert not wrong, f"seed {seed}: out differs at {wrong[:5]}: {out[wrong[:5]]}, {given[wrong[:5]]}"


def test_launches_are_ordered():
    """What one launch wrote, the next may read without more ado."""
    ptx = ptx_of("global.cu", 0)
    values = [torch.randn(64), *(torch.full((64,), torch.nan) for _ in range(3))]
    maps = [TensorMap(t.view(2, 32), (2, 32), 0) for t in values]
    gpu = emulator.VirtualGPU(num_sms=2, seed=3)
    for i in range(3):
        arguments = [values[i + 1], values[i], torch.zeros(640, dtype=torch.int32), maps[i], maps[i + 1]]
        gpu.launch(ptx, "both_blocks_write", grid=(2, 1, 1), block=(32, 1, 1), args=arguments)
    assert torch.equal(values[3], values[0])


def test_the_table_holds_every_kernel():
    kernels = {
        (path.name, name)
        for path in KERNELS.glob("*.cu")
        for name in re.findall(r"^KERNEL\((\w+)\)", path.read_text(), re.MULTILINE)
    }
    assert kernels == {(case.file, case.name) for case in CASES}
    assert all(marked_lines(case) for case in CASES)
