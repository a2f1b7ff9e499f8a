"""The quantised operands of a layer's three GEMMs, and the GEMMs."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from dsv3_kernels.gemm import fp8_gemm, grouped_fp8_gemm
from dsv3_kernels.nn.deferred import active_store
from dsv3_kernels.nn.rows import Fp8Rows
from dsv3_kernels.quantize import quantize_1x128, quantize_1x128_t, quantize_128x128, requantize_1x128_t
from dsv3_kernels.quantized import SQUARE, QuantizedTensor
from dsv3_kernels.wgrad import fp8_wgrad


def gemm(a: QuantizedTensor, b: QuantizedTensor, group_offsets: Tensor | None) -> Tensor:
    return fp8_gemm(a, b) if group_offsets is None else grouped_fp8_gemm(a, b, group_offsets)


@overload
def quantized_rows(
    x: Tensor, group_offsets: Tensor | None, power_of_2: bool, retiled: bool, *, transpose: Literal[False]
) -> tuple[QuantizedTensor, None]: ...
@overload
def quantized_rows(
    x: Tensor, group_offsets: Tensor | None, power_of_2: bool, retiled: bool, *, transpose: bool
) -> tuple[QuantizedTensor, QuantizedTensor | None]: ...
def quantized_rows(
    x: Tensor, group_offsets: Tensor | None, power_of_2: bool, retiled: bool, *, transpose: bool
) -> tuple[QuantizedTensor, QuantizedTensor | None]:
    """x `[T, K]` as the operand of a forward or input-gradient GEMM, and with `transpose` of a weight
    gradient, from one read.

    power_of_2: of the scales; retiled: of those of rows that come in FP8 and are re-tiled here.
    """
    if isinstance(x, Fp8Rows):
        transposed = x.transposed
        if transpose and transposed is None:
            transposed = requantize_1x128_t(x.rows, group_offsets, power_of_2_scales=retiled)
        return x.rows, transposed
    x = x.contiguous()
    if not transpose:
        return quantize_1x128(x, power_of_2_scales=power_of_2), None
    return quantize_1x128(x, transpose=True, group_offsets=group_offsets, power_of_2_scales=power_of_2)


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as rows [T, K]."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # a view's backward would dequantise
    return rows if isinstance(rows, Fp8Rows) else rows.contiguous()


def quantized_weight(
    weight: Tensor, power_of_2: bool, keep: bool
) -> tuple[QuantizedTensor, tuple[Tensor, Tensor | None]]:
    """A weight [.., N, K] as the operand of a forward GEMM, and what `transposed_weight` takes in the
    backward: with `keep` its transpose, codes and scales; else the weight itself.
    """
    if not keep:
        return quantize_128x128(weight, power_of_2_scales=power_of_2), (weight, None)
    if torch.compiler.is_compiling() or _constant is None or not weight.is_leaf:
        q, q_t = quantize_128x128(weight, power_of_2_scales=power_of_2, transpose=True)
    else:
        known = _constant.get(id(weight))
        if known is None or (known.version, known.power_of_2) != (weight._version, power_of_2):
            pair = quantize_128x128(weight, power_of_2_scales=power_of_2, transpose=True)
            known = _constant[id(weight)] = _Constant(weight, weight._version, power_of_2, *pair)
        q, q_t = known.q, known.q_t
    return q, (q_t.data, q_t.scales)


class _Constant(NamedTuple):
    """A weight's two quantised forms. It is held too, so that its id stays its own."""

    weight: Tensor
    version: int
    power_of_2: bool
    q: QuantizedTensor
    q_t: QuantizedTensor


_constant: dict[int, _Constant] | None = None


@contextlib.contextmanager
def constant_weights() -> Iterator[None]:
    """Inside, a weight is quantised once for all micro-batches: until it changes, they share the results.

    So the backwards under way keep one transpose of it, and not one each.
    """
    global _constant
    before, _constant = _constant, {}
    try:
        yield
    finally:
        _constant = before


def transposed_weight(kept: Tensor, scales: Tensor | None, power_of_2: bool) -> QuantizedTensor:
    """The operand of an input-gradient GEMM."""
    if scales is not None:
        return QuantizedTensor(kept, scales, SQUARE)
    return quantize_128x128(kept, power_of_2_scales=power_of_2, transpose=True)[1]


def transposed_rows(
    x: Tensor, group_offsets: Tensor | None, power_of_2: bool, retiled: bool
) -> QuantizedTensor:
    """x `[T, K]` as the operand of a weight gradient only."""
    if isinstance(x, Fp8Rows):
        return x.transposed or requantize_1x128_t(x.rows, group_offsets, power_of_2_scales=retiled)
    return quantize_1x128_t(x.contiguous(), group_offsets, power_of_2_scales=power_of_2)


def records_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def place_of_gradient(weight: Tensor) -> Tensor | None:
    """The weight itself, to ask in the backward where its gradient goes; None where autograd takes it.

    Not among the saved tensors, which must not change.
    """
    return weight if weight.is_leaf and not torch.compiler.is_compiling() else None


def weight_gradient(
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
