"""Weights kept in FP8 with their 128x128 scales, as released checkpoints hold them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv3_kernels.quantize import dequantize, quantize_128x128
from dsv3_kernels.quantized import SQUARE, QuantizedTensor


class StoresFp8(nn.Module):
    """A layer with a `weight` [..., N, K] that may be e4m3; its scales are then `weight_scale_inv`.

    Such a layer computes and does not train.
    """

    weight: Tensor
    weight_scale_inv: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight_scale_inv", None)

    def hold_fp8_weight(self, data: Tensor, scales: Tensor) -> None:
        """data: e4m3 [..., N, K]; scales: FP32 [..., ceil(N/128), ceil(K/128)], to multiply codes by."""
        self.weight = nn.Parameter(data, requires_grad=False)
        self.weight_scale_inv = scales

    def quantized_weight(self) -> QuantizedTensor | None:
        """None where the weight is not kept in FP8."""
        if self.weight_scale_inv is None:
            return None
        return QuantizedTensor(self.weight.detach(), self.weight_scale_inv, SQUARE)

    def dequantized_weight(self) -> Tensor:
        """The weight as a matmul outside FP8 reads it: BF16 where it is kept in FP8."""
        stored = self.quantized_weight()
        return self.weight if stored is None else dequantize(stored, torch.bfloat16)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoresFp8":
        """Moves like any module, but a cast leaves codes and scales alone."""
        before = self.quantized_weight()
        super()._apply(fn, recurse)
        if before is not None and self.weight.dtype != before.data.dtype:
            device = self.weight.device
            self.weight = nn.Parameter(before.data.to(device), requires_grad=False)
            self.weight_scale_inv = before.scales.to(device)
        return self


@torch.no_grad()
def store_fp8_weights(model: nn.Module, *, power_of_2_scales: bool = False) -> None:
    """Quantises every FP8 layer's weight once and for all: the same results, without a quantiser a call.

    The model then computes and does not train.
    """
    for module in model.modules():
        if isinstance(module, StoresFp8) and module.weight_scale_inv is None:
            weight = quantize_128x128(module.weight.detach(), power_of_2_scales=power_of_2_scales)
            module.hold_fp8_weight(weight.data, weight.scales)
