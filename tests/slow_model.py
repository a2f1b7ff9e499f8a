"""The model in float64, token by token, head by head, expert by expert."""

import math

import torch


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
