"""DeepSeek-V3: embedding, transformer blocks, head, and the multi-token-prediction modules beside them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_kernels.ep import Buffer
from dsv3_kernels.model.attention import LatentCache, MultiHeadLatentAttention
from dsv3_kernels.model.config import ModelConfig
from dsv3_kernels.model.initial import fill_normal
from dsv3_kernels.model.rope import rope_table
from dsv3_kernels.nn import (
    FP8,
    MLP,
    Dispatched,
    Experts,
    Fp8Linear,
    Fp8Recipe,
    Gate,
    Linear,
    MoE,
    Routing,
    sequence_balance_loss,
    set_recipe,
)
from dsv3_kernels.nn.recompute import keep_inputs, remade, then


def moe_of(config: ModelConfig, ep_buffer: Buffer | None = None) -> MoE:
    moe = MoE(
        config.hidden_size,
        config.moe_intermediate_size,
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        shared_experts=config.n_shared_experts,
        n_group=config.n_group,
        topk_group=config.topk_group,
        scaling=config.routed_scaling_factor,
        ep_buffer=ep_buffer,
    )
    nn.init.normal_(moe.gate.weight, std=config.initializer_range)
    return moe


@dataclass(frozen=True, eq=False)
class FeedForward:
    """A block's feed-forward layer under way: what its next phase needs. Of a dense layer only `x`, `normed`
    and `y` are there."""

    x: Tensor
    """[B, S, hidden], the block's state before it, to which its output is added."""
    normed: Tensor
    """[B, S, hidden], the layer's input."""
    routing: Routing | None = None
    sent: Dispatched | None = None
    y: Tensor | None = None
    """What shared experts, or the dense layer, add, [B, S, hidden]."""
    rows: Tensor | None = None
    """What this rank's experts made, [R, hidden]."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    forward is attend, dispatch, compute, combine: four calls for schedules that overlap them with other work.
    """

    def __init__(self, config: ModelConfig, dense: bool, ep_buffer: Buffer | None = None) -> None:
        super().__init__()
        self.recipe = FP8
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = MultiHeadLatentAttention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: MLP | MoE
        if dense:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = moe_of(config, ep_buffer)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """x: [B, S, hidden]. Returns ([B, S, hidden], the balance loss or None if dense)."""
        x = self.attend(x, cos, sin, cache, start)
        return self.combine(self.compute(self.dispatch(x)))

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """x: [B, S, hidden]. Returns x + attention(norm(x))."""
        return x + self.attention(self._normed(self.attention_norm, x), cos, sin, cache, start)

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return remade(norm, x) if "norms" in self.recipe.recompute else norm(x)

    def dispatch(self, x: Tensor) -> FeedForward:
        """x: what attend returned. Routes its tokens and sends them to their experts."""
        normed = self._normed(self.mlp_norm, x)
        if isinstance(self.mlp, MLP):
            return FeedForward(x, normed)
        tokens = then(_tokens, normed)
        routing = self.mlp.gate(tokens)
        sent = self.mlp.experts.dispatch(tokens, routing.experts, routing.weights, routing.counts)
        return FeedForward(x, normed, routing, sent)

    def compute(self, state: FeedForward) -> FeedForward:
        """This rank's experts and the shared ones; or the dense layer."""
        if isinstance(self.mlp, MLP):
            return replace(state, y=self.mlp(state.normed))
        assert state.sent is not None
        shared = self.mlp.shared_experts
        y = None if shared is None else shared(state.normed)
        return replace(state, y=y, rows=self.mlp.experts.compute(state.sent))

    def combine(self, state: FeedForward) -> tuple[Tensor, Tensor | None]:
        """Brings the experts' outputs home. Returns as forward."""
        x, y = state.x, state.y
        if isinstance(self.mlp, MLP):
            assert y is not None
            return x + y, None
        assert state.sent is not None and state.rows is not None and state.routing is not None
        routed = self.mlp.experts.combine(state.rows, state.sent).view_as(x)
        y = routed if y is None else routed + y
        return x + y, sequence_balance_loss(state.routing, x.shape[0])


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


class MTPModule(nn.Module):
    """Predicts one token further than the state it is given (section 2.2); head and embedding are shared."""

    def __init__(self, config: ModelConfig, ep_buffer: Buffer | None = None) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.recipe = FP8
        self.embedding_norm = nn.RMSNorm(hidden, eps=eps)
        self.hidden_norm = nn.RMSNorm(hidden, eps=eps)
        self.eh_proj = Fp8Linear(2 * hidden, hidden)
        self.block = Block(config, False, ep_buffer)
        self.norm = nn.RMSNorm(hidden, eps=eps)

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden: [B, S, hidden], the state at each position; embedded: the token after it.

        Returns the new state, the same after the module's norm, for the head, and the balance loss.
        """
        recompute = "norms" in self.recipe.recompute
        joined = remade(self._join, embedded, hidden) if recompute else self._join(embedded, hidden)
        hidden, balance = self.block(self.eh_proj(joined), cos, sin, cache, start)
        return hidden, self.norm(hidden), balance

    def _join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), dim=-1)


@dataclass
class Losses:
    """Means over tokens, in nats; balance is the mean over the MoE layers."""

    main: Tensor
    mtp: Tensor
    balance: Tensor


class DeepSeekV3(nn.Module):
    """The reference model. Every linear layer but the head and the gates computes as the recipe says.

    With an `ep_buffer` it is expert-parallel: each rank holds its share of the routed experts and a copy of
    all else, and gives its own tokens. A gate counts the load of its own rank's tokens only.
    """

    def __init__(
        self, config: ModelConfig, recipe: Fp8Recipe | None = None, ep_buffer: Buffer | None = None
    ) -> None:
        super().__init__()
        self.config, self.recipe = config, FP8
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, i < config.first_k_dense_replace, ep_buffer)
            for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(config, ep_buffer) for _ in range(config.num_nextn_predict_layers))
        if recipe is not None:
            set_recipe(self, recipe)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draws all weights from N(0, initializer_range²), norms one, and expert biases zero.

        A weight is a function of the seed and its name alone, an expert's of its number too: whatever is cut
        off (`train.pipeline.stages.cut`), and however experts are spread, what is left gets the bits that it
        has in one process. So a model too large for one is built on the meta device, cut, given memory
        (`to_empty`), and then initialised.
        """
        std = self.config.initializer_range
        shares = {p: m for m in self.modules() if isinstance(m, Experts) for p in m.parameters()}
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif parameter in shares:
                for number, expert in enumerate(parameter, start=shares[parameter].first_expert):
                    fill_normal(expert, std, seed, name, number)
            else:
                fill_normal(parameter, std, seed, name)
        for gate in self.gates():
            gate.bias.zero_()
            gate.load.zero_()

    def gates(self) -> Iterator[Gate]:
        return (module for module in self.modules() if isinstance(module, Gate))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [B, S]. Returns FP32 logits [B, S, vocab_size] of the next token at each position."""
        cos, sin = self.rope(0, tokens.shape[1])
        hidden, _ = self._trunk(tokens, cos, sin)
        return self.logits(self.norm(hidden))

    def new_cache(self, batch: int, capacity: int) -> LatentCache:
        """For `decode` of `batch` sequences of up to `capacity` positions."""
        return self._new_cache(len(self.blocks), batch, capacity)

    def new_mtp_cache(self, batch: int, capacity: int) -> LatentCache:
        """For `decode_mtp`."""
        return self._new_cache(1, batch, capacity)

    def _new_cache(self, layers: int, batch: int, capacity: int) -> LatentCache:
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        norm = self.norm.weight
        return LatentCache(torch.zeros(layers, batch, capacity, width, dtype=norm.dtype, device=norm.device))

    def decode(self, tokens: Tensor, cache: LatentCache) -> tuple[Tensor, Tensor]:
        """Goes on from the cache by tokens [B, S], which it takes in.

        Returns FP32 logits [B, S, vocab_size] and the state [B, S, hidden] that the first MTP module sees.
        """
        start, cos, sin = self._extend(cache, tokens.shape[1])
        hidden, _ = self._trunk(tokens, cos, sin, cache, start)
        normed = self.norm(hidden)
        return self.logits(normed), normed if self.config.mtp_post_norm else hidden

    def decode_mtp(self, tokens: Tensor, state: Tensor, cache: LatentCache) -> Tensor:
        """The first MTP module's FP32 logits [B, S, vocab_size] of the token after `tokens`.

        tokens: [B, S], each the one after the position whose state [B, S, hidden] `decode` returned.
        """
        start, cos, sin = self._extend(cache, tokens.shape[1])
        module = self.mtp[0]
        _, normed, _ = module(self.embedding(tokens), state, cos, sin, cache.layer(0), start)
        return self.logits(normed)

    def _extend(self, cache: LatentCache, count: int) -> tuple[int, Tensor, Tensor]:
        start, capacity = cache.length, cache.rows.shape[2]
        if start + count > capacity:
            raise ValueError(
                f"DeepSeekV3: the cache holds {start} of {capacity} positions, expected room for {count} "
                "more. Mend: a larger capacity in new_cache"
            )
        cos, sin = self.rope(start, count)
        cache.length = start + count
        return start, cos, sin

    def next_token_loss(self, window: Tensor) -> Tensor:
        """Mean cross-entropy of window[:, 1:] given what stands before; window: int64 [B, S + 1]."""
        return F.cross_entropy(self(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    def losses(self, window: Tensor) -> Losses:
        """Cross-entropy of the next token and of those the MTP modules predict.

        window: int64 [B, S + 1 + D] for D MTP modules: position i < S predicts window[:, i + 1], and module k
        (from 1) predicts window[:, i + 1 + k] having seen window[:, i + k].
        """
        length = window.shape[1] - 1 - len(self.mtp)
        cos, sin = self.rope(0, length)
        hidden, balances = self._trunk(window[:, :length], cos, sin)
        main, mtp, more = self.predictions(hidden, window, cos, sin)
        return Losses(main, mtp, _mean([b for b in balances if b is not None] + more))

    def predictions(
        self, hidden: Tensor, window: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What follows the last block: the main loss, the MTP loss, the balance losses of the MTP modules."""
        length = hidden.shape[1]
        normed = self.norm(hidden)
        main = self._cross_entropy(normed, window[:, 1 : 1 + length])
        mtp: list[Tensor] = []
        balances: list[Tensor] = []
        state = normed if self.config.mtp_post_norm else hidden
        for k, module in enumerate(self.mtp, start=1):
            embedded = self.embedding(window[:, k : k + length])
            hidden, normed, balance = module(embedded, state, cos, sin)
            state = normed if self.config.mtp_post_norm else hidden
            balances.append(balance)
            mtp.append(self._cross_entropy(normed, window[:, k + 1 : k + 1 + length]))
        return main, _mean(mtp), balances

    def _trunk(
        self,
        tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LatentCache | None = None,
        start: int = 0,
    ) -> tuple[Tensor, list[Tensor | None]]:
        hidden = self.embedding(tokens)
        balances: list[Tensor | None] = []
        for i, block in enumerate(self.blocks):
            hidden, balance = block(hidden, cos, sin, cache.layer(i) if cache is not None else None, start)
            balances.append(balance)
        return hidden, balances

    def rope(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions start to start + count, as the blocks take them."""
        config = self.config
        if start + count > config.max_position_embeddings:
            raise ValueError(
                f"DeepSeekV3: the sequence has {start + count} positions, expected at most "
                f"max_position_embeddings = {config.max_position_embeddings}"
            )
        positions = torch.arange(start, start + count, device=next(self.parameters()).device)
        return rope_table(positions, config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)

    def logits(self, normed: Tensor) -> Tensor:
        """Of states after the final norm: FP32 or wider."""
        logits = self.head(normed)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _cross_entropy(self, normed: Tensor, targets: Tensor) -> Tensor:
        def loss(normed: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(normed).flatten(0, 1), targets.flatten())

        return keep_inputs(loss, normed) if "head" in self.recipe.recompute else loss(normed)


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean() if losses else torch.zeros(())


@dataclass(frozen=True)
class ParameterCount:
    """total: the main model; active: those a token passes through; mtp: what the MTP modules add."""

    total: int
    active: int
    mtp: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts on the meta device, so that no memory is needed at any size."""
    with torch.device("meta"):
        model = DeepSeekV3(config)
    mtp = sum(p.numel() for p in model.mtp.parameters())
    total = sum(p.numel() for p in model.parameters()) - mtp
    routed = sum(
        p.numel() for m in model.blocks.modules() if isinstance(m, MoE) for p in m.experts.parameters()
    )
    idle = routed * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    return ParameterCount(total, total - idle, mtp)
