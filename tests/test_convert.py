"""Fp8Linear as a drop-in: other people's models, torch.compile, checkpointing, autocast, state dicts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dsv3_kernels.nn as dnn
from dsv3_kernels.nn import BF16, Fp8Linear, GroupedFp8Linear, convert

pytestmark = pytest.mark.usefixtures("seed")


def small():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Sequential(nn.Linear(96, 32, bias=False)))


def test_a_transformers_model_trains():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    plain = transformers.LlamaForCausalLM(config)
    fp8 = copy.deepcopy(plain)
    names = convert(fp8, lambda name, layer: name != "lm_head")
    assert len(names) == 14 and type(fp8.lm_head) is nn.Linear
    assert all(type(fp8.get_submodule(name)) is Fp8Linear for name in names)
    steps = torch.randint(1, 5, (40, 8, 1))
    batches = (torch.randint(64, (40, 8, 1)) + steps * torch.arange(24)) % 64  # counting by 1 to 4
    losses = []
    for model in (plain, fp8):
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        losses.append([])
        for batch in batches:
            optimizer.zero_grad()
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    ours, theirs = (torch.tensor(run) for run in reversed(losses))
    print("plain", theirs[::4], "fp8", ours[::4])
    assert ours[-5:].mean() < 0.6 * ours[0]
    assert ((ours - theirs).abs() / theirs)[:5].max() < 0.01, "before chance drives the runs apart"
    assert abs(ours[-5:].mean() / theirs[-5:].mean() - 1) < 0.2


def test_an_moe_of_transformers_trains_with_ours():
    """Its experts, which are no nn.Linears, make room for nn.MoE; its other layers are converted."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    moe = dnn.MoE(64, 32, num_experts=8, top_k=2, n_group=4, topk_group=2, shared_experts=1)
    model.model.layers[1].mlp = moe
    names = convert(model, lambda name, layer: name != "lm_head")
    assert len(names) == 13, "five of each attention, three of the dense MLP"
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        batch = (torch.randint(64, (8, 1)) + torch.arange(24)) % 64
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        assert moe.gate.load.sum() == 8 * 24 * 2
        moe.gate.balance(0.001)
        losses.append(loss.item())
    print(losses)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_what_stays():
    model = small()
    both = nn.ModuleDict({"model": model, "again": model[0]})
    model[2][0].weight.requires_grad_(False)
    before, seen = dict(model.named_parameters()), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    state = copy.deepcopy(model.state_dict())
    assert convert(both) == ["model.0", "model.2.0"]
    assert all(p is before[name] for name, p in model.named_parameters())
    assert both.again is model[0] and isinstance(both.again, Fp8Linear)
    assert state.keys() == model.state_dict().keys()
    x = torch.randn(5, 64)
    model(x)
    assert seen and convert(model) == []
    layer = model[0]
    want = dnn.fp8_linear(x, layer.weight) + layer.bias
    assert torch.equal(layer(x), want)
    assert "bias=True, Fp8Recipe" in repr(layer)


def test_filter_and_recipe():
    model = small()
    assert convert(model, lambda name, layer: layer.bias is None, recipe=BF16) == ["2.0"]
    assert type(model[0]) is nn.Linear and model[2][0].recipe == BF16
    x = torch.randn(3, 96)
    assert torch.equal(model[2](x), F.linear(x, model[2][0].weight))
    alone = nn.Linear(32, 32)
    assert convert(alone) == [""] and isinstance(alone, Fp8Linear)


class Own(nn.Linear):
    pass


def test_what_cannot_be_converted():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 8), "c": nn.Linear(20, 32)})
    with pytest.raises(
        ValueError, match=r"^convert: 'b' has out_features = 8, .*'c' has in_features = 20, .*filter"
    ):
        convert(model)
    assert type(model.a) is nn.Linear, "nothing was changed"
    with pytest.raises(ValueError, match=r"'' has weights of torch.float64, expected one of"):
        convert(nn.Linear(32, 32).double())
    patched = nn.Linear(32, 32)
    patched.forward = lambda x: x
    with pytest.raises(ValueError, match=r"'' has a `forward` of its own"):
        convert(patched)
    assert convert(Own(32, 32)) == []


def gradients(model, run, x, dy):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing(reentrant, autocast):
    model, x, dy = small(), torch.randn(9, 64), torch.randn(9, 32)
    convert(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = gradients(model, model, x, dy)
        got = gradients(model, lambda x: checkpoint(model, x, use_reentrant=reentrant), x, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(autocast):
    torch._dynamo.reset()
    model, x, dy = small(), torch.randn(9, 64), torch.randn(9, 32)
    convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want, got = (gradients(model, run, x, dy) for run in (model, compiled))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_autocast():
    """The dtypes of nn.Linear, and the FP8 GEMMs themselves with all their bits."""
    layer = Fp8Linear(64, 96, bias=True)
    grouped = GroupedFp8Linear(2, 64, 96)
    x, offsets = torch.randn(9, 64), torch.tensor([0, 4, 9], dtype=torch.int32)
    dy = torch.randn(9, 96).bfloat16()
    for run in (layer, lambda x: grouped(x, offsets)):
        module = layer if run is layer else grouped
        want = gradients(module, run, x.bfloat16(), dy)
        with torch.autocast("cpu", torch.bfloat16):
            got = gradients(module, run, x, dy)
            half = run(x.bfloat16())
        assert got[0].dtype == half.dtype == torch.bfloat16 and got[1].dtype == torch.float32
        assert torch.equal(got[0], want[0]) and torch.equal(half, want[0])
        assert torch.equal(got[1], want[1].float())
        assert all(torch.equal(a, b) for a, b in zip(got[2:], want[2:], strict=True))
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("bias", [False, True])
def test_state_dicts_pass_both_ways(bias, tmp_path):
    plain, layer = nn.Linear(32, 48, bias=bias), Fp8Linear(32, 48, bias=bias)
    layer.load_state_dict(plain.state_dict())
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    again = nn.Linear(32, 48, bias=bias)
    again.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    for a, b in zip(again.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    stored = copy.deepcopy(layer)
    dnn.store_fp8_weights(stored)
    x = torch.randn(3, 32)
    torch.testing.assert_close(stored(x), layer(x), rtol=0, atol=0)
