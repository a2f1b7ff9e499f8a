"""The quantiser's kernel, its PTX run by the emulator: bit for bit what the reference computes."""

import numpy as np
import pytest
import torch
from fp8_helpers import assert_same, commit_generator, each_dtype, powers, wide

import dsv3_kernels as dk
from dsv3_kernels import emulator, launch, quantize, reference


def on_kernel(x, power_of_2=False):
    with emulator.virtual_gpu():
        assert launch.world(x) == "emulator"
        return dk.quantize_1x128(x, power_of_2_scales=power_of_2)


@each_dtype
@powers
@pytest.mark.parametrize("shape", [(1, 16), (5, 128), (33, 272), (64, 400), (3, 40, 144), (2, 1, 128)])
def test_bit_exact(dtype, power_of_2, shape):
    generator = commit_generator()
    for x in (torch.randn(shape, generator=generator), wide(generator, *shape)):
        x = x.to(dtype)
        assert_same(on_kernel(x, power_of_2), reference.quantize_1x128(x, power_of_2_scales=power_of_2))


@each_dtype
@powers
def test_nan_infinity_and_zeros(dtype, power_of_2):
    x = torch.randn(40, 256, generator=commit_generator()).to(dtype)
    x[0, 5] = float("nan")
    x[1, 200] = float("inf")
    x[2, 0], x[2, 1] = float("-inf"), float("nan")
    x[3] = 0.0
    x[4] = -0.0
    x[5, :128] = 0.0
    q = on_kernel(x, power_of_2)
    assert_same(q, reference.quantize_1x128(x, power_of_2_scales=power_of_2))
    values = dk.dequantize(q)
    assert values[0, :128].isnan().all() and values[1, 128:].isnan().all() and values[2, :128].isnan().all()
    assert values[0, 128:].isfinite().all() and values[3:].isfinite().all()


@pytest.mark.parametrize("lift", [0, -110, -124, 100])
def test_quotients_next_to_a_border_between_codes(lift):
    """The kernel multiplies by a reciprocal and corrects; it must round as a division does.

    Each tile holds its amax, and products of its scale and a border between two codes, with neighbours.
    """
    generator = commit_generator()
    rows = 64
    amax = torch.ldexp(1 + torch.rand(rows, 1, generator=generator), torch.tensor(lift))
    scale = (amax / 448).clamp(min=2.0**-126)
    border = torch.randint(16, 32, (rows, 127), generator=generator).double()
    border = torch.ldexp(border, torch.randint(-13, 4, (rows, 127), generator=generator))
    product = (border * scale.double()).float().clamp(max=amax)
    steps = torch.randint(-2, 3, product.shape, generator=generator, dtype=torch.int32)
    product = (product.view(torch.int32) + steps).clamp(min=0).view(torch.float32).clamp(max=amax)
    sign = torch.randint(0, 2, product.shape, generator=generator) * 2 - 1
    x = torch.cat([amax, product * sign], 1).contiguous()
    assert_same(on_kernel(x), reference.quantize_1x128(x))


@pytest.mark.parametrize("bits", [7, pytest.param(10, marks=pytest.mark.long)], ids=["bf16", "fp16"])
def test_one_correction_is_enough_for_16_bits(bits):
    """Every significand of amax against every significand and exponent of x, in NumPy: the kernel's quotient
    is the nearest float. Exponents below amax's by more than 20 give codes of zero."""
    steps = np.arange(2**bits, dtype=np.float32) / np.float32(2**bits)
    x = ((1 + steps)[None] * np.exp2(-np.arange(21, dtype=np.float32))[:, None]).ravel()
    wide = np.longdouble  # holds products of two floats, and their sums here, exactly
    uncorrected = 0
    for amax in 1 + steps:
        scale = np.float32(amax / np.float32(448))
        r, smaller = np.float32(1) / scale, x[x <= amax]
        q = smaller * r
        residue = (q.astype(wide) * wide(scale) - smaller.astype(wide)).astype(np.float32)
        corrected = (q.astype(wide) - residue.astype(wide) * wide(r)).astype(np.float32)
        np.testing.assert_array_equal(corrected, smaller / scale)
        uncorrected += (q != smaller / scale).sum()
    assert uncorrected > 0


@each_dtype
def test_strided_rows_and_nothing_written_outside(dtype):
    """Straight to the kernel: any strides, outputs poisoned, guards around them, and any grid."""
    generator = commit_generator()
    batches, rows, width = 2, 37, 176
    backing = torch.randn(batches, rows + 3, width + 32, generator=generator).to(dtype)
    x = backing[:, :rows, 16 : 16 + width]
    want = reference.quantize_1x128(x.contiguous())
    for grid in (1, 2, 9):
        data = torch.full((batches * rows * width + 512,), 0x55, dtype=torch.uint8)
        scales = torch.full((batches, 2, 48), float("nan"))
        kernel = quantize.kernel_1x128(dtype, False)
        strides = (x.stride(0), x.stride(1), scales.stride(0), scales.stride(1))
        with emulator.virtual_gpu():
            arguments = (x, data[256:], scales, batches, rows, width, *strides)
            launch.launch(kernel, (grid, 1, 1), (quantize.THREADS, 1, 1), arguments)
        codes = data[256:-256].view(batches, rows, width)
        assert torch.equal(codes, want.data.view(torch.uint8))
        assert (data[:256] == 0x55).all() and (data[-256:] == 0x55).all()
        assert torch.equal(scales[:, :, :rows].mT, want.scales)
        assert scales[:, :, rows:].isnan().all()


def test_empty_tensors_launch_nothing():
    for shape in ((0, 128), (4, 0), (0, 4, 128), (2, 0, 16)):
        assert_same(on_kernel(torch.zeros(shape)), reference.quantize_1x128(torch.zeros(shape)))


def test_too_many_tiles_are_refused(monkeypatch):
    monkeypatch.setattr(quantize, "MAX_TASKS", 3)
    on_kernel(torch.zeros(32, 384))
    with pytest.raises(
        ValueError, match=r"x of shape \(33, 384\) has 6 blocks of 32x128, expected at most 3"
    ):
        on_kernel(torch.zeros(33, 384))


def test_the_launch_constants_are_those_of_the_kernel():
    text = (dk.jit.kernel_dir() / "quantize.cuh").read_text()
    for line in (
        f"constexpr u32 kThreads = {quantize.THREADS};",
        f"constexpr u32 kRowsPerWarp = {quantize.ROWS_PER_WARP};",
    ):
        assert line in text
