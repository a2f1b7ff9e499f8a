"""Permuting with quantisation and unpermuting: every instance; bandwidth on a batch of DeepSeek-V3."""

import itertools

import torch
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import reference
from dsv3_kernels.quantized import QuantizedTensor

from . import Candidates, Case, Tensors, Workload


def _parts(quantized: tuple[QuantizedTensor, ...]) -> Tensors:
    return tuple(part for q in quantized for part in (q.data, q.scales))


def _permute(dtype: torch.dtype, transpose: bool, **options: bool) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        x = torch.randn(70, 144, generator=generator).to(dtype)
        x[3, 5] = float("nan")
        index = torch.randint(-1, 70, (150,), generator=generator, dtype=torch.int32)
        return x, index, torch.tensor([0, 0, 100, 101, 140], dtype=torch.int32)

    def run(x: Tensor, index: Tensor, offsets: Tensor) -> Tensors:
        if transpose:
            return _parts(dk.permute_quantize(x, index, transpose=True, group_offsets=offsets, **options))
        return _parts((dk.permute_quantize(x, index, **options),))

    def expected(x: Tensor, index: Tensor, offsets: Tensor) -> Tensors:
        q = reference.quantize_1x128_both(reference.permute(x, index), offsets, **options)
        return _parts(q[: 1 + transpose])

    facts = [str(dtype)[6:], *options, f"transpose={transpose}"]
    return Case(f"permute_quantize {' '.join(facts)}", inputs, run, expected)


def _unpermute(weighted: bool) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        rows = torch.randn(90, 264, generator=generator).bfloat16()
        slots = torch.randint(-1, 90, (17, 8), generator=generator, dtype=torch.int32)
        return rows, slots, *([torch.rand(17, 8, generator=generator)] if weighted else [])

    def run(*arguments: Tensor) -> Tensors:
        return (dk.unpermute(*arguments),)

    def expected(*arguments: Tensor) -> Tensors:
        return (reference.unpermute(*arguments),)

    return Case(f"unpermute weighted={weighted}", inputs, run, expected)


_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_SCALINGS: tuple[dict[str, bool], ...] = ({}, {"power_of_2_scales": True}, {"ue8m0_scales": True})
CASES = [_permute(*facts, **s) for *facts, s in itertools.product(_TYPES, (False, True), _SCALINGS)]
CASES += [_unpermute(weighted) for weighted in (False, True)]


def _permute_speed(tokens: int, top_k: int, width: int, transpose: bool) -> Workload:
    rows = tokens * top_k

    def build() -> Candidates:
        x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda")
        index = (torch.randperm(rows, device="cuda") // top_k).int()

        def run() -> object:
            return (
                dk.permute_quantize(x, index, transpose=True) if transpose else dk.permute_quantize(x, index)
            )

        peer = "x[index], cast"
        peers = {peer: lambda: lambda: x.index_select(0, index).to(torch.float8_e4m3fn)}
        return Candidates(run, peers, frozenset({peer}))

    moved = tokens * width * 2 + rows * width * 33 // 32 * (1 + transpose)
    name = f"{tokens} tokens x {top_k}, {width} wide{', transpose' if transpose else ''}"
    return Workload("permute_quantize", name, 0, moved, build, "none")


def _unpermute_speed(tokens: int, top_k: int, width: int) -> Workload:
    def build() -> Candidates:
        rows = torch.randn(tokens * top_k, width, dtype=torch.bfloat16, device="cuda")
        slots = torch.randperm(tokens * top_k, device="cuda").int().view(tokens, top_k)
        weights = torch.rand(tokens, top_k, device="cuda")

        def peer() -> object:
            picked = rows.index_select(0, slots.flatten()).view(tokens, top_k, width)
            return (picked * weights.unsqueeze(-1)).sum(1).bfloat16()

        name = "index_select, multiply, sum"
        return Candidates(lambda: dk.unpermute(rows, slots, weights), {name: lambda: peer}, frozenset({name}))

    moved = tokens * (top_k + 1) * width * 2 + tokens * top_k * 8
    return Workload("unpermute", f"{tokens} tokens x {top_k}, {width} wide", 0, moved, build, "none")


WORKLOADS = [_permute_speed(4096, 8, 7168, flag) for flag in (False, True)] + [
    _unpermute_speed(4096, 8, 7168)
]
