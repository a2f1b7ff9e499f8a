"""Quantisers of the CPU backend against PyTorch's bare cast to FP8 (no scales, no transpose), and back.

With --gpu: the kernels (see gpu_bench.py).
"""

import sys

import pytest
import torch

import dsv3_kernels as dk
from bench import gpu_bench

CAST = "x.to(float8_e4m3fn)"
SHAPES = [(1024, 1024), (512, 256)]
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def quantizer(against, op, dtype, shape):
    x = torch.randn(shape).to(dtype)
    name = f"{op.__name__} {str(dtype)[6:]} {shape[0]}x{shape[1]}"
    against(name, lambda: op(x), CAST, lambda: x.to(torch.float8_e4m3fn))


@both_types
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_1x128(against, dtype, shape):
    quantizer(against, dk.quantize_1x128, dtype, shape)


@both_types
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_1x128_t(against, dtype, shape):
    quantizer(against, dk.quantize_1x128_t, dtype, shape)


@both_types
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_1x128_both(against, dtype, shape):
    x = torch.randn(shape).to(dtype)
    name = f"quantize_1x128 both orientations {str(dtype)[6:]} {shape[0]}x{shape[1]}"
    twice = "x.to(float8_e4m3fn), and transposed"
    against(
        name,
        lambda: dk.quantize_1x128(x, transpose=True),
        twice,
        lambda: (x.to(torch.float8_e4m3fn), x.t().to(torch.float8_e4m3fn).contiguous()),
    )


@both_types
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_128x128(against, dtype, shape):
    quantizer(against, dk.quantize_128x128, dtype, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_requantize_1x128_t(against, shape):
    q = dk.quantize_1x128(torch.randn(shape), power_of_2_scales=True)
    name = f"requantize_1x128_t {shape[0]}x{shape[1]}"
    op = dk.requantize_1x128_t
    against(
        name, lambda: op(q, power_of_2_scales=True), "q.data.t(), copied", lambda: q.data.t().contiguous()
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize(against, shape):
    q = dk.quantize_1x128(torch.randn(shape))
    against(
        f"dequantize {shape[0]}x{shape[1]}",
        lambda: dk.dequantize(q),
        "q.data.float()",
        lambda: q.data.float(),
    )


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        sys.exit(gpu_bench.script("quantize"))
    sys.exit(pytest.main([__file__, "--benchmark-only", *sys.argv[1:]]))
