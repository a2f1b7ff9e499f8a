"""The arguments of dispatch and combine, checked, as a transport takes them."""

import os

import torch
from torch import Tensor

from .. import checks, quantized
from ..quantized import ROW, QuantizedTensor
from .transport import CombineCall, DispatchCall, Shape
from .types import Event, Handle, Topology

TIMEOUT_VARIABLE = "DSV3_EP_TIMEOUT"
DEFAULT_TIMEOUT = 30.0  # seconds
_DTYPES = (torch.bfloat16, torch.float32)


class Sized:
    """What a buffer was made for."""

    _shape: Shape

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
        """How many experts each rank holds; those of rank r begin at r · local_experts."""
        return self._shape.local_experts


class Calls:
    """Of one rank. owner: of the handles that its transport gives. `Buffer` says what the arguments are."""

    def __init__(self, shape: Shape, owner: object) -> None:
        self._shape, self._owner = shape, owner

    def dispatch(
        self,
        x: Tensor | QuantizedTensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_sms: int,
        *,
        expert_order: bool,
        max_recv_tokens: int | None,
        previous_event: Event | None,
        async_op: bool,
        handle: Handle | None,
    ) -> DispatchCall:
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
            integer(op, "max_recv_tokens", max_recv_tokens, 0)
        self._check_launch(op, num_sms, previous_event, async_op)
        return DispatchCall(
            x,
            topk_idx,
            topk_weights,
            handle,
            expert_order,
            max_recv_tokens,
            num_sms,
            previous_event,
            async_op,
        )

    def combine(
        self,
        y: Tensor,
        handle: Handle,
        topk_weights: Tensor | None,
        bias: Tensor | None,
        num_sms: int,
        *,
        weights_grad: Tensor | None,
        previous_event: Event | None,
        async_op: bool,
    ) -> CombineCall:
        op = "combine"
        checks.tensor(op, "y", y, (self._shape.dtype,), (2,))
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
            self._check_beside(op, "bias", bias, (self._shape.dtype,), shape, "(T, hidden)", y)
        if weights_grad is not None:
            expected: tuple[int, ...] = (handle.rows,)
            if not handle.expert_order:
                expected = (handle.rows, self._shape.num_topk)
            meaning = "(rows,)" if handle.expert_order else "(rows, num_topk)"
            self._check_beside(op, "weights_grad", weights_grad, (torch.float32,), expected, meaning, y)
        self._check_launch(op, num_sms, previous_event, async_op)
        return CombineCall(y, handle, topk_weights, bias, weights_grad, num_sms, previous_event, async_op)

    def _tokens(self, op: str, x: object) -> tuple[Tensor | QuantizedTensor, Tensor]:
        """x as dispatch takes it, and its data."""
        tokens: Tensor | QuantizedTensor
        if isinstance(x, Tensor):
            tokens = data = checks.tensor(op, "x", x, (self._shape.dtype,), (2,))
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
        if handle.owner is not self._owner:
            raise ValueError(
                f"{op}: handle is of another buffer, expected one that this buffer's dispatch gave"
            )
        expected = handle.num_tokens if op == "dispatch" else handle.rows
        if rows != expected:
            raise ValueError(f"{op}: got {rows} {what}, expected {expected}, as many as the handle is for")
        checks.same_device(op, "handle.topk_idx", handle.topk_idx, "the tokens", data)

    def _check_launch(self, op: str, num_sms: object, previous_event: object, async_op: object) -> None:
        if integer(op, "num_sms", num_sms, 2) % 2:
            raise ValueError(f"{op}: num_sms is {num_sms}, expected an even number: a channel takes two")
        checks.flag(op, "async_op", async_op)
        if previous_event is not None and not isinstance(previous_event, Event):
            raise TypeError(
                f"{op}: previous_event is {type(previous_event).__name__}, expected an ep.Event or None"
            )


def integer(op: str, name: str, value: object, low: int) -> int:
    if type(value) is not int:
        raise TypeError(f"{op}: {name} is {value!r} of type {type(value).__name__}, expected an int")
    if value < low:
        raise ValueError(f"{op}: {name} is {value}, expected at least {low}")
    return value


def timeout_of(value: float | None) -> float:
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


def shape_of(
    size: int,
    num_experts: int,
    hidden: int,
    max_tokens_per_rank: int,
    num_topk: int,
    gpus_per_node: int | None,
    dtype: torch.dtype,
) -> Shape:
    op, source = "Buffer", "gpus_per_node"
    integer(op, "num_experts", num_experts, 1)
    integer(op, "hidden", hidden, 16)
    integer(op, "max_tokens_per_rank", max_tokens_per_rank, 0)
    integer(op, "num_topk", num_topk, 1)
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
    integer(op, "gpus_per_node", gpus_per_node, 1)
    if size % gpus_per_node:
        raise ValueError(
            f"{op}: {source} is {gpus_per_node}, expected a divisor of the {size} ranks; pass it"
        )
    topology = Topology(size // gpus_per_node, gpus_per_node)
    return Shape(num_experts, hidden, max_tokens_per_rank, num_topk, topology, dtype)
