"""The lean kernels when a rank dies or a link fails: all others end in time, and one names who."""

import random

import pytest
from cases import Case, draw
from fp8_helpers import fresh_generator
from internode_cluster import SECONDS, check
from lean_cluster import ALL, LeanCluster, compiled

from dsv3_kernels import emulator, ep
from dsv3_kernels.ep import Topology, kernels

CASE = Case(Topology(2, 2), local_experts=2, hidden=32, num_topk=3, tokens=8, seed=2)
TRIALS = [*range(3), *(pytest.param(trial, marks=pytest.mark.long) for trial in range(3, 50))]


def a_cluster(seed):
    return LeanCluster(CASE, seed, 1, 1)


@pytest.fixture(scope="module")
def healthy():
    """Two rounds without trouble, and what they took."""
    rounds = [draw(CASE, round_) for round_ in range(2)]
    cluster = a_cluster(0)
    cluster.run(rounds, compiled(*ALL))
    return rounds, cluster.cluster.counters


def records(cluster, rounds, survivors):
    """What the survivors say. Those that neither finished nor say anything would have hung."""
    out = cluster.run(rounds, compiled(*ALL))
    found = cluster.failures()
    for rank, record in found.items():
        assert record.role in (1, 2, 3) and record.channel == 0, record
        assert record.peer != rank and record.seen < record.expected, record
    for rank in survivors - found.keys():
        assert cluster.links[rank].peers.sequence[:, 0].tolist() == [2, 2], rank
    if not found:
        for round_, got in enumerate(out):
            check(cluster, round_, got)
    return found


@pytest.mark.parametrize("trial", TRIALS)
def test_a_killed_rank(trial, healthy):
    rounds, spent = healthy
    chance = random.Random(fresh_generator().initial_seed() + trial)
    cluster, victim = a_cluster(trial), chance.randrange(4)
    step = chance.randrange(spent["instructions"] * 3 // 4)
    cluster.cluster.kill(victim, step)
    found = records(cluster, rounds, {0, 1, 2, 3} - {victim})
    assert victim in {record.missing for rank, record in found.items() if rank != victim}, (victim, step)
    assert cluster.cluster.counters["nanoseconds"] - spent["nanoseconds"] < 5 * SECONDS * 1e9


@pytest.mark.parametrize("trial", TRIALS)
def test_a_lost_message(trial, healthy):
    """Whoever misses it names the rank at the other end; the queue pair delivers nothing more."""
    rounds, spent = healthy
    chance = random.Random(fresh_generator().initial_seed() + trial)
    cluster = a_cluster(trial)
    source = chance.randrange(4)
    target = (source + 2) % 4
    cluster.cluster.drop(source, target, chance.randrange(spent["links"][source, target]["messages"]))
    found = records(cluster, rounds, {0, 1, 2, 3})
    if found:  # the last acknowledgements are missed by nobody
        ends = {(target, source), (source, target)}
        assert {(rank, record.missing) for rank, record in found.items()} & ends


def test_a_stalled_link_that_comes_back(healthy):
    rounds, _ = healthy
    cluster = a_cluster(1)
    cluster.cluster.stall(0, 2, until=int(SECONDS * 5e8))
    assert not records(cluster, rounds, {0, 1, 2, 3})
    waits = [stall for stall in kernels.stalls(cluster.links[2].peers) if stall.peer == 0]
    assert max(stall.seconds for stall in waits) > SECONDS / 4


def test_the_buffer_says_who_and_in_which_role():
    inputs = draw(CASE)
    cluster = emulator.VirtualCluster(2, 2, 0, num_sms=2)
    cluster.kill(3)

    def program(rank, group):
        sizes = CASE.num_experts, CASE.hidden, CASE.tokens, CASE.topk
        buffer = ep.Buffer(group, *sizes, gpus_per_node=2, timeout=SECONDS, internode="lean")
        if rank == 3:
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
            return
        told = rf"dispatch: rank {rank} \((send|receive|forward), channel [0-3]\)"
        with pytest.raises(ep.TimeoutError, match=told):
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
        with pytest.raises(ep.TimeoutError):
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
        return buffer.status().failure

    said = cluster.run(program)[:3]
    assert any("for rank 3" in text for text in said), said
