"""Weight gradients put off into a store, or added to `main_grad`: bit for bit what autograd makes."""

import copy

import pytest
import torch
from fp8_helpers import fresh_generator
from torch import nn

from dsv3_kernels.nn import BF16, Fp8Linear, GroupedFp8Linear, deferred_wgrad, fp8_linear, plain, set_recipe
from dsv3_kernels.nn.deferred import active_store

OFFSETS = torch.tensor([0, 5, 5, 40], dtype=torch.int32)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts, self.last = (
            Fp8Linear(64, 48),
            GroupedFp8Linear(3, 48, 32),
            Fp8Linear(32, 16),
        )
        for parameter in self.parameters():
            parameter.data = parameter.data.bfloat16()
            parameter.grad_dtype = torch.float32

    def forward(self, x):
        return self.last(self.experts(self.first(x), OFFSETS).relu())


def batches(count=3):
    generator = fresh_generator()
    return [torch.randn(40, 64, generator=generator).bfloat16() for _ in range(count)]


def loss_of(model, x):
    return model(x).float().square().mean()


def gradients(model):
    return [getattr(p, "main_grad", p.grad) for p in model.parameters()]


def give_main_grads(model):
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)


def reference_run(main_grad=False):
    model, data = Model(), batches()
    deferred = copy.deepcopy(model)
    for m in (model, deferred):
        if main_grad:
            give_main_grads(m)
        for parameter in m.parameters():
            parameter.grad_dtype = torch.float32
    for x in data:
        loss_of(model, x).backward()
    return model, deferred, data


def assert_same(model, deferred):
    for a, b in zip(gradients(model), gradients(deferred), strict=True):
        assert a.dtype == b.dtype == torch.float32 and a.abs().max() > 0
        assert torch.equal(a, b)


@pytest.mark.parametrize("main_grad", [False, True])
def test_deferred_equals_undeferred(main_grad):
    model, deferred, data = reference_run(main_grad)
    with deferred_wgrad() as store:
        for x in data:
            loss_of(deferred, x).backward()
            assert len(store) == 3
            store.run()
            assert len(store) == 0
    assert_same(model, deferred)
    for parameter in (*model.parameters(), *deferred.parameters()):
        assert (parameter.grad is None) == main_grad


@pytest.mark.parametrize("main_grad", [False, True])
def test_runners_of_micro_batches(main_grad):
    """As a zero-bubble schedule calls them: backward, backward, weights of the first, and so on."""
    model, deferred, data = reference_run(main_grad)
    with deferred_wgrad() as store:
        runners = []
        for x in data:
            loss_of(deferred, x).backward()
            runners.append(store.take())
        assert len(store) == 9
        assert all(p.grad is None for p in deferred.parameters())
        for left, runner in zip((6, 3, 0), runners, strict=True):
            runner()
            assert len(store) == left
        runners[0]()  # nothing is left to do
    assert_same(model, deferred)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slow", [False, True])
def test_plain_layers_defer_bit_for_bit(dtype, slow, monkeypatch):
    monkeypatch.setattr(plain, "_slow_bf16_cpu", lambda: slow)
    model = Model()
    set_recipe(model, BF16)
    model.to(dtype)
    deferred = copy.deepcopy(model)
    for parameter in (*model.parameters(), *deferred.parameters()):
        parameter.grad_dtype = torch.float32
    data = [x.to(dtype).unflatten(0, (8, 5)) for x in batches()]

    def loss_of(model, x):
        y = model.experts(model.first(x).flatten(0, 1), OFFSETS).relu()
        return model.last(y.unflatten(0, (8, 5))).float().square().mean()

    inputs = [x.clone().requires_grad_() for x in data]
    for x in inputs:
        loss_of(model, x).backward()
    with deferred_wgrad() as store:
        for x, plain_x in zip(data, inputs, strict=True):
            x.requires_grad_()
            loss_of(deferred, x).backward()
            assert torch.equal(x.grad, plain_x.grad) and x.grad.abs().max() > 0
        assert len(store) == 9 and all(p.grad is None for p in deferred.parameters())
        store.run()
    assert_same(model, deferred)


def test_plain_layers_without_a_store_in_the_backward():
    weight, again = (torch.ones(16, 64, requires_grad=True) for _ in range(2))
    x = torch.randn(4, 64)
    plain.linear(x, weight).square().sum().backward()
    with deferred_wgrad():
        loss = plain.linear(x, again).square().sum()
    loss.backward()
    assert torch.equal(weight.grad, again.grad)


def test_input_gradients_are_there_at_once():
    model, (x,) = Model(), batches(1)
    x, again = (x.clone().requires_grad_() for _ in range(2))
    loss_of(model, x).backward()
    with deferred_wgrad() as store:
        loss_of(model, again).backward()
        assert torch.equal(x.grad, again.grad)
        store.run()


def test_main_grad_is_added_to_and_replaces_grad():
    model, (x,) = Model(), batches(1)
    loss_of(model, x).backward()
    plain = [p.grad for p in model.parameters()]
    before = [torch.randn(p.shape) for p in model.parameters()]
    for parameter, start in zip(model.parameters(), before, strict=True):
        parameter.grad, parameter.main_grad = None, start.clone()
    loss_of(model, x).backward()
    for parameter, start, gradient in zip(model.parameters(), before, plain, strict=True):
        assert parameter.grad is None and torch.equal(parameter.main_grad, start + gradient)


def test_grad_of_the_weights_own_dtype():
    """Without grad_dtype autograd rounds the gradient to the weight's dtype, and so does the store."""
    (x,) = batches(1)
    weights = [torch.ones(16, 64).bfloat16().requires_grad_() for _ in range(2)]
    for _ in range(2):
        fp8_linear(x, weights[0]).float().square().sum().backward()
        with deferred_wgrad() as store:
            fp8_linear(x, weights[1]).float().square().sum().backward()
            store.run()
    assert weights[1].grad.dtype == torch.bfloat16 and torch.equal(weights[0].grad, weights[1].grad)


def test_the_weight_may_change_before_its_gradient_is_made():
    model, deferred, data = reference_run()
    with deferred_wgrad() as store:
        for x in data:
            loss_of(deferred, x).backward()
        with torch.no_grad():
            for parameter in deferred.parameters():
                parameter.mul_(2)
        store.run()
    assert_same(model, deferred)


def test_weights_that_are_no_leaves_are_not_deferred():
    (x,) = batches(1)
    base = torch.ones(16, 64).bfloat16().requires_grad_()
    with deferred_wgrad() as store:
        fp8_linear(x, base * 2).float().sum().backward()
        assert len(store) == 0 and base.grad.abs().max() > 0


def test_gradients_that_were_never_computed_are_an_error():
    model, (x,) = Model(), batches(1)
    message = r"deferred_wgrad: 3 weight gradients .* never computed.*store\.run"
    with pytest.raises(RuntimeError, match=message), deferred_wgrad():
        loss_of(model, x).backward()
    with pytest.raises(RuntimeError, match=message), deferred_wgrad() as store:
        loss_of(model, x).backward()
        store.take()
    assert active_store() is None
    loss_of(model, x).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_another_error_is_not_hidden():
    model, (x,) = Model(), batches(1)
    with pytest.raises(ZeroDivisionError), deferred_wgrad():
        loss_of(model, x).backward()
        raise ZeroDivisionError
    assert active_store() is None


def test_blocks_do_not_nest():
    with deferred_wgrad() as store:
        with pytest.raises(RuntimeError, match="deferred_wgrad: another block is active"), deferred_wgrad():
            pass
        assert active_store() is store


def test_what_fails_stays_in_the_store():
    model, (x,) = Model(), batches(1)
    with deferred_wgrad() as store:
        loss_of(model, x).backward()
        model.experts.weight.main_grad = torch.zeros(2, 2)
        with pytest.raises(ValueError, match="fp8_wgrad: out has rank 2"):
            store.run()
        del model.experts.weight.main_grad
        assert len(store) == 2
        store.run()
    assert all(p.grad is not None for p in model.parameters())


def test_compiled_layers_put_nothing_off():
    (x,) = batches(1)
    weights = [torch.ones(16, 64).bfloat16().requires_grad_() for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")
    fp8_linear(x, weights[0]).float().sum().backward()
    with deferred_wgrad() as store:
        compiled(x, weights[1]).float().sum().backward()
        assert len(store) == 0
    assert torch.equal(weights[0].grad, weights[1].grad)
