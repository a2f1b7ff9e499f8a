"""csrc/kernels/dispatch.cuh and combine.cuh in the emulator: several ranks, bit for bit the reference."""

import random

import pytest
import test_ep
import torch
from cases import ROUTINGS, Case, bits, draw
from fp8_helpers import fresh_generator
from test_ep import exchange
from virtual_node import Node, check, rows_of

from dsv3_kernels import emulator, ep
from dsv3_kernels.ep import Topology, kernels

SIZES = [1, 2, 3, 4, 8]


def a_case(size, seed, **fixed):
    """A small one that the seed draws."""
    chance = random.Random(seed)
    drawn = {
        "routing": chance.choice(ROUTINGS),
        "fp8": chance.random() < 0.5,
        "local_experts": chance.choice([1, 3]),
        "hidden": chance.choice([32, 144]),
        "num_topk": chance.choice([1, 3, 4]),
        "expert_order": chance.random() < 0.6,
        "weights": chance.random() < 0.7,
    }
    return Case(Topology(1, size), tokens=6, seed=seed, **(drawn | fixed))


def several_rounds(monkeypatch, case, seed):
    """Mixed calls of three rounds, whose ranks drift apart, with or without spare rows."""
    chance = random.Random(seed)
    teams = chance.choice([1, 1, 1, 2, 2, 3, 16])  # of a block; the most are the slowest
    monkeypatch.setattr(kernels, "MAX_THREADS", min(512, 32 * case.topology.size * teams))
    node = Node(case, seed, num_sms=chance.choice([2, 4]) if case.topology.size < 8 else 2)
    rounds = [draw(case, round_) for round_ in range(3)]
    rows = [[count + chance.choice([0, 2]) for count in rows_of(case, inputs)] for inputs in rounds]
    mixed = [("dispatch", *chance.choices(("again", "combine"), k=chance.randrange(1, 4))) for _ in rounds]
    for round_, out in enumerate(node.run(rounds, rows, calls=mixed)):
        check(case, round_, out)
    assert not node.failures() and not any(peers.error.any() for peers in node.peers)


@pytest.mark.parametrize("size", SIZES)
def test_bit_equal_to_the_reference(monkeypatch, size):
    seed = fresh_generator().initial_seed() % (1 << 30)
    for i in range(3 if size == 8 else 5):
        several_rounds(monkeypatch, a_case(size, seed + i, expert_order=(seed + i) % 2 == 0), seed + i)


@pytest.mark.long
@pytest.mark.parametrize("expert_order", [True, False], ids=["experts", "tokens"])
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_a_thousand_seeds(monkeypatch, size, fp8, expert_order):
    seed = fresh_generator().initial_seed() % (1 << 30)
    for i in range(1000):
        several_rounds(monkeypatch, a_case(size, seed + i, fp8=fp8, expert_order=expert_order), seed + i)


def tails(streams):
    """Of streams of so many tokens: each tells of four when it has stored four more, and of all."""
    return sum(max(n // 4, min(n, 1)) for n in streams)


@pytest.mark.parametrize("fp8", [False, True])
def test_nvlink_bytes(monkeypatch, fp8):
    """A token to another rank: row, scales, 8 bytes a choice; home: a row. The rest is counts and tails.

    With one channel; each has counts of its own, and tokens of which a tail announces four.
    """
    monkeypatch.setattr(kernels, "MAX_THREADS", 96)
    case = Case(
        Topology(1, 3), fp8=fp8, local_experts=4, hidden=7168, num_topk=8, tokens=8, seed=int(fp8) * 2
    )
    node, inputs = Node(case, 0, num_sms=2), draw(case)
    out = node.run([inputs], [rows_of(case, inputs)])[0]
    pairs = [
        int((out[source].sent_slot[:, rank] >= 0).sum())
        for source in range(3)
        for rank in range(3)
        if rank != source
    ]
    payload = 7168 + 56 * 4 if fp8 else 2 * 7168
    announced = 4 * (4 + 5 + 3) + 8  # counts, five words, rows for each rank; a tail
    there = sum(pairs) * (payload + 8 * 8) + 6 * announced + 8 * tails(pairs)
    home = sum(pairs) * 2 * 7168 + 8 * sum(-(-n // 4) for n in pairs)
    acks = 2 * 6 * 8
    assert node.cluster.counters["peer_bytes"] == there + home + acks
    assert there - sum(pairs) * payload < 0.02 * sum(pairs) * payload


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_buffer_in_the_emulator(monkeypatch, size):
    """The same program and check as of the portable transport: ep.Buffer finds the kernels by its group."""
    monkeypatch.setattr(kernels, "MAX_THREADS", 64 * size)  # two teams a block, for time's sake
    seed = fresh_generator().initial_seed() % (1 << 30)
    chance = random.Random(seed)
    for i in range(4):
        case = Case(
            Topology(1, size),
            chance.choice(ROUTINGS),
            fp8=i % 2 == 0,
            local_experts=2,
            hidden=144,
            tokens=4,
            expert_order=i < 2,
            seed=seed + i,
        )
        cluster = emulator.VirtualCluster(1, size, seed, num_sms=20)

        def program(rank, group, case=case):
            buffer = ep.Buffer(
                group, case.num_experts, case.hidden, case.tokens, case.topk, gpus_per_node=group.size()
            )
            got = [exchange(buffer, case, round_, random.Random(rank), 4) for round_ in range(2)]
            assert buffer.status().transport == "emulator" and buffer.status().dispatches == 6
            return got

        by_rank = cluster.run(program)
        for round_ in range(2):
            test_ep.check(case, round_, [got[round_] for got in by_rank])


def test_a_cached_handle_moves_rows_and_tails_alone():
    """No counts, no experts, no weights; at other numbers of SMs than the first dispatch had."""
    case = Case(Topology(1, 2), local_experts=2, hidden=32, num_topk=2, tokens=9, seed=12)
    inputs = draw(case)
    cluster = emulator.VirtualCluster(1, 2, num_sms=6)

    def program(rank, group):
        buffer = ep.Buffer(group, 4, 32, 9, 2, gpus_per_node=2)
        x, idx = inputs.x[rank], inputs.topk_idx[rank]
        got = buffer.dispatch(x, idx, num_sms=4)
        came = got.handle.layout.ranges
        each = came[1 - rank, :, 1].tolist()
        told = sum(group.all_gather_object(tails(each)))
        rows = sum(group.all_gather_object(sum(each)))
        for num_sms in (2, 4, 6):
            group.barrier()
            before = cluster.counters["peer_bytes"]
            group.barrier()
            again = buffer.dispatch(-x, num_sms=num_sms, handle=got.handle)
            group.barrier()
            forms = 2 * len(each) * (4 + 8)  # of each channel, and the tail that says it
            assert cluster.counters["peer_bytes"] - before == rows * 64 + (told + 2) * 8 + forms
            assert torch.equal(bits(again.x), bits(-got.x)) and torch.equal(again.topk_idx, got.topk_idx)

    cluster.run(program)
