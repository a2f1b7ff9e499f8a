"""Dispatch and combine as differentiable layers: the backward of each is the other, on the same handle.

As in section 3.2.3 and 3.3.3 of the DeepSeek-V3 report: with an FP8 recipe tokens are dispatched in FP8, and
so are the gradients that enter combine's backward; combine and dispatch's backward move the buffer's dtype,
BF16 but in checks. What arrives in FP8 stays so (`Fp8Rows`): the experts' GEMMs take it as it is.
torch.compile breaks its graph at both.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_kernels.ep import Buffer, DispatchResult, Handle
from dsv3_kernels.nn.interleave import await_event
from dsv3_kernels.nn.recipe import FP8, Fp8Recipe
from dsv3_kernels.nn.rows import Fp8Rows
from dsv3_kernels.quantize import quantize_1x128
from dsv3_kernels.quantized import QuantizedTensor


def _wire(x: Tensor, recipe: Fp8Recipe, buffer: Buffer) -> Tensor | QuantizedTensor:
    """x as the recipe has it travel."""
    if recipe.precision == "bf16" or recipe.dispatch == "bf16":
        return x.to(buffer.dtype).contiguous()
    x = x.to(torch.bfloat16).contiguous()
    return quantize_1x128(x, power_of_2_scales=recipe.retiled_power_of_2)


def _arrived(x: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if isinstance(x, Tensor) else Fp8Rows(x, None, dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor, topk_idx: Tensor, layer: "MoEDispatch"
    ) -> tuple[Tensor, Tensor | None, DispatchResult]:
        got = layer.buffer.dispatch(
            _wire(x, layer.recipe, layer.buffer),
            topk_idx.contiguous(),
            topk_weights.contiguous(),
            layer.num_sms,
            max_recv_tokens=layer.max_recv_tokens,
            async_op=True,
        )
        await_event(got.event, "dispatch")
        ctx.layer, ctx.handle, ctx.dtype = layer, got.handle, x.dtype
        return _arrived(got.x, x.dtype), got.topk_weights, got

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        dx, dweights, _ = grad_outputs
        home = ctx.layer.buffer.combine(
            dx.to(ctx.layer.buffer.dtype).contiguous(),
            ctx.handle,
            num_sms=ctx.layer.num_sms,
            weights_grad=dweights.contiguous(),
            async_op=True,
        )
        await_event(home.event, "combine")
        return home.x.to(ctx.dtype), home.weights_grad, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, topk_weights: Tensor | None, handle: Handle, layer: "MoECombine"
    ) -> Tensor:
        ctx.layer, ctx.handle, ctx.dtype = layer, handle, y.dtype
        weights = None
        if topk_weights is not None:
            ctx.save_for_backward(y, topk_weights)
            weights = topk_weights.contiguous()
        rows = y.to(layer.buffer.dtype).contiguous()
        home = layer.buffer.combine(rows, handle, weights, num_sms=layer.num_sms, async_op=True)
        await_event(home.event, "combine")
        return home.x.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layer = ctx.layer
        got = layer.buffer.dispatch(
            _wire(grad_outputs[0], layer.recipe, layer.buffer),
            num_sms=layer.num_sms,
            handle=ctx.handle,
            async_op=True,
        )
        await_event(got.event, "dispatch")
        if not ctx.saved_tensors:
            return _arrived(got.x, ctx.dtype), None, None, None
        y, topk_weights = ctx.saved_tensors
        grad = _arrived(got.x, torch.float32)
        dy = dweights = None
        if ctx.needs_input_grad[0]:
            dy = (grad * topk_weights.unsqueeze(1)).to(y.dtype)
        if ctx.needs_input_grad[1]:
            dweights = (grad * y.float()).sum(1).masked_fill_(got.topk_idx < 0, 0.0)  # rows nobody sent
        return dy, dweights, None, None


class MoEDispatch(nn.Module):
    """Each token to the ranks of its experts, rows in expert order.

    max_recv_tokens, num_sms: as in `ep.Buffer.dispatch`.
    """

    def __init__(
        self,
        buffer: Buffer,
        *,
        recipe: Fp8Recipe = FP8,
        max_recv_tokens: int | None = None,
        num_sms: int | None = None,
    ) -> None:
        super().__init__()
        self.buffer, self.recipe = buffer, recipe
        self.max_recv_tokens, self.num_sms = max_recv_tokens, num_sms

    @torch.compiler.disable
    def forward(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> DispatchResult:
        """x: `[T, hidden]`, BF16 or FP32; topk_idx: int64, topk_weights: FP32 `[T, K]`.

        The result's x is `[rows, hidden]` in x's dtype; it and topk_weights carry gradients back. In FP8 it
        is an `Fp8Rows`, which the layers of this library take without dequantising.
        """
        rows, weights, got = _Dispatch.apply(x, topk_weights, topk_idx, self)
        return replace(got, x=rows, topk_weights=weights)


class MoECombine(nn.Module):
    """The sum of what the experts of each token returned, back on the token's rank."""

    def __init__(self, buffer: Buffer, *, recipe: Fp8Recipe = FP8, num_sms: int | None = None) -> None:
        super().__init__()
        self.buffer, self.recipe, self.num_sms = buffer, recipe, num_sms

    @torch.compiler.disable
    def forward(self, y: Tensor, handle: Handle, topk_weights: Tensor | None = None) -> Tensor:
        """y: `[rows, hidden]`, BF16 or FP32; handle, topk_weights `[rows]`: of the dispatch. Without weights,
        which the experts may have applied, nothing is kept for the backward.

        Returns `[T, hidden]` in y's dtype, with gradients to y and topk_weights.
        """
        return _Combine.apply(y, topk_weights, handle, self)
