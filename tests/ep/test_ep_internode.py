"""csrc/kernels/dispatch_internode.cuh, combine_internode.cuh in the emulator: bit for bit the reference."""

import collections
import random

import pytest
import test_ep
import torch
from cases import BETWEEN_NODES, Case, bits, draw, results
from fp8_helpers import fresh_generator
from internode_cluster import Cluster, check
from test_ep import exchange

from dsv3_kernels import emulator, ep
from dsv3_kernels.ep import Topology, reference

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


@pytest.mark.parametrize("topology", [(2, 2), (3, 1)])
def test_the_buffer_takes_these_kernels_by_itself(topology):
    """The same program and check as of the portable transport: cached handles, both orders, every option."""
    seed = fresh_generator().initial_seed() % (1 << 30)
    chance = random.Random(seed)
    for i in range(4):
        case = Case(
            Topology(*topology),
            chance.choice(BETWEEN_NODES),
            fp8=i % 2 == 0,
            local_experts=2,
            hidden=144,
            tokens=4,
            expert_order=i < 2,
            seed=seed + i,
        )
        cluster = emulator.VirtualCluster(*topology, seed, num_sms=20)

        def program(rank, group, case=case):
            sizes = case.num_experts, case.hidden, case.tokens, case.topk
            buffer = ep.Buffer(group, *sizes, gpus_per_node=case.topology.gpus_per_node)
            got = [exchange(buffer, case, round_, random.Random(rank), 4) for round_ in range(2)]
            assert buffer.status().transport == "emulator" and buffer.status().dispatches == 6
            return got

        by_rank = cluster.run(program)
        for round_ in range(2):
            test_ep.check(case, round_, [got[round_] for got in by_rank])


def test_a_wrong_call_is_an_error_on_every_rank():
    """Which leaves the buffer as good as before; and too many SMs are refused before anything runs."""
    case = Case(Topology(2, 2), local_experts=2, hidden=32, num_topk=2, tokens=6, seed=9)
    good = draw(case)

    def program(rank, group):
        buffer = ep.Buffer(group, case.num_experts, case.hidden, case.tokens, case.topk, gpus_per_node=2)
        with pytest.raises(ValueError, match="num_sms is 26, expected at most 24"):
            buffer.dispatch(good.x[rank], good.topk_idx[rank], num_sms=26)
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
                buffer.dispatch(good.x[rank], idx, num_sms=4, max_recv_tokens=most)
            got = buffer.dispatch(good.x[rank], good.topk_idx[rank], num_sms=4)
            want = reference.dispatch(good.x, good.topk_idx, None, case.num_experts)[rank]
            assert torch.equal(bits(got.x), bits(want.x)) and torch.equal(got.topk_idx, want.topk_idx)
        assert buffer.status().failure is None

    emulator.VirtualCluster(2, 2, 1, num_sms=4).run(program)


class Streams:
    """What the protocol sends on one channel, by pair of ranks: messages, and words that announce them."""

    def __init__(self, case, inputs, chunk):
        gpus, width = case.topology.gpus_per_node, case.local_experts
        self.ib, self.nvlink = collections.Counter(), collections.Counter()  # tokens
        self.tails_there, self.tails_home = collections.Counter(), collections.Counter()
        for source, idx in enumerate(inputs.topk_idx):
            messages = collections.Counter()  # by node, in the order of tokens
            told = set()  # (forwarder, rank, chunk): a tail for each chunk with a token for the rank
            rows = collections.Counter()
            for experts in idx.tolist():
                ranks = {expert // width for expert in experts if expert >= 0}
                for node in {rank // gpus for rank in ranks}:
                    forwarder = node * gpus + source % gpus
                    self.ib[source, forwarder] += forwarder != source
                    for rank in ranks:
                        if rank // gpus == node and rank != forwarder:
                            self.nvlink[forwarder, rank] += 1
                            told.add((forwarder, rank, messages[node] // chunk))
                            rows[rank, forwarder] += 1
                    messages[node] += 1
            self.tails_there.update((forwarder, rank) for forwarder, rank, _ in told)
            # Home, a tail for every four rows.
            self.tails_home.update({link: -(-count // 4) for link, count in rows.items()})


@pytest.mark.parametrize("fp8", [False, True])
def test_bytes(fp8):
    """A token to a node: row, scales, 8 bytes a choice; so to a rank there; home, a row each. The rest is
    counts, and words of 8 bytes: two a chunk over InfiniBand, tails and an acknowledgement over NVLink."""
    case = Case(
        Topology(2, 2), fp8=fp8, local_experts=8, hidden=7168, num_topk=8, tokens=12, weights=True, seed=0
    )
    inputs, chunk = draw(case), 2
    cluster = Cluster(case, 0, 2, chunk, depth=2)
    cluster.run([inputs])
    counters, streams = cluster.cluster.counters, Streams(case, inputs, chunk)
    ib, nvlink = streams.ib, streams.nvlink
    payload = 7168 + 56 * 4 if fp8 else 2 * 7168
    message, home = payload + 8 * 8, 2 * 7168
    header = 4 * cluster.rings.header_words
    assert header == 4 * (2 * (8 + 7 + 4) + 1)
    pairs = {(s, d) for s in range(4) for d in range(4) if s % 2 == d % 2 and s != d}
    links = {pair: link for pair, link in counters["links"].items() if link["kind"] == "IB"}
    assert links.keys() == pairs
    for s, d in pairs:
        chunks = -(-ib[s, d] // chunk) + -(-ib[d, s] // chunk)
        # Dispatch there and combine of what came from there; ready and free words of both; headers.
        there, back = ib[s, d] * message, ib[d, s] * home
        assert links[s, d]["bytes"] == there + back + 2 * 8 * chunks + header + 2 * 8
        assert there - ib[s, d] * payload < 0.02 * there
    near = {(0, 1), (1, 0), (2, 3), (3, 2)}
    assert counters["peer_bytes_by_link"].keys() == near
    for s, d in near:
        rows = nvlink[s, d] * message + nvlink[d, s] * home
        # By stream, that is by the node of its source: counts and the tail that says they stand.
        counts = 2 * (4 * (8 + 7 + 4) + 8)
        tails = 8 * (streams.tails_there[s, d] + streams.tails_home[s, d])
        acknowledgements = 2 * 8
        direct = counters["peer_bytes_by_link"][s, d]
        assert direct == rows + counts + tails + acknowledgements
        assert direct - rows < 0.02 * rows
    assert counters["peer_bytes"] == sum(counters["peer_bytes_by_link"].values())


def test_the_most_channels():
    """64 SMs, where the buffer declares 32 channels; fewer in the combine."""
    case = Case(Topology(2, 1), "next node", local_experts=2, hidden=32, num_topk=2, tokens=70, seed=3)
    inputs = draw(case)

    def program(rank, group):
        sizes = case.num_experts, case.hidden, case.tokens, case.topk
        buffer = ep.Buffer(group, *sizes, gpus_per_node=1, tuning=ep.Tuning(channels=32, depth=2))
        got = buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=64)
        y, _ = results(case, 0, rank, got.handle.rows)
        return got, y, buffer.combine(y, got.handle, num_sms=12).x

    by_rank = emulator.VirtualCluster(2, 1, 2, num_sms=64, checks=False).run(program)
    want = reference.dispatch(inputs.x, inputs.topk_idx, None, case.num_experts)
    counts = [idx.shape[0] for idx in inputs.topk_idx]
    home = reference.combine([y for _, y, _ in by_rank], want, counts, case.topology)
    for (got, _, x), expected, right in zip(by_rank, want, home, strict=True):
        assert torch.equal(bits(got.x), bits(expected.x)) and torch.equal(bits(x), bits(right))
