"""Low latency: what `ep.Buffer.low_latency_dispatch` and `low_latency_combine` check, take and give.

Each (token, expert) goes straight to the expert's rank and its result straight back, without the forwarding
and the counting ahead of `Buffer.dispatch`: for decoding, where a rank has some 128 tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .. import checks
from ..quantized import QuantizedTensor
from .transport import Shape

MAX_PAIRS = 65535  # (token, expert) pairs of a rank: 16 bits in the word that announces them
MAX_TOPK = 32

Hook = Callable[[], None]


@dataclass(frozen=True)
class Format:
    """Of a row on the wire: BF16, or e4m3 with a scale for each 128 columns."""

    fp8: bool
    power_of_2_scales: bool


@dataclass(frozen=True, eq=False)
class LowLatencyHandle:
    """Where the rows of one dispatch lie and whose they are; for its `low_latency_combine`.

    num_tokens: how many this rank dispatched. layout: the transport's own.
    """

    owner: object = field(repr=False)
    num_tokens: int
    layout: object = field(repr=False)


@dataclass(frozen=True, eq=False)
class LowLatencyDispatched:
    """What a rank received, as `masked_grouped_fp8_gemm` takes it.

    x: bfloat16 `[E_local, R·max_tokens, hidden]`, or a QuantizedTensor of that shape with block (1, 128) and
        MN-major scales. The rows of an expert are sorted by source rank, then token; those from
        tokens_per_expert on are not written.
    tokens_per_expert: int32 `[E_local]`.
    hook: with return_recv_hook, what receives: x and tokens_per_expert may be read after `hook()`. Else None.
    """

    x: Tensor | QuantizedTensor
    tokens_per_expert: Tensor
    handle: LowLatencyHandle
    hook: Hook | None


@dataclass(frozen=True, eq=False)
class LowLatencyCombined:
    """x: bfloat16 `[T, hidden]`. hook: as in `LowLatencyDispatched`."""

    x: Tensor
    hook: Hook | None


class LowLatencyTransport(Protocol):
    """Both calls send, and give what receives."""

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, form: Format, num_sms: int
    ) -> tuple[LowLatencyDispatched, Hook]: ...

    def combine(
        self, y: Tensor, handle: LowLatencyHandle, topk_weights: Tensor, num_sms: int
    ) -> tuple[Tensor, Hook]: ...


def dispatch(
    transport: LowLatencyTransport,
    shape: Shape,
    x: object,
    topk_idx: object,
    form: Format,
    num_sms: object,
    return_recv_hook: object,
) -> LowLatencyDispatched:
    """`Buffer.low_latency_dispatch`."""
    op = "low_latency_dispatch"
    _check_sizes(op, shape)
    tokens = checks.tensor(op, "x", x, (torch.bfloat16,), (2,))
    checks.contiguous(op, "x", tokens)
    checks.shape(op, "x", tokens, (tokens.shape[0], shape.hidden), "(T, hidden)")
    if tokens.shape[0] > shape.max_tokens_per_rank:
        raise ValueError(
            f"{op}: x has {tokens.shape[0]} tokens, expected at most max_tokens_per_rank = "
            f"{shape.max_tokens_per_rank}, as the buffer was made for"
        )
    idx = checks.tensor(op, "topk_idx", topk_idx, (torch.int64,), (2,))
    checks.shape(op, "topk_idx", idx, (tokens.shape[0], shape.num_topk), "(T, num_topk)")
    checks.contiguous(op, "topk_idx", idx)
    checks.same_device(op, "topk_idx", idx, "x", tokens)
    checks.flag(op, "fp8", form.fp8)
    checks.flag(op, "power_of_2_scales", form.power_of_2_scales)
    checks.flag(op, "return_recv_hook", return_recv_hook)
    if form.power_of_2_scales and not form.fp8:
        raise ValueError(f"{op}: power_of_2_scales is True, expected False without fp8: BF16 has no scales")
    got, receive = transport.dispatch(tokens, idx, form, _num_sms(op, num_sms))
    if return_recv_hook:
        return LowLatencyDispatched(got.x, got.tokens_per_expert, got.handle, receive)
    receive()
    return got


def combine(
    transport: LowLatencyTransport,
    shape: Shape,
    y: object,
    handle: object,
    topk_weights: object,
    num_sms: object,
    return_recv_hook: object,
) -> LowLatencyCombined:
    """`Buffer.low_latency_combine`."""
    op = "low_latency_combine"
    rows = checks.tensor(op, "y", y, (torch.bfloat16,), (3,))
    if not isinstance(handle, LowLatencyHandle):
        raise TypeError(f"{op}: handle is {type(handle).__name__}, expected that of a low_latency_dispatch")
    if handle.owner is not transport:
        raise ValueError(f"{op}: handle is of another buffer, expected one of this buffer's dispatches")
    expected = (shape.local_experts, received_rows(shape), shape.hidden)
    checks.shape(op, "y", rows, expected, "(E_local, R * max_tokens_per_rank, hidden)")
    checks.contiguous(op, "y", rows)
    weights = checks.tensor(op, "topk_weights", topk_weights, (torch.float32,), (2,))
    checks.shape(op, "topk_weights", weights, (handle.num_tokens, shape.num_topk), "(T, num_topk)")
    checks.contiguous(op, "topk_weights", weights)
    checks.same_device(op, "topk_weights", weights, "y", rows)
    checks.flag(op, "return_recv_hook", return_recv_hook)
    x, receive = transport.combine(rows, handle, weights, _num_sms(op, num_sms))
    if return_recv_hook:
        return LowLatencyCombined(x, receive)
    receive()
    return LowLatencyCombined(x, None)


def received_rows(shape: Shape) -> int:
    """Rows that an expert has room for: all tokens of all ranks."""
    return shape.topology.size * shape.max_tokens_per_rank


def _check_sizes(op: str, shape: Shape) -> None:
    if shape.num_topk > MAX_TOPK:
        raise ValueError(f"{op}: the buffer's num_topk is {shape.num_topk}, expected at most {MAX_TOPK}")
    pairs = shape.max_tokens_per_rank * shape.num_topk
    if pairs > MAX_PAIRS:
        raise ValueError(
            f"{op}: the buffer's max_tokens_per_rank * num_topk is {pairs}, expected at most {MAX_PAIRS}: "
            "this is for the few tokens of decoding; use dispatch and combine, or a buffer with a smaller "
            "max_tokens_per_rank"
        )


def _num_sms(op: str, num_sms: object) -> int:
    if type(num_sms) is not int:
        raise TypeError(f"{op}: num_sms is {num_sms!r} of type {type(num_sms).__name__}, expected an int")
    if num_sms < 1:
        raise ValueError(f"{op}: num_sms is {num_sms}, expected at least 1")
    return num_sms
