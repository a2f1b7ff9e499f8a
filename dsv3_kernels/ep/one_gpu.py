"""Virtual ranks on one GPU: memory as if it were symmetric, and what stands for a queue pair.

csrc/kernels/transport.cuh, DSV3_ONE_GPU: kernels between nodes with the GPU's own memory for a network.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import ceil_div
from ..jit import Kernel

DEFINES = (("DSV3_ONE_GPU", 1),)
MOST_RANKS = 8  # transport.cuh: kRankBits
PAGE = 4096  # bytes; kPageBits


def symmetric(ranks: int, size: int, device: torch.device | str) -> list[Tensor]:
    """uint8 zeros, `size` of them for each rank; from one to the next it is as far as to the one after."""
    apart = ceil_div(size, PAGE) * PAGE
    whole = torch.zeros(ranks * apart, dtype=torch.uint8, device=device)
    return [whole[rank * apart :][:size] for rank in range(ranks)]


def queue_pairs(rank: int, memories: Sequence[Tensor], count: int) -> Tensor:
    """int32 `[count]`, for a rank with one of `symmetric`'s memories: where the others lie."""
    number = ceil_div(memories[0].numel(), PAGE) * MOST_RANKS + rank
    return torch.full((count,), number, dtype=torch.int32, device=memories[0].device)


@functools.cache
def on_one_gpu(kernel: Kernel) -> Kernel:
    """The same text with this network."""
    return replace(kernel, nvshmem=False, defines=DEFINES)
