"""Virtual ranks on one GPU: memory as if it were symmetric, and what stands for a queue pair.

csrc/kernels/transport.cuh, DSV3_ONE_GPU: kernels between nodes with the GPU's own memory for a network.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import round_up
from ..jit import Kernel

DEFINES = (("DSV3_ONE_GPU", 1),)
MOST_RANKS = 8  # transport.cuh: kRankBits
PAGE = 4096  # bytes; kPageBits


class Heap:
    """Symmetric memory of virtual ranks: for each, as many bytes as each of `sizes` says, zeros.

    All of one rank lies together, so that from one rank to the next it is as far for any of it.
    """

    def __init__(self, ranks: int, sizes: Sequence[int], device: torch.device | str) -> None:
        *self._starts, self._apart = itertools.accumulate((round_up(size, PAGE) for size in sizes), initial=0)
        self._sizes = tuple(sizes)
        self._whole = torch.zeros(ranks * self._apart, dtype=torch.uint8, device=device)

    def memories(self, rank: int) -> tuple[Tensor, ...]:
        """uint8, of one rank, in the order of the sizes."""
        own = self._whole[rank * self._apart :]
        return tuple(own[start:][:size] for start, size in zip(self._starts, self._sizes, strict=True))

    def queue_pairs(self, rank: int, count: int) -> Tensor:
        """int32 `[count]`: for that rank, where the others lie."""
        number = self._apart // PAGE * MOST_RANKS + rank
        return torch.full((count,), number, dtype=torch.int32, device=self._whole.device)


@functools.cache
def on_one_gpu(kernel: Kernel) -> Kernel:
    """The same text with this network."""
    return replace(kernel, nvshmem=False, defines=DEFINES)
