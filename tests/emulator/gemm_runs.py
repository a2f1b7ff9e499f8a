"""One launch of the dense FP8 GEMM on random operands, for tests of what a run shows."""

import dataclasses

import torch

import dsv3_kernels as dsv3
from dsv3_kernels import emulator, gemm


def run_gemm(m, n, k, *, tile=(128, 128), stages=None, blocks=1, **options):
    """Returns the GPU, with as many SMs as blocks, and the configuration."""
    a, b = dsv3.quantize_1x128(torch.randn(m, k)), dsv3.quantize_128x128(torch.randn(n, k))
    config = gemm.config_of_tile(*tile)
    if stages is not None:
        config = dataclasses.replace(config, stages=stages)
    out = torch.empty(m, n, dtype=torch.bfloat16)
    with emulator.virtual_gpu(num_sms=blocks, **options) as gpu:
        launch = gemm.prepare(config, m, k, n, 1, blocks)
        launch(*gemm.operands(a.data, a.scales, b.data, b.scales, out, None))
    return gpu, config
