"""Low latency when something is wrong: a rank that dies, a link that fails, experts that are none."""

import functools
import random

import pytest
import torch
from cases import Case, draw
from fp8_helpers import fresh_generator
from low_latency_runs import Form, check, dispatch, one_round
from test_low_latency import SECONDS, buffer_of, run

from dsv3_kernels import emulator, ep, launch
from dsv3_kernels.ep import Topology
from dsv3_kernels.ep import low_latency_reference as reference

TOPOLOGIES = [(1, 3), (3, 1), (2, 2)]
TRIALS = [*range(4), *(pytest.param(trial, marks=pytest.mark.long) for trial in range(4, 50))]
DEAD = 1000  # messages: more than there are
FORMS = [Form(hook=True), Form(), Form(hook=True)]


def case_of(nodes, gpus):
    case = Case(Topology(nodes, gpus), local_experts=2, hidden=32, num_topk=2, tokens=6, seed=1)
    return case, [draw(case, round_) for round_ in range(3)]


@functools.cache
def spent_of(nodes, gpus):
    """By three rounds without trouble."""
    case, rounds = case_of(nodes, gpus)
    return run(case, rounds, FORMS, 0)[0].counters


def in_time(cluster, spent):
    """One wait, and the while that all have to say whom they miss.

    Where nothing moves the clock jumps, by up to as far again.
    """
    assert cluster.counters["nanoseconds"] - spent["nanoseconds"] < 2.5 * SECONDS * 1e9


@pytest.mark.parametrize("trial", TRIALS)
def test_a_killed_rank_is_named_by_all_in_time(trial):
    nodes, gpus = TOPOLOGIES[trial % 3]
    (case, rounds), spent = case_of(nodes, gpus), spent_of(nodes, gpus)
    chance = random.Random(fresh_generator().initial_seed() + trial)
    victim, step = chance.randrange(nodes * gpus), chance.randrange(spent["instructions"] // 2)
    cluster, errors = faulty_run(case, rounds, FORMS, trial, lambda c: c.kill(victim, step))
    at = (nodes, gpus, victim, step, errors)
    survivors = {rank: error for rank, error in errors.items() if rank != victim}
    assert len(survivors) == nodes * gpus - 1, at
    for rank, error in survivors.items():
        assert error.peers == (victim,) and error.rank == rank and error.role in ("send", "receive"), at
    in_time(cluster, spent)


@pytest.mark.parametrize("trial", TRIALS)
def test_a_link_that_loses_a_message_or_dies(trial):
    """Who gives up names one of the link's two ends, the other one if it is an end itself."""
    nodes, gpus = TOPOLOGIES[1 + trial % 2]
    (case, rounds), spent = case_of(nodes, gpus), spent_of(nodes, gpus)
    chance = random.Random(fresh_generator().initial_seed() + trial)
    source, target = chance.choice(sorted(spent["links"]))
    message = chance.randrange(spent["links"][source, target]["messages"])
    lost = range(message, message + (1 if trial // 2 % 2 else DEAD))

    def fail(cluster):
        for number in lost:
            cluster.drop(source, target, number)

    cluster, errors = faulty_run(case, rounds, FORMS, trial, fail)
    for rank, error in errors.items():  # the last messages of all are missed by nobody
        assert set(error.peers) <= {source, target} and error.peers != (rank,), (source, target, errors)
    in_time(cluster, spent)


def test_a_lost_message_is_named():
    """A row, a flag, an ack: the rank that waits for it says for whom."""
    case = Case(Topology(2, 1), "single expert", local_experts=1, hidden=32, num_topk=2, tokens=3, seed=5)
    rounds = [draw(case, round_) for round_ in range(4)]
    rows = int((rounds[0].topk_idx[0] == 1).sum())
    for message in (0, rows, rows + 1):  # of rank 0: rows of its tokens, their flag; then an ack
        _, errors = faulty_run(case, rounds, [Form()] * 4, 0, lambda c, m=message: c.drop(0, 1, m))
        assert errors[1].peers == (0,), (message, errors)
        assert errors[1].op == "low_latency_dispatch" or message > rows


def test_a_link_that_stands_still_for_a_while():
    case = Case(Topology(2, 2), local_experts=2, hidden=32, num_topk=2, tokens=4, seed=6)
    rounds, forms = [draw(case, round_) for round_ in range(3)], [Form(), Form(hook=True), Form(fp8=False)]
    for source, destination in ((0, 2), (3, 1)):
        cluster, by_rank = run(
            case, rounds, forms, 1, lambda c, a=source, b=destination: c.stall(a, b, until=200_000)
        )
        assert cluster.counters["nanoseconds"] > 200_000
        for i, (inputs, form) in enumerate(zip(rounds, forms, strict=True)):
            check(case, inputs, i, form, [got[i] for got in by_rank])


def faulty_run(case, rounds, forms, seed, fault):
    """The cluster, and which rank raised which TimeoutError.

    No hang: the emulator calls an endless wait a deadlock.
    """
    cluster = emulator.VirtualCluster(case.topology.nodes, case.topology.gpus_per_node, seed, num_sms=4)
    fault(cluster)
    errors = {}

    def program(rank, group):
        buffer = buffer_of(case, group)
        try:
            for i, (inputs, form) in enumerate(zip(rounds, forms, strict=True)):
                one_round(buffer, case, inputs, i, rank, form)
        except ep.TimeoutError as error:
            errors[rank] = error
            with pytest.raises(ep.TimeoutError):  # and again at every later call
                buffer.low_latency_dispatch(rounds[0].x[rank], rounds[0].topk_idx[rank], 2)

    cluster.run(program)
    return cluster, errors


def test_bad_experts_are_left_out_and_reported():
    case = Case(Topology(2, 2), local_experts=2, hidden=32, num_topk=3, tokens=6, seed=4)
    good = draw(case)
    for bad in (-2, case.num_experts, 1 << 40, -(1 << 62), "twice"):
        wrong = draw(case)
        idx = wrong.topk_idx[1]
        idx[2] = torch.tensor([3, 5, 6])
        idx[2, 1] = 3 if bad == "twice" else bad
        good.topk_idx[1] = idx.clone()
        good.topk_idx[1][2, 1] = -1

        def program(rank, group, wrong=wrong, bad=bad):
            buffer = buffer_of(case, group)
            if rank == 1:
                at = rf"topk_idx\[2, 1\] of rank 1 is {3 if bad == 'twice' else bad}, "
                with pytest.raises(ep.errors.Fault, match=at):
                    buffer.low_latency_dispatch(wrong.x[rank], wrong.topk_idx[rank], 2)
                sent = dispatch(buffer, wrong, rank, Form())
                with pytest.raises(ep.errors.Fault, match=at):
                    sent.hook()
                sent.hook()
            else:
                buffer.low_latency_dispatch(wrong.x[rank], wrong.topk_idx[rank], 2)
                got = buffer.low_latency_dispatch(wrong.x[rank], wrong.topk_idx[rank], 2)
                want = reference.dispatch(good.topk_idx, case.num_experts)[rank]
                assert torch.equal(got.tokens_per_expert, want.tokens_per_expert)
            launch.synchronize()  # what was told is not told again
            return one_round(buffer, case, good, 1, rank, Form())

        by_rank = emulator.VirtualCluster(2, 2, 0, num_sms=4).run(program)
        check(case, good, 1, Form(), by_rank)
