"""`ep.Buffer`: checks the arguments of dispatch and combine and hands them to a transport."""

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .. import nvshmem
from ..jit import ToolchainError
from ..quantized import QuantizedTensor
from . import internode as nodes
from . import internode_kernels, intranode, kernels, low_latency, low_latency_kernels, nvlink
from .calls import Calls, Sized, shape_of, timeout_of
from .design import INTERNODE, Design, check_design, design_of
from .exchange import Exchange
from .internode import InternodeTransport
from .intranode import IntranodeTransport
from .lean_dispatch import few_sms
from .lean_transport import LeanTransport
from .low_latency import Format, LowLatencyCombined, LowLatencyDispatched, LowLatencyHandle
from .low_latency_kernels import KernelLowLatency, connect_emulated, connect_nvlink, connect_nvshmem
from .low_latency_portable import PortableLowLatency
from .portable import PortableTransport
from .transport import Shape, Transport
from .tuning import Tuning, rings_of
from .types import CombineResult, DispatchResult, Event, Handle, Status

if TYPE_CHECKING:
    from ..emulator import Group

_AGREED = (
    *("num_experts", "hidden", "max_tokens_per_rank", "num_topk", "gpus_per_node"),
    *("dtype.itemsize", "transport", "internode", "tuning.channels", "tuning.chunk", "tuning.depth"),
)
TRANSPORTS = (None, "nvlink", "portable", "nvshmem")


class Buffer(Sized):
    """Moves tokens to the ranks that hold their experts (`dispatch`) and their results back (`combine`).

    group: a torch.distributed group, whose ranks all make the buffer and then call the same ops in the same
        order. None is the default group, or one rank alone where torch.distributed is not initialised. Inside
        `emulator.VirtualCluster.run`, the group it gives: then the kernels run.
    num_experts: of all ranks together; rank r holds num_experts/R of them, from r·num_experts/R on.
    hidden: width of a token, a multiple of 16. max_tokens_per_rank: the most that a rank dispatches at once.
    num_topk: experts a token.
    gpus_per_node: rank r is on node r // gpus_per_node, which fixes the order of combine's sums; by default
        what torchrun says in LOCAL_WORLD_SIZE, else one node.
    dtype: of rows that are not FP8, and what combine rounds to. With float32 it rounds to BF16 nowhere, for
        checks of a parallel run against a single process; the portable transport alone has it.
    transport: "nvlink", the kernels on GPUs of one node; "nvshmem", those between nodes; "portable",
        torch.distributed's messages, anywhere. None takes the kernels if they can be, and `status().reason`
        says why not.
    internode: the design of the kernels between nodes: "rings", or "lean", which takes fewer SMs and more
        memory (docs/all2all.md compares them) with the same results to the bit. On one node without a use.
    tuning: of the rings between nodes, an `ep.Tuning`; by default what the topology asks for. Its channels
        bound `num_sms` there.
    timeout: seconds that any wait for a peer may last; by default the environment's DSV3_EP_TIMEOUT, else 30.

    Raises ValueError or TypeError for wrong arguments, for ones that differ between ranks too, RuntimeError
    for a transport that cannot be, and `ep.TimeoutError` where a rank does not make the buffer.
    """

    def __init__(
        self,
        group: "dist.ProcessGroup | Group | None",
        num_experts: int,
        hidden: int,
        max_tokens_per_rank: int,
        num_topk: int,
        *,
        gpus_per_node: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        transport: str | None = None,
        internode: str = "rings",
        tuning: Tuning | None = None,
        timeout: float | None = None,
    ) -> None:
        if transport not in TRANSPORTS:
            raise ValueError(f"Buffer: transport is {transport!r}, expected one of {TRANSPORTS}")
        tuning = check_design("Buffer", internode, tuning)
        seconds = timeout_of(timeout)
        sizes = (num_experts, hidden, max_tokens_per_rank, num_topk, gpus_per_node, dtype)
        self._transport: Transport
        emulator = sys.modules.get("dsv3_kernels.emulator")  # loaded by whoever has such a group
        if emulator is not None and isinstance(group, emulator.Group):
            self._shape, self.rank = shape_of(group.size(), *sizes), group.rank
            _agree(group.all_gather_object(_agreed(self._shape, transport, internode, tuning)))
            refused = intranode.refuse(self._shape, internode_kernels.MAX_NODES)
            if refused or transport is not None:
                raise ValueError(f"Buffer: {refused or 'transport is given, expected None in an emulator'}")
            if self._shape.topology.nodes > 1:
                design = design_of(self._shape, internode, tuning)
                self._transport = nodes.emulated(group, emulator.current(), design, seconds)
            else:
                self._transport = intranode.emulated(group, emulator.current(), self._shape, seconds)
            self._reason = ""
            self._make_low_latency: Callable[[], low_latency.LowLatencyTransport] = lambda: KernelLowLatency(
                self._shape, connect_emulated(group, emulator.current(), self._shape), seconds
            )
        else:
            exchange = Exchange(_group(group), seconds)
            self._shape, self.rank = shape_of(exchange.size, *sizes), exchange.rank
            if exchange.group is not None:
                exchange.begin()
                device = _device(exchange.group)
                agreed = _agreed(self._shape, transport, internode, tuning)
                _agree(exchange.all_gather("Buffer", agreed, device))
            make = functools.partial(design_of, self._shape, internode, tuning)
            self._transport, self._reason = _choose(self._shape, exchange, transport, make)
            self._make_low_latency = lambda: _low_latency_of(self._shape, exchange, self._transport.name)
        self._low_latency: low_latency.LowLatencyTransport | None = None
        lean = isinstance(self._transport, LeanTransport)
        self._internode = (
            "lean" if lean else "rings" if isinstance(self._transport, InternodeTransport) else ""
        )
        self._num_sms = few_sms(self._shape.topology.nodes) if lean else 20
        self._calls = Calls(self._shape, self._transport)
        self._dispatches = self._combines = 0

    def dispatch(
        self,
        x: Tensor | QuantizedTensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_sms: int | None = None,
        *,
        expert_order: bool = True,
        max_recv_tokens: int | None = None,
        previous_event: Event | None = None,
        async_op: bool = False,
        handle: Handle | None = None,
    ) -> DispatchResult:
        """Sends each token once to every rank that holds one of its experts.

        x: `[T, hidden]`, contiguous, of the buffer's dtype (bfloat16), or FP8 with block (1, 128), scales of
            any strides.
        topk_idx: int64 `[T, K]`, contiguous, distinct experts in a row, -1 for none.
        topk_weights: float32 `[T, K]`, contiguous, or None.
        num_sms: even; SMs that the kernels take, two a channel; by default 20. The lean kernels have one or
            more channels an SM, take 12, 6 or 4 by default, on 2, up to 4 or more nodes, and all for a while
            at the end. The portable transport has no use for it.
        expert_order: rows sorted by local expert, source rank, token, one a (token, expert); else by source
            rank and token, one a token. Alike on all ranks, as are FP8 or BF16, and topk_weights or None.
        max_recv_tokens: the rows of the result; None is as many as arrive, which on a GPU takes a host
            synchronisation. If more arrive, every rank raises ValueError and nothing is written.
        previous_event: waited for before x is read. async_op: return at once; see `DispatchResult.event`.
        handle: of an earlier dispatch, instead of topk_idx, topk_weights, expert_order and max_recv_tokens:
            its layout serves again, and topk_weights of the result is None.
        Returns a `DispatchResult`. Raises TypeError or ValueError for wrong arguments (on every rank, if the
        values of one rank are wrong), and `ep.TimeoutError`.
        """
        call = self._calls.dispatch(
            x,
            topk_idx,
            topk_weights,
            self._num_sms if num_sms is None else num_sms,
            expert_order=expert_order,
            max_recv_tokens=max_recv_tokens,
            previous_event=previous_event,
            async_op=async_op,
            handle=handle,
        )
        result = self._transport.dispatch(call)
        self._dispatches += 1
        return result

    def combine(
        self,
        y: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        num_sms: int | None = None,
        *,
        weights_grad: Tensor | None = None,
        previous_event: Event | None = None,
        async_op: bool = False,
    ) -> CombineResult:
        """Brings the experts' results home and adds up those of each token.

        y: `[rows, hidden]` of the buffer's dtype (bfloat16), contiguous, in the rows of the dispatch that
            gave `handle`.
        topk_weights: float32 `[rows]`, as dispatch returned them: the factor of each row. Expert order only;
            in token order a row already is the sum of its token's experts on this rank.
        bias: as y, `[T, hidden]`, added last.
        weights_grad: float32, shaped as the topk_idx that dispatch returned: a number for each (token,
            expert) that travels home unsummed, as the gradient of the weights does.
        num_sms, previous_event, async_op: as in `dispatch`.
        A rank's rows of a token are added in FP32 in the order of experts and rounded to BF16, then the ranks
        of a node, then the nodes: bit for bit `ep.reference.combine`. A token without experts gets zeros.
        Returns a `CombineResult`. Raises as `dispatch`.
        """
        call = self._calls.combine(
            y,
            handle,
            topk_weights,
            bias,
            self._num_sms if num_sms is None else num_sms,
            weights_grad=weights_grad,
            previous_event=previous_event,
            async_op=async_op,
        )
        result = self._transport.combine(call)
        self._combines += 1
        return result

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_sms: int = 64,
        *,
        fp8: bool = True,
        power_of_2_scales: bool = False,
        return_recv_hook: bool = False,
    ) -> LowLatencyDispatched:
        """Sends each (token, expert) straight to the expert's rank: for the few tokens of decoding.

        x: bfloat16 `[T, hidden]`, contiguous, T up to max_tokens_per_rank. topk_idx: int64 `[T, K]`,
            contiguous, distinct experts in a row, -1 for none.
        num_sms: blocks of the kernels; the portable transport has no use for it.
        fp8: quantise on the way, bit for bit `quantize_1x128(x, power_of_2_scales=power_of_2_scales)`.
        return_recv_hook: return once this rank has sent; what is received is there after `hook()` of the
            result. In between the ranks compute, and no SM waits. Two calls may be under way, and their hooks
            come in order.
        Nothing is read back from the GPU, so a CUDA graph may hold it. All ranks call alike; the first call
        of the buffer sets up memory and is not for capture. max_tokens_per_rank · num_topk is at most 65535.
        Returns a `LowLatencyDispatched`, as `masked_grouped_fp8_gemm` takes it. Raises TypeError or
        ValueError for wrong arguments (for experts out of range, too: kernels leave those out, and the rank
        that passed them raises at the end of this call or its hook, if the GPU has come so far), and
        `ep.TimeoutError`.
        """
        form = Format(fp8, power_of_2_scales)
        return low_latency.dispatch(self._fast(), self._shape, x, topk_idx, form, num_sms, return_recv_hook)

    def low_latency_combine(
        self,
        y: Tensor,
        handle: LowLatencyHandle,
        topk_weights: Tensor,
        num_sms: int = 64,
        *,
        return_recv_hook: bool = False,
    ) -> LowLatencyCombined:
        """Brings the experts' rows straight home: the sum of weight · row over each token's experts.

        y: bfloat16 `[E_local, R·max_tokens_per_rank, hidden]`, contiguous, in the rows of the dispatch that
            gave `handle`; those past an expert's count are not read. topk_weights: float32 `[T, K]`.
        num_sms, return_recv_hook: as in `low_latency_dispatch`.
        Products are rounded to FP32 and added from +0 in the order of k, the sum is rounded to BF16. A token
        without experts gets zeros. Returns a `LowLatencyCombined`. Raises as `low_latency_dispatch`.
        """
        return low_latency.combine(
            self._fast(), self._shape, y, handle, topk_weights, num_sms, return_recv_hook
        )

    def _fast(self) -> low_latency.LowLatencyTransport:
        if self._low_latency is None:
            self._low_latency = self._make_low_latency()
        return self._low_latency

    def status(self) -> Status:
        """Counters of this rank, and where it has waited; works after a failure too."""
        transport = self._transport
        return Status(
            transport.name,
            self._reason,
            self.rank,
            self.topology,
            self._dispatches,
            self._combines,
            transport.bytes_sent(),
            transport.stalls(),
            transport.failure(),
            self._internode,
        )


def _choose(
    shape: Shape, exchange: Exchange, wanted: str | None, make: Callable[[], Design]
) -> tuple[Transport, str]:
    """The transport between processes, and why it is no faster one. make: for one between nodes."""
    if wanted == "portable" or (exchange.group is None and wanted is None):
        return PortableTransport(shape, exchange), ""
    several = shape.topology.nodes > 1
    if wanted == "nvshmem" or (wanted is None and several):
        found = _over_nvshmem(make(), exchange)
    else:
        found = _over_nvlink(shape, exchange)
    if not isinstance(found, str):
        return found, ""
    if wanted is not None:
        raise RuntimeError(f"Buffer: transport is {wanted!r}, but {found}")
    return PortableTransport(shape, exchange), f"no {'NVSHMEM' if several else 'NVLink'}: {found}"


def _over_nvlink(shape: Shape, exchange: Exchange) -> Transport | str:
    device = torch.device("cpu") if exchange.group is None else _device(exchange.group)
    mapped = nvlink.connect(exchange, shape, device, kernels.Workspace(shape).size)
    if isinstance(mapped, str):
        return mapped
    rank, seconds = exchange.rank, exchange.timeout
    return IntranodeTransport("nvlink", shape, rank, mapped.memory, mapped.addresses, seconds, mapped.handle)


def _over_nvshmem(design: Design, exchange: Exchange) -> Transport | str:
    group = exchange.group
    if group is None or _device(group).type != "cuda":
        return "the group's backend is not NCCL. Mend: init_process_group('nccl'), one GPU a process"
    refused = intranode.refuse(design.shape, internode_kernels.MAX_NODES)
    if refused is not None:
        return refused
    try:
        seconds = exchange.timeout
        world = nvshmem.world(group, nodes.needed(design), seconds)
        return nvshmem.together(lambda: nodes.over_nvshmem(world, design, seconds), group, seconds)
    except (nvshmem.NvshmemError, ToolchainError, OSError) as error:
        return str(error)


def _group(group: object) -> "dist.ProcessGroup | None":
    if group is None:
        alone = not (dist.is_available() and dist.is_initialized())
        return None if alone else dist.group.WORLD
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"Buffer: group is {type(group).__name__}, expected a torch.distributed group that this rank "
            "belongs to, or None"
        )
    return group


def _low_latency_of(shape: Shape, exchange: Exchange, name: str) -> low_latency.LowLatencyTransport:
    """As the buffer's transport, of that name."""
    group, seconds = exchange.group, exchange.timeout
    if group is None or name == "portable":
        return PortableLowLatency(shape, exchange)
    if name == "nvshmem":
        world = nvshmem.current()
        connection = nvshmem.together(lambda: connect_nvshmem(world, shape), group, seconds)
        return KernelLowLatency(shape, connection, seconds)
    exchange.begin()
    size = low_latency_kernels.areas(shape)[1].end
    mapped = nvlink.connect(exchange, shape, _device(group), size)
    if not isinstance(mapped, nvlink.Mapped):
        raise RuntimeError(f"low latency: the buffer's transport is 'nvlink', but {mapped}")
    return KernelLowLatency(shape, connect_nvlink(mapped, shape, exchange.rank), seconds)


def _device(group: "dist.ProcessGroup") -> torch.device:
    """Where a group that knows only one kind of device takes tensors."""
    if "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _agreed(shape: Shape, transport: str | None, internode: str, tuning: Tuning) -> list[int]:
    """What all ranks must pass alike, in the order of _AGREED."""
    sizes = [shape.num_experts, shape.hidden, shape.max_tokens_per_rank, shape.num_topk]
    rings = rings_of(shape, tuning)
    return [
        *(*sizes, shape.topology.gpus_per_node, shape.dtype.itemsize, TRANSPORTS.index(transport)),
        *(INTERNODE.index(internode), rings.channels, rings.chunk, rings.depth),
    ]


def _agree(every: list[list[int]]) -> None:
    """Raises, on every rank, if the ranks' arguments differ."""
    for name, values in zip(_AGREED, zip(*every, strict=True), strict=True):
        for rank, value in enumerate(values):
            if value != values[0]:
                first, other = _shown(name, values[0]), _shown(name, value)
                raise ValueError(
                    f"Buffer: {name} is {first} on rank 0 and {other} on rank {rank}, "
                    "expected the same on all ranks"
                )


def _shown(name: str, value: int) -> object:
    names = {"transport": TRANSPORTS, "internode": INTERNODE}.get(name)
    return value if names is None else repr(names[value])
