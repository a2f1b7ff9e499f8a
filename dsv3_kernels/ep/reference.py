"""The whole exchange, for all ranks at once, in plain PyTorch: what every transport computes, bit for bit.

Every argument is a list with one entry a rank; loops follow the definition, token by token. Rank r holds the
experts r·E/R to (r+1)·E/R - 1. The arguments are taken as valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..quantized import ROW, QuantizedTensor, empty_mn_major
from .types import Topology

Rows = Tensor | QuantizedTensor


@dataclass(frozen=True, eq=False)
class Received:
    """What one rank receives; see `ep.DispatchResult`. origin: (source rank, token, k) of each row.

    In token order a row stands for several k, and k is -1.
    """

    x: Rows
    topk_idx: Tensor
    topk_weights: Tensor | None
    group_offsets: Tensor | None
    tokens_per_expert: Tensor
    origin: list[tuple[int, int, int]]


def dispatch(
    x: Sequence[Rows],
    topk_idx: Sequence[Tensor],
    topk_weights: Sequence[Tensor] | None,
    num_experts: int,
    *,
    expert_order: bool = True,
) -> list[Received]:
    """x: bfloat16 `[T, hidden]` or QuantizedTensor; topk_idx: int64 `[T, K]`, -1 for none; weights FP32."""
    local = num_experts // len(x)
    received = []
    for rank in range(len(x)):
        choices = [
            (expert - rank * local, source, token, k)
            for source, idx in enumerate(topk_idx)
            for token, experts in enumerate(idx.tolist())
            for k, expert in enumerate(experts)
            if expert // local == rank
        ]
        sizes = [sum(e == choice[0] for choice in choices) for e in range(local)]
        tokens_per_expert = torch.tensor(sizes, dtype=torch.int32)
        if expert_order:
            choices.sort()
            origin = [(source, token, k) for _, source, token, k in choices]
            idx = torch.tensor([choice[0] for choice in choices], dtype=torch.int64)
            offsets = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
        else:
            origin = [(s, t, -1) for s, t in sorted({(s, t) for _, s, t, _ in choices})]
            width = topk_idx[0].shape[1]
            every = [topk_idx[s][t] - rank * local for s, t, _ in origin]
            idx = torch.stack(every) if every else torch.zeros(0, width, dtype=torch.int64)
            idx = idx.masked_fill((idx < 0) | (idx >= local), -1)
            offsets = None
        weights = None
        if topk_weights is not None:
            picked = [topk_weights[s][t] if k < 0 else topk_weights[s][t, k] for s, t, k in origin]
            weights = torch.stack(picked) if picked else torch.zeros(idx.shape)
            weights = weights.masked_fill(idx < 0, 0.0)
        received.append(Received(_gather(x, origin), idx, weights, offsets, tokens_per_expert, origin))
    return received


def _gather(x: Sequence[Rows], origin: list[tuple[int, int, int]]) -> Rows:
    def pick(parts: Sequence[Tensor]) -> Tensor:
        rows = [parts[s][t] for s, t, _ in origin]
        return torch.stack(rows) if rows else parts[0].new_empty(0, parts[0].shape[1])

    if isinstance(x[0], Tensor):
        return pick([part for part in x if isinstance(part, Tensor)])
    quantized = [part for part in x if isinstance(part, QuantizedTensor)]
    data = pick([q.data.view(torch.uint8) for q in quantized]).view(torch.float8_e4m3fn)
    scales = pick([q.scales for q in quantized])
    return QuantizedTensor(data, empty_mn_major(tuple(scales.shape), scales.device).copy_(scales), ROW)


def combine(
    y: Sequence[Tensor],
    received: Sequence[Received],
    num_tokens: Sequence[int],
    topology: Topology,
    topk_weights: Sequence[Tensor] | None = None,
    bias: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The sum of what the experts of each token returned, in the one order of all transports.

    y: bfloat16 `[rows, hidden]`, in the order of `received`. topk_weights: FP32 `[rows]`, expert order only.
    A rank adds its rows of a token in the order of experts, each times its weight and rounded to FP32 first;
    the sum is rounded to BF16. The ranks of a node, ascending, are added in FP32, the sum rounded to BF16;
    the nodes likewise, then the bias, before the last rounding. All sums start at +0.
    """
    hidden = y[0].shape[1]
    partial: list[dict[tuple[int, int], Tensor]] = []  # of each rank, its BF16 sum of (source, token)
    for rank, origin in enumerate(part.origin for part in received):
        sums: dict[tuple[int, int], Tensor] = {}
        for row, (source, token, _) in enumerate(origin):
            value = y[rank][row].float()
            if topk_weights is not None:
                value = value * topk_weights[rank][row]
            sums[source, token] = sums.get((source, token), torch.zeros(hidden)) + value
        partial.append({key: value.bfloat16() for key, value in sums.items()})
    outputs = []
    for source, count in enumerate(num_tokens):
        out = torch.zeros(count, hidden, dtype=torch.bfloat16)
        for token in range(count):
            total = torch.zeros(hidden)
            for node in range(topology.nodes):
                of_node = torch.zeros(hidden)
                for rank in range(node * topology.gpus_per_node, (node + 1) * topology.gpus_per_node):
                    if (source, token) in partial[rank]:
                        of_node = of_node + partial[rank][source, token].float()
                total = total + of_node.bfloat16().float()
            if bias is not None:
                total = total + bias[source][token].float()
            out[token] = total.bfloat16()
        outputs.append(out)
    return outputs


def combine_weights_grad(
    weights_grad: Sequence[Tensor], received: Sequence[Received], num_tokens: Sequence[int], num_topk: int
) -> list[Tensor]:
    """Each row's scalar, FP32 `[rows]` in expert order, back in its token's `[T, K]`; 0 where none is."""
    home = [torch.zeros(count, num_topk) for count in num_tokens]
    for values, part in zip(weights_grad, received, strict=True):
        for row, (source, token, k) in enumerate(part.origin):
            home[source][token, k] = values[row]
    return home
