"""Multi-head latent attention (section 2.1.1 of the DeepSeek-V3 report).

Two forms of one function. The training form makes keys and values of every head from the latent. The
absorbed form, for decoding, never does: the key's up-projection moves into the query and the value's behind
the softmax, so that all heads attend to the cached latent itself, one row a token.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_kernels.model.config import ModelConfig
from dsv3_kernels.model.rope import rotate
from dsv3_kernels.nn import FP8, Fp8Linear
from dsv3_kernels.nn.recompute import keep_attention, made_of_kept

LATENT_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps is, as in the released model


@dataclass
class LatentCache:
    """What decoding keeps of the tokens before: [layers, B, capacity, kv_lora_rank + qk_rope_head_dim].

    A row holds the normed latent and the rotated key. length: positions in use; setting it back forgets.
    """

    rows: Tensor
    length: int = 0

    def layer(self, index: int) -> Tensor:
        return self.rows[index]


class MultiHeadLatentAttention(nn.Module):
    """Causal attention whose queries, and keys with values, each pass through a low-rank latent.

    Only the rotary part of the key (one head, shared by all) bypasses the latent: that is the decoupled RoPE.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recipe = FP8
        self.heads = config.num_attention_heads
        self.nope_dim, self.rope_dim, self.v_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5
        if config.rope_scaling is not None:
            self.scale *= config.rope_scaling.softmax_scale
        self.latents = [config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim]
        # Both down-projections and the rotary key read the same input: one GEMM.
        self.qkv_a_proj = Fp8Linear(config.hidden_size, sum(self.latents))
        self.q_a_norm = nn.RMSNorm(config.q_lora_rank, eps=LATENT_EPS)
        self.q_b_proj = Fp8Linear(config.q_lora_rank, self.heads * (self.nope_dim + self.rope_dim))
        self.kv_a_norm = nn.RMSNorm(config.kv_lora_rank, eps=LATENT_EPS)
        self.kv_b_proj = Fp8Linear(config.kv_lora_rank, self.heads * (self.nope_dim + self.v_dim))
        self.o_proj = Fp8Linear(self.heads * self.v_dim, config.hidden_size, after_attention=True)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """x: [B, S, hidden]; cos, sin: [S, rope_dim / 2]. Returns [B, S, hidden].

        cache: one layer of a LatentCache. Rows start to start + S are written, and all before attended to.
        """
        latents = self.qkv_a_proj(x)
        rows = partial(_rows, dtype=latents.dtype)
        if cache is None and "up_projections" in self.recipe.recompute and torch.is_grad_enabled():
            y = made_of_kept(rows, keep_attention(self._attend, latents, cos, sin))
        else:
            y = rows(self._attend(latents, cos, sin, cache, start))
        return self.o_proj(y)

    def _attend(
        self, latents: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """latents: [B, S, sum of their widths]. Returns [B, heads, S, v_dim]."""
        q_latent, kv_latent, k_rope = latents.split(self.latents, dim=-1)
        q = self.q_b_proj(self.q_a_norm(q_latent)).unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
        q_rope = rotate(q_rope, cos, sin)
        kv_latent = self.kv_a_norm(kv_latent)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin)
        if cache is not None:
            end = start + latents.shape[1]
            cache[:, start:end] = torch.cat((kv_latent, k_rope.squeeze(2)), dim=-1)
        if cache is None or start == 0:
            return self._expanded(q_nope, q_rope, kv_latent, k_rope)
        return self._absorbed(q_nope, q_rope, cache[:, :end])

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, kv_latent: Tensor, k_rope: Tensor) -> Tensor:
        """Of a sequence from its first token on. Returns [B, heads, S, v_dim]."""
        kv = self.kv_b_proj(kv_latent).unflatten(-1, (self.heads, -1))
        k_nope, v = kv.split([self.nope_dim, self.v_dim], dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.heads, -1)), dim=-1)
        q, k, v = (_wide(t).transpose(1, 2) for t in (q, k, v))
        narrower = q.shape[-1] - v.shape[-1]
        if narrower > 0 and v.device.type == "cpu":  # else the CPU would keep every query's softmax
            v = F.pad(v, (0, narrower))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return y[..., : self.v_dim]

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor) -> Tensor:
        """The last S positions of the cached rows [B, T, rank + rope_dim]. Returns [B, heads, S, v_dim]."""
        up_k, up_v = _wide(self.kv_b_proj.dequantized_weight().unflatten(0, (self.heads, -1))).split(
            [self.nope_dim, self.v_dim], dim=1
        )
        q_latent = torch.einsum("bshd,hdr->bhsr", _wide(q_nope), up_k)
        q = torch.cat((q_latent, _wide(q_rope).transpose(1, 2)), dim=-1)
        keys = _wide(rows).unsqueeze(1).expand(-1, self.heads, -1, -1)
        length, new = rows.shape[1], q_nope.shape[1]
        seen = torch.ones(new, length, dtype=torch.bool, device=rows.device).tril(length - new)
        latent = F.scaled_dot_product_attention(
            q, keys, keys[..., : up_v.shape[-1]], attn_mask=seen, scale=self.scale
        )
        return torch.einsum("bhsr,hvr->bhsv", latent, up_v)


def _rows(y: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, heads, S, v_dim] to [B, S, heads · v_dim]."""
    return y.transpose(1, 2).to(dtype).flatten(2)


def _wide(x: Tensor) -> Tensor:
    """FP32 on CPUs, where BF16 is slower."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.device.type == "cpu" else x
