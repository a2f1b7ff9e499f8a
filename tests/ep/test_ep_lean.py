"""The lean kernels across nodes in the emulator: bit for bit the reference."""

import collections
import random

import pytest
import test_ep
import torch
from cases import BETWEEN_NODES, Case, bits, draw
from fp8_helpers import fresh_generator
from internode_cluster import check
from lean_cluster import ALL, LeanCluster, compiled
from test_ep import exchange
from test_ep_internode import TOPOLOGIES, Streams, a_case

from dsv3_kernels import emulator, ep
from dsv3_kernels.ep import Topology, internode_kernels, lean_dispatch, reference
from dsv3_kernels.ep.lean_dispatch import Pieces

TOLD = 4  # csrc/kernels/dispatch_lean_send.cuh, kTold


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


def puts_of(case, idx, channels):
    """How often each rank puts messages to each other node, by (rank, node): those of `TOLD` tokens go when
    the next as many are under way, the rest at the end of the channel."""
    told, puts = TOLD, collections.Counter()
    width = case.topology.gpus_per_node * case.local_experts
    for rank, experts in enumerate(idx):
        share = -(-len(experts) // channels)
        for node in range(case.topology.nodes):
            wants = [any(e // width == node for e in row if e >= 0) for row in experts.tolist()]
            for channel in range(channels):
                mine = wants[channel * share :][:share]
                full = len(mine) // told
                batches = [sum(mine[i * told :][:told]) for i in range(full - 1)]
                puts[rank, node] += sum(map(bool, [*batches, sum(mine[max(full - 1, 0) * told :])]))
    return puts


@pytest.mark.parametrize("fp8", [False, True])
def test_bytes(fp8):
    """A token to a node, and to a rank there: row, scales, 8 bytes a choice. The rest is counts and words."""
    case = Case(Topology(2, 2), fp8=fp8, local_experts=8, hidden=7168, num_topk=8, tokens=14, seed=fp8)
    inputs, channels, gpus = draw(case), 2, 2
    cluster = LeanCluster(case, 0, 2, 1)
    cluster.run([inputs], compiled(*ALL), combine=False)
    counters, streams = cluster.cluster.counters, Streams(case, inputs, 1)
    ib, nvlink = streams.ib, streams.nvlink
    message = (7168 + 56 * 4 if fp8 else 2 * 7168) + 8 * 8
    header = 4 * cluster.lean[0].slots.header_words
    assert header == 4 * (gpus * 8 + gpus + 4 + 7)
    links = {pair: link for pair, link in counters["links"].items() if link["kind"] == "IB"}
    puts = puts_of(case, inputs.topk_idx, channels)
    assert links.keys() == {(s, d) for s in range(4) for d in range(4) if s % 2 == d % 2 and s != d}
    for (s, d), link in links.items():
        # Of a channel: its first word, the header and its tail. Of a rank: an acknowledgement.
        words = channels * (8 + header + 8) + 8 * puts[s, d // gpus] + 8
        assert link["bytes"] == ib[s, d] * message + words
        assert words + 8 * 8 * ib[s, d] < 0.05 * link["bytes"]
    of_stream = 4 * (8 + 7 + 4) + 8  # counts, and the one tail
    for s, d in ((0, 1), (1, 0), (2, 3), (3, 2)):
        direct = counters["peer_bytes_by_link"][s, d]
        assert direct == nvlink[s, d] * message + case.topology.nodes * channels * of_stream + 8
