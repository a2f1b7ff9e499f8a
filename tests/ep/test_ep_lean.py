"""The lean kernels across nodes in the emulator: bit for bit the reference."""

import random

import pytest
import test_ep
import torch
from cases import BETWEEN_NODES, Case, bits, draw
from fp8_helpers import fresh_generator
from internode_cluster import check
from lean_cluster import ALL, LeanCluster, compiled
from test_ep import exchange
from test_ep_internode import TOPOLOGIES, a_case

from dsv3_kernels import emulator, ep
from dsv3_kernels.ep import Topology, internode_kernels, lean_dispatch, reference
from dsv3_kernels.ep.lean_dispatch import Pieces


def is_right(case, seed, kernels=ALL):
    """Three rounds in which the ranks drift apart."""
    chance = random.Random(seed + 1)
    pieces = chance.choice([None, Pieces(64, 2), Pieces(128, 4)])
    blocks, schedule = chance.choice([1, 2, 5]), chance.choice(["random", "random", "pct"])
    num_sms, pairs = chance.choice([(1, 1), (2, 1), (1, 2), (2, 2)])
    if len(kernels) == 3:
        num_sms = 2
    cluster = LeanCluster(case, seed, num_sms, pairs, pieces, blocks, schedule=schedule)
    for round_, out in enumerate(
        cluster.run([draw(case, round_) for round_ in range(3)], compiled(*kernels))
    ):
        check(cluster, round_, out)
    assert not cluster.failures() and not cluster.faults(), f"{case}, seed {seed}"


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_bit_equal_to_the_reference(topology):
    seed = fresh_generator().initial_seed() % (1 << 30)
    routings = random.Random(seed).sample(BETWEEN_NODES, 3 if topology[0] * topology[1] < 6 else 1)
    for i, routing in enumerate(routings):
        is_right(a_case(topology, routing, seed + i), seed + i)


@pytest.mark.long
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_thousand_seeds(topology):
    seed = fresh_generator().initial_seed() % (1 << 30)
    for i in range(1000):
        is_right(a_case(topology, BETWEEN_NODES[i % len(BETWEEN_NODES)], seed + i), seed + i)


def test_its_layout_serves_the_rings_too():
    seed = fresh_generator().initial_seed() % (1 << 30)
    case = a_case((2, 2), "balanced", seed)
    is_right(case, seed, (*lean_dispatch.DISPATCH, internode_kernels.COMBINE))


def test_the_buffer_takes_them():
    """The same program and check as of the other transports: cached handles, both orders, every option."""
    seed = fresh_generator().initial_seed() % (1 << 30)
    chance = random.Random(seed)
    for i in range(2):
        case = Case(
            Topology(2, 2),
            chance.choice(BETWEEN_NODES),
            fp8=chance.random() < 0.5,
            local_experts=2,
            hidden=144,
            tokens=4,
            expert_order=i == 0,
            seed=seed + i,
        )

        def program(rank, group, case=case):
            sizes = case.num_experts, case.hidden, case.tokens, case.topk
            buffer = ep.Buffer(group, *sizes, gpus_per_node=2, internode="lean")
            got = [exchange(buffer, case, round_, random.Random(rank), 2) for round_ in range(2)]
            assert buffer.status().internode == "lean" and buffer.status().dispatches == 6
            return got

        by_rank = emulator.VirtualCluster(2, 2, seed, num_sms=4).run(program)
        for round_ in range(2):
            test_ep.check(case, round_, [got[round_] for got in by_rank])


def test_a_wrong_call_is_an_error_on_every_rank():
    """Which leaves the buffer as good as before; and too many SMs are refused before anything runs."""
    case = Case(Topology(2, 2), local_experts=2, hidden=32, num_topk=2, tokens=6, seed=9)
    good = draw(case)

    def program(rank, group):
        sizes = case.num_experts, case.hidden, case.tokens, case.topk
        buffer = ep.Buffer(group, *sizes, gpus_per_node=2, internode="lean")
        with pytest.raises(ValueError, match="num_sms is 34, expected at most 32"):
            buffer.dispatch(good.x[rank], good.topk_idx[rank], num_sms=34)
        for bad, token, value in ((0, 0, -2), (3, -1, 8), (1, 1, "twice"), (2, 0, "overflow")):
            idx, most = good.topk_idx[rank].clone(), None
            if rank == bad and value == "overflow":
                most = 1
            elif rank == bad:
                idx[token, 0] = idx[token, 1] = 5
                if value != "twice":
                    idx[token, 0] = value
            what = f"rank {bad} is sent" if value == "overflow" else f"of rank {bad} is "
            with pytest.raises(ValueError, match=what):
                buffer.dispatch(good.x[rank], idx, num_sms=2, max_recv_tokens=most)
        got = buffer.dispatch(good.x[rank], good.topk_idx[rank], num_sms=2)
        want = reference.dispatch(good.x, good.topk_idx, None, case.num_experts)[rank]
        assert torch.equal(bits(got.x), bits(want.x)) and torch.equal(got.topk_idx, want.topk_idx)
        assert buffer.status().failure is None

    emulator.VirtualCluster(2, 2, 1, num_sms=4).run(program)


def test_ranks_that_disagree_are_told():
    """About the form of rows: at first, and again with a layout that all share."""
    case = Case(Topology(2, 2), fp8=True, local_experts=2, hidden=128, num_topk=2, tokens=6, seed=9)
    good, plain = draw(case), draw(Case(**{**vars(case), "fp8": False}))

    def program(rank, group):
        sizes = case.num_experts, case.hidden, case.tokens, case.topk
        buffer = ep.Buffer(group, *sizes, gpus_per_node=2, internode="lean")
        x = plain.x[rank] if rank == 2 else good.x[rank]
        with pytest.raises(ValueError, match="passes BF16 x .* another one FP8 x"):
            buffer.dispatch(x, good.topk_idx[rank], num_sms=2)
        got = buffer.dispatch(good.x[rank], good.topk_idx[rank], num_sms=2)
        return buffer, got

    with pytest.raises(ValueError, match="internode is 'rings' on rank 0 and 'lean' on rank 1"):
        emulator.VirtualCluster(2, 1).run(
            lambda rank, group: ep.Buffer(
                group, 4, 32, 4, 2, gpus_per_node=1, internode=("rings", "lean")[rank]
            )
        )
    with pytest.raises(ValueError, match="internode is 'ring', expected one of"):
        ep.Buffer(None, 4, 32, 4, 2, internode="ring")
    emulator.VirtualCluster(2, 2, 1, num_sms=4).run(program)
