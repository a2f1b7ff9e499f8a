"""The kernels of a node, csrc/kernels/dispatch.cuh and combine.cuh: what a rank keeps, launches and returns.

Transports differ in where ranks run and how they map each other's memory, and in nothing else here:
  emulator  a rank of `emulator.VirtualCluster.run`; the memories are one address space
  nvlink    a process with a GPU; memory by `nvlink.connect`
  loopback  all ranks in one launch on one GPU, real or virtual (`loopback.LoopbackBuffer`)
No call reads the device's memory on the host, but for a dispatch without max_recv_tokens, which has to know
how many rows came. What kernels report lies in words that the host reads without asking the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..by_value import Struct
from ..jit import Kernel
from ..quantized import ROW, QuantizedTensor, empty_mn_major
from . import kernels
from .errors import Fault, TimeoutError
from .streams import StreamTurn, Turn
from .transport import CombineCall, DispatchCall, Shape
from .types import CombineResult, DispatchResult, Event, Handle, Stall


@dataclass(frozen=True)
class Launch:
    """One kernel of a call. arguments: behind the table of ranks' calls. dependent: on the one before it."""

    kernel: Kernel
    grid: launch.Dim3
    block: launch.Dim3
    shared_bytes: int
    arguments: tuple[int, ...]
    dependent: bool = False


class KernelRank:
    """One rank: its memory and what it keeps between calls.

    memory: uint8 zeros, `kernels.Workspace(shape).size` of them, that all ranks have mapped. addresses: of
    each rank's, as this one sees it. kept: what must live as long. stream: of its launches, CUDA's only.
    """

    def __init__(
        self,
        shape: Shape,
        rank: int,
        memory: Tensor,
        addresses: Sequence[int],
        timeout: float,
        kept: object = None,
        stream: "torch.cuda.Stream | None" = None,
    ) -> None:
        self.shape, self.rank, self.timeout = shape, rank, timeout
        self.workspace = kernels.Workspace(shape)
        self.peers = kernels.empty_state(rank, torch.tensor(addresses, device=memory.device))
        self.error: TimeoutError | None = None
        self._kept = memory, kept
        if memory.is_cuda and stream is None:
            stream = torch.cuda.Stream(memory.device)
        self.stream = stream

    def turn(self, call: DispatchCall | CombineCall) -> Turn:
        if self.stream is None:
            return Turn(call.previous_event)
        return StreamTurn(self.stream, call.previous_event, call.async_op)

    def reported(self) -> Exception | None:
        """What the kernels have reported so far. A failure stays, a fault is told once."""
        for op in kernels.OPS:
            failure = kernels.failure_of(self.peers, op)
            if failure is not None and self.error is None:
                role, cause = kernels.ROLES[failure.role - 1], failure.cause(self.rank)
                self.error = TimeoutError(
                    op, self.rank, [failure.missing], role, failure.channel, self.timeout, cause
                )
        if self.error is not None:
            return self.error
        fault = kernels.take_fault(self.peers, self.stream)
        return None if fault is None else Fault(fault.message(self.shape))

    def check(self) -> None:
        check([self])

    def kernel(self, op: str, again: bool = False) -> Kernel:
        if op == "combine":
            return kernels.COMBINE
        return kernels.DISPATCH_AGAIN if again else kernels.DISPATCH

    def launches(self, call: DispatchCall | CombineCall, launched: int) -> list[Launch]:
        """Of as many ranks."""
        op = "combine" if isinstance(call, CombineCall) else "dispatch"
        if call.num_sms > 2 * kernels.MAX_CHANNELS:
            most = 2 * kernels.MAX_CHANNELS
            raise ValueError(f"{op}: num_sms is {call.num_sms}, expected at most {most}")
        kernel = self.kernel(op, isinstance(call, DispatchCall) and call.handle is not None)
        return [Launch(kernel, *self.shape_of_launch(call.num_sms, launched), (call.num_sms,))]

    def channels_of(self, num_sms: int) -> int:
        return kernels.channels_of(self.shape, num_sms)

    def shape_of_launch(self, num_sms: int, launched: int) -> tuple[launch.Dim3, launch.Dim3, int]:
        return kernels.shape_of_launch(self.shape, num_sms, launched)

    def dispatch_call(self, operands: kernels.DispatchOperands) -> Struct:
        return kernels.dispatch_call(self.workspace, self.peers, operands)

    def combine_call(self, operands: kernels.CombineOperands) -> Struct:
        return kernels.combine_call(self.workspace, self.peers, operands)

    def arrivals(self, call: DispatchCall, idx: Tensor, rows: int) -> kernels.Arrivals:
        shape = self.shape
        size, most = shape.topology.size, shape.max_tokens_per_rank
        shape_of_rows = (rows,) if call.expert_order else (rows, shape.num_topk)

        def integers(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=torch.int32, device=idx.device)

        return kernels.Arrivals(
            _rows_for(call.x, rows),
            idx.new_full(shape_of_rows, -1),
            None if call.topk_weights is None else call.topk_weights.new_zeros(shape_of_rows),
            integers(shape.local_experts + 1),
            integers(idx.shape[0], size),
            integers(size, most, shape.num_topk),
            integers(size, self.channels_of(call.num_sms), 2),
        )


class IntranodeTransport(KernelRank):
    """A rank that launches alone."""

    def __init__(self, name: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.name = name
        launch.also_raise(self)

    def dispatch(self, call: DispatchCall) -> DispatchResult:
        return dispatch([self], [call])[0]

    def combine(self, call: CombineCall) -> CombineResult:
        return combine([self], [call])[0]

    def bytes_sent(self) -> int:
        return kernels.bytes_sent(self.peers)

    def stalls(self) -> tuple[Stall, ...]:
        return kernels.stalls(self.peers)

    def failure(self) -> str | None:
        self.reported()
        return None if self.error is None else str(self.error)


def refuse(shape: Shape, nodes: int = 1) -> str | None:
    """Why the kernels, those for so many nodes, cannot serve this shape."""
    if shape.topology.nodes > nodes or shape.topology.gpus_per_node > kernels.MAX_RANKS:
        most = f"{nodes} node{'s' * (nodes > 1)} of at most {kernels.MAX_RANKS} ranks"
        return f"got {shape.topology}, expected {most} by the kernels"
    if shape.num_topk > kernels.MAX_TOPK:
        return f"num_topk is {shape.num_topk}, expected at most {kernels.MAX_TOPK} by the kernels"
    if shape.dtype != torch.bfloat16:
        return f"dtype is {shape.dtype}, expected torch.bfloat16, the one dtype of the kernels"
    return None


def emulated(group: Any, gpu: Any, shape: Shape, timeout: float) -> IntranodeTransport:
    """group: an `emulator.Group`."""
    memory = torch.zeros(kernels.Workspace(shape).size, dtype=torch.uint8)
    every = group.all_gather_object((gpu.address_of(memory), memory))
    addresses, memories = zip(*every, strict=True)
    # A peer's memory lives on while it is mapped: its last word to us comes late.
    return IntranodeTransport("emulator", shape, group.rank, memory, addresses, timeout, memories)


def check(ranks: Sequence[KernelRank]) -> None:
    """Raises what kernels of these ranks have reported so far: of several the first."""
    found = [error for rank in ranks if (error := rank.reported()) is not None]
    if found:
        raise found[0]


def dispatch(ranks: Sequence[KernelRank], calls: Sequence[DispatchCall]) -> list[DispatchResult]:
    """One call of each rank, all in one launch."""
    check(ranks)
    turn, again = ranks[0].turn(calls[0]), calls[0].handle is not None
    with turn.memory():
        works = [_Dispatch(rank, call) for rank, call in zip(ranks, calls, strict=True)]
    event = _run(ranks[0].launches(calls[0], len(ranks)), turn, ranks, works)
    if not again and calls[0].max_recv_tokens is None:
        check(ranks)  # the host has waited, and reads on
    return [work.result(event) for work in works]


def combine(ranks: Sequence[KernelRank], calls: Sequence[CombineCall]) -> list[CombineResult]:
    check(ranks)
    turn = ranks[0].turn(calls[0])
    with turn.memory():
        works = [_Combine(rank, call) for rank, call in zip(ranks, calls, strict=True)]
    event = _run(ranks[0].launches(calls[0], len(ranks)), turn, ranks, works)
    return [work.result(event) for work in works]


def _run(
    launches: Sequence[Launch],
    turn: Turn,
    ranks: Sequence[KernelRank],
    works: "Sequence[_Dispatch | _Combine]",
) -> Event:
    table = kernels.table([work.struct for work in works])
    with turn.work():
        for part in launches:
            launch.launch(
                part.kernel,
                part.grid,
                part.block,
                (table, *part.arguments),
                shared_bytes=part.shared_bytes,
                cooperative=not part.dependent,
                programmatic=part.dependent,
            )
        for work in works:
            work.launched()
    inputs = [tensor for work in works for tensor in work.inputs]
    outputs = [tensor for work in works for tensor in work.outputs]
    return turn.event(inputs, outputs, lambda: check(ranks))


class _Dispatch:
    """A call of one rank: made where memory is allocated, then `launched`, then its `result`."""

    def __init__(self, rank: KernelRank, call: DispatchCall) -> None:
        self._rank, self._call, shape = rank, call, rank.shape
        self._arrived: int | None = None
        if call.handle is None:
            if call.topk_idx is None:
                raise ValueError("dispatch: a call without a handle needs topk_idx")
            rows = call.max_recv_tokens
            if rows is None:
                rows = shape.topology.size * shape.max_tokens_per_rank
                rows *= min(shape.num_topk, shape.local_experts) if call.expert_order else 1
            self._came = rank.arrivals(call, call.topk_idx, rows)
            self._x = self._came.x
            self._idx = torch.empty_like(call.topk_idx)
            self._sizes = self._came.group_offsets.new_empty(shape.local_experts)
        else:
            self._came, self._sizes = _layout(call.handle), call.handle.tokens_per_expert
            self._x = _rows_for(call.x, call.handle.rows)
            self._idx = torch.empty_like(self._came.topk_idx)
        came, order = self._came, call.expert_order if call.handle is None else call.handle.expert_order
        operands = kernels.DispatchOperands(
            call.x, call.topk_idx, call.topk_weights, self._x, came, not order, rank.timeout
        )
        self.struct = rank.dispatch_call(operands)
        layout = came.tables()
        self.inputs = [call.x, call.topk_idx, call.topk_weights, *(() if call.handle is None else layout)]
        self.outputs = [self._x, self._idx, self._sizes, *(layout if call.handle is None else ())]

    def launched(self) -> None:
        """On the stream of the launch, behind it."""
        call, offsets = self._call, self._came.group_offsets
        if call.topk_idx is None:
            self._idx.copy_(self._came.topk_idx)
            return
        self._idx.copy_(call.topk_idx)
        torch.sub(offsets[1:], offsets[:-1], out=self._sizes)
        if call.max_recv_tokens is None:
            came = offsets[-1] if call.expert_order else self._came.ranges[:, :, 1].sum()
            self._arrived = int(came)

    def result(self, event: Event) -> DispatchResult:
        call, came = self._call, self._came
        if call.handle is not None:
            handle = call.handle
            return DispatchResult(
                self._x, self._idx, None, handle.group_offsets, handle.tokens_per_expert, handle, event
            )
        if self._arrived is not None:
            _narrow(came, self._arrived)
        offsets = came.group_offsets if call.expert_order else None
        rows = came.topk_idx.shape[0]
        handle = Handle(self._rank, self._idx, call.expert_order, rows, offsets, self._sizes, came)
        return DispatchResult(came.x, came.topk_idx, came.topk_weights, offsets, self._sizes, handle, event)


class _Combine:
    def __init__(self, rank: KernelRank, call: CombineCall) -> None:
        handle, came, grad = call.handle, _layout(call.handle), call.weights_grad
        self._x = call.y.new_empty(handle.num_tokens, rank.shape.hidden)
        self._weights_grad = None if grad is None else grad.new_empty(handle.topk_idx.shape)
        operands = kernels.CombineOperands(
            call.y,
            handle.topk_idx,
            came,
            call.topk_weights,
            grad,
            call.bias,
            self._x,
            self._weights_grad,
            not handle.expert_order,
            rank.timeout,
        )
        self.struct = rank.combine_call(operands)
        self.inputs = [call.y, call.topk_weights, grad, call.bias, handle.topk_idx, *came.tables()]
        self.outputs = [self._x, self._weights_grad]

    def launched(self) -> None:
        pass

    def result(self, event: Event) -> CombineResult:
        return CombineResult(self._x, self._weights_grad, event)


def _layout(handle: Handle) -> kernels.Arrivals:
    if not isinstance(handle.layout, kernels.Arrivals):
        raise TypeError(f"handle.layout is {type(handle.layout).__name__}, expected that of the kernels")
    return handle.layout


def _rows_for(x: Tensor | QuantizedTensor, rows: int) -> Tensor | QuantizedTensor:
    """Unwritten; the kernels write what comes."""
    if isinstance(x, Tensor):
        return x.new_empty(rows, x.shape[1])
    scales = empty_mn_major((rows, x.scales.shape[1]), x.data.device)
    return QuantizedTensor(x.data.new_empty(rows, x.data.shape[1]), scales, ROW)


def _narrow(out: kernels.Arrivals, rows: int) -> None:
    """To the rows that came: the host has to know."""
    if isinstance(out.x, Tensor):
        out.x = out.x[:rows]
    else:
        scales = empty_mn_major((rows, out.x.scales.shape[1]), out.x.scales.device)
        out.x = QuantizedTensor(out.x.data[:rows], scales.copy_(out.x.scales[:rows]), ROW)
    out.topk_idx = out.topk_idx[:rows]
    if out.topk_weights is not None:
        out.topk_weights = out.topk_weights[:rows]
