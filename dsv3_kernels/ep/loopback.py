"""All ranks on one GPU, in one launch: to test and to measure without a second GPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import launch
from ..quantized import QuantizedTensor
from . import intranode, kernels, low_latency, one_gpu
from .calls import Calls, Sized, integer, shape_of, timeout_of
from .design import Design, check_design, design_of
from .internode import InternodeRank
from .intranode import KernelRank, Launch
from .lean import Slots
from .lean_transport import LeanRank
from .low_latency import LowLatencyCombined, LowLatencyDispatched, LowLatencyHandle
from .low_latency_kernels import KernelLowLatency, Launcher, connect_loopback
from .transport import CombineCall, DispatchCall, Shape
from .tuning import Tuning
from .types import CombineResult, DispatchResult, Event, Handle, Status

T = TypeVar("T")
Sent = TypeVar("Sent", LowLatencyDispatched, LowLatencyCombined)


class LoopbackBuffer(Sized):
    """`ep.Buffer` for every rank at once; the ranks are virtual, and share one GPU.

    The kernels are those of NVLink, and so are the results, bit for bit: a rank has its own memory, which the
    others store into, and its own blocks, `num_sms` of them, all resident in one cooperative launch. A launch
    ends when all its ranks have ended: only between those of one launch can a rank be ahead of another.
    Between virtual nodes they are those of InfiniBand, for which the GPU's memory stands in: a put is a copy,
    done before its signal. Nothing is reordered, lost or delayed there.

    num_ranks: 1 to 8. gpus_per_node: rank r is on node r // gpus_per_node; by default all on one. device: a
    CUDA device, or the CPU inside `emulator.virtual_gpu`, of num_ranks x num_sms SMs or more. The other
    arguments, internode and tuning among them, are those of `ep.Buffer`; methods take and return a list with
    an entry a rank wherever `ep.Buffer` has one value. Raises as `ep.Buffer`, for arguments with the rank's
    number.
    """

    def __init__(
        self,
        num_ranks: int,
        num_experts: int,
        hidden: int,
        max_tokens_per_rank: int,
        num_topk: int,
        *,
        gpus_per_node: int | None = None,
        internode: str = "rings",
        tuning: Tuning | None = None,
        device: torch.device | str = "cuda",
        timeout: float | None = None,
    ) -> None:
        op = "LoopbackBuffer"
        size, seconds = integer(op, "num_ranks", num_ranks, 1), timeout_of(timeout)
        tuning = check_design(op, internode, tuning)
        node = size if gpus_per_node is None else gpus_per_node
        shape = shape_of(size, num_experts, hidden, max_tokens_per_rank, num_topk, node, torch.bfloat16)
        refused = intranode.refuse(shape, nodes=size)
        if size > kernels.MAX_RANKS:
            refused = f"num_ranks is {size}, expected at most {kernels.MAX_RANKS}: one launch has them all"
        if refused:
            raise ValueError(f"{op}: {refused}")
        first = torch.empty(0, device=device)
        if launch.world(first) == "reference":
            raise ValueError(
                f"{op}: device is {str(device)!r}, where no kernel runs; pass a CUDA device, or make and use "
                "the buffer inside `with dsv3_kernels.emulator.virtual_gpu(num_sms=...):`"
            )
        self._shape, self._device = shape, first.device
        if shape.topology.nodes > 1:
            self._ranks = _on_nodes(design_of(shape, internode, tuning), first.device, seconds)
        else:
            self._ranks = _on_one_node(shape, first.device, seconds)
        self._internode = internode if shape.topology.nodes > 1 else ""
        self._calls = [Calls(shape, rank) for rank in self._ranks]
        self._num_sms = launch.num_sms(first)
        self._dispatches = self._combines = 0
        self._timeout, self._low_latency = seconds, list[KernelLowLatency]()
        launch.also_raise(self)

    def dispatch(
        self,
        x: Sequence[Tensor | QuantizedTensor | tuple[Tensor, Tensor]],
        topk_idx: Sequence[Tensor] | None = None,
        topk_weights: Sequence[Tensor] | None = None,
        num_sms: int = 4,
        *,
        expert_order: bool = True,
        max_recv_tokens: int | None = None,
        previous_event: Event | None = None,
        async_op: bool = False,
        handle: Sequence[Handle] | None = None,
    ) -> list[DispatchResult]:
        """As `ep.Buffer.dispatch`; num_sms is that of each rank, max_recv_tokens the same for all."""
        self._check_lists(
            "dispatch", num_sms, x=x, topk_idx=topk_idx, topk_weights=topk_weights, handle=handle
        )
        calls = self._each(
            lambda rank: self._calls[rank].dispatch(
                x[rank],
                _of(topk_idx, rank),
                _of(topk_weights, rank),
                num_sms,
                expert_order=expert_order,
                max_recv_tokens=max_recv_tokens,
                previous_event=previous_event,
                async_op=async_op,
                handle=_of(handle, rank),
            )
        )
        self._check_device("dispatch", [call.x for call in calls])
        results = intranode.dispatch(self._ranks, calls)
        self._dispatches += 1
        return results

    def combine(
        self,
        y: Sequence[Tensor],
        handle: Sequence[Handle],
        topk_weights: Sequence[Tensor] | None = None,
        bias: Sequence[Tensor] | None = None,
        num_sms: int = 4,
        *,
        weights_grad: Sequence[Tensor] | None = None,
        previous_event: Event | None = None,
        async_op: bool = False,
    ) -> list[CombineResult]:
        """As `ep.Buffer.combine`."""
        lists = {"y": y, "handle": handle, "topk_weights": topk_weights, "bias": bias}
        self._check_lists("combine", num_sms, **lists, weights_grad=weights_grad)
        calls = self._each(
            lambda rank: self._calls[rank].combine(
                y[rank],
                handle[rank],
                _of(topk_weights, rank),
                _of(bias, rank),
                num_sms,
                weights_grad=_of(weights_grad, rank),
                previous_event=previous_event,
                async_op=async_op,
            )
        )
        self._check_device("combine", [call.y for call in calls])
        results = intranode.combine(self._ranks, calls)
        self._combines += 1
        return results

    def low_latency_dispatch(
        self,
        x: Sequence[Tensor],
        topk_idx: Sequence[Tensor],
        num_sms: int = 16,
        *,
        fp8: bool = True,
        power_of_2_scales: bool = False,
    ) -> list[LowLatencyDispatched]:
        """As `ep.Buffer.low_latency_dispatch`, in two launches: all ranks send, then all receive."""
        self._check_lists("low_latency_dispatch", num_sms, x=x, topk_idx=topk_idx)
        form = low_latency.Format(fp8, power_of_2_scales)
        transports = self._fast()
        sent = self._each(
            lambda rank: low_latency.dispatch(
                transports[rank], self._shape, x[rank], topk_idx[rank], form, num_sms, True
            )
        )
        return _received(sent)

    def low_latency_combine(
        self,
        y: Sequence[Tensor],
        handle: Sequence[LowLatencyHandle],
        topk_weights: Sequence[Tensor],
        num_sms: int = 16,
    ) -> list[LowLatencyCombined]:
        """As `ep.Buffer.low_latency_combine`."""
        self._check_lists("low_latency_combine", num_sms, y=y, handle=handle, topk_weights=topk_weights)
        transports = self._fast()
        sent = self._each(
            lambda rank: low_latency.combine(
                transports[rank], self._shape, y[rank], handle[rank], topk_weights[rank], num_sms, True
            )
        )
        return _received(sent)

    def _fast(self) -> list[KernelLowLatency]:
        if not self._low_latency:
            connections = connect_loopback(self._shape, self._device)
            launcher = Launcher(connections[0].kernel, self._shape, self.size)
            self._low_latency = [
                KernelLowLatency(self._shape, connection, self._timeout, launcher)
                for connection in connections
            ]
        return self._low_latency

    def status(self) -> list[Status]:
        self._reported()
        return [
            Status(
                "loopback",
                "",
                rank.rank,
                self.topology,
                self._dispatches,
                self._combines,
                kernels.bytes_sent(rank.peers),
                kernels.stalls(rank.peers),
                None if rank.error is None else str(rank.error),
                self._internode,
            )
            for rank in self._ranks
        ]

    def check(self) -> None:
        """Raises what the kernels have reported so far; `dsv3_kernels.synchronize` does too."""
        intranode.check(self._ranks)

    def _reported(self) -> None:
        for rank in self._ranks:
            rank.reported()

    def _check_lists(self, op: str, num_sms: object, **lists: object) -> None:
        for name, value in lists.items():
            if value is None:
                continue
            if not isinstance(value, Sequence) or len(value) != self.size:
                what = f"{len(value)} of them" if isinstance(value, Sequence) else type(value).__name__
                raise TypeError(
                    f"{op}: {name} is {what}, expected a list with one for each of {self.size} ranks"
                )
        if isinstance(num_sms, int) and num_sms * self.size > self._num_sms:
            raise ValueError(
                f"{op}: num_sms is {num_sms}, which is {num_sms * self.size} SMs for {self.size} ranks, "
                f"expected at most the GPU's {self._num_sms} for all together"
            )

    def _check_device(self, op: str, tokens: Sequence[Tensor | QuantizedTensor]) -> None:
        for rank, value in enumerate(tokens):
            device = value.device if isinstance(value, Tensor) else value.data.device
            if device != self._device:
                raise ValueError(
                    f"rank {rank}: {op}: the tokens are on {device}, expected {self._device}, as the buffer"
                )

    def _each(self, make: Callable[[int], T]) -> list[T]:
        """By rank; an error says which."""
        made = []
        for rank in range(self.size):
            try:
                made.append(make(rank))
            except (TypeError, ValueError) as error:
                raise type(error)(f"rank {rank}: {error}") from None
        return made


class _RankOfRings(InternodeRank):
    """Of several virtual nodes."""

    def launches(self, call: DispatchCall | CombineCall, launched: int) -> list[Launch]:
        found = super().launches(call, launched)
        return [replace(part, kernel=one_gpu.on_one_gpu(part.kernel)) for part in found]


class _LeanRank(LeanRank):
    def launches(self, call: DispatchCall | CombineCall, launched: int) -> list[Launch]:
        return [
            replace(part, kernel=one_gpu.on_one_gpu(part.kernel), grid=(part.grid[0] * launched, 1, 1))
            for part in super().launches(call, launched)
        ]


def _on_one_node(shape: Shape, device: torch.device, timeout: float) -> Sequence[KernelRank]:
    size, stream = kernels.Workspace(shape).size, _stream(device)
    memories = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(shape.topology.size)]
    addresses = [launch.address_of(memory) for memory in memories]
    return [
        KernelRank(shape, rank, memory, addresses, timeout, memories, stream)
        for rank, memory in enumerate(memories)
    ]


def _on_nodes(design: Design, device: torch.device, timeout: float) -> Sequence[KernelRank]:
    shape, stream = design.shape, _stream(device)
    size, gpus = shape.topology.size, shape.topology.gpus_per_node
    sizes = [kernels.Workspace(shape).size, *(design.size for _ in kernels.OPS)]
    heap = one_gpu.Heap(size, sizes, device)
    parts = [heap.memories(rank) for rank in range(size)]
    addresses = [launch.address_of(memory) for memory, *_ in parts]
    ranks: list[KernelRank] = []
    for rank, (memory, *of_op) in enumerate(parts):
        on_node, pairs = addresses[rank // gpus * gpus :][:gpus], heap.queue_pairs(rank, design.channels)
        rest = rank, memory, on_node, tuple(of_op), pairs, timeout
        if isinstance(design, Slots):
            ranks.append(_LeanRank(design, *rest, kept=heap, stream=stream))
        else:
            ranks.append(_RankOfRings(design, *rest, kept=heap, stream=stream))
    return ranks


def _stream(device: torch.device) -> "torch.cuda.Stream | None":
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _received(sent: list[Sent]) -> list[Sent]:
    """The last rank's hook launches for all, so all are called, whatever one raises."""
    errors: list[Exception] = []
    for part in sent:
        try:
            if part.hook is not None:
                part.hook()
        except (ValueError, RuntimeError, OSError) as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return sent


def _of(values: Sequence[Any] | None, rank: int) -> Any:
    return None if values is None else values[rank]
