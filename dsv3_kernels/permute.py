"""Tokens into the order of the experts, quantised on the way; the experts' outputs back to their tokens."""

import functools
import itertools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import checks, launch, reference
from .jit import Kernel
from .quantized import ROW, QuantizedTensor, empty_both
from .tile import (
    NAMES,
    SCALINGS,
    address_of,
    groups_of,
    launch_tiles,
    offsets_arguments,
    template,
    threads_of,
    token_tiles,
)

# As in csrc/kernels/permute.cuh.
THREADS = 256
COLUMNS_OF_WARP = 256
MAX_GRID = 4096  # blocks of unpermute; each takes as many rows as it must
LOADS_IN_FLIGHT = 4


@overload
def permute_quantize(
    x: Tensor,
    index: Tensor,
    *,
    transpose: Literal[False] = ...,
    group_offsets: None = ...,
    power_of_2_scales: bool = ...,
    ue8m0_scales: bool = ...,
) -> QuantizedTensor: ...
@overload
def permute_quantize(
    x: Tensor,
    index: Tensor,
    *,
    transpose: Literal[True],
    group_offsets: Tensor | None = ...,
    power_of_2_scales: bool = ...,
    ue8m0_scales: bool = ...,
) -> tuple[QuantizedTensor, QuantizedTensor]: ...
def permute_quantize(
    x: Tensor,
    index: Tensor,
    *,
    transpose: bool = False,
    group_offsets: Tensor | None = None,
    power_of_2_scales: bool = False,
    ue8m0_scales: bool = False,
) -> QuantizedTensor | tuple[QuantizedTensor, QuantizedTensor]:
    """`quantize_1x128` of rows of x in another order: row r is `x[index[r]]`, or zeros where index[r] is -1.

    x: bfloat16, float16 or float32 `[tokens, K]`, contiguous, 16-byte aligned, K a multiple of 16.
    index: int32 `[R]`, -1 to tokens - 1; a row of x may occur any number of times, as a token that goes to
        several experts does.
    transpose, group_offsets, power_of_2_scales, ue8m0_scales: as in `quantize_1x128`, of the result: its rows
        group_offsets[g] to group_offsets[g + 1] are those of group g.
    Returns block (1, 128), data `[R, K]`; with `transpose=True` `(q, q_t)`, data of q_t `[K, T]`.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment, device,
    index or offsets. An index on a GPU is not read back; there the kernel takes one out of range as -1.
    """
    op = "permute_quantize"
    both = checks.flag(op, "transpose", transpose)
    checks.tensor(op, "x", x, tuple(NAMES), (2,))
    checks.multiple(op, "x", "K", x.shape[1], 16)
    checks.contiguous(op, "x", x)
    checks.index_vector(op, "index", index, "x", x)
    checks.transposed_groups(op, group_offsets, both, x)
    checks.flag(op, "power_of_2_scales", power_of_2_scales)
    checks.flag(op, "ue8m0_scales", ue8m0_scales)
    run: Any = torch.ops.dsv3_kernels.permute_quantize if torch.compiler.is_compiling() else _permute
    data, scales, data_t, scales_t = run(x, index, group_offsets, both, power_of_2_scales, ue8m0_scales)
    q = QuantizedTensor(data, scales, ROW)
    return (q, QuantizedTensor(data_t, scales_t, ROW)) if both else q


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _permute(
    x: Tensor,
    index: Tensor,
    group_offsets: Tensor | None,
    transpose: bool,
    power_of_2_scales: bool,
    ue8m0_scales: bool,
) -> Four:
    op, shape = "permute_quantize", (index.shape[0], x.shape[1])
    q, q_t = empty_both(shape, transpose, group_offsets, x.device, ue8m0_scales)
    if launch.world(x) == "reference":
        rows = reference.permute(x, index, op=op)
        options = {"power_of_2_scales": power_of_2_scales, "ue8m0_scales": ue8m0_scales}
        q = reference.quantize_1x128(rows, **options)
        if transpose:
            q_t = reference.quantize_1x128_t(rows, group_offsets, **options, op=op)
    else:
        arguments = (
            *(x, index, *offsets_arguments(group_offsets), q.data, q.scales, q_t.data, q_t.scales),
            *(x.shape[0], *shape, groups_of(group_offsets)),
            *(q_t.scales.shape[1], q.scales.stride(1), q_t.scales.stride(1)),
        )
        kernel = kernel_permute(x.dtype, power_of_2_scales, ue8m0_scales, transpose)
        down = token_tiles(shape[0], group_offsets, rest=True)
        launch_tiles(op, "index", index, kernel, threads_of(x.dtype), down, shape[1], arguments)
    return q.data, q.scales, q_t.data, q_t.scales


@functools.cache
def kernel_permute(
    dtype: torch.dtype, power_of_2_scales: bool, ue8m0_scales: bool, transpose: bool
) -> Kernel:
    rest = template(power_of_2_scales, ue8m0_scales, transpose)
    return Kernel("permute.cuh", "permute_quantize", (NAMES[dtype], *rest))


def unpermute(rows: Tensor, slots: Tensor, weights: Tensor | None = None) -> Tensor:
    """Each token's rows, weighted and summed: `y[t] = Σ_k weights[t, k]·rows[slots[t, k]]`.

    rows: bfloat16 `[R, H]`, contiguous, 16-byte aligned, H a multiple of 8: the experts' outputs.
    slots: int32 `[tokens, K]`, contiguous, -1 to R - 1; -1 is left out. weights: float32 `[tokens, K]`,
        contiguous, or None for ones.
    Returns bfloat16 `[tokens, H]`: products and sums in FP32, each rounded, k ascending (a token's experts in
    ascending order, where its slots are), rounded once to BF16. A token without rows is 0.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment, device
    or slot. Slots on a GPU are not read back; there the kernel leaves out one that is out of range.
    """
    op = "unpermute"
    checks.tensor(op, "rows", rows, (torch.bfloat16,), (2,))
    checks.multiple(op, "rows", "H", rows.shape[1], 8)
    checks.contiguous(op, "rows", rows)
    checks.tensor(op, "slots", slots, (torch.int32,), (2,))
    checks.same_device(op, "slots", slots, "rows", rows)
    checks.contiguous(op, "slots", slots)
    if weights is not None:
        checks.tensor(op, "weights", weights, (torch.float32,), (2,))
        checks.same_device(op, "weights", weights, "rows", rows)
        checks.shape(op, "weights", weights, tuple(slots.shape), "(tokens, K)")
        checks.contiguous(op, "weights", weights)
    run = torch.ops.dsv3_kernels.unpermute if torch.compiler.is_compiling() else _unpermute
    return run(rows, slots, weights)


def _unpermute(rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    if launch.world(rows) == "reference":
        return reference.unpermute(rows, slots, weights)
    y = _fake_unpermute(rows, slots, weights)
    (tokens, top_k), (count, width) = slots.shape, rows.shape
    warps = tokens * checks.ceil_div(width, COLUMNS_OF_WARP)
    if warps:
        grid = min(checks.ceil_div(warps, THREADS // 32), MAX_GRID)
        arguments = (rows, slots, address_of(weights), y, count, tokens, top_k, width)
        launch.launch(KERNEL_UNPERMUTE, (grid, 1, 1), (THREADS, 1, 1), arguments)
    return y


KERNEL_UNPERMUTE = Kernel("permute.cuh", "unpermute", (LOADS_IN_FLIGHT,))


def kernels() -> dict[str, list[Kernel]]:
    """Every instance that an op of this module may launch."""
    permuting = itertools.product(NAMES, SCALINGS, (False, True))
    return {
        "permute_quantize": [kernel_permute(dtype, *s, transpose) for dtype, s, transpose in permuting],
        "unpermute": [KERNEL_UNPERMUTE],
    }


def _fake_permute(
    x: Tensor,
    index: Tensor,
    group_offsets: Tensor | None,
    transpose: bool,
    power_of_2_scales: bool,
    ue8m0_scales: bool,
) -> Four:
    q, q_t = empty_both((index.shape[0], x.shape[1]), transpose, group_offsets, x.device, ue8m0_scales)
    return q.data, q.scales, q_t.data, q_t.scales


def _fake_unpermute(rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    return torch.empty(slots.shape[0], rows.shape[1], dtype=torch.bfloat16, device=rows.device)


for _name, _op, _fake in (
    ("permute_quantize", _permute, _fake_permute),
    ("unpermute", _unpermute, _fake_unpermute),
):
    torch.library.custom_op(f"dsv3_kernels::{_name}", _op, mutates_args=()).register_fake(_fake)
