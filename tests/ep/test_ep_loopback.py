"""All ranks of a node in one launch, on a virtual GPU: bit for bit the reference, without a host read."""

import random

import pytest
import torch
from cases import ROUTINGS, Case, bits, draw, results
from fp8_helpers import fresh_generator
from host_reads import HostRead, no_host_reads

from dsv3_kernels import emulator, ep
from dsv3_kernels.ep import Topology, reference
from dsv3_kernels.quantized import QuantizedTensor


def buffer_of(case, timeout=1e-3, **options):
    return ep.LoopbackBuffer(
        case.topology.size,
        case.num_experts,
        case.hidden,
        case.tokens,
        case.topk,
        **{"device": "cpu", "timeout": timeout} | options,
    )


def tensors(x):
    return (x.data.view(torch.uint8), x.scales) if isinstance(x, QuantizedTensor) else (x,)


def equal(got, want):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors(got), tensors(want), strict=True))


def check(case, buffer, round_, declared, num_sms, back_sms):
    """A round of both ops on every rank, and its layout used again for other rows."""
    inputs, again = draw(case, round_), draw(case, round_ + 100)
    weights = inputs.topk_weights if case.weights else None
    want = reference.dispatch(
        inputs.x, inputs.topk_idx, weights, case.num_experts, expert_order=case.expert_order
    )
    launches = emulator.current().counters["launches"]
    got = buffer.dispatch(
        inputs.x,
        inputs.topk_idx,
        weights,
        num_sms,
        expert_order=case.expert_order,
        max_recv_tokens=max(len(w.origin) for w in want) + 2 if declared else None,
    )
    parts = 1 + (buffer.status()[0].internode == "lean")
    assert emulator.current().counters["launches"] == launches + parts, "all ranks in one"
    for rank, (mine, expected) in enumerate(zip(got, want, strict=True)):
        where, count = f"rank {rank}, round {round_}, {case}", len(expected.origin)
        assert mine.topk_idx.shape[0] == (count if not declared else mine.handle.rows), where
        rows = [t[:count] for t in tensors(mine.x)]
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(rows, tensors(expected.x), strict=True)), (
            where
        )
        assert torch.equal(mine.topk_idx[:count], expected.topk_idx), where
        assert (mine.topk_idx[count:] == -1).all(), where
        if case.weights:
            assert torch.equal(mine.topk_weights[:count], expected.topk_weights), where
        if case.expert_order:
            assert torch.equal(mine.group_offsets, expected.group_offsets), where
        assert torch.equal(mine.tokens_per_expert, expected.tokens_per_expert), where

    counts = [idx.shape[0] for idx in inputs.topk_idx]
    y, grads = zip(
        *(results(case, round_, rank, part.topk_idx.shape[0]) for rank, part in enumerate(got)), strict=True
    )
    weighted = [part.topk_weights for part in got] if case.weights and case.expert_order else None
    handles = [part.handle for part in got]
    out = buffer.combine(y, handles, weighted, inputs.bias, back_sms, weights_grad=grads)
    cut = [t[: len(w.origin)] for t, w in zip(y, want, strict=True)]
    sums = reference.combine(
        cut, want, counts, case.topology, weighted and [w.topk_weights for w in want], inputs.bias
    )
    assert all(equal(a.x, b) for a, b in zip(out, sums, strict=True)), case
    if case.expert_order:
        cut = [t[: len(w.origin)] for t, w in zip(grads, want, strict=True)]
        home = reference.combine_weights_grad(cut, want, counts, case.topk)
        assert all(torch.equal(a.weights_grad, b) for a, b in zip(out, home, strict=True)), case

    if [len(tensors(t)[0]) for t in again.x] == counts:
        other = reference.dispatch(
            again.x, inputs.topk_idx, weights, case.num_experts, expert_order=case.expert_order
        )
        for mine, expected in zip(
            buffer.dispatch(again.x, handle=handles, num_sms=back_sms), other, strict=True
        ):
            rows = [t[: len(expected.origin)] for t in tensors(mine.x)]
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(rows, tensors(expected.x), strict=True))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_bit_equal_to_the_reference(size):
    seed = fresh_generator().initial_seed() % (1 << 30)
    chance = random.Random(seed)
    for i, routing in enumerate(chance.sample(ROUTINGS, 1 if size == 8 else 2)):
        case = Case(
            Topology(1, size),
            routing,
            fp8=(i + seed) % 2 == 0,
            local_experts=chance.choice([1, 3]),
            hidden=chance.choice([32, 144]),
            num_topk=chance.choice([1, 3]),
            tokens=6 if size == 8 else 10,
            expert_order=chance.random() < 0.7,
            weights=chance.random() < 0.7,
            seed=seed + i,
        )
        with emulator.virtual_gpu(num_sms=4 * size, seed=seed + i):
            buffer = buffer_of(case)
            for round_ in range(2):
                check(case, buffer, round_, chance.random() < 0.5, chance.choice([2, 4]), 2)
        status = buffer.status()
        assert [s.rank for s in status] == list(range(size))
        assert all((s.transport, s.combines, s.failure) == ("loopback", 2, None) for s in status)


# ---- No host read


def calls(case, buffer, inputs, **options):
    """Every kind of call that declares what it takes; then those of a cached handle."""
    got = buffer.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, 2, max_recv_tokens=80, **options)
    handles, weights = [part.handle for part in got], [part.topk_weights for part in got]
    y = [torch.zeros(80, case.hidden, dtype=torch.bfloat16) for _ in got]
    grads = [torch.zeros(part.topk_idx.shape) for part in got]
    buffer.dispatch(inputs.x, handle=handles, num_sms=2)
    buffer.combine(y, handles, weights, inputs.bias, 2, weights_grad=grads, **options)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("async_op", [False, True])
def test_a_declared_maximum_or_a_handle_needs_no_host_read(fp8, async_op):
    """So a CUDA graph can hold the calls; also the events of asynchronous ones."""
    case = Case(Topology(1, 2), fp8=fp8, tokens=6, hidden=144)
    inputs = draw(case)
    with emulator.virtual_gpu(num_sms=4):
        buffer = buffer_of(case)
        event = ep.Event()
        with no_host_reads():
            calls(case, buffer, inputs, async_op=async_op, previous_event=event)
            buffer.check()
            with pytest.raises(HostRead):
                buffer.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, 2)


# ---- Faults and arguments


def test_a_fault_is_raised_once_and_what_was_queued_behind_it_does_no_harm():
    """As on a GPU, where the host learns of it after it has queued the combine and more."""
    case = Case(Topology(1, 3), tokens=8, seed=3)
    inputs, good = draw(case), draw(case)
    inputs.topk_idx[1][2, 0] = case.num_experts
    with emulator.virtual_gpu(num_sms=12) as gpu:
        buffer = buffer_of(case)
        real = buffer.check
        unheard = pytest.MonkeyPatch()
        unheard.setattr(ep.intranode, "check", lambda ranks: None)
        got = buffer.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, 4, max_recv_tokens=40)
        handles = [part.handle for part in got]
        assert not any(part.group_offsets.any() or part.tokens_per_expert.any() for part in got)
        y = [torch.zeros(40, case.hidden).bfloat16() for _ in got]
        before = gpu.counters["nanoseconds"]
        buffer.combine(y, handles, num_sms=4)
        buffer.dispatch(good.x, handle=handles, num_sms=2)
        assert gpu.counters["nanoseconds"] - before < 1e6, "nobody waits for what will not come"
        unheard.undo()
        with pytest.raises(ValueError, match=r"topk_idx\[2, 0\] of rank 1 is 9, out of range"):
            real()
        real()
        check(case, buffer, 1, True, 4, 2)


@pytest.mark.parametrize(
    "changes", [{"num_experts": 7}, {"num_ranks": 9, "num_experts": 9}, {"num_ranks": 0}]
)
def test_sizes_that_cannot_be_are_refused(changes):
    sizes = {
        "num_ranks": 2,
        "num_experts": 6,
        "hidden": 32,
        "max_tokens_per_rank": 4,
        "num_topk": 2,
    } | changes
    with emulator.virtual_gpu(), pytest.raises(ValueError, match="expected"):
        ep.LoopbackBuffer(**sizes, device="cpu")


def test_a_cpu_without_a_virtual_gpu_is_refused():
    with pytest.raises(ValueError, match="where no kernel runs; pass a CUDA device"):
        ep.LoopbackBuffer(2, 6, 32, 4, 2, device="cpu")


def test_wrong_arguments_say_which_rank():
    case = Case(Topology(1, 3), tokens=4)
    inputs = draw(case)
    with emulator.virtual_gpu(num_sms=8):
        buffer = buffer_of(case)

        def refused(error, text, *arguments, **options):
            with pytest.raises(error, match=text):
                buffer.dispatch(*arguments, **options)

        x, idx, weights = inputs.x, inputs.topk_idx, inputs.topk_weights
        refused(TypeError, "x is 2 of them, expected a list with one for each", x[:2], idx, weights)
        refused(TypeError, "topk_idx is Tensor, expected a list", x, idx[0], weights)
        refused(
            ValueError,
            "num_sms is 4, which is 12 SMs for 3 ranks, expected at most the GPU's 8",
            x,
            idx,
            num_sms=4,
        )
        refused(TypeError, "rank 2: dispatch: topk_idx", x, [*idx[:2], idx[2].int()], num_sms=2)
        refused(ValueError, "rank 0: dispatch: num_sms is 1, expected at least 2", x, idx, num_sms=1)
        got = buffer.dispatch(x, idx, num_sms=2)
        handles = [part.handle for part in got]
        refused(ValueError, "rank 0: .* handle is of another buffer", x, handle=handles[::-1], num_sms=2)
