"""down(swiglu(gate_up(x))): the dense feed-forward layer, and each expert.

In FP8 it is one autograd function (section 3.3.3 of the DeepSeek-V3 report): SwiGLU and the quantiser of its
output are one kernel, its input is kept in FP8, and the backward makes its output again from that:

    forward    h = x · w1ᵀ        y = swiglu(h) · weight, in 1x128 tiles        out = y · w2ᵀ
    backward   dy = dout · w2     dh, dhᵀ and yᵀ from dy and the kept h         dx = dh · w1
               dw2 = doutᵀ · y    dw1 = dhᵀ · x
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_kernels import reference
from dsv3_kernels.nn.gemms import (
    as_rows,
    gemm,
    place_of_gradient,
    quantized_rows,
    quantized_weight,
    records_gradient,
    transposed_rows,
    transposed_weight,
    weight_gradient,
)
from dsv3_kernels.nn.linear import Fp8Linear, GroupedFp8Linear, as_autocast_says
from dsv3_kernels.nn.recipe import FP8, Fp8Recipe
from dsv3_kernels.nn.recompute import Remake, remake_of
from dsv3_kernels.quantize import dequantize, quantize_1x128, quantize_128x128
from dsv3_kernels.quantized import ROW, TILE, QuantizedTensor
from dsv3_kernels.swiglu import SwigluGradient, swiglu_backward_quantize, swiglu_quantize

Layer = Fp8Linear | GroupedFp8Linear


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, for x = [gate, up] along the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _Fp8MLP(torch.autograd.Function):
    """x: [T, K]; up: [.., 2·I, K]; down: [.., N, I]; weights: FP32 [T], a factor of each row of y, or None.

    power_of_2, retiled: as in `quantized_rows`. keep_fp8: h is kept in FP8, not BF16. remake, keep_weights:
    as in a linear layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        weights: Tensor | None,
        group_offsets: Tensor | None,
        power_of_2: bool,
        retiled: bool,
        keep_fp8: bool,
        remake: Remake | None,
        keep_weights: bool,
    ) -> Tensor:
        up_q, up_kept = quantized_weight(up, power_of_2, keep_weights)
        keeps_x = ctx.needs_input_grad[1] and remake is None
        x_q, x_t = quantized_rows(x, group_offsets, power_of_2, retiled, transpose=keeps_x)
        h = gemm(x_q, up_q, group_offsets)
        down_q, down_kept = quantized_weight(down, power_of_2, keep_weights)
        y = gemm(swiglu_quantize(h, weights, power_of_2_scales=power_of_2), down_q, group_offsets)
        x_kept = (None, None) if x_t is None else (x_t.data, x_t.scales)
        h_kept: tuple[Tensor, Tensor | None] = h, None
        if keep_fp8:
            h_q = quantize_1x128(h, power_of_2_scales=power_of_2)
            h_kept = h_q.data, h_q.scales
        ctx.up, ctx.down = place_of_gradient(up), place_of_gradient(down)
        ctx.power_of_2, ctx.retiled, ctx.remake = power_of_2, retiled, remake
        ctx.save_for_backward(*up_kept, *down_kept, *x_kept, *h_kept, weights, group_offsets)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *t, weights, offsets = ctx.saved_tensors
        needs_dx, needs_up, needs_down, needs_weights = ctx.needs_input_grad[:4]
        dout_q, dout_t = quantized_rows(
            grad_outputs[0], offsets, ctx.power_of_2, ctx.retiled, transpose=needs_down
        )
        h = t[6] if t[7] is None else QuantizedTensor(t[6], t[7], ROW)
        dh_q, dh_t, y_t, dweights = _swiglu_backward(
            gemm(dout_q, transposed_weight(t[2], t[3], ctx.power_of_2), offsets),
            h,
            weights,
            offsets,
            needs_down,
            ctx.power_of_2,
        )
        dx = gemm(dh_q, transposed_weight(t[0], t[1], ctx.power_of_2), offsets) if needs_dx else None
        d_up = d_down = None
        if dout_t is not None and y_t is not None:
            d_down = weight_gradient(ctx.down, dout_t, y_t, offsets)
        if needs_up:
            x_t = (
                QuantizedTensor(t[4], t[5], ROW)
                if ctx.remake is None
                else transposed_rows(as_rows(ctx.remake()), offsets, ctx.power_of_2, ctx.retiled)
            )
            d_up = weight_gradient(ctx.up, dh_t, x_t, offsets)
        return dx, d_up, d_down, dweights if needs_weights else None, *(None,) * 6


def _swiglu_backward(
    dy: Tensor,
    h: Tensor | QuantizedTensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    recompute: bool,
    power_of_2: bool,
) -> SwigluGradient:
    """One kernel, where h was kept in FP8 and has whole tiles of gate and up."""
    if isinstance(h, QuantizedTensor) and dy.shape[1] % TILE == 0:
        return swiglu_backward_quantize(
            dy, h, group_offsets, weights=weights, recompute=recompute, power_of_2_scales=power_of_2
        )
    values = dequantize(h) if isinstance(h, QuantizedTensor) else h
    dh, y = reference.swiglu_backward(dy, values, weights)
    dh_q, dh_t = quantize_1x128(dh, transpose=True, group_offsets=group_offsets, power_of_2_scales=power_of_2)
    y_t = transposed_rows(y, group_offsets, power_of_2, power_of_2) if recompute else None
    dweights = None if weights is None else (dy.float() * swiglu(values.float())).sum(1)
    return SwigluGradient(dh_q, dh_t, y_t, dweights)


def swiglu_mlp(
    x: Tensor, up: Layer, down: Layer, group_offsets: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """down(swiglu(up(x)) · weights), fused where both layers compute in FP8.

    x: [..., K], or [T, K] with group_offsets, int32 [G + 1], for grouped layers. weights: FP32 [T], a factor
    a row. Returns [..., N] in x's dtype. A layer with hooks is called as it is, so that they run: nothing is
    fused then.
    """
    x = as_autocast_says(x)
    if not _fusible(up, down):
        groups = () if group_offsets is None else (group_offsets,)
        h = swiglu(up(x, *groups))
        if weights is not None:
            h = (h * weights.unsqueeze(-1)).to(h.dtype)
        return down(h, *groups)
    recipe = up.recipe
    rows = as_rows(x)
    weights = None if weights is None else weights.contiguous()
    stored = up.weight_scale_inv is not None or down.weight_scale_inv is not None
    if not stored and records_gradient(x, up.weight, down.weight, weights):
        y = _Fp8MLP.apply(
            rows,
            up.weight,
            down.weight,
            weights,
            group_offsets,
            recipe.power_of_2_scales,
            recipe.retiled_power_of_2,
            recipe.swiglu_input == "fp8",
            remake_of(x),
            "weights" not in recipe.recompute,
        )
    else:
        y = _forward(rows, up, down, weights, group_offsets, recipe)
    y = y.to(x.dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _fusible(up: Layer, down: Layer) -> bool:
    return all(
        type(layer) in (Fp8Linear, GroupedFp8Linear)
        and layer.recipe.precision == "fp8"
        and getattr(layer, "bias", None) is None
        and not any(getattr(layer, hooks) for hooks in _HOOKS)
        for layer in (up, down)
    )


def _forward(
    x: Tensor,
    up: Layer,
    down: Layer,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    recipe: Fp8Recipe,
) -> Tensor:
    """Without a backward, which the ops refuse; weights that are kept in FP8 are taken as they are."""
    power_of_2 = recipe.power_of_2_scales
    up_q, down_q = (
        layer.quantized_weight() or quantize_128x128(layer.weight, power_of_2_scales=power_of_2)
        for layer in (up, down)
    )
    x_q, _ = quantized_rows(x, group_offsets, power_of_2, recipe.retiled_power_of_2, transpose=False)
    h = gemm(x_q, up_q, group_offsets)
    return gemm(swiglu_quantize(h, weights, power_of_2_scales=power_of_2), down_q, group_offsets)


class MLP(nn.Module):
    """The dense feed-forward layer, and the shared experts: down(swiglu(gate_up(x)))."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, recipe: Fp8Recipe = FP8, **factory: Any
    ) -> None:
        super().__init__()
        self.gate_up_proj = Fp8Linear(hidden_size, 2 * intermediate_size, recipe=recipe, **factory)
        self.down_proj = Fp8Linear(intermediate_size, hidden_size, recipe=recipe, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]. Returns the same shape and dtype."""
        return swiglu_mlp(x, self.gate_up_proj, self.down_proj)
