"""What the backward makes again: the same bits, no GEMM more than said, and less memory."""

import contextlib
import dataclasses
import os
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from dsv3_kernels import ep, nn
from dsv3_kernels.model import PRESETS, DeepSeekV3
from dsv3_kernels.nn import Fp8Recipe, gemms, recompute, set_recipe
from dsv3_kernels.nn.recipe import RECOMPUTE
from dsv3_kernels.train.observe.memory import SAVINGS, LiveMemory, build, main

CONFIG = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=2)
UNLIKE = dataclasses.replace(CONFIG, v_head_dim=32, num_attention_heads=8)  # values narrower than keys
EVERY = [(), *((name,) for name in RECOMPUTE), RECOMPUTE]


@pytest.fixture(scope="module")
def window():
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(seed))


def step(window, recipe, config=CONFIG, ep_buffer=None, main_grad=False, deferred=None):
    """(losses, gradients, loads) of one step, in BF16 weights."""
    model = DeepSeekV3(config, recipe, ep_buffer)
    model.initialize(1)
    model.bfloat16().train()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
        if main_grad:
            parameter.main_grad = torch.zeros(parameter.shape)
    with nn.deferred_wgrad() if deferred == "whole" else contextlib.nullcontext() as store:
        losses = model.losses(window)
        loss = losses.main + 0.3 * losses.mtp + 0.01 * losses.balance
        if deferred == "backward":
            with nn.deferred_wgrad() as store:
                loss.backward()
                store.run()
        else:
            loss.backward()
            if store is not None:
                store.run()
    grads = {}
    for name, p in model.named_parameters():
        grads[name] = [None if g is None else g.clone() for g in (p.grad, getattr(p, "main_grad", None))]
    return losses, grads, [gate.load.clone() for gate in model.gates()]


def assert_same(got, expected):
    for one, other in zip(vars(got[0]).values(), vars(expected[0]).values(), strict=True):
        assert torch.equal(one, other)
    for name, pair in expected[1].items():
        for one, other in zip(got[1][name], pair, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), name
    assert all(torch.equal(a, b) for a, b in zip(got[2], expected[2], strict=True))


@pytest.mark.parametrize("config", [CONFIG, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_the_same_bits(window, precision, config):
    expected = step(window, Fp8Recipe(precision), config)
    for names in EVERY[1:]:
        assert_same(step(window, Fp8Recipe(precision, recompute=names), config), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"power_of_2_scales": True},
        {"swiglu_input": "bf16", "attention_output": "fp8"},
        {"retiled_power_of_2_scales": False},
    ],
)
def test_the_same_bits_in_other_recipes(window, fields):
    expected = step(window, Fp8Recipe(**fields))
    assert_same(step(window, Fp8Recipe(**fields, recompute=RECOMPUTE)), expected)


@pytest.mark.parametrize("deferred", [None, "backward", "whole"])
def test_the_same_bits_where_gradients_go_elsewhere(window, deferred):
    expected = step(window, Fp8Recipe(), main_grad=True, deferred=deferred)
    got = step(window, Fp8Recipe(recompute=RECOMPUTE), main_grad=True, deferred=deferred)
    assert_same(got, expected)
    assert got[1]["blocks.0.attention.o_proj.weight"][0] is None


def test_the_same_bits_of_deferred_gradients_in_bf16(window):
    expected = step(window, Fp8Recipe("bf16"), deferred="whole")
    assert_same(step(window, Fp8Recipe("bf16", recompute=RECOMPUTE), deferred="whole"), expected)


def test_the_same_bits_through_the_all_to_all(window):
    def buffer():
        return ep.Buffer(None, CONFIG.n_routed_experts, CONFIG.hidden_size, 80, CONFIG.num_experts_per_tok)

    expected = step(window, Fp8Recipe(), ep_buffer=buffer())
    assert_same(step(window, Fp8Recipe(recompute=RECOMPUTE), ep_buffer=buffer()), expected)


def test_no_gemm_more_than_said(window, monkeypatch):
    """Only the up-projections' and the head's are run twice, each once more; attention's core never."""
    calls = Counter()

    def counted(module, name):
        whole = getattr(module, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return whole(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("fp8_gemm", "grouped_fp8_gemm", "fp8_wgrad"):
        counted(gemms, name)

    forward = nn.Linear.forward

    def counted_forward(layer, x):
        calls["head"] += type(layer) is nn.Linear
        return forward(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", counted_forward)

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "scaled_dot_product" in str(func):
                calls[str(func)] += 1
            return func(*args, **(kwargs or {}))

    seen = {}
    for names in EVERY:
        calls.clear()
        with Count():
            step(window, Fp8Recipe(recompute=names))
        seen[names] = Counter(calls)
    plain, layers = seen[()], CONFIG.num_hidden_layers + 1
    extra = {names: {k: n - plain[k] for k, n in seen[names].items() if n != plain[k]} for names in EVERY[1:]}
    assert plain["fp8_gemm"] > 0 < plain["head"]
    assert extra == {
        ("norms",): {},
        ("up_projections",): {"fp8_gemm": 2 * layers},
        ("weights",): {},
        ("head",): {"head": 2},
        RECOMPUTE: {"fp8_gemm": 2 * layers, "head": 2},
    }


def test_a_compiled_model_is_still_one_graph(window):
    """It decides by itself what to make again: the recipe changes nothing in it."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, num_nextn_predict_layers=0)
    model = build(config, "cpu")
    set_recipe(model, Fp8Recipe(recompute=RECOMPUTE))
    loss = torch.compile(lambda w: model.losses(w).main, backend="aot_eager", fullgraph=True)(window[:1, :17])
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = model.losses(window[:1, :17]).main
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        error = torch.linalg.vector_norm(got[name] - parameter.grad)
        assert error <= 0.1 * torch.linalg.vector_norm(parameter.grad), name


def test_nothing_is_remade_without_gradients(window):
    model = DeepSeekV3(CONFIG, Fp8Recipe(recompute=RECOMPUTE))
    model.initialize(1)
    with torch.no_grad():
        one = model(window[:, :30])
        set_recipe(model, Fp8Recipe())
        assert torch.equal(model(window[:, :30]), one)


def test_weights_that_change_before_the_backward_are_refused(window):
    model = build(CONFIG, "cpu")
    set_recipe(model, Fp8Recipe(recompute=("weights",)))
    loss = model.losses(window).main
    with torch.no_grad():
        model.blocks[0].attention.o_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [("norm",), ["norms"], "norms", None])
def test_recipes_that_cannot_be(value):
    with pytest.raises(ValueError, match="recompute is .* expected a tuple of"):
        Fp8Recipe(recompute=value)


def test_what_is_made_of_a_remade_tensor_is_kept():
    """A view without `then`, say: more memory, never a wrong gradient."""
    x = torch.randn(4, 256, requires_grad=True)
    norm = torch.nn.RMSNorm(256)
    layer = nn.Fp8Linear(256, 128)
    y = recompute.remade(norm, x)
    assert torch.equal(recompute.remake_of(y)(), y)
    assert recompute.remake_of(y * 2) is None
    assert recompute.remake_of(recompute.then(lambda t: t[:2], y))().shape == (2, 256)
    layer(y * 2).sum().backward()
    got, x.grad = x.grad, None
    layer(norm(x) * 2).sum().backward()
    assert torch.equal(got, x.grad)


# Measuring


def test_live_memory_is_counted_exactly():
    x = torch.randn(100, 64, requires_grad=True)
    with LiveMemory() as memory:
        y = x.exp()  # kept by autograd too
        assert memory.live == 100 * 64 * 4
        z = y.view(64, 100) * 2
        assert memory.live == 2 * 100 * 64 * 4
        del z
        assert memory.live == 100 * 64 * 4
        held = y.detach()
        del y
        assert memory.live == 100 * 64 * 4
        del held
        assert memory.live == 0
        assert memory.peak == 2 * 100 * 64 * 4
        kept = F.silu(x).sum()  # keeps x, which was there before
        assert memory.live == 4
        x.detach().mul_(1)
        assert memory.live == 4
        del kept


def test_activations_are_halved_at_least(capsys):
    assert main(["--layers", "1", "--batch-size", "4", "--seq-len", "64"]) == 0
    text = capsys.readouterr().out
    assert "activations of 1 layers of tiny, 4 x 64 tokens, on cpu" in text
    kept, peaks = [], []
    for row in SAVINGS:
        (line,) = [line for line in text.splitlines() if f" {row} " in line]
        sizes = re.findall(r"\d+\.\d", line)
        kept.append(float(sizes[0]))
        peaks.append(float(sizes[1]))
    assert kept[-1] < 0.5 * min(kept[:2])
    assert peaks[-1] < 0.6 * peaks[0]
    assert kept[4:] == sorted(kept[4:], reverse=True)
    assert len(set(kept)) == len(kept)  # every row does something


def test_bad_command_lines(capsys):
    for arguments in (["--layers", "0"], ["--seq-len", "0"], ["--seq-len", "9999"]):
        assert main(arguments) == 1
        assert "expected" in capsys.readouterr().err
