"""The weight gradient: tails, groups and accumulation bit by bit; speed on the shapes of DeepSeek-V3."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import quantized, reference, wgrad
from dsv3_kernels.checks import ceil_div
from dsv3_kernels.quantized import ROW, TILE, QuantizedTensor

from .. import peers
from . import Candidates, Case, Tensors, Workload

# ---- Bit by bit


def _case(n: int, k: int, *sizes: int, grouped: bool, accumulate: bool) -> Case:
    """Quantised where it runs: fresh operands, and a gradient that is there already."""

    def inputs(generator: torch.Generator) -> Tensors:
        dy, x = (torch.randn(sum(sizes), width, generator=generator) for width in (n, k))
        offsets = torch.tensor([0, *sizes]).cumsum(0).int()
        operands = (reference.quantize_1x128_t(t, offsets if grouped else None) for t in (dy, x))
        before = torch.randn(*([len(sizes)] if grouped else []), n, k, generator=generator)
        return (*(part for q in operands for part in (q.data, q.scales)), before, offsets)

    def run(dy: Tensor, dy_scales: Tensor, x: Tensor, x_scales: Tensor, *rest: Tensor) -> Tensors:
        before, offsets = rest
        out = before.clone()
        dk.fp8_wgrad((dy, dy_scales), (x, x_scales), out, accumulate, offsets if grouped else None)
        return (out,)

    def expected(dy: Tensor, dy_scales: Tensor, x: Tensor, x_scales: Tensor, *rest: Tensor) -> Tensors:
        before, offsets = rest
        operands = QuantizedTensor(dy, dy_scales, ROW), QuantizedTensor(x, x_scales, ROW)
        groups = offsets if grouped else None
        return (reference.fp8_wgrad(*operands, before.clone(), accumulate, groups, accumulation="hopper"),)

    name = f"fp8_wgrad {'+'.join(map(str, sizes))} tokens, {n}x{k}"
    return Case(name + (", adding" if accumulate else ""), inputs, run, expected)


CASES = [
    *(
        _case(n, k, 130, grouped=False, accumulate=add)
        for n, k in ((8, 16), (136, 200))
        for add in (False, True)
    ),
    *(_case(136, 72, 0, 128, 1, 300, 0, grouped=True, accumulate=add) for add in (False, True)),
    *(_case(72, width + 8, 40, grouped=False, accumulate=True) for width in wgrad.BLOCK_N),
    _case(24, 40, 0, 0, grouped=True, accumulate=False),
]

# ---- Speed

_SHAPES = ((7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168))
_GROUPED_SHAPES = ((4096, 7168), (7168, 2048))


def _operand(width: int, tokens: int) -> tuple[Tensor, Tensor]:
    data = (torch.randn(width, tokens, device="cuda") * 32).to(torch.float8_e4m3fn)
    scales = quantized.empty_mn_major((width, tokens // TILE), data.device)
    return data, scales.uniform_(1e-3, 1e-2)


def _least_bytes(tokens: int, n: int, k: int, gradients: int, accumulate: bool) -> int:
    """Operands and scales read once, the gradients written once, and read once if they are added to."""
    operands = tokens * (n + k) + 4 * ceil_div(tokens, TILE) * (n + k)
    return operands + gradients * 4 * n * k * (2 if accumulate else 1)


def _dense_row(tokens: int, n: int, k: int, accumulate: bool = False) -> Workload:
    def build() -> Candidates:
        dy, x = _operand(n, tokens), _operand(k, tokens)
        out = torch.zeros(n, k, device="cuda")
        beside = {
            "cuBLASLt": lambda: peers.cublaslt_rows(*dy, *x),
            "BF16": lambda: peers.bf16(dy[0], x[0]),
            "DeepGEMM": lambda: peers.deep_gemm_rows(*dy, *x),
        }
        ours = functools.partial(dk.fp8_wgrad, dy, x, out, accumulate)
        return Candidates(ours, {} if accumulate else beside)

    name = f"{n}x{k}, {tokens} tokens" + (", adding" if accumulate else "")
    least = _least_bytes(tokens, n, k, 1, accumulate)
    return Workload("wgrad", name, 2 * tokens * n * k, least, build)


def _grouped_row(name: str, sizes: Sequence[int], n: int, k: int, accumulate: bool = False) -> Workload:
    tokens, groups = sum(sizes), len(sizes)

    def build() -> Candidates:
        columns = quantized.padded_tokens(tokens, groups)
        dy, x = _operand(n, columns), _operand(k, columns)
        offsets = torch.tensor([0, *sizes]).cumsum(0).int().cuda()
        out = torch.zeros(groups, n, k, device="cuda")
        ours = functools.partial(dk.fp8_wgrad, dy, x, out, accumulate, offsets)
        if accumulate or any(size % TILE for size in sizes):
            return Candidates(ours)
        return Candidates(ours, {"BF16": lambda: peers.bf16_k_grouped(dy[0], x[0], offsets[1:].contiguous())})

    least = _least_bytes(tokens, n, k, groups, accumulate)
    name = f"{name} {n}x{k}" + (", adding" if accumulate else "")
    return Workload("wgrad grouped", name, 2 * tokens * n * k, least, build)


WORKLOADS = [
    *(_dense_row(tokens, n, k) for tokens in (4096, 8192) for n, k in _SHAPES),
    *(_dense_row(4096, n, k, accumulate=True) for n, k in _SHAPES[:2]),
    *(
        _grouped_row(f"{groups}x4096", [4096] * groups, n, k, accumulate)
        for groups in (4, 8)
        for n, k in _GROUPED_SHAPES
        for accumulate in (False, True)
    ),
]
