"""The fused MLP: bit for bit the ops called by hand, near float64, one quantiser pass an operand."""

import copy

import pytest
import torch
from op_calls import counting

from dsv3_kernels import (
    dequantize,
    fp8_gemm,
    fp8_wgrad,
    grouped_fp8_gemm,
    quantize_1x128,
    quantize_1x128_t,
    quantize_128x128,
    reference,
    swiglu_quantize,
)
from dsv3_kernels.nn import (
    BF16,
    MLP,
    Fp8Linear,
    Fp8Recipe,
    GroupedFp8Linear,
    deferred_wgrad,
    store_fp8_weights,
    swiglu_mlp,
)
from dsv3_kernels.nn import mlp as mlp_module

K, N = 144, 96
SIZES = [0, 130, 1, 41]
TOKENS = sum(SIZES)


pytestmark = pytest.mark.usefixtures("seed")


def draw(inner, recipe, grouped, weighted, dtype=torch.bfloat16):
    """Two layers; and x, offsets, weights, the output's gradient."""
    if grouped:
        up = GroupedFp8Linear(len(SIZES), K, 2 * inner, recipe=recipe, dtype=dtype)
        down = GroupedFp8Linear(len(SIZES), inner, N, recipe=recipe, dtype=dtype)
    else:
        up = Fp8Linear(K, 2 * inner, recipe=recipe, dtype=dtype)
        down = Fp8Linear(inner, N, recipe=recipe, dtype=dtype)
    for layer in (up, down):
        layer.weight.grad_dtype = torch.float32
    x = torch.randn(TOKENS, K, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([0, *SIZES]).cumsum(0).int() if grouped else None
    weights = torch.rand(TOKENS, requires_grad=True) if weighted else None
    return up, down, x, offsets, weights, torch.randn(TOKENS, N, dtype=dtype)


def step(up, down, x, offsets, weights, dy):
    """Output, and the gradients of x, both layers and the weights."""
    y = swiglu_mlp(x, up, down, offsets, weights)
    y.backward(dy)
    return [
        y.detach(),
        x.grad,
        up.weight.grad,
        down.weight.grad,
        *([] if weights is None else [weights.grad]),
    ]


def by_hand(up, down, x, offsets, weights, dy):
    recipe = up.recipe
    scales = {"power_of_2_scales": recipe.power_of_2_scales}

    def gemm(a, b):
        return fp8_gemm(a, b) if offsets is None else grouped_fp8_gemm(a, b, offsets)

    def wgrad(a, b):
        a_t, b_t = (quantize_1x128_t(t, offsets, **scales) for t in (a, b))
        return fp8_wgrad(a_t, b_t, group_offsets=offsets)

    x, dy = x.detach(), dy.contiguous()
    weights = None if weights is None else weights.detach()
    up_q, up_t = quantize_128x128(up.weight.detach(), transpose=True, **scales)
    down_q, down_t = quantize_128x128(down.weight.detach(), transpose=True, **scales)
    h = gemm(quantize_1x128(x, **scales), up_q)
    y = gemm(swiglu_quantize(h, weights, **scales), down_q)
    kept = dequantize(quantize_1x128(h, **scales)) if recipe.swiglu_input == "fp8" else h
    d_y = gemm(quantize_1x128(dy, **scales), down_t)
    d_h, y_again = reference.swiglu_backward(d_y, kept, weights)
    d_x = gemm(quantize_1x128(d_h, **scales), up_t)
    made = [y.to(x.dtype), d_x.to(x.dtype), wgrad(d_h, x), wgrad(dy, y_again)]
    if weights is not None:
        gate, linear = kept.float().chunk(2, -1)
        made.append((d_y.float() * (gate * reference.sigmoid(gate) * linear)).sum(1))
    return made


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("inner", "recipe"),
    [
        (128, Fp8Recipe()),
        (256, Fp8Recipe(power_of_2_scales=True)),
        (128, Fp8Recipe(swiglu_input="bf16")),
        (48, Fp8Recipe()),  # no whole tiles: without the fused backward
    ],
    ids=["128", "256 power of 2", "128 kept in bf16", "48"],
)
def test_bit_equal_to_the_ops_by_hand(grouped, weighted, inner, recipe):
    case = draw(inner, recipe, grouped, weighted)
    got, want = step(*case), by_hand(*case)
    for a, b in zip(got[:4], want[:4], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    if weighted:
        torch.testing.assert_close(got[4], want[4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [Fp8Recipe(), BF16], ids=["fp8", "bf16"])
def test_near_float64(dtype, recipe):
    """FP8 keeps 4 bits: the error of a gradient is some percent of its norm. BF16 keeps 9, FP32 24."""
    up, down, x, offsets, weights, dy = draw(128, recipe, True, True, dtype)
    got = step(up, down, x, offsets, weights, dy)
    wide = [t.detach().double().requires_grad_() for t in (x, up.weight, down.weight, weights)]
    x64, up64, down64, weights64 = wide
    parts = []
    for g, (low, high) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        gate, linear = (x64[low:high] @ up64[g].T).chunk(2, -1)
        hidden = gate * gate.sigmoid() * linear * weights64[low:high, None]
        parts.append(hidden @ down64[g].T)
    y = torch.cat(parts)
    y.backward(dy.double())
    bound = 0.1 if recipe.precision == "fp8" else 0.02 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(got, [y.detach(), *(t.grad for t in wide)], strict=True):
        error = (a.double() - b).norm() / b.norm()
        print(f"relative error {error:.2e}")
        assert error < bound


@pytest.mark.parametrize("grouped", [False, True])
def test_one_quantiser_pass_an_operand_and_one_gemm_each(grouped, monkeypatch):
    calls = counting(monkeypatch)
    gemm = "grouped_fp8_gemm" if grouped else "fp8_gemm"
    up, down, x, offsets, weights, dy = draw(128, Fp8Recipe(), grouped, True)
    y = swiglu_mlp(x, up, down, offsets, weights)
    # x, and h for the backward; y by SwiGLU itself.
    assert calls == {"quantize_1x128": 2, "quantize_128x128": 2, "swiglu_quantize": 1, gemm: 2}
    calls.clear()
    y.backward(dy)
    # dy; h's gradient and y again by SwiGLU's backward.
    assert calls == {"quantize_1x128": 1, "swiglu_backward_quantize": 1, gemm: 2, "fp8_wgrad": 2}
    calls.clear()
    with torch.no_grad():
        swiglu_mlp(x, up, down, offsets, weights)
    assert calls == {"quantize_1x128": 1, "quantize_128x128": 2, "swiglu_quantize": 1, gemm: 2}


def test_what_is_frozen_costs_nothing(monkeypatch):
    calls = counting(monkeypatch)
    up, down, x, _, _, dy = draw(128, Fp8Recipe(), False, False)
    want = step(up, down, x, None, None, dy)
    for frozen, wgrads, gemms in ((up, 1, 4), (down, 1, 4), (x, 2, 3)):
        for tensor in (x, up.weight, down.weight):
            tensor.grad = None
            tensor.requires_grad_()
        (frozen if frozen is x else frozen.weight).requires_grad_(False)
        calls.clear()
        got = step(up, down, x, None, None, dy)
        assert calls["fp8_wgrad"] == wgrads and calls["fp8_gemm"] == gemms
        assert sum(g is None for g in got) == 1
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True) if a is not None)


@pytest.mark.parametrize("deferred", [False, True])
def test_weight_gradients_go_where_they_should(deferred):
    case = draw(128, Fp8Recipe(), True, True)
    want = step(*case)
    up, down, x, offsets, weights, dy = case
    for layer in (up, down):
        layer.weight.grad = None
        layer.weight.main_grad = torch.full(layer.weight.shape, 2.0)
    y = swiglu_mlp(x, up, down, offsets, weights)
    if deferred:
        with deferred_wgrad() as store:
            y.backward(dy)
            assert len(store) == 2 and (up.weight.main_grad == 2).all()
            store.run()
    else:
        y.backward(dy)
    for layer, gradient in ((up, want[2]), (down, want[3])):
        assert layer.weight.grad is None
        torch.testing.assert_close(layer.weight.main_grad, gradient + 2, rtol=1e-6, atol=1e-6)


def test_fused_equals_unfused_backward(monkeypatch):
    """The kernel of SwiGLU's backward, and the formula that stands in for it at other widths."""
    case = draw(128, Fp8Recipe(), True, True)
    want = step(*case)
    for tensor in (case[2], case[0].weight, case[1].weight, case[4]):
        tensor.grad = None
    monkeypatch.setattr(mlp_module, "TILE", 127)
    got = step(*case)
    assert all(torch.equal(a, b) for a, b in zip(got[:4], want[:4], strict=True))
    torch.testing.assert_close(got[4], want[4], rtol=1e-4, atol=1e-4)


def test_shapes_dtypes_and_no_tokens():
    layer = MLP(K, 128, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 5, K, dtype=torch.bfloat16)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(y.view(30, K), layer(x.view(30, K)))
    wide = MLP(K, 128)
    assert wide(x.float()).dtype == torch.float32
    empty = torch.randn(0, K, dtype=torch.bfloat16, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == (0, K) and (layer.down_proj.weight.grad == 0).all()


def test_layers_of_two_recipes_are_not_fused(monkeypatch):
    up, down, x, *_ = draw(128, Fp8Recipe(), False, False)
    down.recipe = BF16
    calls = counting(monkeypatch)
    swiglu_mlp(x, up, down).sum().backward()
    assert calls == {"quantize_1x128": 2, "quantize_128x128": 1, "fp8_gemm": 2, "fp8_wgrad": 1}


HOOKS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("which", ["up", "down"])
def test_hooks_of_the_layers_run(which, kind):
    """Once; the layers then compute one by one, to BF16's rounding of what is between them the same."""
    up, down, x, offsets, weights, dy = draw(128, Fp8Recipe(), True, True)
    layers = {"up": copy.deepcopy(up), "down": copy.deepcopy(down)}
    want = step(up, down, x, offsets, weights, dy)
    seen = []
    handle = getattr(layers[which], f"register_{kind}")(lambda *_: seen.append(1))
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    got = step(*layers.values(), x, offsets, weights, dy)
    assert seen == [1]
    for a, b in zip(got, want, strict=True):
        assert (a - b).float().norm() < 0.1 * b.float().norm()
    handle.remove()
    swiglu_mlp(x, *layers.values(), offsets, weights).backward(dy)
    assert seen == [1]


def test_weights_kept_in_fp8_compute_and_do_not_train():
    layer = MLP(K, 128, dtype=torch.bfloat16)
    x = torch.randn(9, K).bfloat16()
    with torch.no_grad():
        want = layer(x)
    store_fp8_weights(layer)
    assert torch.equal(layer(x), want)
    with pytest.raises(ValueError, match="x requires grad, expected one that does not"):
        layer(x.requires_grad_())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("precision", "fp4"),
        ("power_of_2_scales", 1),
        ("retiled_power_of_2_scales", None),
        ("swiglu_input", "e5m6"),
        ("attention_output", "bf16"),
        ("dispatch", 8),
        ("combine", "fp8"),
    ],
)
def test_recipes_know_their_choices(field, value):
    with pytest.raises(ValueError, match=rf"Fp8Recipe: {field} is .*, expected one of \("):
        Fp8Recipe(**{field: value})
