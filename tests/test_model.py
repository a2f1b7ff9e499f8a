"""The model against slow implementations that loop over tokens, heads and experts in float64."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import SMALL, model_of

from dsv3_kernels.model import PRESETS, DeepSeekV3, count_parameters
from dsv3_kernels.model.attention import MultiHeadLatentAttention
from dsv3_kernels.model.moe import MoE, Routing, sequence_balance_loss
from dsv3_kernels.model.rope import rope_table
from dsv3_kernels.nn import BF16, FP8, Fp8Linear, GroupedFp8Linear, set_recipe
from dsv3_kernels.reference import choose_experts


@pytest.fixture(autouse=True)
def seed():
    value = int(torch.randint(1 << 30, ()))
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def wide(module):
    """The parameters in float64, each requiring its own gradient."""
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def rms_norm(x, weight, eps):
    return x * (x.square().mean() + eps) ** -0.5 * weight


def rotated(vector, position, theta):
    """Interleaved RoPE, as a multiplication of complex numbers."""
    pairs = torch.view_as_complex(vector.view(-1, 2))
    angles = torch.tensor(
        [position * theta ** (-2 * i / vector.numel()) for i in range(len(pairs))], dtype=torch.float64
    )
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()


def slow_attention(x, p, config, prefix=""):
    """x: float64 [S, hidden]. One query at a time, one head at a time."""
    eps, theta = config.rms_norm_eps, config.rope_theta
    nope, rope, v_dim, heads = (
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        config.num_attention_heads,
    )
    queries, keys, values = [], [], []
    for position, token in enumerate(x):
        latent = p[prefix + "qkv_a_proj.weight"] @ token
        q_latent, rest = latent[: config.q_lora_rank], latent[config.q_lora_rank :]
        kv_latent, k_rope = rest[: config.kv_lora_rank], rest[config.kv_lora_rank :]
        q = p[prefix + "q_b_proj.weight"] @ rms_norm(q_latent, p[prefix + "q_a_norm.weight"], eps)
        kv = p[prefix + "kv_b_proj.weight"] @ rms_norm(kv_latent, p[prefix + "kv_a_norm.weight"], eps)
        shared_key = rotated(k_rope, position, theta)
        for h in range(heads):
            q_h = q[h * (nope + rope) : (h + 1) * (nope + rope)]
            kv_h = kv[h * (nope + v_dim) : (h + 1) * (nope + v_dim)]
            queries.append(torch.cat([q_h[:nope], rotated(q_h[nope:], position, theta)]))
            keys.append(torch.cat([kv_h[:nope], shared_key]))
            values.append(kv_h[nope:])
    outputs = []
    for i in range(len(x)):
        per_head = []
        for h in range(heads):
            scores = torch.stack([queries[i * heads + h] @ keys[j * heads + h] for j in range(i + 1)])
            weights = (scores / math.sqrt(nope + rope)).softmax(0)
            per_head.append(sum(w * values[j * heads + h] for j, w in enumerate(weights)))
        outputs.append(p[prefix + "o_proj.weight"] @ torch.cat(per_head))
    return torch.stack(outputs)


def silu(x):
    return x / (1 + (-x).exp())


def slow_mlp(token, gate_up, down):
    hidden = gate_up @ token
    half = len(hidden) // 2
    return down @ (silu(hidden[:half]) * hidden[half:])


def slow_routing(scores, bias, config):
    """Experts of one token, and their weights. scores, bias: lists of floats."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = config.n_routed_experts // config.n_group
    in_group = config.num_experts_per_tok // config.topk_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    value = [sum(sorted((biased[e] for e in group), reverse=True)[:in_group]) for group in groups]
    best = sorted(range(config.n_group), key=lambda g: (-value[g], g))[: config.topk_group]
    allowed = [e for g in best for e in groups[g]]
    return sorted(sorted(allowed, key=lambda e: (-biased[e], e))[: config.num_experts_per_tok])


def slow_moe(x, p, bias, config, prefix=""):
    """x: float64 [T, hidden]. Returns the output and the chosen experts."""
    outputs, chosen = [], []
    for token in x:
        scores = (p[prefix + "gate.weight"] @ token).sigmoid()
        experts = slow_routing(scores.tolist(), bias.tolist(), config)
        total = sum(scores[e] for e in experts) + 1e-20
        y = slow_mlp(
            token,
            p[prefix + "shared_experts.gate_up_proj.weight"],
            p[prefix + "shared_experts.down_proj.weight"],
        )
        for e in experts:
            gate_up = p[prefix + "experts.gate_up_proj.weight"][e]
            down = p[prefix + "experts.down_proj.weight"][e]
            y = y + scores[e] / total * config.routed_scaling_factor * slow_mlp(token, gate_up, down)
        outputs.append(y)
        chosen.append(experts)
    return torch.stack(outputs), chosen


def assert_close(got, expected, scale=None):
    expected = expected.detach()
    scale = expected.abs().max() if scale is None else scale
    assert got.shape == expected.shape
    assert (got.detach().double() - expected).abs().max() <= 2e-5 * scale


def assert_same_gradients(module, reference):
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad, reference[name].grad)


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


def moe_of(config=SMALL):
    moe = MoE(config)
    set_recipe(moe, BF16)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0.0, 0.3)
        moe.gate.bias.normal_(0.0, 0.1)
    return moe


@pytest.mark.parametrize(
    "groups",
    [{}, {"n_group": 1, "topk_group": 1}, {"n_group": 2, "topk_group": 2}, {"n_group": 4, "topk_group": 4}],
)
def test_moe_against_float64(groups):
    config = dataclasses.replace(SMALL, **groups)
    moe = moe_of(config)
    x = torch.randn(2, 13, 64, requires_grad=True)
    y, _ = moe(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    reference, x64 = wide(moe), x.detach().double().requires_grad_()
    y64, _ = slow_moe(x64.flatten(0, 1), reference, moe.gate.bias, config)
    y64 = y64.view(2, 13, 64)
    assert_close(y, y64)
    y64.backward(dy.double())
    assert_close(x.grad, x64.grad)
    assert_same_gradients(moe, reference)


def test_no_token_is_dropped_when_all_go_to_the_same_experts():
    moe = moe_of()
    with torch.no_grad():
        moe.gate.bias[[0, 1, 2, 3]] = 10.0
    x = torch.randn(1, 31, 64)
    y, _ = moe(x)
    expected, chosen = slow_moe(x[0].double(), wide(moe), moe.gate.bias, SMALL)
    assert all(experts == [0, 1, 2, 3] for experts in chosen)
    assert_close(y[0], expected)
    assert moe.gate.load.tolist() == [31] * 4 + [0] * 4


def test_load_counts_training_only():
    moe = moe_of()
    x = torch.randn(2, 5, 64)
    moe(x)
    moe(x)
    assert moe.gate.load.sum() == 2 * 10 * SMALL.num_experts_per_tok
    with torch.no_grad():
        moe(x)
    moe.eval()
    moe(x)
    assert moe.gate.load.sum() == 2 * 10 * SMALL.num_experts_per_tok


@st.composite
def routing_cases(draw):
    n_group = draw(st.sampled_from([1, 2, 4, 8]))
    size = draw(st.integers(1, 5))
    topk_group = draw(st.integers(1, n_group))
    in_group = draw(st.integers(1, size))
    tokens = draw(st.integers(0, 5))
    # Few values, so that ties are common.
    row = st.lists(st.integers(-3, 3), min_size=n_group * size, max_size=n_group * size)
    scores = draw(st.lists(row, min_size=tokens, max_size=tokens))
    return n_group, size, topk_group, topk_group * in_group, scores


@settings(max_examples=300, deadline=None)
@given(routing_cases())
def test_node_limited_routing(case):
    n_group, size, topk_group, top_k, scores = case
    experts = n_group * size
    tensor = torch.tensor(scores, dtype=torch.float32).view(-1, experts) / 8
    chosen = choose_experts(tensor, n_group, topk_group, top_k)
    assert chosen.shape == (len(scores), top_k)
    config = dataclasses.replace(
        SMALL, n_routed_experts=experts, n_group=n_group, topk_group=topk_group, num_experts_per_tok=top_k
    )
    for row, row_scores in zip(chosen.tolist(), tensor.tolist(), strict=True):
        assert row == sorted(set(row))
        assert len({e // size for e in row}) <= topk_group
        assert row == slow_routing(row_scores, [0.0] * experts, config)


def test_weights_are_the_unbiased_scores():
    moe = moe_of()
    x = torch.randn(50, 64)
    routing = moe.gate(x)
    scores = (x.double() @ moe.gate.weight.double().T).sigmoid()
    chosen = scores.gather(1, routing.experts)
    assert_close(routing.weights, chosen / chosen.sum(1, keepdim=True) * SMALL.routed_scaling_factor)


def test_bias_drives_a_skewed_load_to_balance():
    moe = moe_of(dataclasses.replace(SMALL, n_group=1, topk_group=1, num_experts_per_tok=2))
    gate = moe.gate
    with torch.no_grad():
        gate.bias.zero_()
        gate.weight.mul_(0.1)
        gate.weight[:, 0] = torch.linspace(
            -1, 1, 8
        )  # against the input's constant first feature: a skewed gate
    worst = []
    for _ in range(400):
        x = torch.randn(1024, 64)
        x[:, 0] = 1.0
        gate(x)
        worst.append(float(gate.load.max() / gate.load.mean()))
        gate.balance(0.003)
        assert gate.load.sum() == 0
    assert worst[0] > 2
    assert sum(worst[-20:]) / 20 < 1.2
    assert gate.bias.requires_grad is False


def test_bias_moves_by_the_sign_of_the_load():
    gate = moe_of().gate
    before = gate.bias.clone()
    gate.load.copy_(torch.tensor([0.0, 8, 4, 4, 4, 4, 5, 3]))
    gate.balance(0.25)
    assert torch.equal(
        gate.bias - before, (before + torch.tensor([0.25, -0.25, 0, 0, 0, 0, -0.25, 0.25])) - before
    )


def test_sequence_balance_loss_against_loops():
    batch, length, experts, top_k = 3, 7, 8, 2
    scores = torch.rand(batch * length, experts, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(experts)[:top_k].sort().values for _ in range(batch * length)])
    got = sequence_balance_loss(Routing(chosen, torch.empty(0), scores), batch)
    expected = 0.0
    for b in range(batch):
        rows = range(b * length, (b + 1) * length)
        for i in range(experts):
            f = experts / (top_k * length) * sum(i in chosen[t].tolist() for t in rows)
            p = sum(float(scores.detach()[t, i] / scores.detach()[t].sum()) for t in rows) / length
            expected += f * p / batch
    assert got.item() == pytest.approx(expected, rel=1e-12)
    got.backward()
    assert scores.grad.abs().sum() > 0


def test_sequence_balance_loss_is_one_when_even():
    chosen = torch.arange(8).view(4, 2)
    loss = sequence_balance_loss(Routing(chosen, torch.empty(0), torch.full((4, 8), 0.3)), 1)
    assert float(loss) == pytest.approx(1.0)


def slow_block(x, p, prefix, bias, config):
    eps = config.rms_norm_eps
    normed = torch.stack([rms_norm(t, p[prefix + "attention_norm.weight"], eps) for t in x])
    x = x + slow_attention(normed, p, config, prefix + "attention.")
    normed = torch.stack([rms_norm(t, p[prefix + "mlp_norm.weight"], eps) for t in x])
    if bias is None:
        gate_up, down = p[prefix + "mlp.gate_up_proj.weight"], p[prefix + "mlp.down_proj.weight"]
        return x + torch.stack([slow_mlp(t, gate_up, down) for t in normed])
    return x + slow_moe(normed, p, bias, config, prefix + "mlp.")[0]


def slow_losses(model, window):
    """Main and MTP loss of one window, token by token; also the logits."""
    config, p = model.config, wide(model)
    length = len(window) - 2
    x = p["embedding.weight"][window[:length]]
    x = slow_block(x, p, "blocks.0.", None, config)
    x = slow_block(x, p, "blocks.1.", model.blocks[1].mlp.gate.bias, config)
    normed = torch.stack([rms_norm(t, p["norm.weight"], config.rms_norm_eps) for t in x])
    logits = normed @ p["head.weight"].T
    main = -sum(logits[i].log_softmax(0)[window[i + 1]] for i in range(length)) / length
    source = normed if config.mtp_post_norm else x
    joined = []
    for i in range(length):
        ahead = p["embedding.weight"][window[i + 1]]
        left = rms_norm(ahead, p["mtp.0.embedding_norm.weight"], config.rms_norm_eps)
        right = rms_norm(source[i], p["mtp.0.hidden_norm.weight"], config.rms_norm_eps)
        joined.append(p["mtp.0.eh_proj.weight"] @ torch.cat([left, right]))
    x = slow_block(torch.stack(joined), p, "mtp.0.block.", model.mtp[0].block.mlp.gate.bias, config)
    normed = torch.stack([rms_norm(t, p["mtp.0.norm.weight"], config.rms_norm_eps) for t in x])
    mtp_logits = normed @ p["head.weight"].T
    mtp = -sum(mtp_logits[i].log_softmax(0)[window[i + 2]] for i in range(length)) / length
    return main, mtp, logits, p


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
