"""The linear layers: against float64 with dequantised operands, and against the ops called by hand."""

import pytest
import torch
from fp8_helpers import offsets_of
from op_calls import counting
from torch import nn

import dsv3_kernels.nn.plain as plain_layers
from dsv3_kernels import (
    dequantize,
    fp8_gemm,
    fp8_wgrad,
    grouped_fp8_gemm,
    quantize_1x128,
    quantize_1x128_t,
    quantize_128x128,
)
from dsv3_kernels.nn import (
    BF16,
    FP8,
    Fp8Linear,
    Fp8Recipe,
    GroupedFp8Linear,
    fp8_linear,
    grouped_fp8_linear,
    set_recipe,
)

BF16_STEP = 2.0**-8
FP32_SLACK = 1e-5
SHAPES = [(1, 16, 16), (3, 128, 256), (130, 96, 288), (257, 384, 144), (128, 128, 128)]


pytestmark = pytest.mark.usefixtures("seed")


def operands(tokens, k, n, dtype=torch.bfloat16):
    x = (torch.randn(tokens, k) * torch.logspace(-3, 2, tokens)[:, None]).to(dtype).requires_grad_()
    w = (torch.randn(n, k) * 0.1).to(dtype).requires_grad_()
    w.grad_dtype = torch.float32
    return x, w, torch.randn(tokens, n).to(dtype)


def exact(q):
    """The dequantised values in float64: a code times a scale, not rounded to FP32."""
    data = q.data.to(torch.float64)
    scales = q.scales.double()
    if q.block[0] == 128:
        scales = scales.repeat_interleave(128, -2)[..., : data.shape[-2], :]
    return data * scales.repeat_interleave(128, -1)[..., : data.shape[-1]]


def assert_product(got, a, b, step):
    """got = a·bᵀ (float64) within one rounding to got's dtype and FP32 summation."""
    assert got.isfinite().all()
    bound = step * (a @ b.T).abs() + FP32_SLACK * (a.abs() @ b.abs().T)
    assert ((got.double() - a @ b.T).abs() <= bound).all()


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize(("tokens", "k", "n"), SHAPES)
def test_fp8_linear_against_float64(tokens, k, n, power_of_2):
    x, w, dy = operands(tokens, k, n)
    y = fp8_linear(x, w, power_of_2_scales=power_of_2)
    y.backward(dy)
    opt = {"power_of_2_scales": power_of_2}
    w_q, w_t = quantize_128x128(w.detach(), transpose=True, **opt)
    assert_product(y, exact(quantize_1x128(x.detach(), **opt)), exact(w_q), BF16_STEP)
    assert_product(x.grad, exact(quantize_1x128(dy, **opt)), exact(w_t), BF16_STEP)
    assert w.grad.dtype == torch.float32
    assert_product(
        w.grad, exact(quantize_1x128_t(dy, **opt)), exact(quantize_1x128_t(x.detach(), **opt)), 2.0**-23
    )
    # The quantisation itself: with three mantissa bits each operand is within 1/16 of its values.
    relative = (w.grad.double() - dy.double().T @ x.detach().double()).norm() / w.grad.double().norm()
    assert relative < 0.08


SIZES = [[5, 0, 130, 1], [0, 0, 0, 0], [300], [0, 0, 128, 0, 7], [64, 64]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped_fp8_linear_against_float64(sizes):
    k, n = 96, 160
    x, _, dy = operands(sum(sizes), k, n)
    w = torch.randn(len(sizes), n, k).bfloat16().requires_grad_()
    w.grad_dtype = torch.float32
    offsets = offsets_of(*sizes)
    y = grouped_fp8_linear(x, w, offsets)
    y.backward(dy)
    w_q, w_t = quantize_128x128(w.detach(), transpose=True)
    x_q, dy_q = exact(quantize_1x128(x.detach())), exact(quantize_1x128(dy))
    weight, weight_t = exact(w_q), exact(w_t)
    for g, (low, high) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        assert_product(y[low:high], x_q[low:high], weight[g], BF16_STEP)
        assert_product(x.grad[low:high], dy_q[low:high], weight_t[g], BF16_STEP)
        x_t, dy_t = quantize_1x128_t(x.detach()[low:high]), quantize_1x128_t(dy[low:high])
        assert_product(w.grad[g], exact(dy_t), exact(x_t), 2.0**-23)


def test_bit_equal_to_the_ops_by_hand():
    x, w, dy = operands(200, 256, 128)
    y = fp8_linear(x, w)
    y.backward(dy)
    w_q, w_t = quantize_128x128(w.detach(), transpose=True)
    assert torch.equal(y, fp8_gemm(quantize_1x128(x.detach()), w_q))
    assert torch.equal(x.grad, fp8_gemm(quantize_1x128(dy), w_t))
    assert torch.equal(w.grad, fp8_wgrad(quantize_1x128_t(dy), quantize_1x128_t(x.detach())))


def test_grouped_bit_equal_to_the_ops_by_hand():
    offsets = offsets_of(70, 0, 130)
    x, _, dy = operands(200, 256, 128)
    w = torch.randn(3, 128, 256).bfloat16().requires_grad_()
    w.grad_dtype = torch.float32
    y = grouped_fp8_linear(x, w, offsets)
    y.backward(dy)
    w_q, w_t = quantize_128x128(w.detach(), transpose=True)
    assert torch.equal(y, grouped_fp8_gemm(quantize_1x128(x.detach()), w_q, offsets))
    assert torch.equal(x.grad, grouped_fp8_gemm(quantize_1x128(dy), w_t, offsets))
    expected = fp8_wgrad(
        quantize_1x128_t(dy, offsets), quantize_1x128_t(x.detach(), offsets), group_offsets=offsets
    )
    assert torch.equal(w.grad, expected)
    assert (w.grad[1] == 0).all()


@pytest.fixture
def calls(monkeypatch):
    return counting(monkeypatch)


@pytest.mark.parametrize("grouped", [False, True])
def test_one_quantiser_pass_an_operand_and_one_gemm_each(calls, grouped):
    x, w, dy = operands(40, 128, 128)
    gemm = "grouped_fp8_gemm" if grouped else "fp8_gemm"

    def run(x, w):
        return grouped_fp8_linear(x, w[None], offsets_of(40)) if grouped else fp8_linear(x, w)

    run(x, w).backward(dy)
    every = {"quantize_1x128": 2, "quantize_128x128": 1, gemm: 2, "fp8_wgrad": 1}
    assert calls == every
    calls.clear()
    run(x.detach(), w).backward(dy)  # the first layer: no input gradient
    assert calls == every | {"quantize_1x128": 1, "quantize_1x128_t": 1, gemm: 1}
    calls.clear()
    run(x, w.detach()).backward(dy)  # a frozen weight: no weight gradient
    assert calls == {"quantize_1x128": 2, "quantize_128x128": 1, gemm: 2}
    calls.clear()
    with torch.no_grad():
        run(x, w)
    assert calls == {"quantize_1x128": 1, "quantize_128x128": 1, gemm: 1}


def test_leading_dimensions_and_strides():
    layer = Fp8Linear(64, 48, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 5, 64).bfloat16()
    y = layer(x)
    assert y.shape == (2, 3, 5, 48)
    assert torch.equal(y.view(30, 48), layer(x.view(30, 64)))
    part = torch.randn(7, 128).bfloat16()[:, 32:96]
    assert torch.equal(layer(part), layer(part.clone()))
    y = layer(x.requires_grad_())
    y.sum().backward()  # a gradient of stride 0
    assert x.grad.isfinite().all()
    assert layer(torch.randn(0, 64).bfloat16()).shape == (0, 48)


def test_fp32_weights_give_fp32_output():
    x, w, _ = operands(5, 32, 16, torch.float32)
    assert fp8_linear(x, w).dtype == torch.float32


def test_nan_is_not_hidden():
    x, w, dy = operands(3, 128, 16)
    with torch.no_grad():
        x[1, 5] = torch.nan
    y = fp8_linear(x, w)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()
    assert y[2].isfinite().all()
    y.backward(dy)
    assert w.grad.isnan().any()


def test_layers_load_the_state_of_nn_linear():
    plain = nn.Linear(32, 48, bias=False, dtype=torch.bfloat16)
    layer = Fp8Linear(32, 48, dtype=torch.bfloat16)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight)
    set_recipe(layer, BF16)
    x = torch.randn(9, 32).bfloat16()
    assert torch.equal(layer(x), plain(x))


def test_set_recipe_reaches_every_layer():
    model = nn.Sequential(Fp8Linear(32, 32), nn.Sequential(GroupedFp8Linear(2, 32, 32)))
    assert [model[0].recipe, model[1][0].recipe] == [FP8, FP8]
    power = Fp8Recipe("fp8", power_of_2_scales=True)
    set_recipe(model, power)
    assert [model[0].recipe, model[1][0].recipe] == [power, power]
    assert "power_of_2_scales=True" in repr(model)


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision is 'fp4', expected one of"):
        Fp8Recipe("fp4")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_bf16_recipe_against_float64(sizes, dtype):
    k, n = 48, 64
    layer = GroupedFp8Linear(len(sizes), k, n, recipe=BF16, dtype=dtype)
    x, _, dy = operands(sum(sizes), k, n, dtype)
    offsets = offsets_of(*sizes)
    y = layer(x, offsets)
    assert y.dtype == dtype
    y.backward(dy)
    step = BF16_STEP if dtype == torch.bfloat16 else 2.0**-23
    weight = layer.weight.detach().double()
    for g, (low, high) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        assert_product(y[low:high], x.detach().double()[low:high], weight[g], step)
        assert_product(x.grad[low:high], dy.double()[low:high], weight[g].T, step)
        assert_product(layer.weight.grad[g], dy.double()[low:high].T, x.detach().double()[low:high].T, step)


def test_slow_bf16_cpus_compute_the_same(monkeypatch):
    x, w, _ = operands(33, 64, 32)
    monkeypatch.setattr(plain_layers, "_slow_bf16_cpu", lambda: True)
    y = plain_layers.linear(x, w)
    assert y.dtype == torch.bfloat16
    assert_product(y, x.detach().double(), w.detach().double(), BF16_STEP)


def test_dequantize_agrees_with_the_tests_own_form():
    q = quantize_1x128(torch.randn(5, 200).bfloat16()[:, :192].contiguous())
    assert torch.equal(dequantize(q), exact(q).float())
