"""The portable transport: torch.distributed point to point, gloo on CPUs, NCCL on GPUs; or one rank alone.

A dispatch without a handle takes three exchanges: headers (counts and faults of every rank), metadata
(experts and weights of each token), payload (one row a token and rank). With a handle only the payload moves.
A rank that finds a fault in its values still sends its header, so that all ranks raise the same error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..quantized import ROW, QuantizedTensor, empty_mn_major
from .errors import Fault
from .exchange import Exchange
from .transport import CombineCall, DispatchCall, Shape
from .types import CombineResult, DispatchResult, Event, Handle, Stall


@dataclass(frozen=True, eq=False)
class Layout:
    """How tokens lie on the wire and in expert order.

    sent: for each rank, the tokens that it gets of mine, ascending. received: how many each rank sends here.
    topk_idx: int64 `[N, K]`, local experts of the N received tokens, -1 elsewhere; topk_weights likewise.
    token, k: the received token and the slot of each received row in expert order. offsets: where in it each
    local expert begins.
    """

    sent: list[Tensor]
    received: list[int]
    topk_idx: Tensor
    topk_weights: Tensor | None
    token: Tensor
    k: Tensor
    offsets: list[int]


@dataclass(frozen=True)
class _Header:
    """What a rank tells all others before anything moves; travels as integers, in this order."""

    fault: int  # 0, or 1 + index of the first bad element of topk_idx
    fp8: int
    weights: int
    limit: int  # max_recv_tokens, or -1
    expert_order: int
    experts: list[int]  # choices of each expert
    tokens: list[int]  # tokens that each rank gets

    @property
    def form(self) -> tuple[int, int, int]:
        return self.fp8, self.weights, self.expert_order

    def encode(self) -> list[int]:
        return [
            *(self.fault, self.fp8, self.weights, self.limit, self.expert_order),
            *self.experts,
            *self.tokens,
        ]

    @classmethod
    def decode(cls, values: list[int], num_experts: int) -> "_Header":
        fault, fp8, weights, limit, expert_order, *counts = values
        return cls(fault, fp8, weights, limit, expert_order, counts[:num_experts], counts[num_experts:])


class PortableTransport:
    name = "portable"

    def __init__(self, shape: Shape, exchange: Exchange) -> None:
        self._shape, self._exchange, self.rank = shape, exchange, exchange.rank
        local = shape.local_experts
        self._mine = slice(exchange.rank * local, (exchange.rank + 1) * local)

    def bytes_sent(self) -> int:
        return self._exchange.bytes_sent

    def stalls(self) -> tuple[Stall, ...]:
        return self._exchange.stalls()

    def failure(self) -> str | None:
        return None if self._exchange.failure is None else str(self._exchange.failure)

    # Dispatch

    def dispatch(self, call: DispatchCall) -> DispatchResult:
        self._exchange.begin()
        if call.previous_event is not None:
            call.previous_event.wait()
        handle = self._plan(call) if call.handle is None else call.handle
        layout = _layout(handle)
        parts = _parts(call.x)
        payload = _pack(parts)
        sends = [payload.index_select(0, tokens) for tokens in layout.sent]
        arrived = payload.new_empty(sum(layout.received), payload.shape[1])
        receives = list(arrived.split(layout.received))
        receives[self.rank].copy_(sends[self.rank])
        pending = self._exchange.swap("dispatch", sends, receives, variant=len(parts))
        x = _empty_rows(call.x, handle.rows)
        count = layout.token.numel() if handle.expert_order else arrived.shape[0]

        def finish() -> None:
            pending.wait()
            rows = arrived.index_select(0, layout.token) if handle.expert_order else arrived
            for target, part in zip(_parts(x), _unpack(rows, parts), strict=True):
                _bits(target)[:count] = _bits(part)
                _bits(target)[count:] = 0

        topk_idx, topk_weights = layout.topk_idx, layout.topk_weights
        if handle.expert_order:
            topk_idx = topk_idx[layout.token, layout.k]
            topk_weights = None if topk_weights is None else topk_weights[layout.token, layout.k]
        return DispatchResult(
            x,
            _padded(topk_idx, handle.rows, -1),
            None if topk_weights is None or call.handle else _padded(topk_weights, handle.rows, 0.0),
            handle.group_offsets,
            handle.tokens_per_expert,
            handle,
            _end(finish, call.async_op),
        )

    def _plan(self, call: DispatchCall) -> Handle:
        """The layout of a routing, agreed on with all ranks, and the handle of it."""
        idx = call.topk_idx
        if idx is None:
            raise ValueError("dispatch: a call without a handle needs topk_idx")
        num_experts, size = self._shape.num_experts, self._exchange.size
        fault = _first_fault(idx, num_experts)
        ranks = torch.where(idx < 0, -1, idx // self._shape.local_experts)
        sent = [(ranks == r).any(1).nonzero().squeeze(1) for r in range(size)]
        chosen = idx[idx >= 0]
        header = _Header(
            fault,
            int(isinstance(call.x, QuantizedTensor)),
            int(call.topk_weights is not None),
            -1 if call.max_recv_tokens is None else call.max_recv_tokens,
            int(call.expert_order),
            [0] * num_experts if fault else torch.bincount(chosen, minlength=num_experts).tolist(),
            [tokens.numel() for tokens in sent],
        )
        every = self._exchange.all_gather("dispatch", header.encode(), idx.device)
        headers = [_Header.decode(values, num_experts) for values in every]
        self._check(headers, idx)
        received = [h.tokens[self.rank] for h in headers]
        recv_idx, recv_weights = self._swap_metadata(sent, received, idx, call.topk_weights)
        token, k = (recv_idx >= 0).nonzero(as_tuple=True)
        order = recv_idx[token, k].argsort(stable=True)
        sizes = [sum(counts) for counts in zip(*(h.experts[self._mine] for h in headers), strict=True)]
        offsets = [0, *accumulate(sizes)]
        layout = Layout(sent, received, recv_idx, recv_weights, token[order], k[order], offsets)
        rows = offsets[-1] if call.expert_order else sum(received)
        vector = torch.tensor(offsets, dtype=torch.int32, device=idx.device)
        return Handle(
            self,
            idx.clone(),
            call.expert_order,
            rows if call.max_recv_tokens is None else call.max_recv_tokens,
            vector if call.expert_order else None,
            vector.diff(),
            layout,
        )

    def _check(self, headers: list[_Header], idx: Tensor) -> None:
        """Raises on every rank alike what any rank has found wrong, or where the ranks do not agree."""
        shape = self._shape
        for rank, header in enumerate(headers):
            if not header.fault:
                continue
            token, k = divmod(header.fault - 1, shape.num_topk)
            if rank != self.rank:
                raise Fault(
                    f"dispatch: topk_idx[{token}, {k}] of rank {rank} is wrong, expected distinct experts "
                    f"-1 to {shape.num_experts - 1}; no rank has moved a token"
                )
            got = int(idx[token, k])
            what = "twice in its row" if 0 <= got < shape.num_experts else "out of range"
            raise Fault(
                f"dispatch: topk_idx[{token}, {k}] is {got}, {what}; expected distinct experts 0 to "
                f"{shape.num_experts - 1}, or -1 for none"
            )
        first = headers[0]
        for rank, header in enumerate(headers):
            if header.form != first.form:
                raise Fault(
                    f"dispatch: rank 0 passes {_describe(first)}, rank {rank} {_describe(header)}; "
                    "expected the same on all ranks"
                )
        local = shape.local_experts
        for rank, header in enumerate(headers):
            if header.expert_order:
                rows = sum(sum(h.experts[rank * local : (rank + 1) * local]) for h in headers)
            else:
                rows = sum(h.tokens[rank] for h in headers)
            if 0 <= header.limit < rows:
                raise Fault(
                    f"dispatch: rank {rank} is sent {rows} rows, expected at most its max_recv_tokens = "
                    f"{header.limit}; raise it, or pass None for as many as there are"
                )

    def _swap_metadata(
        self, sent: list[Tensor], received: list[int], idx: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Experts (local, -1 elsewhere) and weights (0 elsewhere) of the tokens that come here."""
        packed = idx.int() if weights is None else torch.cat([idx.int(), weights.view(torch.int32)], 1)
        sends = [packed.index_select(0, tokens) for tokens in sent]
        arrived = packed.new_empty(sum(received), packed.shape[1])
        receives = list(arrived.split(received))
        receives[self.rank].copy_(sends[self.rank])
        self._exchange.swap("dispatch", sends, receives).wait()
        experts, bits = arrived.split([idx.shape[1], packed.shape[1] - idx.shape[1]], 1)
        local = experts.long() - self._mine.start
        elsewhere = (experts < self._mine.start) | (experts >= self._mine.stop)
        local.masked_fill_(elsewhere, -1)
        if weights is None:
            return local, None
        return local, bits.contiguous().view(torch.float32).masked_fill_(elsewhere, 0.0)

    # Combine

    def combine(self, call: CombineCall) -> CombineResult:
        self._exchange.begin()
        if call.previous_event is not None:
            call.previous_event.wait()
        layout, handle = _layout(call.handle), call.handle
        sums = self._sum_experts(call) if handle.expert_order else call.y[: sum(layout.received)]
        parts = [sums]
        if call.weights_grad is not None:
            grads = call.weights_grad[: layout.token.numel() if handle.expert_order else sums.shape[0]]
            if handle.expert_order:
                by_token = grads.new_zeros(layout.topk_idx.shape)
                by_token[layout.token, layout.k] = grads
                grads = by_token
            parts.append(grads)
        payload = _pack(parts)
        sends = list(payload.split(layout.received))
        receives = [payload.new_empty(tokens.numel(), payload.shape[1]) for tokens in layout.sent]
        receives[self.rank] = sends[self.rank]
        pending = self._exchange.swap("combine", sends, receives, variant=len(parts))
        x = call.y.new_empty(handle.num_tokens, self._shape.hidden)
        weights_grad = None
        if call.weights_grad is not None:
            weights_grad = call.weights_grad.new_zeros(handle.topk_idx.shape)

        def finish() -> None:
            pending.wait()
            arrived = [_unpack(message, parts) for message in receives]
            x.copy_(self._sum_ranks([a[0] for a in arrived], handle, call.bias))
            if weights_grad is not None:
                owner = handle.topk_idx // self._shape.local_experts
                for rank, (tokens, a) in enumerate(zip(layout.sent, arrived, strict=True)):
                    weights_grad[tokens] += a[1].masked_fill(owner[tokens] != rank, 0.0)

        return CombineResult(x, weights_grad, _end(finish, call.async_op))

    def _sum_experts(self, call: CombineCall) -> Tensor:
        """The sums of the rows of each received token; an expert has a token at most once."""
        layout = _layout(call.handle)
        sums = call.y.new_zeros(sum(layout.received), self._shape.hidden, dtype=torch.float32)
        for low, high in pairwise(layout.offsets):
            values = call.y[low:high].float()
            if call.topk_weights is not None:
                values = values * call.topk_weights[low:high].unsqueeze(1)
            sums.index_add_(0, layout.token[low:high], values)
        return sums.to(call.y.dtype)

    def _sum_ranks(self, rows: list[Tensor], handle: Handle, bias: Tensor | None) -> Tensor:
        """The ranks of each node, then the nodes, then the bias; a rank has a token at most once."""
        sent, topology = _layout(handle).sent, self._shape.topology
        total = rows[0].new_zeros(handle.num_tokens, self._shape.hidden, dtype=torch.float32)
        for node in range(topology.nodes):
            of_node = torch.zeros_like(total)
            for rank in range(node * topology.gpus_per_node, (node + 1) * topology.gpus_per_node):
                of_node.index_add_(0, sent[rank], rows[rank].float())
            total += of_node.to(self._shape.dtype)
        return total if bias is None else total.add_(bias)


def _end(finish: Callable[[], None], async_op: bool) -> Event:
    event = Event(finish)
    if not async_op:
        event.wait()
    return event


def _layout(handle: Handle) -> Layout:
    if not isinstance(handle.layout, Layout):
        raise TypeError(f"handle.layout is {type(handle.layout).__name__}, expected the portable transport's")
    return handle.layout


def _describe(header: _Header) -> str:
    return (
        f"{'FP8' if header.fp8 else 'BF16'} x {'with' if header.weights else 'without'} topk_weights "
        f"in {'expert' if header.expert_order else 'token'} order"
    )


def _first_fault(idx: Tensor, num_experts: int) -> int:
    """1 + the index of the first expert that is out of range or stands in its row already; 0 if none is."""
    bad = (idx < -1) | (idx >= num_experts)
    same = (idx.unsqueeze(2) == idx.unsqueeze(1)) & (idx >= 0).unsqueeze(2)
    bad |= same.tril(-1).any(2)
    first = bad.flatten().nonzero()
    return 1 + int(first[0]) if first.numel() else 0


def _padded(values: Tensor, rows: int, filler: float) -> Tensor:
    if values.shape[0] == rows:
        return values
    padded = values.new_full((rows, *values.shape[1:]), filler)
    padded[: values.shape[0]] = values
    return padded


def _empty_rows(x: Tensor | QuantizedTensor, rows: int) -> Tensor | QuantizedTensor:
    if isinstance(x, Tensor):
        return x.new_empty(rows, x.shape[1])
    scales = empty_mn_major((rows, x.scales.shape[1]), x.scales.device)
    return QuantizedTensor(x.data.new_empty(rows, x.data.shape[1]), scales, ROW)


def _parts(x: Tensor | QuantizedTensor) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else (x.data, x.scales)


def _bits(values: Tensor) -> Tensor:
    """FP8 as bytes: PyTorch cannot index it."""
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


def _dense(values: Tensor) -> Tensor:
    """Contiguous in strides too, which `contiguous()` does not promise for dimensions of 0 or 1."""
    if values.stride() == (values.shape[1], 1):
        return values
    return values.clone(memory_format=torch.contiguous_format)


def _pack(parts: Sequence[Tensor]) -> Tensor:
    """Rows of bytes, each the same row of all parts."""
    columns = [_dense(part).view(torch.uint8) for part in parts]
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def _unpack(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of packed rows, each of the width and dtype of its model."""
    columns = rows.split([part.shape[1] * part.element_size() for part in like], 1)
    return [_dense(column).view(part.dtype) for column, part in zip(columns, like, strict=True)]
