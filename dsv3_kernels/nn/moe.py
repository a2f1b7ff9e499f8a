"""DeepSeekMoE (section 2.1.2 of the DeepSeek-V3 report): shared and routed experts, balanced by a bias."""

from typing import Any

from torch import Tensor, nn

from dsv3_kernels.ep import Buffer
from dsv3_kernels.nn.experts import Experts
from dsv3_kernels.nn.gate import Gate, Routing
from dsv3_kernels.nn.mlp import MLP
from dsv3_kernels.nn.recipe import FP8, Fp8Recipe


class MoE(nn.Module):
    """A drop-in for a feed-forward layer: routed experts behind a gate, and shared ones for every token.

        moe = nn.MoE(1024, 512, num_experts=64, top_k=6, shared_experts=2)
        y = moe(x)  # [..., 1024]
        ...
        moe.gate.balance(0.001)  # after each optimizer step: even loads, without a loss

    hidden_size, intermediate_size: of each expert; multiples of 16. shared_experts: as many times
    intermediate_size is the width of the shared one. n_group, topk_group, scaling: as in `route`. ep_buffer:
    spreads the routed experts over its ranks; each gives its own tokens, and all call together.
    factory: device and dtype of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        top_k: int,
        shared_experts: int = 0,
        n_group: int = 1,
        topk_group: int = 1,
        scaling: float = 1.0,
        recipe: Fp8Recipe = FP8,
        ep_buffer: Buffer | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        groups = {"n_group": n_group, "topk_group": topk_group}
        self.gate = Gate(hidden_size, num_experts, top_k, **groups, scaling=scaling, **factory)
        self.experts = Experts(
            num_experts, hidden_size, intermediate_size, ep_buffer, recipe=recipe, **factory
        )
        self.shared_experts: MLP | None = None
        if shared_experts:
            width = shared_experts * intermediate_size
            self.shared_experts = MLP(hidden_size, width, recipe=recipe, **factory)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """x: [..., hidden_size]. routing: of its tokens, if `gate` gave it already, as a loss on it needs.

        Returns the shape and dtype of x.
        """
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights, _, counts = routing or self.gate(tokens)
        y = self.experts(tokens, experts, weights, counts).view(x.shape)
        return y if self.shared_experts is None else y + self.shared_experts(x)
