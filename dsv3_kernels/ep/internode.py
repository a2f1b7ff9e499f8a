"""The kernel transport across nodes: NVLink inside a node, NVSHMEM over InfiniBand between them.

A rank is as of a transport within a node (`intranode`), and launches other kernels:
csrc/kernels/dispatch_internode.cuh and combine_internode.cuh. Its peers on other nodes it reaches through
rings in symmetric memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..by_value import Struct
from ..jit import Kernel
from ..nvshmem import NvshmemError, World
from . import internode_kernels, kernels
from .internode_kernels import Layout, Link, Rings
from .intranode import IntranodeTransport, KernelRank
from .transport import DispatchCall, Shape


class InternodeRank(KernelRank):
    """addresses: of the memories of this node's ranks, as this rank sees them. symmetric: uint8 zeros,
    `rings.size` of them, for dispatch and for combine. queue_pairs: int32, a handle a channel.
    """

    def __init__(
        self,
        rings: Rings,
        rank: int,
        memory: Tensor,
        addresses: Sequence[int],
        symmetric: tuple[Tensor, ...],
        queue_pairs: Tensor,
        timeout: float,
        **options: Any,
    ) -> None:
        # A rank of another node stands for its forwarder here.
        everybody = list(addresses) * rings.shape.topology.nodes
        super().__init__(rings.shape, rank, memory, everybody, timeout, **options)
        self.link = Link.create(rings, self.peers, symmetric, queue_pairs)

    def kernel(self, op: str, again: bool = False) -> Kernel:
        if op == "combine":
            return internode_kernels.COMBINE
        return internode_kernels.DISPATCH_AGAIN if again else internode_kernels.DISPATCH

    def channels_of(self, num_sms: int) -> int:
        return num_sms // 2

    def shape_of_launch(self, num_sms: int, launched: int) -> tuple[launch.Dim3, launch.Dim3, int]:
        return internode_kernels.shape_of_launch(self.link.rings, num_sms * launched)

    def arrivals(self, call: DispatchCall, idx: Tensor, rows: int) -> Layout:
        most = 2 * self.link.rings.channels
        if call.num_sms > most:
            raise ValueError(
                f"dispatch: num_sms is {call.num_sms}, expected at most {most}: there are rings for "
                f"{most // 2} channels of two SMs"
            )
        return Layout.of(super().arrivals(call, idx, rows), self.shape)

    def dispatch_call(self, operands: kernels.DispatchOperands) -> Struct:
        return internode_kernels.dispatch_call(self.link, operands)

    def combine_call(self, operands: kernels.CombineOperands) -> Struct:
        return internode_kernels.combine_call(self.link, operands)


class InternodeTransport(IntranodeTransport, InternodeRank):
    """A rank that launches alone."""


def emulated(group: Any, gpu: Any, shape: Shape, timeout: float) -> InternodeTransport:
    """group: an `emulator.Group`."""
    rings = Rings(shape)
    memory = group.symmetric((kernels.Workspace(shape).size,), torch.uint8)
    symmetric = tuple(group.symmetric((rings.size,), torch.uint8) for _ in kernels.OPS)
    # Peers' memories live on while they are mapped: their last words come late.
    every = group.all_gather_object((gpu.address_of(memory), memory, symmetric))
    first = group.rank - group.rank % shape.topology.gpus_per_node
    on_node = [address for address, *_ in every[first : first + shape.topology.gpus_per_node]]
    pairs = torch.arange(2, 2 + rings.channels, dtype=torch.int32)
    return InternodeTransport(
        "emulator", rings, group.rank, memory, on_node, symmetric, pairs, timeout, kept=every
    )


def needed(shape: Shape) -> int:
    """Bytes of symmetric memory that a rank takes."""
    return kernels.Workspace(shape).size + len(kernels.OPS) * Rings(shape).size


def over_nvshmem(world: World, shape: Shape, timeout: float) -> InternodeTransport:
    """On GPUs; all ranks of the world call. Raises `NvshmemError` before any kernel runs."""
    rings = Rings(shape)
    memory = world.allocate(kernels.Workspace(shape).size)
    mapped = world.mapped(memory)
    symmetric = tuple(world.allocate(rings.size) for _ in kernels.OPS)
    pairs = torch.tensor(world.queue_pairs(rings.channels), dtype=torch.int32, device=memory.device)
    first = world.rank - world.rank % shape.topology.gpus_per_node
    node = range(first, first + shape.topology.gpus_per_node)
    apart = [rank for rank in node if not mapped[rank]]
    if apart:
        raise NvshmemError(
            f"the memory of ranks {apart} is not mapped by rank {world.rank}, though they are said to share "
            "a node. Mend: pass gpus_per_node to ep.Buffer, or see whether the GPUs are peers "
            "(nvidia-smi topo -p2p r)"
        )
    addresses = [mapped[rank] for rank in node]
    return InternodeTransport(
        "nvshmem", rings, world.rank, memory, addresses, symmetric, pairs, timeout, kept=world
    )
