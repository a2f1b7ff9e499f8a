"""A linear layer's training step in FP8 on the CPU against the same in BF16; with --gpu on the GPU."""

import sys

import pytest
import torch

from bench import gpu_bench
from bench.cases.linear import step
from dsv3_kernels.nn import BF16, Fp8Linear


@pytest.mark.parametrize("tokens, n, k", [(512, 512, 512), (1024, 1024, 1024)])
def test_linear_step(against, tokens, n, k):
    x = torch.randn(tokens, k).bfloat16().requires_grad_()
    dy = torch.randn(tokens, n).bfloat16()
    ours = Fp8Linear(k, n, dtype=torch.bfloat16)
    peer = Fp8Linear(k, n, dtype=torch.bfloat16, recipe=BF16)
    against(
        f"linear step {tokens} tokens {n}x{k}",
        lambda: step(ours, x, dy, ours.weight),
        "BF16",
        lambda: step(peer, x, dy, peer.weight),
    )


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        sys.exit(gpu_bench.script("linear"))
    sys.exit(pytest.main([__file__, "--benchmark-only", *sys.argv[1:]]))
