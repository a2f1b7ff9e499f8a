"""Permuting and unpermuting on the CPU against index_select; with --gpu the kernels against their peers."""

import sys

import pytest
import torch

import dsv3_kernels as dk
from bench import gpu_bench

SHAPES = [(1024, 1024), (512, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_permute_quantize(against, shape):
    x, index = torch.randn(shape).bfloat16(), torch.randperm(shape[0]).int()
    name = f"permute_quantize {shape[0]}x{shape[1]}"
    peer = "x[index], cast"
    against(
        name,
        lambda: dk.permute_quantize(x, index),
        peer,
        lambda: x.index_select(0, index).to(torch.float8_e4m3fn),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpermute(against, shape):
    rows, slots = torch.randn(shape).bfloat16(), torch.randperm(shape[0]).int().view(-1, 8)
    weights = torch.rand(slots.shape)

    def peer():
        picked = rows.index_select(0, slots.flatten()).view(*slots.shape, -1)
        return (picked * weights.unsqueeze(-1)).sum(1).bfloat16()

    name = f"unpermute {slots.shape[0]} tokens of 8, {shape[1]} wide"
    against(name, lambda: dk.unpermute(rows, slots, weights), "rows[slots] * weights, summed", peer)


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        sys.exit(gpu_bench.script("permute"))
    sys.exit(pytest.main([__file__, "--benchmark-only", *sys.argv[1:]]))
