"""SwiGLU with its quantisers: every instance; bandwidth on the experts of DeepSeek-V3 (2048 wide).

On a GPU the last bits of its 2^x and 1/x are its own, so CASES, which are compared bit by bit, hold gates of
0 and of large magnitude alone, where the sigmoid is 1/2, 1 or 0 whatever those bits are.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import reference
from dsv3_kernels.quantized import QuantizedTensor

from . import Candidates, Case, Tensors, Workload


def _gates_and_ups(generator: torch.Generator, rows: int, width: int) -> Tensor:
    gates = torch.randint(-1, 2, (rows, width), generator=generator) * 128.0
    x = torch.cat([gates, torch.randn(rows, width, generator=generator)], -1)
    x[3, 0], x[rows - 1, width] = float("nan"), float("inf")
    return x


def _parts(quantized: Sequence[QuantizedTensor]) -> Tensors:
    return tuple(part for q in quantized for part in (q.data, q.scales))


def _offsets() -> Tensor:
    return torch.tensor([0, 0, 100, 101, 140], dtype=torch.int32)


def _forward(transpose: bool, **options: bool) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        return (
            _gates_and_ups(generator, 150, 144).bfloat16(),
            torch.rand(150, generator=generator),
            _offsets(),
        )

    def run(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensors:
        if transpose:
            return _parts(dk.swiglu_quantize(x, weights, transpose=True, group_offsets=offsets, **options))
        return _parts((dk.swiglu_quantize(x, weights, **options),))

    def expected(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensors:
        q = reference.quantize_1x128_both(reference.swiglu(x, weights), offsets, **options)
        return _parts(q[: 1 + transpose])

    facts = [*options, f"transpose={transpose}"]
    return Case(f"swiglu_quantize {' '.join(facts)}", inputs, run, expected)


def _backward(recompute: bool, weighted: bool, **options: bool) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        x = reference.quantize_1x128(_gates_and_ups(generator, 150, 128), power_of_2_scales=True)
        dy, weights = (
            torch.randn(150, 128, generator=generator).bfloat16(),
            torch.rand(150, generator=generator),
        )
        return dy, x.data, x.scales, weights, _offsets()

    def run(dy: Tensor, data: Tensor, scales: Tensor, weights: Tensor, offsets: Tensor) -> Tensors:
        x = QuantizedTensor(data, scales, (1, 128))
        *quantized, gradient = dk.swiglu_backward_quantize(
            dy, x, offsets, weights=weights if weighted else None, recompute=recompute, **options
        )
        return *_parts(quantized[: 2 + recompute]), *([gradient] if weighted else [])

    def expected(dy: Tensor, data: Tensor, scales: Tensor, weights: Tensor, offsets: Tensor) -> Tensors:
        x = reference.dequantize(QuantizedTensor(data, scales, (1, 128)))
        dx, y = (
            reference.quantize_1x128_both(t, offsets, **options)
            for t in reference.swiglu_backward(dy, x, weights if weighted else None)
        )
        parts = _parts((*dx, y[1])[: 2 + recompute])
        return (*parts, reference.swiglu_weight_gradients(dy, x).sum(0)) if weighted else parts

    facts = [*options, f"recompute={recompute}", f"weighted={weighted}"]
    return Case(f"swiglu_backward_quantize {' '.join(facts)}", inputs, run, expected)


_FLAGS = (False, True)
_SCALINGS: tuple[dict[str, bool], ...] = ({}, {"power_of_2_scales": True}, {"ue8m0_scales": True})
CASES = [_forward(flag, **s) for flag, s in itertools.product(_FLAGS, _SCALINGS)]
CASES += [_backward(*flags, **s) for *flags, s in itertools.product(_FLAGS, _FLAGS, _SCALINGS)]


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


_EAGER = "PyTorch, BF16, cast"


def _forward_speed(rows: int, width: int, transpose: bool) -> Workload:
    def build() -> Candidates:
        x = torch.randn(rows, 2 * width, dtype=torch.bfloat16, device="cuda")
        peers = {_EAGER: lambda: lambda: _swiglu(x).to(torch.float8_e4m3fn)}

        def run() -> object:
            return dk.swiglu_quantize(x, transpose=True) if transpose else dk.swiglu_quantize(x)

        return Candidates(run, peers, frozenset({_EAGER}))

    moved = rows * width * 4 + rows * width * 33 // 32 * (1 + transpose)
    name = f"{rows}x{width}{', transpose' if transpose else ''}"
    return Workload("swiglu_quantize", name, 0, moved, build, "none")


def _backward_speed(rows: int, width: int, recompute: bool) -> Workload:
    def build() -> Candidates:
        dy = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
        x = dk.quantize_1x128(torch.randn(rows, 2 * width, dtype=torch.bfloat16, device="cuda"))

        return Candidates(lambda: dk.swiglu_backward_quantize(dy, x, recompute=recompute))

    moved = rows * width * 2 + rows * width * 33 // 32 * (2 + 4 + recompute)
    name = f"{rows}x{width}{', recompute' if recompute else ''}"
    return Workload("swiglu_backward_quantize", name, 0, moved, build, "none")


WORKLOADS = [make(32768, 2048, flag) for make in (_forward_speed, _backward_speed) for flag in (False, True)]
