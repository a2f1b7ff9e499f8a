"""The host side of csrc/kernels/tile.cuh: kernels whose blocks take a tile of 128x128 values each."""

import torch
from torch import Tensor

from . import checks, launch
from .jit import Kernel
from .quantized import TILE, padded_tokens

NAMES = {torch.bfloat16: "Bf16", torch.float16: "Fp16", torch.float32: "float"}  # in csrc/kernels

MAX_TILES = 2**31 - 1  # the largest grid

SCALINGS = ((False, False), (True, False), (True, True))  # powers of two, UE8M0


def template(power_of_2_scales: bool, ue8m0_scales: bool, *more: bool) -> tuple[bool | str, ...]:
    """A quantiser's template arguments: of its scales, and its own between them."""
    scale = ("E8m0",) if ue8m0_scales else ()  # float
    return power_of_2_scales or ue8m0_scales, *more, *scale


def token_tiles(tokens: int, group_offsets: Tensor | None, rest: bool) -> int:
    """Tiles of 128 tokens that the groups take at most; with `rest` also those past the last group."""
    if group_offsets is None:
        return checks.ceil_div(tokens, TILE)
    return padded_tokens(tokens, groups_of(group_offsets) + rest) // TILE


def groups_of(group_offsets: Tensor | None) -> int:
    """As the kernels take it: 0 without offsets."""
    return 0 if group_offsets is None else group_offsets.shape[0] - 1


def address_of(optional: Tensor | None) -> Tensor | int:
    """As the kernels take it: a null pointer for None."""
    return 0 if optional is None else optional


def offsets_arguments(group_offsets: Tensor | None) -> tuple[Tensor | int, Tensor | int]:
    """As the kernels take them, with the error word that they report wrong ones in."""
    return (0, 0) if group_offsets is None else (group_offsets, launch.error_flag(group_offsets))


def launch_tiles(
    op: str,
    name: str,
    x: Tensor,
    kernel: Kernel,
    threads: int,
    down: int,
    width: int,
    arguments: tuple[launch.Argument, ...],
) -> None:
    """Run `kernel` with a block a tile: `down` tiles high, `width` values wide. An error calls x `name`."""
    tiles = down * checks.ceil_div(width, TILE)
    if tiles > MAX_TILES:
        raise ValueError(
            f"{op}: {name} of shape {tuple(x.shape)} has {tiles} tiles of {TILE}x{TILE}, "
            f"expected at most {MAX_TILES}; split it"
        )
    if tiles:
        launch.launch(kernel, (tiles, 1, 1), (threads, 1, 1), arguments)


def threads_of(dtype: torch.dtype) -> int:
    """Threads of a block whose threads hold 16 rows of 16 bytes."""
    return TILE * TILE * dtype.itemsize // (16 * 16)
