"""Dispatch and combine of the portable transport: bit for bit what ep/reference.py says, at 1 to 8 ranks."""

import random
import time

import pytest
import ranks
import torch
from cases import ROUTINGS, Case, bits, draw, results
from fp8_helpers import fresh_generator

from dsv3_kernels import ep
from dsv3_kernels.ep import Topology, reference
from dsv3_kernels.quantized import QuantizedTensor

ROUNDS = 3
TOPOLOGIES = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 3: [(1, 3)], 4: [(1, 4), (2, 2)], 8: [(1, 8), (2, 4), (4, 2)]}


def cases_of(size, seed):
    """Every routing in both dtypes and orders, over the topologies of this size."""
    chosen = random.Random(seed)
    for i, routing in enumerate(ROUTINGS * 2):
        yield Case(
            Topology(*chosen.choice(TOPOLOGIES[size])),
            routing,
            fp8=bool(chosen.getrandbits(1)) if i < len(ROUTINGS) else i % 2 == 0,
            local_experts=chosen.choice([1, 2, 5]),
            hidden=chosen.choice([16, 144, 256]),
            num_topk=chosen.choice([1, 2, 4, 8]),
            tokens=chosen.choice([2, 9, 16]),
            expert_order=i < len(ROUTINGS) or chosen.random() < 0.3,
            weights=chosen.random() < 0.8,
            seed=seed * 1000 + i,
        )


def tensors(x):
    return [x.data.view(torch.uint8), x.scales] if isinstance(x, QuantizedTensor) else [x]


def exchange(buffer, case, round_, drift, num_sms=20):
    """One dispatch and combine of this rank, plainly and by every other way that must give the same."""
    inputs, rank = draw(case, round_), buffer.rank
    x, idx, weights = inputs.x[rank], inputs.topk_idx[rank], inputs.topk_weights[rank]
    weights = weights if case.weights else None
    time.sleep(drift.random() * 2e-3)
    got = buffer.dispatch(x, idx, weights, num_sms, expert_order=case.expert_order)
    count = got.handle.rows
    y, grad = results(case, round_, rank, count)
    home = buffer.combine(y, got.handle, num_sms=num_sms)
    out = {
        "x": tensors(got.x),
        "topk_idx": got.topk_idx,
        "topk_weights": got.topk_weights,
        "group_offsets": got.group_offsets,
        "tokens_per_expert": got.tokens_per_expert,
        "home": home.x,
    }
    # Asynchronous and cached, into more rows than needed, and with every option of combine.
    if isinstance(x, QuantizedTensor):
        x = (x.data, x.scales.contiguous())
    wide = buffer.dispatch(
        x,
        idx,
        weights,
        num_sms,
        expert_order=case.expert_order,
        max_recv_tokens=count + 3,
        async_op=True,
    )
    again = buffer.dispatch(x, num_sms=num_sms, handle=wide.handle, async_op=True, previous_event=wide.event)
    again.event.wait()
    assert again.topk_weights is None and torch.equal(again.topk_idx, wide.topk_idx)
    for result in (wide, again):
        for mine, padded in zip(out["x"], tensors(result.x), strict=True):
            assert padded.shape[0] == count + 3
            assert torch.equal(bits(padded[:count]), bits(mine))
            assert buffer.status().transport != "portable" or not padded[count:].any()
        assert (result.topk_idx[count:] == -1).all() and torch.equal(result.topk_idx[:count], got.topk_idx)
    if isinstance(x, tuple):
        assert wide.x.scales.stride() == (1, -(-(count + 3) // 4) * 4) or wide.x.scales.shape[1] == 1
    y3, grad3 = (
        torch.cat([t, torch.full_like(t[:1].expand(3, *t.shape[1:]), torch.nan)])
        if count
        else t.new_full((3, *t.shape[1:]), torch.nan)
        for t in (y, grad)
    )
    w3 = wide.topk_weights if case.expert_order else None
    full = buffer.combine(
        y3, wide.handle, w3, inputs.bias[rank], weights_grad=grad3, async_op=True, num_sms=2
    )
    full.event.wait()
    return out | {"full": full.x, "weights_grad": full.weights_grad}


def program(rank, size, seed):
    drift = random.Random(seed + rank)
    outputs = []
    for case in cases_of(size, seed):
        buffer = ep.Buffer(
            None if size == 1 else torch.distributed.group.WORLD,
            case.num_experts,
            case.hidden,
            case.tokens,
            case.topk,
            gpus_per_node=case.topology.gpus_per_node,
            timeout=60,
        )
        outputs.append([exchange(buffer, case, round_, drift) for round_ in range(ROUNDS)])
        status = buffer.status()
        assert status.dispatches == 3 * ROUNDS and status.combines == 2 * ROUNDS and status.failure is None
    return outputs


def check(case, round_, got):
    """got: the outputs of all ranks."""
    inputs = draw(case, round_)
    weights = inputs.topk_weights if case.weights else None
    expected = reference.dispatch(
        inputs.x, inputs.topk_idx, weights, case.num_experts, expert_order=case.expert_order
    )
    counts = [t.shape[0] for t in inputs.topk_idx]
    y, grad = zip(
        *(results(case, round_, rank, len(e.origin)) for rank, e in enumerate(expected)), strict=True
    )
    home = reference.combine(y, expected, counts, case.topology)
    row_weights = [e.topk_weights for e in expected] if case.weights and case.expert_order else None
    full = reference.combine(y, expected, counts, case.topology, row_weights, inputs.bias)
    for rank, e in enumerate(expected):
        mine = got[rank]
        want = {
            "topk_idx": e.topk_idx,
            "topk_weights": e.topk_weights,
            "group_offsets": e.group_offsets,
            "tokens_per_expert": e.tokens_per_expert,
            "home": home[rank],
            "full": full[rank],
        }
        want |= {f"x[{i}]": t for i, t in enumerate(tensors(e.x))}
        mine |= {f"x[{i}]": t for i, t in enumerate(mine["x"])}
        for name, value in want.items():
            where = f"{name} of rank {rank}, round {round_}, {case}"
            if value is None:
                assert mine[name] is None, where
                continue
            assert mine[name].dtype == value.dtype and mine[name].shape == value.shape, where
            assert torch.equal(bits(mine[name]), bits(value)), where
    check_weights_grad(case, inputs, expected, grad, [g["weights_grad"] for g in got])


def check_weights_grad(case, inputs, expected, grad, got):
    counts = [t.shape[0] for t in inputs.topk_idx]
    if case.expert_order:
        want = reference.combine_weights_grad(grad, expected, counts, case.topk)
    else:
        want = [torch.zeros(t.shape) for t in inputs.topk_idx]
        for values, e in zip(grad, expected, strict=True):
            for row, (source, token, _) in enumerate(e.origin):
                want[source][token] += values[row].masked_fill(e.topk_idx[row] < 0, 0.0)
    for mine, value in zip(got, want, strict=True):
        assert torch.equal(mine, value), case


@pytest.mark.parametrize("size", TOPOLOGIES)
def test_bit_equal_to_the_reference(size, tmp_path):
    seed = fresh_generator().initial_seed() % (1 << 30)
    got = [program(0, 1, seed)] if size == 1 else ranks.run(tmp_path / "ranks", size, program, seed)
    for i, case in enumerate(cases_of(size, seed)):
        for round_ in range(ROUNDS):
            check(case, round_, [of_rank[i][round_] for of_rank in got])


def test_one_rank_alone_moves_nothing():
    buffer = ep.Buffer(None, num_experts=1, hidden=32, max_tokens_per_rank=8, num_topk=1)
    x = torch.randn(8, 32).bfloat16()
    got = buffer.dispatch(x, torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1))
    assert torch.equal(got.x, x) and got.group_offsets.tolist() == [0, 8]
    assert torch.equal(buffer.combine(got.x, got.handle).x, x)
    assert buffer.status().bytes_sent == 0 and buffer.status().stalls == ()


def count_bytes(rank, size):
    buffer = ep.Buffer(None, num_experts=8, hidden=7168, max_tokens_per_rank=64, num_topk=8)
    gen = torch.Generator().manual_seed(rank)
    idx = torch.stack([torch.randperm(8, generator=gen) for _ in range(64)])
    idx[:, 3:] = -1
    x = torch.randn(64, 7168, generator=gen).bfloat16()
    before = buffer.status().bytes_sent
    got = buffer.dispatch(x, idx, torch.ones(64, 8))
    sent = buffer.status().bytes_sent - before
    before += sent
    buffer.combine(got.x, got.handle)
    pairs = sum(bool((idx[t] // (8 // size) == r).any()) for t in range(64) for r in range(size) if r != rank)
    received = sum(count for r, count in enumerate(got.handle.layout.received) if r != rank)
    return sent, pairs, buffer.status().bytes_sent - before, received


def test_a_row_travels_once_to_each_rank(tmp_path):
    for sent, pairs, back, received in ranks.run(tmp_path / "ranks", 4, count_bytes):
        metadata = sent - pairs * 2 * 7168
        assert 0 < metadata < 0.02 * sent
        assert back == received * 2 * 7168
