"""A trained model in FP8 against itself in BF16: loss and gradients at the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dsv3_kernels.gate import route
from dsv3_kernels.nn import BF16, FP8, Fp8Linear, GroupedFp8Linear, gate, set_recipe

WINDOWS, LENGTH = 32, 130


def backward(model, recipe, window):
    """(loss, each linear layer's weight gradient by name)."""
    model = copy.deepcopy(model)
    set_recipe(model, recipe)
    for parameter in model.parameters():
        parameter.grad, parameter.grad_dtype = None, torch.float32
    losses = model.losses(window)
    (losses.main + 0.3 * losses.mtp).backward()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (Fp8Linear, GroupedFp8Linear))}
    return losses.main.item(), {name: layer.weight.grad for name, layer in layers.items()}


def cosines(got, want):
    """By layer, lowest first."""
    found = {n: F.cosine_similarity(got[n].double().flatten(), want[n].double().flatten(), 0) for n in want}
    return dict(sorted(((n, c.item()) for n, c in found.items()), key=lambda pair: pair[1]))


def window_of(corpus, part):
    """Evenly spread windows of the validation text."""
    text = corpus.validation
    starts = torch.linspace(0, len(text) - 2 * LENGTH, WINDOWS).long() + part * LENGTH // 2
    return text[starts[:, None] + torch.arange(LENGTH)].long()


@pytest.mark.parametrize("part", range(2))
def test_loss_and_gradients(trained_tiny, part, monkeypatch):
    """The bound of 0.99 on every layer holds where both computations use the same experts.

    With its own choice FP8 sends some 4 % of the tokens, those near a tie, to another expert: a step and not
    a rounding. The gradients of routed experts then differ by whole tokens; in 8 batches their lowest cosine
    was 0.98 to 0.99 in seven, and 0.78 in one; that of other layers was 0.991.
    With the same experts the lowest of all layers was 0.993. The loss moved by at most 0.03 % either way.
    """
    model, corpus = trained_tiny
    window, tape = window_of(corpus, part), []

    def record(*arguments, **options):
        tape.append(route(*arguments, **options))
        return tape[-1]

    monkeypatch.setattr(gate, "route", record)
    want_loss, want = backward(model, BF16, window)
    chosen = tuple(tape)
    assert len(want) > 20 and len(chosen) == 3

    tape.clear()
    loss, own = backward(model, FP8, window)
    moved = (
        torch.cat([(a.experts != b.experts).any(-1) for a, b in zip(tape, chosen, strict=True)])
        .float()
        .mean()
    )
    own = cosines(own, want)
    print(
        f"loss {loss} against {want_loss}, {moved:.1%} of the choices moved, lowest {list(own.items())[:4]}"
    )
    assert abs(loss / want_loss - 1) < 1e-3
    assert 0 < moved < 0.1
    assert all(c > 0.98 for name, c in own.items() if ".mlp.experts." not in name)

    replay = iter(chosen)
    monkeypatch.setattr(gate, "route", lambda *_, **__: next(replay))
    loss, same = backward(model, FP8, window)
    same = cosines(same, want)
    print(f"with the same experts: loss {loss}, lowest {list(same.items())[:4]}")
    assert abs(loss / want_loss - 1) < 1e-3
    assert min(same.values()) > 0.99
