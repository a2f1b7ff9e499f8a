"""Routing: every instance; the time on a batch of DeepSeek-V3 against the same in torch."""

import itertools

import torch
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import reference

from . import Candidates, Case, Tensors, Workload

V3 = {"top_k": 8, "n_group": 8, "topk_group": 4, "scaling": 2.5}


def _route(experts: int, logits: bool) -> Case:
    options = {"top_k": 4, "n_group": 4, "topk_group": 2, "scaling": 2.5}

    def inputs(generator: torch.Generator) -> Tensors:
        scores = torch.randn(21, experts, generator=generator)
        if logits:
            # An approximate sigmoid is exact at these: the emulator and a GPU then agree bit by bit.
            scores = torch.where(scores > 0, torch.inf, 0.0)
        else:
            scores[3, 5] = torch.nan
        return scores, torch.randn(experts, generator=generator)

    def run(scores: Tensor, bias: Tensor) -> Tensors:
        return tuple(dk.route(scores, bias, logits=logits, **options))

    def expected(scores: Tensor, bias: Tensor) -> Tensors:
        return reference.route(scores, bias, 4, 4, 2, 2.5, logits)

    return Case(f"route {experts} experts logits={logits}", inputs, run, expected)


CASES = [_route(*facts) for facts in itertools.product((32, 64, 128, 256, 512), (False, True))]


def _speed(tokens: int, experts: int) -> Workload:
    def build() -> Candidates:
        logits, bias = torch.randn(tokens, experts, device="cuda"), torch.randn(experts, device="cuda")

        def peer() -> object:
            scores = logits.sigmoid()
            chosen = reference.choose_experts(scores + bias, 8, 4, 8)
            counts = torch.bincount(chosen.flatten(), minlength=experts)
            return chosen, reference.routing_weights(scores.gather(1, chosen), 2.5), counts

        name = "torch"
        ours = dk.route
        return Candidates(
            lambda: ours(logits, bias, logits=True, **V3), {name: lambda: peer}, frozenset({name})
        )

    moved = tokens * (experts * 4 + 8 * 12)
    return Workload("route", f"{tokens} tokens, {experts} experts", 0, moved, build, "none")


WORKLOADS = [_speed(4096, 256), _speed(128, 256)]
