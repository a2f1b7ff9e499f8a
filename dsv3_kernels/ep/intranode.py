"""The kernel transport within a node: csrc/kernels/dispatch.cuh and combine.cuh on memory that all ranks map.

So far the ranks are those of an emulated cluster (`emulator.VirtualCluster.run`), whose memories are one
address space; and rows come in expert order only.
"""

from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..jit import Kernel
from ..quantized import ROW, QuantizedTensor, empty_mn_major
from . import kernels
from .errors import TimeoutError
from .transport import CombineCall, DispatchCall, Shape
from .types import CombineResult, DispatchResult, Event, Handle, Stall

_ROLES = {1: "send", 2: "receive"}


class IntranodeTransport:
    """group: an `emulator.Group`."""

    name = "emulator"

    def __init__(self, group: Any, gpu: Any, shape: Shape, timeout: float) -> None:
        self._shape, self._timeout, self._rank = shape, timeout, group.rank
        if shape.num_topk > kernels.MAX_TOPK:
            raise ValueError(f"Buffer: num_topk is {shape.num_topk}, expected at most {kernels.MAX_TOPK}")
        self._workspace = kernels.Workspace(shape)
        self._failure: TimeoutError | None = None
        self._sent = 0
        self._mapped: list[Tensor] = []
        self._dispatch, self._combine = self._map(group, gpu), self._map(group, gpu)

    def _map(self, group: Any, gpu: Any) -> kernels.Peers:
        """A workspace on every rank. A peer's lives on while it is mapped: its last word to us comes late."""
        memory = torch.zeros(self._workspace.size, dtype=torch.uint8)
        every = group.all_gather_object((gpu.address_of(memory), memory))
        self._mapped += [theirs for _, theirs in every]
        return kernels.empty_state(self._rank, torch.tensor([address for address, _ in every]))

    def bytes_sent(self) -> int:
        return self._sent

    def stalls(self) -> tuple[Stall, ...]:
        return ()

    def failure(self) -> str | None:
        return None if self._failure is None else str(self._failure)

    def _launch(
        self,
        kernel: Kernel,
        peers: kernels.Peers,
        num_sms: int,
        arguments: tuple[launch.Argument, ...],
    ) -> None:
        op = "combine" if kernel is kernels.COMBINE else "dispatch"
        if self._shape.topology.nodes > 1 or self._shape.topology.size > kernels.MAX_RANKS:
            raise NotImplementedError(
                f"{op}: the kernels know one node of up to {kernels.MAX_RANKS} ranks, got "
                f"{self._shape.topology}"
            )
        if self._failure is not None:
            raise self._failure
        if num_sms > 2 * kernels.MAX_CHANNELS:
            raise ValueError(f"{op}: num_sms is {num_sms}, expected at most {2 * kernels.MAX_CHANNELS}")
        grid, block, shared_bytes = kernels.shape_of_launch(self._shape, num_sms)
        launch.launch(kernel, grid, block, arguments, shared_bytes=shared_bytes, cooperative=True)
        claimed, role, peer, channel, expected, seen = peers.failure.tolist()
        if not claimed:
            return
        cause = f"its word is {seen:#x}, expected at least {expected:#x}"
        self._failure = TimeoutError(op, self._rank, [peer], _ROLES[role], channel, self._timeout, cause)
        raise self._failure

    def dispatch(self, call: DispatchCall) -> DispatchResult:
        shape = self._shape
        if not call.expert_order:
            raise NotImplementedError(
                "dispatch: expert_order is False, but the kernels know expert order only; "
                "the portable transport knows both"
            )
        if call.handle is not None:
            return self._dispatch_again(call, call.handle)
        idx = call.topk_idx
        if idx is None:
            raise ValueError("dispatch: a call without a handle needs topk_idx")
        rows = call.max_recv_tokens
        worst = shape.topology.size * shape.max_tokens_per_rank * min(shape.num_topk, shape.local_experts)
        out = self._arrivals(call, idx, worst if rows is None else rows)
        arguments = kernels.dispatch_arguments(
            self._workspace,
            self._dispatch,
            launch.error_flag(idx),
            call.x,
            idx,
            call.topk_weights,
            out,
            self._timeout,
        )
        self._launch(kernels.DISPATCH, self._dispatch, call.num_sms, arguments)
        self._count(out, call.x, 8 * shape.num_topk)
        if rows is None:
            _narrow(out, int(out.group_offsets[-1]))
        handle = Handle(
            self,
            idx.clone(),
            True,
            out.topk_idx.shape[0],
            out.group_offsets,
            out.group_offsets.diff(),
            out,
        )
        return DispatchResult(
            out.x,
            out.topk_idx,
            out.topk_weights,
            handle.group_offsets,
            handle.tokens_per_expert,
            handle,
            Event(),
        )

    def _dispatch_again(self, call: DispatchCall, handle: Handle) -> DispatchResult:
        """By the layout of an earlier dispatch: only rows and scales travel."""
        came = _layout(handle)
        x = _zeros(call.x, handle.rows)
        arguments = kernels.dispatch_again_arguments(
            self._workspace, self._dispatch, call.x, x, came, self._timeout
        )
        self._launch(kernels.DISPATCH_AGAIN, self._dispatch, call.num_sms, arguments)
        self._count(came, call.x, 0)
        idx, sizes = came.topk_idx.clone(), handle.tokens_per_expert
        return DispatchResult(x, idx, None, handle.group_offsets, sizes, handle, Event())

    def _arrivals(self, call: DispatchCall, idx: Tensor, rows: int) -> kernels.Arrivals:
        shape = self._shape
        size, most = shape.topology.size, shape.max_tokens_per_rank

        def integers(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.int32, device=idx.device)

        return kernels.Arrivals(
            _zeros(call.x, rows),
            idx.new_full((rows,), -1),
            None if call.topk_weights is None else call.topk_weights.new_zeros(rows),
            integers(shape.local_experts + 1),
            integers(idx.shape[0], size),
            integers(size, most, shape.num_topk),
            integers(size, call.num_sms // 2, 2),
        )

    def _count(self, out: kernels.Arrivals, x: Tensor | QuantizedTensor, metadata: int) -> None:
        row = 2 * self._shape.hidden
        if isinstance(x, QuantizedTensor):
            row = self._shape.hidden + 4 * x.scales.shape[1]
        others = int((out.sent_slot >= 0).sum()) - int((out.sent_slot[:, self._rank] >= 0).sum())
        self._sent += others * (row + metadata)

    def combine(self, call: CombineCall) -> CombineResult:
        handle, came = call.handle, _layout(call.handle)
        x = call.y.new_empty(handle.num_tokens, self._shape.hidden)
        grad = call.weights_grad
        weights_grad = None if grad is None else grad.new_empty(handle.topk_idx.shape)
        arguments = kernels.combine_arguments(
            self._workspace,
            self._combine,
            call.y,
            handle.topk_idx,
            came,
            call.topk_weights,
            grad,
            call.bias,
            x,
            weights_grad,
            self._timeout,
        )
        self._launch(kernels.COMBINE, self._combine, call.num_sms, arguments)
        received = came.ranges[:, :, 1].sum(1)
        self._sent += (int(received.sum()) - int(received[self._rank])) * 2 * self._shape.hidden
        return CombineResult(x, weights_grad, Event())


def _layout(handle: Handle) -> kernels.Arrivals:
    if not isinstance(handle.layout, kernels.Arrivals):
        raise TypeError(f"handle.layout is {type(handle.layout).__name__}, expected that of the kernels")
    return handle.layout


def _zeros(x: Tensor | QuantizedTensor, rows: int) -> Tensor | QuantizedTensor:
    if isinstance(x, Tensor):
        return x.new_zeros(rows, x.shape[1])
    scales = empty_mn_major((rows, x.scales.shape[1]), x.data.device).zero_()
    data = torch.zeros(rows, x.data.shape[1], dtype=torch.uint8, device=x.data.device)
    return QuantizedTensor(data.view(torch.float8_e4m3fn), scales, ROW)


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
