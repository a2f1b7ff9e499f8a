"""gemm.cuh: its configurations, its machine code, and its results in the emulator, bit for bit."""

import random

import pytest
import torch

import dsv3_kernels as dsv3
from dsv3_kernels import emulator, gemm, jit, reference
from dsv3_kernels.checks import ceil_div
from dsv3_kernels.jit.disassemble import disassemble

CONFIGS = [gemm.config_of_tile(*tile) for tile in gemm.TILES]


def name_of(config):
    return f"{config.block_m}x{config.block_n}"


# ---- Configurations


def test_chooser_over_random_shapes():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(10_000):
        m = rng.choice((rng.randint(1, 64), rng.randint(1, 10_000)))
        n, num_sms = 8 * rng.randint(1, 5000), rng.choice((1, 2, 8, 78, 132))
        config = gemm.choose_config(m, n, num_sms)
        assert (config.block_m, config.block_n) in gemm.TILES
        assert config.shared_bytes <= gemm.SHARED_MEMORY, (m, n, num_sms, config)
        assert 2 <= config.stages <= gemm.MAX_STAGES


def test_chooser_fills_the_gpu_and_then_takes_large_tiles():
    small = gemm.choose_config(16, 2112, 132)
    assert ceil_div(2112, small.block_n) >= 64 and small.block_m == 64
    large = gemm.choose_config(8192, 7168, 132)
    assert large.block_m * large.block_n >= 128 * 160


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_python_and_cuda_agree_on_the_layout(config):
    source = f"""
        #include "gemm.cuh"
        using L = dsv3::gemm::Layout<{config.block_m}, {config.block_n}, {config.stages}>;
        static_assert(sizeof(L::Shared) == {config.shared_bytes}, "shared memory");
        static_assert(L::kThreads == {config.threads}, "threads");
        static_assert(L::kPanel == {config.panel}, "panel");
        static_assert(L::kStageBytes == {gemm.stage_bytes(config.block_m, config.block_n)}, "stage");
    """
    jit.compile_ptx(source)


# ---- Machine code


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_machine_code(config):
    cubin = config.kernel.cubin()
    resources, sass = cubin.resources, disassemble(cubin.image)
    waves = config.block_m // gemm.WAVE // config.math_warpgroups
    assert sass.count(f"QGMMA.64x{config.block_n}x32.F32.E4M3.E4M3") == 4 * waves
    assert sass.local_memory == 0
    assert (resources.stack_bytes, resources.spill_store_bytes, resources.spill_load_bytes) == (0, 0, 0)
    # What a thread is launched with; setmaxnreg then gives the math warpgroups 232 and the producer 40.
    assert resources.registers <= 65536 // config.threads
    assert sass.registers <= (232 if config.math_warpgroups == 2 else 255)
    # One FMA an accumulator a wave: the promotion, and nothing beside it.
    promotions = config.block_n // 2 * waves
    assert promotions <= sass.count("FFMA") <= promotions + 8
    assert sass.count("UTMALDG") == 3 and sass.count("UTMASTG") >= 1


# ---- Results in the emulator


def operands(m, n, k, seed, ugly=False):
    """Quantised random operands. Ugly ones hold zeros, subnormals, huge tiles, NaN codes and NaN scales."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    if ugly:
        for t in (x, w):
            t *= 2.0 ** torch.randint(-20, 20, t.shape, generator=generator)
            t[torch.rand(t.shape, generator=generator) < 0.2] = 0
    a, b = dsv3.quantize_1x128(x.bfloat16()), dsv3.quantize_128x128(w.bfloat16())
    if ugly:
        codes = a.data.view(torch.uint8)
        codes[int(torch.randint(m, (1,), generator=generator)), -1] = 0x7F
        a.scales[0, 0] = torch.nan
    return a, b


def assert_same_bits(got, expected):
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    same = got.view(torch.int16) == expected.view(torch.int16)
    wrong = (~(same | nan)).nonzero()[:5].tolist()
    assert not wrong, [(i, j, got[i, j].item(), expected[i, j].item()) for i, j in wrong]


def check(config, m, n, k, seed, num_sms=2, ugly=False):
    a, b = operands(m, n, k, seed, ugly)
    out = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
    with emulator.virtual_gpu(num_sms=num_sms, seed=seed) as gpu:
        gemm._launch(config, a.data, a.scales, b.data, b.scales, out, num_sms)
    steps = ceil_div(k, 128) * 4 * ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    assert gpu.counters["wgmma"] == steps * (config.block_m // gemm.WAVE)
    assert_same_bits(out, reference.fp8_gemm(a, b, accumulation="hopper"))


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_one_tile_and_tails(config):
    """A full tile and, in both directions, a tail; K ends inside a scale's 128."""
    check(config, config.block_m + 1, config.block_n + 8, 272, seed=config.block_m + config.block_n)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 16), (16, 8, 128), (17, 136, 144), (63, 192, 512), (64, 24, 640), (65, 320, 32)]
)
def test_small_shapes_through_the_public_call(m, n, k):
    a, b = operands(m, n, k, seed=m)
    with emulator.virtual_gpu(num_sms=3, seed=m) as gpu:
        out = dsv3.fp8_gemm(a, b)
    assert gpu.counters["launches"] == 1 and gpu.counters["wgmma"] > 0
    assert_same_bits(out, reference.fp8_gemm(a, b, accumulation="hopper"))


@pytest.mark.parametrize("tile", [(64, 32), (128, 64), (128, 192), (256, 64)])
def test_ring_wraps_and_tiles_follow_each_other(tile):
    """One SM computes every tile: the ring's phase, the lazy drain of the stores, several strips."""
    config = gemm.config_of_tile(*tile)
    config = gemm.GemmConfig(*tile, stages=2 if tile[0] == 64 else config.stages, strip=2)
    check(config, tile[0] + 8, 2 * tile[1] + 8, 384, seed=5, num_sms=1)


@pytest.mark.parametrize("seed", range(3))
def test_ugly_values(seed):
    check(gemm.config_of_tile(128, 192), 40, 200, 256, seed, ugly=True)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_many_schedules(config, seed):
    check(
        config, config.block_m + 16, config.block_n + 8, 400, seed, num_sms=1 + seed % 4, ugly=seed % 2 == 1
    )


def test_nothing_to_do():
    a, b = operands(0, 16, 128, 0)
    with emulator.virtual_gpu() as gpu:
        assert dsv3.fp8_gemm(a, b).shape == (0, 16)
    assert gpu.counters["launches"] == 0


def test_scales_of_any_strides():
    a, b = operands(20, 40, 256, seed=9)
    expected = reference.fp8_gemm(a, b, accumulation="hopper")
    for scales in (a.scales.contiguous(), torch.stack([a.scales] * 2, -1)[..., 0]):
        with emulator.virtual_gpu(seed=1):
            assert_same_bits(dsv3.fp8_gemm((a.data, scales), b), expected)
