"""The kernels across nodes when a rank dies or a link fails: all others end in time, and name who."""

import random

import pytest
import torch
from cases import Case, draw
from fp8_helpers import fresh_generator
from internode_cluster import SECONDS, Cluster

from dsv3_kernels import emulator, ep, quantize_1x128
from dsv3_kernels.ep import Topology, kernels

CASE = Case(Topology(2, 2), local_experts=2, hidden=32, num_topk=3, tokens=8, seed=2)
DEAD = 1000  # messages: more than there are
TRIALS = [*range(4), *(pytest.param(trial, marks=pytest.mark.long) for trial in range(4, 50))]


def a_cluster(seed):
    return Cluster(CASE, seed, 2, chunk=2, depth=2, warps=4)


@pytest.fixture(scope="module")
def healthy():
    """Three rounds without trouble, and what they took."""
    rounds = [draw(CASE, round_) for round_ in range(3)]
    cluster = a_cluster(0)
    cluster.run(rounds)
    return rounds, cluster.cluster.counters


def records(cluster, rounds, survivors):
    """What the survivors say. Those that neither finished nor say anything would have hung."""
    cluster.run(rounds)
    found = cluster.failures()
    for rank, record in found.items():
        assert record.role in (1, 2, 3) and record.channel == 0, record
        assert record.peer != rank and record.seen < record.expected, record
    for rank in survivors - found.keys():
        assert cluster.links[rank].peers.sequence[:, 0].tolist() == [3, 3], rank
    return found


def in_time(cluster, spent):
    """One wait, and the while that all have to say whom they miss, however long the row of waits.

    Where nothing moves the clock jumps, by up to as far again.
    """
    waited = cluster.cluster.counters["nanoseconds"] - spent["nanoseconds"]
    assert waited < 2.5 * SECONDS * 1e9, waited


@pytest.mark.parametrize("trial", TRIALS)
def test_a_killed_rank(trial, healthy):
    rounds, spent = healthy
    chance = random.Random(fresh_generator().initial_seed() + trial)
    cluster, victim = a_cluster(trial), chance.randrange(4)
    step = chance.randrange(spent["instructions"] * 3 // 4)
    cluster.cluster.kill(victim, step)
    found = records(cluster, rounds, {0, 1, 2, 3} - {victim})
    found.pop(victim, None)
    assert found and {record.missing for record in found.values()} == {victim}, (victim, step, found)
    in_time(cluster, spent)


def in_a_circle(found):
    """Whether every rank waits, and from any of them one comes to all others."""
    rank = min(found, default=0)
    seen = [rank := found[rank].peer for _ in found if rank in found]
    return len(found) == 4 and len(set(seen)) == 4


@pytest.mark.parametrize("trial", TRIALS)
def test_a_link_that_loses_a_message_or_dies(trial, healthy):
    """Who gives up names one of its two ends, the other one if it is an end itself.

    With a message a queue pair loses what comes behind it. Where all wait for each other in one circle nobody
    can know its weak link: then the first to give up says whom it missed.
    """
    rounds, spent = healthy
    chance = random.Random(fresh_generator().initial_seed() + trial)
    cluster = a_cluster(trial)
    source, node = chance.randrange(4), 2
    target = (source + node) % 4
    first = chance.randrange(spent["links"][source, target]["messages"])
    for number in range(first, first + (1 if trial % 2 else DEAD)):
        cluster.cluster.drop(source, target, number)
    found = records(cluster, rounds, {0, 1, 2, 3})
    for rank, record in found.items():  # the last credits of all are missed by nobody
        ends = set(found) if in_a_circle(found) else {source, target}
        assert record.missing in ends - {rank}, (source, target, rank, record)
    if found:
        in_time(cluster, spent)


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
        buffer = ep.Buffer(group, 8, 32, 8, 3, gpus_per_node=2, timeout=SECONDS)
        if rank == 3:
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
            return
        with pytest.raises(
            ep.TimeoutError, match=rf"dispatch: rank {rank} \((send|receive|forward), channel 0\)"
        ):
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
        with pytest.raises(ep.TimeoutError):
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
        return buffer.status().failure

    said = cluster.run(program)[:3]
    assert any("for rank 3" in text for text in said), said


@pytest.mark.parametrize("nodes, gpus", [(2, 1), (2, 2)])
def test_a_handle_with_rows_of_another_form_is_an_error_on_every_rank(nodes, gpus):
    """Also on one that no rows come to; and the buffer stays good."""
    case = Case(Topology(nodes, gpus), local_experts=2, hidden=32, num_topk=2, tokens=8, seed=2)
    inputs = draw(case)

    def program(rank, group):
        buffer = ep.Buffer(group, case.num_experts, 32, 8, 2, gpus_per_node=gpus)
        x = inputs.x[rank]
        for idx in (inputs.topk_idx[rank], torch.full_like(inputs.topk_idx[rank], -1)):
            got = buffer.dispatch(x, idx, num_sms=4)
            again = quantize_1x128(x) if rank == 1 else x
            said = "rank . passes BF16 x" if rank == 1 else "rank 1 passes FP8 x"
            with pytest.raises(ValueError, match=said):
                buffer.dispatch(again, handle=got.handle, num_sms=2)
            again = buffer.dispatch(-x, handle=got.handle, num_sms=2)
            assert torch.equal(again.x.view(torch.uint16), (-got.x).view(torch.uint16))
        assert buffer.status().failure is None

    emulator.VirtualCluster(nodes, gpus, 3, num_sms=4).run(program)
