"""Quantisation to e4m3 with one scale a tile (DeepSeek-V3 report, section 3.3.2).

`scale = amax/448` of the tile, in FP32, at least 2^-126, and 1 for a tile of zeros; `data = e4m3(x/scale)`,
round to nearest even, saturating. `power_of_2_scales=True` rounds the scale up to a power of two (exact in
UE8M0). `ue8m0_scales=True` does that too and gives the scales as float8_e8m0fnu, a byte each, strides as in
FP32: every op takes such an operand, and first turns its scales into FP32, exactly, by one small PyTorch
operation. A NaN or an Inf in a tile makes the scale NaN or Inf, so the whole tile dequantises to NaN: never a
silent finite value. An input that requires grad is refused while gradients are recorded.
"""

import functools
import itertools
from typing import Literal, overload

import torch
from torch import Tensor

from . import checks, launch, quantized, reference
from .jit import Kernel
from .quantized import (
    ROW,
    SQUARE,
    TILE,
    QuantizedTensor,
    empty_rows,
    empty_transposed,
    scale_dtype,
    scales_shape,
)
from .tile import (
    NAMES,
    SCALINGS,
    groups_of,
    launch_tiles,
    offsets_arguments,
    template,
    threads_of,
    token_tiles,
)

_DEQUANTIZED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# As in csrc/kernels/quantize.cuh.
THREADS = 256
ROWS_PER_WARP = 32
MAX_TASKS = 2**31
MAX_GRID = 4096  # blocks; a few waves on any GPU, and each block takes as many tasks as it must


@overload
def quantize_1x128(
    x: Tensor,
    *,
    transpose: Literal[False] = ...,
    group_offsets: None = ...,
    power_of_2_scales: bool = ...,
    ue8m0_scales: bool = ...,
) -> QuantizedTensor: ...
@overload
def quantize_1x128(
    x: Tensor,
    *,
    transpose: Literal[True],
    group_offsets: Tensor | None = ...,
    power_of_2_scales: bool = ...,
    ue8m0_scales: bool = ...,
) -> tuple[QuantizedTensor, QuantizedTensor]: ...
def quantize_1x128(
    x: Tensor,
    *,
    transpose: bool = False,
    group_offsets: Tensor | None = None,
    power_of_2_scales: bool = False,
    ue8m0_scales: bool = False,
) -> QuantizedTensor | tuple[QuantizedTensor, QuantizedTensor]:
    """Quantise activations or gradients in tiles of 1x128 along the last dimension.

    x: bfloat16, float16 or float32 `[M, K]` or `[G, M, K]`, contiguous, 16-byte aligned, K a multiple of 16;
        with `transpose` `[M, K]`.
    Returns block (1, 128): data `[.., M, K]`, scales `[.., M, ceil(K/128)]` with strides
    `(.., 1, round_up(M, 4))`. With `transpose=True` returns `(q, q_t)`, where `q_t` is
    `quantize_1x128_t(x, group_offsets)`, bit for bit: the operands of a GEMM and of the weight gradient,
    from one read of x. `q` holds all rows, those past the last group too.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment, device
    or offsets. Offsets on a GPU are not read back; there the kernel clamps them to M, rows that wrong
    offsets leave to no group stay unwritten, and the next launch or `synchronize()` raises DeviceValueError.
    """
    op = "quantize_1x128"
    both = checks.flag(op, "transpose", transpose)
    checks.tensor(op, "x", x, tuple(NAMES), (2,) if both else (2, 3))
    checks.multiple(op, "x", "K", x.shape[-1], 16)
    checks.contiguous(op, "x", x)
    checks.transposed_groups(op, group_offsets, both, x)
    checks.flag(op, "power_of_2_scales", power_of_2_scales)
    checks.flag(op, "ue8m0_scales", ue8m0_scales)
    if both:
        if not torch.compiler.is_compiling():
            return _quantize_1x128_both(x, group_offsets, power_of_2_scales, ue8m0_scales)
        tensors = torch.ops.dsv3_kernels.quantize_1x128_both(
            x, group_offsets, power_of_2_scales, ue8m0_scales
        )
        data, scales, data_t, scales_t = tensors
        return QuantizedTensor(data, scales, ROW), QuantizedTensor(data_t, scales_t, ROW)
    if torch.compiler.is_compiling():
        data, scales = torch.ops.dsv3_kernels.quantize_1x128(x, power_of_2_scales, ue8m0_scales)
        return QuantizedTensor(data, scales, ROW)
    return _quantize_1x128(x, power_of_2_scales, ue8m0_scales)


def _quantize_1x128(x: Tensor, power_of_2_scales: bool, ue8m0_scales: bool) -> QuantizedTensor:
    if launch.world(x) == "reference":
        return reference.quantize_1x128(x, power_of_2_scales=power_of_2_scales, ue8m0_scales=ue8m0_scales)
    rows, width = x.shape[-2:]
    batches = x.shape[0] if x.ndim == 3 else 1
    tasks = batches * checks.ceil_div(rows, ROWS_PER_WARP) * checks.ceil_div(width, TILE)
    if tasks > MAX_TASKS:
        raise ValueError(
            f"quantize_1x128: x of shape {tuple(x.shape)} has {tasks} blocks of {ROWS_PER_WARP}x{TILE}, "
            f"expected at most {MAX_TASKS}; split it"
        )
    q = empty_rows(x.shape, x.device, ue8m0_scales)
    if tasks:
        grid = min(checks.ceil_div(tasks, THREADS // 32), MAX_GRID)
        strides = (rows * width, width, q.scales.stride(0) if x.ndim == 3 else 0, q.scales.stride(-1))
        arguments = (x, q.data, q.scales, batches, rows, width, *strides)
        kernel = kernel_1x128(x.dtype, power_of_2_scales, ue8m0_scales)
        launch.launch(kernel, (grid, 1, 1), (THREADS, 1, 1), arguments)
    return q


@functools.cache
def kernel_1x128(dtype: torch.dtype, power_of_2_scales: bool, ue8m0_scales: bool = False) -> Kernel:
    """The instance of csrc/kernels/quantize.cuh for an input of `dtype`."""
    rest = template(power_of_2_scales, ue8m0_scales)
    return Kernel("quantize.cuh", "quantize_1x128", (NAMES[dtype], *rest))


def quantize_1x128_t(
    x: Tensor,
    group_offsets: Tensor | None = None,
    *,
    power_of_2_scales: bool = False,
    ue8m0_scales: bool = False,
) -> QuantizedTensor:
    """Quantise the transpose of `x` in tiles of 128 tokens: an operand of `fp8_wgrad`.

    x: bfloat16, float16 or float32 `[tokens, width]`, contiguous, 16-byte aligned, width a multiple of 8.
    group_offsets: int32 `[G+1]`, running sum of group sizes from 0 to at most tokens; rows past it are left
        out.
    Returns block (1, 128) whose rows are features: data `[width, T]`, scales `[width, T/128]` with strides
    `(1, round_up(width, 4))`, where T = 128·floor((tokens + 127·G)/128), G = 1 without groups. Tiles restart
    at each group: group g begins at column 128·Σ_{i<g} ceil(n_i/128). Columns past a group's end are zero;
    a tile of zeros has scale 1.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment, device
    or offsets. Offsets on a GPU are not read back; there the kernel clamps them to tokens, and the next
    launch or `synchronize()` raises DeviceValueError.
    """
    op = "quantize_1x128_t"
    checks.tensor(op, "x", x, tuple(NAMES), (2,))
    checks.multiple(op, "x", "width", x.shape[-1], 8)
    checks.contiguous(op, "x", x)
    if group_offsets is not None:
        checks.offsets(op, group_offsets, "x", x)
    checks.flag(op, "power_of_2_scales", power_of_2_scales)
    checks.flag(op, "ue8m0_scales", ue8m0_scales)
    if torch.compiler.is_compiling():
        data, scales = torch.ops.dsv3_kernels.quantize_1x128_t(
            x, group_offsets, power_of_2_scales, ue8m0_scales
        )
        return QuantizedTensor(data, scales, ROW)
    return _quantize_1x128_t(x, group_offsets, power_of_2_scales, ue8m0_scales)


def _quantize_1x128_t(
    x: Tensor, group_offsets: Tensor | None, power_of_2_scales: bool, ue8m0_scales: bool
) -> QuantizedTensor:
    if launch.world(x) == "reference":
        return reference.quantize_1x128_t(
            x, group_offsets, power_of_2_scales=power_of_2_scales, ue8m0_scales=ue8m0_scales
        )
    q_t = empty_transposed(x.shape, group_offsets, x.device, ue8m0_scales)
    _launch_1x128_t("quantize_1x128_t", x, group_offsets, None, q_t, power_of_2_scales, ue8m0_scales)
    return q_t


def _quantize_1x128_both(
    x: Tensor, group_offsets: Tensor | None, power_of_2_scales: bool, ue8m0_scales: bool
) -> tuple[QuantizedTensor, QuantizedTensor]:
    if launch.world(x) == "reference":
        return reference.quantize_1x128_both(
            x, group_offsets, power_of_2_scales=power_of_2_scales, ue8m0_scales=ue8m0_scales
        )
    q = empty_rows(x.shape, x.device, ue8m0_scales)
    q_t = empty_transposed(x.shape, group_offsets, x.device, ue8m0_scales)
    _launch_1x128_t("quantize_1x128", x, group_offsets, q, q_t, power_of_2_scales, ue8m0_scales)
    return q, q_t


def _launch_1x128_t(
    op: str,
    x: Tensor,
    group_offsets: Tensor | None,
    q: QuantizedTensor | None,
    q_t: QuantizedTensor,
    power_of_2_scales: bool,
    ue8m0_scales: bool,
) -> None:
    tokens, width = x.shape
    rows = (0, 0, 0) if q is None else (q.data, q.scales, q.scales.stride(1))
    arguments = (
        *(x, *offsets_arguments(group_offsets), *rows[:2], q_t.data, q_t.scales, tokens, width),
        *(groups_of(group_offsets), q_t.scales.shape[1], rows[2], q_t.scales.stride(1)),
    )
    kernel = kernel_1x128_t(x.dtype, power_of_2_scales, q is not None, ue8m0_scales)
    down = token_tiles(tokens, group_offsets, q is not None)
    launch_tiles(op, "x", x, kernel, threads_of(x.dtype), down, width, arguments)


@functools.cache
def kernel_1x128_t(
    dtype: torch.dtype, power_of_2_scales: bool, row_wise: bool = False, ue8m0_scales: bool = False
) -> Kernel:
    """The instance of csrc/kernels/quantize_tile.cuh for an input of `dtype`."""
    rest = template(power_of_2_scales, ue8m0_scales, row_wise)
    return Kernel("quantize_tile.cuh", "quantize_1x128_t", (NAMES[dtype], *rest))


def requantize_1x128_t(
    q: QuantizedTensor,
    group_offsets: Tensor | None = None,
    *,
    power_of_2_scales: bool = False,
    ue8m0_scales: bool = False,
) -> QuantizedTensor:
    """Turn tiles of 1x128 into tiles of 128 tokens: what was kept of the forward becomes an operand of
    `fp8_wgrad` (DeepSeek-V3 report, section 3.3.3).

    q: block (1, 128), data `[tokens, width]`, width a multiple of 16; a (data, scales) tuple is taken too.
        Its scales may have any strides.
    group_offsets, the result and the errors: as in `quantize_1x128_t`, of the FP32 values of `dequantize(q)`.
    Every value is rounded a second time. With power-of-two scales before and after it hardly moves: a value
    of at least 2^-6 of its new scale stays as it was, and a smaller one moves by at most 2^-10 of it.
    """
    op = "requantize_1x128_t"
    q = quantized.operand(op, "q", q, ROW, (2,))
    checks.multiple(op, "q.data", "width", q.shape[-1], 16)
    if group_offsets is not None:
        checks.offsets(op, group_offsets, "q.data", q.data)
    checks.flag(op, "power_of_2_scales", power_of_2_scales)
    checks.flag(op, "ue8m0_scales", ue8m0_scales)
    arguments = (q.data, q.scales, group_offsets, power_of_2_scales, ue8m0_scales)
    if torch.compiler.is_compiling():
        data, scales = torch.ops.dsv3_kernels.requantize_1x128_t(*arguments)
    else:
        data, scales = _requantize_1x128_t(*arguments)
    return QuantizedTensor(data, scales, ROW)


def _requantize_1x128_t(
    data: Tensor, scales: Tensor, group_offsets: Tensor | None, power_of_2_scales: bool, ue8m0_scales: bool
) -> tuple[Tensor, Tensor]:
    if launch.world(data) == "reference":
        q = reference.requantize_1x128_t(
            QuantizedTensor(data, scales, ROW),
            group_offsets,
            power_of_2_scales=power_of_2_scales,
            ue8m0_scales=ue8m0_scales,
        )
        return q.data, q.scales
    tokens, width = data.shape
    q_t = empty_transposed(data.shape, group_offsets, data.device, ue8m0_scales)
    token_tiles_t = q_t.scales.shape[1]
    arguments = (
        *(data, scales, *offsets_arguments(group_offsets), q_t.data, q_t.scales, tokens, width),
        *(groups_of(group_offsets), token_tiles_t, *scales.stride(), q_t.scales.stride(1)),
    )
    kernel, threads = kernel_requantize(power_of_2_scales, ue8m0_scales), threads_of(data.dtype)
    launch_tiles("requantize_1x128_t", "q.data", data, kernel, threads, token_tiles_t, width, arguments)
    return q_t.data, q_t.scales


@functools.cache
def kernel_requantize(power_of_2_scales: bool, ue8m0_scales: bool = False) -> Kernel:
    """The instance of csrc/kernels/quantize_tile.cuh that takes codes."""
    return Kernel("quantize_tile.cuh", "requantize_1x128_t", template(power_of_2_scales, ue8m0_scales))


@overload
def quantize_128x128(
    w: Tensor, *, power_of_2_scales: bool = ..., ue8m0_scales: bool = ..., transpose: Literal[False] = ...
) -> QuantizedTensor: ...
@overload
def quantize_128x128(
    w: Tensor, *, power_of_2_scales: bool = ..., ue8m0_scales: bool = ..., transpose: Literal[True]
) -> tuple[QuantizedTensor, QuantizedTensor]: ...
def quantize_128x128(
    w: Tensor, *, power_of_2_scales: bool = False, ue8m0_scales: bool = False, transpose: bool = False
) -> QuantizedTensor | tuple[QuantizedTensor, QuantizedTensor]:
    """Quantise weights in blocks of 128x128.

    w: bfloat16, float16 or float32 `[N, K]` or `[G, N, K]`, contiguous, 16-byte aligned, K (and with
        `transpose` N) a multiple of 16.
    Returns block (128, 128): data `[.., N, K]`, scales `[.., ceil(N/128), ceil(K/128)]`, contiguous. With
    `transpose=True` returns `(q, q_t)`, where `q_t` holds the same codes and scales transposed, data
    `[.., K, N]`: the operand of the input gradient, since FP8 tensor cores take K-major operands only.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment or
    device.
    """
    op = "quantize_128x128"
    checks.tensor(op, "w", w, tuple(NAMES), (2, 3))
    checks.multiple(op, "w", "K", w.shape[-1], 16)
    if checks.flag(op, "transpose", transpose):
        checks.multiple(op, "w", "N", w.shape[-2], 16)
    checks.contiguous(op, "w", w)
    checks.flag(op, "power_of_2_scales", power_of_2_scales)
    checks.flag(op, "ue8m0_scales", ue8m0_scales)
    if not torch.compiler.is_compiling():
        both = _quantize_128x128(w, power_of_2_scales, ue8m0_scales, transpose)
        return both if transpose else both[0]
    if not transpose:
        data, scales = torch.ops.dsv3_kernels.quantize_128x128(w, power_of_2_scales, ue8m0_scales)
        return QuantizedTensor(data, scales, SQUARE)
    data, scales, data_t, scales_t = torch.ops.dsv3_kernels.quantize_128x128_both(
        w, power_of_2_scales, ue8m0_scales
    )
    return QuantizedTensor(data, scales, SQUARE), QuantizedTensor(data_t, scales_t, SQUARE)


def _quantize_128x128(
    w: Tensor, power_of_2_scales: bool, ue8m0_scales: bool, transpose: bool
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """`q` and its transpose, which is `q` itself where it was not asked for."""
    if launch.world(w) == "reference":
        q = reference.quantize_128x128(w, power_of_2_scales=power_of_2_scales, ue8m0_scales=ue8m0_scales)
        return q, reference.transpose(q) if transpose else q
    q = QuantizedTensor(*_fake_128x128(w, power_of_2_scales, ue8m0_scales), SQUARE)
    q_t = QuantizedTensor(*_fake_128x128(w.mT, power_of_2_scales, ue8m0_scales), SQUARE) if transpose else q
    arguments = (w, q.data, q.scales, q_t.data, q_t.scales, *w.shape[-2:])
    kernel = kernel_128x128(w.dtype, power_of_2_scales, transpose, ue8m0_scales)
    down = q.scales.shape[:-1].numel()
    launch_tiles("quantize_128x128", "w", w, kernel, threads_of(w.dtype), down, w.shape[-1], arguments)
    return q, q_t


@functools.cache
def kernel_128x128(
    dtype: torch.dtype, power_of_2_scales: bool, transpose: bool, ue8m0_scales: bool = False
) -> Kernel:
    """The instance of csrc/kernels/quantize_tile.cuh for an input of `dtype`."""
    rest = template(power_of_2_scales, ue8m0_scales, transpose)
    return Kernel("quantize_tile.cuh", "quantize_128x128", (NAMES[dtype], *rest))


def kernels() -> dict[str, list[Kernel]]:
    """Every instance that an op of this module may launch."""
    both = (False, True)
    tiled = list(itertools.product(NAMES, SCALINGS, both))
    return {
        "quantize_1x128": [kernel_1x128(dtype, *s) for dtype, s in itertools.product(NAMES, SCALINGS)],
        "quantize_1x128_t": [kernel_1x128_t(dtype, p, row_wise, u) for dtype, (p, u), row_wise in tiled],
        "requantize_1x128_t": [kernel_requantize(*s) for s in SCALINGS],
        "quantize_128x128": [kernel_128x128(dtype, p, transpose, u) for dtype, (p, u), transpose in tiled],
    }


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `q`: each code times its scale, rounded to FP32, then to `dtype`.

    q: a QuantizedTensor or a (data, scales) tuple, either block, rank 2 or 3.
    dtype: torch.float32, torch.bfloat16, torch.float16 or torch.float64.
    Returns `[.., M, K]` of `dtype`, contiguous. Runs on any device, as PyTorch operations.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, block, stride, alignment
    or device.
    """
    op = "dequantize"
    q = quantized.operand(op, "q", q, None, (2, 3))
    if not isinstance(dtype, torch.dtype) or dtype not in _DEQUANTIZED:
        raise TypeError(f"{op}: dtype is {dtype!r}, expected one of {', '.join(map(str, _DEQUANTIZED))}")
    launch.world(q.data)
    if torch.compiler.is_compiling():
        return torch.ops.dsv3_kernels.dequantize(q.data, q.scales, q.block[0], dtype)
    return reference.dequantize(q).to(dtype)


# The same functions as torch.library ops, on plain tensors: what torch.compile traces.


def _op_1x128(x: Tensor, power_of_2_scales: bool, ue8m0_scales: bool) -> tuple[Tensor, Tensor]:
    q = _quantize_1x128(x, power_of_2_scales, ue8m0_scales)
    return q.data, q.scales


def _op_1x128_t(
    x: Tensor, group_offsets: Tensor | None, power_of_2_scales: bool, ue8m0_scales: bool
) -> tuple[Tensor, Tensor]:
    q = _quantize_1x128_t(x, group_offsets, power_of_2_scales, ue8m0_scales)
    return q.data, q.scales


def _op_1x128_both(
    x: Tensor, group_offsets: Tensor | None, power_of_2_scales: bool, ue8m0_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, q_t = _quantize_1x128_both(x, group_offsets, power_of_2_scales, ue8m0_scales)
    return q.data, q.scales, q_t.data, q_t.scales


def _op_128x128(w: Tensor, power_of_2_scales: bool, ue8m0_scales: bool) -> tuple[Tensor, Tensor]:
    q, _ = _quantize_128x128(w, power_of_2_scales, ue8m0_scales, False)
    return q.data, q.scales


def _op_128x128_both(
    w: Tensor, power_of_2_scales: bool, ue8m0_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, q_t = _quantize_128x128(w, power_of_2_scales, ue8m0_scales, True)
    return q.data, q.scales, q_t.data, q_t.scales


def _op_dequantize(data: Tensor, scales: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(QuantizedTensor(data, scales, (block_rows, TILE))).to(dtype)


def _fake_1x128(x: Tensor, power_of_2_scales: bool, ue8m0_scales: bool) -> tuple[Tensor, Tensor]:
    q = empty_rows(x.shape, x.device, ue8m0_scales)
    return q.data, q.scales


def _fake_1x128_t(
    x: Tensor, group_offsets: Tensor | None, power_of_2_scales: bool, ue8m0_scales: bool
) -> tuple[Tensor, Tensor]:
    q_t = empty_transposed(x.shape, group_offsets, x.device, ue8m0_scales)
    return q_t.data, q_t.scales


def _fake_1x128_both(
    x: Tensor, group_offsets: Tensor | None, power_of_2_scales: bool, ue8m0_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_wise = _fake_1x128(x, power_of_2_scales, ue8m0_scales)
    return *row_wise, *_fake_1x128_t(x, group_offsets, power_of_2_scales, ue8m0_scales)


def _fake_requantize(
    data: Tensor, scales: Tensor, group_offsets: Tensor | None, power_of_2_scales: bool, ue8m0_scales: bool
) -> tuple[Tensor, Tensor]:
    return _fake_1x128_t(data, group_offsets, power_of_2_scales, ue8m0_scales)


def _fake_128x128(w: Tensor, power_of_2_scales: bool, ue8m0_scales: bool) -> tuple[Tensor, Tensor]:
    data = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    return data, torch.empty(scales_shape(w.shape, SQUARE), dtype=scale_dtype(ue8m0_scales), device=w.device)


def _fake_both(
    w: Tensor, power_of_2_scales: bool, ue8m0_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = _fake_128x128(w, power_of_2_scales, ue8m0_scales)
    return *q, *_fake_128x128(w.mT, power_of_2_scales, ue8m0_scales)


def _fake_dequantize(data: Tensor, scales: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(data.shape, dtype=dtype, device=data.device)


for _name, _op, _fake in (
    ("quantize_1x128", _op_1x128, _fake_1x128),
    ("quantize_1x128_t", _op_1x128_t, _fake_1x128_t),
    ("quantize_1x128_both", _op_1x128_both, _fake_1x128_both),
    ("requantize_1x128_t", _requantize_1x128_t, _fake_requantize),
    ("quantize_128x128", _op_128x128, _fake_128x128),
    ("quantize_128x128_both", _op_128x128_both, _fake_both),
    ("dequantize", _op_dequantize, _fake_dequantize),
):
    torch.library.custom_op(f"dsv3_kernels::{_name}", _op, mutates_args=()).register_fake(_fake)
