"""Decoding from the latent cache, sampling, and speculation with the MTP module."""

import dataclasses
import itertools
import math

import pytest
import torch
from model_helpers import SMALL, model_of

from dsv3_kernels.model.generate import Generator, Sampling
from dsv3_kernels.model.rope import Yarn
from dsv3_kernels.nn import FP8

YARN = Yarn(factor=4, original_max_position_embeddings=8, mscale_all_dim=1.0)


pytestmark = pytest.mark.usefixtures("seed")


@pytest.mark.parametrize("yarn", [None, YARN, dataclasses.replace(YARN, mscale_all_dim=0.0)])
@pytest.mark.parametrize("pieces", [[1] * 23, [5] + [1] * 18, [5, 2, 9, 1, 6], [23]])
def test_decoding_in_pieces_equals_the_full_forward(yarn, pieces):
    """The first piece takes the training form of attention, the others the absorbed one."""
    model = model_of(dataclasses.replace(SMALL, rope_scaling=yarn)).eval()
    tokens = torch.randint(40, (2, 23))
    with torch.no_grad():
        expected = model(tokens)
        cache = model.new_cache(2, 23)
        cache.rows.fill_(torch.nan)  # nothing that was not written is read
        got = torch.cat([model.decode(piece, cache)[0] for piece in tokens.split(pieces, 1)], dim=1)
    assert cache.length == 23
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("post_norm", [True, False])
def test_mtp_decoding_equals_the_training_form(post_norm):
    model = model_of(dataclasses.replace(SMALL, mtp_post_norm=post_norm)).eval()
    window = torch.randint(40, (2, 18))
    with torch.no_grad():
        whole, state = model.decode(window[:, :16], model.new_cache(2, 16))
        drafts = model.decode_mtp(window[:, 1:17], state, model.new_mtp_cache(2, 16))
        loss = torch.nn.functional.cross_entropy(drafts.flatten(0, 1), window[:, 2:].flatten())
        assert loss.item() == pytest.approx(model.losses(window).mtp.item(), rel=1e-5)
        cache = model.new_mtp_cache(2, 16)
        got = [model.decode_mtp(window[:, i + 1 : i + 2], state[:, i : i + 1], cache) for i in range(16)]
    assert (torch.cat(got, dim=1) - drafts).abs().max() <= 1e-5 * drafts.abs().max()
    assert not torch.equal(whole, drafts)


def test_a_shortened_cache_forgets():
    model = model_of().eval()
    tokens, other = torch.randint(40, (2, 1, 12))
    with torch.no_grad():
        cache = model.new_cache(1, 12)
        model.decode(tokens[:, :8], cache)
        model.decode(other[:, 8:], cache)
        cache.length = 8
        got, _ = model.decode(tokens[:, 8:], cache)
        expected = model(tokens)[:, 8:]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_full_cache_says_so():
    model = model_of()
    cache = model.new_cache(1, 4)
    with pytest.raises(ValueError, match="holds 0 of 4 positions, expected room for 5 more"), torch.no_grad():
        model.decode(torch.zeros(1, 5, dtype=torch.long), cache)
    assert cache.length == 0


def test_the_cache_of_deepseek_v3_takes_70272_bytes_a_token():
    from dsv3_kernels.model import PRESETS, DeepSeekV3

    with torch.device("meta"):
        model = DeepSeekV3(PRESETS["v3"]).bfloat16()
        one, two = (model.new_cache(1, tokens).rows.nbytes for tokens in (1, 2))
    assert two - one == one == 70_272


# Sampling


def test_probabilities():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    plain = logits.double().softmax(0)
    assert torch.allclose(Sampling().probabilities(logits), plain, rtol=1e-14, atol=0)
    half = Sampling(temperature=0.5).probabilities(logits)
    assert torch.allclose(half, (2 * logits.double()).softmax(0), rtol=1e-14)
    assert Sampling(temperature=0).probabilities(logits).tolist() == [0, 1, 0, 0]
    ranked = plain.sort(descending=True).values
    just = float(ranked[0]) - 1e-9
    assert Sampling(top_p=just).probabilities(logits).tolist() == [0, 1, 0, 0]
    two = Sampling(top_p=just + 1e-6).probabilities(logits)
    assert two[1:3].tolist() == pytest.approx((ranked[:2] / ranked[:2].sum()).tolist())
    assert two[0] == two[3] == 0
    ties = Sampling(top_p=0.5).probabilities(torch.zeros(4))
    assert ties.tolist() == [0.5, 0.5, 0, 0]
    assert Sampling(temperature=1e-6).probabilities(logits).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected a finite number from 0 up"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_impossible_sampling(given, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**given)


def by_full_forwards(model, prompt, count):
    """Greedy, without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("speculative", [False, True])
def test_greedy_equals_full_forwards(speculative):
    model = model_of().eval()
    for length, count in ((1, 31), (1, 0), (5, 1), (5, 2), (7, 25), (31, 1)):
        prompt = torch.randint(40, (length,)).tolist()
        generator = Generator(model, Sampling(0), speculative=speculative)
        assert list(generator.tokens(prompt, count)) == by_full_forwards(model, prompt, count)


def test_tokens_arrive_one_by_one():
    stream = Generator(model_of().eval()).tokens([1, 2], 10)
    assert len(list(itertools.islice(stream, 3))) == 3


@pytest.mark.parametrize("recipe", [None, FP8])
def test_a_seed_gives_the_same_text(recipe):
    model = model_of() if recipe is None else model_of(recipe=recipe, dtype=torch.bfloat16)
    texts = [list(Generator(model, seed=s).tokens([3], 20)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_speculation_leaves_the_distribution_as_it_was():
    """The first three tokens of many runs, against their probabilities computed by full forwards."""
    sizes = {"vocab_size": 4, "num_hidden_layers": 1, "initializer_range": 0.4}
    model = model_of(dataclasses.replace(SMALL, **sizes)).eval()
    prompt, sampling, runs = [1, 2, 3], Sampling(temperature=1.5), 600
    expected = torch.zeros(4, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        for triple in itertools.product(range(4), repeat=3):
            logits = model(torch.tensor([prompt + list(triple)]))[0]
            p = [sampling.probabilities(logits[2 + i])[t] for i, t in enumerate(triple)]
            expected[triple] = math.prod(float(x) for x in p)
    assert float(expected.sum()) == pytest.approx(1)
    found = torch.zeros_like(expected)
    generator = Generator(model, sampling, seed=int(torch.randint(1 << 30, ())), speculative=True)
    for _ in range(runs):
        found[tuple(generator.tokens(prompt, 3))] += 1
    assert 0 < generator.speculation.accepted < generator.speculation.drafted
    spread = (runs * expected * (1 - expected)).sqrt()
    assert ((found - runs * expected).abs() <= 5 * spread + 1).all()


def test_speculation_on_the_trained_model(trained_tiny):
    """Greedy text is the same with and without, and most drafts are accepted."""
    model, corpus = trained_tiny
    drafted = accepted = 0
    for i in range(50):
        prompt = corpus.validation[997 * i : 997 * i + 16].tolist()
        plain = list(Generator(model, Sampling(0)).tokens(prompt, 12))
        generator = Generator(model, Sampling(0), speculative=True)
        assert list(generator.tokens(prompt, 12)) == plain
        drafted += generator.speculation.drafted
        accepted += generator.speculation.accepted
    assert accepted / drafted > 0.5


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 3, "the prompt is empty"),
        ([0, 40], 3, "holds token 40, expected 0 to vocab_size - 1 = 39"),
        ([-1], 3, "holds token -1"),
        ([0] * 20, 13, r"have 20 \+ 13 tokens, expected at most max_position_embeddings = 32"),
    ],
)
def test_impossible_prompts(prompt, count, message):
    with pytest.raises(ValueError, match=message):
        next(Generator(model_of()).tokens(prompt, count))


def test_speculation_needs_a_module():
    model = model_of(dataclasses.replace(SMALL, num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="no MTP module to speculate with"):
        Generator(model, speculative=True)
