"""One launch of the dense FP8 GEMM on random operands, for tests of what a run shows."""

import dataclasses

import torch

import dsv3_kernels as dsv3
from dsv3_kernels import emulator, gemm


def run_gemm(m, n, k, *, tile=(128, 128), stages=None, blocks=1, lineinfo=False, **options):
    """Returns the GPU, with as many SMs as blocks, and the configuration."""
    a, b = dsv3.quantize_1x128(torch.randn(m, k)), dsv3.quantize_128x128(torch.randn(n, k))
    config = gemm.config_of_tile(*tile)
    if stages is not None:
        config = dataclasses.replace(config, stages=stages)
    out = torch.empty(m, n, dtype=torch.bfloat16)
    ptx = config.kernel.ptx(lineinfo=lineinfo)
    gpu = emulator.VirtualGPU(num_sms=blocks, **options)
    gpu.launch(
        ptx.text,
        ptx.name,
        grid=(blocks, 1, 1),
        block=(config.threads, 1, 1),
        args=gemm.arguments(config, a.data, a.scales, b.data, b.scales, out),
        shared_bytes=config.shared_bytes,
    )
    return gpu, config
