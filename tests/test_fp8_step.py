"""Training steps of FP8 layers, every quantiser and GEMM a kernel in the emulator, against the reference."""

import functools
import re
from collections import Counter

import pytest
import torch
from commit_seed import seeds
from torch import nn

from dsv3_kernels import emulator, reference
from dsv3_kernels.nn import Fp8Linear, Fp8Recipe, GroupedFp8Linear, MoE, deferred_wgrad

NAMES = r"(quantize_1x128_t|quantize_\d+x128|fp8_\w+?|swiglu_\w+?|permute_\w+?|unpermute|route)(?=I|E)"
SIZES = [0, 128, 1, 71, 0]
TOKENS = sum(SIZES)


class Model(nn.Module):
    """A dense layer and a layer of experts, as in an MoE block."""

    def __init__(self, recipe: Fp8Recipe) -> None:
        super().__init__()
        self.up = Fp8Linear(144, 160, recipe=recipe, dtype=torch.bfloat16)
        self.experts = GroupedFp8Linear(len(SIZES), 160, 96, recipe=recipe, dtype=torch.bfloat16)
        for parameter in self.parameters():
            parameter.grad_dtype = torch.float32

    def forward(self, x, offsets):
        return self.experts(torch.relu(self.up(x)), offsets)


def train(seed, power_of_2, main_grad, deferred, steps=2):
    """Everything two steps produce: outputs, input gradients, weight gradients, weights."""
    torch.manual_seed(seed)
    model = Model(Fp8Recipe("fp8", power_of_2_scales=power_of_2))
    offsets = torch.tensor([0, *SIZES]).cumsum(0).int()
    seen = []
    for _ in range(steps):
        for parameter in model.parameters():
            if main_grad:
                parameter.main_grad = torch.randn(parameter.shape)
            parameter.grad = None
        x, target = torch.randn(TOKENS, 144).bfloat16().requires_grad_(), torch.randn(TOKENS, 96)
        if deferred:
            with deferred_wgrad() as store:
                y = model(x, offsets)
                (y.float() - target).square().sum().backward()
                store.run()
        else:
            y = model(x, offsets)
            (y.float() - target).square().sum().backward()
        gradients = [p.main_grad if main_grad else p.grad for p in model.parameters()]
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 1e-4 * gradient
        seen += [y.detach(), x.grad, *gradients, *(p.detach().clone() for p in model.parameters())]
    return seen


@pytest.fixture
def hopper(monkeypatch):
    """The CPU backend with the tensor core's own arithmetic."""
    for name in ("fp8_gemm", "grouped_fp8_gemm", "fp8_wgrad"):
        exact = functools.partial(getattr(reference, name), accumulation="hopper")
        monkeypatch.setattr(reference, name, exact)


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel was launched, by the name of its function."""
    counter = Counter()
    launch = emulator.VirtualGPU.launch

    def counting(gpu, ptx, kernel, **rest):
        counter[re.search(NAMES, kernel)[1]] += 1
        launch(gpu, ptx, kernel, **rest)

    monkeypatch.setattr(emulator.VirtualGPU, "launch", counting)
    return counter


@pytest.mark.parametrize(
    ("power_of_2", "main_grad", "deferred"),
    [(False, False, False), (True, True, False), (False, True, True)],
    ids=["grad", "main_grad", "deferred"],
)
def test_two_steps_in_the_emulator_equal_the_reference(power_of_2, main_grad, deferred, hopper, launched):
    (seed,) = seeds(f"step {power_of_2} {main_grad} {deferred}", 1)
    print("seed", seed)
    with emulator.virtual_gpu(num_sms=3, seed=seed):
        got = train(seed, power_of_2, main_grad, deferred)
    # A step of a layer: x, the weight and dy quantised once each; forward, input gradient, weight gradient.
    layers, steps = 2, 2
    quantisers, gemms = {"quantize_1x128_t": 2, "quantize_128x128": 1}, {"fp8_gemm": 2, "fp8_wgrad": 1}
    assert launched == {name: count * layers * steps for name, count in (quantisers | gemms).items()}
    expected = train(seed, power_of_2, main_grad, deferred)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype and b.float().abs().max() > 0
        assert torch.equal(a, b), f"tensor {i} differs in {int((a != b).sum())} of {a.numel()} elements"


def moe_step(seed):
    """Output and gradients of a whole MoE layer: gate, routed and shared experts."""
    torch.manual_seed(seed)
    moe = MoE(
        160, 128, num_experts=4, top_k=2, n_group=2, topk_group=2, shared_experts=1, dtype=torch.bfloat16
    )
    for parameter in moe.parameters():
        parameter.grad_dtype = torch.float32
    x = torch.randn(70, 160).bfloat16().requires_grad_()
    y = moe(x)
    y.backward(torch.randn(70, 160).bfloat16())
    return [y.detach(), x.grad, *(p.grad for p in moe.parameters())]


def test_an_moe_layer_in_the_emulator_equals_the_reference(hopper, launched):
    """A kernel a pass: what the fused ops save shows in the count."""
    (seed,) = seeds("moe step", 1)
    print("seed", seed)
    with emulator.virtual_gpu(num_sms=3, seed=seed):
        got = moe_step(seed)
    assert launched == {
        "route": 1,
        "permute_quantize": 2,  # tokens, and the gradient of their sums
        "unpermute": 2,
        "quantize_1x128_t": 2,  # of the shared expert: x and dy, both orientations each
        "quantize_1x128": 2,  # SwiGLU's input, kept
        "quantize_128x128": 4,
        "swiglu_quantize": 2,
        "swiglu_backward_quantize": 2,
        "fp8_gemm": 8,
        "fp8_wgrad": 4,
    }
    expected = moe_step(seed)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype and b.float().abs().max() > 0
        assert torch.equal(a, b), f"tensor {i} differs in {int((a != b).sum())} of {a.numel()} elements"
