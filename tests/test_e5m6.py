"""E5M6: codes against an encoder that enumerates them, kernels in the emulator against the reference."""

import numpy as np
import pytest
import torch
from fp8_helpers import commit_generator, each_dtype, wide

import dsv3_kernels as dk
from dsv3_kernels import e5m6, emulator, reference
from dsv3_kernels.jit.compile import compile_source, source_options

# Every magnitude below infinity, in the order of the codes.
MAGNITUDES = np.array(
    [(f if e == 0 else 64 + f) * 2.0 ** (max(e, 1) - 15 - 6) for e in range(31) for f in range(64)]
)
MIDPOINTS = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2


def encode(x):
    magnitude = np.abs(x)
    below = np.searchsorted(MIDPOINTS, magnitude, side="left")
    tie = np.isin(magnitude, MIDPOINTS) & (below % 2 == 1)
    return np.where(np.isnan(x), 0x7FF, below + tie) + np.signbit(x) * 0x800


def codes_of(data):
    three = data.numpy().astype(np.int64).reshape(data.shape[0], data.shape[1] // 3, 3)
    joined = three[..., 0] + three[..., 1] * 256 + three[..., 2] * 65536
    return np.stack([joined % 4096, joined // 4096], -1).reshape(data.shape[0], data.shape[1] // 3 * 2)


def assert_same(got, want):
    assert torch.equal(got.scales.nan_to_num(-1), want.scales.nan_to_num(-1))
    np.testing.assert_array_equal(codes_of(got.data), codes_of(want.data))


def check(x, **gpu):
    """The kernels in both directions."""
    with emulator.virtual_gpu(**gpu):
        packed = dk.pack_e5m6(x)
        values = {dtype: dk.unpack_e5m6(packed, dtype) for dtype in (torch.bfloat16, torch.float32)}
    want = dk.PackedE5M6(*reference.pack_e5m6(x))
    assert_same(packed, want)
    for dtype, got in values.items():
        expected = reference.unpack_e5m6(*want, dtype)
        assert got.dtype == dtype and torch.equal(got.nan_to_num(-7), expected.nan_to_num(-7))
    return values[torch.float32]


def test_every_code_border_and_tie():
    """Scale 1 (each tile holds 65024): every code, every midpoint, and their neighbours, both signs."""
    points = np.concatenate([MAGNITUDES, MIDPOINTS]).astype(np.float32)
    infinity = np.float32(np.inf)
    points = np.concatenate([points, np.nextafter(points, infinity), np.nextafter(points, -infinity)])
    points = points[np.abs(points) <= 65024]
    points = np.concatenate([points, -points, np.float32([2.0**-149, -(2.0**-21), 2.0**-21, -0.0])])
    rows = np.zeros((-(-len(points) // 127), 128), np.float32)
    rows[:, 0] = 65024
    rows[:, 1:].flat[: len(points)] = points
    packed = dk.pack_e5m6(torch.from_numpy(rows))
    assert (packed.scales == 1).all()
    np.testing.assert_array_equal(codes_of(packed.data), encode(rows.astype(np.float64)))
    check(torch.from_numpy(rows))


@each_dtype
def test_scales_and_error(dtype):
    generator = commit_generator()
    x = torch.randn(40, 256, generator=generator) * torch.exp2(torch.randn(40, 1, generator=generator) * 3)
    x = x.to(dtype)
    packed = dk.pack_e5m6(x)
    amax = x.float().view(40, 2, 128).abs().amax(-1).double()
    assert torch.equal(packed.scales.double(), torch.exp2(torch.ceil(torch.log2(amax / 65024))))
    values = dk.unpack_e5m6(packed, torch.float32).double()
    smallest = packed.scales.double().repeat_interleave(128, 1) * 2.0**-21
    assert ((values - x.double()).abs() <= torch.maximum(x.double().abs() * 2.0**-7, smallest)).all()
    assert torch.equal(dk.unpack_e5m6(packed).double(), values), "BF16 holds it exactly"
    again = dk.pack_e5m6(values.float())
    assert torch.equal(dk.unpack_e5m6(again, torch.float32).double(), values)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 128), (3, 384), (40, 256), (70, 128)])
def test_kernels(dtype, shape):
    generator = commit_generator()
    check(torch.randn(shape, generator=generator).to(dtype))
    check(wide(generator, *shape).to(dtype))


@each_dtype
def test_nan_infinity_and_zeros(dtype):
    x = torch.randn(16, 256, generator=commit_generator()).to(dtype)
    x[0, 5], x[1, 200], x[2, 0], x[3] = float("nan"), float("inf"), float("-inf"), 0.0
    values = check(x)
    assert values[0, :128].isnan().all() and values[1, 128:].isnan().all() and values[2, :128].isnan().all()
    assert values[0, 128:].isfinite().all() and values[3:].isfinite().all() and not values[3].any()


def test_empty():
    for shape in ((0, 128), (5, 0)):
        check(torch.zeros(shape))


@each_dtype
def test_each_byte_moves_once_and_without_bank_conflicts(dtype):
    x = torch.randn(33, 256, generator=commit_generator()).to(dtype)
    packed_bytes = x.numel() * 3 // 2 + x.numel() // 128 * 4
    with emulator.virtual_gpu(checks=False) as gpu:
        packed = dk.pack_e5m6(x)
    assert gpu.counters["global_bytes_read"] == x.nbytes
    assert gpu.counters["global_bytes_written"] == packed_bytes
    assert gpu.counters["bank_conflicts"] == 0
    with emulator.virtual_gpu(checks=False) as gpu:
        values = dk.unpack_e5m6(packed)
    assert gpu.counters["global_bytes_read"] == packed_bytes
    assert gpu.counters["global_bytes_written"] == values.nbytes
    assert gpu.counters["bank_conflicts"] == 0


def test_blocks_take_more_than_one_turn(monkeypatch):
    monkeypatch.setattr(e5m6, "MAX_GRID", 1)
    check(torch.randn(150, 128, generator=commit_generator()))


def test_the_launch_constants_are_those_of_the_kernel():
    compile_source(
        f"""
        #include "e5m6.cuh"
        static_assert(dsv3::e5m6::kThreads == {e5m6.THREADS});
        static_assert(dsv3::e5m6::kTilesPerWarp == {e5m6.TILES_PER_WARP});
        """,
        (),
        source_options(),
    )
