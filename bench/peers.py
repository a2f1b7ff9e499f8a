"""What else computes an FP8 GEMM with 1x128 and 128x128 scales, or the same product in BF16, on this machine.

Each function returns a call, or raises where the peer is missing or refuses the shape. What a peer wants laid
out differently is laid out before, outside the time that is measured.
"""

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.cases import Call
from dsv3_kernels.checks import ceil_div, round_up
from dsv3_kernels.quantized import TILE


def packed_mn_major(scales: Tensor) -> Tensor:
    """Scales `[M, K/128]` with strides (1, M)."""
    return scales.t().contiguous().t()


def cublaslt(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Call:
    """cuBLASLt's block scaling through torch: CUDA 12.9 on, Hopper only."""
    a_scales = packed_mn_major(a_scales)
    blocks = b_scales.shape[1]
    padded = torch.zeros(b_scales.shape[0], round_up(blocks, 4), device=b.device)
    padded[:, :blocks] = b_scales

    def public() -> Tensor:
        from torch.nn.functional import ScalingType, scaled_mm

        one, square = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        return scaled_mm(a, b.t(), a_scales, one, padded.t(), square, output_dtype=torch.bfloat16)

    def private() -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=a_scales, scale_b=b_scales.t(), out_dtype=torch.bfloat16)

    return _first_that_runs(public, private)


def cublaslt_rows(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Call:
    """The same with 1x128 scales on both sides, as the weight gradient has them, to FP32."""
    a_scales, b_scales = packed_mn_major(a_scales), packed_mn_major(b_scales)

    def public() -> Tensor:
        from torch.nn.functional import ScalingType, scaled_mm

        one = ScalingType.BlockWise1x128
        return scaled_mm(a, b.t(), a_scales, one, b_scales.t(), one, output_dtype=torch.float32)

    def private() -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=a_scales, scale_b=b_scales.t(), out_dtype=torch.float32)

    return _first_that_runs(public, private)


def _first_that_runs(*calls: Call) -> Call:
    refusals = []
    for call in calls:
        try:
            call()
            torch.cuda.synchronize()
            return call
        except (RuntimeError, ValueError, ImportError, AttributeError) as error:
            refusals.append(str(error).splitlines()[0])
    raise RuntimeError("; ".join(refusals))


def bf16(a: Tensor, b: Tensor) -> Call:
    x, w = a.to(torch.bfloat16), b.to(torch.bfloat16).mT
    return lambda: torch.matmul(x, w)


def bf16_grouped(a: Tensor, b: Tensor, ends: Tensor) -> Call:
    """ends: int32 `[G]`, where each group's rows end."""
    x, w = a.to(torch.bfloat16), b.to(torch.bfloat16).mT
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return lambda: grouped_mm(x, w, offs=ends)


def bf16_k_grouped(a: Tensor, b: Tensor, ends: Tensor) -> Call:
    """`[G, M, N]` from a `[M, K]` and b `[N, K]`; ends: int32 `[G]`, where each group's columns end."""
    x, w = a.to(torch.bfloat16), b.to(torch.bfloat16).mT
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return lambda: grouped_mm(x, w, offs=ends)


def triton_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Call:
    triton = importlib.import_module("bench.triton_gemm")  # the CPU build of torch brings no Triton
    return lambda: triton.fp8_gemm(a, a_scales, b, b_scales)


def _deep_gemm(name: str):
    module = importlib.import_module("deep_gemm")
    function = getattr(module, name, None)
    if function is None:
        raise AttributeError(f"deep_gemm {getattr(module, '__version__', '')} has no {name}")
    return function


def deep_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Call:
    function = _deep_gemm("fp8_gemm_nt")
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)

    def call() -> Tensor:
        function((a, a_scales), (b, b_scales), out)
        return out

    return call


def deep_gemm_rows(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Call:
    """1x128 scales on both sides, to FP32."""
    function = _deep_gemm("fp8_gemm_nt")
    out = torch.zeros(a.shape[0], b.shape[0], device=a.device)

    def call() -> Tensor:
        function((a, a_scales), (b, b_scales), out, recipe=(1, 1, 128))
        return out

    return call


def deep_gemm_grouped(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, sizes: Sequence[int]) -> Call:
    """It wants groups of whole tiles of 128 rows; others are refused rather than padded in its disfavour."""
    function = _deep_gemm("m_grouped_fp8_gemm_nt_contiguous")
    if any(size % TILE for size in sizes):
        raise ValueError("groups that are no multiples of 128 rows need padding there")
    rows = torch.tensor(sizes, device=a.device)
    group_of_row = torch.arange(len(sizes), device=a.device).repeat_interleave(rows).int()
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16, device=a.device)

    def call() -> Tensor:
        function((a, a_scales), (b, b_scales), out, group_of_row)
        return out

    return call


def deep_gemm_masked(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, counts: Tensor) -> Call:
    function = _deep_gemm("m_grouped_fp8_gemm_nt_masked")
    out = torch.empty(*a.shape[:2], b.shape[1], dtype=torch.bfloat16, device=a.device)
    expected = ceil_div(int(counts.sum()), counts.numel())

    def call() -> Tensor:
        function((a, a_scales), (b, b_scales), out, counts, expected)
        return out

    return call
