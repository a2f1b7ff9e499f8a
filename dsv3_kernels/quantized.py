"""QuantizedTensor: FP8 values and the scales of their tiles, and the shape arithmetic of both."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .checks import round_up

Block = tuple[int, int]
TILE = 128
ROW: Block = (1, TILE)
SQUARE: Block = (TILE, TILE)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """FP8 data with one scale a tile: `data[m, k] · scales[m // block[0], k // block[1]]` at `[m, k]`.

    data: float8_e4m3fn `[.., M, K]`, row-major contiguous.
    scales: float32; for block (1, 128) `[.., M, ceil(K/128)]`, MN-major, strides `(.., 1, round_up(M, 4))`,
        so that a kernel loads the scales of neighbouring rows with one access; for block (128, 128)
        `[.., ceil(M/128), ceil(K/128)]`, contiguous. Or the same in float8_e8m0fnu, a byte each, powers of
        two: an op that takes such an operand first turns its scales into FP32, exactly.
    block: rows and columns of a tile, (1, 128) or (128, 128).

    The ops check what they are given; building one checks nothing.
    """

    data: Tensor
    scales: Tensor
    block: Block

    @property
    def shape(self) -> torch.Size:
        return self.data.shape


def scales_shape(data_shape: torch.Size, block: Block) -> tuple[int, ...]:
    *batch, m, k = data_shape
    return (*batch, -(-m // block[0]), -(-k // TILE))


def empty_mn_major(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Scales `[.., M, K/128]` with strides `(.., 1, round_up(M, 4))`."""
    *batch, m, k = shape
    leading = round_up(m, 4)
    strides = (leading * k, 1, leading) if batch else (1, leading)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def mn_major(scales: Tensor) -> Tensor:
    """Scales `[.., M, K/128]` as the kernels read them: strides (.., 1, round_up(M, 4)), 16-byte aligned."""
    shape, strides = scales.shape, scales.stride()
    leading = round_up(shape[-2], 4)
    expected = (1, leading) if len(shape) == 2 else (leading * shape[-1], 1, leading)
    fits = strides == expected or all(
        size == 1 or got == want for size, got, want in zip(shape, strides, expected, strict=True)
    )
    if fits and scales.data_ptr() % checks.ALIGNMENT == 0:
        return scales
    return empty_mn_major(tuple(shape), scales.device).copy_(scales)


def padded_tokens(tokens: int, groups: int) -> int:
    """Columns of a token-transposed tensor: the most that `groups` groups, each padded to 128, can take."""
    return TILE * ((tokens + (TILE - 1) * groups) // TILE)


def float_scales(scales: Tensor, block: Block) -> Tensor:
    """Scales of float8_e8m0fnu as FP32, laid out as those of `block` are."""
    if block == SQUARE:
        return scales.float()
    return empty_mn_major(tuple(scales.shape), scales.device).copy_(scales)


def scale_dtype(ue8m0_scales: bool) -> torch.dtype:
    return torch.float8_e8m0fnu if ue8m0_scales else torch.float32


def empty_rows(shape: tuple[int, ...], device: torch.device, ue8m0_scales: bool = False) -> QuantizedTensor:
    """Room for `[.., M, K]` in tiles of 1x128."""
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    scales = empty_mn_major(scales_shape(data.shape, ROW), device, scale_dtype(ue8m0_scales))
    return QuantizedTensor(data, scales, ROW)


def empty_transposed(
    shape: tuple[int, ...],
    group_offsets: Tensor | None,
    device: torch.device,
    ue8m0_scales: bool = False,
) -> QuantizedTensor:
    """Room for `[tokens, width]` transposed, in tiles of 128 tokens that restart at each group."""
    tokens, width = shape
    groups = 1 if group_offsets is None else group_offsets.shape[0] - 1
    return empty_rows((width, padded_tokens(tokens, groups)), device, ue8m0_scales)


def empty_both(
    shape: tuple[int, ...],
    transpose: bool,
    group_offsets: Tensor | None,
    device: torch.device,
    ue8m0_scales: bool,
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Room for `[tokens, width]` in tiles of 1x128, and transposed; without `transpose` that has no rows."""
    across = shape[0], shape[1] if transpose else 0
    return (
        empty_rows(shape, device, ue8m0_scales),
        empty_transposed(across, group_offsets, device, ue8m0_scales),
    )


def operand(
    op: str, name: str, value: object, block: Block | None, ranks: tuple[int, ...]
) -> QuantizedTensor:
    """`value`, a QuantizedTensor or a (data, scales) tuple, checked as an operand of `op`.

    `block=None` takes both blocks; a tuple's block is then read off the shape of its scales.
    """
    if (
        type(value) is QuantizedTensor
        and not torch.compiler.is_compiling()
        and _is_right(value, block, ranks)
    ):
        return value
    return _check_operand(op, name, value, block, ranks)


def _is_right(q: QuantizedTensor, block: Block | None, ranks: tuple[int, ...]) -> bool:
    """Quickly, whether `_check_operand` would give `q` back; of most that it would."""
    data, scales = q.data, q.scales
    return (
        type(q.block) is tuple
        and q.block == block
        and isinstance(data, Tensor)
        and isinstance(scales, Tensor)
        and data.dtype is torch.float8_e4m3fn
        and scales.dtype is torch.float32
        and not data.requires_grad
        and not scales.requires_grad
        and data.layout is scales.layout is torch.strided
        and data.is_contiguous()
        and data.data_ptr() % checks.ALIGNMENT == 0
        and (data.is_cuda or data.is_cpu)
        and data.device == scales.device
        and len(shape := data.shape) in ranks
        and scales.shape == scales_shape(shape, block)
    )


def _check_operand(
    op: str, name: str, value: object, block: Block | None, ranks: tuple[int, ...]
) -> QuantizedTensor:
    if isinstance(value, QuantizedTensor):
        data, scales = value.data, value.scales
    elif isinstance(value, tuple) and len(value) == 2:
        data, scales = value
    else:
        what = f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
        raise TypeError(f"{op}: {name} is {what}, expected a QuantizedTensor or a (data, scales) tuple")
    checks.tensor(op, f"{name}.data", data, (torch.float8_e4m3fn,), ranks)
    checks.tensor(op, f"{name}.scales", scales, (torch.float32, torch.float8_e8m0fnu), ranks)
    if isinstance(value, QuantizedTensor):
        got = value.block
    else:
        got = block or (ROW if tuple(scales.shape) == scales_shape(data.shape, ROW) else SQUARE)
    if type(got) is not tuple or got not in ((block,) if block else (ROW, SQUARE)):
        raise ValueError(f"{op}: {name}.block is {got!r}, expected {block or '(1, 128) or (128, 128)'}")
    checks.contiguous(op, f"{name}.data", data)
    checks.same_device(op, f"{name}.scales", scales, f"{name}.data", data)
    expected = scales_shape(data.shape, got)
    if tuple(scales.shape) != expected:
        rows = "rows" if got == ROW else "ceil(rows/128)"
        raise ValueError(
            f"{op}: {name}.scales has shape {tuple(scales.shape)}, expected "
            f"({'G, ' if len(expected) == 3 else ''}{rows}, ceil(columns/128)) = {expected} "
            f"for {name}.data of shape {tuple(data.shape)}"
        )
    if scales.dtype == torch.float8_e8m0fnu:
        return QuantizedTensor(data, float_scales(scales, got), got)
    return value if isinstance(value, QuantizedTensor) else QuantizedTensor(data, scales, got)
