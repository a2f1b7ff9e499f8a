"""Linear layers whose forward, input-gradient and weight-gradient GEMMs run in FP8.

For x [T, K] and a weight w [N, K] (section 3.3 of the DeepSeek-V3 report):

    forward    y  = x · wᵀ    x in 1x128 tiles along K,       w in 128x128 blocks
    backward   dx = dy · w    dy in 1x128 tiles along N,      wᵀ in 128x128 blocks
               dw = dyᵀ · x   dyᵀ and xᵀ in 1x128 tiles along the tokens, result in FP32

Each operand is quantised in one pass, in both orientations where both are needed: x and the weight in the
forward, so that what is kept for the backward is FP8, and dy in the backward.

The weight's gradient is made in FP32. Where the weight has an attribute `main_grad`, a contiguous FP32 tensor
of its shape, the kernel adds it to that, and `weight.grad` stays None; `deferred_wgrad` puts it off. Neither
holds in a graph made by torch.compile: there the gradient goes to `weight.grad`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_kernels.e5m6 import PackedE5M6, pack_e5m6, unpack_e5m6
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
from dsv3_kernels.nn.plain import grouped_linear, linear
from dsv3_kernels.nn.recipe import FP8, Fp8Recipe
from dsv3_kernels.nn.recompute import Remake, remake_of
from dsv3_kernels.nn.stored import StoresFp8
from dsv3_kernels.quantize import quantize_128x128
from dsv3_kernels.quantized import ROW, TILE, QuantizedTensor


class _Fp8LinearFunction(torch.autograd.Function):
    """weight [N, K] without group_offsets, [G, N, K] with them.

    power_of_2, retiled: as in `quantized_rows`. e5m6: x is kept for the backward in 12 bits a value. remake:
    makes x, which is then not kept. keep_weight: wᵀ is kept in FP8; else the backward quantises it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        group_offsets: Tensor | None,
        power_of_2: bool,
        retiled: bool,
        e5m6: bool,
        remake: Remake | None,
        keep_weight: bool,
        training: bool,
    ) -> Tensor:
        if not training:
            w_q = quantize_128x128(weight, power_of_2_scales=power_of_2)
            x_q, _ = quantized_rows(x, group_offsets, power_of_2, retiled, transpose=False)
            return gemm(x_q, w_q, group_offsets)
        w_q, weight_kept = quantized_weight(weight, power_of_2, keep_weight)
        needs_dw = ctx.needs_input_grad[1]
        ctx.remake = remake if needs_dw else None
        keeps_x = needs_dw and remake is None
        x_q, x_t = quantized_rows(x, group_offsets, power_of_2, retiled, transpose=keeps_x and not e5m6)
        kept: tuple[Tensor | None, Tensor | None] = None, None
        if x_t is not None:
            kept = x_t.data, x_t.scales
        elif keeps_x:
            kept = pack_e5m6(x)
        ctx.weight = place_of_gradient(weight) if needs_dw else None
        ctx.save_for_backward(*weight_kept, *kept, group_offsets)
        ctx.power_of_2, ctx.retiled, ctx.e5m6 = power_of_2, retiled, e5m6
        return gemm(x_q, w_q, group_offsets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy, power_of_2, retiled = grad_outputs[0], ctx.power_of_2, ctx.retiled
        w_data, w_scales, x_data, x_scales, group_offsets = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dy_q = dy_t = dx = dw = None
        if needs_dx:
            dy_q, dy_t = quantized_rows(dy, group_offsets, power_of_2, retiled, transpose=needs_dw)
            dx = gemm(dy_q, transposed_weight(w_data, w_scales, power_of_2), group_offsets)
        elif needs_dw:
            dy_t = transposed_rows(dy, group_offsets, power_of_2, retiled)
        if dy_t is not None and needs_dw:
            x_t = _kept_rows(ctx, x_data, x_scales, group_offsets)
            dw = weight_gradient(ctx.weight, dy_t, x_t, group_offsets)
        return dx, dw, None, None, None, None, None, None, None


def _kept_rows(ctx: Any, data: Tensor, scales: Tensor, group_offsets: Tensor | None) -> QuantizedTensor:
    """x as the operand of the weight gradient, from what was kept of it."""
    x = None if ctx.remake is None else as_rows(ctx.remake())
    if ctx.e5m6:
        packed = PackedE5M6(data, scales) if x is None else pack_e5m6(x)
        return transposed_rows(unpack_e5m6(packed), group_offsets, ctx.retiled, ctx.retiled)
    if x is None:
        return QuantizedTensor(data, scales, ROW)
    return transposed_rows(x, group_offsets, ctx.power_of_2, ctx.retiled)


def fp8_linear(x: Tensor, weight: Tensor, *, power_of_2_scales: bool = False) -> Tensor:
    """x · weightᵀ with all three GEMMs in FP8.

    x: [..., K], BF16 or FP32. weight: [N, K], BF16 or FP32. Returns [..., N] in x's dtype (the GEMM rounds to
    BF16). The weight's gradient goes to `weight.main_grad` if it has one; else, where `weight.grad_dtype` is
    float32, `weight.grad` stays FP32.
    """
    return _fp8_linear(x, weight, Fp8Recipe(power_of_2_scales=power_of_2_scales), False)


def _fp8_linear(x: Tensor, weight: Tensor, recipe: Fp8Recipe, after_attention: bool) -> Tensor:
    e5m6 = after_attention and recipe.attention_output == "e5m6" and x.shape[-1] % TILE == 0
    y = _Fp8LinearFunction.apply(
        as_rows(x),
        weight,
        None,
        recipe.power_of_2_scales,
        recipe.retiled_power_of_2,
        e5m6,
        remake_of(x),
        "weights" not in recipe.recompute,
        records_gradient(x, weight),
    )
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def grouped_fp8_linear(
    x: Tensor, weight: Tensor, group_offsets: Tensor, *, power_of_2_scales: bool = False
) -> Tensor:
    """Rows group_offsets[g] to group_offsets[g + 1] of x times weight[g]ᵀ, all three GEMMs in FP8.

    x: [T, K], BF16 or FP32; rows that `MoEDispatch` left in FP8 are taken as they are. weight: [G, N, K].
    group_offsets: int32 [G + 1], ascending from 0 to T; empty groups are fine. Returns [T, N] in x's dtype.
    """
    return _grouped_fp8_linear(x, weight, group_offsets, Fp8Recipe(power_of_2_scales=power_of_2_scales))


def _grouped_fp8_linear(x: Tensor, weight: Tensor, group_offsets: Tensor, recipe: Fp8Recipe) -> Tensor:
    y = _Fp8LinearFunction.apply(
        x.contiguous(),
        weight,
        group_offsets,
        recipe.power_of_2_scales,
        recipe.retiled_power_of_2,
        False,
        remake_of(x),
        "weights" not in recipe.recompute,
        records_gradient(x, weight),
    )
    return y.to(x.dtype)


def _with_stored(
    x: Tensor, weight: QuantizedTensor, group_offsets: Tensor | None, recipe: Fp8Recipe
) -> Tensor:
    """The forward GEMM with a weight that is kept in FP8. It has no backward."""
    q, _ = quantized_rows(
        as_rows(x), group_offsets, recipe.power_of_2_scales, recipe.retiled_power_of_2, transpose=False
    )
    return gemm(q, weight, group_offsets).to(x.dtype).view(*x.shape[:-1], weight.shape[-2])


def as_autocast_says(x: Tensor) -> Tensor:
    """x in the dtype in which `nn.Linear` would take it, and return its result."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Linear(nn.Linear):
    """`nn.Linear`, by default without a bias, that is also fast on CPUs without BF16 instructions."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **factory: Any) -> None:
        super().__init__(in_features, out_features, bias, **factory)

    def product(self, x: Tensor) -> Tensor:
        """x · weightᵀ."""
        return linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = as_autocast_says(x)
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Fp8Linear(Linear, StoresFp8):
    """A drop-in for `nn.Linear` that computes as its `recipe` says; without a bias unless asked."""

    after_attention = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        recipe: Fp8Recipe = FP8,
        after_attention: bool = False,
        **factory: Any,
    ) -> None:
        """after_attention: whether the input is kept for the backward as `recipe.attention_output` says."""
        super().__init__(in_features, out_features, bias, **factory)
        self.recipe, self.after_attention = recipe, after_attention

    def product(self, x: Tensor) -> Tensor:
        if self.recipe.precision == "bf16":
            return linear(x, self.dequantized_weight().to(x.dtype))
        stored = self.quantized_weight()
        if stored is not None:
            return _with_stored(x, stored, None, self.recipe)
        return _fp8_linear(x, self.weight, self.recipe, self.after_attention)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe}"


class GroupedFp8Linear(StoresFp8):
    """One linear layer an expert, rows sorted by expert: weight [num_groups, out_features, in_features]."""

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        *,
        recipe: Fp8Recipe = FP8,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_groups, self.in_features, self.out_features = num_groups, in_features, out_features
        self.recipe = recipe
        self.weight = nn.Parameter(torch.empty(num_groups, out_features, in_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, group_offsets: Tensor) -> Tensor:
        """x: [T, in_features]; group_offsets: int32 [num_groups + 1]. Returns [T, out_features]."""
        x = as_autocast_says(x)
        if self.recipe.precision == "bf16":
            return grouped_linear(x, self.dequantized_weight().to(x.dtype), group_offsets)
        stored = self.quantized_weight()
        if stored is not None:
            return _with_stored(x, stored, group_offsets, self.recipe)
        return _grouped_fp8_linear(x, self.weight, group_offsets, self.recipe)

    def extra_repr(self) -> str:
        sizes = (
            f"num_groups={self.num_groups}, in_features={self.in_features}, out_features={self.out_features}"
        )
        return f"{sizes}, {self.recipe}"


def set_recipe(model: nn.Module, recipe: Fp8Recipe) -> None:
    """Makes every layer of the model that has a recipe compute, and send, as this one says from now on."""
    for module in model.modules():
        if isinstance(getattr(module, "recipe", None), Fp8Recipe):
            setattr(module, "recipe", recipe)  # noqa: B010
