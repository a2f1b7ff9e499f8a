"""The reference of the all-to-all against what it must be: complete, ordered, summed in the one order."""

import pytest
import torch
from cases import ROUTINGS, Case, draw, results
from fp8_helpers import fresh_generator

from dsv3_kernels.ep import Topology, reference


@pytest.mark.parametrize("expert_order", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_every_choice_arrives_once_in_order_and_comes_home(shape, routing, expert_order):
    seed = fresh_generator().initial_seed() % (1 << 30)
    case = Case(Topology(*shape), routing, expert_order=expert_order, seed=seed)
    inputs, size = draw(case), case.topology.size
    got = reference.dispatch(
        inputs.x, inputs.topk_idx, inputs.topk_weights, case.num_experts, expert_order=expert_order
    )
    arrived = []
    for rank, part in enumerate(got):
        first = rank * case.local_experts
        keys = []
        for row, (source, token, k) in enumerate(part.origin):
            assert torch.equal(part.x[row], inputs.x[source][token])
            chosen = inputs.topk_idx[source][token]
            if expert_order:
                assert part.topk_idx[row] + first == chosen[k]
                assert part.topk_weights[row] == inputs.topk_weights[source][token, k]
                keys.append((int(part.topk_idx[row]), source, token))
                arrived.append((source, token, k))
                continue
            keys.append((source, token))
            for slot, expert in enumerate(chosen.tolist()):
                here = first <= expert < first + case.local_experts
                assert part.topk_idx[row, slot] == (expert - first if here else -1)
                assert part.topk_weights[row, slot] == (inputs.topk_weights[source][token, slot] * here)
                arrived += [(source, token, slot)] * here
        assert keys == sorted(set(keys))
        assert part.tokens_per_expert.sum() == (part.topk_idx >= 0).sum()
        if expert_order:
            assert torch.equal(
                torch.bincount(part.topk_idx, minlength=case.local_experts).int(), part.group_offsets.diff()
            )
    sent = [(s, t, k) for s in range(size) for t, k in (inputs.topk_idx[s] >= 0).nonzero().tolist()]
    assert sorted(arrived) == sent

    y = [results(case, 0, rank, len(part.origin))[0] for rank, part in enumerate(got)]
    weights = [part.topk_weights for part in got] if expert_order else None
    counts = [t.shape[0] for t in inputs.topk_idx]
    home = reference.combine(y, got, counts, case.topology, weights, inputs.bias)
    total, size_of = ([bias.double().clone() for bias in inputs.bias] for _ in range(2))
    size_of = [t.abs() for t in size_of]
    for rank, part in enumerate(got):
        for row, (source, token, _) in enumerate(part.origin):
            term = y[rank][row].double() * (1.0 if weights is None else weights[rank][row].double())
            total[source][token] += term
            size_of[source][token] += term.abs()
    for mine, exact, bound in zip(home, total, size_of, strict=True):
        assert ((mine.double() - exact).abs() <= 3 * 2.0**-8 * bound).all()


def combined(topology, idx, values, bias=None):
    """What one token of rank 0 gets when values[k] comes back from expert idx[k]; a rank has two experts."""
    local = 2
    experts, topk = topology.size * local, len(idx)
    x = [torch.ones(1, 16).bfloat16()] + [torch.ones(0, 16).bfloat16()] * (topology.size - 1)
    choice = [torch.tensor([idx])] + [torch.zeros(0, topk, dtype=torch.int64)] * (topology.size - 1)
    got = reference.dispatch(x, choice, None, experts)
    y = [
        torch.tensor([values[k] for _, _, k in part.origin]).bfloat16().unsqueeze(1).expand(-1, 16)
        for part in got
    ]
    bias = None if bias is None else [torch.full((len(t), 16), bias).bfloat16() for t in x]
    return reference.combine(y, got, [len(t) for t in x], topology, bias=bias)[0][0, 0].item()


def test_where_combine_rounds():
    """Between 256 and 512 BF16 steps by 2, and 257 rounds to 256."""
    assert combined(Topology(1, 4), [0, 2, 4], [256.0, 1.0, 1.0]) == 258.0  # in FP32 over a node's ranks
    assert combined(Topology(2, 2), [0, 2, 4], [256.0, 1.0, 1.0]) == 256.0  # node 0 rounds before node 1
    assert combined(Topology(1, 4), [0, 1, 2], [256.0, 1.0, 1.0]) == 256.0  # rank 0 rounds before rank 1
    assert combined(Topology(4, 1), [0, 2, 4], [256.0, 1.0, 1.0]) == 258.0  # in FP32 over the nodes
    assert combined(Topology(1, 4), [4, 0, 2], [2.0**-30, -1.0, 1.0]) == 2.0**-30  # by rank, not by k
    assert combined(Topology(1, 4), [0, 2, 4], [2.0**-30, -1.0, 1.0]) == 0.0
    assert combined(Topology(1, 1), [1, 0], [1.0, 256.0], bias=1.0) == 256.0  # the bias joins after rounding


def test_a_sum_of_negative_zeros_is_positive():
    value = combined(Topology(1, 2), [0, 2], [-0.0, -0.0])
    assert str(value) == "0.0"
