"""DeepSeekMoE against loops over tokens in float64; the gate, its bias and its losses."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import SMALL
from slow_model import assert_close, assert_same_gradients, slow_moe, slow_routing, wide

from dsv3_kernels.model.model import moe_of as build_moe
from dsv3_kernels.nn import BF16, Routing, sequence_balance_loss, set_recipe
from dsv3_kernels.reference import choose_experts

pytestmark = pytest.mark.usefixtures("seed")


def moe_of(config=SMALL):
    moe = build_moe(config)
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
    y = moe(x)
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
    y = moe(x)
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
    got = sequence_balance_loss(Routing(chosen, torch.empty(0), scores, torch.empty(0)), batch)
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
    loss = sequence_balance_loss(Routing(chosen, torch.empty(0), torch.full((4, 8), 0.3), torch.empty(0)), 1)
    assert float(loss) == pytest.approx(1.0)
