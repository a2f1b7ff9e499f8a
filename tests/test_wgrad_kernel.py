"""wgrad.cuh: its configurations, its machine code, and its results in the emulator, bit for bit."""

import random
import re

import pytest
import torch
from commit_seed import seeds
from fp8_helpers import offsets_of

import dsv3_kernels as dsv3
from dsv3_kernels import emulator, jit, reference, wgrad
from dsv3_kernels.checks import ceil_div
from dsv3_kernels.device_error import DeviceValueError
from dsv3_kernels.jit.disassemble import disassemble

CONFIGS = wgrad.CONFIGS
SIZES = [0, 128, 1, 300, 0]


def name_of(config):
    return f"128x{config.block_n}" + (" pairs" if config.cluster == 2 else "")


# ---- Configurations


def test_chooser_over_random_shapes():
    (seed,) = seeds("chooser", 1)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(10_000):
        groups = rng.choice((1, rng.randint(1, 256)))
        n, k, num_sms = 8 * rng.randint(1, 3000), 8 * rng.randint(1, 5000), rng.choice((1, 2, 8, 78, 132))
        config = wgrad.choose_config(groups, n, k, num_sms)
        assert config in wgrad.CONFIGS and config.cluster <= num_sms
        assert config.shared_bytes <= wgrad.SHARED_MEMORY, (groups, n, k, num_sms, config)
        assert 3 <= config.stages <= wgrad.MAX_STAGES


def test_chooser_fills_waves():
    # 10 waves of 768 cycles, for which its loads leave time.
    large = wgrad.choose_config(1, 128 * 132, 1920, 132)
    assert (large.block_n, large.cluster) == (192, 2)
    # One wave in any case: the narrowest tile, and nobody to share x with.
    small = wgrad.choose_config(1, 128, 640, 132)
    assert (small.block_n, small.cluster) == (64, 1)
    assert wgrad.choose_config(1, 256, 640, 1).cluster == 1


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_python_and_cuda_agree_on_the_layout(config):
    source = f"""
        #include "wgrad.cuh"
        using L = dsv3::wgrad::Layout<{config.block_n}, {config.stages}, {config.cluster}>;
        static_assert(sizeof(L::Shared) == {config.shared_bytes}, "shared memory");
        static_assert(L::kStageBytes == {wgrad.stage_bytes(config.block_n)}, "stage");
        static_assert(dsv3::wgrad::kThreads == {wgrad.THREADS}, "threads");
        static_assert(dsv3::wgrad::kBlockM == {wgrad.BLOCK_M}, "rows");
        static_assert(dsv3::wgrad::kPanel == {wgrad.PANEL}, "panel");
    """
    jit.compile_ptx(source)


# A block walks its tiles and counts each, with the token tiles it was given.
WALK = """
#include "wgrad.cuh"
using namespace dsv3;
extern "C" __global__ void walk(const i32* offsets, u32 groups, u32 n, u32 k, u32 token_tiles, u32 skip,
                                u32* owned, u32* error) {
    wgrad::Scheduler<ROWS, BLOCK_N> scheduler(offsets, groups, n, k, token_tiles, STRIP, skip, error,
                                              blockIdx.x, gridDim.x);
    const u32 rows = (n + ROWS - 1) / ROWS, columns = (k + BLOCK_N - 1) / BLOCK_N;
    wgrad::GroupTile tile;
    while (scheduler.next(tile)) {
        u32* entry = owned + ((tile.group * rows + tile.row / ROWS) * columns + tile.column / BLOCK_N) * 3;
        atomicAdd(entry, 1);
        entry[1] = tile.first;
        entry[2] = tile.count;
    }
}
"""


@pytest.mark.parametrize("tile_rows, block_n, strip", [(128, 64, 8), (256, 96, 3), (256, 192, 1)])
def test_every_tile_has_one_owner_and_its_groups_tokens(tile_rows, block_n, strip):
    ptx = jit.compile_ptx(WALK, defines={"ROWS": tile_rows, "BLOCK_N": block_n, "STRIP": strip})
    (seed,) = seeds(f"owners {block_n}", 1)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(30):
        sizes = [rng.choice((0, 1, 127, 128, 129, rng.randint(0, 700))) for _ in range(rng.randint(1, 9))]
        n, k = 8 * rng.randint(1, 80), 8 * rng.randint(1, 200)
        rows, columns = ceil_div(n, tile_rows), ceil_div(k, block_n)
        blocks, skip = rng.randint(1, 9), rng.randint(0, 1)
        counts = [ceil_div(size, 128) for size in sizes]
        spare = rng.randint(0, 2)
        owned = torch.zeros(len(sizes), rows * columns, 3, dtype=torch.int32)
        error = torch.zeros(1, dtype=torch.int32)
        arguments = [offsets_of(*sizes), len(sizes), n, k, sum(counts) + spare, skip, owned, error]
        gpu = emulator.VirtualGPU(num_sms=blocks, seed=rng.getrandbits(32))
        gpu.launch(ptx, "walk", grid=(blocks, 1, 1), block=(1, 1, 1), args=arguments)
        assert error.item() == 0
        for g, count in enumerate(counts):
            skipped = skip and count == 0
            expected = [0, 0, 0] if skipped else [1, sum(counts[:g]), count]
            assert (owned[g] == torch.tensor(expected)).all(), (sizes, n, k, blocks, skip, g, owned[g])


# ---- Machine code


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_machine_code(config):
    cubin = config.kernel.cubin()
    resources, sass = cubin.resources, disassemble(cubin.image)
    assert sass.count(f"QGMMA.64x{config.block_n}x32.F32.E4M3.E4M3") == 4
    assert sass.local_memory == 0
    assert (resources.stack_bytes, resources.spill_store_bytes, resources.spill_load_bytes) == (0, 0, 0)
    # What a thread is launched with; setmaxnreg then gives the math warpgroups 232 and the others 40.
    assert resources.registers <= 65536 // wgrad.THREADS
    assert sass.registers <= 232
    helpers = re.search(r"USETMAXREG\.DEALLOC.*EXIT", sass.text, re.DOTALL)
    assert max(int(number) for number in re.findall(r"\bR(\d+)\b", helpers[0])) < 40
    # A product of scales and an FMA an accumulator: the promotion, and nothing beside it.
    assert sass.count("FFMA") == sass.count("FMUL") == config.block_n // 2
    # Two scales of B at a time, and the output in pairs, each read only to add to it.
    assert sass.widths("STS") == {64: config.block_n // 4}
    assert sass.widths("LDS") == {64: config.block_n // 8 + config.block_n // 4, 32: 2}
    assert sass.count("UTMALDG.2D") == 4 and sass.count("UTMALDG.3D") >= 1 and sass.count("UTMASTG.3D") >= 1


# ---- Results in the emulator


def operands(tokens, n, k, seed, offsets=None, ugly=False):
    """Quantised random operands. Ugly ones hold zeros, subnormals, huge tiles, NaN codes and NaN scales."""
    generator = torch.Generator().manual_seed(seed)
    dy, x = (torch.randn(tokens, width, generator=generator) for width in (n, k))
    if ugly:
        for t in (dy, x):
            t *= 2.0 ** torch.randint(-20, 20, t.shape, generator=generator)
            t[torch.rand(t.shape, generator=generator) < 0.2] = 0
            t[:, int(torch.randint(t.shape[1], (), generator=generator))] = 0
        dy[:, 0] *= 2.0**-110  # with x's smallest: products of scales below the normal numbers
    dy_t, x_t = (dsv3.quantize_1x128_t(t, offsets) for t in (dy, x))
    if ugly:
        dy_t.data.view(torch.uint8)[int(torch.randint(1, n, (), generator=generator)), 0] = 0x7F
        x_t.scales[int(torch.randint(k, (), generator=generator)), 0] = torch.nan
        dy_t.scales[n - 1, -1] = torch.inf
    return dy_t, x_t


def gradient(shape, seed, ugly=False):
    """What the gradient's buffer held before: large, small, subnormal, negative zero."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(shape, generator=generator)
    if ugly:
        before = torch.ldexp(before, torch.randint(-140, 60, shape, generator=generator))
        before[torch.rand(shape, generator=generator) < 0.2] = -0.0
    return before


def guarded(shape):
    """NaN in a tensor of `shape`, between guards of 64 floats."""
    buffer = torch.full((torch.Size(shape).numel() + 128,), torch.nan)
    buffer[:64] = buffer[-64:] = 7.0
    return buffer, buffer[64:-64].view(shape)


def assert_same_bits(got, expected):
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    wrong = (~((got.view(torch.int32) == expected.view(torch.int32)) | nan)).nonzero()[:5].tolist()
    assert not wrong, [(*at, got[tuple(at)].item(), expected[tuple(at)].item()) for at in wrong]


def check(config, n, k, seed, *, tokens=0, sizes=None, accumulate=False, ugly=False, num_sms=2):
    """The kernel against the reference; an element written where none belongs is seen in the guards."""
    print("seed", seed)
    offsets = None if sizes is None else offsets_of(*sizes)
    tokens = tokens if sizes is None else sum(sizes)
    dy_t, x_t = operands(tokens, n, k, seed, offsets, ugly)
    groups = 1 if sizes is None else len(sizes)
    buffer, out = guarded((groups, n, k))
    before = gradient((groups, n, k), seed, ugly) if accumulate else torch.full((groups, n, k), torch.nan)
    out.copy_(before)
    with emulator.virtual_gpu(num_sms=num_sms, seed=seed) as gpu:
        wgrad._launch(config, dy_t.data, dy_t.scales, x_t.data, x_t.scales, out, accumulate, offsets, num_sms)
    expected = before if sizes is not None else before[0]
    reference.fp8_wgrad(dy_t, x_t, expected, accumulate, offsets, accumulation="hopper")
    assert_same_bits(out, before)
    assert (buffer[:64] == 7).all() and (buffer[-64:] == 7).all()
    token_tiles = sum(ceil_div(size, 128) for size in sizes) if sizes is not None else ceil_div(tokens, 128)
    tiles = config.clusters(1, n, k) * config.cluster
    assert gpu.counters["wgmma"] == token_tiles * tiles * 8  # none for a group without tokens
    assert gpu.counters["launches"] == 1 and gpu.counters["bank_conflicts"] == 0


@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_groups_and_tails(config, accumulate):
    """A full tile and, in both directions, a tail, for groups of no token, one, whole tiles and tails."""
    for seed in seeds(f"groups {config} {accumulate}", 1):
        num_sms = config.cluster * (1 + seed % 3)
        n = 136 + 256 * (seed % 2 and config.cluster - 1)  # pairs of tiles that are whole, or half empty
        check(config, n, config.block_n + 8, seed, sizes=SIZES, accumulate=accumulate, num_sms=num_sms)


@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_dense_and_ugly(config, accumulate):
    for seed in seeds(f"dense {config} {accumulate}", 1):
        check(config, 72, config.block_n, seed, tokens=300, accumulate=accumulate, ugly=True)


@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
def test_ring_wraps_and_tiles_follow_each_other(accumulate):
    """One SM, or one pair, computes every tile: the ring's phases, the panels' phases, several strips."""
    for cluster in (1, 2):
        config = wgrad.WgradConfig(64, stages=2, cluster=cluster, strip=2)
        check(config, 136, 328, 5, sizes=[400, 0, 130], accumulate=accumulate, num_sms=cluster)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0], [1], [127, 129, 2]], ids=str)
def test_other_groups(sizes):
    """Through the public call; no group, or none with tokens, too."""
    offsets = offsets_of(*sizes)
    dy_t, x_t = operands(sum(sizes), 24, 40, 7, offsets)
    for accumulate in (False, True):
        before = gradient((len(sizes), 24, 40), 3)
        out = before.clone() if accumulate else torch.full_like(before, torch.nan)
        with emulator.virtual_gpu(num_sms=3, seed=1):
            assert dsv3.fp8_wgrad(dy_t, x_t, out, accumulate, offsets) is out
        reference.fp8_wgrad(dy_t, x_t, before, accumulate, offsets, accumulation="hopper")
        assert_same_bits(out, before)


def test_a_group_without_tokens_is_left_alone_when_accumulating():
    """Not even a negative zero changes, here and in the reference."""
    offsets = offsets_of(0, 3)
    dy_t, x_t = operands(3, 8, 8, 1, offsets)
    before = torch.full((2, 8, 8), -0.0)
    out = before.clone()
    with emulator.virtual_gpu():
        dsv3.fp8_wgrad(dy_t, x_t, out, True, offsets)
    assert out[0].signbit().all()
    assert dsv3.fp8_wgrad(dy_t, x_t, before, True, offsets)[0].signbit().all()


def test_subnormal_gradients_are_kept():
    """The copy engine's own reduce-add might flush them."""
    dy_t, x_t = operands(128, 8, 8, 1)
    dy_t.scales.fill_(2.0**-100)
    x_t.scales.fill_(2.0**-48)
    out = torch.full((8, 8), 2.0**-140)
    expected = reference.fp8_wgrad(dy_t, x_t, out.clone(), True, accumulation="hopper")
    assert ((expected != 0) & (expected.abs() < 2.0**-126)).all()
    with emulator.virtual_gpu():
        dsv3.fp8_wgrad(dy_t, x_t, out, True)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("num_sms, blocks", [(1, 1), (2, 2), (3, 2), (100, 8), (None, 8)])
def test_num_sms_bounds_the_blocks_and_changes_nothing(num_sms, blocks, monkeypatch):
    grids = []
    launch = emulator.VirtualGPU.launch
    monkeypatch.setattr(
        emulator.VirtualGPU,
        "launch",
        lambda *args, grid, **rest: grids.append(grid) or launch(*args, grid=grid, **rest),
    )
    dy_t, x_t = operands(130, 136, 328, 11)
    with emulator.virtual_gpu(num_sms=8, seed=2, checks=False):
        out = dsv3.fp8_wgrad(dy_t, x_t, num_sms=num_sms)
    assert_same_bits(out, reference.fp8_wgrad(dy_t, x_t, torch.empty(136, 328), accumulation="hopper"))
    assert grids == [(blocks, 1, 1)]


BAD_OFFSETS = {
    "does not start at 0": [5, 100, 300],
    "negative": [0, -1, 300],
    "begins below 0": [-(2**31), 2**31 - 1, 3],
    "descends": [0, 200, 100],
    "more tokens than columns": [0, 100, 1000],
    "far more": [0, 2**31 - 1, 2**31 - 1],
    "first group takes all, then more": [0, 512, 513],
}


@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("name", BAD_OFFSETS)
def test_offsets_out_of_range(name, accumulate):
    """As on a GPU, nobody reads them before the kernel, which stays inside and reports."""
    dy_t, x_t = operands(300, 24, 40, 1, offsets_of(100, 200))  # 3 token tiles, and one to spare
    buffer, out = guarded((2, 24, 40))
    out.zero_()
    offsets = torch.tensor(BAD_OFFSETS[name], dtype=torch.int32)
    with emulator.virtual_gpu(num_sms=2) as gpu:
        with pytest.raises(DeviceValueError, match="fp8_wgrad: group_offsets"):
            dsv3.fp8_wgrad(dy_t, x_t, out, accumulate, offsets)
        assert (buffer[:64] == 7).all() and (buffer[-64:] == 7).all()
        good = offsets_of(100, 200)
        dsv3.fp8_wgrad(dy_t, x_t, out, False, good)  # the error is gone
    assert gpu.counters["launches"] == 2
    assert_same_bits(out, reference.fp8_wgrad(dy_t, x_t, out.clone(), False, good, accumulation="hopper"))


def test_operands_of_more_than_2_to_the_31_elements():
    """Untouched memory costs nothing: an operand spans more than 2 GiB, and its first token tile is real."""
    columns = 2**24 + 128
    try:
        dy, x = (torch.empty(rows, columns, dtype=torch.uint8) for rows in (136, 8))
        scales = torch.empty(columns // 128, 136)
    except RuntimeError as error:
        pytest.skip(f"this machine promises no more memory than it has: {error}")
    dy_t, x_t = operands(100, 136, 8, 3)
    dy[:, :128], x[:, :128] = (q.data.view(torch.uint8) for q in (dy_t, x_t))
    scales[0] = dy_t.scales[:, 0]
    offsets = offsets_of(100)
    dy, x = (t.view(torch.float8_e4m3fn) for t in (dy, x))
    with emulator.virtual_gpu(checks=False):
        x_scales = torch.empty(columns // 128, 8)
        x_scales[0] = x_t.scales[:, 0]
        out = dsv3.fp8_wgrad((dy, scales.t()), (x, x_scales.t()), group_offsets=offsets)
    assert_same_bits(out[0], reference.fp8_wgrad(dy_t, x_t, torch.empty(136, 8), accumulation="hopper"))


def test_scales_of_any_strides():
    dy_t, x_t = operands(200, 24, 40, seed=9)
    expected = reference.fp8_wgrad(dy_t, x_t, torch.empty(24, 40), accumulation="hopper")
    for scales in (dy_t.scales.contiguous(), torch.stack([dy_t.scales] * 2, -1)[..., 0]):
        with emulator.virtual_gpu(seed=1):
            assert_same_bits(dsv3.fp8_wgrad((dy_t.data, scales), x_t), expected)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_many_schedules(config, seed):
    rng = random.Random(seed)
    sizes = rng.choice((None, SIZES, [rng.randint(0, 400) for _ in range(rng.randint(1, 6))]))
    check(
        config,
        8 * rng.randint(1, 40),
        8 * rng.randint(1, 60),
        seed,
        tokens=rng.randint(1, 700),
        sizes=sizes,
        accumulate=rng.random() < 0.5,
        ugly=sizes is None,
        num_sms=rng.randint(config.cluster, 8),
    )
