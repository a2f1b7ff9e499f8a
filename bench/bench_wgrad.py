"""The weight gradient on the CPU against torch.mm in FP32; with --gpu the kernel against its peers."""

import sys

import pytest
import torch

import dsv3_kernels as dk
from bench import gpu_bench

PEER = "torch.mm float32"


@pytest.mark.parametrize("tokens, n, k", [(1024, 1024, 1024), (512, 256, 256), (4096, 512, 1024)])
def test_fp8_wgrad(against, tokens, n, k):
    dy, x, out = torch.randn(tokens, n), torch.randn(tokens, k), torch.zeros(n, k)
    dy_t, x_t = dk.quantize_1x128_t(dy), dk.quantize_1x128_t(x)
    name = f"fp8_wgrad {tokens} tokens {n}x{k}, accumulating"
    against(name, lambda: dk.fp8_wgrad(dy_t, x_t, out, accumulate=True), PEER, lambda: torch.mm(dy.t(), x))


@pytest.mark.parametrize("groups, tokens, n, k", [(4, 1024, 512, 512), (8, 4096, 256, 256)])
def test_grouped_fp8_wgrad(against, groups, tokens, n, k):
    dy, x = torch.randn(tokens, n), torch.randn(tokens, k)
    offsets = torch.arange(groups + 1, dtype=torch.int32) * (tokens // groups)
    dy_t, x_t = dk.quantize_1x128_t(dy, offsets), dk.quantize_1x128_t(x, offsets)
    out = torch.zeros(groups, n, k)

    def peer():
        return [torch.mm(a.t(), b) for a, b in zip(dy.chunk(groups), x.chunk(groups), strict=True)]

    name = f"fp8_wgrad {groups} groups, {tokens} tokens {n}x{k}"
    against(name, lambda: dk.fp8_wgrad(dy_t, x_t, out, group_offsets=offsets), PEER, peer)


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        sys.exit(gpu_bench.script("wgrad"))
    sys.exit(pytest.main([__file__, "--benchmark-only", *sys.argv[1:]]))
