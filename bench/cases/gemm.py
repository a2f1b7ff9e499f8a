"""The forward GEMMs: every tail and grouping bit by bit; speed on the shapes of DeepSeek-V3."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import quantized, reference
from dsv3_kernels.checks import ceil_div
from dsv3_kernels.quantized import ROW, SQUARE, QuantizedTensor

from .. import peers
from . import Call, Candidates, Case, Tensors, Workload

# ---- Bit by bit


def _codes(generator: torch.Generator, *shape: int) -> Tensor:
    """Codes of every exponent, NaN but rarely."""
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    often = torch.rand(shape, generator=generator) > 1e-5
    return torch.where(often & (codes & 0x7F == 0x7F), codes ^ 1, codes).view(torch.float8_e4m3fn)


def _operands(generator: torch.Generator, a: Sequence[int], b: Sequence[int]) -> Tensors:
    a_scales = quantized.empty_mn_major(quantized.scales_shape(torch.Size(a), ROW), torch.device("cpu"))
    a_scales.copy_(torch.rand(a_scales.shape, generator=generator) + 0.5)
    b_scales = torch.rand(quantized.scales_shape(torch.Size(b), SQUARE), generator=generator) + 0.5
    return _codes(generator, *a), a_scales, _codes(generator, *b), b_scales


def _case(
    name: str,
    op: str,
    a: Sequence[int],
    b: Sequence[int],
    groups: Tensor | None,
    written: Callable[[Tensor], Tensor],
) -> Case:
    extra = () if groups is None else (groups,)

    def inputs(generator: torch.Generator) -> Tensors:
        return (*_operands(generator, a, b), *extra)

    def run(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, *groups: Tensor) -> Tensors:
        return (written(getattr(dk, op)((a, a_scales), (b, b_scales), *groups)),)

    def expected(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, *groups: Tensor) -> Tensors:
        operands = QuantizedTensor(a, a_scales, ROW), QuantizedTensor(b, b_scales, SQUARE)
        return (written(getattr(reference, op)(*operands, *groups, accumulation="hopper")),)

    return Case(f"{op} {name}", inputs, run, expected)


def _dense(m: int, n: int, k: int) -> Case:
    return _case(f"{m}x{n}x{k}", "fp8_gemm", (m, k), (n, k), None, lambda out: out)


def _grouped(*sizes: int, n: int, k: int, left_over: int = 0) -> Case:
    rows, offsets = sum(sizes), torch.tensor([0, *sizes]).cumsum(0).int()
    name = f"{'+'.join(map(str, sizes))} rows, {n}x{k}"
    a, b = (rows + left_over, k), (len(sizes), n, k)
    return _case(name, "grouped_fp8_gemm", a, b, offsets, lambda out: out[:rows])


def _masked(max_m: int, *counts: int, n: int, k: int) -> Case:
    def written(out: Tensor) -> Tensor:
        return torch.cat([out[g, :count] for g, count in enumerate(counts)])

    name = f"{'+'.join(map(str, counts))} of {max_m} rows, {n}x{k}"
    a, b = (len(counts), max_m, k), (len(counts), n, k)
    return _case(name, "masked_grouped_fp8_gemm", a, b, torch.tensor(counts, dtype=torch.int32), written)


CASES = [
    *(_dense(1, 8, 16), _dense(17, 136, 144), _dense(65, 320, 272), _dense(200, 392, 400)),
    *(_dense(256, 256, 512), _dense(130, 2112, 128)),
    _grouped(0, 1, 5, 64, 130, 0, 7, n=136, k=272, left_over=3),
    _grouped(0, 0, 0, n=64, k=128, left_over=2),
    _masked(72, 0, 72, 1, 33, n=200, k=144),
]

# ---- Speed

_SHAPES = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
_GROUPED_SHAPES = ((4096, 7168), (7168, 2048))


def _random(*shape: int) -> Tensor:
    return (torch.randn(shape, device="cuda") * 32).to(torch.float8_e4m3fn)


def _random_operands(a: Sequence[int], b: Sequence[int]) -> Tensors:
    a_scales = quantized.empty_mn_major(quantized.scales_shape(torch.Size(a), ROW), torch.device("cuda"))
    b_scales = torch.rand(quantized.scales_shape(torch.Size(b), SQUARE), device="cuda") * 1e-2
    return _random(*a), a_scales.uniform_(1e-3, 1e-2), _random(*b), b_scales


def _ours(op: str, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, *groups: Tensor) -> Call:
    operands = QuantizedTensor(a, a_scales, ROW), QuantizedTensor(b, b_scales, SQUARE)
    return functools.partial(getattr(dk, op), *operands, *groups)


def _least_bytes(rows: int, n: int, k: int, weights: int = 1) -> int:
    """Operands and scales read once, the result written once."""
    scales = 4 * ceil_div(k, 128) * (rows + weights * ceil_div(n, 128))
    return rows * k + weights * n * k + scales + 2 * rows * n


def _dense_row(m: int, n: int, k: int) -> Workload:
    def build() -> Candidates:
        operands = _random_operands((m, k), (n, k))
        a, _, b, _ = operands
        beside = {
            "cuBLASLt": lambda: peers.cublaslt(*operands),
            "BF16": lambda: peers.bf16(a, b),
            "Triton": lambda: peers.triton_gemm(*operands),
            "DeepGEMM": lambda: peers.deep_gemm(*operands),
        }
        return Candidates(_ours("fp8_gemm", *operands), beside)

    return Workload("dense", f"{m}x{n}x{k}", 2 * m * n * k, _least_bytes(m, n, k), build)


def skewed_sizes(groups: int, rows: int, seed: int = 0) -> list[int]:
    """How many of `rows` each expert gets where their popularity is log-normal: routing out of balance."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.randn(groups, generator=generator).exp()
    chosen = torch.multinomial(popularity, rows, replacement=True, generator=generator)
    return torch.bincount(chosen, minlength=groups).tolist()


def _grouped_row(name: str, sizes: Sequence[int], n: int, k: int) -> Workload:
    rows, groups = sum(sizes), len(sizes)

    def build() -> Candidates:
        operands = _random_operands((rows, k), (groups, n, k))
        a, _, b, _ = operands
        offsets = torch.tensor([0, *sizes]).cumsum(0).int().cuda()
        beside = {
            "BF16": lambda: peers.bf16_grouped(a, b, offsets[1:].contiguous()),
            "DeepGEMM": lambda: peers.deep_gemm_grouped(*operands, sizes),
        }
        return Candidates(_ours("grouped_fp8_gemm", *operands, offsets), beside)

    least = _least_bytes(rows, n, k, sum(size > 0 for size in sizes))
    return Workload("grouped", f"{name} {n}x{k}", 2 * rows * n * k, least, build)


def _masked_row(groups: int, max_m: int, n: int, k: int) -> Workload:
    """All rows in use, as the figures that others report."""

    def build() -> Candidates:
        operands = _random_operands((groups, max_m, k), (groups, n, k))
        a, _, b, _ = operands
        counts = torch.full((groups,), max_m, dtype=torch.int32, device="cuda")
        beside = {
            "BF16": lambda: peers.bf16(a, b),
            "DeepGEMM": lambda: peers.deep_gemm_masked(*operands, counts),
        }
        return Candidates(_ours("masked_grouped_fp8_gemm", *operands, counts), beside)

    rows = groups * max_m
    return Workload(
        "masked", f"{groups}x{max_m} {n}x{k}", 2 * rows * n * k, _least_bytes(rows, n, k, groups), build
    )


WORKLOADS = [
    *(_dense_row(m, n, k) for m in (4096, 64, 128, 512, 8192) for n, k in _SHAPES),
    *(
        _grouped_row(name, sizes, n, k)
        for name, sizes in (
            ("4x8192", [8192] * 4),
            ("8x4096", [4096] * 8),
            ("32x256", [256] * 32),
            ("32 skewed", skewed_sizes(32, 8192)),
        )
        for n, k in _GROUPED_SHAPES
    ),
    *(
        _masked_row(g, m, n, k)
        for g, m in ((1, 1024), (2, 512), (4, 256), (32, 16))
        for n, k in _GROUPED_SHAPES
    ),
]
