"""Routing: the reference against plain Python, the kernel in the emulator bit-equal to the reference."""

import math
import random

import pytest
import torch
from commit_seed import seeds
from mutate import source

import dsv3_kernels as dk
from dsv3_kernels import emulator, gate, reference
from dsv3_kernels.jit.compile import compile_source, source_options

V3 = {"top_k": 8, "n_group": 8, "topk_group": 4, "scaling": 2.5}
# experts, top_k, n_group, topk_group
SETTINGS = [
    (256, 8, 8, 4),
    (1, 1, 1, 1),
    (8, 2, 4, 2),
    (24, 4, 4, 2),
    (33, 5, 1, 1),
    (64, 64, 8, 8),
    (96, 6, 96, 6),  # a group an expert
    (100, 12, 10, 3),  # four of a group count
    (160, 6, 5, 1),
    (512, 16, 16, 8),
    (510, 9, 102, 9),
]


def options_of(top_k, n_group, topk_group):
    return {"top_k": top_k, "n_group": n_group, "topk_group": topk_group, "scaling": random.uniform(0.5, 3)}


def same(got, want):
    """Bit by bit, but for the payload of NaNs."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if got.is_floating_point():
        assert torch.equal(got.isnan(), want.isnan())
        got, want = (t.nan_to_num(7.0, torch.inf, -torch.inf).view(torch.int32) for t in (got, want))
    assert torch.equal(got, want), f"differ at {(got != want).nonzero()[:5].tolist()}"


def check(scores, bias, options, logits=False, **gpu):
    """The kernel against the reference; returns what it found."""
    with emulator.virtual_gpu(**gpu):
        got = dk.route(scores, bias, logits=logits, **options)
    for g, w in zip(got, dk.route(scores, bias, logits=logits, **options), strict=True):
        same(g, w)
    experts = got.experts
    assert ((experts >= 0) & (experts < bias.shape[0])).all()
    assert (experts[:, 1:] > experts[:, :-1]).all(), "ascending, each once"
    return got


def plain(scores, bias, top_k, n_group, topk_group, scaling):
    """One token in Python's floats (float64)."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(biased) // n_group
    of_group = [sorted(biased[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
    best = sorted(range(n_group), key=lambda g: -math.fsum(of_group[g][: top_k // topk_group]))[:topk_group]
    allowed = [e for e in range(len(biased)) if e // size in best]
    chosen = sorted(sorted(allowed, key=lambda e: -biased[e])[:top_k])
    total = math.fsum(scores[e] for e in chosen) + 1e-20
    return chosen, [scores[e] / total * scaling for e in chosen]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_reference_against_python(setting):
    """Scores and biases are multiples of 2^-10: every sum is exact, and ties are many."""
    (seed,) = seeds(f"routing {setting}", 1)
    torch.manual_seed(seed)
    random.seed(seed)
    experts, options = setting[0], options_of(*setting[1:])
    scores, bias = torch.randint(1, 1024, (40, experts)) / 1024, torch.randint(-200, 200, (experts,)) / 1024
    got = dk.route(scores, bias, **options)
    counts = [0] * experts
    for t in range(40):
        chosen, weights = plain(scores[t].tolist(), bias.tolist(), **options)
        assert got.experts[t].tolist() == chosen
        torch.testing.assert_close(got.weights[t].double(), torch.tensor(weights).double(), rtol=1e-6, atol=0)
        for e in chosen:
            counts[e] += 1
    assert got.counts.tolist() == counts


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_kernel(setting):
    (seed,) = seeds(f"route {setting}", 1)
    print("seed", seed)
    torch.manual_seed(seed)
    random.seed(seed)
    experts, options = setting[0], options_of(*setting[1:])
    logits, bias = torch.randn(11, experts) * 3, torch.randn(experts) * 0.1
    routed = check(reference.sigmoid(logits), bias, options, seed=seed)
    assert routed.counts.sum() == routed.experts.numel()
    check(logits, bias, options, logits=True)
    check((logits * 2).round() / 8, (bias * 8).round() / 8, options)  # ties, negative scores, zeros
    check(torch.zeros(3, experts), torch.zeros(experts), options)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_no_score_leads_out_of_range(setting):
    (seed,) = seeds(f"ugly {setting}", 1)
    print("seed", seed)
    torch.manual_seed(seed)
    random.seed(seed)
    experts, options = setting[0], options_of(*setting[1:])
    ugly = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 0.5])
    scores = ugly[torch.randint(len(ugly), (12, experts))]
    scores[0], scores[1], scores[2], scores[3] = torch.nan, torch.inf, -torch.inf, -torch.nan
    scores[4] = 0.5
    scores[4, experts // 2] = torch.nan
    for bias in (torch.zeros(experts), ugly[torch.randint(len(ugly), (experts,))]):
        check(scores, bias, options)
        check(scores, bias, options, logits=True)
    routed = dk.route(scores, torch.zeros(experts), **options)
    assert experts // 2 in routed.experts[4] and routed.weights[4].isnan().all()


def test_from_logits_is_the_sigmoid_first():
    logits, bias = torch.randn(50, 256) * 4, torch.randn(256) * 0.1
    for a, b in zip(
        dk.route(logits, bias, logits=True, **V3),
        dk.route(reference.sigmoid(logits), bias, **V3),
        strict=True,
    ):
        same(a, b)


def test_more_tokens_than_warps(monkeypatch):
    monkeypatch.setattr(gate, "MAX_GRID", 2)
    gate._prepared.cache_clear()
    try:
        check(torch.rand(37, 64), torch.randn(64), {"top_k": 4, "n_group": 4, "topk_group": 2})
    finally:
        gate._prepared.cache_clear()


def test_no_tokens():
    routed = check(torch.zeros(0, 256), torch.zeros(256), V3)
    assert routed.experts.shape == (0, 8) and not routed.counts.any()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()

    def step(scores, bias):
        routed = dk.route(scores * 1, bias, **V3)
        return routed.experts, routed.weights * 2, routed.counts

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for tokens in (5, 9):
        scores, bias = torch.rand(tokens, 256), torch.randn(256)
        for a, b in zip(compiled(scores, bias), step(scores, bias), strict=True):
            same(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k is 0, expected 1 or more"),
        ({"top_k": 6}, ValueError, "top_k is 6, expected a multiple of topk_group = 4"),
        ({"top_k": 132}, ValueError, "top_k is 132, expected at most 128, the experts of 4 groups"),
        ({"n_group": 7}, ValueError, "n_group is 7, expected a divisor of E = 256"),
        ({"topk_group": 16, "top_k": 16}, ValueError, "topk_group is 16, expected at most n_group = 8"),
        ({"n_group": 8.0}, TypeError, "n_group is 8.0 of type float, expected an int"),
        ({"topk_group": True}, TypeError, "topk_group is True of type bool, expected an int"),
        ({"scaling": math.nan}, ValueError, "scaling is nan, expected a finite number"),
        ({"scaling": "2"}, TypeError, "scaling is '2' of type str, expected a float"),
        ({"logits": 1}, TypeError, "logits is 1 of type int, expected True or False"),
    ],
)
def test_wrong_numbers(change, error, message):
    with pytest.raises(error, match=f"^route: {message}"):
        dk.route(torch.zeros(2, 256), torch.zeros(256), **V3 | change)


def test_wrong_tensors():
    good, bias = torch.zeros(2, 256), torch.zeros(256)
    with pytest.raises(ValueError, match="^route: scores has E = 513, expected 1 to 512 experts"):
        dk.route(torch.zeros(2, 513), torch.zeros(513), top_k=1)
    with pytest.raises(TypeError, match="^route: bias has dtype torch.bfloat16, expected torch.float32"):
        dk.route(good, bias.bfloat16(), **V3)
    with pytest.raises(ValueError, match="^route: bias has stride"):
        dk.route(good, torch.zeros(512)[::2], **V3)
    with pytest.raises(ValueError, match="^route: scores requires grad"):
        dk.route(good.requires_grad_(), bias, **V3)


MUTATIONS = {
    "ties go to the higher index": ("for (u32 i = kCount; i-- > 0;)", "for (u32 i = 0; i < kCount; ++i)"),
    "the bias weighs too": ("score[i] = kFromLogits ? sigmoid(v) : v;", "score[i] = v + bias[expert];"),
    "the best stays": ("if (index % 32 == lane) open &= ~(1u << index / 32);", ""),
    "groups are not asked": ("if (best_groups < groups) {", "if (best_groups > groups) {"),
    "one of a group counts": ("min(top_k / best_groups, size)", "1"),
    "NaN is low": ("if (v != v) return ~0u;", "if (v != v) return 0;"),
    "negative keys ascend": ("bits >> 31 ? ~bits", "bits >> 31 ? bits & 0x7fffffff"),
    "a row starts anew each 32 experts": ("row += __popc(lanes);", ""),
    "the scaling is lost": ("ptx::div_rn(score[i], sum), scaling", "ptx::div_rn(score[i], sum), 1.0f"),
    "counts are set": ("atomicAdd(counts + 32 * i + lane, 1);", "counts[32 * i + lane] = 1;"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name):
    text = source("gate.cuh", *MUTATIONS[name])
    compiled = compile_source(text, ("dsv3::route<2, false>",), source_options())
    assert not all(right(compiled, seed) for seed in seeds(name, 20))


def right(compiled, seed):
    """Whether the kernel gives what the reference does on many ties, negative keys and a NaN."""
    torch.manual_seed(seed)
    scores, bias = torch.randint(-8, 8, (40, 64)) / 8, torch.randint(-8, 8, (64,)) / 8
    scores[3, 60] = torch.nan
    want = dk.route(scores, bias, top_k=8, n_group=8, topk_group=4, scaling=2.5)
    got = torch.full((40, 8), -1), torch.full((40, 8), torch.nan), torch.zeros(64, dtype=torch.int32)
    arguments = (scores, bias, *got, 40, 64, 8, 4, 8, 2.5)
    try:
        emulator.VirtualGPU(seed=1).launch(
            compiled.ptx, compiled.names[0], grid=(5, 1, 1), block=(256, 1, 1), args=arguments
        )
        for g, w in zip(got, want, strict=True):
            same(g, w)
    except (emulator.EmulationError, AssertionError):
        return False
    return True


def test_the_kernel_as_it_is_is_right():
    compiled = compile_source(source("gate.cuh"), ("dsv3::route<2, false>",), source_options())
    assert all(right(compiled, seed) for seed in seeds("route", 5))


def test_the_launch_constants_are_those_of_the_kernel():
    compile_source(
        f'#include "gate.cuh"\nstatic_assert(dsv3::gate::kThreads == {gate.THREADS});', (), source_options()
    )
