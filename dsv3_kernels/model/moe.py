"""DeepSeekMoE (section 2.1.2 of the DeepSeek-V3 report): shared and routed experts, balanced by a bias."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_kernels.ep import Buffer
from dsv3_kernels.model.config import ModelConfig
from dsv3_kernels.nn import Fp8Linear, GroupedFp8Linear, MoECombine, MoEDispatch
from dsv3_kernels.reference import choose_experts, routing_weights


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, for x = [gate, up] along the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class MLP(nn.Module):
    """The dense feed-forward layer, and the shared experts: down(swiglu(gate_up(x)))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Fp8Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Fp8Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Routing(NamedTuple):
    """Where T tokens go: K experts each."""

    experts: (
        Tensor  # int64 [T, K], ascending in a row, so that a token's experts are summed in ascending order
    )
    weights: Tensor  # FP32 [T, K], with the gradient of the gate
    scores: Tensor  # FP32 [T, E], the sigmoid scores without the bias


class Gate(nn.Module):
    """Sigmoid gate in FP32. The bias chooses experts, the unbiased scores weigh them.

    bias: FP32 [E], moved by `balance` towards an even load and never by a gradient.
    load: FP32 [E], the tokens an expert has received in training since the last `balance`.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.n_group, self.topk_group = (
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
        )
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        self.register_buffer("bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """Moves like any module, but the buffers stay FP32: a BF16 bias could not take steps of 0.001."""
        super()._apply(fn, recurse)
        self.bias, self.load = self.bias.float(), self.load.float()
        return self

    def forward(self, x: Tensor) -> Routing:
        """x: [T, hidden]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()
        experts = choose_experts(scores.detach() + self.bias, self.n_group, self.topk_group, self.top_k)
        weights = routing_weights(scores.gather(1, experts), self.scaling)
        if self.training and torch.is_grad_enabled():
            self.load += torch.bincount(experts.flatten(), minlength=self.load.numel())
        return Routing(experts, weights, scores)

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Moves each expert's bias by `speed`: up where its load is under the mean, down where it is over."""
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


class _ToExpertOrder(torch.autograd.Function):
    """Row r of the result is x[token[r]]; slot inverts the order: the backward is a gather and a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.tokens = x.shape[0]
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        dy = grad_outputs[0].index_select(0, slot)
        return dy.view(ctx.tokens, -1, dy.shape[-1]).sum(1), None, None


class _FromExpertOrder(torch.autograd.Function):
    """x[slot], a permutation of the rows whose inverse is order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, order), None, None


class Experts(nn.Module):
    """The routed experts as two grouped GEMMs over the tokens sorted by expert. No token is dropped.

    With an `ep_buffer` this rank holds local_experts of the num_experts, from first_expert on. Tokens travel
    to their experts and back, so all ranks of the buffer call forward together, and backward.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, ep_buffer: Buffer | None = None
    ) -> None:
        super().__init__()
        self.num_experts, self.first_expert, local = num_experts, 0, num_experts
        self.dispatch = self.combine = None
        if ep_buffer is not None:
            if ep_buffer.num_experts != num_experts:
                raise ValueError(
                    f"Experts: ep_buffer has num_experts = {ep_buffer.num_experts}, expected {num_experts}"
                )
            local = ep_buffer.local_experts
            self.first_expert = ep_buffer.rank * local
            self.dispatch, self.combine = MoEDispatch(ep_buffer), MoECombine(ep_buffer)
        self.gate_up_proj = GroupedFp8Linear(local, hidden_size, 2 * intermediate_size)
        self.down_proj = GroupedFp8Linear(local, intermediate_size, hidden_size)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x: [T, hidden]; experts, weights: [T, K]. Returns each token's weighted sum, [T, hidden]."""
        if self.dispatch is not None and self.combine is not None:
            got = self.dispatch(x, experts, weights)
            rows = self.down_proj(swiglu(self.gate_up_proj(got.x, got.group_offsets)), got.group_offsets)
            return self.combine(rows, got.handle, got.topk_weights)
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        slot = torch.empty_like(order)
        slot[order] = torch.arange(order.numel(), device=order.device)
        offsets = F.pad(torch.bincount(flat, minlength=self.num_experts).cumsum(0), (1, 0)).int()
        rows = _ToExpertOrder.apply(x, order // experts.shape[1], slot)
        rows = self.down_proj(swiglu(self.gate_up_proj(rows, offsets)), offsets)
        rows = _FromExpertOrder.apply(rows, slot, order).view(*experts.shape, -1)
        return (rows * weights.unsqueeze(-1)).sum(1).to(x.dtype)


class MoE(nn.Module):
    """Shared experts, which see every token, plus the routed ones."""

    def __init__(self, config: ModelConfig, ep_buffer: Buffer | None = None) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = Experts(config.n_routed_experts, hidden, inner, ep_buffer)
        self.shared_experts = (
            MLP(hidden, inner * config.n_shared_experts) if config.n_shared_experts else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, S, hidden]. Returns ([B, S, hidden], the sequence-wise balance loss)."""
        tokens = x.flatten(0, 1)
        routing = self.gate(tokens)
        y = self.experts(tokens, routing.experts, routing.weights).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, sequence_balance_loss(routing, x.shape[0])
