"""The routed experts: to them, through them, back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_kernels.ep import Buffer, Handle
from dsv3_kernels.nn.exchange import MoECombine, MoEDispatch
from dsv3_kernels.nn.linear import GroupedFp8Linear, as_autocast_says
from dsv3_kernels.nn.mlp import swiglu_mlp
from dsv3_kernels.nn.permutation import ExpertOrder, expert_order, permute, unpermute
from dsv3_kernels.nn.recipe import FP8, Fp8Recipe
from dsv3_kernels.nn.recompute import remake_of, with_remake


@dataclass(frozen=True, eq=False)
class Dispatched:
    """Tokens at their experts: rows sorted by expert."""

    rows: Tensor
    """[R, hidden]; kept in FP8 where the recipe says so."""
    weights: Tensor
    """FP32 [R], the routing weight of each row."""
    group_offsets: Tensor
    """int32 [local experts + 1]."""
    way_back: ExpertOrder | Handle


class Experts(nn.Module):
    """The routed experts as two grouped GEMMs over the tokens sorted by expert. No token is dropped.

    With an `ep_buffer` this rank holds local_experts of the num_experts, from first_expert on. Tokens travel
    to their experts and back, so all ranks of the buffer call dispatch and combine together, and backward.

    forward is dispatch, compute, combine: three calls for schedules that overlap them with other work. The
    routing weights are applied between an expert's two GEMMs, so that combine only sums.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        ep_buffer: Buffer | None = None,
        *,
        recipe: Fp8Recipe = FP8,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_experts, self.first_expert, local = num_experts, 0, num_experts
        self.send: MoEDispatch | None = None
        self.collect: MoECombine | None = None
        if ep_buffer is not None:
            if ep_buffer.num_experts != num_experts:
                raise ValueError(
                    f"Experts: ep_buffer has num_experts = {ep_buffer.num_experts}, expected {num_experts}"
                )
            local = ep_buffer.local_experts
            self.first_expert = ep_buffer.rank * local
            self.send = MoEDispatch(ep_buffer, recipe=recipe)
            self.collect = MoECombine(ep_buffer, recipe=recipe)
        self.gate_up_proj = GroupedFp8Linear(
            local, hidden_size, 2 * intermediate_size, recipe=recipe, **factory
        )
        self.down_proj = GroupedFp8Linear(local, intermediate_size, hidden_size, recipe=recipe, **factory)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, counts: Tensor | None = None) -> Tensor:
        """x: [T, hidden]; experts: int64, weights: FP32 [T, K]; counts: int32 [num_experts], the tokens of
        each, if known. Returns each token's weighted sum, [T, hidden].
        """
        sent = self.dispatch(x, experts, weights, counts)
        return self.combine(self.compute(sent), sent)

    def dispatch(
        self, x: Tensor, experts: Tensor, weights: Tensor, counts: Tensor | None = None
    ) -> Dispatched:
        """Takes what forward takes."""
        x = as_autocast_says(x)
        if self.send is not None:
            got = self.send(x, experts, weights)
            return Dispatched(got.x, got.topk_weights, got.group_offsets, got.handle)
        order = expert_order(experts, self.num_experts, counts)
        recipe, again = self.gate_up_proj.recipe, remake_of(x)
        remakes = again is not None and recipe.precision == "fp8"
        rows = permute(x, order, recipe=recipe, transpose=torch.is_grad_enabled() and not remakes)
        if again is not None and remakes:
            with_remake(rows, lambda: permute(again(), order, recipe=recipe))
        return Dispatched(rows, weights.flatten().index_select(0, order.choices), order.group_offsets, order)

    def compute(self, sent: Dispatched) -> Tensor:
        """The outputs of this rank's experts, each times its weight, [R, hidden]."""
        return swiglu_mlp(sent.rows, self.gate_up_proj, self.down_proj, sent.group_offsets, sent.weights)

    def combine(self, rows: Tensor, sent: Dispatched) -> Tensor:
        """[T, hidden]: the sum of each token's rows."""
        if self.collect is not None and isinstance(sent.way_back, Handle):
            return self.collect(rows, sent.way_back)
        assert isinstance(sent.way_back, ExpertOrder)
        return unpermute(rows, sent.way_back, recipe=self.down_proj.recipe)
