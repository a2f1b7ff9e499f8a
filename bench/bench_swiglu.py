"""SwiGLU with its quantisers on the CPU against PyTorch's SwiGLU, cast; with --gpu the kernels."""

import sys

import pytest
import torch
import torch.nn.functional as F

import dsv3_kernels as dk
from bench import gpu_bench

SHAPES = [(1024, 1024), (512, 256)]


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_quantize(against, shape):
    x = torch.randn(shape[0], 2 * shape[1]).bfloat16()
    name = f"swiglu_quantize {shape[0]}x{shape[1]}"
    peer = "silu(gate)*up, cast"
    against(name, lambda: dk.swiglu_quantize(x), peer, lambda: swiglu(x).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_backward_quantize(against, shape):
    x = torch.randn(shape[0], 2 * shape[1])
    dy, x_q = torch.randn(shape).bfloat16(), dk.quantize_1x128(x)
    leaf = x.bfloat16().requires_grad_()

    def peer():
        (dx,) = torch.autograd.grad(swiglu(leaf), leaf, dy)
        return dx.to(torch.float8_e4m3fn), dx.t().to(torch.float8_e4m3fn).contiguous()

    name = f"swiglu_backward_quantize {shape[0]}x{shape[1]}"
    against(name, lambda: dk.swiglu_backward_quantize(dy, x_q), "autograd in BF16, cast both ways", peer)


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        sys.exit(gpu_bench.script("swiglu"))
    sys.exit(pytest.main([__file__, "--benchmark-only", *sys.argv[1:]]))
