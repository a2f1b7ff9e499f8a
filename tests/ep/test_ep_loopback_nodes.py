"""Virtual nodes on one virtual GPU: the kernels across nodes in one launch, bit for bit the reference."""

import random

import mutate
import pytest
import torch
from cases import BETWEEN_NODES, Case, draw
from fp8_helpers import fresh_generator
from host_reads import HostRead, no_host_reads
from low_latency_runs import Form, received, returned
from low_latency_runs import check as check_low_latency
from test_ep_loopback import buffer_of, check

from bench import loopback as bench
from bench.cases.dispatch_internode import NODES
from dsv3_kernels import emulator, ep, jit
from dsv3_kernels.ep import Topology, one_gpu
from dsv3_kernels.ep.internode_kernels import DISPATCH
from dsv3_kernels.jit import compile

TOPOLOGIES = [(2, 1), (2, 2), (2, 3), (3, 2), (4, 2)]


def nodes_of(case, **options):
    return buffer_of(case, gpus_per_node=case.topology.gpus_per_node, **options)


@pytest.mark.parametrize(
    "topology, internode",
    [
        *((topology, "rings") for topology in TOPOLOGIES),
        *((topology, "lean") for topology in TOPOLOGIES[1:3]),
    ],
)
def test_bit_equal_to_the_reference(topology, internode):
    """Rounds of every call, over rings of one slot too, by handle on fewer SMs than there are channels."""
    seed = fresh_generator().initial_seed() % (1 << 30)
    chance = random.Random(seed)
    size = topology[0] * topology[1]
    for i, routing in enumerate(chance.sample(BETWEEN_NODES, 2 if size < 5 else 1)):
        case = Case(
            Topology(*topology),
            routing,
            fp8=(i + seed) % 2 == 0,
            local_experts=chance.choice([1, 3]),
            hidden=chance.choice([32, 144]),
            num_topk=chance.choice([1, 3, 4]),
            tokens=10 if size < 5 else 6,
            expert_order=chance.random() < 0.7,
            weights=chance.random() < 0.7,
            seed=seed + i,
        )
        chunk, depth = chance.choice([(1, 1), (1, 2), (3, 1), (8, 8)])
        tuning = ep.Tuning(channels=12, chunk=chunk, depth=depth)
        with emulator.virtual_gpu(num_sms=4 * size, seed=seed + i):
            buffer = nodes_of(case, tuning=tuning, internode=internode)
            for round_ in range(2):
                check(case, buffer, round_, chance.random() < 0.5, chance.choice([2, 4]), 2)
        assert all(s.topology == case.topology and s.failure is None for s in buffer.status())
        assert {s.internode for s in buffer.status()} == {internode}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_low_latency_is_bit_equal_to_the_reference(topology):
    """Rounds enough for both parities of slots, and a third call that waits for their readers."""
    seed = fresh_generator().initial_seed() % (1 << 30)
    chance = random.Random(seed)
    case = Case(Topology(*topology), chance.choice(BETWEEN_NODES), hidden=144, tokens=5, seed=seed)
    with emulator.virtual_gpu(num_sms=3 * case.topology.size, seed=seed) as gpu:
        buffer, rounds = nodes_of(case), []
        for round_ in range(4):
            form, inputs = Form(fp8=(round_ + seed) % 2 == 0), draw(case, round_)
            got = buffer.low_latency_dispatch(inputs.x, inputs.topk_idx, 3, fp8=form.fp8)
            y = [returned(case, inputs, round_, rank) for rank in range(case.topology.size)]
            home = buffer.low_latency_combine(y, [part.handle for part in got], inputs.topk_weights, 2)
            both = [(received(part), sums.x) for part, sums in zip(got, home, strict=True)]
            rounds.append((case, inputs, round_, form, both))
    assert gpu.counters["launches"] == 16, "all ranks in one"
    for arguments in rounds:
        check_low_latency(*arguments)


def test_declared_sizes_need_no_host_read():
    """So a CUDA graph can hold them."""
    case = Case(Topology(2, 2), fp8=True, tokens=6)
    inputs = draw(case)
    with emulator.virtual_gpu(num_sms=8):
        buffer = nodes_of(case)
        bf16 = [x.data.new_ones(x.data.shape, dtype=torch.bfloat16) for x in inputs.x]
        y = [torch.zeros(80, case.hidden).bfloat16() for _ in inputs.x]
        room = torch.zeros(case.local_experts, 4 * case.tokens, case.hidden).bfloat16()
        buffer.low_latency_dispatch(bf16, inputs.topk_idx, 2)  # sets up memory
        with no_host_reads():
            got = buffer.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, 2, max_recv_tokens=80)
            handles = [part.handle for part in got]
            buffer.dispatch(inputs.x, handle=handles, num_sms=2)
            buffer.combine(y, handles, [part.topk_weights for part in got], inputs.bias, 2)
            fast = buffer.low_latency_dispatch(bf16, inputs.topk_idx, 2)
            handles = [part.handle for part in fast]
            buffer.low_latency_combine([room] * 4, handles, inputs.topk_weights, 2)
            with pytest.raises(HostRead):
                buffer.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, 2)


def test_wrong_sizes_are_refused_and_a_wrong_expert_is_told_once():
    case = Case(Topology(2, 2), tokens=6, seed=5)
    inputs = draw(case)
    sizes = case.num_experts, case.hidden, case.tokens, case.topk
    with emulator.virtual_gpu(num_sms=104):
        for ranks, gpus, error, text in (
            (4, 3, ValueError, "gpus_per_node is 3, expected a divisor of the 4 ranks"),
            (4, 0, ValueError, "gpus_per_node is 0, expected at least 1"),
            (4, "2", TypeError, "gpus_per_node is '2' of type str, expected an int"),
            (12, 4, ValueError, "num_ranks is 12, expected at most 8: one launch has them all"),
        ):
            with pytest.raises(error, match=text):
                ep.LoopbackBuffer(ranks, *sizes, gpus_per_node=gpus, device="cpu")
        with pytest.raises(ValueError, match="LoopbackBuffer: internode is 'fat', expected one of"):
            nodes_of(case, internode="fat")
        buffer = nodes_of(case)
        with pytest.raises(ValueError, match="num_sms is 26, expected at most 24"):
            buffer.dispatch(inputs.x, inputs.topk_idx, num_sms=26)
        with pytest.raises(ValueError, match="num_sms is 3, expected an even number"):
            buffer.dispatch(inputs.x, inputs.topk_idx, num_sms=3)
        bad = [idx.clone() for idx in inputs.topk_idx]
        bad[3][1, 0] = case.num_experts
        with pytest.raises(ValueError, match=r"topk_idx\[1, 0\] of rank 3 is 12, out of range"):
            buffer.dispatch(inputs.x, bad, num_sms=4)
        buffer.check()
        check(case, buffer, 0, False, 4, 4)


# ---- What stands for the network


class Changed:
    """The dispatch with something else in one place of its text."""

    def __init__(self, old, new):
        text, options = mutate.source(DISPATCH.file, old, new), dict(one_gpu.DEFINES)
        self._done = compile.compile_source(text, [str(DISPATCH)], compile.source_options(defines=options))

    def ptx(self, lineinfo):
        return jit.Ptx(self._done.ptx, self._done.names[0], ())


HAZARD, TIMEOUT = emulator.HazardError, ep.TimeoutError
PUT = "    put_warp(target, source, bytes, rank, queue_pair);\n    __syncwarp();\n"
SIGNAL = "    if (threadIdx.x % 32 == 0) signal(word, value, rank, queue_pair);\n"
PLANTED = {
    "a signal before its data": (PUT + SIGNAL, SIGNAL + PUT, HAZARD),
    "lanes do not wait for each other": (PUT, PUT.replace("    __syncwarp();\n", ""), HAZARD),
    "a signal that releases nothing": (
        "ptx::store_release_system(of_rank(signal, rank, queue_pair), value);",
        "*const_cast<volatile u64*>(of_rank(signal, rank, queue_pair)) = value;",
        HAZARD,
    ),
    "what is no multiple of 16 bytes is cut": ("at < bytes; at += 128", "at < wide; at += 128", TIMEOUT),
    "a credit is lost": ("o.place.free_chunk(n, o.channel, p);", "", TIMEOUT),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_broken_stand_in_for_the_network_is_noticed(what, monkeypatch):
    old, new, expected = PLANTED[what]
    changed = Changed(old, new)
    monkeypatch.setattr(one_gpu, "on_one_gpu", lambda kernel: changed)
    case = Case(Topology(2, 2), "every node", hidden=144, num_topk=4, tokens=8, seed=1)
    inputs = draw(case)
    with emulator.virtual_gpu(num_sms=8), pytest.raises(expected):
        nodes_of(case, tuning=ep.Tuning(chunk=2, depth=1)).dispatch(inputs.x, inputs.topk_idx, num_sms=2)


# ---- What the benches count


@pytest.mark.parametrize("topology", NODES, ids=str)
def test_bytes_by_hop_are_those_of_the_protocol(topology):
    """Messages against the routing, token by token, and against what the kernels say that they sent."""
    setup = bench.Setup(topology.size, 2, tokens=16, hidden=128, nodes=topology.nodes)
    gpus, local = topology.gpus_per_node, setup.experts // setup.ranks
    with emulator.virtual_gpu(num_sms=2 * topology.size):
        node = bench.Node(setup, "cpu")
        messages = arrivals = moved = far_rows = far_tokens = 0
        for rank, idx in enumerate(node.topk_idx):
            for experts in idx.tolist():
                ranks = {expert // local for expert in experts}
                nodes = {r // gpus for r in ranks}
                messages += len(nodes - {rank // gpus})
                arrivals += len(ranks)
                far = sum(expert // local // gpus != rank // gpus for expert in experts)
                far_rows, far_tokens = far_rows + far, far_tokens + (far > 0)
                moved += sum(r != r // gpus * gpus + rank % gpus for r in ranks)
        node.dispatch()
        sent = sum(status.bytes_sent for status in node.buffer.status())
        assert all(part.x.shape == (16, 128) for part in node.combine()())
    message = 128 + 4 + 8 * 8
    assert message % 16 == 4  # so that it travels in 208 bytes
    hops = setup.hops("dispatch")
    assert hops["InfiniBand"] == 4 * 208 * messages and hops["NVLink"] == 2 * message * arrivals
    assert sent == 208 * (messages + moved)
    assert (setup.far_rows, setup.far_tokens) == (far_rows, far_tokens)
    assert setup.hops("combine")["InfiniBand"] == 4 * 256 * messages
    assert setup.hops("combine")["NVLink"] == 2 * 256 * arrivals
