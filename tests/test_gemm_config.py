"""The choice of gemm.cuh's configuration, and which block computes which tile: on the host, without a GPU.

tile_scheduler.cuh has no PTX in it, so that the host's compiler takes it: the tests ask the device's code.
"""

import ctypes
import os
import random
import secrets
import shlex
import subprocess

import numpy as np
import pytest
from gemm_helpers import ALL_CONFIGS, GROUPINGS, name_of

from dsv3_kernels import gemm, jit
from dsv3_kernels.checks import ceil_div
from dsv3_kernels.jit.compile import kernel_dir

UNITS = sorted({(GROUPINGS.index(c.grouping), *c.unit) for c in ALL_CONFIGS})
HARNESS = """
#define __device__
#define __forceinline__ inline
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
#include "tile_scheduler.cuh"
using namespace dsv3;

// (block, group, row, column, row_end) of every tile to `out`, at most `room` of them; returns how many.
template <Grouping kGrouping, u32 kRows, u32 kColumns>
long tiles(u32 m, u32 n, u32 strip, const i32* list, u32 groups, u32 blocks, u32* out, long room) {
    long count = 0;
    for (u32 block = 0; block < blocks; ++block) {
        TileScheduler<kGrouping, kRows, kColumns> scheduler(m, n, strip, list, groups, block, blocks);
        for (Tile t; scheduler.next(t); ++count) {
            if (count >= room) return -1;
            const u32 values[] = {block, t.group, t.row, t.column, t.row_end};
            for (u32 value : values) *out++ = value;
        }
    }
    return count;
}

extern "C" long all_tiles(int which, u32 m, u32 n, u32 strip, const i32* list, u32 groups, u32 blocks,
                          u32* out, long room) {
    switch (which) {
CASES    }
    return -2;
}

extern "C" bool valid(bool offsets, const i32* list, u32 groups, u32 m) {
    bool all = true;
    for (u32 lane = 0; lane < 32; ++lane)
        all &= offsets ? list_is_valid<Grouping::kOffsets>(list, groups, m, lane)
                       : list_is_valid<Grouping::kCounts>(list, groups, m, lane);
    return all;
}
"""


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scheduler")
    cases = "".join(
        f"        case {i}: return tiles<Grouping({g}), {rows}, {columns}>"
        "(m, n, strip, list, groups, blocks, out, room);\n"
        for i, (g, rows, columns) in enumerate(UNITS)
    )
    (folder / "harness.cpp").write_text(HARNESS.replace("CASES", cases))
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{kernel_dir()}"]
    command = [*compiler, *flags, "-o", str(folder / "harness.so"), str(folder / "harness.cpp")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "harness.so"))
    library.all_tiles.restype = ctypes.c_long
    library.valid.restype = ctypes.c_bool
    return library


ROOM = 1 << 20
BUFFER = np.empty((ROOM, 5), np.uint32)


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def tiles_of(library, config, m, n, group_list, num_sms):
    """(block, group, row, column, row_end) of every tile of every block, clusters taken apart."""
    groups = 1 if config.grouping == "none" else len(group_list) - (config.grouping == "offsets")
    blocks = gemm._blocks(config, m, n, groups, num_sms)
    assert blocks % config.cluster == 0 and blocks <= max(num_sms, config.cluster)
    which = UNITS.index((GROUPINGS.index(config.grouping), *config.unit))
    count = library.all_tiles(
        which,
        m,
        n,
        config.strip,
        pointer(group_list),
        groups,
        blocks // config.cluster,
        pointer(BUFFER),
        ctypes.c_long(ROOM),
    )
    assert count >= 0
    units = BUFFER[:count].astype(np.int64)
    if config.cluster == 1:
        return units
    ranks = np.stack([units, units])
    ranks[:, :, 0] = ranks[:, :, 0] * 2 + np.arange(2)[:, None]
    ranks[1, :, 2] += config.block_m * (config.multicast == "b")
    ranks[1, :, 3] += config.block_n * (config.multicast == "a")
    return ranks.reshape(-1, 5)


def check_ownership(tiles, config, m, n, begins, ends):
    """Every element of every group has one owner, and no tile begins outside its group.

    Tiles that lie on their group's grid, each once, and are as many as the grid has places, cover it once.
    """
    _, group, row, column, row_end = tiles.T
    assert np.array_equal(row_end, ends[group])
    assert (begins[group] <= row).all() and (row < ends[group]).all() and (column < n).all()
    assert not ((row - begins[group]) % config.block_m).any() and not (column % config.block_n).any()
    places = -(-(ends - begins) // config.block_m) * ceil_div(n, config.block_n)
    assert len(tiles) == places.sum()
    assert len(np.unique((row << 32) | column)) == len(tiles)


def random_problem(rng):
    """Sizes spread over their orders of magnitude, small ones and those of the model among them."""
    grouping = rng.choice(GROUPINGS)
    m = int(2 ** rng.uniform(0, 13))
    n = 8 * rng.choice((int(2 ** rng.uniform(0, 12)), 264, 896, 512, 3072))
    num_sms = rng.choice((132, 131, rng.randint(1, 132), rng.randint(1, 8)))
    groups = 1 if grouping == "none" else rng.choice((1, 4, 32, rng.randint(1, 64)))
    group_list = np.zeros(1, np.int32)
    begins, ends = np.array([0]), np.array([m])
    if grouping == "offsets":
        cuts = sorted(rng.choice((0, m, rng.randint(0, m))) for _ in range(groups))
        group_list = np.array([0, *cuts], np.int32)
        begins, ends = group_list[:-1].astype(np.int64), group_list[1:].astype(np.int64)
    elif grouping == "counts":
        m = min(m, 1024)
        group_list = np.array([rng.choice((0, m, rng.randint(0, m))) for _ in range(groups)], np.int32)
        begins = np.arange(groups) * m
        ends = begins + group_list
    return grouping, m, n, groups, num_sms, group_list, begins, ends


def test_chooser_and_scheduler_over_random_shapes(scheduler):
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    chosen = set()
    for _ in range(10_000):
        grouping, m, n, groups, num_sms, group_list, begins, ends = problem = random_problem(rng)
        config = gemm.choose_config(grouping, m, n, groups, num_sms)
        assert config is gemm.choose_config(grouping, m, n, groups, num_sms)
        chosen.add(gemm.replace(config, strip=16))
        assert config.shared_bytes <= gemm.SHARED_MEMORY and 3 <= config.stages <= gemm.MAX_STAGES
        if config.cluster == 2:
            assert num_sms % 2 == 0
            assert config.multicast == "a" or grouping == "none", "a cluster across a group border"
        tiles = tiles_of(scheduler, config, m, n, group_list, num_sms)
        assert len(tiles) % config.cluster == 0, problem
        check_ownership(tiles, config, m, n, begins, ends)
    assert chosen <= set(ALL_CONFIGS)
    assert len(chosen) > 0.8 * len(ALL_CONFIGS)


def test_clusters_stay_within_a_group(scheduler):
    """Its blocks have the same group and rows where they share A, the same columns where they share B."""
    rng = random.Random(3)
    for config in (c for c in ALL_CONFIGS if c.cluster == 2):
        sizes = [rng.randint(0, 400) for _ in range(9)]
        group_list = np.array({"offsets": [0, *np.cumsum(sizes)]}.get(config.grouping, sizes), np.int32)
        m = 400 if config.grouping == "counts" else sum(sizes)
        pairs = tiles_of(scheduler, config, m, 4 * config.block_n, group_list, 8).reshape(2, -1, 5)
        same = (1, 2) if config.multicast == "a" else (1, 3)
        assert np.array_equal(pairs[0][:, same], pairs[1][:, same])


def test_work_is_spread_evenly(scheduler):
    config = gemm.choose_config("none", 4096, 7168, 1, 132)
    tiles = tiles_of(scheduler, config, 4096, 7168, np.zeros(1, np.int32), 132)
    assert np.ptp(np.bincount(tiles[:, 0], minlength=132)) <= 1


@pytest.mark.parametrize("strip", [8, 16])
def test_neighbours_in_time_read_the_same_operands(scheduler, strip):
    """What 132 blocks compute at once reads little more than the smallest rectangle of that many tiles."""
    config = gemm.replace(gemm.config_of_tile(128, 128), strip=strip)
    tiles = tiles_of(scheduler, config, 128 * 64, 128 * 64, np.zeros(1, np.int32), 132)
    first = {}
    for block, _, row, column, _ in tiles:
        first.setdefault(block, (row, column))
    rows, columns = ({at[i] for at in first.values()} for i in (0, 1))
    assert len(first) == 132 and len(columns) <= strip and len(rows) <= ceil_div(132, strip) + 1


def test_wrong_offsets_and_counts_stay_within_the_rows(scheduler):
    """Whatever the lists hold: no row below 0 or past the last, none twice; and what is wrong is noticed."""
    rng = random.Random(secrets.randbits(32))
    for _ in range(500):
        m, groups = rng.randint(1, 500), rng.randint(1, 40)
        config = rng.choice([c for c in ALL_CONFIGS if c.grouping != "none"])
        counted = config.grouping == "counts"
        good = sorted(rng.randint(0, m) for _ in range(groups))
        group_list = np.array(good if counted else [0, *good], np.int32)
        assert scheduler.valid(not counted, pointer(group_list), groups, m)
        at, bad = rng.randrange(len(group_list)), rng.choice((-1, -(2**31), m + 1, 2**31 - 1))
        group_list[at] = bad
        assert not scheduler.valid(not counted, pointer(group_list), groups, m)
        n = config.unit[1]
        tiles = tiles_of(scheduler, config, m, n, group_list, 8)
        _, group, row, column, row_end = tiles.T
        assert (group < groups).all() and (row < row_end).all()
        low, high = (group * m, group * m + m) if counted else (0, m)
        assert (low <= row).all() and (row_end <= high).all()
        taken = 0
        for begin, end in sorted(zip(row[column == 0], row_end[column == 0], strict=True)):
            assert begin >= taken
            taken = min(begin + config.block_m, end)
    descending = np.array([0, 9, 5], np.int32)
    assert not scheduler.valid(True, pointer(descending), 2, 9)
    assert not scheduler.valid(True, pointer(np.array([1, 9], np.int32)), 1, 9)


def test_chooser_fills_the_gpu_and_then_takes_large_tiles():
    small = gemm.choose_config("none", 16, 7168, 1, 132)
    assert small.swap and small.block_m == 16 and ceil_div(7168, small.block_n) >= 100
    large = gemm.choose_config("none", 8192, 7168, 1, 132)
    assert not large.swap and large.block_m * large.block_n >= 128 * 160 and large.cluster == 2
    assert gemm.choose_config("none", 8192, 7168, 1, 131).cluster == 1
    decode = gemm.choose_config("counts", 16, 4096, 32, 132)
    assert decode.swap and decode.block_m == 16


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=name_of)
def test_python_and_cuda_agree_on_the_layout(config):
    swap, multicast = str(config.swap).lower(), {"none": "kNone", "a": "kA", "b": "kB"}[config.multicast]
    source = f"""
        #include "gemm.cuh"
        using namespace dsv3;
        constexpr auto kMulticast = Multicast::{multicast};
        using L = gemm::Layout<{config.block_m}, {config.block_n}, {config.stages}, {swap}, kMulticast>;
        static_assert(sizeof(L::Shared) == {config.shared_bytes}, "shared memory");
        static_assert(L::kThreads == {config.threads} && L::kCluster == {config.cluster}, "threads");
        static_assert(L::kPanelRows == {config.panel[0]} && L::kPanel == {config.panel[1]}, "panel");
        static_assert(L::kStageBytes == {config.stage_bytes}, "stage");
    """
    jit.compile_ptx(source)


def test_a_config_prints_as_a_sentence():
    assert str(gemm.config_of_tile(128, 192, multicast="b")) == (
        "dense, tiles of 128x192, 4 stages, clusters of 2 share B, strips of 16; 384 threads, "
        "216064 bytes of shared memory"
    )
    assert "B as the 64 rows of wgmma" in str(gemm.config_of_tile(16, 64, grouping="counts", swap=True))
