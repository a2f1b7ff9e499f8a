"""nn.MoE in other people's hands; rows that stay FP8; every operand quantised once; phases."""

import copy
from collections import Counter

import pytest
import torch
from op_calls import counting
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsv3_kernels import dequantize, ep, permute_quantize, quantize_1x128
from dsv3_kernels.nn import (
    BF16,
    FP8,
    Fp8Recipe,
    Fp8Rows,
    MoE,
    expert_order,
    permute,
    sequence_balance_loss,
    set_recipe,
    store_fp8_weights,
    unpermute,
)
from dsv3_kernels.reference import choose_experts, routing_weights

HIDDEN, INNER, EXPERTS, TOPK, TOKENS = 144, 128, 6, 3, 41


pytestmark = pytest.mark.usefixtures("seed")


def moe_of(recipe=FP8, dtype=torch.bfloat16, ep_buffer=None, **options):
    options = {"num_experts": EXPERTS, "top_k": TOPK, "shared_experts": 1, **options}
    return MoE(HIDDEN, INNER, recipe=recipe, ep_buffer=ep_buffer, dtype=dtype, **options)


def gradients(model, x, dy, run=None):
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = (model if run is None else run)(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# Routing


@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_the_gate_routes_as_the_formulas_say(scaling):
    """Bit for bit, gradients too; and in evaluation the weights are the kernel's own, the same."""
    moe = moe_of(num_experts=32, top_k=4, n_group=4, topk_group=2, scaling=scaling)
    moe.gate.bias.normal_(0.0, 0.1)
    x = torch.randn(50, HIDDEN).bfloat16()
    routing = moe.gate(x)
    weight = moe.gate.weight.detach().float().requires_grad_()
    scores = (x.float() @ weight.T).sigmoid()
    experts = choose_experts(scores.detach() + moe.gate.bias, 4, 2, 4)
    weights = routing_weights(scores.gather(1, experts), scaling)
    assert torch.equal(routing.experts, experts) and torch.equal(routing.weights, weights)
    assert torch.equal(routing.counts, torch.bincount(experts.flatten(), minlength=32).int())
    factor = torch.randn_like(weights)
    (routing.weights * factor).sum().backward()
    (weights * factor).sum().backward()
    assert torch.equal(moe.gate.weight.grad, weight.grad.bfloat16())
    with torch.no_grad():
        assert torch.equal(moe.gate(x).weights, weights)


def test_more_experts_than_the_kernel_knows():
    moe = moe_of(num_experts=513, top_k=1)
    with pytest.raises(ValueError, match="route: scores has E = 513, expected 1 to 512"):
        moe(torch.randn(2, HIDDEN).bfloat16())


# Permutation


def test_permutation_in_plain_precision():
    experts = torch.stack([torch.randperm(EXPERTS)[:TOPK].sort().values for _ in range(TOKENS)])
    order = expert_order(experts, EXPERTS)
    rows = experts.flatten()[order.choices]
    assert torch.equal(rows, rows.sort().values)
    assert torch.equal(order.group_offsets[1:] - order.group_offsets[:-1], rows.bincount(minlength=EXPERTS))
    assert all((order.tokens[order.slots[t]] == t).all() for t in range(TOKENS))
    assert (order.tokens.diff()[rows.diff() == 0] > 0).all(), "tokens ascend within an expert"
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    y = permute(x, order, recipe=BF16)
    assert torch.equal(y, x[order.tokens])
    y.retain_grad()
    z = unpermute(y, order, recipe=BF16)
    torch.testing.assert_close(z, x * TOPK)
    dz = torch.randn_like(z)
    z.backward(dz)
    assert torch.equal(y.grad, dz[order.tokens])
    torch.testing.assert_close(x.grad, dz * TOPK)


@pytest.mark.parametrize("power_of_2", [False, True])
def test_permutation_in_fp8(power_of_2):
    """Each way one pass of the fused op, in both orientations; gradients are those of what came out."""
    recipe = Fp8Recipe(power_of_2_scales=power_of_2)
    experts = torch.randint(EXPERTS, (TOKENS, TOPK))
    order = expert_order(experts, EXPERTS)
    x = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
    options = {"transpose": True, "group_offsets": order.group_offsets, "power_of_2_scales": power_of_2}

    def same(rows, source):
        q, q_t = permute_quantize(source, order.tokens, **options)
        for a, b in ((rows.rows, q), (rows.transposed, q_t)):
            assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
            assert torch.equal(a.scales, b.scales)

    y = permute(x, order, recipe=recipe)
    assert type(y) is Fp8Rows and y.dtype == torch.bfloat16
    same(y, x.detach())
    middle = (y + 0).detach().requires_grad_()  # plain, by the values of y
    assert type(middle) is torch.Tensor and torch.equal(middle, dequantize(y.rows, torch.bfloat16))
    z = unpermute(middle, order, recipe=recipe)
    dz = torch.randn_like(z)
    (gradient,) = torch.autograd.grad(z, middle, dz)
    same(gradient, dz)
    y.backward(gradient)
    torch.testing.assert_close(x.grad, dz * TOPK, rtol=0.1, atol=0.1)


def test_rows_in_fp8_are_a_tensor_to_others():
    x = torch.randn(5, 128).bfloat16()
    rows = Fp8Rows(quantize_1x128(x), None, torch.float32)
    values = dequantize(rows.rows)
    assert rows.shape == (5, 128) and rows.dtype == torch.float32 and "Fp8Rows(tensor(" in repr(rows)
    assert torch.equal(rows * 2, values * 2) and torch.equal(rows[1:3], values[1:3])
    assert torch.equal(torch.cat([rows, x.float()]), torch.cat([values, x.float()]))
    assert type(rows.detach()) is Fp8Rows and type(rows.clone()) is torch.Tensor
    copy_of = torch.empty(5, 128).copy_(rows)
    assert torch.equal(copy_of, values)
    with pytest.raises(TypeError, match=r"Fp8Rows: aten.mul_.Tensor would write .* write to a clone\(\)"):
        rows.mul_(2)


# The layer


def test_a_layer_of_ones_own_model():
    """In place of a feed-forward layer, trained beside it with an optimizer that knows nothing of it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(32, HIDDEN)
            self.mlp = MoE(HIDDEN, 64, num_experts=4, top_k=2, shared_experts=1, scaling=2.0)
            self.head = nn.Linear(HIDDEN, 32)

        def forward(self, tokens):
            x = self.embedding(tokens)
            return self.head(x + self.mlp(x))

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = last = None
    for _ in range(12):
        tokens = torch.randint(32, (8, 16))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens * 5 + 1).flatten() % 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.mlp.gate.balance(0.01)
        first, last = first or loss.item(), loss.item()
    assert last < 0.3 * first
    assert model.mlp.gate.bias.abs().max() > 0


@pytest.mark.parametrize("recipe", [FP8, BF16], ids=["fp8", "bf16"])
def test_routing_given_is_routing_made(recipe):
    moe = moe_of(recipe).eval()
    x = torch.randn(2, 9, HIDDEN).bfloat16()
    routing = moe.gate(x.flatten(0, 1))
    assert torch.equal(moe(x, routing), moe(x))
    assert sequence_balance_loss(routing, 2).requires_grad


@pytest.mark.parametrize("recipe", [FP8, BF16], ids=["fp8", "bf16"])
def test_phases_with_the_graph_cut_between(recipe):
    """What a pipeline schedule does: each phase's backward when it likes."""
    moe = moe_of(recipe, shared_experts=0)
    x, dy = (torch.randn(TOKENS, HIDDEN).bfloat16() for _ in range(2))
    want = gradients(moe, x, dy)
    moe.zero_grad()
    x = x.requires_grad_()
    experts, weights, _, counts = moe.gate(x)
    sent = moe.experts.dispatch(x, experts, weights, counts)
    rows, row_weights = (t.detach().requires_grad_() for t in (sent.rows, sent.weights))
    assert isinstance(rows, Fp8Rows) == (recipe is FP8)
    cut = type(sent)(rows, row_weights, sent.group_offsets, sent.way_back)
    made = moe.experts.compute(cut)
    leaf = made.detach().requires_grad_()
    y = moe.experts.combine(leaf, sent)
    (d_made,) = torch.autograd.grad(y, leaf, dy)
    assert isinstance(d_made, Fp8Rows) == (recipe is FP8)
    made.backward(d_made)
    torch.autograd.backward([sent.rows, sent.weights], [rows.grad, row_weights.grad])
    assert_equal([y.detach(), x.grad, *(p.grad for p in moe.parameters())], want)


def test_one_pass_an_operand_in_a_layer_on_one_rank(monkeypatch):
    moe = moe_of()
    calls = counting(monkeypatch)
    y = moe(torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_())
    assert calls == Counter(
        route=1, permute_quantize=1, unpermute=1, grouped_fp8_gemm=2, fp8_gemm=2,
        quantize_1x128=3, quantize_128x128=4, swiglu_quantize=2,
    )  # fmt: skip
    calls.clear()
    y.sum().backward()
    assert calls == Counter(
        permute_quantize=1, unpermute=1, grouped_fp8_gemm=2, fp8_gemm=2,
        quantize_1x128=1, swiglu_backward_quantize=2, fp8_wgrad=4,
    )  # fmt: skip


def test_what_arrives_in_fp8_is_never_dequantised(monkeypatch):
    """One quantiser on the sender's side, and a re-tiling for the weight gradient, either way."""
    moe = moe_of(ep_buffer=ep.Buffer(None, EXPERTS, HIDDEN, TOKENS, TOPK), shared_experts=0)
    calls = counting(monkeypatch)
    y = moe(torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_())
    forward = Counter(quantize_1x128=2, requantize_1x128_t=1, quantize_128x128=2, swiglu_quantize=1)
    assert calls == forward + Counter(route=1, grouped_fp8_gemm=2)
    calls.clear()
    y.sum().backward()
    backward = Counter(quantize_1x128=1, requantize_1x128_t=1, swiglu_backward_quantize=1)
    assert calls == backward + Counter(grouped_fp8_gemm=2, fp8_wgrad=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "recipe",
    [Fp8Recipe(power_of_2_scales=True), Fp8Recipe(dispatch="bf16"), BF16],
    ids=["fp8", "bf16 wire", "bf16"],
)
def test_a_buffer_changes_nothing(recipe, dtype):
    """One rank with a buffer against none: to re-tile power-of-two scales hardly changes a value."""
    plain = moe_of(recipe, dtype)
    spread = moe_of(recipe, dtype, ep.Buffer(None, EXPERTS, HIDDEN, TOKENS, TOPK))
    spread.load_state_dict(plain.state_dict())
    x, dy = (torch.randn(TOKENS, HIDDEN).bfloat16().to(dtype) for _ in range(2))
    names = ["y", "x", *(name for name, _ in plain.named_parameters())]
    for name, a, b in zip(names, gradients(spread, x, dy), gradients(plain, x, dy), strict=True):
        if dtype == torch.bfloat16 and not (name.startswith("experts.") and recipe.power_of_2_scales):
            assert torch.equal(a, b), name
        else:  # re-tiled; or FP32 that travels in BF16
            assert (a - b).norm() < 0.01 * b.norm(), name


@pytest.mark.parametrize("recipe", [FP8, BF16], ids=["fp8", "bf16"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(recipe, reentrant):
    moe = moe_of(recipe)
    x, dy = (torch.randn(TOKENS, HIDDEN).bfloat16() for _ in range(2))
    want = gradients(moe, x, dy)
    assert_equal(gradients(moe, x, dy, lambda x: checkpoint(moe, x, use_reentrant=reentrant)), want)


def test_autocast():
    """As with BF16 activations and these weights; gradients in the dtypes of the leaves."""
    moe = moe_of(dtype=torch.float32)
    x, dy = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN).bfloat16()
    want = gradients(moe, x.bfloat16(), dy)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(moe, x, dy)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    # The gate reads x before it is rounded, so that a token near a tie may go elsewhere.
    close = (got[0] - want[0]).float().norm(dim=1) < 0.05 * want[0].float().norm(dim=1)
    assert close.float().mean() > 0.9


def test_compiled():
    torch._dynamo.reset()
    moe = moe_of()
    x, dy = (torch.randn(TOKENS, HIDDEN).bfloat16() for _ in range(2))
    want = gradients(moe, x, dy)
    got = gradients(moe, x, dy, torch.compile(moe, backend="aot_eager"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_state_dict_with_weights_in_fp8(tmp_path):
    moe = moe_of().eval()
    stored = copy.deepcopy(moe)
    store_fp8_weights(stored)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    with torch.no_grad():
        assert torch.equal(stored(x), moe(x))
        torch.save(stored.state_dict(), tmp_path / "moe.pt")
        again = moe_of().eval()
        store_fp8_weights(again)
        again.load_state_dict(torch.load(tmp_path / "moe.pt", weights_only=True))
        assert torch.equal(again(x), moe(x))
        set_recipe(again, BF16)
        torch.testing.assert_close(again(x), moe(x), rtol=0.2, atol=0.1)


def test_no_tokens():
    moe = moe_of()
    x = torch.randn(0, HIDDEN).bfloat16().requires_grad_()
    y = moe(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, HIDDEN)
    assert (moe.experts.down_proj.weight.grad == 0).all()
