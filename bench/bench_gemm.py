"""GEMMs of the CPU backend against torch.mm in FP32. To reach: 0.4 of its speed at 1024x1024x1024."""

import sys

import pytest
import torch

import dsv3_kernels as dk

PEER = "torch.mm float32"


@pytest.mark.parametrize("m, n, k", [(1024, 1024, 1024), (512, 256, 256), (64, 64, 128), (512, 2112, 7168)])
def test_fp8_gemm(against, m, n, k):
    x, w = torch.randn(m, k), torch.randn(n, k)
    a, b = dk.quantize_1x128(x), dk.quantize_128x128(w)
    against(f"fp8_gemm {m}x{n}x{k}", lambda: dk.fp8_gemm(a, b), PEER, lambda: torch.mm(x, w.t()))


@pytest.mark.parametrize("groups, m, n, k", [(8, 1024, 256, 256), (4, 1024, 1024, 1024)])
def test_grouped_fp8_gemm(against, groups, m, n, k):
    x, w = torch.randn(m, k), torch.randn(groups, n, k)
    offsets = torch.arange(groups + 1, dtype=torch.int32) * (m // groups)
    a, b = dk.quantize_1x128(x), dk.quantize_128x128(w)

    def peer():
        return [torch.mm(rows, weight.t()) for rows, weight in zip(x.chunk(groups), w, strict=True)]

    name = f"grouped_fp8_gemm {groups} groups {m}x{n}x{k}"
    against(name, lambda: dk.grouped_fp8_gemm(a, b, offsets), PEER, peer)


@pytest.mark.parametrize("tokens, n, k", [(1024, 1024, 1024), (512, 256, 256)])
def test_fp8_wgrad(against, tokens, n, k):
    dy, x, out = torch.randn(tokens, n), torch.randn(tokens, k), torch.zeros(n, k)
    dy_t, x_t = dk.quantize_1x128_t(dy), dk.quantize_1x128_t(x)
    name = f"fp8_wgrad {tokens} tokens {n}x{k}, accumulating"
    against(name, lambda: dk.fp8_wgrad(dy_t, x_t, out, accumulate=True), PEER, lambda: torch.mm(dy.t(), x))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "--benchmark-only", *sys.argv[1:]]))
