"""Low latency in the emulator: within a node and across nodes, bit for bit the reference."""

import random

import pytest
import torch
from cases import ROUTINGS, Case, bits, draw
from fp8_helpers import fresh_generator
from low_latency_runs import Form, check, check_dispatch, dispatches_ahead, one_round, two_rounds

import dsv3_kernels as dk
from dsv3_kernels import emulator, ep
from dsv3_kernels.ep import Topology
from dsv3_kernels.ep import low_latency_reference as reference

SECONDS = 1e-3  # of virtual time, a wait's limit


def buffer_of(case, group):
    gpus = case.topology.gpus_per_node
    return ep.Buffer(
        group, case.num_experts, case.hidden, case.tokens, case.topk, gpus_per_node=gpus, timeout=SECONDS
    )


def run(case, rounds, forms, seed, prepare=None, **options):
    """Rounds back to back, no rank waiting for another."""
    nodes, gpus = case.topology.nodes, case.topology.gpus_per_node
    cluster = emulator.VirtualCluster(nodes, gpus, seed, num_sms=4, **options)
    if prepare:
        prepare(cluster)

    def program(rank, group):
        buffer = buffer_of(case, group)
        return [
            one_round(buffer, case, inputs, i, rank, form)
            for i, (inputs, form) in enumerate(zip(rounds, forms, strict=True))
        ]

    return cluster, cluster.run(program)


def run_ahead(case, rounds, form, seed, **options):
    nodes, gpus = case.topology.nodes, case.topology.gpus_per_node
    cluster = emulator.VirtualCluster(nodes, gpus, seed, num_sms=4, **options)
    return cluster.run(lambda rank, group: dispatches_ahead(buffer_of(case, group), rounds, rank, form))


def run_pairs(case, rounds, form, seed, **options):
    """The same with two calls under way at a time."""
    nodes, gpus = case.topology.nodes, case.topology.gpus_per_node

    def program(rank, group):
        buffer = buffer_of(case, group)
        return [
            got
            for i in range(0, len(rounds), 2)
            for got in two_rounds(buffer, case, rounds[i : i + 2], rank, form)
        ]

    return emulator.VirtualCluster(nodes, gpus, seed, num_sms=4, **options).run(program)


TOPOLOGIES = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (4, 2)]


def compare(nodes, gpus, seed, routings):
    """Three rounds of each routing, in forms and sizes that the seed draws."""
    chance = random.Random(seed)
    for i, routing in enumerate(chance.sample(ROUTINGS, routings)):
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
        schedule = chance.choice(["random", "pct"])
        _, by_rank = run(case, rounds, forms, seed + i, schedule=schedule)
        for round_, (inputs, form) in enumerate(zip(rounds, forms, strict=True)):
            check(case, inputs, round_, form, [got[round_] for got in by_rank])


@pytest.mark.parametrize("nodes, gpus", TOPOLOGIES)
def test_bit_equal_to_the_reference(nodes, gpus):
    compare(nodes, gpus, fresh_generator().initial_seed() % (1 << 30), 2 if nodes * gpus == 8 else 3)


@pytest.mark.long
@pytest.mark.parametrize("nodes, gpus", TOPOLOGIES)
def test_a_thousand_seeds(nodes, gpus):
    first = fresh_generator().initial_seed() % (1 << 30)
    for seed in range(first, first + 1000):
        compare(nodes, gpus, seed, 1)


@pytest.mark.parametrize("nodes, gpus", [(1, 3), (3, 1), (2, 2)])
def test_two_calls_under_way(nodes, gpus):
    seed = fresh_generator().initial_seed() % (1 << 30)
    case = Case(Topology(nodes, gpus), local_experts=2, hidden=144, num_topk=3, tokens=5, seed=seed)
    rounds, form = [draw(case, round_) for round_ in range(4)], Form(fp8=seed % 2 == 0)
    by_rank = run_pairs(case, rounds, form, seed)
    for i, inputs in enumerate(rounds):
        check(case, inputs, i % 2, form, [got[i] for got in by_rank])
    by_rank = run_ahead(case, rounds, form, seed)
    for i, inputs in enumerate(rounds):
        check_dispatch(case, inputs, form, [got[i] for got in by_rank], f"round {i}")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("nodes, gpus", [(1, 3), (2, 2)])
def test_bytes(nodes, gpus, fp8):
    """A (token, expert) elsewhere: a row and its scales there, a row home. The rest is flags and acks."""
    case = Case(
        Topology(nodes, gpus), local_experts=3, hidden=7168, num_topk=4, tokens=4, seed=2 * nodes + fp8
    )
    inputs, form = draw(case), Form(fp8)
    cluster, outputs = run(case, [inputs], [form], seed=0)
    check(case, inputs, 0, form, [got[0] for got in outputs])
    size, row = nodes * gpus, 2 * 7168
    there = 7168 + 56 * 4 if fp8 else row
    near, far = 0, {}
    for source in range(size):
        for rank in (r for r in range(size) if r != source):
            experts = inputs.topk_idx[source][inputs.topk_idx[source] // case.local_experts == rank].tolist()
            used = len(set(experts))
            if source // gpus == rank // gpus:  # flags there and back, acks of both ops
                near += len(experts) * (there + row) + 8 * (case.local_experts + used + 2)
                continue
            out, back = far.setdefault((source, rank), [0, 0]), far.setdefault((rank, source), [0, 0])
            out[0] += len(experts) + case.local_experts + 1
            out[1] += len(experts) * there + 8 * (case.local_experts + 1)
            back[0] += len(experts) + used + 1
            back[1] += len(experts) * row + 8 * (used + 1)
    assert cluster.counters["peer_bytes"] == near
    links = {link: [c["messages"], c["bytes"]] for link, c in cluster.counters["links"].items()}
    assert links == far


def test_hooks_out_of_turn():
    case = Case(Topology(1, 1), local_experts=2, hidden=32, num_topk=1, tokens=2, seed=4)
    inputs = draw(case)

    def program(rank, group):
        buffer = buffer_of(case, group)

        def send():
            return buffer.low_latency_dispatch(inputs.x[0], inputs.topk_idx[0], 1, return_recv_hook=True)

        first, second = send(), send()
        with pytest.raises(ValueError, match=r"2 calls wait for their hook\(\)"):
            send()
        with pytest.raises(ValueError, match="expected hooks in the order of their calls"):
            second.hook()
        first.hook()
        third = send()
        second.hook()
        third.hook()
        want = reference.dispatch(inputs.topk_idx, 2)[0].tokens_per_expert
        assert all(torch.equal(got.tokens_per_expert, want) for got in (first, second, third))

    emulator.VirtualCluster(1, 1, num_sms=2).run(program)


def test_wrong_arguments():
    buffer = ep.Buffer(None, num_experts=4, hidden=32, max_tokens_per_rank=3, num_topk=2)
    x, idx = torch.zeros(2, 32).bfloat16(), torch.tensor([[0, 1], [2, -1]])
    got = buffer.low_latency_dispatch(x, idx)
    other = ep.Buffer(None, num_experts=4, hidden=32, max_tokens_per_rank=3, num_topk=2)
    y, weights = torch.zeros(4, 3, 32).bfloat16(), torch.ones(2, 2)
    wide = torch.zeros(4, 32).bfloat16()
    for error, message, call in [
        (TypeError, "x is ", lambda: buffer.low_latency_dispatch(dk.quantize_1x128(x), idx)),
        (TypeError, "x has dtype", lambda: buffer.low_latency_dispatch(x.float(), idx)),
        (ValueError, r"\(T, hidden\)", lambda: buffer.low_latency_dispatch(x[:, :16].contiguous(), idx)),
        (ValueError, "x has 4 tokens, expected at most", lambda: buffer.low_latency_dispatch(wide, idx)),
        (ValueError, r"\(T, num_topk\)", lambda: buffer.low_latency_dispatch(x, idx[:1])),
        (TypeError, "num_sms is 2.0", lambda: buffer.low_latency_dispatch(x, idx, 2.0)),
        (ValueError, "num_sms is 0", lambda: buffer.low_latency_dispatch(x, idx, 0)),
        (TypeError, "fp8 is", lambda: buffer.low_latency_dispatch(x, idx, fp8=1)),
        (
            ValueError,
            "power_of_2_scales is True",
            lambda: buffer.low_latency_dispatch(x, idx, fp8=False, power_of_2_scales=True),
        ),
        (ep.errors.Fault, r"topk_idx\[1, 0\]", lambda: buffer.low_latency_dispatch(x, idx + 2)),
        (
            ValueError,
            "handle is of another buffer",
            lambda: other.low_latency_combine(y, got.handle, weights),
        ),
        (TypeError, "handle is NoneType", lambda: buffer.low_latency_combine(y, None, weights)),
        (ValueError, "E_local", lambda: buffer.low_latency_combine(y[:2], got.handle, weights)),
        (
            ValueError,
            r"\(T, num_topk\)",
            lambda: buffer.low_latency_combine(y, got.handle, weights[:1]),
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
    big = ep.Buffer(None, num_experts=8, hidden=32, max_tokens_per_rank=8192, num_topk=8)
    with pytest.raises(ValueError, match=r"is 65536, expected at most 65535"):
        big.low_latency_dispatch(x, torch.zeros(2, 8, dtype=torch.int64))


@pytest.mark.parametrize("nodes, gpus", [(1, 4), (2, 2)])
def test_decoding_end_to_end(nodes, gpus):
    """Dispatch, two GEMMs with SwiGLU between, combine: the bits of one process that has all experts."""
    seed = fresh_generator().initial_seed() % (1 << 30)
    gen = torch.Generator().manual_seed(seed)
    case = Case(Topology(nodes, gpus), local_experts=2, hidden=128, num_topk=3, tokens=3, seed=seed)
    inputs, width = draw(case), 128
    up = dk.quantize_128x128(torch.randn(case.num_experts, 2 * width, case.hidden, generator=gen).bfloat16())
    down = dk.quantize_128x128(torch.randn(case.num_experts, case.hidden, width, generator=gen).bfloat16())

    def experts(x, counts, first, count):
        mine = slice(first, first + count)
        gate_up = dk.masked_grouped_fp8_gemm(x, (up.data[mine], up.scales[mine]), counts)
        flat = dk.swiglu_quantize(gate_up.flatten(0, 1))
        shape = (*gate_up.shape[:2], -1)
        scales = torch.stack([s.T.contiguous().T for s in flat.scales.view(shape)])
        return dk.masked_grouped_fp8_gemm(
            (flat.data.view(shape), scales), (down.data[mine], down.scales[mine]), counts
        )

    def program(rank, group):
        buffer = buffer_of(case, group)
        got = buffer.low_latency_dispatch(inputs.x[rank], inputs.topk_idx[rank], 2, return_recv_hook=True)
        got.hook()
        y = experts(got.x, got.tokens_per_expert, rank * case.local_experts, case.local_experts)
        return buffer.low_latency_combine(y, got.handle, inputs.topk_weights[rank], 2).x

    homes = emulator.VirtualCluster(nodes, gpus, seed, num_sms=4).run(program)
    alone = ep.Buffer(None, case.num_experts, case.hidden, case.tokens * case.topology.size, case.topk)
    with emulator.virtual_gpu(seed=seed, num_sms=4):
        got = alone.low_latency_dispatch(torch.cat(inputs.x), torch.cat(inputs.topk_idx))
        y = experts(got.x, got.tokens_per_expert, 0, case.num_experts)
        want = alone.low_latency_combine(y, got.handle, torch.cat(inputs.topk_weights)).x
    assert torch.equal(bits(torch.cat(homes)), bits(want))
    assert want.float().norm() > 0
