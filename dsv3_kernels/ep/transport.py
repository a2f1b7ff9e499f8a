"""What every transport does for a buffer; the buffer has checked the arguments."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..quantized import QuantizedTensor
from .types import CombineResult, DispatchResult, Event, Handle, Stall, Topology


@dataclass(frozen=True)
class Shape:
    """The sizes that all ranks of a buffer agree on."""

    num_experts: int
    hidden: int
    max_tokens_per_rank: int
    num_topk: int
    topology: Topology
    dtype: torch.dtype = torch.bfloat16  # of rows that are not FP8

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.topology.size


@dataclass(frozen=True, eq=False)
class DispatchCall:
    """Either topk_idx, with or without topk_weights, or a handle."""

    x: Tensor | QuantizedTensor
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    handle: Handle | None
    expert_order: bool
    max_recv_tokens: int | None
    num_sms: int
    previous_event: Event | None
    async_op: bool


@dataclass(frozen=True, eq=False)
class CombineCall:
    y: Tensor
    handle: Handle
    topk_weights: Tensor | None
    bias: Tensor | None
    weights_grad: Tensor | None
    num_sms: int
    previous_event: Event | None
    async_op: bool


class Transport(Protocol):
    """A call waits for its previous_event, and may return before its data is there: its event says when."""

    name: str

    def dispatch(self, call: DispatchCall) -> DispatchResult: ...

    def combine(self, call: CombineCall) -> CombineResult: ...

    def bytes_sent(self) -> int: ...

    def stalls(self) -> tuple[Stall, ...]: ...

    def failure(self) -> str | None: ...
