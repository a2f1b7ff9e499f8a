"""csrc/kernels/dispatch.cuh and combine.cuh in the emulator: several ranks, bit for bit the reference."""

import random

import pytest
import test_ep
import torch
from cases import ROUTINGS, Case, bits, draw, results
from fp8_helpers import fresh_generator
from test_ep import exchange

from dsv3_kernels import emulator, ep, jit
from dsv3_kernels.device_error import ErrorCode
from dsv3_kernels.ep import Topology, kernels, reference
from dsv3_kernels.ep.transport import Shape
from dsv3_kernels.quantized import ROW, QuantizedTensor, empty_mn_major

SECONDS = 1e-3  # of virtual time, a wait's limit


def launch_of(shape, num_sms):
    return dict(zip(("grid", "block", "shared_bytes"), kernels.shape_of_launch(shape, num_sms), strict=True))


class Node:
    """The ranks of one node, their workspaces and what they keep between calls."""

    def __init__(self, case, seed, num_sms, **options):
        self.case, self.size = case, case.topology.size
        self.cluster = emulator.VirtualCluster(1, self.size, seed, num_sms=num_sms, **options)
        self.num_sms, self.back_sms = num_sms, 2 if num_sms == 4 and seed % 2 else num_sms
        self.shape = Shape(case.num_experts, case.hidden, case.tokens, case.topk, case.topology)
        self.workspace = kernels.Workspace(self.shape)
        self.memory = [torch.zeros(self.workspace.size, dtype=torch.uint8) for _ in range(self.size)]
        table = torch.tensor([self.cluster.address_of(m, r) for r, m in enumerate(self.memory)])
        self.peers = [kernels.empty_state(rank, table.clone()) for rank in range(self.size)]
        self.error = [torch.zeros(1, dtype=torch.int32) for _ in range(self.size)]

    def failures(self):
        return [p.failure for p in self.peers if p.failure.any()]

    def outputs(self, rows, counts):
        """Poisoned."""
        case = self.case
        if case.fp8:
            scales = empty_mn_major((rows, -(-case.hidden // 128)), torch.device("cpu")).fill_(torch.nan)
            data = torch.full((rows, case.hidden), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
            x = QuantizedTensor(data, scales, ROW)
        else:
            x = torch.full((rows, case.hidden), torch.nan).bfloat16()
        return kernels.Arrivals(
            x,
            torch.full((rows,), -9),
            torch.full((rows,), torch.nan) if case.weights else None,
            torch.full((case.local_experts + 1,), -9, dtype=torch.int32),
            torch.full((counts, self.size), -9, dtype=torch.int32),
            torch.full((self.size, case.tokens, case.topk), -9, dtype=torch.int32),
            torch.full((self.size, self.num_sms // 2, 2), -9, dtype=torch.int32),
        )

    def run(self, rounds, rows, source=None, dispatch_only=False):
        """Each rank's calls back to back, no rank waiting for another: the outputs by round and rank.

        source: one text with both kernels, in place of those in csrc.
        """
        if source is None:
            both = [kernel.ptx(lineinfo=True) for kernel in (kernels.DISPATCH, kernels.COMBINE)]
            there, back = [(ptx.text, ptx.name) for ptx in both]
        else:
            text = jit.compile_ptx(source, lineinfo=True)
            there, back = (text, "dispatch_tokens"), (text, "combine_tokens")
        shape = launch_of(self.shape, self.num_sms)
        back_shape = launch_of(self.shape, self.back_sms)
        out = [
            [self.outputs(rows[i][r], inputs.topk_idx[r].shape[0]) for r in range(self.size)]
            for i, inputs in enumerate(rounds)
        ]

        def program(rank, group):
            for i, inputs in enumerate(rounds):
                weights = inputs.topk_weights[rank] if self.case.weights else None
                call = kernels.dispatch_call(
                    self.workspace,
                    self.peers[rank],
                    self.error[rank],
                    inputs.x[rank],
                    inputs.topk_idx[rank],
                    weights,
                    out[i][rank].x,
                    out[i][rank],
                    False,
                    SECONDS,
                )
                emulator.current().launch(*there, args=(kernels.table([call]), self.num_sms), **shape)
                if self.peers[rank].failure.any() or dispatch_only:
                    return
                call = self.combine(rank, i, inputs, out[i][rank])
                emulator.current().launch(*back, args=(kernels.table([call]), self.back_sms), **back_shape)
                if self.peers[rank].failure.any():
                    return

        self.cluster.run(program)
        return out

    def combine(self, rank, round_, inputs, came):
        """The argument of a rank's combine."""
        case = self.case
        y, gradients = results(case, round_, rank, came.topk_idx.shape[0])
        came.home = torch.full((inputs.topk_idx[rank].shape[0], case.hidden), torch.nan).bfloat16()
        came.home_gradients = torch.full(inputs.topk_idx[rank].shape, torch.nan)
        came.kept = y, gradients  # no launch keeps its arguments alive
        return kernels.combine_call(
            self.workspace,
            self.peers[rank],
            y,
            inputs.topk_idx[rank],
            came,
            came.topk_weights,
            gradients if case.seed % 2 else None,
            inputs.bias[rank] if round_ == 1 else None,
            came.home,
            came.home_gradients if case.seed % 2 else None,
            False,
            SECONDS,
        )


def tensors(x):
    return (x.data.view(torch.uint8), x.scales) if isinstance(x, QuantizedTensor) else (x,)


def expected_of(case, inputs):
    return reference.dispatch(
        inputs.x, inputs.topk_idx, inputs.topk_weights if case.weights else None, case.num_experts
    )


def check(case, round_, out):
    check_dispatch(case, draw(case, round_), out, f"round {round_}, {case}")
    check_combine(case, round_, out)


def check_combine(case, round_, out):
    inputs = draw(case, round_)
    came = expected_of(case, inputs)
    counts = [t.shape[0] for t in inputs.topk_idx]
    both = [results(case, round_, rank, part.topk_idx.shape[0]) for rank, part in enumerate(out)]
    y, gradients = (
        [t[: len(c.origin)] for t, c in zip(ts, came, strict=True)] for ts in zip(*both, strict=True)
    )
    weights = [part.topk_weights for part in came] if case.weights else None
    want = reference.combine(y, came, counts, case.topology, weights, inputs.bias if round_ == 1 else None)
    for rank, (mine, expected) in enumerate(zip(out, want, strict=True)):
        assert torch.equal(bits(mine.home), bits(expected)), f"rank {rank}, round {round_}, {case}"
    if case.seed % 2:
        want = reference.combine_weights_grad(gradients, came, counts, case.topk)
        assert all(torch.equal(mine.home_gradients, t) for mine, t in zip(out, want, strict=True))


def check_dispatch(case, inputs, out, where):
    for rank, (mine, want) in enumerate(zip(out, expected_of(case, inputs), strict=True)):
        at = f"rank {rank}, {where}"
        assert torch.equal(mine.group_offsets, want.group_offsets), at
        count = len(want.origin)
        assert torch.equal(mine.topk_idx[:count], want.topk_idx) and (mine.topk_idx[count:] == -9).all(), at
        for got, expected in zip(tensors(mine.x), tensors(want.x), strict=True):
            assert torch.equal(bits(got[:count]), bits(expected)), at
        if case.weights:
            assert torch.equal(mine.topk_weights[:count], want.topk_weights), at
        check_rows(case, inputs, out, rank, want)


def check_rows(case, inputs, out, rank, want):
    """What combine needs: a token's slot here, and the slot's rows by ascending expert."""
    rows_of = {}
    for row, (source, token, _) in enumerate(want.origin):
        rows_of.setdefault((source, token), []).append(row)
    for source, idx in enumerate(inputs.topk_idx):
        for token in range(idx.shape[0]):
            slot = int(out[source].sent_slot[token, rank])
            rows = rows_of.get((source, token), [])
            assert (slot >= 0) == bool(rows)
            if rows:
                assert out[rank].rows[source, slot].tolist() == rows + [-1] * (case.topk - len(rows))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_bit_equal_to_the_reference(size):
    seed = fresh_generator().initial_seed() % (1 << 30)
    chance = random.Random(seed)
    for i, routing in enumerate(chance.sample(ROUTINGS, 3 if size == 8 else 4)):
        case = Case(
            Topology(1, size),
            routing,
            fp8=(i + seed) % 2 == 0,
            local_experts=chance.choice([1, 3]),
            hidden=chance.choice([32, 144]),
            num_topk=chance.choice([1, 3, 4]),
            tokens=6,
            weights=chance.random() < 0.7,
            seed=seed + i,
        )
        node = Node(case, seed + i, num_sms=chance.choice([2, 4]) if size < 8 else 2)
        rounds = [draw(case, round_) for round_ in range(3)]
        rows = [[len(e.origin) + chance.choice([0, 2]) for e in expected_of(case, i)] for i in rounds]
        for round_, out in enumerate(node.run(rounds, rows)):
            check(case, round_, out)
        assert not node.failures() and not any(error.any() for error in node.error)


def test_a_killed_rank_is_named_in_time():
    """By each of the others, also by one that waited for another that gave up."""
    chance = random.Random(fresh_generator().initial_seed())
    case = Case(Topology(1, 3), local_experts=2, hidden=32, num_topk=2, tokens=12, seed=1)
    rounds = [draw(case, round_) for round_ in range(3)]
    rows = [[len(e.origin) for e in expected_of(case, inputs)] for inputs in rounds]
    healthy = Node(case, 0, num_sms=4)
    healthy.run(rounds, rows)
    for trial in range(6):
        node, victim = Node(case, trial, num_sms=4), chance.randrange(3)
        step = chance.randrange(healthy.cluster.counters["instructions"] // 3)
        node.cluster.kill(victim, step)
        node.run(rounds, rows)
        for rank in {0, 1, 2} - {victim}:
            record = kernels.Failure(*node.peers[rank].failure.tolist())
            where = (trial, victim, step, rank, record)
            assert record.recorded and record.role in (1, 2) and record.channel < 2, where
            assert record.peer != rank and record.seen < record.expected and record.missing == victim, where
        spent = node.cluster.counters["nanoseconds"] - healthy.cluster.counters["nanoseconds"]
        assert spent < 4 * SECONDS * 1e9  # the emulator's clock jumps where nothing moves


@pytest.mark.parametrize("fp8", [False, True])
def test_nvlink_bytes(fp8):
    """A token to another rank: row, scales, 8 bytes a choice; home: a row. The rest is counts and tails."""
    case = Case(
        Topology(1, 3), fp8=fp8, local_experts=4, hidden=7168, num_topk=8, tokens=8, seed=int(fp8) * 2
    )
    node, inputs = Node(case, 0, num_sms=2), draw(case)
    out = node.run([inputs], [[len(e.origin) for e in expected_of(case, inputs)]])[0]
    pairs = [
        int((out[source].sent_slot[:, rank] >= 0).sum())
        for source in range(3)
        for rank in range(3)
        if rank != source
    ]
    tails = sum(-(-n // 4) for n in pairs)
    payload = 7168 + 56 * 4 if fp8 else 2 * 7168
    announced = 4 * (4 + 5 + 3) + 8  # counts, five words, rows for each rank; a tail
    there = sum(pairs) * (payload + 8 * 8) + 6 * announced + 8 * tails
    home = sum(pairs) * 2 * 7168 + 8 * tails
    acks = 2 * 6 * 8
    assert node.cluster.counters["peer_bytes"] == there + home + acks
    assert there - sum(pairs) * payload < 0.02 * sum(pairs) * payload


def test_a_call_that_is_wrong_writes_nothing():
    """Every rank finds the same fault, the worst one, and leaves what it would have received as it was."""
    case = Case(Topology(1, 3), local_experts=2, hidden=32, num_topk=2, tokens=8, weights=False, seed=4)
    inputs = draw(case)
    want = [len(e.origin) for e in expected_of(case, inputs)]
    short = [want[0], want[1] - 1, want[2] - 2]
    for bad, rows, fault in (
        (-2, short, (ErrorCode.DISPATCH_EXPERTS, 1, 4, -2, 0)),
        (case.num_experts, want, (ErrorCode.DISPATCH_EXPERTS, 1, 4, 6, 0)),
        (1 << 40, want, (ErrorCode.DISPATCH_EXPERTS, 1, 4, 1 << 40, 0)),
        (-(1 << 62), want, (ErrorCode.DISPATCH_EXPERTS, 1, 4, -(1 << 62), 0)),
        (None, short, (ErrorCode.DISPATCH_OVERFLOW, 1, 0, want[1], want[1] - 1)),
    ):
        node, wrong = Node(case, 0, num_sms=4), draw(case)
        if bad is not None:
            wrong.topk_idx[1][2, 0] = bad
        for rank, out in enumerate(node.run([wrong], [rows], dispatch_only=True)[0]):
            assert kernels.Fault(*node.peers[rank].fault.tolist()) == kernels.Fault(*fault, 1)
            assert int(node.error[rank]) == fault[0]
            assert out.x.isnan().all() and (out.topk_idx == -9).all() and (out.rows == -9).all()
            assert (out.group_offsets == -9).all()
        assert not node.failures()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_buffer_in_the_emulator(size):
    """The same program and check as of the portable transport: ep.Buffer finds the kernels by its group."""
    seed = fresh_generator().initial_seed() % (1 << 30)
    chance = random.Random(seed)
    for fp8 in (False, True):
        case = Case(
            Topology(1, size),
            chance.choice(ROUTINGS),
            fp8,
            local_experts=2,
            hidden=144,
            tokens=4,
            seed=seed + fp8,
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
        first, second = (int(came[1 - rank, channel, 1]) for channel in range(2))
        tails = sum(group.all_gather_object(-(-first // 4) + -(-second // 4)))
        rows = sum(group.all_gather_object(first + second))
        for num_sms in (2, 4, 6):
            group.barrier()
            before = cluster.counters["peer_bytes"]
            group.barrier()
            again = buffer.dispatch(-x, num_sms=num_sms, handle=got.handle)
            group.barrier()
            forms = 2 * 2 * 4  # of each channel
            assert cluster.counters["peer_bytes"] - before == rows * 64 + (tails + 2) * 8 + forms
            assert torch.equal(bits(again.x), bits(-got.x)) and torch.equal(again.topk_idx, got.topk_idx)

    cluster.run(program)


def test_bad_experts_are_an_error_on_every_rank():
    """Which leaves the buffer as good as before: a fault in either channel of a rank, then a good round."""
    case = Case(Topology(1, 3), local_experts=2, hidden=32, num_topk=2, tokens=8, seed=9)
    good = draw(case)
    most = max(idx.shape[0] for idx in good.topk_idx)
    seed = fresh_generator().initial_seed() % (1 << 30)

    def program(rank, group):
        buffer = ep.Buffer(group, case.num_experts, case.hidden, most, case.topk, gpus_per_node=3)
        for bad, token, value in ((0, 0, -2), (2, -1, 6), (1, 1, "twice")):
            idx = good.topk_idx[rank].clone()
            if rank == bad:
                idx[token, 0] = idx[token, 1] = 5
                if value != "twice":
                    idx[token, 0] = value
            token, k = token % len(good.topk_idx[bad]), int(value == "twice")
            at = rf"topk_idx\[{token}, {k}\] of rank {bad} is {5 if k else value}, "
            with pytest.raises(ValueError, match=at):
                buffer.dispatch(good.x[rank], idx, num_sms=4)
            got = buffer.dispatch(good.x[rank], good.topk_idx[rank], num_sms=4)
            want = reference.dispatch(good.x, good.topk_idx, None, case.num_experts)[rank]
            assert torch.equal(bits(got.x), bits(want.x)) and torch.equal(got.topk_idx, want.topk_idx)
        assert buffer.status().failure is None

    emulator.VirtualCluster(1, 3, seed, num_sms=4).run(program)


def test_the_buffer_names_a_killed_rank():
    case = Case(Topology(1, 2), local_experts=2, hidden=32, num_topk=2, tokens=8, seed=3)
    inputs = draw(case)
    cluster = emulator.VirtualCluster(1, 2, num_sms=2)
    cluster.kill(1)

    def program(rank, group):
        buffer = ep.Buffer(group, 4, 32, 8, 2, gpus_per_node=2, timeout=SECONDS)
        if rank == 1:
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
            return
        with pytest.raises(ep.TimeoutError, match=r"dispatch: rank 0 \(receive, channel 0\) .* for rank 1"):
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
        with pytest.raises(ep.TimeoutError):
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
        assert "rank 1" in buffer.status().failure

    cluster.run(program)
