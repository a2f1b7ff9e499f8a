"""The model against slow implementations that loop over tokens, heads and experts in float64."""

import dataclasses

import pytest
import torch
from model_helpers import SMALL, model_of
from slow_model import assert_close, assert_same_gradients, slow_attention, slow_losses, wide

from dsv3_kernels.model import PRESETS, DeepSeekV3, count_parameters
from dsv3_kernels.model.attention import MultiHeadLatentAttention
from dsv3_kernels.model.rope import rope_table
from dsv3_kernels.nn import BF16, FP8, Fp8Linear, GroupedFp8Linear, set_recipe

pytestmark = pytest.mark.usefixtures("seed")


def test_attention_against_float64():
    attention = MultiHeadLatentAttention(SMALL)
    set_recipe(attention, BF16)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    x = torch.randn(2, 9, 64, requires_grad=True)
    y = attention(x, *rope_table(torch.arange(9), 16, SMALL.rope_theta))
    dy = torch.randn_like(y)
    y.backward(dy)
    reference, x64 = wide(attention), x.detach().double().requires_grad_()
    y64 = torch.stack([slow_attention(row, reference, SMALL) for row in x64])
    assert_close(y, y64)
    y64.backward(dy.double())
    assert_close(x.grad, x64.grad)
    assert_same_gradients(attention, reference)


@pytest.mark.parametrize("post_norm", [True, False])
def test_whole_model_against_float64(post_norm):
    model = model_of(dataclasses.replace(SMALL, mtp_post_norm=post_norm))
    window = torch.randint(40, (9,))
    losses = model.losses(window[None])
    (losses.main + 0.3 * losses.mtp).backward()
    main, mtp, logits, reference = slow_losses(model, window)
    assert_close(losses.main, main)
    assert_close(losses.mtp, mtp)
    assert_close(model(window[None, :7])[0], logits)
    assert_close(model.next_token_loss(window[None, :8]), main)
    (main + 0.3 * mtp).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, reference[name].grad, scale=reference[name].grad.abs().max() + 1e-3)


def test_mtp_shift():
    """The window's last token is a target of the MTP module only; the one before also ends its input."""
    model = model_of()
    window = torch.randint(40, (1, 12))
    other = window.clone()
    other[0, -1] = (window[0, -1] + 1) % 40
    a, b = model.losses(window), model.losses(other)
    assert torch.equal(a.main, b.main)
    assert not torch.equal(a.mtp, b.mtp)
    other = window.clone()
    other[0, -2] = (window[0, -2] + 1) % 40  # the main model's last target, and the MTP module's last input
    b = model.losses(other)
    assert not torch.equal(a.main, b.main)
    assert not torch.equal(a.mtp, b.mtp)


def test_two_mtp_modules_predict_two_and_three_ahead():
    model = model_of(dataclasses.replace(SMALL, num_nextn_predict_layers=2))
    window = torch.randint(40, (2, 13))
    losses = model.losses(window)
    one = dataclasses.replace(SMALL, num_nextn_predict_layers=1)
    first = DeepSeekV3(one, BF16)
    first.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp.1")})
    alone = first.losses(window[:, :-1])
    assert_close(losses.main, alone.main.double())
    # The mean of both depths, of which the first is as before and the second sees a third token ahead.
    changed = window.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 40
    second = 2 * losses.mtp - alone.mtp
    assert second > 0
    assert torch.equal(first.losses(changed[:, :-1]).mtp, alone.mtp)
    assert not torch.equal(model.losses(changed).mtp, losses.mtp)


def test_causal():
    model = model_of().eval()
    tokens = torch.randint(40, (1, 16))
    logits = model(tokens)
    for t in (1, 7, 15):
        other = tokens.clone()
        other[0, t] = (tokens[0, t] + 1) % 40
        change = (model(other) - logits).abs().amax(-1)[0]
        assert change[:t].max() < 1e-5
        assert change[t] > 1e-3


def mtp_logits(model, tokens, ahead):
    cos, sin = model.rope(0, tokens.shape[1])
    hidden, _ = model._trunk(tokens, cos, sin)
    _, normed, _ = model.mtp[0](model.embedding(ahead), model.norm(hidden), cos, sin)
    return model.head(normed)


def test_mtp_is_causal():
    """The MTP module at position i sees tokens 0 .. i + 1."""
    model = model_of().eval()
    window = torch.randint(40, (1, 17))
    logits = mtp_logits(model, window[:, :-1], window[:, 1:])
    for t in (2, 8, 15):
        other = window.clone()
        other[0, t] = (window[0, t] + 1) % 40
        change = (mtp_logits(model, other[:, :-1], other[:, 1:]) - logits).abs().amax(-1)[0]
        assert change[: t - 1].max() < 1e-5
        assert change[t - 1] > 1e-3


def test_mtp_shares_embedding_and_head():
    model = model_of()
    assert not [
        name
        for name, _ in model.mtp.named_parameters()
        if "head" in name or name.endswith("embedding.weight")
    ]
    model.losses(torch.randint(40, (1, 9))).mtp.backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert model.embedding.weight.grad.abs().sum() > 0


def test_what_computes_in_fp8():
    model = DeepSeekV3(SMALL)
    quantised = {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, (Fp8Linear, GroupedFp8Linear)) and module.recipe == FP8
    }
    projections = {"qkv_a_proj", "q_b_proj", "kv_b_proj", "o_proj", "gate_up_proj", "down_proj", "eh_proj"}
    assert quantised == projections
    plain = {
        name for name, p in model.named_parameters() if p.dim() > 1 and name.split(".")[-2] not in projections
    }
    gates = {"blocks.1.mlp.gate.weight", "mtp.0.block.mlp.gate.weight"}
    assert plain == {"embedding.weight", "head.weight"} | gates


def test_fp8_is_near_bf16_at_the_same_weights():
    config = dataclasses.replace(SMALL, hidden_size=256, q_lora_rank=128, initializer_range=0.05)
    model = model_of(config, FP8, torch.bfloat16)
    window = torch.randint(40, (4, 30))
    gradients, losses = [], []
    for recipe in (FP8, BF16):
        set_recipe(model, recipe)
        model.zero_grad()
        result = model.losses(window)
        (result.main + 0.3 * result.mtp).backward()
        losses.append(result.main.item())
        gradients.append({name: p.grad.double().flatten() for name, p in model.named_parameters()})
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    for name, a in gradients[0].items():
        if name.endswith("proj.weight"):
            assert torch.cosine_similarity(a, gradients[1][name], dim=0) > 0.9, name


def test_gate_bias_stays_fp32():
    model = DeepSeekV3(SMALL).bfloat16()
    gate = model.blocks[1].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.bias.dtype == gate.load.dtype == torch.float32
    assert gate.bias.sum() == 0
    for _ in range(1000):
        gate.load[0] = 1
        gate.balance(1e-3)
    assert gate.bias[0] == pytest.approx(-1.0, abs=1e-4)
    other = DeepSeekV3(SMALL).bfloat16()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.blocks[1].mlp.gate.bias, gate.bias)


def test_initialisation_is_a_function_of_the_seed():
    a, b, c = (DeepSeekV3(SMALL) for _ in range(3))
    a.initialize(3)
    b.initialize(3)
    c.initialize(4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, c.head.weight)
    assert a.embedding.weight.std().item() == pytest.approx(SMALL.initializer_range, rel=0.1)


def test_parameter_counts_of_deepseek_v3():
    count = count_parameters(PRESETS["v3"])
    assert round(count.total / 1e9, 1) == 671.0
    assert 36.5e9 < count.active < 37.6e9
    assert 11.5e9 < count.mtp < 11.7e9
    assert count.total == 671_026_404_352  # the released checkpoint's own count without its MTP module


def test_tiny_counts_agree_with_a_real_model():
    config = PRESETS["tiny"]
    model = DeepSeekV3(config)
    count = count_parameters(config)
    assert count.total + count.mtp == sum(p.numel() for p in model.parameters())
    experts = 2 * 3 * config.hidden_size * config.moe_intermediate_size * 6  # 6 idle ones in 2 layers
    assert count.total - count.active == experts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, "n_group is 3, expected a divisor of 8"),
        ({"topk_group": 5}, "topk_group is 5, expected at most n_group = 4"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok is 3, expected a multiple of topk_group = 2"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, expected at most .* 2 x 2 = 4"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, expected an even number"),
        ({"hidden_size": 0}, "hidden_size is 0, expected at least 1"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1, expected at least 0"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match=r"the sequence has 33 positions, expected at most .* = 32"):
        DeepSeekV3(SMALL)(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes", [{"n_shared_experts": 0}, {"first_k_dense_replace": 2}, {"num_nextn_predict_layers": 0}]
)
def test_optional_parts(changes):
    config = dataclasses.replace(SMALL, **changes)
    losses = model_of(config).losses(torch.randint(40, (2, 2 + config.num_nextn_predict_layers + 5)))
    assert losses.main.isfinite()
    assert (losses.mtp == 0) == (config.num_nextn_predict_layers == 0)
