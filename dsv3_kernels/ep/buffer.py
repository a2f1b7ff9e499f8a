"""`ep.Buffer`: checks the arguments of dispatch and combine and hands them to a transport."""

import os
import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks, quantized
from ..quantized import ROW, QuantizedTensor
from .exchange import Exchange
from .intranode import IntranodeTransport
from .portable import PortableTransport
from .transport import CombineCall, DispatchCall, Shape, Transport
from .types import CombineResult, DispatchResult, Event, Handle, Status, Topology

if TYPE_CHECKING:
    from ..emulator import Group

TIMEOUT_VARIABLE = "DSV3_EP_TIMEOUT"
DEFAULT_TIMEOUT = 30.0  # seconds
_AGREED = ("num_experts", "hidden", "max_tokens_per_rank", "num_topk", "gpus_per_node", "dtype.itemsize")
_DTYPES = (torch.bfloat16, torch.float32)


class Buffer:
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
    timeout: seconds that any wait for a peer may last; by default the environment's DSV3_EP_TIMEOUT, else 30.

    Raises ValueError or TypeError for wrong arguments, for ones that differ between ranks too, and
    `ep.TimeoutError` where a rank does not make the buffer.
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
        timeout: float | None = None,
    ) -> None:
        seconds = _timeout(timeout)
        sizes = (num_experts, hidden, max_tokens_per_rank, num_topk, gpus_per_node, dtype)
        self._transport: Transport
        emulator = sys.modules.get("dsv3_kernels.emulator")  # loaded by whoever has such a group
        if emulator is not None and isinstance(group, emulator.Group):
            self._shape, self.rank = _shape(group.size(), *sizes), group.rank
            _agree(group.all_gather_object(_agreed(self._shape)))
            if dtype != torch.bfloat16:
                raise ValueError(
                    f"Buffer: dtype is {dtype}, expected torch.bfloat16, the one dtype of the kernels"
                )
            self._transport = IntranodeTransport(group, emulator.current(), self._shape, seconds)
        else:
            exchange = Exchange(_group(group), seconds)
            self._shape, self.rank = _shape(exchange.size, *sizes), exchange.rank
            if exchange.group is not None:
                exchange.begin()
                device = _device(exchange.group)
                _agree(exchange.all_gather("Buffer", _agreed(self._shape), device))
            self._transport = PortableTransport(self._shape, exchange)
        self._dispatches = self._combines = 0

    @property
    def topology(self) -> Topology:
        return self._shape.topology

    @property
    def size(self) -> int:
        return self._shape.topology.size

    @property
    def num_experts(self) -> int:
        return self._shape.num_experts

    @property
    def dtype(self) -> torch.dtype:
        """Of rows that are not FP8."""
        return self._shape.dtype

    @property
    def local_experts(self) -> int:
        """How many experts each rank holds; this one's begin at rank · local_experts."""
        return self._shape.local_experts

    def dispatch(
        self,
        x: Tensor | QuantizedTensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_sms: int = 20,
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
        num_sms: even; SMs that the kernels take, two a channel. The portable transport has no use for it.
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
        op = "dispatch"
        x, data = self._tokens(op, x)
        if (topk_idx is None) == (handle is None):
            given = "neither" if handle is None else "both"
            raise ValueError(f"{op}: topk_idx and handle: got {given}, expected exactly one of them")
        if handle is not None:
            self._check_handle(op, handle, data.shape[0], "rows of x", data)
            for name, value in (("topk_weights", topk_weights), ("max_recv_tokens", max_recv_tokens)):
                if value is not None:
                    raise ValueError(
                        f"{op}: {name} is given with a handle, expected None: the handle has its own"
                    )
        else:
            self._check_routing(op, topk_idx, topk_weights, data)
        checks.flag(op, "expert_order", expert_order)
        if max_recv_tokens is not None:
            _integer(op, "max_recv_tokens", max_recv_tokens, 0)
        self._check_launch(op, num_sms, previous_event, async_op)
        result = self._transport.dispatch(
            DispatchCall(x, topk_idx, topk_weights, handle, expert_order, max_recv_tokens, num_sms, async_op)
        )
        self._dispatches += 1
        return result

    def combine(
        self,
        y: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        num_sms: int = 20,
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
        op = "combine"
        checks.tensor(op, "y", y, (self.dtype,), (2,))
        checks.contiguous(op, "y", y)
        self._check_handle(op, handle, y.shape[0], "rows of y", y)
        checks.shape(op, "y", y, (handle.rows, self._shape.hidden), "(rows, hidden)")
        if topk_weights is not None:
            if not handle.expert_order:
                raise ValueError(
                    f"{op}: topk_weights is given in token order, expected None; multiply the rows of y"
                )
            self._check_beside(
                op, "topk_weights", topk_weights, (torch.float32,), (handle.rows,), "(rows,)", y
            )
        if bias is not None:
            shape = (handle.num_tokens, self._shape.hidden)
            self._check_beside(op, "bias", bias, (self.dtype,), shape, "(T, hidden)", y)
        if weights_grad is not None:
            expected: tuple[int, ...] = (handle.rows,)
            if not handle.expert_order:
                expected = (handle.rows, self._shape.num_topk)
            meaning = "(rows,)" if handle.expert_order else "(rows, num_topk)"
            self._check_beside(op, "weights_grad", weights_grad, (torch.float32,), expected, meaning, y)
        self._check_launch(op, num_sms, previous_event, async_op)
        result = self._transport.combine(
            CombineCall(y, handle, topk_weights, bias, weights_grad, num_sms, async_op)
        )
        self._combines += 1
        return result

    def status(self) -> Status:
        """Counters of this rank, and where it has waited; works after a failure too."""
        transport = self._transport
        return Status(
            transport.name,
            self.rank,
            self.topology,
            self._dispatches,
            self._combines,
            transport.bytes_sent(),
            transport.stalls(),
            transport.failure(),
        )

    # Checks

    def _tokens(self, op: str, x: object) -> tuple[Tensor | QuantizedTensor, Tensor]:
        """x as dispatch takes it, and its data."""
        tokens: Tensor | QuantizedTensor
        if isinstance(x, Tensor):
            tokens = data = checks.tensor(op, "x", x, (self.dtype,), (2,))
            checks.contiguous(op, "x", x)
            name = "x"
        else:
            if not isinstance(x, QuantizedTensor | tuple):
                raise TypeError(
                    f"{op}: x is {type(x).__name__}, expected a bfloat16 tensor, a QuantizedTensor or a "
                    "(data, scales) tuple"
                )
            tokens = quantized.operand(op, "x", x, ROW, (2,))
            data, name = tokens.data, "x.data"
        count, hidden = data.shape
        if hidden != self._shape.hidden:
            raise ValueError(
                f"{op}: {name} has shape {tuple(data.shape)}, expected (T, hidden) with hidden = "
                f"{self._shape.hidden}, as the buffer was made for"
            )
        if count > self._shape.max_tokens_per_rank:
            raise ValueError(
                f"{op}: {name} has {count} tokens, expected at most max_tokens_per_rank = "
                f"{self._shape.max_tokens_per_rank}, as the buffer was made for"
            )
        return tokens, data

    def _check_routing(self, op: str, topk_idx: object, topk_weights: object, data: Tensor) -> None:
        shape = (data.shape[0], self._shape.num_topk)
        self._check_beside(op, "topk_idx", topk_idx, (torch.int64,), shape, "(T, num_topk)", data)
        if topk_weights is not None:
            self._check_beside(
                op, "topk_weights", topk_weights, (torch.float32,), shape, "(T, num_topk)", data
            )

    def _check_beside(
        self,
        op: str,
        name: str,
        value: object,
        dtypes: tuple[torch.dtype, ...],
        shape: tuple[int, ...],
        meaning: str,
        data: Tensor,
    ) -> None:
        """`value` is a contiguous tensor of this shape on the device of the tokens."""
        tensor = checks.tensor(op, name, value, dtypes, (len(shape),))
        checks.shape(op, name, tensor, shape, meaning)
        checks.contiguous(op, name, tensor)
        checks.same_device(op, name, tensor, "the tokens", data)

    def _check_handle(self, op: str, handle: object, rows: int, what: str, data: Tensor) -> None:
        if not isinstance(handle, Handle):
            raise TypeError(f"{op}: handle is {type(handle).__name__}, expected the ep.Handle of a dispatch")
        if handle.owner is not self._transport:
            raise ValueError(
                f"{op}: handle is of another buffer, expected one that this buffer's dispatch gave"
            )
        expected = handle.num_tokens if op == "dispatch" else handle.rows
        if rows != expected:
            raise ValueError(f"{op}: got {rows} {what}, expected {expected}, as many as the handle is for")
        checks.same_device(op, "handle.topk_idx", handle.topk_idx, "the tokens", data)

    def _check_launch(self, op: str, num_sms: object, previous_event: object, async_op: object) -> None:
        if _integer(op, "num_sms", num_sms, 2) % 2:
            raise ValueError(f"{op}: num_sms is {num_sms}, expected an even number: a channel takes two")
        checks.flag(op, "async_op", async_op)
        if previous_event is None:
            return
        if not isinstance(previous_event, Event):
            raise TypeError(
                f"{op}: previous_event is {type(previous_event).__name__}, expected an ep.Event or None"
            )
        previous_event.wait()


def _integer(op: str, name: str, value: object, low: int) -> int:
    if type(value) is not int:
        raise TypeError(f"{op}: {name} is {value!r} of type {type(value).__name__}, expected an int")
    if value < low:
        raise ValueError(f"{op}: {name} is {value}, expected at least {low}")
    return value


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


def _timeout(value: float | None) -> float:
    name = "timeout"
    if value is None:
        name, text = TIMEOUT_VARIABLE, os.environ.get(TIMEOUT_VARIABLE, "")
        try:
            value = float(text) if text else DEFAULT_TIMEOUT
        except ValueError:
            raise ValueError(f"Buffer: {name} is {text!r}, expected a number of seconds") from None
    if type(value) not in (int, float):
        raise TypeError(f"Buffer: {name} is {value!r} of type {type(value).__name__}, expected seconds")
    if not 0 < value <= 86400:  # NaN too
        raise ValueError(f"Buffer: {name} is {value}, expected seconds above 0, at most a day")
    return float(value)


def _shape(
    size: int,
    num_experts: int,
    hidden: int,
    max_tokens_per_rank: int,
    num_topk: int,
    gpus_per_node: int | None,
    dtype: torch.dtype,
) -> Shape:
    op, source = "Buffer", "gpus_per_node"
    _integer(op, "num_experts", num_experts, 1)
    _integer(op, "hidden", hidden, 16)
    _integer(op, "max_tokens_per_rank", max_tokens_per_rank, 0)
    _integer(op, "num_topk", num_topk, 1)
    if dtype not in _DTYPES:
        raise ValueError(f"{op}: dtype is {dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    if num_experts % size:
        raise ValueError(f"{op}: num_experts is {num_experts}, expected a multiple of the {size} ranks")
    if hidden % checks.ALIGNMENT:
        raise ValueError(f"{op}: hidden is {hidden}, expected a multiple of {checks.ALIGNMENT}")
    if num_topk > num_experts:
        raise ValueError(f"{op}: num_topk is {num_topk}, expected at most num_experts = {num_experts}")
    if gpus_per_node is None:
        local = os.environ.get("LOCAL_WORLD_SIZE", "")
        gpus_per_node = min(int(local), size) if local.isdecimal() and int(local) else size
        source = "gpus_per_node (from LOCAL_WORLD_SIZE)"
    _integer(op, "gpus_per_node", gpus_per_node, 1)
    if size % gpus_per_node:
        raise ValueError(
            f"{op}: {source} is {gpus_per_node}, expected a divisor of the {size} ranks; pass it"
        )
    topology = Topology(size // gpus_per_node, gpus_per_node)
    return Shape(num_experts, hidden, max_tokens_per_rank, num_topk, topology, dtype)


def _device(group: "dist.ProcessGroup") -> torch.device:
    """Where a group that knows only one kind of device takes tensors."""
    if "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _agreed(shape: Shape) -> list[int]:
    """What all ranks must pass alike, in the order of _AGREED."""
    sizes = [shape.num_experts, shape.hidden, shape.max_tokens_per_rank, shape.num_topk]
    return [*sizes, shape.topology.gpus_per_node, shape.dtype.itemsize]


def _agree(every: list[list[int]]) -> None:
    """Raises, on every rank, if the ranks' arguments differ."""
    for name, values in zip(_AGREED, zip(*every, strict=True), strict=True):
        for rank, value in enumerate(values):
            if value != values[0]:
                raise ValueError(
                    f"Buffer: {name} is {values[0]} on rank 0 and {value} on rank {rank}, "
                    "expected the same on all ranks"
                )
