"""Gradients through dispatch and combine: exact where arithmetic is; against a one-process MoE in float64."""

import dataclasses

import pytest
import ranks
import torch
from fp8_helpers import fresh_generator
from torch import nn

from dsv3_kernels import dequantize, emulator, ep, quantize_1x128
from dsv3_kernels.model import PRESETS, DeepSeekV3
from dsv3_kernels.model.model import moe_of as build_moe
from dsv3_kernels.nn import BF16, FP8, Experts, Fp8Recipe, MoECombine, MoEDispatch, set_recipe
from dsv3_kernels.nn.mlp import swiglu

HIDDEN, EXPERTS, TOPK, TOKENS = 64, 8, 3, 20


def whole(gen, *shape, low=-4, high=5):
    """Small integers: every sum and product below is exact in BF16."""
    return torch.randint(low, high, shape, generator=gen).float()


def draw(seed, size):
    """For each rank: x, topk_idx, topk_weights, the output's gradient; and a factor an expert."""
    gen = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(size):
        idx = torch.stack([torch.randperm(EXPERTS, generator=gen)[:TOPK] for _ in range(TOKENS)])
        idx[torch.rand(idx.shape, generator=gen) < 0.2] = -1
        weights = 2.0 ** whole(gen, TOKENS, TOPK, low=-1, high=2)
        x, grad = (whole(gen, TOKENS, HIDDEN, low=-2, high=3) for _ in range(2))
        parts.append((x, idx, weights, grad))
    return parts, 2.0 ** whole(gen, EXPERTS, low=-1, high=2)


def on_the_kernels(size, seed, program, *arguments):
    """What ranks.run gives, of emulated ranks."""
    cluster = emulator.VirtualCluster(1, size, seed, num_sms=20)
    return cluster.run(lambda rank, group: program(rank, size, seed, *arguments, group=group))


def scaling_experts(rank, size, seed, recipe, padded, group=None):
    """Experts that multiply: output and gradients of this rank."""
    parts, factors = draw(seed, size)
    x, idx, weights, grad = parts[rank]
    x, weights = x.requires_grad_(), weights.requires_grad_()
    buffer = ep.Buffer(group, EXPERTS, HIDDEN, TOKENS, TOPK, timeout=60)
    mine = factors[rank * buffer.local_experts : (rank + 1) * buffer.local_experts].requires_grad_()
    dispatch = MoEDispatch(buffer, recipe=recipe, max_recv_tokens=size * TOKENS * TOPK if padded else None)
    combine = MoECombine(buffer, recipe=recipe)
    got = dispatch(x, idx, weights)
    factor = torch.cat([mine, torch.ones(1)])[got.topk_idx]  # -1 takes the one
    y = combine(got.x * factor.unsqueeze(1), got.handle, got.topk_weights)
    y.backward(grad)
    return [y.detach(), x.grad, weights.grad, mine.grad]


@pytest.mark.parametrize(
    ("size", "padded", "kernels"),
    [(1, False, False), (1, True, False), (4, False, False), (2, False, True), (4, True, True)],
)
@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_exact_gradients(size, padded, kernels, recipe, tmp_path):
    """Small integers also pass FP8 unchanged under scales that are powers of two."""
    recipe = BF16 if recipe == "bf16" else Fp8Recipe("fp8", power_of_2_scales=True)
    seed = fresh_generator().initial_seed() % (1 << 30)
    if kernels:
        got = on_the_kernels(size, seed, scaling_experts, recipe, padded)
    elif size == 1:
        got = [scaling_experts(0, 1, seed, recipe, padded)]
    else:
        got = ranks.run(tmp_path / "ranks", size, scaling_experts, seed, recipe, padded)
    parts, factors = draw(seed, size)
    factors = factors.double().requires_grad_()
    for rank, (x, idx, weights, grad) in enumerate(parts):
        x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
        scale = (weights * torch.cat([factors, torch.zeros(1)])[idx]).sum(1)
        y = x * scale.unsqueeze(1)
        y.backward(grad.double())
        for mine, expected in zip(got[rank][:3], (y, x.grad, weights.grad), strict=True):
            assert torch.equal(mine.double(), expected.detach())
    assert torch.equal(torch.cat([g[3] for g in got]).double(), factors.grad)


def test_gradients_travel_in_fp8_where_the_recipe_says_so():
    """Against quantising and dequantising by hand; one token an expert keeps sums out of it."""
    gen = fresh_generator()
    buffer = ep.Buffer(None, 1, HIDDEN, TOKENS, 1)
    x, grad = (torch.randn(TOKENS, HIDDEN, generator=gen).bfloat16() for _ in range(2))
    for recipe in (FP8, BF16, Fp8Recipe(retiled_power_of_2_scales=False)):

        def lossy(t, recipe=recipe):
            if recipe.precision == "bf16":
                return t.float()
            return dequantize(quantize_1x128(t, power_of_2_scales=recipe.retiled_power_of_2))

        rows, weights = x.clone().requires_grad_(), torch.full((TOKENS, 1), 0.5, requires_grad=True)
        got = MoEDispatch(buffer, recipe=recipe)(rows, torch.zeros(TOKENS, 1, dtype=torch.int64), weights)
        assert got.x.dtype == torch.bfloat16 and torch.equal(got.x, lossy(x).bfloat16())
        got.x.retain_grad()
        MoECombine(buffer, recipe=recipe)(got.x, got.handle, got.topk_weights).backward(grad)
        assert torch.equal(got.x.grad, (lossy(grad) * 0.5).bfloat16())
        assert torch.equal(rows.grad, got.x.grad)
        expected = (lossy(grad) * got.x.detach().float()).sum(1, keepdim=True)
        assert torch.equal(weights.grad, expected)


CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    hidden_size=HIDDEN,
    moe_intermediate_size=48,
    n_routed_experts=EXPERTS,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    initializer_range=0.2,
)


def routed_in_float64(moe, x):
    """Every expert on every token, with weight 0 where it was not chosen."""
    routing = moe.gate(x)
    y = torch.zeros_like(x)
    for expert in range(EXPERTS):
        weight = (routing.weights * (routing.experts == expert)).sum(1, keepdim=True)
        hidden = swiglu(x @ moe.experts.gate_up_proj.weight[expert].T)
        y = y + weight * (hidden @ moe.experts.down_proj.weight[expert].T)
    return y


def moe_of(seed, ep_buffer=None):
    """The whole MoE, or a rank's share of the same."""
    torch.manual_seed(seed)
    everything = build_moe(CONFIG)
    with torch.no_grad():
        for parameter in everything.parameters():
            parameter.normal_(0.0, 0.2)
    set_recipe(everything, BF16)
    if ep_buffer is None:
        return everything
    moe = build_moe(CONFIG, ep_buffer)
    set_recipe(moe, BF16)
    state, low = everything.state_dict(), moe.experts.first_expert
    for name in state:
        if name.startswith("experts."):
            state[name] = state[name][low : low + ep_buffer.local_experts]
    moe.load_state_dict(state)
    return moe


def tokens_of(seed, rank):
    gen = torch.Generator().manual_seed(seed * 8 + rank)
    count = 0 if rank == 1 else 18
    return (torch.randn(count, HIDDEN, generator=gen).bfloat16().float() for _ in range(2))


def routed(moe, x):
    """What the routed experts add; the loss of balance has no meaning for a rank without tokens."""
    routing = moe.gate(x)
    return moe.experts(x, routing.experts, routing.weights)


def parallel_moe(rank, size, seed, group=None):
    node = 2 if group is None else size
    buffer = ep.Buffer(group, EXPERTS, HIDDEN, 18, CONFIG.num_experts_per_tok, gpus_per_node=node, timeout=60)
    moe = moe_of(seed, buffer)
    x, grad = tokens_of(seed, rank)
    y = routed(moe, x.requires_grad_())
    y.backward(grad)
    return y.detach(), x.grad, {name: p.grad for name, p in moe.named_parameters() if name in ROUTED}


ROUTED = ("gate.weight", "experts.gate_up_proj.weight", "experts.down_proj.weight")


@pytest.mark.parametrize("kernels", [False, True], ids=["portable", "kernels"])
def test_moe_against_one_process_in_float64(kernels, tmp_path):
    seed = fresh_generator().initial_seed() % (1 << 30)
    if kernels:
        got = on_the_kernels(4, seed, parallel_moe)
    else:
        got = ranks.run(tmp_path / "ranks", 4, parallel_moe, seed)
    moe = moe_of(seed).double()
    for rank, (y, dx, _) in enumerate(got):
        x, grad = tokens_of(seed, rank)
        x = x.double().requires_grad_()
        expected = routed_in_float64(moe, x)
        expected.backward(grad.double())
        assert_close(y, expected)
        assert_close(dx, x.grad)
    for name in ROUTED:
        parameter = moe.get_parameter(name)
        of_ranks = [grads[name] for _, _, grads in got]
        mine = torch.cat(of_ranks) if name.startswith("experts.") else torch.stack(of_ranks).sum(0)
        assert_close(mine, parameter.grad)


def assert_close(got, expected):
    """BF16 on the wire, twice: 2^-9 of a value each. Where terms cancel, the value is not the measure."""
    assert got.shape == expected.shape
    error, expected = got.double() - expected.detach(), expected.detach()
    assert error.norm() <= 2.0**-7 * expected.norm()
    assert error.abs().max() <= 2.0**-5 * expected.abs().max() if error.numel() else True


def train_a_step(rank, size, seed):
    """A whole model, expert-parallel: its loss and the norm of its gradient."""
    buffer = ep.Buffer(None, EXPERTS, HIDDEN, 32, CONFIG.num_experts_per_tok, timeout=60)
    losses = {}
    for name, recipe in {"bf16": BF16, "fp8": FP8}.items():
        model = DeepSeekV3(CONFIG, recipe, buffer)
        model.initialize(seed)
        window = torch.randint(256, (2, 18), generator=torch.Generator().manual_seed(seed + rank))
        loss = model.losses(window).main
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())
        losses[name] = loss.item()
    return losses


def test_a_model_has_the_same_loss_on_any_number_of_ranks(tmp_path):
    seed = fresh_generator().initial_seed() % (1 << 20)
    got = ranks.run(tmp_path / "ranks", 2, train_a_step, seed)
    for rank, losses in enumerate(got):
        for name, recipe in {"bf16": BF16, "fp8": FP8}.items():
            model = DeepSeekV3(CONFIG, recipe)
            model.initialize(seed)
            window = torch.randint(256, (2, 18), generator=torch.Generator().manual_seed(seed + rank))
            expected = model.losses(window).main.item()
            assert losses[name] == pytest.approx(expected, rel=2e-3 if name == "bf16" else 2e-2)


def test_experts_refuse_a_buffer_of_another_size():
    buffer = ep.Buffer(None, EXPERTS, HIDDEN, 4, 2)
    with pytest.raises(ValueError, match=r"ep_buffer has num_experts = 8, expected 4"):
        Experts(4, HIDDEN, 32, buffer)


def test_set_recipe_reaches_the_all_to_all():
    model = nn.Sequential(Experts(EXPERTS, HIDDEN, 32, ep.Buffer(None, EXPERTS, HIDDEN, 4, 2)))
    set_recipe(model, BF16)
    assert model[0].send.recipe is BF16 and model[0].collect.recipe is BF16
