"""The lean combine when a rank dies or a link fails: all others end in time, and name who."""

import random

import pytest
from cases import Case, draw
from fp8_helpers import fresh_generator
from internode_cluster import check
from lean_combine_cluster import LeanCombine
from test_ep_internode_faults import DEAD, in_time

from dsv3_kernels.ep import Topology

CASE = Case(Topology(2, 2), local_experts=2, hidden=32, num_topk=3, tokens=6, seed=2)
TIMES = 4
TRIALS = [0, 1, *(pytest.param(trial, marks=pytest.mark.long) for trial in range(2, 50))]


def a_cluster(seed):
    return LeanCombine(CASE, seed, stages=1 + seed % 3, times=TIMES, warps=2)


@pytest.fixture(scope="module")
def healthy():
    """(Counters, instructions of the dispatch alone)."""
    cluster, dispatch = a_cluster(0), a_cluster(0)
    check(cluster, 0, cluster.run([draw(CASE)])[0])
    dispatch.run([draw(CASE)], combine=False)
    return cluster.cluster.counters, dispatch.cluster.counters


def records(cluster, survivors):
    """What the survivors say. Those that neither finished nor say anything would have hung."""
    cluster.run([draw(CASE)])
    found = cluster.failures()
    for rank, record in found.items():
        assert record.role in (1, 2, 3) and record.channel == 0, record
        assert record.missing != rank and record.seen < record.expected, record
    for rank in survivors - found.keys():
        assert cluster.links[rank].peers.sequence[:, 0].tolist() == [1, TIMES], rank
    return found


@pytest.mark.parametrize("trial", TRIALS)
def test_a_killed_rank(trial, healthy):
    spent, dispatch = healthy
    chance = random.Random(fresh_generator().initial_seed() + trial)
    cluster, victim = a_cluster(trial), chance.randrange(4)
    first, last = dispatch["instructions"], spent["instructions"]
    step = chance.randrange(first, first + (last - first) * 3 // 4)
    cluster.cluster.kill(victim, step)
    found = records(cluster, {0, 1, 2, 3} - {victim})
    found.pop(victim, None)
    assert found and {record.missing for record in found.values()} == {victim}, (victim, step, found)
    in_time(cluster, spent)


@pytest.mark.parametrize("trial", TRIALS)
def test_a_link_that_loses_a_message_or_dies(trial, healthy):
    """Who gives up names one of its two ends, the other one if it is an end itself."""
    spent, dispatch = healthy
    chance = random.Random(fresh_generator().initial_seed() + trial)
    cluster, source = a_cluster(trial), chance.randrange(4)
    target = (source + 2) % 4
    messages = [counters["links"][source, target]["messages"] for counters in (dispatch, spent)]
    first = chance.randrange(*messages)
    for number in range(first, first + (1 if trial % 2 else DEAD)):
        cluster.cluster.drop(source, target, number)
    found = records(cluster, {0, 1, 2, 3})
    for rank, record in found.items():  # the last acknowledgement is missed by nobody
        assert record.missing in {source, target} - {rank}, (source, target, rank, record)
    if found:
        in_time(cluster, spent)
