"""SwiGLU fused with the quantisers around it (DeepSeek-V3 report, section 3.3.3).

The forward writes silu(gate)·up as the operand of the next GEMM. The backward takes x from the FP8 codes
that the forward kept, and writes the gradient as the operands of the two GEMMs before. What lies between,
rounded to BF16, never goes to memory. The sigmoid is `reference.sigmoid`; on a GPU, whose approximations of
2^x and 1/x err in the last bits of FP32, a BF16 value here and there lands on its neighbour.
"""

import functools
import itertools
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks, launch, quantized, reference
from .jit import Kernel
from .quantized import ROW, TILE, QuantizedTensor, empty_both, empty_transposed
from .tile import SCALINGS, address_of, groups_of, launch_tiles, offsets_arguments, template, token_tiles

# As in csrc/kernels/swiglu.cuh.
THREADS = 128
BACKWARD_THREADS = 256

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@overload
def swiglu_quantize(
    x: Tensor,
    weights: Tensor | None = ...,
    *,
    transpose: Literal[False] = ...,
    group_offsets: None = ...,
    power_of_2_scales: bool = ...,
    ue8m0_scales: bool = ...,
) -> QuantizedTensor: ...
@overload
def swiglu_quantize(
    x: Tensor,
    weights: Tensor | None = ...,
    *,
    transpose: Literal[True],
    group_offsets: Tensor | None = ...,
    power_of_2_scales: bool = ...,
    ue8m0_scales: bool = ...,
) -> tuple[QuantizedTensor, QuantizedTensor]: ...
def swiglu_quantize(
    x: Tensor,
    weights: Tensor | None = None,
    *,
    transpose: bool = False,
    group_offsets: Tensor | None = None,
    power_of_2_scales: bool = False,
    ue8m0_scales: bool = False,
) -> QuantizedTensor | tuple[QuantizedTensor, QuantizedTensor]:
    """`quantize_1x128` of y = silu(gate)·up·weight, x = [gate, up] along the last dimension.

    x: bfloat16 `[M, 2·I]`, contiguous, 16-byte aligned, I a multiple of 16.
    weights: float32 `[M]`, contiguous: a factor a row (the routing weight, where it is applied before the
        second GEMM), or None.
    transpose, group_offsets, power_of_2_scales, ue8m0_scales: as in `quantize_1x128`.
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
    checks.flag(op, "ue8m0_scales", ue8m0_scales)
    run: Any = torch.ops.dsv3_kernels.swiglu_quantize if torch.compiler.is_compiling() else _forward
    data, scales, data_t, scales_t = run(x, weights, group_offsets, both, power_of_2_scales, ue8m0_scales)
    q = QuantizedTensor(data, scales, ROW)
    return (q, QuantizedTensor(data_t, scales_t, ROW)) if both else q


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


def _forward(
    x: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    transpose: bool,
    power_of_2_scales: bool,
    ue8m0_scales: bool,
) -> Four:
    op = "swiglu_quantize"
    q, q_t = _empty_forward(x, transpose, group_offsets, ue8m0_scales)
    if launch.world(x) == "reference":
        y = reference.swiglu(x, weights)
        options = {"power_of_2_scales": power_of_2_scales, "ue8m0_scales": ue8m0_scales}
        q = reference.quantize_1x128(y, **options)
        if transpose:
            q_t = reference.quantize_1x128_t(y, group_offsets, **options, op=op)
    else:
        tokens, width = q.shape
        arguments = (
            *(x, address_of(weights), *offsets_arguments(group_offsets)),
            *(q.data, q.scales, q_t.data, q_t.scales, tokens, width, groups_of(group_offsets)),
            *(q_t.scales.shape[1], q.scales.stride(1), q_t.scales.stride(1)),
        )
        kernel = kernel_forward(power_of_2_scales, ue8m0_scales, transpose)
        down = token_tiles(tokens, group_offsets, rest=True)
        launch_tiles(op, "x", x, kernel, THREADS, down, width, arguments)
    return q.data, q.scales, q_t.data, q_t.scales


def _empty_forward(
    x: Tensor, transpose: bool, group_offsets: Tensor | None, ue8m0_scales: bool
) -> tuple[QuantizedTensor, QuantizedTensor]:
    return empty_both((x.shape[0], x.shape[1] // 2), transpose, group_offsets, x.device, ue8m0_scales)


@functools.cache
def kernel_forward(power_of_2_scales: bool, ue8m0_scales: bool, transpose: bool) -> Kernel:
    return Kernel("swiglu.cuh", "swiglu_quantize", template(power_of_2_scales, ue8m0_scales, transpose))


class SwigluGradient(NamedTuple):
    """Operands of the GEMMs of SwiGLU's backward, each of block (1, 128); for I and T see the op."""

    dx: QuantizedTensor
    """data [M, 2·I]: of the input gradient of the layer that made x."""
    dx_t: QuantizedTensor
    """data [2·I, T]: of the weight gradient of that layer."""
    y_t: QuantizedTensor | None
    """data [I, T]: of the weight gradient of the layer that took y; None unless asked for."""
    weights: Tensor | None
    """float32 [M]: the gradient of the weights; None without them."""


def swiglu_backward_quantize(
    dy: Tensor,
    x: QuantizedTensor,
    group_offsets: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    recompute: bool = False,
    power_of_2_scales: bool = False,
    ue8m0_scales: bool = False,
) -> SwigluGradient:
    """The gradient of x = [gate, up] from that of y = silu(gate)·up·weight, quantised in both orientations.

    dy: bfloat16 `[M, I]`, contiguous, 16-byte aligned, I a multiple of 128.
    x: block (1, 128), data `[M, 2·I]`: what the forward kept. Its scales may have any strides.
    group_offsets: as in `quantize_1x128`, for what is transposed.
    weights: float32 `[M]`, contiguous, or None, as the forward took them.
    recompute: y is made again from x, and given as `quantize_1x128_t` gives it.
    power_of_2_scales, ue8m0_scales: as in `quantize_1x128`, of all that is returned.
    Returns dx quantised in both orientations and, where asked for, y: bit for bit what the quantisers make of
    `reference.swiglu_backward`. The gradient of the weights is the sum of dy·silu(gate)·up over each row, in
    FP32 and in an order that does not change.
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
    checks.flag(op, "ue8m0_scales", ue8m0_scales)
    checks.flag(op, "recompute", recompute)
    run: Any = torch.ops.dsv3_kernels.swiglu_backward_quantize if torch.compiler.is_compiling() else _backward
    *t, sums = run(dy, x.data, x.scales, weights, group_offsets, recompute, power_of_2_scales, ue8m0_scales)
    dx, dx_t, y_t = (QuantizedTensor(t[i], t[i + 1], ROW) for i in (0, 2, 4))
    return SwigluGradient(dx, dx_t, y_t if recompute else None, None if weights is None else sums.sum(0))


Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _backward(
    dy: Tensor,
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    recompute: bool,
    power_of_2_scales: bool,
    ue8m0_scales: bool,
) -> Seven:
    op = "swiglu_backward_quantize"
    dx, dx_t, y_t, sums = _empty_backward(dy, x, weights, group_offsets, recompute, ue8m0_scales)
    if launch.world(dy) == "reference":
        values = reference.dequantize(QuantizedTensor(x, x_scales, ROW))
        sigmoid = reference.sigmoid(values[:, : dy.shape[1]])  # once for both
        d, y = reference.swiglu_backward(dy, values, weights, sigmoid=lambda _: sigmoid)
        if weights is not None:
            sums.copy_(reference.swiglu_weight_gradients(dy, values, sigmoid=lambda _: sigmoid))
        options = {"power_of_2_scales": power_of_2_scales, "ue8m0_scales": ue8m0_scales}
        dx, dx_t = reference.quantize_1x128_both(d, group_offsets, **options, op=op)
        if recompute:
            y_t = reference.quantize_1x128_t(y, group_offsets, **options, op=op)
    else:
        tokens, width = dy.shape
        arguments = (
            *(dy, x, x_scales, address_of(weights), *offsets_arguments(group_offsets), dx.data, dx.scales),
            *(dx_t.data, dx_t.scales, y_t.data, y_t.scales, sums, tokens, width, groups_of(group_offsets)),
            *(dx_t.scales.shape[1], *x_scales.stride(), dx.scales.stride(1)),
        )
        kernel = kernel_backward(power_of_2_scales, ue8m0_scales, recompute, weights is not None)
        down = token_tiles(tokens, group_offsets, rest=True)
        launch_tiles(op, "dy", dy, kernel, BACKWARD_THREADS, down, width, arguments)
    return dx.data, dx.scales, dx_t.data, dx_t.scales, y_t.data, y_t.scales, sums


def _empty_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    recompute: bool,
    ue8m0_scales: bool,
) -> tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor, Tensor]:
    """dx, dx_t, y_t without rows unless asked for, and the gradient of the weights in sums over tiles,
    `[I/128, M]`, or `[0, M]` without weights."""
    tokens, width = dy.shape
    dx, dx_t = empty_both(x.shape, True, group_offsets, x.device, ue8m0_scales)
    y_t = empty_transposed((tokens, width if recompute else 0), group_offsets, x.device, ue8m0_scales)
    tiles = 0 if weights is None else width // TILE
    sums = torch.empty((tiles, tokens), dtype=torch.float32, device=dy.device)
    return dx, dx_t, y_t, sums


@functools.cache
def kernel_backward(power_of_2_scales: bool, ue8m0_scales: bool, recompute: bool, weighted: bool) -> Kernel:
    rest = template(power_of_2_scales, ue8m0_scales, recompute, weighted)
    return Kernel("swiglu.cuh", "swiglu_backward_quantize", rest)


def kernels() -> dict[str, list[Kernel]]:
    """Every instance that an op of this module may launch."""
    flags = (False, True)
    backward = itertools.product(SCALINGS, flags, flags)
    return {
        "swiglu_quantize": [kernel_forward(*s, t) for s, t in itertools.product(SCALINGS, flags)],
        "swiglu_backward_quantize": [kernel_backward(*s, *more) for s, *more in backward],
    }


def _fake_forward(
    x: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    transpose: bool,
    power_of_2_scales: bool,
    ue8m0_scales: bool,
) -> Four:
    q, q_t = _empty_forward(x, transpose, group_offsets, ue8m0_scales)
    return q.data, q.scales, q_t.data, q_t.scales


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor | None,
    group_offsets: Tensor | None,
    recompute: bool,
    power_of_2_scales: bool,
    ue8m0_scales: bool,
) -> Seven:
    dx, dx_t, y_t, sums = _empty_backward(dy, x, weights, group_offsets, recompute, ue8m0_scales)
    return dx.data, dx.scales, dx_t.data, dx_t.scales, y_t.data, y_t.scales, sums


for _name, _op, _fake in (
    ("swiglu_quantize", _forward, _fake_forward),
    ("swiglu_backward_quantize", _backward, _fake_backward),
):
    torch.library.custom_op(f"dsv3_kernels::{_name}", _op, mutates_args=()).register_fake(_fake)
