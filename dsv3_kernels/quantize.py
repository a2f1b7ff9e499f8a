"""Quantisation to e4m3 with one FP32 scale a tile (DeepSeek-V3 report, section 3.3.2).

`scale = amax/448` of the tile, in FP32, at least 2^-126, and 1 for a tile of zeros; `data = e4m3(x/scale)`,
round to nearest even, saturating. `power_of_2_scales=True` rounds the scale up to a power of two (exact in
UE8M0). A NaN or an Inf in a tile makes the scale NaN or Inf, so the whole tile dequantises to NaN: never a
silent finite value.
"""

import torch
from torch import Tensor

from . import checks, launch, quantized, reference
from .quantized import ROW, SQUARE, TILE, QuantizedTensor, padded_tokens, scales_shape

_INPUT = (torch.bfloat16, torch.float32)


def quantize_1x128(x: Tensor, *, power_of_2_scales: bool = False) -> QuantizedTensor:
    """Quantise activations or gradients in tiles of 1x128 along the last dimension.

    x: bfloat16 or float32 `[M, K]` or `[G, M, K]`, contiguous, 16-byte aligned, K a multiple of 16.
    Returns block (1, 128): data `[.., M, K]`, scales `[.., M, ceil(K/128)]`, strides `(.., 1, round_up(M,
    4))`.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment or
    device.
    """
    op = "quantize_1x128"
    checks.tensor(op, "x", x, _INPUT, (2, 3))
    checks.multiple(op, "x", "K", x.shape[-1], 16)
    checks.contiguous(op, "x", x)
    checks.flag(op, "power_of_2_scales", power_of_2_scales)
    run = torch.ops.dsv3_kernels.quantize_1x128 if torch.compiler.is_compiling() else _quantize_1x128
    data, scales = run(x, power_of_2_scales)
    return QuantizedTensor(data, scales, ROW)


def _quantize_1x128(x: Tensor, power_of_2_scales: bool) -> tuple[Tensor, Tensor]:
    if launch.world(x) == "reference":
        return reference.quantize_1x128(x, power_of_2_scales)
    launch.no_kernel("quantize_1x128")


def quantize_1x128_t(
    x: Tensor, group_offsets: Tensor | None = None, *, power_of_2_scales: bool = False
) -> QuantizedTensor:
    """Quantise the transpose of `x` in tiles of 128 tokens: an operand of `fp8_wgrad`.

    x: bfloat16 or float32 `[tokens, width]`, contiguous, 16-byte aligned, width a multiple of 8.
    group_offsets: int32 `[G+1]`, running sum of group sizes from 0 to at most tokens; rows past the end are
        left out.
    Returns block (1, 128) whose rows are features: data `[width, T]`, scales `[width, T/128]`, strides
    `(1, round_up(width, 4))`, with T = 128·floor((tokens + 127·G)/128) (G = 1 without groups). Tiles restart
    at each
    group: group g begins at column 128·Σ_{i<g} ceil(n_i/128). Columns past a group's end are zero; a tile of
    zeros has scale 1.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment, device
    or offsets.
    """
    op = "quantize_1x128_t"
    checks.tensor(op, "x", x, _INPUT, (2,))
    checks.multiple(op, "x", "width", x.shape[-1], 8)
    checks.contiguous(op, "x", x)
    if group_offsets is not None:
        checks.offsets(op, group_offsets, "x", x)
    checks.flag(op, "power_of_2_scales", power_of_2_scales)
    run = torch.ops.dsv3_kernels.quantize_1x128_t if torch.compiler.is_compiling() else _quantize_1x128_t
    data, scales = run(x, group_offsets, power_of_2_scales)
    return QuantizedTensor(data, scales, ROW)


def _quantize_1x128_t(
    x: Tensor, group_offsets: Tensor | None, power_of_2_scales: bool
) -> tuple[Tensor, Tensor]:
    op = "quantize_1x128_t"
    if launch.world(x) == "reference":
        offsets = None
        if group_offsets is not None:
            offsets = checks.read_offsets(op, group_offsets, x.shape[0], "the rows of x")
        return reference.quantize_1x128_t(x, offsets, power_of_2_scales)
    launch.no_kernel(op)


def quantize_128x128(
    w: Tensor, *, power_of_2_scales: bool = False, transpose: bool = False
) -> QuantizedTensor | tuple[QuantizedTensor, QuantizedTensor]:
    """Quantise weights in blocks of 128x128.

    w: bfloat16 or float32 `[N, K]` or `[G, N, K]`, contiguous, 16-byte aligned, K (and with `transpose` N) a
        multiple of 16.
    Returns block (128, 128): data `[.., N, K]`, scales `[.., ceil(N/128), ceil(K/128)]`, contiguous. With
    `transpose=True` returns `(q, q_t)`, where `q_t` holds the same codes and scales transposed (data `[.., K,
    N]`): the operand of the input gradient, since FP8 tensor cores take K-major operands only.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment or
    device.
    """
    op = "quantize_128x128"
    checks.tensor(op, "w", w, _INPUT, (2, 3))
    checks.multiple(op, "w", "K", w.shape[-1], 16)
    checks.contiguous(op, "w", w)
    checks.flag(op, "power_of_2_scales", power_of_2_scales)
    if checks.flag(op, "transpose", transpose):
        checks.multiple(op, "w", "N", w.shape[-2], 16)
        run_t = (
            torch.ops.dsv3_kernels.quantize_128x128_both if torch.compiler.is_compiling() else _quantize_both
        )
        data, scales, data_t, scales_t = run_t(w, power_of_2_scales)
        return QuantizedTensor(data, scales, SQUARE), QuantizedTensor(data_t, scales_t, SQUARE)
    run = torch.ops.dsv3_kernels.quantize_128x128 if torch.compiler.is_compiling() else _quantize_128x128
    data, scales = run(w, power_of_2_scales)
    return QuantizedTensor(data, scales, SQUARE)


def _quantize_128x128(w: Tensor, power_of_2_scales: bool) -> tuple[Tensor, Tensor]:
    if launch.world(w) == "reference":
        return reference.quantize_128x128(w, power_of_2_scales)
    launch.no_kernel("quantize_128x128")


def _quantize_both(w: Tensor, power_of_2_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data, scales = _quantize_128x128(w, power_of_2_scales)
    return data, scales, data.mT.contiguous(), scales.mT.contiguous()


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `q`: each code times its scale, rounded once to FP32, then to `dtype`.

    q: a QuantizedTensor or a (data, scales) tuple, either block, rank 2 or 3.
    Returns `[.., M, K]` of `dtype` (float32, bfloat16 or float64), contiguous.
    """
    op = "dequantize"
    q = quantized.operand(op, "q", q, None, (2, 3))
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(f"{op}: dtype is {dtype}, expected torch.float32, torch.bfloat16 or torch.float64")
    run = torch.ops.dsv3_kernels.dequantize if torch.compiler.is_compiling() else _dequantize
    return run(q.data, q.scales, q.block[0], dtype)


def _dequantize(data: Tensor, scales: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    launch.world(data)
    return reference.dequantize(QuantizedTensor(data, scales, (block_rows, TILE))).to(dtype)


def _fake_data(data: Tensor) -> Tensor:
    return torch.empty(data.shape, dtype=torch.float8_e4m3fn, device=data.device)


def _fake_1x128(x: Tensor, power_of_2_scales: bool) -> tuple[Tensor, Tensor]:
    return _fake_data(x), quantized.empty_mn_major(scales_shape(x.shape, ROW), x.device)


def _fake_1x128_t(x: Tensor, group_offsets: Tensor | None, power_of_2_scales: bool) -> tuple[Tensor, Tensor]:
    groups = 1 if group_offsets is None else group_offsets.shape[0] - 1
    width, columns = x.shape[1], padded_tokens(x.shape[0], groups)
    data = torch.empty(width, columns, dtype=torch.float8_e4m3fn, device=x.device)
    return data, quantized.empty_mn_major((width, columns // TILE), x.device)


def _fake_128x128(w: Tensor, power_of_2_scales: bool) -> tuple[Tensor, Tensor]:
    return _fake_data(w), torch.empty(scales_shape(w.shape, SQUARE), device=w.device)


def _fake_both(w: Tensor, power_of_2_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_128x128(w, power_of_2_scales), *_fake_128x128(w.mT, power_of_2_scales)


def _fake_dequantize(data: Tensor, scales: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(data.shape, dtype=dtype, device=data.device)


for _name, _run, _fake in (
    ("quantize_1x128", _quantize_1x128, _fake_1x128),
    ("quantize_1x128_t", _quantize_1x128_t, _fake_1x128_t),
    ("quantize_128x128", _quantize_128x128, _fake_128x128),
    ("quantize_128x128_both", _quantize_both, _fake_both),
    ("dequantize", _dequantize, _fake_dequantize),
):
    torch.library.custom_op(f"dsv3_kernels::{_name}", _run, mutates_args=()).register_fake(_fake)
