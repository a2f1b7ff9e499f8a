"""Routing on the CPU against the same without groups; with --gpu the kernel against torch."""

import sys

import pytest
import torch

import dsv3_kernels as dk
from bench import gpu_bench
from bench.cases.gate import V3


@pytest.mark.parametrize("tokens", [1024, 128])
def test_route(against, tokens):
    scores, bias = torch.rand(tokens, 256), torch.randn(256) * 0.1

    def peer():
        chosen = (scores + bias).topk(8).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * 2.5

    against(f"route {tokens} tokens", lambda: dk.route(scores, bias, **V3), "topk without groups", peer)


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        sys.exit(gpu_bench.script("gate"))
    sys.exit(pytest.main([__file__, "--benchmark-only", *sys.argv[1:]]))
