"""Low latency over torch.distributed point to point: the same rows and sums as the kernels, anywhere."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..permute import unpermute
from ..quantize import quantize_1x128
from ..quantized import ROW, QuantizedTensor, empty_mn_major
from .errors import Fault
from .exchange import Exchange
from .low_latency import Format, Hook, LowLatencyDispatched, LowLatencyHandle, received_rows
from .portable import _bits, _first_fault, _pack, _unpack
from .transport import Shape


@dataclass(frozen=True, eq=False)
class _Layout:
    """slots: int32 `[T, K]`, the place of a choice among this rank's, by expert and token; -1 for none.
    sent: choices that go to each rank. rows: for each source, where its rows lie among all of y's.
    """

    slots: Tensor
    sent: list[int]
    rows: list[Tensor]


class PortableLowLatency:
    def __init__(self, shape: Shape, exchange: Exchange) -> None:
        self._shape, self._exchange = shape, exchange

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, form: Format, num_sms: int
    ) -> tuple[LowLatencyDispatched, Hook]:
        op, shape = "low_latency_dispatch", self._shape
        self._exchange.begin()
        fault = _first_fault(topk_idx, shape.num_experts)
        experts = topk_idx.flatten()
        chosen = (experts >= 0).nonzero().squeeze(1)
        counts = [0] * shape.num_experts
        if not fault:
            chosen = chosen[experts[chosen].argsort(stable=True)]
            counts = torch.bincount(experts[chosen], minlength=shape.num_experts).tolist()
        header = [fault, int(form.fp8), int(form.power_of_2_scales), *counts]
        headers = self._exchange.all_gather(op, header, x.device)
        self._check(op, headers)
        layout = self._lay_out(headers, topk_idx, chosen)

        parts = self._encode(x, form)
        payload = _pack(parts).index_select(0, chosen // shape.num_topk)
        sends = list(payload.split(layout.sent))
        arrived = payload.new_empty(sum(rows.numel() for rows in layout.rows), payload.shape[1])
        receives = list(arrived.split([rows.numel() for rows in layout.rows]))
        receives[self._exchange.rank].copy_(sends[self._exchange.rank])
        pending = self._exchange.swap(op, sends, receives)
        data, scales = self._empty(x, form)
        local = shape.local_experts
        first = 3 + self._exchange.rank * local
        counts_here = [sum(header[first + e] for header in headers) for e in range(local)]
        tokens_per_expert = torch.zeros(local, dtype=torch.int32, device=x.device)

        def receive() -> None:
            pending.wait()
            tokens_per_expert.copy_(torch.tensor(counts_here, dtype=torch.int32))
            where = torch.cat(layout.rows)
            got = _unpack(arrived, parts)
            _bits(data).flatten(0, 1)[where] = _bits(got[0])
            if scales is not None:
                room = scales.shape[1]
                scales[where // room, where % room] = got[1]

        handle = LowLatencyHandle(self, x.shape[0], layout)
        rows = data if scales is None else QuantizedTensor(data, scales, ROW)
        return LowLatencyDispatched(rows, tokens_per_expert, handle, None), receive

    def _check(self, op: str, headers: list[list[int]]) -> None:
        shape = self._shape
        for rank, header in enumerate(headers):
            if header[0]:
                token, k = divmod(header[0] - 1, shape.num_topk)
                raise Fault(
                    f"{op}: topk_idx[{token}, {k}] of rank {rank} is wrong, expected distinct experts -1 to "
                    f"{shape.num_experts - 1}; no rank has moved a token"
                )
            if header[1:3] != headers[0][1:3]:
                raise Fault(
                    f"{op}: fp8 and power_of_2_scales are {[bool(v) for v in headers[0][1:3]]} on rank 0 and "
                    f"{[bool(v) for v in header[1:3]]} on rank {rank}, expected the same on all ranks"
                )

    def _lay_out(self, headers: list[list[int]], topk_idx: Tensor, chosen: Tensor) -> _Layout:
        shape = self._shape
        local, rank = shape.local_experts, self._exchange.rank
        room = received_rows(shape)
        next_row = [e * room for e in range(local)]
        rows = []
        for header in headers:
            mine = header[3 + rank * local : 3 + (rank + 1) * local]
            spans = [torch.arange(next_row[e], next_row[e] + n) for e, n in enumerate(mine)]
            rows.append(torch.cat(spans).to(topk_idx.device))
            next_row = [first + n for first, n in zip(next_row, mine, strict=True)]
        before = [0, *accumulate(headers[rank][3:])]
        sent = [before[(r + 1) * local] - before[r * local] for r in range(len(headers))]
        slots = torch.full((topk_idx.numel(),), -1, dtype=torch.int32, device=topk_idx.device)
        slots[chosen] = torch.arange(chosen.numel(), dtype=torch.int32, device=topk_idx.device)
        return _Layout(slots.view(topk_idx.shape), sent, rows)

    def _encode(self, x: Tensor, form: Format) -> tuple[Tensor, ...]:
        if not form.fp8:
            return (x,)
        q = quantize_1x128(x, power_of_2_scales=form.power_of_2_scales)
        return q.data, q.scales

    def _empty(self, x: Tensor, form: Format) -> tuple[Tensor, Tensor | None]:
        shape = self._shape
        size = (shape.local_experts, received_rows(shape), shape.hidden)
        if not form.fp8:
            return x.new_zeros(size), None
        data = torch.zeros(size, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn)
        return data, empty_mn_major((*size[:2], -(-shape.hidden // 128)), x.device).zero_()

    def combine(
        self, y: Tensor, handle: LowLatencyHandle, topk_weights: Tensor, num_sms: int
    ) -> tuple[Tensor, Hook]:
        self._exchange.begin()
        layout = handle.layout
        if not isinstance(layout, _Layout):
            raise TypeError(f"handle.layout is {type(layout).__name__}, expected the portable transport's")
        flat = y.flatten(0, 1)
        sends = [flat.index_select(0, rows) for rows in layout.rows]
        arrived = y.new_empty(sum(layout.sent), y.shape[2])
        receives = list(arrived.split(layout.sent))
        receives[self._exchange.rank].copy_(sends[self._exchange.rank])
        pending = self._exchange.swap("low_latency_combine", sends, receives)
        out = y.new_empty(handle.num_tokens, y.shape[2])

        def receive() -> None:
            pending.wait()
            out.copy_(unpermute(arrived, layout.slots, topk_weights))

        return out, receive
