"""Models small enough for exhaustive checks, and two runs of one with the same experts."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch

from dsv3_kernels.gate import route
from dsv3_kernels.model import DeepSeekV3, ModelConfig
from dsv3_kernels.nn import BF16, gate

SMALL = ModelConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.5,
    max_position_embeddings=32,
    initializer_range=0.2,
)

BYTES = dataclasses.replace(
    SMALL,
    vocab_size=256,
    kv_lora_rank=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    max_position_embeddings=64,
    initializer_range=0.02,
)
"""One that trains on bytes."""


def model_of(config=SMALL, recipe=BF16, dtype=torch.float32):
    model = DeepSeekV3(config, recipe)
    model.initialize(int(torch.randint(1 << 30, ())))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)  # norm weights of one would hide a missing multiplication
    return model.to(dtype)


@contextmanager
def recorded_choices():
    """A list, to which every gate adds the experts that it chooses."""
    choices = []

    def record(*arguments, **options):
        choices.append(route(*arguments, **options))
        return choices[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "route", record)
        yield choices


@contextmanager
def told_choices(choices):
    """Every gate takes its experts from the list; what they weigh stays a matter of its own scores."""
    told = iter(choices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "route", lambda *_, **__: next(told))
        yield
    assert next(told, None) is None
