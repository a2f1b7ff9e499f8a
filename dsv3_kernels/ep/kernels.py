"""csrc/kernels/dispatch.cuh and combine.cuh: the size of a rank's workspace, and what a launch passes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import launch
from ..checks import round_up
from ..jit import Kernel
from ..quantized import QuantizedTensor
from .transport import Shape

MAX_CHANNELS = 32  # csrc/kernels/channel.cuh
MAX_RANKS = 8  # of a node: a warp each
MAX_TOPK = 32  # a lane each
OWN_SM = 116 * 1024  # bytes of shared memory: more than half of an SM's, so that a block has it alone

DISPATCH = Kernel("dispatch.cuh", "dispatch_tokens")
DISPATCH_AGAIN = Kernel("dispatch.cuh", "dispatch_again")
COMBINE = Kernel("combine.cuh", "combine_tokens")


@dataclass(frozen=True)
class Workspace:
    """Bytes of a rank's memory that its peers write to, laid out as in csrc/kernels/channel.cuh."""

    shape: Shape

    @property
    def slot_bytes(self) -> int:
        """Of a token on the wire: a row in BF16, or in FP8 with its scales, and at most 8 bytes a choice."""
        return round_up(2 * self.shape.hidden + 8 * self.shape.num_topk, 16)

    @property
    def size(self) -> int:
        ranks = self.shape.topology.size
        words = 8 * ranks * (1 + MAX_CHANNELS)
        counts = 4 * ranks * MAX_CHANNELS * (self.shape.local_experts + 3)
        slots = ranks * self.shape.max_tokens_per_rank * self.slot_bytes
        return round_up(words + counts, 16) + slots


@dataclass(eq=False)
class Peers:
    """What a rank keeps between calls: all ranks' workspaces, its place in their sequence, its failure."""

    rank: int
    table: Tensor  # int64 [R], addresses as this rank sees them
    sequence: Tensor  # int64 [2]
    failure: Tensor  # int64 [6]


@dataclass(eq=False)
class Arrivals:
    """Where one rank's dispatch writes; see `Received` in csrc/kernels/dispatch.cuh."""

    x: Tensor | QuantizedTensor
    topk_idx: Tensor
    topk_weights: Tensor | None
    group_offsets: Tensor
    sent_slot: Tensor  # int32 [T, R]: the slot of a token at each rank, or -1
    rows: Tensor  # int32 [R, max_tokens, K]
    ranges: Tensor  # int32 [R, channels, 2]


def dispatch_arguments(
    workspace: Workspace,
    peers: Peers,
    error: Tensor | int,
    x: Tensor | QuantizedTensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    out: Arrivals,
    timeout: float,
) -> tuple[launch.Argument, ...]:
    """In the kernel's order."""
    shape = workspace.shape
    data, scales = (x, None) if isinstance(x, Tensor) else (x.data, x.scales)
    out_data, out_scales = (out.x, None) if isinstance(out.x, Tensor) else (out.x.data, out.x.scales)
    return (
        peers.table,
        peers.sequence,
        peers.failure,
        error,
        data,
        0 if scales is None else scales,
        0 if scales is None else scales.stride(0),
        0 if scales is None else scales.stride(1),
        topk_idx,
        0 if topk_weights is None else topk_weights,
        out_data,
        0 if out_scales is None else out_scales,
        0 if out_scales is None else out_scales.stride(1),
        out.topk_idx,
        0 if out.topk_weights is None else out.topk_weights,
        out.group_offsets,
        out.sent_slot,
        out.rows,
        out.ranges,
        peers.rank,
        shape.topology.size,
        data.shape[0],
        shape.max_tokens_per_rank,
        data.shape[1] * data.element_size(),
        0 if scales is None else scales.shape[1],
        shape.num_topk,
        shape.local_experts,
        out_data.shape[0],
        workspace.slot_bytes,
        int(timeout * 1e9),
    )


def dispatch_again_arguments(
    workspace: Workspace,
    peers: Peers,
    x: Tensor | QuantizedTensor,
    out: Tensor | QuantizedTensor,
    came: Arrivals,
    timeout: float,
) -> tuple[launch.Argument, ...]:
    """In the kernel's order. `came` is of the dispatch whose layout serves again."""
    shape = workspace.shape
    data, scales = (x, None) if isinstance(x, Tensor) else (x.data, x.scales)
    out_data, out_scales = (out, None) if isinstance(out, Tensor) else (out.data, out.scales)
    return (
        peers.table,
        peers.sequence,
        peers.failure,
        data,
        0 if scales is None else scales,
        0 if scales is None else scales.stride(0),
        0 if scales is None else scales.stride(1),
        out_data,
        0 if out_scales is None else out_scales,
        0 if out_scales is None else out_scales.stride(1),
        came.sent_slot,
        came.rows,
        came.ranges,
        peers.rank,
        shape.topology.size,
        data.shape[0],
        shape.max_tokens_per_rank,
        data.shape[1] * data.element_size(),
        0 if scales is None else scales.shape[1],
        shape.num_topk,
        shape.local_experts,
        came.ranges.shape[1],
        workspace.slot_bytes,
        int(timeout * 1e9),
    )


def combine_arguments(
    workspace: Workspace,
    peers: Peers,
    y: Tensor,
    topk_idx: Tensor,
    came: Arrivals,
    topk_weights: Tensor | None,
    weights_grad: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    out_weights_grad: Tensor | None,
    timeout: float,
) -> tuple[launch.Argument, ...]:
    """In the kernel's order. `workspace` and `peers` are those of combine, `came` is of the dispatch."""
    shape = workspace.shape
    return (
        peers.table,
        peers.sequence,
        peers.failure,
        y,
        0 if topk_weights is None else topk_weights,
        0 if weights_grad is None else weights_grad,
        came.rows,
        came.ranges,
        topk_idx,
        came.sent_slot,
        0 if bias is None else bias,
        out,
        0 if out_weights_grad is None else out_weights_grad,
        peers.rank,
        shape.topology.size,
        out.shape[0],
        shape.max_tokens_per_rank,
        shape.hidden,
        shape.num_topk,
        shape.local_experts,
        came.ranges.shape[1],
        workspace.slot_bytes,
        int(timeout * 1e9),
    )


def shape_of_launch(shape: Shape, num_sms: int) -> tuple[launch.Dim3, launch.Dim3, int]:
    """Grid, block and bytes of shared memory."""
    ranks = shape.topology.size
    needed = 4 * (ranks + 1) * shape.local_experts
    return (num_sms, 1, 1), (32 * ranks, 1, 1), max(needed, OWN_SM)


def empty_state(rank: int, table: Tensor) -> Peers:
    device = table.device
    return Peers(
        rank,
        table,
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(6, dtype=torch.int64, device=device),
    )
