"""A trained model in FP8 against itself in BF16: loss and gradients at the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from model_helpers import recorded_choices, told_choices

from dsv3_kernels.nn import BF16, FP8, Fp8Linear, GroupedFp8Linear, set_recipe

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
def test_loss_and_gradients(trained_tiny, part):
    """The loss within 0.1 %, and with the same experts every gradient within a cosine of 0.99 of BF16's.

    With its own choice FP8 sends some 4 % of the tokens, those near a tie, to another expert than BF16 does:
    a step and not a rounding, which gives both experts other tokens to learn from. BF16 that is told FP8's
    choices differs from itself by as much: in three batches the lowest cosine of an expert's gradient was
    0.9928, 0.9913 and 0.9885 for the choices alone, 0.9916, 0.9902 and 0.9871 for FP8 with them. FP8 against
    BF16 with the same choices had 0.9956 or more in every layer.
    """
    model, corpus = trained_tiny
    window = window_of(corpus, part)
    with recorded_choices() as bf16_choices:
        want_loss, want = backward(model, BF16, window)
    assert len(want) > 20 and len(bf16_choices) == 3
    with recorded_choices() as fp8_choices:
        loss, got = backward(model, FP8, window)
    pairs = zip(fp8_choices, bf16_choices, strict=True)
    moved = torch.cat([(a.experts != b.experts).any(-1) for a, b in pairs]).float().mean()
    with told_choices(fp8_choices):
        told_loss, told = backward(model, BF16, window)

    own, same, choices = cosines(got, want), cosines(got, told), cosines(told, want)
    print(f"loss {loss}, BF16 {want_loss}, BF16 with FP8's choices {told_loss}; {moved:.1%} of them moved")
    for name, found in (("own", own), ("same", same), ("choices alone", choices)):
        print(f"{name}: lowest {list(found.items())[:3]}")
    assert abs(loss / want_loss - 1) < 1e-3 and abs(loss / told_loss - 1) < 1e-3
    assert 0 < moved < 0.1
    assert min(same.values()) > 0.99
    assert all(own[name] > 0.985 for name in own if ".mlp.experts." not in name)
    assert all(own[name] > choices[name] - 0.01 for name in own), "the choices explain what is lost"
