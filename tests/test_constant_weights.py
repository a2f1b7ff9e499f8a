"""Weights that are quantised once for all micro-batches of a step."""

import copy

import pytest
import torch
from fp8_helpers import fresh_generator
from model_helpers import SMALL, model_of

import dsv3_kernels.nn.gemms as gemms
from dsv3_kernels.nn import FP8, Fp8Linear, Fp8Recipe, GroupedFp8Linear, constant_weights, set_recipe
from dsv3_kernels.train.executor import LocalExecutor


@pytest.fixture
def quantised(monkeypatch):
    """The shapes of the weights that have been quantised in both orientations."""
    shapes, original = [], gemms.quantize_128x128

    def counted(weight, **options):
        if options.get("transpose"):
            shapes.append(tuple(weight.shape))
        return original(weight, **options)

    monkeypatch.setattr(gemms, "quantize_128x128", counted)
    return shapes


def test_a_step_quantises_each_weight_once(quantised):
    model = model_of(SMALL, FP8, torch.bfloat16)
    again = copy.deepcopy(model)
    windows = torch.randint(0, SMALL.vocab_size, (3, 1, 12), generator=fresh_generator())
    for m in (model, again):
        for parameter in m.parameters():
            parameter.grad_dtype = torch.float32
    LocalExecutor(model).forward_backward(windows, 0.3, 0.01)
    layers = [m for m in model.modules() if isinstance(m, Fp8Linear | GroupedFp8Linear)]
    assert sorted(quantised) == sorted(tuple(layer.weight.shape) for layer in layers)
    for window in windows:
        losses = again.losses(window)
        ((losses.main + 0.3 * losses.mtp + 0.01 * losses.balance) / 3).backward()
    assert len(quantised) == 4 * len(layers)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_a_weight_that_changes_is_quantised_again(quantised):
    layer, x = Fp8Linear(64, 48), torch.randn(5, 64, generator=fresh_generator())
    with constant_weights():
        before = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.equal(layer(x), 2 * before)
        assert torch.equal(layer(x), 2 * before)
        assert len(quantised) == 2
        set_recipe(layer, Fp8Recipe(power_of_2_scales=True))
        layer(x)
        assert len(quantised) == 3
    layer(x)
    assert len(quantised) == 4


def test_weights_that_are_no_leaves_are_not_held(quantised):
    layer, x = Fp8Linear(64, 48), torch.randn(5, 64)
    with constant_weights():
        for _ in range(2):
            torch.func.functional_call(layer, {"weight": layer.weight * 1.0}, (x,))
    assert len(quantised) == 2


def test_backwards_share_one_transpose():
    layer, x = Fp8Linear(64, 48), torch.randn(5, 64)
    with constant_weights():
        kept = [layer(x).grad_fn for _ in range(2)]
    outside = layer(x).grad_fn

    def transpose_of(node):
        while not hasattr(node, "saved_tensors"):
            node = node.next_functions[0][0]
        return node.saved_tensors[0].data_ptr()

    assert transpose_of(kept[0]) == transpose_of(kept[1]) != transpose_of(outside)
