"""gemm.cuh: its machine code, and its results in the emulator, bit for bit, in every configuration."""

import collections
import contextlib
import itertools
import random
import re

import pytest
import torch
from commit_seed import seeds
from gemm_helpers import (
    ALL_CONFIGS,
    GROUPINGS,
    POISON,
    assert_same_bits,
    check,
    name_of,
    operands,
    run_config,
)

import dsv3_kernels as dsv3
from dsv3_kernels import emulator, gemm, reference
from dsv3_kernels.checks import ceil_div
from dsv3_kernels.jit.disassemble import disassemble
from dsv3_kernels.nn import Fp8Linear, GroupedFp8Linear

# ---- Machine code

# The tiles with the fewest registers to spare, and some swapped ones.
SPREAD = [c for c in ALL_CONFIGS if (c.block_m, c.block_n) == (128, 192)] + [
    c for c in ALL_CONFIGS if c.swap and (c.grouping, c.block_m) in (("none", 16), ("counts", 64))
]


def check_machine_code(config):
    cubin = config.kernel.cubin()
    resources, sass = cubin.resources, disassemble(cubin.image)
    rows, columns = (config.block_n, config.block_m) if config.swap else (config.block_m, config.block_n)
    waves = rows // gemm.WAVE // config.math_warpgroups
    assert sass.count(f"QGMMA.64x{columns}x32.F32.E4M3.E4M3") == sass.count("QGMMA") == 4 * waves
    assert sass.local_memory == 0
    assert (resources.stack_bytes, resources.spill_store_bytes, resources.spill_load_bytes) == (0, 0, 0)
    # What a thread is launched with; setmaxnreg then gives the math warpgroups 232 and the producer 40.
    assert resources.registers <= 65536 // config.threads
    assert sass.registers <= (232 if config.math_warpgroups == 2 else 255)
    if config.math_warpgroups == 2:
        producer = re.search(r"USETMAXREG\.DEALLOC.*?PREEXIT", sass.text, re.DOTALL)
        assert producer and max(int(r) for r in re.findall(r"\bR(\d+)\b", producer[0])) < 40
    # One FMA an accumulator a wave: the promotion, and nothing beside it.
    promotions = columns // 2 * waves
    assert promotions <= sass.count("FFMA") <= promotions + 8
    assert sass.count("UTMALDG") == 3 and sass.count("UTMASTG") >= 1
    assert sass.count("UTMALDG.2D.MULTICAST") == (config.cluster == 2)
    # A release or acquire wider than the block would wait for memory at every stage.
    assert sass.count("MEMBAR.ALL.GPU") + sass.count("MEMBAR.SC") == 0
    # Tails leave 16 bytes a store.
    assert set(sass.widths("STG")) <= {128, 32} and (sass.widths("STG")[128] > 0) == (
        config.grouping != "none"
    )


@pytest.mark.parametrize("config", SPREAD, ids=name_of)
def test_machine_code(config):
    check_machine_code(config)


@pytest.mark.long
@pytest.mark.parametrize("config", ALL_CONFIGS, ids=name_of)
def test_machine_code_of_every_configuration(config):
    check_machine_code(config)


# ---- Every configuration in the emulator

M = (1, 16, 17, 63, 64, 65, 128, 200)
GROUPS = (  # of tokens by offsets, and the rows that no group has
    ((0, 1, 5, 64, 130, 0, 7), 4),
    ((0, 0, 0), 9),
    ((200,), 0),
    ((17, 65), 0),
    ((0, 128, 0, 63), 1),
    ((1,) * 5, 3),
    ((16, 64, 16), 0),
    ((130, 0, 7, 1), 0),
)
MAX_M = 72
COUNTS = (
    (0, 1, 5, 64, 72, 0, 7),
    (0, 0, 0),
    (72,),
    (72, 72),
    (17, 65),
    (63, 0, 1),
    (16, 16, 16),
    (8, 71),
)
K = (16, 128, 272, 400)
COLUMNS = (lambda tile: 8, lambda tile: tile + 8, lambda tile: 2 * tile)


def rows_of(config, case):
    """m and the sizes of groups of one of eight cases."""
    if config.grouping == "none":
        return M[case], None
    if config.grouping == "counts":
        return MAX_M, COUNTS[case]
    sizes, unused = GROUPS[case]
    return sum(sizes) + unused, sizes


def spread(seed):
    """Each configuration twice, and every pair of values of any two of: rows, SMs, K, columns.

    Rows and SMs, 8 each, meet in the first 64 of the list; K and columns are chosen so that what they meet is
    what they have met least.
    """
    rng = random.Random(seed)
    configs = [config for _ in range(2) for config in rng.sample(ALL_CONFIGS, len(ALL_CONFIGS))]
    sms_order = rng.sample(range(1, 9), 8)
    rest = list(itertools.product(range(len(K)), range(len(COLUMNS))))
    met = collections.Counter()
    runs = []
    for i, config in enumerate(configs):
        case, sms = i % 8, sms_order[(i + i // 8) % 8]

        def pairs(k, n, case=case, sms=sms):
            return [("mk", case, k), ("mn", case, n), ("sk", sms, k), ("sn", sms, n), ("kn", k, n)]

        k, n = min(rng.sample(rest, len(rest)), key=lambda kn: sum(min(met[p], 3) for p in pairs(*kn)))
        met.update([*pairs(k, n), ("ms", case, sms)])
        runs.append((config, case, sms, k, n))
    assert len(met) == 8 * 8 + 2 * 8 * (len(K) + len(COLUMNS)) + len(K) * len(COLUMNS)
    return runs


RUNS = spread(seeds("gemm's configurations", 1)[0])


@pytest.mark.parametrize("i", range(len(RUNS)), ids=lambda i: f"{name_of(RUNS[i][0])}-{i}")
def test_configuration(i):
    config, case, num_sms, k, n = RUNS[i]
    m, sizes = rows_of(config, case)
    n, k, (seed,) = COLUMNS[n](config.block_n), K[k], seeds(f"gemm {i}", 1)
    print(f"check({config!r}, {m}, {n}, {k}, {seed}, {num_sms}, {sizes})")
    check(config, m, n, k, seed, num_sms, sizes, ugly=i % 4 == 0)


@pytest.mark.long
@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("config", ALL_CONFIGS, ids=name_of)
def test_configuration_in_full(config, case):
    m, sizes = rows_of(config, case)
    for seed, (n, k) in zip(range(50), itertools.cycle(itertools.product(COLUMNS, K)), strict=False):
        print(f"check({config!r}, {m}, {n(config.block_n)}, {k}, {seed}, {1 + seed % 8}, {sizes})")
        check(config, m, n(config.block_n), k, seed, 1 + seed % 8, sizes, ugly=seed % 4 == 0)


def test_work_of_the_tensor_core():
    """No wave is computed twice, none beyond the tiles there are, and of groups none beyond their rows."""
    for config in ALL_CONFIGS[::5]:
        m, sizes = rows_of(config, 0)
        n, k_blocks = config.block_n + 8, 3
        gpu = check(config, m, n, 272, seed=1, num_sms=2, sizes=sizes)
        unit_m, unit_n = config.unit
        columns = ceil_div(n, unit_n) * unit_n
        if config.grouping == "none" or config.swap:
            rows = sum(ceil_div(size, unit_m) * unit_m for size in (sizes or [m]))
        else:
            rows = sum(ceil_div(size, gemm.WAVE) * gemm.WAVE for size in sizes)
        wide = config.block_m if config.swap else config.block_n
        assert gpu.counters["wgmma"] == rows * columns // (gemm.WAVE * wide) * k_blocks * 4


@pytest.mark.parametrize(
    "config", [c for c in ALL_CONFIGS if c.block_m * c.block_n <= 128 * 128][::4], ids=name_of
)
def test_ring_wraps_and_tiles_follow_each_other(config):
    """One SM or cluster computes every tile: the ring's phase, the lazy drain of the stores, strips."""
    config = gemm.replace(config, stages=2, strip=1)
    m, sizes = rows_of(config, 6)
    check(config, m, 3 * config.block_n, 640, seed=5, num_sms=1, sizes=sizes)


def test_a_tile_does_not_depend_on_who_computes_it():
    """Deterministic: the same bits from any number of SMs, tile and grouping."""
    a, b = operands((130, 272), (200, 272), seed=3)
    expected = reference.fp8_gemm(a, b, accumulation="hopper")
    offsets = torch.tensor([0, 130], dtype=torch.int32)
    for num_sms in (1, 2, 5, 8):
        with emulator.virtual_gpu(num_sms=num_sms, seed=num_sms):
            assert_same_bits(dsv3.fp8_gemm(a, b), expected)
            stacked = dsv3.QuantizedTensor(b.data[None], b.scales[None], b.block)
            assert_same_bits(dsv3.grouped_fp8_gemm(a, stacked, offsets), expected)


# ---- Through the public calls


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 16), (16, 8, 128), (17, 136, 144), (63, 192, 512), (64, 24, 640), (300, 320, 32)]
)
def test_dense_call(m, n, k):
    a, b = operands((m, k), (n, k), seed=m)
    with emulator.virtual_gpu(num_sms=3, seed=m) as gpu:
        out = dsv3.fp8_gemm(a, b)
    assert gpu.counters["launches"] == 1 and gpu.counters["wgmma"] > 0
    assert_same_bits(out, reference.fp8_gemm(a, b, accumulation="hopper"))


@pytest.mark.parametrize("num_sms", [None, 1, 2, 7, 1000])
def test_num_sms(num_sms, monkeypatch):
    grids = []
    emulate = gemm.launch._emulate

    def noting(kernel, args, grid, *shape):
        grids.append(grid[0])
        emulate(kernel, args, grid, *shape)

    monkeypatch.setattr(gemm.launch, "_emulate", noting)
    a, b = operands((40, 144), (1040, 144), seed=2)
    weights = dsv3.QuantizedTensor(torch.stack([b.data] * 3), torch.stack([b.scales] * 3), b.block)
    offsets = torch.tensor([0, 13, 13, 40], dtype=torch.int32)
    rows = dsv3.QuantizedTensor(torch.stack([a.data] * 3), torch.stack([a.scales] * 3), a.block)
    counts = torch.tensor([40, 0, 40], dtype=torch.int32)
    with emulator.virtual_gpu(num_sms=8):
        dense = dsv3.fp8_gemm(a, b, num_sms=num_sms)
        grouped = dsv3.grouped_fp8_gemm(a, weights, offsets, num_sms=num_sms)
        masked = dsv3.masked_grouped_fp8_gemm(rows, weights, counts, num_sms=num_sms)
    most = min(num_sms or 8, 8)
    assert grids[1:] == [most, most] and min(most, 3) <= grids[0] <= most
    expected = reference.fp8_gemm(a, b, accumulation="hopper")
    for got in (dense, grouped, masked[0], masked[2]):
        assert_same_bits(got, expected)


def test_expected_m_chooses_the_tile_and_nothing_else(monkeypatch):
    launched = []
    emulate = gemm.launch._emulate
    monkeypatch.setattr(
        gemm.launch, "_emulate", lambda kernel, *rest: (launched.append(kernel), emulate(kernel, *rest))
    )
    a, b = operands((3, 200, 144), (3, 136, 144), seed=4)
    counts = torch.tensor([200, 0, 9], dtype=torch.int32)
    expected = reference.masked_grouped_fp8_gemm(a, b, counts, accumulation="hopper")
    with emulator.virtual_gpu(num_sms=4):
        for expected_m in (None, 10, 5000, 200):
            got = dsv3.masked_grouped_fp8_gemm(a, b, counts, expected_m=expected_m)
            assert_same_bits(got[0], expected[0])
            assert_same_bits(got[2, :9], expected[2, :9])
    full, few, more, same = launched
    assert full == gemm.choose_config("counts", 200, 136, 3, 4).kernel == more == same
    assert few == gemm.choose_config("counts", 10, 136, 3, 4).kernel != full
    for bad, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match=f"masked_grouped_fp8_gemm: expected_m is {bad!r}"):
            dsv3.masked_grouped_fp8_gemm(a, b, counts, expected_m=bad)


@pytest.mark.parametrize("call", [dsv3.fp8_gemm, dsv3.grouped_fp8_gemm, dsv3.masked_grouped_fp8_gemm])
def test_bad_num_sms(call):
    a, b = operands((4, 16), (8, 16), seed=0)
    arguments = [a, b]
    if call is not dsv3.fp8_gemm:
        b = dsv3.QuantizedTensor(b.data[None], b.scales[None], b.block)
        arguments = [a, b, torch.tensor([0, 4], dtype=torch.int32)]
    if call is dsv3.masked_grouped_fp8_gemm:
        a = dsv3.QuantizedTensor(a.data[None], a.scales[None], a.block)
        arguments = [a, b, torch.tensor([4], dtype=torch.int32)]
    call(*arguments, num_sms=1)
    for bad, error in (
        (0, ValueError),
        (-3, ValueError),
        (True, TypeError),
        (2.0, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match=f"{call.__name__}: num_sms is {bad!r}"):
            call(*arguments, num_sms=bad)


def test_nothing_to_do():
    a, b = operands((0, 128), (16, 128), 0)
    none = torch.zeros(3, dtype=torch.int32)
    a3, b3 = operands((2, 4, 0), (2, 16, 0), 0)
    with emulator.virtual_gpu() as gpu:
        assert dsv3.fp8_gemm(a, b).shape == (0, 16)
        assert not dsv3.masked_grouped_fp8_gemm(a3, b3, none[:2]).any()
        assert not dsv3.grouped_fp8_gemm(
            dsv3.QuantizedTensor(a3.data[0], a3.scales[0], a.block), b3, none
        ).any()
    assert gpu.counters["launches"] == 2, "a look at each list"


@pytest.mark.parametrize("world", ["reference", "emulator"])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 16, 128), (9, 0, 128), (9, 16, 0), (0, 0, 0)])
def test_lists_are_looked_at_where_there_is_nothing_to_do(m, n, k, world):
    a, b = operands((m, k), (2, n, k), 0)
    a3, _ = operands((2, m, k), (2, n, k), 0)

    def offsets(*values):
        return dsv3.grouped_fp8_gemm(a, b, torch.tensor(values, dtype=torch.int32))

    def counts(*values):
        return dsv3.masked_grouped_fp8_gemm(a3, b, torch.tensor(values, dtype=torch.int32))

    with emulator.virtual_gpu() if world == "emulator" else contextlib.nullcontext():
        for values in ((1, 1, 1), (0, 0, m + 1), (0, -1, 0)):
            with pytest.raises(ValueError, match="group_offsets"):
                offsets(*values)
        for values in ((m + 1, 0), (0, -1)):
            with pytest.raises(ValueError, match="counts"):
                counts(*values)
        assert offsets(0, m // 2, m).shape == (m, n) and not offsets(0, 0, m).any()
        assert counts(m, 0).shape == (2, m, n) and not counts(0, m).any()


def test_scales_of_any_strides():
    a, b = operands((20, 256), (40, 256), seed=9)
    expected = reference.fp8_gemm(a, b, accumulation="hopper")
    counts = torch.tensor([20], dtype=torch.int32)
    for scales in (a.scales.contiguous(), torch.stack([a.scales] * 2, -1)[..., 0]):
        with emulator.virtual_gpu(seed=1):
            assert_same_bits(dsv3.fp8_gemm((a.data, scales), b), expected)
            masked = dsv3.masked_grouped_fp8_gemm(
                (a.data[None], scales[None]), (b.data[None], b.scales[None]), counts
            )
            assert_same_bits(masked[0], expected)


# ---- Lists on the device that are out of range


@pytest.mark.parametrize(
    "bad", [[0, 5, 3, 9], [1, 5, 7, 9], [0, 5, 99, 9], [0, -4, 7, 9], [0, 4, 8, 10]], ids=str
)
@pytest.mark.parametrize("config", [c for c in ALL_CONFIGS if c.grouping == "offsets"][::5], ids=name_of)
def test_wrong_offsets(config, bad):
    """The kernel stays within its tensors, ends, and says so; what follows on the GPU is right."""
    check_wrong_list(config, 9, torch.tensor(bad, dtype=torch.int32), "group_offsets")


@pytest.mark.parametrize("bad", [[3, -1, 2], [3, 10, 9], [2**31 - 1, 1, 1]], ids=str)
@pytest.mark.parametrize("config", [c for c in ALL_CONFIGS if c.grouping == "counts"][::5], ids=name_of)
def test_wrong_counts(config, bad):
    check_wrong_list(config, 9, torch.tensor(bad, dtype=torch.int32), "counts")


def check_wrong_list(config, m, group_list, name):
    counted = config.grouping == "counts"
    a, b = operands((3, m, 144) if counted else (m, 144), (3, 40, 144), seed=4)
    guarded = torch.full((*a.shape[:-1], 40), POISON, dtype=torch.bfloat16)
    with emulator.virtual_gpu(num_sms=2, seed=1):
        with pytest.raises(ValueError, match=name):
            run_config(config, a.data, a.scales, b.data, b.scales, guarded, group_list, 2)
        right = torch.tensor([m] * 3 if counted else [0, m, m, m], dtype=torch.int32)
        run_config(config, a.data, a.scales, b.data, b.scales, guarded, right, 2)
    op = reference.masked_grouped_fp8_gemm if counted else reference.grouped_fp8_gemm
    assert_same_bits(guarded, op(a, b, right, accumulation="hopper"))


# ---- Under the layers of nn


def test_linear_layers_run_the_kernels():
    """Their forward, quantisers and all, in the emulator: the reference's bits."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(40, 272, generator=generator).bfloat16()
    offsets = torch.tensor([0, 7, 7, 40], dtype=torch.int32)
    dense = Fp8Linear(272, 136, dtype=torch.bfloat16)
    grouped = GroupedFp8Linear(3, 272, 136, dtype=torch.bfloat16)
    with torch.no_grad(), emulator.virtual_gpu(seed=2) as gpu:
        y, y_grouped = dense(x), grouped(x, offsets)
    assert gpu.counters["launches"] == 6 and gpu.counters["wgmma"] > 0
    x_q = reference.quantize_1x128(x)
    with torch.no_grad():
        w, w_grouped = reference.quantize_128x128(dense.weight), reference.quantize_128x128(grouped.weight)
    assert_same_bits(y, reference.fp8_gemm(x_q, w, accumulation="hopper"))
    expected = reference.grouped_fp8_gemm(x_q, w_grouped, offsets, accumulation="hopper")
    assert_same_bits(y_grouped, expected)


def test_groupings_are_all_there():
    assert {config.grouping for config in ALL_CONFIGS} == set(GROUPINGS)
