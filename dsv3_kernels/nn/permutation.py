"""Tokens into the order of their experts and back, with gradients: the backward of each is the other."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dsv3_kernels.permute as ops
from dsv3_kernels.nn.recipe import FP8, Fp8Recipe
from dsv3_kernels.nn.rows import Fp8Rows


class ExpertOrder(NamedTuple):
    """R = T·K rows, one for each choice of an expert by a token, sorted by expert, then token."""

    tokens: Tensor
    """int32 [R], the token of each row."""
    slots: Tensor
    """int32 [T, K], the row of each choice."""
    group_offsets: Tensor
    """int32 [E + 1], where each expert's rows begin."""
    choices: Tensor
    """int64 [R], the choice t·K + k of each row."""


def expert_order(experts: Tensor, num_experts: int, counts: Tensor | None = None) -> ExpertOrder:
    """experts: int64 [T, K], 0 to num_experts - 1. counts: int32 [E], how often each occurs, if known."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    slots = torch.empty(flat.numel(), dtype=torch.int32, device=flat.device)
    slots[order] = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    if counts is None:
        counts = torch.bincount(flat, minlength=num_experts)
    offsets = F.pad(counts.cumsum(0), (1, 0)).int()
    return ExpertOrder((order // experts.shape[1]).int(), slots.view(experts.shape), offsets, order)


def _gather(x: Tensor, order: ExpertOrder, fp8: bool, transpose: bool, power_of_2: bool) -> Tensor:
    if not fp8:
        return x.index_select(0, order.tokens)
    x = x.contiguous()
    if not transpose:
        return Fp8Rows(ops.permute_quantize(x, order.tokens, power_of_2_scales=power_of_2), None, x.dtype)
    both = ops.permute_quantize(
        x, order.tokens, transpose=True, group_offsets=order.group_offsets, power_of_2_scales=power_of_2
    )
    return Fp8Rows(*both, x.dtype)


def _sum(rows: Tensor, slots: Tensor) -> Tensor:
    if rows.dtype == torch.bfloat16 and rows.shape[1] % 8 == 0:
        return ops.unpermute(rows.contiguous(), slots)
    return rows.index_select(0, slots.flatten()).view(*slots.shape, -1).sum(1)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tokens: Tensor,
        slots: Tensor,
        group_offsets: Tensor,
        fp8: bool,
        transpose: bool,
        power_of_2: bool,
    ) -> Tensor:
        ctx.save_for_backward(slots)
        return _gather(x, ExpertOrder(tokens, slots, group_offsets, tokens), fp8, transpose, power_of_2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return _sum(grad_outputs[0], slots), None, None, None, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        tokens: Tensor,
        slots: Tensor,
        group_offsets: Tensor,
        fp8: bool,
        power_of_2: bool,
    ) -> Tensor:
        ctx.save_for_backward(tokens, slots, group_offsets)
        ctx.fp8, ctx.power_of_2 = fp8, power_of_2
        return _sum(rows, slots)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tokens, slots, group_offsets = ctx.saved_tensors
        order = ExpertOrder(tokens, slots, group_offsets, tokens)
        rows = _gather(grad_outputs[0], order, ctx.fp8, True, ctx.power_of_2)
        return rows, None, None, None, None, None


def _in_fp8(recipe: Fp8Recipe) -> bool:
    """In a graph of torch.compile rows are permuted as they are, and quantised by who takes them: the same
    bits, without a tensor subclass."""
    return recipe.precision == "fp8" and not torch.compiler.is_compiling()


def permute(x: Tensor, order: ExpertOrder, *, recipe: Fp8Recipe = FP8, transpose: bool = True) -> Tensor:
    """Row r of the result is x[order.tokens[r]]; in FP8 it is quantised on the way, and stays so.

    x: BF16 or FP32 [T, hidden]. transpose: also tiles of 128 tokens of each expert, for the weight gradient,
    from the same read. Returns [R, hidden] in x's dtype; an `Fp8Rows` if the recipe computes in FP8.
    """
    return _Permute.apply(x, *order[:3], _in_fp8(recipe), transpose, recipe.power_of_2_scales)


def unpermute(rows: Tensor, order: ExpertOrder, *, recipe: Fp8Recipe = FP8) -> Tensor:
    """Each token's rows, summed: in FP32 for BF16 rows, experts ascending.

    rows: BF16 or FP32 [R, hidden]. Returns [T, hidden] in its dtype. If the recipe computes in FP8, the
    gradient of the rows comes quantised, as `permute` does it.
    """
    return _Unpermute.apply(rows, *order[:3], _in_fp8(recipe), recipe.power_of_2_scales)
