"""E5M6: 12 bits a value, for activations that the backward of attention reads again.

A code has a sign, 5 bits of exponent (bias 15) and 6 of fraction: the upper 12 bits of a float16. Tiles of
1x128 have a power-of-two scale, `amax/65024` rounded up, at least 2^-126, and 1 for a tile of zeros
(DeepSeek-V3 report, section 3.3.3). Codes are rounded to nearest even and never have to saturate. A NaN or an
Inf makes its whole tile NaN, code 0x7FF. The relative error is at most 2^-7, against 2^-4 of e4m3 and 2^-9 of
BF16.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, launch, reference
from .jit import Kernel
from .quantized import TILE
from .tile import NAMES

_UNPACKED = (torch.bfloat16, torch.float32)

# As in csrc/kernels/e5m6.cuh.
THREADS = 256
TILES_PER_WARP = 8
MAX_GRID = 4096  # blocks; each takes as many tiles as it must
MAX_TILES = 2**31


class PackedE5M6(NamedTuple):
    """data: uint8 `[M, 3·K/2]`, two codes in three bytes, the first in the low 12 bits. scales: float32
    `[M, K/128]`, contiguous."""

    data: Tensor
    scales: Tensor


def pack_e5m6(x: Tensor) -> PackedE5M6:
    """x in 12 bits a value.

    x: bfloat16, float16 or float32 `[M, K]`, contiguous, 16-byte aligned, K a multiple of 128.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment or
    device.
    """
    op = "pack_e5m6"
    checks.tensor(op, "x", x, tuple(NAMES), (2,))
    checks.multiple(op, "x", "K", x.shape[1], TILE)
    checks.contiguous(op, "x", x)
    return PackedE5M6(*(torch.ops.dsv3_kernels.pack_e5m6 if torch.compiler.is_compiling() else _pack)(x))


def _pack(x: Tensor) -> tuple[Tensor, Tensor]:
    if launch.world(x) == "reference":
        return reference.pack_e5m6(x)
    data, scales = _fake_pack(x)
    _launch("pack_e5m6", "x", x, kernel_pack(x.dtype), scales.numel(), (x, data, scales, scales.numel()))
    return data, scales


@functools.cache
def kernel_pack(dtype: torch.dtype) -> Kernel:
    return Kernel("e5m6.cuh", "pack_e5m6", (NAMES[dtype],))


def unpack_e5m6(packed: PackedE5M6, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values of `packed`, `[M, K]` of `dtype`: each code times its scale, exact in
    BF16 too where it is not subnormal.

    packed: what `pack_e5m6` returned, or a (data, scales) tuple like it, contiguous, 16-byte aligned.
    dtype: torch.bfloat16 or torch.float32.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment or
    device.
    """
    op = "unpack_e5m6"
    if not isinstance(packed, tuple) or len(packed) != 2:
        what = f"a tuple of {len(packed)}" if isinstance(packed, tuple) else type(packed).__name__
        raise TypeError(f"{op}: packed is {what}, expected a PackedE5M6 or a (data, scales) tuple")
    data, scales = packed
    checks.tensor(op, "packed.data", data, (torch.uint8,), (2,))
    checks.multiple(op, "packed.data", "3·K/2", data.shape[1], TILE // 2 * 3)
    checks.contiguous(op, "packed.data", data)
    checks.tensor(op, "packed.scales", scales, (torch.float32,), (2,))
    checks.same_device(op, "packed.scales", scales, "packed.data", data)
    checks.shape(op, "packed.scales", scales, (data.shape[0], data.shape[1] // (TILE // 2 * 3)), "(M, K/128)")
    checks.contiguous(op, "packed.scales", scales)
    if not isinstance(dtype, torch.dtype) or dtype not in _UNPACKED:
        raise TypeError(f"{op}: dtype is {dtype!r}, expected one of {', '.join(map(str, _UNPACKED))}")
    run = torch.ops.dsv3_kernels.unpack_e5m6 if torch.compiler.is_compiling() else _unpack
    return run(data, scales, dtype)


def _unpack(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    if launch.world(data) == "reference":
        return reference.unpack_e5m6(data, scales, dtype)
    x = _fake_unpack(data, scales, dtype)
    arguments = (data, scales, x, scales.numel())
    _launch("unpack_e5m6", "packed.data", data, kernel_unpack(dtype), scales.numel(), arguments)
    return x


@functools.cache
def kernel_unpack(dtype: torch.dtype) -> Kernel:
    return Kernel("e5m6.cuh", "unpack_e5m6", (NAMES[dtype],))


def kernels() -> dict[str, list[Kernel]]:
    """Every instance that an op of this module may launch."""
    return {
        "pack_e5m6": [kernel_pack(dtype) for dtype in NAMES],
        "unpack_e5m6": [kernel_unpack(dtype) for dtype in _UNPACKED],
    }


def _launch(
    op: str, name: str, x: Tensor, kernel: Kernel, tiles: int, arguments: tuple[launch.Argument, ...]
) -> None:
    if tiles > MAX_TILES:
        raise ValueError(
            f"{op}: {name} of shape {tuple(x.shape)} has {tiles} tiles of 1x{TILE}, "
            f"expected at most {MAX_TILES}; split it"
        )
    if tiles:
        grid = min(checks.ceil_div(tiles, TILES_PER_WARP * THREADS // 32), MAX_GRID)
        launch.launch(kernel, (grid, 1, 1), (THREADS, 1, 1), arguments)


def _fake_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    data = torch.empty(m, k // 2 * 3, dtype=torch.uint8, device=x.device)
    return data, torch.empty(m, k // TILE, dtype=torch.float32, device=x.device)


def _fake_unpack(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(data.shape[0], data.shape[1] // 3 * 2, dtype=dtype, device=data.device)


torch.library.custom_op("dsv3_kernels::pack_e5m6", _pack, mutates_args=()).register_fake(_fake_pack)
torch.library.custom_op("dsv3_kernels::unpack_e5m6", _unpack, mutates_args=()).register_fake(_fake_unpack)
