"""csrc/kernels/dispatch.cuh and combine.cuh: the size of a rank's memory, and what a launch passes."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import launch
from ..by_value import Struct, join
from ..checks import round_up
from ..device_error import ErrorCode
from ..jit import Kernel
from ..quantized import QuantizedTensor
from .transport import Shape
from .types import Stall

MAX_CHANNELS = 32  # csrc/kernels/channel.cuh
MAX_RANKS = 8  # of a node: a warp each
MAX_TOPK = 32  # a lane each
MAX_THREADS = 512  # of a block, for their registers
SHARED_BYTES = 227 * 1024  # of a block: all that an SM gives one
OWN_SM = 116 * 1024  # bytes of shared memory: more than half of an SM's, so that a block has it alone

DISPATCH = Kernel("dispatch.cuh", "dispatch_tokens")
DISPATCH_AGAIN = Kernel("dispatch.cuh", "dispatch_again")
COMBINE = Kernel("combine.cuh", "combine_tokens")

OPS = ("dispatch", "combine")
ROLES = ("send", "receive", "forward")
FAULTS = (ErrorCode.DISPATCH_EXPERTS, ErrorCode.DISPATCH_FORM, ErrorCode.DISPATCH_OVERFLOW)


class Form(enum.IntFlag):
    """What is dispatched and how, as in csrc/kernels/dispatch_layout.cuh."""

    FP8 = 1
    WEIGHTS = 2
    TOKEN_ORDER = 4


@dataclass(frozen=True)
class Workspace:
    """Bytes of a rank's memory that its peers write to, laid out as in csrc/kernels/channel.cuh."""

    shape: Shape

    @property
    def slot_bytes(self) -> int:
        """Of a token on the wire: a row in BF16, or in FP8 with its scales, and at most 8 bytes a choice."""
        return round_up(2 * self.shape.hidden + 8 * self.shape.num_topk, 16)

    @property
    def announcement_words(self) -> int:
        return 7 + self.shape.topology.size

    @property
    def area_bytes(self) -> int:
        """Of one op."""
        ranks = self.shape.topology.size
        words = 8 * ranks * (1 + MAX_CHANNELS)
        counts = 4 * ranks * MAX_CHANNELS * (self.shape.local_experts + self.announcement_words)
        slots = ranks * self.shape.max_tokens_per_rank * self.slot_bytes
        return round_up(words + counts, 16) + slots

    def area(self, op: str) -> int:
        """Where that of dispatch or combine begins."""
        return given_up_bytes(self.shape.topology.size) + OPS.index(op) * self.area_bytes

    @property
    def size(self) -> int:
        return self.area(OPS[-1]) + self.area_bytes


def given_up_bytes(ranks: int) -> int:
    """With which a rank's memory begins: csrc/kernels/given_up.cuh."""
    return round_up(8 * (ranks * ranks + 1), 16)


@dataclass(frozen=True)
class Failure:
    """Words of the record of a wait in vain: channel.cuh, `Failure`."""

    role: int
    peer: int
    channel: int
    expected: int
    seen: int
    missing: int
    recorded: int

    def cause(self, rank: int) -> str:
        return cause_of(rank, self.peer, self.missing, self.seen, self.expected)


def cause_of(rank: int, peer: int, missing: int, seen: int, expected: int) -> str:
    """Why `rank`, which waited for `peer`, names `missing`."""
    word = f"word is {seen:#x}, expected at least {expected:#x}"
    if missing == peer:
        return f"its {word}"
    whom = f"rank {missing}"
    if missing == rank:
        whom = "this rank, which came too late or is not heard"
    return f"it needed rank {peer}, whose {word}, but that one has given up waiting for {whom}"


@dataclass(frozen=True)
class Fault:
    """Words of the record of a call that is wrong: dispatch_layout.cuh, `Fault`."""

    code: int
    rank: int
    index: int
    value: int
    expected: int
    recorded: int

    def message(self, shape: Shape) -> str:
        rank, value = self.rank, self.value
        if self.code == ErrorCode.DISPATCH_EXPERTS:
            token, k = divmod(self.index, shape.num_topk)
            what = "twice in its row" if 0 <= value < shape.num_experts else "out of range"
            return (
                f"dispatch: topk_idx[{token}, {k}] of rank {rank} is {value}, {what}; expected distinct "
                f"experts 0 to {shape.num_experts - 1}, or -1 for none; no rank has moved a token"
            )
        if self.code == ErrorCode.DISPATCH_FORM:
            return (
                f"dispatch: rank {rank} passes {_describe(value)}, another one {_describe(self.expected)}; "
                "expected the same on all ranks"
            )
        return (
            f"dispatch: rank {rank} is sent {value} rows, expected at most its max_recv_tokens = "
            f"{self.expected}; raise it, or pass None for as many as there are"
        )


def _describe(form: int) -> str:
    return (
        f"{'FP8' if form & Form.FP8 else 'BF16'} x {'with' if form & Form.WEIGHTS else 'without'} "
        f"topk_weights in {'token' if form & Form.TOKEN_ORDER else 'expert'} order"
    )


@dataclass(eq=False)
class Peers:
    """What a rank keeps between calls: all ranks' memories, its place in the sequence of each op, records.

    Records, failure to error, are host memory, which on a GPU is pinned: kernels write them there, and the
    host reads them without asking the device.
    """

    rank: int
    table: Tensor  # int64 [R], addresses of the ranks' memories as this rank sees them
    sequence: Tensor  # int64 [2 ops, 4], csrc/kernels/channel.cuh
    counters: Tensor  # int64 [2 ops, 2 roles, MAX_CHANNELS, R, 3], the same
    failure: Tensor  # int64 [2 ops, 7], words of Failure
    fault: Tensor  # int64 [6], words of Fault
    error: Tensor  # int32 [1], as error.cuh; its code is in the fault too
    queue_pairs: Tensor | None = None  # int32, one or more, where there are other nodes to tell of a failure

    def __post_init__(self) -> None:
        """As the host reads them: no operator, no copy."""
        self.failure_words, self.fault_words = self.failure.numpy(), self.fault.numpy()
        self.error_word = self.error.numpy()

    def record(self, words: Tensor) -> Tensor | int:
        """As a launch on this rank's device takes it."""
        return words.data_ptr() if self.table.is_cuda else words


def failure_of(peers: Peers, op: str) -> Failure | None:
    """What `recorded` says of it so far."""
    words = peers.failure_words[OPS.index(op)]
    return Failure(*words.tolist()) if words[-1] else None


def take_fault(peers: Peers, stream: "torch.cuda.Stream | None") -> Fault | None:
    """The same; it is told once, and the next one will be recorded again. stream: of this rank's launches."""
    words = peers.fault_words
    if not words[-1]:
        return None
    fault = Fault(*words.tolist())
    words[:] = peers.error_word[:] = 0
    with torch.cuda.stream(stream):  # on a CPU it does nothing
        peers.sequence[:, -1] = 0
    return fault


@dataclass(eq=False)
class Arrivals:
    """Where one rank's dispatch writes; see `Received` in csrc/kernels/dispatch_layout.cuh."""

    x: Tensor | QuantizedTensor
    topk_idx: Tensor
    topk_weights: Tensor | None
    group_offsets: Tensor
    sent_slot: Tensor  # int32 [T, R]: the slot of a token at each rank, or -1
    rows: Tensor  # int32 [R, max_tokens, K]
    ranges: Tensor  # int32 [R, channels, 2]

    def tables(self) -> tuple[Tensor | None, ...]:
        """All but x."""
        return self.group_offsets, self.sent_slot, self.rows, self.ranges, self.topk_idx, self.topk_weights


def table(calls: Sequence[Struct]) -> Struct:
    """What a kernel takes: the call of each rank of the launch."""
    return join(calls, MAX_RANKS)


def rank_struct(workspace: Workspace, peers: Peers, op: str, timeout: float) -> Struct:
    shape, number = workspace.shape, OPS.index(op)
    return Struct(
        "PPPPQQQIIIIIP",
        peers.table,
        peers.sequence[number],
        peers.record(peers.failure[number]),
        peers.counters[number],
        workspace.area(op),
        workspace.slot_bytes,
        int(timeout * 1e9),
        peers.rank,
        shape.topology.size,
        shape.local_experts,
        shape.max_tokens_per_rank,
        shape.topology.gpus_per_node,
        peers.queue_pairs,
    )


@dataclass(frozen=True, eq=False)
class DispatchOperands:
    """Of one rank's call. topk_idx is None where the layout `came` is used again. out: where rows go."""

    x: Tensor | QuantizedTensor
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    out: Tensor | QuantizedTensor
    came: Arrivals
    token_order: bool
    timeout: float  # seconds


@dataclass(frozen=True, eq=False)
class CombineOperands:
    """Of one rank's call. topk_idx: of its own tokens; `came` is of their dispatch."""

    y: Tensor
    topk_idx: Tensor
    came: Arrivals
    topk_weights: Tensor | None
    weights_grad: Tensor | None
    bias: Tensor | None
    out: Tensor
    out_weights_grad: Tensor | None
    token_order: bool
    timeout: float  # seconds


def dispatch_call(workspace: Workspace, peers: Peers, o: DispatchOperands) -> Struct:
    """`Call` of csrc/kernels/dispatch_layout.cuh."""
    data, scales = (o.x, None) if isinstance(o.x, Tensor) else (o.x.data, o.x.scales)
    out_data, out_scales = (o.out, None) if isinstance(o.out, Tensor) else (o.out.data, o.out.scales)
    form = Form.FP8 * (scales is not None) | Form.WEIGHTS * (o.topk_weights is not None)
    tokens = Struct(
        "PPqqPPPIIIII",
        data,
        scales,
        0 if scales is None else scales.stride(0),
        0 if scales is None else scales.stride(1),
        o.topk_idx,
        o.topk_weights,
        o.came.sent_slot,
        data.shape[0],
        data.shape[1] * data.element_size(),
        0 if scales is None else scales.shape[1],
        workspace.shape.num_topk,
        form | Form.TOKEN_ORDER * o.token_order,
    )
    received = Struct(
        "PPqPPPPPII",
        out_data,
        out_scales,
        0 if out_scales is None else out_scales.stride(1),
        o.came.topk_idx,
        o.came.topk_weights,
        o.came.group_offsets,
        o.came.rows,
        o.came.ranges,
        out_data.shape[0],
        o.came.ranges.shape[1],
    )
    rank = rank_struct(workspace, peers, "dispatch", o.timeout)
    records = Struct("PP", peers.record(peers.fault), peers.record(peers.error))
    return join([rank, tokens, received, records])


def combine_call(workspace: Workspace, peers: Peers, o: CombineOperands) -> Struct:
    """`Call` of csrc/kernels/combine.cuh."""
    shape, came = workspace.shape, o.came
    rows = Struct("PPPPP", o.y, o.topk_weights, o.weights_grad, came.rows, came.ranges)
    home = Struct("PPPPP", o.topk_idx, came.sent_slot, o.bias, o.out, o.out_weights_grad)
    sizes = o.out.shape[0], shape.hidden, shape.num_topk, came.ranges.shape[1], o.token_order
    return join([rank_struct(workspace, peers, "combine", o.timeout), rows, home, Struct("IIIII", *sizes)])


def stalls(peers: Peers) -> tuple[Stall, ...]:
    """Where this rank has waited."""
    counters = peers.counters.cpu()
    found = []
    for op, role, channel, peer in counters[..., 0].nonzero().tolist():
        waits, nanoseconds, _ = counters[op, role, channel, peer].tolist()
        found.append(Stall(OPS[op], ROLES[role], channel, peer, waits, nanoseconds / 1e9))
    return tuple(found)


def bytes_sent(peers: Peers) -> int:
    """To other ranks."""
    by_peer = peers.counters[..., 2].sum((0, 1, 2)).tolist()
    return sum(by_peer) - by_peer[peers.rank]


def teams_of(shape: Shape, num_sms: int) -> int:
    """Of a block: each has a channel and a warp a rank. As many as threads and channels allow."""
    return max(1, min(MAX_THREADS // (32 * shape.topology.size), MAX_CHANNELS // (num_sms // 2)))


def channels_of(shape: Shape, num_sms: int) -> int:
    """Of a dispatch."""
    return num_sms // 2 * teams_of(shape, num_sms)


def shape_of_launch(shape: Shape, num_sms: int, launched: int = 1) -> tuple[launch.Dim3, launch.Dim3, int]:
    """Grid, block and bytes of shared memory of as many ranks, num_sms blocks each."""
    ranks, teams = shape.topology.size, teams_of(shape, num_sms)
    words = teams * (ranks * shape.local_experts + max(ranks, shape.local_experts))
    needed = 4 * words + 1024 * ranks * teams  # stages of some size; they take what is there
    return (num_sms * launched, 1, 1), (32 * ranks * teams, 1, 1), max(needed, SHARED_BYTES)


def empty_state(rank: int, table: Tensor) -> Peers:
    def zeros(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(sizes, dtype=dtype, device=table.device)

    def record(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(sizes, dtype=dtype, pin_memory=table.is_cuda)

    counters = zeros(len(OPS), len(ROLES), MAX_CHANNELS, table.numel(), 3)
    records = record(len(OPS), 7), record(6), record(1, dtype=torch.int32)
    return Peers(rank, table, zeros(len(OPS), 4), counters, *records)
