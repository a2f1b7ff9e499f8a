"""The kernel transport across nodes: csrc/kernels/dispatch_internode.cuh and combine_internode.cuh."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..by_value import Struct, join
from ..checks import round_up
from ..jit import Kernel
from ..quantized import QuantizedTensor
from . import kernels
from .kernels import MAX_CHANNELS, Workspace
from .transport import Shape

MAX_NODES = 16
WARPS = 16  # of a block

DISPATCH = Kernel("dispatch_internode.cuh", "dispatch_internode", (False,), nvshmem=True)
DISPATCH_AGAIN = Kernel("dispatch_internode.cuh", "dispatch_internode", (True,), nvshmem=True)
COMBINE = Kernel("combine_internode.cuh", "combine_internode", nvshmem=True)


@dataclass(frozen=True)
class Rings:
    """A rank's symmetric memory, as `Rings` in csrc/kernels/internode.cuh lays it out.

    chunk: messages that travel together; depth: chunks that may be under way in a channel to one node.
    channels: the most that a call may use.
    """

    shape: Shape
    chunk: int = 8
    depth: int = 8
    channels: int = 12

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.depth < 1 or not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"Rings: got {self}, expected 1 or more, and at most {MAX_CHANNELS} channels")

    @property
    def message_bytes(self) -> int:
        """The most that a token takes: a row in BF16, or in FP8 with its scales, and 8 bytes a choice."""
        return Workspace(self.shape).slot_bytes

    @property
    def header_words(self) -> int:
        return self.shape.topology.gpus_per_node * (self.shape.local_experts + 3) + 1

    @property
    def size(self) -> int:
        count = self.shape.topology.nodes * self.channels
        words = 8 * count * (2 + 2 * self.depth)
        headers = round_up(8 * count * self.header_words, 16)
        return words + headers + 2 * count * self.depth * self.chunk * self.message_bytes


@dataclass(eq=False)
class Link:
    """What a rank keeps between the calls of one op: see `Link` in csrc/kernels/internode.cuh."""

    rank: int
    workspace: Workspace
    rings: Rings
    peers: Tensor  # int64 [gpus], addresses of workspaces as this rank sees them
    memory: Tensor  # of this rank's workspace
    symmetric: Tensor  # of this rank's rings
    positions: Tensor  # int64 [2, nodes, channels]
    queue_pairs: Tensor  # int32 [channels]
    sequence: Tensor  # int64 [2]
    failure: Tensor  # int64 [6]

    @classmethod
    def create(
        cls, rank: int, rings: Rings, peers: Tensor, memory: Tensor, symmetric: Tensor, queue_pairs: Tensor
    ) -> "Link":
        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.int64, device=memory.device)

        workspace = Workspace(rings.shape)
        positions = zeros(2, rings.shape.topology.nodes, rings.channels)
        return cls(
            rank, workspace, rings, peers, memory, symmetric, positions, queue_pairs, zeros(2), zeros(6)
        )

    def struct(self) -> Struct:
        shape, rings = self.workspace.shape, self.rings
        topology = shape.topology
        return join(
            [
                Struct("IIIP", self.rank, topology.nodes, topology.gpus_per_node, self.peers),
                Struct(
                    "PIIIQ",
                    self.memory,
                    topology.size,
                    shape.local_experts,
                    shape.max_tokens_per_rank,
                    self.workspace.slot_bytes,
                ),
                Struct(
                    "PIIIIIQ",
                    self.symmetric,
                    topology.nodes,
                    rings.channels,
                    rings.chunk,
                    rings.depth,
                    rings.header_words,
                    rings.message_bytes,
                ),
                Struct("PP", self.positions, self.queue_pairs),
            ]
        )


@dataclass(eq=False)
class Layout:
    """What a dispatch leaves for its combine: see `Layout` in csrc/kernels/internode.cuh."""

    experts: Tensor
    sent_index: Tensor
    sent_tokens: Tensor
    sent_counts: Tensor
    forward_slot: Tensor
    forward_ranges: Tensor
    forward_counts: Tensor
    rows: Tensor
    ranges: Tensor

    @classmethod
    def empty(cls, shape: Shape, tokens: int, channels: int, device: torch.device, fill: int = 0) -> "Layout":
        nodes, gpus, size = shape.topology.nodes, shape.topology.gpus_per_node, shape.topology.size
        most = shape.max_tokens_per_rank

        def full(*sizes: int) -> Tensor:
            return torch.full(sizes, fill, dtype=torch.int32, device=device)

        return cls(
            full(tokens, shape.num_topk),
            full(tokens, nodes),
            full(nodes, most),
            full(nodes, channels),
            full(nodes, most, gpus),
            full(nodes, channels, 2),
            full(nodes, channels, gpus),
            full(size, most, shape.num_topk),
            full(size, channels, 2),
        )

    @property
    def channels(self) -> int:
        return self.sent_counts.shape[1]

    def struct(self) -> Struct:
        tables = (self.experts, self.sent_index, self.sent_tokens, self.sent_counts, self.forward_slot)
        more = (self.forward_ranges, self.forward_counts, self.rows, self.ranges)
        return Struct("9PII", *tables, *more, self.channels, self.forward_slot.shape[1])


@dataclass(eq=False)
class Arrivals:
    """Where one rank's dispatch writes: see `Received` in csrc/kernels/dispatch.cuh."""

    x: Tensor | QuantizedTensor
    topk_idx: Tensor
    topk_weights: Tensor | None
    group_offsets: Tensor


def dispatch_call(
    link: Link,
    error: Tensor | int,
    x: Tensor | QuantizedTensor,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    out: Arrivals,
    layout: Layout,
    timeout: float,
) -> Struct:
    """As `DispatchInternode` in csrc/kernels/dispatch_internode.cuh."""
    shape = link.workspace.shape
    data, scales = (x, None) if isinstance(x, Tensor) else (x.data, x.scales)
    out_data, out_scales = (out.x, None) if isinstance(out.x, Tensor) else (out.x.data, out.x.scales)
    tiles = 0 if scales is None else scales.shape[1]
    row_bytes = data.shape[1] * data.element_size()
    tokens = Struct(
        "PPqqPPIIII",
        data,
        scales,
        0 if scales is None else scales.stride(0),
        0 if scales is None else scales.stride(1),
        topk_idx,
        topk_weights,
        data.shape[0],
        row_bytes,
        tiles,
        shape.num_topk,
    )
    received = Struct(
        "PPqPPPPPI",
        out_data,
        out_scales,
        0 if out_scales is None else out_scales.stride(1),
        out.topk_idx,
        out.topk_weights,
        out.group_offsets,
        layout.rows,
        layout.ranges,
        out_data.shape[0],
    )
    metadata = 0 if topk_idx is None else 8 * shape.num_topk
    return join(
        [
            link.struct(),
            Struct("PPP", link.sequence, link.failure, error),
            tokens,
            received,
            layout.struct(),
            Struct("QQ", message_bytes(row_bytes, tiles, metadata), int(timeout * 1e9)),
        ]
    )


def combine_call(
    link: Link,
    y: Tensor,
    layout: Layout,
    topk_weights: Tensor | None,
    weights_grad: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    out_weights_grad: Tensor | None,
    timeout: float,
) -> Struct:
    """As `CombineInternode` in csrc/kernels/combine_internode.cuh; link and layout are of combine, dispatch."""
    shape = link.workspace.shape
    gradients = 0 if weights_grad is None else 4 * shape.num_topk
    return join(
        [
            link.struct(),
            Struct("PP", link.sequence, link.failure),
            Struct("PPP", y, topk_weights, weights_grad),
            Struct("PPPI", bias, out, out_weights_grad, out.shape[0]),
            layout.struct(),
            Struct("II", shape.hidden, shape.num_topk),
            Struct("QQ", message_bytes(2 * shape.hidden, 0, gradients), int(timeout * 1e9)),
        ]
    )


def message_bytes(row_bytes: int, tiles: int, metadata: int) -> int:
    """Of one call's messages over InfiniBand: a row, its scales, 8 bytes a choice."""
    return round_up(row_bytes + 4 * tiles + metadata, 16)


def split_warps(warps: int, first: int, second: int, least: int) -> int:
    """How many of `warps` do the first of two kinds of work; as in csrc/kernels/internode.cuh.

    first, second: rows that each moves in this call. In proportion to them; one or more where there is such
    work, and `least` are left for the second.
    """
    if first == 0:
        return 0
    both = first + second
    return max(1, min((2 * warps * first + both) // (2 * both), warps - least))


def launch_shape(rings: Rings, num_sms: int, warps: int = WARPS) -> tuple[tuple, tuple, int]:
    """Grid, block and bytes of shared memory."""
    shape = rings.shape
    even = max(warps * rings.header_words, shape.topology.nodes * rings.depth)
    odd = (shape.topology.size + 1) * shape.local_experts
    return (num_sms, 1, 1), (32 * warps, 1, 1), max(4 * even, 4 * odd, kernels.OWN_SM)

