"""Every op under torch.library.opcheck and inside torch.compile(fullgraph=True)."""

import pytest
import torch
from fp8_helpers import fresh_generator
from torch.utils._pytree import tree_flatten

import dsv3_kernels as dk
from dsv3_kernels import e5m6, gemm, permute, quantize, swiglu, wgrad  # noqa: F401  (registers the ops)

OFFSETS = torch.tensor([0, 5, 5, 40], dtype=torch.int32)


def draw(*shape):
    return torch.randn(*shape, generator=fresh_generator())


def as_tensors(*quantized):
    return [t for q in quantized for t in (q.data, q.scales)]


def op_samples():
    a, b = dk.quantize_1x128(draw(40, 272)), dk.quantize_128x128(draw(24, 272))
    a3, b3 = dk.quantize_1x128(draw(3, 7, 272)), dk.quantize_128x128(draw(3, 24, 272))
    dense = as_tensors(dk.quantize_1x128_t(draw(40, 24)), dk.quantize_1x128_t(draw(40, 16)))
    grouped = as_tensors(
        dk.quantize_1x128_t(draw(40, 24), OFFSETS), dk.quantize_1x128_t(draw(40, 16), OFFSETS)
    )
    yield "quantize_1x128", (draw(5, 272), False, False)
    yield "quantize_1x128", (draw(2, 5, 128).bfloat16(), True, False)
    yield "quantize_1x128", (draw(0, 128), False, False)
    yield "quantize_1x128_t", (draw(40, 24), None, False, False)
    yield "quantize_1x128_t", (draw(128, 24), None, True, False)
    yield "quantize_1x128_t", (draw(40, 24), OFFSETS, False, False)
    yield "quantize_1x128_both", (draw(40, 16), OFFSETS, True, False)
    yield "quantize_1x128_both", (draw(128, 32).bfloat16(), None, False, False)
    yield "quantize_1x128_both", (draw(40, 16), OFFSETS, False, True)
    yield "quantize_128x128_both", (draw(32, 272), False, True)
    yield "requantize_1x128_t", (*as_tensors(a), OFFSETS, True, False)
    yield "requantize_1x128_t", (*as_tensors(a), None, False, True)
    yield "quantize_128x128", (draw(2, 24, 272), False, False)
    yield "quantize_128x128", (draw(128, 256), True, False)
    yield "quantize_128x128_both", (draw(32, 272), True, False)
    yield "quantize_128x128_both", (draw(2, 128, 128), False, False)
    yield "dequantize", (*as_tensors(a), 1, torch.bfloat16)
    yield "dequantize", (*as_tensors(b3), 128, torch.float32)
    index = torch.tensor([3, -1, 0, 3], dtype=torch.int32)
    yield "permute_quantize", (draw(5, 272), index, None, False, False, True)
    yield "permute_quantize", (draw(5, 272), index, OFFSETS[:2] * 0, True, True, False)
    yield "unpermute", (draw(4, 24).bfloat16(), index.view(2, 2), draw(2, 2))
    yield "unpermute", (draw(4, 24).bfloat16(), index.view(2, 2), None)
    yield "pack_e5m6", (draw(5, 256),)
    yield "unpack_e5m6", (*dk.pack_e5m6(draw(5, 256)), torch.bfloat16)
    gate_up, dy = draw(40, 256).bfloat16(), draw(40, 128).bfloat16()
    yield "swiglu_quantize", (gate_up, None, None, False, True, False)
    yield "swiglu_quantize", (gate_up, draw(40), OFFSETS, True, False, True)
    kept = as_tensors(dk.quantize_1x128(gate_up))
    for weights in (None, draw(40)):
        for recompute in (False, True):
            yield "swiglu_backward_quantize", (dy, *kept, weights, OFFSETS, recompute, True, recompute)
    yield "fp8_gemm", tuple(as_tensors(a, b))
    yield "grouped_fp8_gemm", (*as_tensors(a, b3), OFFSETS)
    yield "masked_grouped_fp8_gemm", (*as_tensors(a3, b3), torch.tensor([7, 0, 3], dtype=torch.int32))
    yield "fp8_wgrad", (*dense, draw(24, 16), False, None, None)
    yield "fp8_wgrad", (*grouped, draw(3, 24, 16), True, OFFSETS, 8)


@pytest.fixture
def allclose_of_float8(monkeypatch):
    """opcheck compares inputs before and after with torch.allclose, which knows no float8: give it bytes."""
    allclose = torch.allclose

    def compare(a, b, *args, **kwargs):
        if a.dtype == b.dtype and a.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        return allclose(a, b, *args, **kwargs)

    monkeypatch.setattr(torch, "allclose", compare)


@pytest.mark.parametrize("index, name", [(i, name) for i, (name, _) in enumerate(op_samples())])
def test_opcheck(index, name, allclose_of_float8):
    _, args = list(op_samples())[index]
    torch.library.opcheck(getattr(torch.ops.dsv3_kernels, name).default, args)


def linear_step(x, w, dy, out):
    """Forward, input gradient and weight gradient of a linear layer."""
    w_q, w_t = dk.quantize_128x128(w, transpose=True)
    y = dk.fp8_gemm(dk.quantize_1x128(x), w_q)
    dy_q, dy_t = dk.quantize_1x128(dy, transpose=True, ue8m0_scales=True)
    dw = dk.fp8_wgrad(dy_t, dk.quantize_1x128_t(x, power_of_2_scales=True))
    dx = dk.fp8_gemm(dy_q, w_t)
    total = dk.fp8_wgrad(dk.quantize_1x128_t(dy), dk.quantize_1x128_t(x), out, accumulate=True)
    return y, dx, dw, total + 1, dk.dequantize(w_q), dk.dequantize((w_q.data, w_q.scales), torch.bfloat16)


def swiglu_step(x, w, dy, out):
    """Through the FP8 codes of x and back; w and out only fill the places."""
    gate_up, dy = x[:, :256].bfloat16().contiguous(), torch.cat([dy] * 4, -1).bfloat16()
    q = dk.swiglu_quantize(gate_up)
    q_both, q_t = dk.swiglu_quantize(gate_up, x[:, 256].contiguous(), transpose=True)
    pair = dk.swiglu_backward_quantize(dy, dk.quantize_1x128(gate_up))[:2]
    weights = x[:, 256].contiguous()
    *triple, d = dk.swiglu_backward_quantize(dy, dk.quantize_1x128(gate_up), weights=weights, recompute=True)
    out.add_(1)
    kept = dk.unpack_e5m6(dk.pack_e5m6(gate_up))
    index = torch.tensor([[3, -1], [0, 3]], dtype=torch.int32)
    permuted = dk.permute_quantize(gate_up, index[0])
    q, q_t = dk.permute_quantize(gate_up, index[1], transpose=True)
    summed = dk.unpermute(gate_up, index, x[:2, :2].contiguous())
    return [kept, summed, d] + [dk.dequantize(t) for t in (q, q_both, q_t, *pair, *triple, permuted)]


def experts_step(x, w, dy, out, offsets):
    """The same for three experts whose tokens lie one after another, and the decode-time form."""
    w_q = dk.quantize_128x128(w)
    y = dk.grouped_fp8_gemm(dk.quantize_1x128(x), w_q, offsets)
    dy_t, x_t = dk.quantize_1x128_t(dy, offsets), dk.quantize_1x128_t(x, offsets)
    dw = dk.fp8_wgrad(dy_t, x_t, out, group_offsets=offsets)
    batch = dk.quantize_1x128(x[:39].view(3, 13, -1))
    masked = dk.masked_grouped_fp8_gemm(batch, w_q, offsets[1:] - offsets[:-1])
    return y, dw * 2, masked


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("step", [linear_step, swiglu_step, experts_step])
def test_compiled_equals_eager(step, backend):
    """Values, strides and the mutated `out`; a second shape takes the dynamic-shape path."""
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    offsets = torch.tensor([0, 5, 5, 13], dtype=torch.int32)
    for tokens in (40, 56):
        weights = (3,) if step is experts_step else ()
        x, w, dy, out = draw(tokens, 272), draw(*weights, 32, 272), draw(tokens, 32), draw(*weights, 32, 272)
        extra = (offsets,) if weights else ()
        expected_out, got_out = out.clone(), out.clone()
        expected, _ = tree_flatten(step(x, w, dy, expected_out, *extra))
        got, _ = tree_flatten(compiled(x, w, dy, got_out, *extra))
        assert torch.equal(expected_out, got_out) and not torch.equal(got_out, out)
        for e, g in zip(expected, got, strict=True):
            assert torch.equal(e, g) and e.stride() == g.stride() and e.dtype == g.dtype


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        w_q, w_t = dk.quantize_128x128(w, transpose=True)
        x_t = dk.quantize_1x128_t(x)
        ctx.save_for_backward(w_t.data, w_t.scales, x_t.data, x_t.scales)
        return dk.fp8_gemm(dk.quantize_1x128(x), w_q)

    @staticmethod
    def backward(ctx, dy):
        w_t, w_scales, x_t, x_scales = ctx.saved_tensors
        dx = dk.fp8_gemm(dk.quantize_1x128(dy), (w_t, w_scales))
        return dx.float(), dk.fp8_wgrad(dk.quantize_1x128_t(dy), (x_t, x_scales))


def test_compiled_autograd_function():
    """Dynamo traces a backward in a stricter mode than a forward."""
    gradients = []
    for call in (Linear.apply, torch.compile(Linear.apply, fullgraph=True, backend="aot_eager")):
        x, w = (torch.linspace(-1, 1, n * 128).view(n, 128).requires_grad_() for n in (64, 32))
        call(x, w).backward(torch.linspace(-2, 3, 64 * 32).view(64, 32).bfloat16())
        gradients.append((x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_call_still_checks_values():
    """Descending offsets are found where they are read: at run time, inside the traced op."""
    step = torch.compile(lambda x, o: dk.quantize_1x128_t(x, o).data, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="quantize_1x128_t: group_offsets descends"):
        step(draw(40, 24), torch.tensor([0, 9, 5], dtype=torch.int32))


def test_quantized_tensor_crosses_the_compiled_border():
    q = dk.quantize_128x128(draw(24, 272))
    compiled = torch.compile(dk.fp8_gemm, fullgraph=True, backend="aot_eager")
    a = dk.quantize_1x128(draw(8, 272))
    assert torch.equal(compiled(a, q), dk.fp8_gemm(a, q))
    returned = torch.compile(dk.quantize_1x128, fullgraph=True, backend="aot_eager")(draw(8, 272))
    assert isinstance(returned, dk.QuantizedTensor) and returned.block == (1, 128)
