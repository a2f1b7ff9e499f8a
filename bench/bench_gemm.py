"""GEMMs of the CPU backend against torch.mm in FP32. To reach: 0.4 of its speed at 1024x1024x1024.

With --gpu: the kernels against their peers (see gpu_bench.py).
"""

import sys

import pytest
import torch

import dsv3_kernels as dk
from bench import gpu_bench

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


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        sys.exit(gpu_bench.script("gemm"))
    sys.exit(pytest.main([__file__, "--benchmark-only", *sys.argv[1:]]))
