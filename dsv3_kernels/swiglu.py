"""SwiGLU fused with the quantisers around it (DeepSeek-V3 report, section 3.3.3).

The forward writes silu(gate)·up as the operand of the next GEMM. The backward takes x from the FP8 codes
that the forward kept, and writes the gradient as the operands of the two GEMMs before. What lies between,
rounded to BF16, never goes to memory. The sigmoid is `reference.sigmoid`; on a GPU, whose approximations of
2^x and 1/x err in the last bits of FP32, a BF16 value here and there lands on its neighbour.
"""

import functools
import itertools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import checks, launch, quantized, reference
from .jit import Kernel
from .quantized import ROW, TILE, QuantizedTensor, empty_rows, empty_transposed
from .tile import address_of, groups_of, launch_tiles, offsets_arguments, token_tiles

# As in csrc/kernels/swiglu.cuh.
THREADS = 128
BACKWARD_THREADS = 256

Pair = tuple[Tensor, Tensor]


@overload
def swiglu_quantize(
    x: Tensor,
    weights: Tensor | None = ...,
    *,
    transpose: Literal[False] = ...,
    group_offsets: None = ...,
    power_of_2_scales: bool = ...,
) -> QuantizedTensor: ...
@overload
def swiglu_quantize(
    x: Tensor,
    weights: Tensor | None = ...,
    *,
    transpose: Literal[True],
    group_offsets: Tensor | None = ...,
    power_of_2_scales: bool = ...,
) -> tuple[QuantizedTensor, QuantizedTensor]: ...
def swiglu_quantize(
    x: Tensor,
    weights: Tensor | None = None,
    *,
    transpose: bool = False,
    group_offsets: Tensor | None = None,
    power_of_2_scales: bool = False,
) -> QuantizedTensor | tuple[QuantizedTensor, QuantizedTensor]:
    """`quantize_1x128` of y = silu(gate)·up·weight, x = [gate, up] along the last dimension.

    x: bfloat16 `[M, 2·I]`, contiguous, 16-byte aligned, I a multiple of 16.
    weights: float32 `[M]`, contiguous: a factor a row (the routing weight, where it is applied before the
        second GEMM), or None.
    transpose, group_offsets: as in `quantize_1x128`.
    Returns block (1, 128), data `[M, I]`; with `transpose=True` `(q, q_t)`, data of q_t `[I, T]`. The bits
    are those of `quantize_1x128` of y computed in FP32 and rounded once to BF16 (`reference.swiglu`).
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment, device
    or offsets.
    """
    op = "swiglu_quantize"
    both = checks.flag(op, "transpose", transpose)
    checks.tensor(op, "x", x, (torch.bfloat16,), (2,))
    checks.multiple(op, "x", "2·I", x.shape[1], 32)
    checks.contiguous(op, "x", x)
    _check_weights(op, weights, "x", x)
    checks.transposed_groups(op, group_offsets, both, x)
    checks.flag(op, "power_of_2_scales", power_of_2_scales)
    if not both:
        rows: Any = torch.ops.dsv3_kernels.swiglu_quantize if torch.compiler.is_compiling() else _forward
        data, scales = rows(x, weights, power_of_2_scales)
        return QuantizedTensor(data, scales, ROW)
    run: Any = torch.ops.dsv3_kernels.swiglu_quantize_both if torch.compiler.is_compiling() else _forward_both
    data, scales, data_t, scales_t = run(x, weights, group_offsets, power_of_2_scales)
    return QuantizedTensor(data, scales, ROW), QuantizedTensor(data_t, scales_t, ROW)


def _check_weights(op: str, weights: Tensor | None, name: str, rows: Tensor) -> None:
    """One for each row of `rows`, which an error calls `name`."""
    if weights is None:
        return
    checks.tensor(op, "weights", weights, (torch.float32,), (1,))
    checks.same_device(op, "weights", weights, name, rows)
    checks.shape(op, "weights", weights, (rows.shape[0],), "(M,)")
    if not weights.is_contiguous():
        raise ValueError(
            f"{op}: weights has stride {weights.stride()}, expected (1,); pass weights.contiguous()"
        )


def _forward(x: Tensor, weights: Tensor | None, power_of_2_scales: bool) -> Pair:
    if launch.world(x) == "reference":
        q = reference.quantize_1x128(reference.swiglu(x, weights), power_of_2_scales=power_of_2_scales)
    else:
        q = empty_rows((x.shape[0], x.shape[1] // 2), x.device)
        _launch_forward(x, weights, None, q, None, power_of_2_scales)
    return q.data, q.scales


def _forward_both(
    x: Tensor, weights: Tensor | None, group_offsets: Tensor | None, power_of_2_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if launch.world(x) == "reference":
        y = reference.swiglu(x, weights)
        q, q_t = reference.quantize_1x128_both(
            y, group_offsets, power_of_2_scales=power_of_2_scales, op="swiglu_quantize"
        )
    else:
        shape = x.shape[0], x.shape[1] // 2
        q, q_t = empty_rows(shape, x.device), empty_transposed(shape, group_offsets, x.device)
        _launch_forward(x, weights, group_offsets, q, q_t, power_of_2_scales)
    return q.data, q.scales, q_t.data, q_t.scales


def _launch_forward(
    x: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    q: QuantizedTensor,
    q_t: QuantizedTensor | None,
    power_of_2_scales: bool,
) -> None:
    tokens, width = q.shape
    transposed = (0, 0) if q_t is None else (q_t.data, q_t.scales)
    strides = (q.scales.stride(1), 0 if q_t is None else q_t.scales.stride(1))
    arguments = (
        *(x, address_of(weights), *offsets_arguments(group_offsets), q.data, q.scales, *transposed),
        *(tokens, width, groups_of(group_offsets)),
        *(0 if q_t is None else q_t.scales.shape[1], *strides),
    )
    kernel = kernel_forward(power_of_2_scales, q_t is not None)
    down = token_tiles(tokens, group_offsets, rest=True)
    launch_tiles("swiglu_quantize", "x", x, kernel, THREADS, down, width, arguments)


@functools.cache
def kernel_forward(power_of_2_scales: bool, transpose: bool) -> Kernel:
    return Kernel("swiglu.cuh", "swiglu_quantize", (power_of_2_scales, transpose))


@overload
def swiglu_backward_quantize(
    dy: Tensor,
    x: QuantizedTensor,
    group_offsets: Tensor | None = ...,
    *,
    weights: None = ...,
    recompute: Literal[False] = ...,
    power_of_2_scales: bool = ...,
) -> tuple[QuantizedTensor, QuantizedTensor]: ...
@overload
def swiglu_backward_quantize(
    dy: Tensor,
    x: QuantizedTensor,
    group_offsets: Tensor | None = ...,
    *,
    weights: None = ...,
    recompute: Literal[True],
    power_of_2_scales: bool = ...,
) -> tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor]: ...
@overload
def swiglu_backward_quantize(
    dy: Tensor,
    x: QuantizedTensor,
    group_offsets: Tensor | None = ...,
    *,
    weights: Tensor,
    recompute: Literal[False] = ...,
    power_of_2_scales: bool = ...,
) -> tuple[QuantizedTensor, QuantizedTensor, Tensor]: ...
@overload
def swiglu_backward_quantize(
    dy: Tensor,
    x: QuantizedTensor,
    group_offsets: Tensor | None = ...,
    *,
    weights: Tensor,
    recompute: Literal[True],
    power_of_2_scales: bool = ...,
) -> tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor, Tensor]: ...
def swiglu_backward_quantize(
    dy: Tensor,
    x: QuantizedTensor,
    group_offsets: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    recompute: bool = False,
    power_of_2_scales: bool = False,
) -> tuple[QuantizedTensor | Tensor, ...]:
    """The gradient of x = [gate, up] from that of y = silu(gate)·up·weight, quantised in both orientations.

    dy: bfloat16 `[M, I]`, contiguous, 16-byte aligned, I a multiple of 128.
    x: block (1, 128), data `[M, 2·I]`: what the forward kept. Its scales may have any strides.
    group_offsets: as in `quantize_1x128`, for what is transposed.
    weights: float32 `[M]`, contiguous, or None, as the forward took them.
    Returns `(dx, dx_t)`, block (1, 128), data `[M, 2·I]` and `[2·I, T]`: the operands of the input gradient
    and of the weight gradient of the layer that made x. With `recompute=True` `(dx, dx_t, y_t)`: also y, made
    again from x, as `quantize_1x128_t` gives it, data `[I, T]`: the other operand of the weight gradient of
    the layer that took y. The bits are those of the quantisers of `reference.swiglu_backward`.
    With weights the tuple ends with their gradient, float32 `[M]`: the sum of dy·silu(gate)·up over each row,
    in FP32 and in an order that does not change.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, block, stride, alignment,
    device or offsets.
    """
    op = "swiglu_backward_quantize"
    checks.tensor(op, "dy", dy, (torch.bfloat16,), (2,))
    checks.multiple(op, "dy", "I", dy.shape[1], TILE)
    checks.contiguous(op, "dy", dy)
    x = quantized.operand(op, "x", x, ROW, (2,))
    checks.same_device(op, "x.data", x.data, "dy", dy)
    checks.shape(op, "x.data", x.data, (dy.shape[0], 2 * dy.shape[1]), "(M, 2·I)")
    if group_offsets is not None:
        checks.offsets(op, group_offsets, "dy", dy)
    _check_weights(op, weights, "dy", dy)
    checks.flag(op, "power_of_2_scales", power_of_2_scales)
    checks.flag(op, "recompute", recompute)
    run: Any = _backward_y if recompute else _backward
    if torch.compiler.is_compiling():
        ops = torch.ops.dsv3_kernels
        run = ops.swiglu_backward_quantize_y if recompute else ops.swiglu_backward_quantize
    *t, weight_gradients = run(dy, x.data, x.scales, weights, group_offsets, power_of_2_scales)
    quantised = tuple(QuantizedTensor(t[i], t[i + 1], ROW) for i in range(0, len(t), 2))
    return quantised if weights is None else (*quantised, weight_gradients.sum(0))


# The gradient of the weights comes in sums over tiles, `[I/128, M]`, and empty, `[0, M]`, without weights.


def _backward(
    dy: Tensor,
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    power_of_2_scales: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dx_t, _, sums = _run_backward(dy, x, x_scales, weights, group_offsets, power_of_2_scales, False)
    return dx.data, dx.scales, dx_t.data, dx_t.scales, sums


def _backward_y(
    dy: Tensor,
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    power_of_2_scales: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dx_t, y_t, sums = _run_backward(dy, x, x_scales, weights, group_offsets, power_of_2_scales, True)
    return dx.data, dx.scales, dx_t.data, dx_t.scales, y_t.data, y_t.scales, sums


def _empty_sums(dy: Tensor, weights: Tensor | None) -> Tensor:
    tiles = 0 if weights is None else dy.shape[1] // TILE
    return torch.empty((tiles, dy.shape[0]), dtype=torch.float32, device=dy.device)


def _run_backward(
    dy: Tensor,
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    power_of_2_scales: bool,
    recompute: bool,
) -> tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor, Tensor]:
    """dx, dx_t, y_t, which is dx_t where y was not asked for, and the sums."""
    op = "swiglu_backward_quantize"
    sums = _empty_sums(dy, weights)
    if launch.world(dy) == "reference":
        quantise = functools.partial(
            reference.quantize_1x128_both, power_of_2_scales=power_of_2_scales, op=op
        )
        values = reference.dequantize(QuantizedTensor(x, x_scales, ROW))
        sigmoid = reference.sigmoid(values[:, : dy.shape[1]])  # once for both
        d, y = reference.swiglu_backward(dy, values, weights, sigmoid=lambda _: sigmoid)
        if weights is not None:
            sums.copy_(reference.swiglu_weight_gradients(dy, values, sigmoid=lambda _: sigmoid))
        dx, dx_t = quantise(d, group_offsets)
        return dx, dx_t, quantise(y, group_offsets)[1] if recompute else dx_t, sums
    tokens, width = dy.shape
    dx, dx_t = empty_rows(x.shape, x.device), empty_transposed(x.shape, group_offsets, x.device)
    y_t = empty_transposed(dy.shape, group_offsets, x.device) if recompute else dx_t
    arguments = (
        *(dy, x, x_scales, address_of(weights), *offsets_arguments(group_offsets), dx.data, dx.scales),
        *(dx_t.data, dx_t.scales, y_t.data, y_t.scales, sums, tokens, width, groups_of(group_offsets)),
        *(dx_t.scales.shape[1], *x_scales.stride(), dx.scales.stride(1)),
    )
    kernel = kernel_backward(power_of_2_scales, recompute, weights is not None)
    down = token_tiles(tokens, group_offsets, rest=True)
    launch_tiles(op, "dy", dy, kernel, BACKWARD_THREADS, down, width, arguments)
    return dx, dx_t, y_t, sums


@functools.cache
def kernel_backward(power_of_2_scales: bool, recompute: bool, weighted: bool) -> Kernel:
    return Kernel("swiglu.cuh", "swiglu_backward_quantize", (power_of_2_scales, recompute, weighted))


def kernels() -> dict[str, list[Kernel]]:
    """Every instance that an op of this module may launch."""
    flags = (False, True)
    return {
        "swiglu_quantize": [kernel_forward(*facts) for facts in itertools.product(flags, repeat=2)],
        "swiglu_backward_quantize": [kernel_backward(*facts) for facts in itertools.product(flags, repeat=3)],
    }


def _fake_forward(x: Tensor, weights: Tensor | None, power_of_2_scales: bool) -> Pair:
    q = empty_rows((x.shape[0], x.shape[1] // 2), x.device)
    return q.data, q.scales


def _fake_forward_both(
    x: Tensor, weights: Tensor | None, group_offsets: Tensor | None, power_of_2_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_t = empty_transposed((x.shape[0], x.shape[1] // 2), group_offsets, x.device)
    return *_fake_forward(x, weights, power_of_2_scales), q_t.data, q_t.scales


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    power_of_2_scales: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dx_t = empty_rows(x.shape, x.device), empty_transposed(x.shape, group_offsets, x.device)
    return dx.data, dx.scales, dx_t.data, dx_t.scales, _empty_sums(dy, weights)


def _fake_backward_y(
    dy: Tensor,
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    power_of_2_scales: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y_t = empty_transposed(dy.shape, group_offsets, dy.device)
    *dx, sums = _fake_backward(dy, x, x_scales, weights, group_offsets, power_of_2_scales)
    return *dx, y_t.data, y_t.scales, sums  # type: ignore[return-value]


for _name, _op, _fake in (
    ("swiglu_quantize", _forward, _fake_forward),
    ("swiglu_quantize_both", _forward_both, _fake_forward_both),
    ("swiglu_backward_quantize", _backward, _fake_backward),
    ("swiglu_backward_quantize_y", _backward_y, _fake_backward_y),
):
    torch.library.custom_op(f"dsv3_kernels::{_name}", _op, mutates_args=()).register_fake(_fake)
