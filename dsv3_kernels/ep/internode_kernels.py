"""csrc/kernels/dispatch_internode.cuh, combine_internode.cuh: sizes of memory, and what a launch passes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import launch
from ..by_value import Struct, join
from ..checks import round_up
from ..jit import Kernel
from ..quantized import QuantizedTensor
from . import kernels
from .kernels import (
    MAX_CHANNELS,
    OPS,
    Arrivals,
    CombineOperands,
    DispatchOperands,
    Peers,
    Workspace,
)
from .transport import Shape

MAX_NODES = 16
WARPS = 12  # of a block: as many as leave the threads the registers they need

DISPATCH = Kernel("dispatch_internode.cuh", "dispatch_internode", (False,), nvshmem=True)
DISPATCH_AGAIN = Kernel("dispatch_internode.cuh", "dispatch_internode", (True,), nvshmem=True)
COMBINE = Kernel("combine_internode.cuh", "combine_internode", nvshmem=True)


@dataclass(frozen=True)
class Rings:
    """A rank's symmetric memory for one op, as `Rings` in csrc/kernels/internode.cuh lays it out.

    chunk: messages that travel together; depth: chunks that may be under way in a channel to one node.
    channels: the most that a call may use, two SMs each.
    """

    shape: Shape
    chunk: int
    depth: int
    channels: int

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.depth < 1 or not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"Rings: got {self}, expected 1 or more, and at most {MAX_CHANNELS} channels")

    @property
    def message_bytes(self) -> int:
        """The most that a token takes: a row in BF16, or in FP8 with its scales, and 8 bytes a choice."""
        return Workspace(self.shape).slot_bytes

    @property
    def header_words(self) -> int:
        of_gpu = self.shape.local_experts + Workspace(self.shape).announcement_words
        return self.shape.topology.gpus_per_node * of_gpu + 1

    @property
    def size(self) -> int:
        count = self.shape.topology.nodes * self.channels
        words = 8 * count * (2 + 2 * self.depth)
        headers = round_up(8 * count * self.header_words, 16)
        return words + headers + 2 * count * self.depth * self.chunk * self.message_bytes


@dataclass(eq=False)
class Link:
    """What a rank keeps between calls: its peers on its node, and its rings to other nodes, for each op.

    peers: see `peers_of`.
    """

    rings: Rings
    peers: Peers
    symmetric: tuple[Tensor, ...]  # of each op
    positions: Tensor  # int64 [2 ops, 2, nodes, channels]
    queue_pairs: Tensor  # int32 [channels]

    @classmethod
    def create(cls, rings: Rings, peers: Peers, symmetric: tuple[Tensor, ...], queue_pairs: Tensor) -> "Link":
        sizes = len(OPS), 2, rings.shape.topology.nodes, rings.channels
        positions = torch.zeros(sizes, dtype=torch.int64, device=peers.table.device)
        peers.queue_pairs = queue_pairs
        return cls(rings, peers, symmetric, positions, queue_pairs)

    def struct(self, op: str) -> Struct:
        """`Link` of csrc/kernels/internode.cuh."""
        number, rings = OPS.index(op), self.rings
        topology = rings.shape.topology
        return join(
            [
                Struct("I", topology.nodes),
                Struct(
                    "PIIIIIQ",
                    self.symmetric[number],
                    topology.nodes,
                    rings.channels,
                    rings.chunk,
                    rings.depth,
                    rings.header_words,
                    rings.message_bytes,
                ),
                Struct("PP", self.positions[number], self.queue_pairs),
            ]
        )


@dataclass(eq=False)
class Layout(Arrivals):
    """What a dispatch leaves for its combine: see `Layout` in csrc/kernels/internode.cuh; all int32.

    sent_slot is of nodes here: [T, nodes], the message of a token to each, or -1.
    """

    sent_tokens: Tensor  # [nodes, max_tokens]
    sent_counts: Tensor  # [nodes, channels]
    forward_slot: Tensor  # [nodes, max_tokens, gpus]
    forward_ranges: Tensor  # [nodes, channels, 2]
    forward_counts: Tensor  # [nodes, channels, gpus]

    @classmethod
    def of(cls, came: Arrivals, shape: Shape) -> "Layout":
        """Unwritten, with what any dispatch leaves."""
        topology, most, channels = shape.topology, shape.max_tokens_per_rank, came.ranges.shape[1]
        nodes, gpus = topology.nodes, topology.gpus_per_node

        def integers(*sizes: int) -> Tensor:
            return came.ranges.new_empty(sizes)

        whole = dict(vars(came), sent_slot=integers(came.sent_slot.shape[0], nodes))
        return cls(
            **whole,
            sent_tokens=integers(nodes, most),
            sent_counts=integers(nodes, channels),
            forward_slot=integers(nodes, most, gpus),
            forward_ranges=integers(nodes, channels, 2),
            forward_counts=integers(nodes, channels, gpus),
        )

    def _own(self) -> tuple[Tensor, ...]:
        """In the kernels' order."""
        sent = self.sent_slot, self.sent_tokens, self.sent_counts
        return *sent, self.forward_slot, self.forward_ranges, self.forward_counts

    def tables(self) -> tuple[Tensor | None, ...]:
        return *super().tables(), *self._own()

    def struct(self) -> Struct:
        return Struct("PPPPPPII", *self._own(), self.sent_counts.shape[1], self.forward_slot.shape[1])


def dispatch_call(link: Link, o: DispatchOperands) -> Struct:
    """`dispatch::InternodeCall`."""
    shape = link.rings.shape
    call = kernels.dispatch_call(Workspace(shape), link.peers, o)
    metadata = 0 if o.topk_idx is None else 8 * shape.num_topk
    size = Struct("Q", message_bytes(row_bytes(o.x) + metadata))
    return join([call, link.struct("dispatch"), layout_of(o).struct(), size])


def combine_call(link: Link, o: CombineOperands) -> Struct:
    """`combine::InternodeCall`."""
    return combine_struct(link.rings.shape, link.peers, link.struct("combine"), o)


def combine_struct(shape: Shape, peers: Peers, link: Struct, o: CombineOperands) -> Struct:
    """The same with any `Link`."""
    layout = layout_of(o)
    gradients = 0 if o.weights_grad is None else 4 * shape.num_topk
    returned = o.y, o.topk_weights, o.weights_grad, layout.topk_idx, layout.rows, layout.ranges
    return join(
        [
            kernels.rank_struct(Workspace(shape), peers, "combine", o.timeout),
            link,
            Struct("PPPPPPI", *returned, o.token_order),
            Struct("PPPPI", o.topk_idx, o.bias, o.out, o.out_weights_grad, o.out.shape[0]),
            layout.struct(),
            Struct("IIQ", shape.hidden, shape.num_topk, message_bytes(2 * shape.hidden + gradients)),
        ]
    )


def layout_of(o: DispatchOperands | CombineOperands) -> Layout:
    if not isinstance(o.came, Layout):
        raise TypeError(f"came is {type(o.came).__name__}, expected the layout of kernels across nodes")
    return o.came


def row_bytes(x: Tensor | QuantizedTensor) -> int:
    """Of a row of x with its scales."""
    if isinstance(x, Tensor):
        return x.shape[1] * x.element_size()
    return x.data.shape[1] + 4 * x.scales.shape[1]


def message_bytes(payload: int) -> int:
    """Of one message over InfiniBand."""
    return round_up(payload, 16)


def shape_of_launch(rings: Rings, num_sms: int, warps: int = WARPS) -> tuple[launch.Dim3, launch.Dim3, int]:
    """Grid, block and bytes of shared memory of one rank."""
    shape = rings.shape
    ranks, nodes = shape.topology.size, shape.topology.nodes
    even = max(1 + ranks + nodes * rings.header_words, nodes * (rings.depth + 1))
    odd = ranks * shape.local_experts + max(ranks, shape.local_experts)
    return (num_sms, 1, 1), (32 * warps, 1, 1), max(4 * even, 4 * odd + 2048 * warps, kernels.OWN_SM)
