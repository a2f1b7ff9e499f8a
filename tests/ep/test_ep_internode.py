"""csrc/kernels/dispatch_internode.cuh and combine_internode.cuh in the emulator: bit for bit the reference."""

import random

import pytest
from cases import BETWEEN_NODES, Case, draw
from fp8_helpers import fresh_generator
from internode_cluster import Cluster, check

from dsv3_kernels.ep import Topology

TOPOLOGIES = [(2, 1), (2, 2), (2, 4), (3, 2), (4, 2)]


def a_case(topology, routing, seed):
    """Whatever else there is to choose, by the seed."""
    chance = random.Random(seed)
    return Case(
        Topology(*topology),
        routing,
        fp8=chance.random() < 0.5,
        local_experts=chance.choice([1, 2, 3]),
        hidden=chance.choice([32, 144, 256]),
        num_topk=chance.choice([1, 3, 4]),
        tokens=chance.choice([3, 7, 12]),
        weights=chance.random() < 0.7,
        seed=seed,
    )


def a_cluster(case, seed):
    chance = random.Random(seed + 1)
    chunk, depth = chance.choice([(1, 1), (1, 3), (2, 1), (3, 2), (8, 2)])
    schedule = chance.choice(["random", "random", "pct"])
    warps = chance.choice([2, 3, 8])
    return Cluster(case, seed, chance.choice([2, 4]), chunk, depth, warps, schedule=schedule)


def is_right(case, seed):
    """Three rounds in which the ranks drift apart."""
    cluster = a_cluster(case, seed)
    for round_, out in enumerate(cluster.run([draw(case, round_) for round_ in range(3)])):
        check(cluster, round_, out)
    assert not cluster.failures() and not cluster.faults(), f"{case}, seed {seed}"


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_bit_equal_to_the_reference(topology):
    seed = fresh_generator().initial_seed() % (1 << 30)
    routings = random.Random(seed).sample(BETWEEN_NODES, 11 if topology[0] * topology[1] < 6 else 5)
    for i, routing in enumerate(routings):
        is_right(a_case(topology, routing, seed + i), seed + i)


@pytest.mark.long
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_thousand_seeds(topology):
    seed = fresh_generator().initial_seed() % (1 << 30)
    for i in range(1000):
        is_right(a_case(topology, BETWEEN_NODES[i % len(BETWEEN_NODES)], seed + i), seed + i)
