"""Linear layers in the dtype of their operands, whose weight gradients can be put off like those in FP8."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_kernels.nn.deferred import active_store


@torch.compiler.assume_constant_result
def _slow_bf16_cpu() -> bool:
    """Whether torch has only its scalar fallback for BF16 matmuls on this CPU, far slower than FP32."""
    try:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return True


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ in their own dtype. BF16 products are exact in FP32: the upcast only changes the speed."""
    return _Deferring.apply(x, weight, None) if _defers(weight) else _product(x, weight, None)


def grouped_linear(x: Tensor, weight: Tensor, group_offsets: Tensor) -> Tensor:
    """Rows group_offsets[g] to group_offsets[g + 1] of x times weight[g]ᵀ in their own dtype (BF16 or FP32).

    On CPUs BF16 goes through FP32: oneDNN would compile a kernel for every new group size, at milliseconds
    each.
    """
    if _defers(weight):
        return _Deferring.apply(x, weight, group_offsets)
    return _product(x, weight, group_offsets)


def _product(x: Tensor, weight: Tensor, group_offsets: Tensor | None) -> Tensor:
    """x · weightᵀ, by groups of rows where there are group_offsets."""
    bf16_on_cpu = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    if bf16_on_cpu and (group_offsets is not None or _slow_bf16_cpu()):
        return _product(x.float(), weight.float(), group_offsets).to(x.dtype)
    if group_offsets is None:
        return F.linear(x, weight)
    run = F.grouped_mm if x.dtype == torch.bfloat16 else _wide_grouped_mm
    return run(x, weight.transpose(-2, -1), offs=group_offsets[1:])


@torch.compiler.disable
def _wide_grouped_mm(*args: Any, **kwargs: Any) -> Tensor:
    """torch runs it in FP32 on CPUs, but cannot trace it there: torch.compile breaks its graph here."""
    return F.grouped_mm(*args, **kwargs)


def _defers(weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and active_store() is not None
        and torch.is_grad_enabled()
        and weight.requires_grad
        and weight.is_leaf
    )


class _Deferring(torch.autograd.Function):
    """`_product` whose backward gives the weight's gradient to the store that is active then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group_offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, group_offsets)
        ctx.weight = weight
        return _product(x, weight, group_offsets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight, group_offsets = ctx.saved_tensors
        dx = _product(dy, weight.transpose(-2, -1), group_offsets) if ctx.needs_input_grad[0] else None
        store = active_store()
        if store is None:
            return dx, _weight_gradient(dy, x, group_offsets), None
        store.put(functools.partial(_add_gradient, ctx.weight, dy, x, group_offsets))
        return dx, None, None


def _weight_gradient(dy: Tensor, x: Tensor, group_offsets: Tensor | None) -> Tensor:
    """dyᵀ · x, by groups of rows where there are group_offsets: in their dtype, as autograd makes it."""
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    if group_offsets is None:
        return _product(dy.t(), x.t(), None)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return _weight_gradient(dy.float(), x.float(), group_offsets).to(x.dtype)
    return F.grouped_mm(dy.t(), x, offs=group_offsets[1:])


@torch.no_grad()
def _add_gradient(weight: Tensor, dy: Tensor, x: Tensor, group_offsets: Tensor | None) -> None:
    """Into `weight.grad`, as autograd would."""
    dw = _weight_gradient(dy, x, group_offsets).to(weight.grad_dtype or weight.dtype)
    weight.grad = dw if weight.grad is None else weight.grad.add_(dw)
