"""csrc/kernels/combine_lean.cuh in the emulator: bit for bit the reference, and the bytes that it moves."""

import collections
import itertools
import random

import pytest
from cases import BETWEEN_NODES, Case, draw
from fp8_helpers import fresh_generator
from internode_cluster import check
from lean_combine_cluster import LeanCombine
from test_ep_internode import TOPOLOGIES
from test_nvshmem_kernels import doorbells

from dsv3_kernels.ep import Topology, lean_combine


def is_right(topology, routing, seed):
    """Three rounds in which the ranks drift apart; whatever else there is to choose, by the seed."""
    chance = random.Random(seed)
    case = Case(
        Topology(*topology),
        routing,
        local_experts=chance.choice([1, 2, 3]),
        hidden=chance.choice([32, 144, 1800]),  # the last one takes two pieces
        num_topk=chance.choice([1, 3, 4]),
        tokens=chance.choice([3, 7]),
        expert_order=chance.random() < 0.6,
        weights=chance.random() < 0.7,
        seed=seed,
    )
    # More channels than warps, fewer, as many; the rings' dispatch has one for two SMs.
    sms, pairs, stages = chance.choice([1, 2]), chance.choice([1, 2]), chance.choice([1, 2, 3, 5])
    schedule = chance.choice(["random", "random", "pct"])
    cluster = LeanCombine(case, seed, chance.choice([2, 4, 6]), sms, pairs, stages, schedule=schedule)
    for round_, out in enumerate(cluster.run([draw(case, round_) for round_ in range(3)])):
        check(cluster, round_, out)
    assert not cluster.failures() and not cluster.faults(), f"{case}, seed {seed}"


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_bit_equal_to_the_reference(topology):
    seed = fresh_generator().initial_seed() % (1 << 30)
    ranks = topology[0] * topology[1]
    for i, routing in enumerate(random.Random(seed).sample(BETWEEN_NODES, {2: 4, 4: 2}.get(ranks, 1))):
        is_right(topology, routing, seed + i)


@pytest.mark.long
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_thousand_seeds(topology):
    seed = fresh_generator().initial_seed() % (1 << 30)
    for i in range(1000):
        is_right(topology, BETWEEN_NODES[i % len(BETWEEN_NODES)], seed + i)


@pytest.mark.parametrize("hidden, gradients", [(7168, False), (144, True)])
def test_bytes(hidden, gradients):
    """A token home: a row from each rank over NVLink, from each other node over InfiniBand, with 4 bytes a
    choice if gradients travel. Words: a tail for four rows of a stream, and one acknowledgement."""
    case = Case(Topology(2, 2), local_experts=4, hidden=hidden, num_topk=8, tokens=6, seed=int(gradients))
    inputs = draw(case)
    dispatched, both = LeanCombine(case, 0), LeanCombine(case, 0, pairs=1, stages=3)
    dispatched.run([inputs], combine=False)
    check(both, 0, both.run([inputs])[0])
    dispatched, both = dispatched.cluster.counters, both.cluster.counters
    rows, numbers = collections.Counter(), collections.Counter()  # by (from, to, home's node)
    for home, idx in enumerate(inputs.topk_idx):
        for experts in idx.tolist():
            ranks = collections.Counter(expert // 4 for expert in experts if expert >= 0)
            for node in {rank // 2 for rank in ranks}:
                forwarder = node * 2 + home % 2
                rows[forwarder, home, home // 2] += forwarder != home
                for rank in ranks:
                    if rank // 2 == node and rank != forwarder:
                        rows[rank, forwarder, home // 2] += 1
                        numbers[rank, forwarder] += 1 + ranks[rank]
    for source, target in itertools.permutations(range(4), 2):
        streams = [rows[source, target, node] for node in range(2)]
        words = 8 * sum(-(-count // 4) for count in streams) + 8
        payload = sum(streams) * 2 * hidden
        if source % 2 == target % 2:
            spent = both["links"][source, target]["bytes"] - dispatched["links"][source, target]["bytes"]
            assert spent == payload + gradients * sum(streams) * 4 * 8 + words
        elif source // 2 == target // 2:
            spent = [c["peer_bytes_by_link"][source, target] for c in (both, dispatched)]
            assert spent[0] - spent[1] == payload + gradients * numbers[source, target] * 4 + words
        assert words < 0.02 * payload or not payload or hidden != 7168


def test_shapes_of_launches():
    """As many stages as an SM has room for, and no more than 8 channels a block under way."""
    for channels, sms, warps, stages in (
        (24, 12, 4, 12),
        (30, 6, 10, 5),
        (32, 4, 16, 3),
        (32, 2, 16, 3),
        (3, 8, 2, 12),
    ):
        grid, block, shared, got = lean_combine.shape_of_move(channels, sms)
        assert (grid, block, got) == ((sms, 1, 1), (32 * warps, 1, 1), stages)
        assert shared == warps * lean_combine.warp_bytes(stages) <= 227 * 1024


@pytest.mark.long
@pytest.mark.parametrize(
    "kernel, calls",
    [(lean_combine.MOVE, ["put_signal", "amo_nonfetch"]), (lean_combine.EPILOGUE, ["amo_nonfetch"])],
    ids=str,
)
def test_they_link_and_the_sums_stay_in_registers(kernel, calls):
    assert all(doorbells(kernel, [f"nvshmemi_transfer_{call}" for call in calls]))
