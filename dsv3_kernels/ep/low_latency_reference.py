"""Low-latency dispatch and combine of all ranks at once, in plain PyTorch: what every transport computes.

Every argument is a list with one entry a rank; loops follow the definition. The arguments are taken as valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Received:
    """What one rank receives. rows: for each local expert, (source rank, token, k) of each row, in order."""

    rows: list[list[tuple[int, int, int]]]

    @property
    def tokens_per_expert(self) -> Tensor:
        return torch.tensor([len(rows) for rows in self.rows], dtype=torch.int32)


def dispatch(topk_idx: Sequence[Tensor], num_experts: int) -> list[Received]:
    """topk_idx: int64 `[T, K]`, -1 for none. The rows of an expert are sorted by source rank, then token.

    Row i of a local expert is its token's row of x, or of `quantize_1x128(x)`, data and scales alike.
    """
    rows: list[list[tuple[int, int, int]]] = [[] for _ in range(num_experts)]
    for source, idx in enumerate(topk_idx):
        for token, experts in enumerate(idx.tolist()):
            for k, expert in enumerate(experts):
                if expert >= 0:
                    rows[expert].append((source, token, k))
    local = num_experts // len(topk_idx)
    return [Received(rows[first : first + local]) for first in range(0, num_experts, local)]


def combine(
    y: Sequence[Tensor], received: Sequence[Received], topk_weights: Sequence[Tensor]
) -> list[Tensor]:
    """y: bfloat16 `[E_local, rows, hidden]`; topk_weights: float32 `[T, K]`.

    A token's rows, each times its weight and rounded to FP32, are added in FP32 from +0 in the order of k;
    the sum is rounded to BF16.
    """
    hidden = y[0].shape[2]
    returned: dict[tuple[int, int, int], Tensor] = {}
    for mine, part in zip(y, received, strict=True):
        for expert, rows in enumerate(part.rows):
            for i, origin in enumerate(rows):
                returned[origin] = mine[expert, i]
    outputs = []
    for source, weights in enumerate(topk_weights):
        out = torch.zeros(weights.shape[0], hidden, dtype=torch.bfloat16)
        for token in range(weights.shape[0]):
            total = torch.zeros(hidden)
            for k in range(weights.shape[1]):
                row = returned.get((source, token, k))
                if row is not None:
                    total = total + row.float() * weights[token, k]
            out[token] = total.bfloat16()
        outputs.append(out)
    return outputs
