"""The all-to-all's kernels when something is wrong: every rank says so and what, and writes nothing else."""

import random

import pytest
import torch
from cases import Case, bits, draw
from fp8_helpers import fresh_generator
from virtual_node import SECONDS, Node, check, rows_of

from dsv3_kernels import emulator, ep, quantize_1x128
from dsv3_kernels.device_error import ErrorCode
from dsv3_kernels.ep import Topology, kernels, reference


def test_a_call_that_is_wrong_writes_nothing():
    """Every rank finds the same fault, the worst one, leaves its rows alone, and a layout of nothing."""
    case = Case(Topology(1, 3), local_experts=2, hidden=32, num_topk=2, tokens=8, weights=False, seed=4)
    inputs = draw(case)
    want = rows_of(case, inputs)
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
        for rank, out in enumerate(node.run([wrong], [rows], calls=("dispatch",))[0]):
            assert kernels.Fault(*node.peers[rank].fault.tolist()) == kernels.Fault(*fault, 1)
            assert int(node.peers[rank].error) == fault[0]
            assert out.x.isnan().all() and (out.topk_idx == -9).all() and (out.rows == -9).all()
            assert not out.group_offsets.any() and (out.ranges[:, :, 1] == -1).all()
        assert not node.failures()


TROUBLE = Case(Topology(1, 3), local_experts=2, hidden=32, num_topk=2, tokens=12, seed=1)
CALLS = ("dispatch", "combine", "again", "combine")
TRIALS = [*range(5), *(pytest.param(trial, marks=pytest.mark.long) for trial in range(5, 50))]


@pytest.fixture(scope="module")
def healthy():
    """Three rounds without trouble: their inputs, rows, and what they took."""
    rounds = [draw(TROUBLE, round_) for round_ in range(3)]
    rows = [rows_of(TROUBLE, inputs) for inputs in rounds]
    node = Node(TROUBLE, 0, num_sms=4)
    node.run(rounds, rows, calls=CALLS)
    return rounds, rows, node.cluster.counters


def records(node, survivors):
    """What each survivor says; all name a rank, none a survivor of those that it waited for in vain."""
    found = {}
    for rank in survivors:
        words = next(words for words in node.peers[rank].failure.tolist() if words[-1])
        record = kernels.Failure(*words)
        assert record.recorded and record.role in (1, 2), (rank, record)
        assert record.channel < kernels.channels_of(node.shape, node.num_sms), (rank, record)
        assert record.peer != rank and record.seen < record.expected, (rank, record)
        found[rank] = record
    return found


@pytest.mark.parametrize("trial", TRIALS)
def test_a_killed_rank_is_named_in_time(trial, healthy):
    """By each of the others, also by one that waited for another that gave up."""
    rounds, rows, spent = healthy
    chance = random.Random(fresh_generator().initial_seed() + trial)
    node, victim = Node(TROUBLE, trial, num_sms=4), chance.randrange(3)
    step = chance.randrange(spent["instructions"] // 3)
    node.cluster.kill(victim, step)
    node.run(rounds, rows, calls=CALLS)
    for record in records(node, {0, 1, 2} - {victim}).values():
        assert record.missing == victim, (victim, step, record)
    # The emulator's clock jumps where nothing moves.
    assert node.cluster.counters["nanoseconds"] - spent["nanoseconds"] < 4 * SECONDS * 1e9


@pytest.mark.parametrize("trial", TRIALS)
def test_a_stalled_rank_is_named_by_all(trial, healthy):
    """Itself too, once it comes and finds that the others have given up."""
    rounds, rows, _ = healthy
    chance = random.Random(fresh_generator().initial_seed() + trial)
    node, victim = Node(TROUBLE, trial, num_sms=4), chance.randrange(3)
    late = (victim, chance.randrange(2), chance.randrange(len(CALLS)), 6 * SECONDS)  # all need it after that
    node.run(rounds, rows, calls=CALLS, late=late)
    for record in records(node, {0, 1, 2}).values():
        assert record.missing == victim, (late, record)


@pytest.mark.parametrize("trial", TRIALS)
def test_a_rank_that_is_late_in_time_harms_nothing(trial, healthy):
    """And those who waited for it have counted how long."""
    rounds, rows, _ = healthy
    chance = random.Random(fresh_generator().initial_seed() + trial)
    node, victim = Node(TROUBLE, trial, num_sms=4), chance.randrange(3)
    late = (victim, chance.randrange(3), chance.randrange(len(CALLS)), SECONDS / 4)
    for round_, out in enumerate(node.run(rounds, rows, calls=CALLS, late=late)):
        check(TROUBLE, round_, out)
    assert not node.failures()
    waits = [s for rank in {0, 1, 2} - {victim} for s in kernels.stalls(node.peers[rank]) if s.peer == victim]
    assert max(s.seconds for s in waits) > SECONDS / 8


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


def test_ranks_that_pass_different_things_all_hear_of_it():
    """FP8 against BF16, weights, order, room; the buffer stays good."""
    case = Case(Topology(1, 3), local_experts=2, hidden=32, num_topk=2, tokens=8, seed=11)
    inputs = draw(case)
    rows = rows_of(case, inputs)

    def program(rank, group):
        buffer = ep.Buffer(group, case.num_experts, case.hidden, 8, case.topk, gpus_per_node=3)
        x, idx, weights = inputs.x[rank], inputs.topk_idx[rank], inputs.topk_weights[rank]
        for bad, call, options, message in (
            (1, (quantize_1x128(x), idx, weights), {}, "rank 1 passes FP8 x with topk_weights in expert"),
            (2, (x, idx), {}, "rank 2 passes BF16 x without topk_weights in expert order"),
            (
                1,
                (x, idx, weights),
                {"expert_order": False},
                "rank 1 passes BF16 x with topk_weights in token",
            ),
            (2, (x, idx, weights), {"max_recv_tokens": rows[2] - 1}, f"rank 2 is sent {rows[2]} rows, exp"),
        ):
            good = (x, idx, weights)
            with pytest.raises(ValueError, match=message):
                buffer.dispatch(
                    *(call if rank == bad else good), num_sms=4, **(options if rank == bad else {})
                )
            got = buffer.dispatch(*good, num_sms=4)
            assert got.topk_idx.shape[0] == rows[rank]
        # With a handle no counts travel, but every rank hears from every other, though no rows may come.
        others = {0: "rank 1 passes FP8 x", 1: "rank . passes BF16 x", 2: "rank 1 passes FP8 x"}
        for idx in (inputs.topk_idx[rank], torch.full_like(inputs.topk_idx[rank], -1)):
            got = buffer.dispatch(x, idx, num_sms=4)
            with pytest.raises(ValueError, match=others[rank]):
                buffer.dispatch(quantize_1x128(x) if rank == 1 else x, handle=got.handle, num_sms=4)
            again = buffer.dispatch(x, handle=got.handle, num_sms=2)
            assert torch.equal(bits(again.x), bits(got.x))
        assert buffer.status().failure is None

    emulator.VirtualCluster(1, 3, 5, num_sms=4).run(program)


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
        with pytest.raises(ep.TimeoutError, match=r"dispatch: rank 0 \(receive, channel \d\) .* for rank 1"):
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
        with pytest.raises(ep.TimeoutError):
            buffer.dispatch(inputs.x[rank], inputs.topk_idx[rank], num_sms=2)
        status = buffer.status()
        assert "rank 1" in status.failure
        stalls = [s for s in status.stalls if s.peer == 1]
        assert {(s.op, s.role) for s in stalls} == {("dispatch", "receive")}
        channels = kernels.channels_of(buffer._shape, 2)
        assert [s.channel for s in stalls] == list(range(channels))
        # The team of each channel waits for the counts of all.
        assert all(s.waits == channels for s in stalls) and max(s.seconds for s in stalls) >= SECONDS

    cluster.run(program)
