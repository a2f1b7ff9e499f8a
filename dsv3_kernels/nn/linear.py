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

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_kernels.gemm import fp8_gemm, grouped_fp8_gemm
from dsv3_kernels.nn.deferred import active_store
from dsv3_kernels.nn.plain import grouped_linear, linear
from dsv3_kernels.nn.recipe import FP8, Fp8Recipe
from dsv3_kernels.nn.stored import StoresFp8
from dsv3_kernels.quantize import quantize_1x128, quantize_1x128_t, quantize_128x128
from dsv3_kernels.quantized import ROW, SQUARE, QuantizedTensor
from dsv3_kernels.wgrad import fp8_wgrad


def _gemm(a: QuantizedTensor, b: QuantizedTensor, group_offsets: Tensor | None) -> Tensor:
    return fp8_gemm(a, b) if group_offsets is None else grouped_fp8_gemm(a, b, group_offsets)


class _Fp8LinearFunction(torch.autograd.Function):
    """weight [N, K] without group_offsets, [G, N, K] with them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group_offsets: Tensor | None, power_of_2: bool, training: bool
    ) -> Tensor:
        if not training:
            w_q = quantize_128x128(weight, power_of_2_scales=power_of_2)
            return _gemm(quantize_1x128(x, power_of_2_scales=power_of_2), w_q, group_offsets)
        w_q, w_t = quantize_128x128(weight, power_of_2_scales=power_of_2, transpose=True)
        x_data = x_scales = ctx.weight = None
        if ctx.needs_input_grad[1]:
            x_q, x_t = quantize_1x128(
                x, transpose=True, group_offsets=group_offsets, power_of_2_scales=power_of_2
            )
            x_data, x_scales = x_t.data, x_t.scales
            # Not among the saved tensors, which must not change: only its gradient's place is asked for.
            if weight.is_leaf and not torch.compiler.is_compiling():
                ctx.weight = weight
        else:
            x_q = quantize_1x128(x, power_of_2_scales=power_of_2)
        ctx.save_for_backward(w_t.data, w_t.scales, x_data, x_scales, group_offsets)
        ctx.power_of_2 = power_of_2
        return _gemm(x_q, w_q, group_offsets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy, power_of_2 = grad_outputs[0].contiguous(), ctx.power_of_2
        w_data, w_scales, x_data, x_scales, group_offsets = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dy_q = dy_t = dx = dw = None
        if needs_dx and needs_dw:
            dy_q, dy_t = quantize_1x128(
                dy, transpose=True, group_offsets=group_offsets, power_of_2_scales=power_of_2
            )
        elif needs_dx:
            dy_q = quantize_1x128(dy, power_of_2_scales=power_of_2)
        elif needs_dw:
            dy_t = quantize_1x128_t(dy, group_offsets, power_of_2_scales=power_of_2)
        if dy_q is not None:
            dx = _gemm(dy_q, QuantizedTensor(w_data, w_scales, SQUARE), group_offsets)
        if dy_t is not None:
            x_t = QuantizedTensor(x_data, x_scales, ROW)
            dw = _weight_gradient(ctx.weight, dy_t, x_t, group_offsets)
        return dx, dw, None, None, None


def _weight_gradient(
    weight: Tensor | None, dy_t: QuantizedTensor, x_t: QuantizedTensor, group_offsets: Tensor | None
) -> Tensor | None:
    """The gradient for autograd to add to `weight.grad`, or None where it goes elsewhere, now or later."""
    store = active_store()
    if weight is None or (store is None and getattr(weight, "main_grad", None) is None):
        return fp8_wgrad(dy_t, x_t, group_offsets=group_offsets)
    work = functools.partial(_add_gradient, weight, dy_t, x_t, group_offsets)
    if store is None:
        work()
    else:
        store.put(work)
    return None


def _add_gradient(
    weight: Tensor, dy_t: QuantizedTensor, x_t: QuantizedTensor, group_offsets: Tensor | None
) -> None:
    """Into `weight.main_grad` by the kernel, or else into `weight.grad` as autograd would."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None:
        fp8_wgrad(dy_t, x_t, main_grad, accumulate=True, group_offsets=group_offsets)
        return
    dw = fp8_wgrad(dy_t, x_t, group_offsets=group_offsets).to(weight.grad_dtype or torch.float32)
    weight.grad = dw if weight.grad is None else weight.grad.add_(dw)


def _records_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def fp8_linear(x: Tensor, weight: Tensor, *, power_of_2_scales: bool = False) -> Tensor:
    """x · weightᵀ with all three GEMMs in FP8.

    x: [..., K], BF16 or FP32. weight: [N, K], BF16 or FP32. Returns [..., N] in x's dtype (the GEMM rounds to
    BF16). The weight's gradient goes to `weight.main_grad` if it has one; else, where `weight.grad_dtype` is
    float32, `weight.grad` stays FP32.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = _Fp8LinearFunction.apply(rows, weight, None, power_of_2_scales, _records_gradient(x, weight))
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def grouped_fp8_linear(
    x: Tensor, weight: Tensor, group_offsets: Tensor, *, power_of_2_scales: bool = False
) -> Tensor:
    """Rows group_offsets[g] to group_offsets[g + 1] of x times weight[g]ᵀ, all three GEMMs in FP8.

    x: [T, K], BF16 or FP32. weight: [G, N, K]. group_offsets: int32 [G + 1], ascending from 0 to T; empty
    groups are fine. Returns [T, N] in x's dtype.
    """
    training = _records_gradient(x, weight)
    y = _Fp8LinearFunction.apply(x.contiguous(), weight, group_offsets, power_of_2_scales, training)
    return y.to(x.dtype)


def _with_stored(
    x: Tensor, weight: QuantizedTensor, group_offsets: Tensor | None, recipe: Fp8Recipe
) -> Tensor:
    """The forward GEMM with a weight that is kept in FP8. It has no backward."""
    rows = quantize_1x128(x.reshape(-1, x.shape[-1]).contiguous(), power_of_2_scales=recipe.power_of_2_scales)
    return _gemm(rows, weight, group_offsets).to(x.dtype).view(*x.shape[:-1], weight.shape[-2])


def _as_autocast_says(x: Tensor) -> Tensor:
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
        x = _as_autocast_says(x)
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Fp8Linear(Linear, StoresFp8):
    """A drop-in for `nn.Linear` that computes as its `recipe` says; without a bias unless asked."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        recipe: Fp8Recipe = FP8,
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.recipe = recipe

    def product(self, x: Tensor) -> Tensor:
        if self.recipe.precision == "bf16":
            return linear(x, self.dequantized_weight().to(x.dtype))
        stored = self.quantized_weight()
        if stored is not None:
            return _with_stored(x, stored, None, self.recipe)
        return fp8_linear(x, self.weight, power_of_2_scales=self.recipe.power_of_2_scales)

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
        x = _as_autocast_says(x)
        if self.recipe.precision == "bf16":
            return grouped_linear(x, self.dequantized_weight().to(x.dtype), group_offsets)
        stored = self.quantized_weight()
        if stored is not None:
            return _with_stored(x, stored, group_offsets, self.recipe)
        return grouped_fp8_linear(
            x, self.weight, group_offsets, power_of_2_scales=self.recipe.power_of_2_scales
        )

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
