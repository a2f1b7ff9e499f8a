"""SwiGLU with its quantisers: reference against float64, kernels against the reference, bit for bit."""

import re

import pytest
import torch
import torch.nn.functional as F
from fp8_helpers import SCALINGS, assert_same, commit_generator, each_scaling, offsets_of, powers, wide

import dsv3_kernels as dk
from dsv3_kernels import emulator, reference, swiglu
from dsv3_kernels.jit.compile import compile_source, kernel_dir, source_options

GROUPS = (0, 128, 1, 200, 0)
EXACT = SCALINGS["exact"]


def ordinal(codes):
    """e4m3 codes as integers in the order of their values."""
    bytes_ = codes.view(torch.uint8).int()
    return torch.where(bytes_ >= 128, 128 - bytes_, bytes_)


# ---- Reference


def test_sigmoid():
    x = torch.cat([torch.linspace(-90, 90, 20_001), torch.tensor([0.0, -0.0, 1e-30, -87.0, 200.0, -200.0])])
    exact = torch.sigmoid(x.double())
    error = (reference.sigmoid(x).double() - exact).abs()
    assert (error <= 1e-5 * exact + 2.0**-126).all()
    special = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert torch.equal(reference.sigmoid(special)[:2], torch.tensor([1.0, 0.0]))
    assert reference.sigmoid(special)[2].isnan()


@powers
def test_codes_are_within_one_of_torch(power_of_2):
    generator = commit_generator()
    x = (torch.randn(64, 512, generator=generator) * 3).bfloat16()
    q = dk.swiglu_quantize(x, power_of_2_scales=power_of_2)
    gate, up = x.double().chunk(2, -1)
    y = F.silu(gate) * up
    scale = q.scales.double().repeat_interleave(128, 1)
    codes = (y / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    off = (ordinal(codes) - ordinal(q.data)).abs()
    assert off.max() <= 1 and (off > 0).double().mean() < 0.1


def test_backward_is_the_gradient():
    """Against float64 autograd: within BF16's rounding of the gradient and FP32's of its factors."""
    generator = commit_generator()
    values = torch.randn(32, 768, generator=generator, dtype=torch.float64) * 3
    values = values.float().double()
    dy = torch.randn(32, 384, generator=generator).bfloat16()
    weights = torch.randn(32, generator=generator)
    for factor in (None, weights):
        check_gradient(values, dy, factor)
    values, dy = values[:, :0], dy[:, :0]
    assert reference.swiglu_weight_gradients(dy, values.float()).shape == (0, 32)


def check_gradient(values, dy, weights):
    x = values.clone().requires_grad_()
    factor = torch.ones(len(dy), 1) if weights is None else weights[:, None]
    factor = factor.double().requires_grad_()
    gate, up = x.chunk(2, -1)
    y = F.silu(gate) * up * factor
    y.backward(dy.double())
    width = dy.shape[1]
    sums = reference.swiglu_weight_gradients(dy, values.float())
    assert sums.shape == (width // 128, len(dy))
    bound = 2e-5 * (dy.double() * F.silu(gate) * up).detach().abs().sum(-1)
    assert ((sums.sum(0).double() - factor.grad[:, 0]).abs() <= bound).all()
    dx, again = reference.swiglu_backward(dy, values.float(), weights)
    assert dx.dtype == again.dtype == torch.bfloat16
    torch.testing.assert_close(again.double(), y.detach(), rtol=2.0**-8, atol=0)
    magnitude = (dy.double() * factor.detach() * up.detach()).abs()
    error = (dx.double() - x.grad).abs()
    assert (error[:, :width] <= 2.0**-8 * x.grad[:, :width].abs() + 1e-5 * magnitude).all()
    assert (error[:, width:] <= 2.0**-8 * x.grad[:, width:].abs()).all()


@powers
def test_the_fusion_changes_no_bit(power_of_2):
    generator = commit_generator()
    x = torch.randn(200, 288, generator=generator).bfloat16()
    weights, offsets = torch.rand(200, generator=generator), offsets_of(20, 0, 150)
    y = reference.swiglu(x, weights)
    assert y.dtype == torch.bfloat16
    gate, up = x.float().chunk(2, -1)
    torch.testing.assert_close(y.float(), F.silu(gate) * up * weights[:, None], rtol=2.0**-7, atol=0)
    want = dk.quantize_1x128(y, transpose=True, group_offsets=offsets, power_of_2_scales=power_of_2)
    got = dk.swiglu_quantize(x, weights, transpose=True, group_offsets=offsets, power_of_2_scales=power_of_2)
    for g, w in zip(got, want, strict=True):
        assert_same(g, w)
    assert_same(dk.swiglu_quantize(x, weights, power_of_2_scales=power_of_2), want[0])


# ---- Kernels


def check_forward(x, weights=None, offsets=None, scaling=EXACT, **gpu):
    with emulator.virtual_gpu(**gpu):
        q = dk.swiglu_quantize(x, weights, **scaling)
        q_both, q_t = dk.swiglu_quantize(x, weights, transpose=True, group_offsets=offsets, **scaling)
    y = reference.swiglu(x, weights)
    want = reference.quantize_1x128(y, **scaling)
    assert_same(q, want)
    assert_same(q_both, want)
    assert_same(q_t, reference.quantize_1x128_t(y, offsets, **scaling))


def check_backward(dy, x, offsets=None, scaling=EXACT, weights=None, **gpu):
    with emulator.virtual_gpu(**gpu):
        got = dk.swiglu_backward_quantize(dy, x, offsets, weights=weights, **scaling)
        again = dk.swiglu_backward_quantize(dy, x, offsets, weights=weights, recompute=True, **scaling)
    values = dk.dequantize(x)
    for result in (got, again):
        if weights is None:
            assert result.weights is None
            continue
        want_d = reference.swiglu_weight_gradients(dy, values).sum(0)
        torch.testing.assert_close(result.weights, want_d, rtol=0, atol=0, equal_nan=True)
    dx, y = reference.swiglu_backward(dy, values, weights)
    want = (
        *reference.quantize_1x128_both(dx, offsets, **scaling),
        reference.quantize_1x128_t(y, offsets, **scaling),
    )
    assert got.y_t is None
    for g, w in zip((*got[:2], *again[:3]), (*want[:2], *want), strict=True):
        assert_same(g, w)
    return again


@each_scaling
@pytest.mark.parametrize("shape", [(1, 16), (130, 144), (64, 256)])
def test_forward(scaling, shape):
    generator = commit_generator()
    tokens, width = shape
    weights = torch.rand(tokens, generator=generator)
    x = torch.randn(tokens, 2 * width, generator=generator) * 4
    check_forward(x.bfloat16(), None, None, scaling)
    check_forward(wide(generator, tokens, 2 * width).bfloat16(), weights, None, scaling)


@each_scaling
@pytest.mark.parametrize("rest", [0, 11])
def test_forward_of_groups(scaling, rest):
    tokens = sum(GROUPS) + rest
    x = torch.randn(tokens, 64, generator=commit_generator()).bfloat16()
    x[3, 5], x[130, 40], x[129], x[7, 3] = float("nan"), float("inf"), 0.0, -300.0
    check_forward(x, None, offsets_of(*GROUPS), scaling)


@each_scaling
@pytest.mark.parametrize("shape", [(1, 128), (130, 256)])
def test_backward(scaling, shape):
    generator = commit_generator()
    tokens, width = shape
    dy = torch.randn(shape, generator=generator).bfloat16()
    values = torch.randn(tokens, 2 * width, generator=generator) * 4
    x = dk.quantize_1x128(values, **scaling)
    check_backward(dy, x, None, scaling)
    check_backward(dy, x, None, scaling, torch.randn(tokens, generator=generator))
    values = wide(generator, tokens, 2 * width).clamp(-1e30, 1e30)
    x = dk.quantize_1x128(values, **scaling)
    row_major = dk.QuantizedTensor(x.data, x.scales.contiguous(), x.block)
    check_backward(wide(generator, *shape).bfloat16(), row_major, None, scaling)


@each_scaling
def test_backward_of_groups(scaling):
    tokens = sum(GROUPS) + 11
    generator = commit_generator()
    dy = torch.randn(tokens, 128, generator=generator).bfloat16()
    values = torch.randn(tokens, 256, generator=generator)
    values[3, 5], values[140, 200], values[129], dy[200, 3] = float("nan"), float("inf"), 0.0, float("nan")
    dx, _, y_t, _ = check_backward(dy, dk.quantize_1x128(values), offsets_of(*GROUPS), scaling)
    assert dk.dequantize(dx)[3].isnan().all() and dk.dequantize(dx)[4:129].isfinite().all()
    assert dk.dequantize(y_t)[:, 640:].isfinite().all()
    weights = torch.rand(tokens, generator=generator)
    weights[7], weights[300], weights[60] = 0.0, float("inf"), -1.5
    check_backward(dy, dk.quantize_1x128(values), offsets_of(*GROUPS), scaling, weights)


def test_empty():
    for shape in ((0, 128), (5, 0)):
        dy, x = torch.zeros(shape).bfloat16(), torch.zeros(shape[0], 2 * shape[1])
        check_forward(x.bfloat16(), None, offsets_of(0, 0, 0))
        check_backward(dy, dk.quantize_1x128(x), offsets_of(0, 0, 0))
        check_backward(dy, dk.quantize_1x128(x), offsets_of(0, 0, 0), weights=torch.ones(shape[0]))


def test_each_byte_moves_once_and_without_bank_conflicts():
    generator = commit_generator()
    x = torch.randn(256, 512, generator=generator).bfloat16()
    quantized = 256 * 256 + 256 * 256 // 128 * 4
    for both in (False, True):
        with emulator.virtual_gpu(checks=False) as gpu:
            dk.swiglu_quantize(x, transpose=both)
        counters = gpu.counters
        assert counters["launches"] == 1 and counters["bank_conflicts"] == 0
        assert counters["global_bytes_read"] == x.nbytes
        assert counters["global_bytes_written"] == quantized * (1 + both)
    x_q, dy = dk.quantize_1x128(x), torch.randn(256, 256, generator=generator).bfloat16()
    for recompute in (False, True):
        with emulator.virtual_gpu(checks=False) as gpu:
            dk.swiglu_backward_quantize(dy, x_q, recompute=recompute)
        counters = gpu.counters
        assert counters["launches"] == 1 and counters["bank_conflicts"] == 0
        assert counters["global_bytes_read"] == dy.nbytes + 2 * quantized
        assert counters["global_bytes_written"] == quantized * (4 + recompute)


@pytest.mark.parametrize("schedule", ["random", "round_robin", "pct"])
def test_any_order_of_the_warps(schedule):
    generator = commit_generator()
    seed = int(torch.randint(2**31, (), generator=generator))
    x = torch.randn(144, 256, generator=generator).bfloat16()
    check_forward(x, None, offsets_of(3, 0, 140), seed=seed, schedule=schedule, num_sms=2)
    gpu = {"seed": seed, "schedule": schedule, "num_sms": 1}
    weights = torch.rand(144, generator=generator)
    check_backward(x[:, :128].contiguous(), dk.quantize_1x128(x), weights=weights, **gpu)


# What to break in swiglu.cuh, and by what: each must be seen as a hazard or a wrong result.
MUTATIONS = {
    "scales are read before all are there": (r"1\.0f;\n    }\n    __syncthreads\(\);", "1.0f;\n    }"),
    "the scales of gate and up are swapped": (
        r"half \? up_scale : gate_scale",
        "half ? gate_scale : up_scale",
    ),
    "the slope forgets its second term": (r"__fsub_rn\(1\.0f, s\)", "0.0f"),
    "both halves go to one place": (r"quantize_half\(d_up, width \+ column\)", "quantize_half(d_up, column)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name):
    broken, by = MUTATIONS[name]
    text, count = re.subn(broken, by, (kernel_dir() / "swiglu.cuh").read_text())
    assert count == 1
    compiled = compile_source(text, ("dsv3::swiglu_backward_quantize<true, false, false>",), source_options())
    generator = commit_generator()
    dy = torch.randn(128, 128, generator=generator).bfloat16()
    x = dk.quantize_1x128(torch.randn(128, 256, generator=generator))
    want = dk.swiglu_backward_quantize(dy, x, power_of_2_scales=True).dx
    seen = False
    for seed in range(5):
        codes, codes_t = torch.zeros(128, 256, dtype=torch.uint8), torch.zeros(256, 128, dtype=torch.uint8)
        scales, scales_t = torch.zeros(256), torch.zeros(256)
        arguments = (
            dy,
            x.data.view(torch.uint8),
            x.scales,
            0,
            0,
            0,
            codes,
            scales,
            codes_t,
            scales_t,
            0,
            0,
            0,
        )
        arguments += (128, 128, 0, 1, *x.scales.stride(), 128)
        gpu = emulator.VirtualGPU(seed=seed)
        try:
            gpu.launch(compiled.ptx, compiled.names[0], grid=(1, 1, 1), block=(256, 1, 1), args=arguments)
        except emulator.EmulationError:
            seen = True
        else:
            seen |= not torch.equal(codes, want.data.view(torch.uint8))
    assert seen


def test_the_launch_constants_are_those_of_the_kernels():
    compile_source(
        f"""
        #include "swiglu.cuh"
        static_assert(dsv3::quantize::PartOf<dsv3::Bf16>::kThreads == {swiglu.THREADS});
        static_assert(dsv3::swiglu::GradientPart::kThreads == {swiglu.BACKWARD_THREADS});
        """,
        (),
        source_options(),
    )
