"""The gate of DeepSeekMoE (section 2.1.2 of the DeepSeek-V3 report): who goes where, balanced by a bias."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_kernels.gate import route
from dsv3_kernels.nn.recompute import keep_remake
from dsv3_kernels.reference import routing_weights


class Routing(NamedTuple):
    """Where T tokens go: K of E experts each."""

    experts: Tensor
    """int64 [T, K], ascending in a row, so that a token's experts are summed in ascending order."""
    weights: Tensor
    """FP32 [T, K], with the gradient of the gate."""
    scores: Tensor
    """FP32 [T, E], the sigmoid scores without the bias."""
    counts: Tensor
    """int32 [E], the tokens of each expert."""


class Gate(nn.Module):
    """Sigmoid gate in FP32. The bias chooses experts, the unbiased scores weigh them.

    bias: FP32 [E], moved by `balance` towards an even load and never by a gradient.
    load: FP32 [E], the tokens an expert has received in training since the last `balance`.
    top_k, n_group, topk_group, scaling: as in `route`.
    """

    bias: Tensor
    load: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        n_group: int = 1,
        topk_group: int = 1,
        scaling: float = 1.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.top_k, self.n_group, self.topk_group, self.scaling = top_k, n_group, topk_group, scaling
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, **factory))
        nn.init.uniform_(self.weight, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))
        device = self.weight.device
        self.register_buffer("bias", torch.zeros(num_experts, device=device))
        self.register_buffer("load", torch.zeros(num_experts, device=device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """Moves like any module, but the buffers stay FP32: a BF16 bias could not take steps of 0.001."""
        super()._apply(fn, recurse)
        self.bias, self.load = self.bias.float(), self.load.float()
        return self

    def forward(self, x: Tensor) -> Routing:
        """x: [T, hidden_size]."""
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            scores = keep_remake(lambda rows: F.linear(rows.to(wide), self.weight.to(wide)), x).sigmoid()
            experts, weights, counts = route(
                scores.detach().float(),
                self.bias,
                top_k=self.top_k,
                n_group=self.n_group,
                topk_group=self.topk_group,
                scaling=self.scaling,
            )
            if scores.requires_grad or scores.dtype != torch.float32:
                weights = routing_weights(scores.gather(1, experts), self.scaling)
        if self.training and torch.is_grad_enabled():
            self.load += counts
        return Routing(experts, weights, scores, counts)

    @torch.no_grad()
    def balance(self, speed: float, group: Any = None) -> None:
        """Moves each expert's bias by `speed`: up where its load is under the mean, down where it is over.

        group: a torch.distributed group whose ranks saw parts of the batch; their loads are added first, so
        that all of them move the bias alike. All ranks call together.
        """
        if group is not None:
            torch.distributed.all_reduce(self.load, group=group)
        self.bias += speed * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


def sequence_balance_loss(routing: Routing, batch: int) -> Tensor:
    """Sum over experts of f_i · P_i in each sequence, the mean over the sequences: 1 when even.

    f_i: an expert's share of the choices times E; P_i: the mean of its normalised scores (equations 17 to
    20).
    """
    experts = routing.experts.view(batch, -1)
    num_experts = routing.scores.shape[-1]
    load = torch.zeros(batch, num_experts, device=experts.device, dtype=routing.scores.dtype)
    load.scatter_add_(1, experts, torch.ones_like(experts, dtype=load.dtype))
    f = load * (num_experts / experts.shape[1])
    p = (routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)).view(batch, -1, num_experts).mean(1)
    return (f * p).sum(-1).mean()
