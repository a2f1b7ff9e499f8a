"""Dispatch and combine as differentiable layers: the backward of each is the other, on the same handle.

As in section 3.2.3 and 3.3.3 of the DeepSeek-V3 report: with an FP8 recipe tokens are dispatched in FP8, and
so are the gradients that enter combine's backward; combine and dispatch's backward move the buffer's dtype,
BF16 but in checks.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_kernels.ep import Buffer, DispatchResult, Handle
from dsv3_kernels.nn.recipe import FP8, Fp8Recipe
from dsv3_kernels.quantize import dequantize, quantize_1x128
from dsv3_kernels.quantized import QuantizedTensor


def _wire(x: Tensor, recipe: Fp8Recipe, buffer: Buffer) -> Tensor | QuantizedTensor:
    """x as the recipe has it travel."""
    if recipe.precision == "bf16":
        return x.to(buffer.dtype).contiguous()
    x = x.to(torch.bfloat16).contiguous()
    return quantize_1x128(x, power_of_2_scales=recipe.power_of_2_scales)


def _plain(x: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if isinstance(x, Tensor) else dequantize(x, dtype)


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
        )
        ctx.layer, ctx.handle, ctx.dtype = layer, got.handle, x.dtype
        return _plain(got.x, x.dtype), got.topk_weights, got

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        dx, dweights, _ = grad_outputs
        home = ctx.layer.buffer.combine(
            dx.to(ctx.layer.buffer.dtype).contiguous(),
            ctx.handle,
            num_sms=ctx.layer.num_sms,
            weights_grad=dweights.contiguous(),
        )
        return home.x.to(ctx.dtype), home.weights_grad, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, topk_weights: Tensor, handle: Handle, layer: "MoECombine") -> Tensor:
        ctx.layer, ctx.handle = layer, handle
        ctx.save_for_backward(y, topk_weights)
        rows = y.to(layer.buffer.dtype).contiguous()
        home = layer.buffer.combine(rows, handle, topk_weights.contiguous(), num_sms=layer.num_sms)
        return home.x.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        y, topk_weights = ctx.saved_tensors
        layer = ctx.layer
        got = layer.buffer.dispatch(
            _wire(grad_outputs[0], layer.recipe, layer.buffer), num_sms=layer.num_sms, handle=ctx.handle
        )
        grad = _plain(got.x, torch.float32)
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
        num_sms: int = 20,
    ) -> None:
        super().__init__()
        self.buffer, self.recipe = buffer, recipe
        self.max_recv_tokens, self.num_sms = max_recv_tokens, num_sms

    def forward(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> DispatchResult:
        """x: `[T, hidden]`, BF16 or FP32; topk_idx: int64, topk_weights: FP32 `[T, K]`.

        The result's x is `[rows, hidden]` in x's dtype; it and topk_weights carry gradients back.
        """
        rows, weights, got = _Dispatch.apply(x, topk_weights, topk_idx, self)
        return replace(got, x=rows, topk_weights=weights)


class MoECombine(nn.Module):
    """The weighted sum of what the experts of each token returned, back on the token's rank."""

    def __init__(self, buffer: Buffer, *, recipe: Fp8Recipe = FP8, num_sms: int = 20) -> None:
        super().__init__()
        self.buffer, self.recipe, self.num_sms = buffer, recipe, num_sms

    def forward(self, y: Tensor, handle: Handle, topk_weights: Tensor) -> Tensor:
        """y: `[rows, hidden]`, BF16 or FP32; handle, topk_weights `[rows]`: of the dispatch.

        Returns `[T, hidden]` in y's dtype, with gradients to y and topk_weights.
        """
        return _Combine.apply(y, topk_weights, handle, self)
