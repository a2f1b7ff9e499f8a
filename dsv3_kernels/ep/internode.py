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
from .design import Design
from .internode_kernels import Layout, Link, Rings
from .intranode import IntranodeTransport, KernelRank
from .lean import Slots
from .lean_transport import LeanTransport
from .transport import DispatchCall


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
                f"dispatch: num_sms is {call.num_sms}, expected at most {most}: the buffer was made for "
                f"{most // 2} channels of two SMs. Mend: ep.Buffer's tuning=ep.Tuning(channels=...), at most "
                f"{kernels.MAX_CHANNELS}"
            )
        return Layout.of(super().arrivals(call, idx, rows), self.shape)

    def dispatch_call(self, operands: kernels.DispatchOperands) -> Struct:
        return internode_kernels.dispatch_call(self.link, operands)

    def combine_call(self, operands: kernels.CombineOperands) -> Struct:
        return internode_kernels.combine_call(self.link, operands)


class InternodeTransport(IntranodeTransport, InternodeRank):
    """A rank that launches alone."""


def emulated(group: Any, gpu: Any, design: Design, timeout: float) -> IntranodeTransport:
    """group: an `emulator.Group`."""
    shape = design.shape
    memory = group.symmetric((kernels.Workspace(shape).size,), torch.uint8)
    symmetric = tuple(group.symmetric((design.size,), torch.uint8) for _ in kernels.OPS)
    # Peers' memories live on while they are mapped: their last words come late.
    every = group.all_gather_object((gpu.address_of(memory), memory, symmetric))
    first = group.rank - group.rank % shape.topology.gpus_per_node
    on_node = [address for address, *_ in every[first : first + shape.topology.gpus_per_node]]
    pairs = torch.arange(2, 2 + design.channels, dtype=torch.int32)
    return _of(design, "emulator", group.rank, memory, on_node, symmetric, pairs, timeout, every)


def needed(design: Design) -> int:
    """Bytes of symmetric memory that a rank takes."""
    return kernels.Workspace(design.shape).size + len(kernels.OPS) * design.size


def over_nvshmem(world: World, design: Design, timeout: float) -> IntranodeTransport:
    """On GPUs; all ranks of the world call. Raises `NvshmemError` before any kernel runs."""
    shape = design.shape
    memory = world.allocate(kernels.Workspace(shape).size)
    mapped = world.mapped(memory)
    symmetric = tuple(world.allocate(design.size) for _ in kernels.OPS)
    pairs = torch.tensor(world.queue_pairs(design.channels), dtype=torch.int32, device=memory.device)
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
    return _of(design, "nvshmem", world.rank, memory, addresses, symmetric, pairs, timeout, world)


def _of(
    design: Design,
    name: str,
    rank: int,
    memory: Tensor,
    addresses: Sequence[int],
    symmetric: tuple[Tensor, ...],
    queue_pairs: Tensor,
    timeout: float,
    kept: object,
) -> IntranodeTransport:
    parts = rank, memory, addresses, symmetric, queue_pairs, timeout
    if isinstance(design, Slots):
        return LeanTransport(name, design, *parts, kept=kept)
    return InternodeTransport(name, design, *parts, kept=kept)
