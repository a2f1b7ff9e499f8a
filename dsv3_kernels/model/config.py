"""The sizes of a DeepSeek-V3, under the names of its published config.json, and the presets."""

from dataclasses import dataclass

from dsv3_kernels.model.rope import Yarn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of the model; the defaults are those of DeepSeek-V3 as it is pre-trained.

    As released it is stretched to 163,840 positions: `PRESETS["v3"]`.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    """How many multi-token-prediction modules; module k predicts the token k + 1 places ahead."""
    mtp_post_norm: bool = True
    """Whether an MTP module sees the state before it after that one's final norm (as released) or before."""
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006

    def __post_init__(self) -> None:
        optional = {"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"}
        for name, value in vars(self).items():
            low = 0 if name in optional else 1
            if type(value) is int and value < low:
                raise ValueError(f"ModelConfig: {name} is {value}, expected at least {low}")
            if type(value) is float and not 0 < value < float("inf"):
                raise ValueError(f"ModelConfig: {name} is {value}, expected a finite number above 0")
        self._require(
            self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number (pairs are rotated)"
        )
        self._require(
            self.n_routed_experts % self.n_group == 0,
            "n_group",
            f"a divisor of {self.n_routed_experts} experts",
        )
        self._require(self.topk_group <= self.n_group, "topk_group", f"at most n_group = {self.n_group}")
        per_token, groups = self.num_experts_per_tok, self.topk_group
        self._require(
            per_token % groups == 0, "num_experts_per_tok", f"a multiple of topk_group = {self.topk_group}"
        )
        group_size = self.n_routed_experts // self.n_group
        self._require(
            per_token <= groups * group_size,
            "num_experts_per_tok",
            f"at most topk_group x experts in a group = {groups} x {group_size} = {groups * group_size}",
        )

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"ModelConfig: {name} is {getattr(self, name)}, expected {expected}")


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=128,
        kv_lora_rank=96,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
        max_position_embeddings=2048,
        initializer_range=0.02,
    ),
    "mini": ModelConfig(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=2816,
        moe_intermediate_size=512,
        num_hidden_layers=12,
        first_k_dense_replace=1,
        num_attention_heads=16,
        q_lora_rank=384,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=24,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
        max_position_embeddings=4096,
        initializer_range=0.02,
    ),
    "v3": ModelConfig(
        max_position_embeddings=163840,
        rope_scaling=Yarn(factor=40, original_max_position_embeddings=4096, mscale_all_dim=1.0),
    ),
}
