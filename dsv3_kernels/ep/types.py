"""What a buffer returns: results, the handle, events, status."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..quantized import QuantizedTensor


@dataclass(frozen=True)
class Topology:
    """`nodes` x `gpus_per_node` ranks; rank r is on node r // gpus_per_node."""

    nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 1:
            raise ValueError(f"Topology: got {self}, expected 1 or more of each")

    @property
    def size(self) -> int:
        return self.nodes * self.gpus_per_node


class Event:
    """The end of an asynchronous call: what the call returned may be read after `wait()`.

    On a GPU `wait()` makes the current stream wait and returns at once; on a CPU it returns when the data is
    there. To wait twice is harmless. It raises `ep.TimeoutError` as the call would have; on a GPU what the
    kernels have reported until then, and `synchronize()`, which waits for the data itself, all of it.
    """

    def __init__(
        self,
        finish: Callable[[], None] | None = None,
        cuda: "torch.cuda.Event | None" = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._finish, self._cuda, self._check = finish, cuda, check

    @staticmethod
    def here() -> "Event":
        """The present end of the current CUDA stream; without CUDA, one that has come."""
        if not torch.cuda.is_available():
            return Event()
        event = torch.cuda.Event()
        event.record()
        return Event(cuda=event)

    def wait(self) -> None:
        self.wait_on(None)

    def wait_on(self, stream: "torch.cuda.Stream | None") -> None:
        """As `wait`, for a stream in place of the current one."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        if self._check is not None:
            self._check()
        if self._cuda is not None:
            (stream or torch.cuda.current_stream()).wait_event(self._cuda)
        elif stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    def synchronize(self) -> None:
        """Return when the data is there."""
        self.wait()
        if self._cuda is not None:
            self._cuda.synchronize()
        if self._check is not None:
            self._check()


@dataclass(frozen=True, eq=False)
class Handle:
    """The layout of one dispatch: what its combine, and later dispatches of the same routing, need.

    topk_idx: int64 `[T, K]`, as it was dispatched. expert_order: the order of the received rows; rows: how
    many there are, those past the last received one included. group_offsets: as in `DispatchResult`, None in
    token order. tokens_per_expert: int32 `[E_local]`. layout: the transport's own.
    """

    owner: object = field(repr=False)
    topk_idx: Tensor
    expert_order: bool
    rows: int
    group_offsets: Tensor | None
    tokens_per_expert: Tensor
    layout: object = field(repr=False)

    @property
    def num_tokens(self) -> int:
        return self.topk_idx.shape[0]


@dataclass(frozen=True, eq=False)
class DispatchResult:
    """What a rank received.

    In expert order a row is a (token, expert) pair, sorted by local expert, then source rank, then token; in
    token order a row is a token, sorted by source rank, then token.

    x: bfloat16 `[rows, hidden]`, or a QuantizedTensor with MN-major scales.
    group_offsets: int32 `[E_local + 1]`, as `grouped_fp8_gemm` takes them; None in token order.
    topk_idx: int64, local expert: `[rows]` in expert order; `[rows, K]` in token order, -1 where the expert
        is another rank's.
    topk_weights: float32, shaped as topk_idx, 0 where that is -1; None if none were dispatched.
    tokens_per_expert: int32 `[E_local]`.
    Rows past the last received one (there are some only under `max_recv_tokens`) have topk_idx -1 and zeros
    in x here; kernels leave them in x unwritten.
    """

    x: Tensor | QuantizedTensor
    topk_idx: Tensor
    topk_weights: Tensor | None
    group_offsets: Tensor | None
    tokens_per_expert: Tensor
    handle: Handle
    event: Event


@dataclass(frozen=True, eq=False)
class CombineResult:
    """x: bfloat16 `[T, hidden]`. weights_grad: float32 `[T, K]`, or None if none was combined."""

    x: Tensor
    weights_grad: Tensor | None
    event: Event


@dataclass(frozen=True)
class Stall:
    """How often and how long one role of one channel has waited for a peer."""

    op: str
    role: str
    channel: int
    peer: int
    waits: int
    seconds: float


@dataclass(frozen=True)
class Status:
    """What a buffer has done so far on this rank. reason: why its transport is no faster one, or empty.

    internode: the design of the kernels between nodes, "rings" or "lean"; empty where none of them run.
    """

    transport: str
    reason: str
    rank: int
    topology: Topology
    dispatches: int
    combines: int
    bytes_sent: int
    stalls: tuple[Stall, ...]
    failure: str | None
    internode: str = ""
