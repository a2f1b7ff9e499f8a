"""Multi-head latent attention (section 2.1.1 of the DeepSeek-V3 report), in the form used for training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_kernels.model.config import ModelConfig
from dsv3_kernels.nn import Fp8Linear


def rope_angles(length: int, dim: int, theta: float, device: torch.device) -> Tensor:
    """Rotation angles of the positions 0 .. length - 1: FP32 [length, dim / 2]."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    return torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the interleaved pairs (x[2i], x[2i + 1]) of the last dimension by the position's angles.

    x: [B, S, heads, dim]; cos, sin: [S, dim / 2]. Returns x's shape and dtype; computed in FP32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class MultiHeadLatentAttention(nn.Module):
    """Causal attention whose queries, and keys with values, each pass through a low-rank latent.

    Only the rotary part of the key (one head, shared by all) bypasses the latent: that is the decoupled RoPE.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope_dim, self.rope_dim, self.v_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.latents = [config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim]
        # Both down-projections and the rotary key read the same input: one GEMM.
        self.qkv_a_proj = Fp8Linear(config.hidden_size, sum(self.latents))
        self.q_a_norm = nn.RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
        self.q_b_proj = Fp8Linear(config.q_lora_rank, self.heads * (self.nope_dim + self.rope_dim))
        self.kv_a_norm = nn.RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
        self.kv_b_proj = Fp8Linear(config.kv_lora_rank, self.heads * (self.nope_dim + self.v_dim))
        self.o_proj = Fp8Linear(self.heads * self.v_dim, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, S, hidden]; cos, sin: [S, rope_dim / 2]. Returns [B, S, hidden]."""
        q_latent, kv_latent, k_rope = self.qkv_a_proj(x).split(self.latents, dim=-1)
        q = self.q_b_proj(self.q_a_norm(q_latent)).unflatten(-1, (self.heads, -1))
        kv = self.kv_b_proj(self.kv_a_norm(kv_latent)).unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
        k_nope, v = kv.split([self.nope_dim, self.v_dim], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, self.heads, -1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        return self.o_proj(_causal_attention(q, k, v).flatten(2))


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ / sqrt(d))·v over [B, S, heads, d]. FP32 on CPUs: BF16 is slower there."""
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32) if q.device.type == "cpu" else dtype
    q, k, v = (t.to(wide).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).to(dtype)
