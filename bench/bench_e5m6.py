"""E5M6 on the CPU against PyTorch's cast to float16 and back; with --gpu the kernels against their peers."""

import sys

import pytest
import torch

import dsv3_kernels as dk
from bench import gpu_bench

SHAPES = [(1024, 1024), (512, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_e5m6(against, shape):
    x = torch.randn(shape).bfloat16()
    against(f"pack_e5m6 {shape[0]}x{shape[1]}", lambda: dk.pack_e5m6(x), "x.half()", x.half)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_e5m6(against, shape):
    packed, x = dk.pack_e5m6(torch.randn(shape)), torch.randn(shape).half()
    name = f"unpack_e5m6 {shape[0]}x{shape[1]}"
    against(name, lambda: dk.unpack_e5m6(packed), "x.bfloat16()", x.bfloat16)


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        sys.exit(gpu_bench.script("e5m6"))
    sys.exit(pytest.main([__file__, "--benchmark-only", *sys.argv[1:]]))
