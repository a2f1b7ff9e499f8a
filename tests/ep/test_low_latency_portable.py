"""Low latency over torch.distributed: the rows and sums of the kernels, in processes and alone."""

import random

import pytest
import ranks
import torch
from cases import ROUTINGS, Case, draw
from fp8_helpers import fresh_generator
from low_latency_runs import Form, check, one_round, two_rounds

from dsv3_kernels import ep
from dsv3_kernels.ep import Topology


def cases_of(size, seed):
    chance = random.Random(seed)
    for i, routing in enumerate(ROUTINGS):
        case = Case(
            Topology(1, size),
            routing,
            local_experts=chance.choice([1, 3]),
            hidden=chance.choice([32, 144, 256]),
            num_topk=chance.choice([1, 3, 8]),
            tokens=chance.choice([3, 9]),
            seed=seed * 100 + i,
        )
        fp8 = chance.random() < 0.6
        yield case, Form(fp8, fp8 and chance.random() < 0.5, chance.random() < 0.5)


def program(rank, size, seed):
    outputs = []
    for case, form in cases_of(size, seed):
        buffer = ep.Buffer(None, case.num_experts, case.hidden, case.tokens, case.topk)
        rounds = [draw(case, round_) for round_ in range(3)]
        got = [one_round(buffer, case, inputs, i, rank, form) for i, inputs in enumerate(rounds)]
        got += two_rounds(buffer, case, rounds[:2], rank, form)
        outputs.append(got)
    return outputs


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bit_equal_to_the_reference(tmp_path, size):
    seed = fresh_generator().initial_seed() % (1 << 20)
    by_rank = [program(0, 1, seed)] if size == 1 else ranks.run(tmp_path / "ranks", size, program, seed)
    for i, (case, form) in enumerate(cases_of(size, seed)):
        for j, round_ in enumerate((0, 1, 2, 0, 1)):
            check(case, draw(case, round_), round_, form, [outputs[i][j] for outputs in by_rank])


def disagreeing(rank, size):
    buffer = ep.Buffer(None, 4, 32, 4, 2)
    x, idx = torch.ones(2, 32).bfloat16(), torch.tensor([[0, 3], [1, 2]])
    with pytest.raises(ValueError, match=r"on rank 0 and \[False, False\] on rank 1, expected the same"):
        buffer.low_latency_dispatch(x, idx, fp8=rank == 0)
    wrong = idx.clone()
    wrong[1, 0] = 4 if rank == 1 else 1
    with pytest.raises(ValueError, match=r"topk_idx\[1, 0\] of rank 1 is wrong, expected distinct experts"):
        buffer.low_latency_dispatch(x, wrong)
    got = buffer.low_latency_dispatch(x, idx)  # and the buffer is as good as before
    assert got.tokens_per_expert.tolist() == [2, 2]


def test_ranks_that_disagree(tmp_path):
    ranks.run(tmp_path / "ranks", 2, disagreeing)


def leaving(rank, size):
    buffer = ep.Buffer(None, 4, 32, 4, 2, timeout=2.0)
    x, idx = torch.ones(2, 32).bfloat16(), torch.tensor([[0, 3], [1, 2]])
    buffer.low_latency_dispatch(x, idx)
    if rank == 1:
        return
    with pytest.raises(ep.TimeoutError) as error:
        buffer.low_latency_dispatch(x, idx)
    assert error.value.op == "low_latency_dispatch" and error.value.peers == (1,)


def test_a_rank_that_leaves_is_named(tmp_path):
    ranks.run(tmp_path / "ranks", 2, leaving)
