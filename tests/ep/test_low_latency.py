"""Low latency in the emulator: within a node and across nodes, bit for bit the reference."""

import random

import pytest
from cases import ROUTINGS, Case, draw
from fp8_helpers import fresh_generator
from low_latency_runs import Form, check, one_round

from dsv3_kernels import emulator, ep
from dsv3_kernels.ep import Topology

SECONDS = 1e-3  # of virtual time, a wait's limit


def run(case, rounds, forms, seed, num_sms=4, program=None, **options):
    """Rounds back to back, no rank waiting for another."""
    nodes, gpus = case.topology.nodes, case.topology.gpus_per_node
    cluster = emulator.VirtualCluster(nodes, gpus, seed, num_sms=num_sms, **options)

    def whole(rank, group):
        buffer = ep.Buffer(
            group, case.num_experts, case.hidden, case.tokens, case.topk, gpus_per_node=gpus, timeout=SECONDS
        )
        return [
            one_round(buffer, case, inputs, i, rank, form)
            for i, (inputs, form) in enumerate(zip(rounds, forms, strict=True))
        ]

    return cluster, cluster.run(program or whole)


@pytest.mark.parametrize("nodes, gpus", [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (4, 2)])
def test_bit_equal_to_the_reference(nodes, gpus):
    seed = fresh_generator().initial_seed() % (1 << 30)
    chance = random.Random(seed)
    for i, routing in enumerate(chance.sample(ROUTINGS, 2 if nodes * gpus == 8 else 3)):
        case = Case(
            Topology(nodes, gpus),
            routing,
            local_experts=chance.choice([1, 3]),
            hidden=chance.choice([32, 144]),
            num_topk=chance.choice([1, 3, 4]),
            tokens=5,
            seed=seed + i,
        )
        rounds = [draw(case, round_) for round_ in range(3)]
        forms = [
            Form(fp8, fp8 and chance.random() < 0.5, chance.random() < 0.5, chance.choice([1, 2, 3]))
            for fp8 in chance.choices([False, True], k=3)
        ]
        _, by_rank = run(case, rounds, forms, seed + i)
        for round_, (inputs, form) in enumerate(zip(rounds, forms, strict=True)):
            check(case, inputs, round_, form, [got[round_] for got in by_rank])
