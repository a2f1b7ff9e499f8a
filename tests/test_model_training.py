"""A training step of the whole model: what it computes, keeps, and how it stands torch's own machinery."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from model_helpers import SMALL, model_of, recorded_choices, told_choices
from op_calls import counting
from torch.utils.checkpoint import checkpoint

from dsv3_kernels.model import DeepSeekV3
from dsv3_kernels.nn import (
    BF16,
    FP8,
    Fp8Linear,
    Fp8Recipe,
    GroupedFp8Linear,
    deferred_wgrad,
    store_fp8_weights,
)

CONFIG = dataclasses.replace(
    SMALL, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, v_head_dim=64
)
BATCH, LENGTH = 2, 24
RECIPES = pytest.mark.parametrize("recipe", [FP8, BF16], ids=["fp8", "bf16"])


pytestmark = pytest.mark.usefixtures("seed")


def build(recipe, dtype=torch.bfloat16):
    return model_of(CONFIG, recipe, dtype)


def window(batch=BATCH):
    return torch.randint(CONFIG.vocab_size, (batch, LENGTH + 2))


def step(model, tokens, losses=None):
    """Losses and all gradients."""
    model.zero_grad()
    got = (losses or model.losses)(tokens)
    (got.main + 0.3 * got.mtp + 0.01 * got.balance).backward()
    return [got.main.detach(), got.mtp.detach(), *(p.grad for p in model.parameters())]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_one_pass_an_operand_and_one_gemm_each_in_a_whole_step(monkeypatch):
    """No weight gradient is made twice, no operand quantised twice, nothing dequantised on the way."""
    model, tokens = build(FP8), window()
    layers = [m for m in model.modules() if isinstance(m, (Fp8Linear, GroupedFp8Linear))]
    dense = sum(isinstance(m, Fp8Linear) for m in layers)
    experts = len(layers) - dense
    moes, attentions = experts // 2, sum(m.after_attention for m in layers if isinstance(m, Fp8Linear))
    mlps = sum(1 for name, _ in model.named_modules() if name.endswith("gate_up_proj"))
    calls = counting(monkeypatch)
    losses = model.losses(tokens)
    single = len(layers) - 2 * mlps  # layers outside MLPs
    assert calls == Counter(
        route=moes, permute_quantize=moes, unpermute=moes,
        # x of each layer, but the experts' that is permuted and what SwiGLU writes; and each h.
        quantize_1x128=single + mlps - moes + mlps, swiglu_quantize=mlps, pack_e5m6=attentions,
        quantize_128x128=len(layers), fp8_gemm=dense, grouped_fp8_gemm=experts,
    )  # fmt: skip
    calls.clear()
    (losses.main + losses.mtp).backward()
    assert calls == Counter(
        permute_quantize=moes, unpermute=moes, unpack_e5m6=attentions, quantize_1x128_t=attentions,
        quantize_1x128=single + mlps - moes, swiglu_backward_quantize=mlps,
        fp8_gemm=dense, grouped_fp8_gemm=experts, fp8_wgrad=len(layers),
    )  # fmt: skip


def test_weight_gradients_put_off_are_made_once(monkeypatch):
    model, tokens = build(FP8), window()
    want = step(model, tokens)
    calls = counting(monkeypatch)
    model.zero_grad()
    losses = model.losses(tokens)
    with deferred_wgrad() as store:
        (losses.main + 0.3 * losses.mtp + 0.01 * losses.balance).backward()
        assert calls["fp8_wgrad"] == 0
        count = len(store)
        store.run()
    assert calls["fp8_wgrad"] == count == sum("proj" in name for name, _ in model.named_parameters())
    for a, b in zip(model.parameters(), want[2:], strict=True):
        torch.testing.assert_close(a.grad, b, rtol=1e-2, atol=1e-6)


def kept_bytes(model, run):
    """Of what a forward keeps for its backward, each memory once, parameters and buffers not."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage, t.dtype
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    sizes = Counter()
    for storage, dtype in kept.values():
        sizes[dtype] += storage.nbytes()
    del result
    return sizes


def test_what_a_feed_forward_layer_keeps():
    """In FP8: x once, transposed for the weight gradient, and SwiGLU's input, a byte each."""
    layer = build(FP8).blocks[0].mlp
    tokens, hidden, inner = 256, CONFIG.hidden_size, CONFIG.intermediate_size
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    sizes = kept_bytes(layer, lambda: layer(x))
    weights = 3 * hidden * inner  # transposed, for the input gradients
    assert sizes[torch.float8_e4m3fn] == weights + tokens * (hidden + 2 * inner)
    assert sizes[torch.bfloat16] == 0
    assert sizes[torch.float32] <= 4 * (tokens * (hidden + 2 * inner) + weights) / 128
    for module in layer.modules():
        if isinstance(module, Fp8Linear):
            module.recipe = Fp8Recipe(swiglu_input="bf16")
    sizes = kept_bytes(layer, lambda: layer(x))
    assert sizes[torch.float8_e4m3fn] == weights + tokens * hidden
    assert sizes[torch.bfloat16] == 2 * tokens * 2 * inner


def test_what_the_layer_after_attention_keeps():
    layer = build(FP8).blocks[0].attention.o_proj
    x = torch.randn(256, layer.in_features).bfloat16().requires_grad_()
    sizes = kept_bytes(layer, lambda: layer(x))
    assert sizes[torch.uint8] == 256 * layer.in_features * 12 // 8
    assert sizes[torch.float8_e4m3fn] == layer.weight.numel() and sizes[torch.bfloat16] == 0
    layer.recipe = Fp8Recipe(attention_output="fp8")
    sizes = kept_bytes(layer, lambda: layer(x))
    assert sizes[torch.uint8] == 0
    assert sizes[torch.float8_e4m3fn] == layer.weight.numel() + 256 * layer.in_features


def test_a_step_in_fp8_keeps_less():
    tokens = torch.randint(CONFIG.vocab_size, (8, 32))
    fp8, bf16 = (build(recipe) for recipe in (FP8, BF16))
    sizes = {m: sum(kept_bytes(m, lambda m=m: m.losses(tokens)).values()) for m in (fp8, bf16)}
    print(f"kept: FP8 {sizes[fp8]}, BF16 {sizes[bf16]} bytes")
    assert sizes[fp8] < 0.9 * sizes[bf16]


@RECIPES
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(recipe, reentrant, monkeypatch):
    """Each block made again in the backward: the same bits, and still one weight gradient each."""
    model, tokens = build(recipe), window()
    want = step(model, tokens)
    loads = [gate.load.clone() for gate in model.gates()]
    for block in model.blocks:
        forward = block.forward
        monkeypatch.setattr(
            block, "forward", lambda *a, forward=forward: checkpoint(forward, *a, use_reentrant=reentrant)
        )
    calls = counting(monkeypatch)
    assert_equal(step(model, tokens), want)
    layers = [m for m in model.modules() if isinstance(m, (Fp8Linear, GroupedFp8Linear))]
    assert calls["fp8_wgrad"] == (len(layers) if recipe is FP8 else 0)
    assert len(loads) == 2


def error(got, want):
    """Of a tensor, to its norm."""
    return ((got - want).float().norm() / (want.float().norm() + 1e-9)).item()


@pytest.mark.parametrize(
    ("recipe", "loss", "gradient"), [(FP8, 0.02, 0.95), (BF16, 0.005, 0.2)], ids=["fp8", "bf16"]
)
def test_autocast(recipe, loss, gradient):
    """FP32 parameters under autocast against FP32 with the same experts: what rounding to BF16 moves.

    In FP8, where values fall to other codes, and BF16, 300 draws of each: of the loss 1.2 and 0.2 %; of a
    gradient, the worst of all parameters, 0.77 and 0.10 of its norm. One that is lost or doubled is off by 1.
    """
    model, tokens = build(recipe, torch.float32), window(8)
    with recorded_choices() as choices:
        want = step(model, tokens)
    with torch.autocast("cpu", torch.bfloat16), told_choices(choices):
        got = step(model, tokens)
    assert all(g.dtype == torch.float32 for g in got)
    assert error(got[0], want[0]) < loss
    assert max(map(error, got[2:], want[2:])) < gradient


def compiled_step(model, tokens, bound, **options):
    """bound: of a tensor's `error`."""
    torch._dynamo.reset()
    want = step(model, tokens)
    got = step(model, tokens, torch.compile(model.losses, **options))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert error(a, b) <= bound


NO_MTP = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)


def test_compiled():
    """Forward and backward, one graph each: with FP8's ops nothing breaks it."""
    tokens = window()[:, :-1]
    compiled_step(model_of(NO_MTP, FP8, torch.bfloat16), tokens, 0.02, backend="aot_eager", fullgraph=True)


@pytest.mark.long
@RECIPES
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_every_way(recipe, backend):
    """In BF16 and FP32 the graph breaks at the experts' product, which torch cannot trace on a CPU. Inductor
    rounds BF16 at fewer places, which FP8 makes coarser: hence FP32, and for FP8 a bound of its noise."""
    dtype = torch.float32 if backend == "inductor" else torch.bfloat16
    model = model_of(NO_MTP if backend == "inductor" else CONFIG, recipe, dtype)
    tokens = window() if model.mtp else window()[:, :-1]
    bound = (0.02, 1e-3, 0.2)[(backend == "inductor") * (1 + (recipe is FP8))]
    compiled_step(model, tokens, bound, backend=backend, fullgraph=recipe is FP8)


@RECIPES
def test_state_dicts(recipe, tmp_path):
    model, tokens = build(recipe).eval(), window()
    for gate in model.gates():
        gate.bias.normal_()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = build(recipe).eval()
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_equal(step(again, tokens), step(model, tokens))


def test_state_dicts_with_weights_in_fp8(tmp_path):
    model, tokens = build(FP8).eval(), window()[:, :-2]
    stored = copy.deepcopy(model)
    store_fp8_weights(stored)
    with torch.no_grad():
        want = model(tokens)
        assert torch.equal(stored(tokens), want)
        torch.save(stored.state_dict(), tmp_path / "model.pt")
        state = torch.load(tmp_path / "model.pt", weights_only=True)
        again = DeepSeekV3(CONFIG).bfloat16().eval()
        store_fp8_weights(again)
        again.load_state_dict(state)
        assert torch.equal(again(tokens), want)
    assert sum(t.dtype == torch.float8_e4m3fn for t in state.values()) > 10
