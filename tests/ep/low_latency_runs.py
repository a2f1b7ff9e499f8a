"""One program of all ranks for low latency, whatever the transport, and the check of what it gave."""

from dataclasses import dataclass

import torch
from cases import bits, generator, rows

from dsv3_kernels import quantize_1x128
from dsv3_kernels.ep import low_latency_reference as reference
from dsv3_kernels.quantized import QuantizedTensor


@dataclass(frozen=True)
class Form:
    fp8: bool = True
    power_of_2: bool = False
    hook: bool = False
    num_sms: int = 2


def returned(case, round_, rank, counts):
    """What the experts of a rank give back: y, poisoned where there are no rows."""
    gen = generator(case.seed, round_, rank, 9)
    room = case.topology.size * case.tokens
    y = torch.full((case.local_experts, room, case.hidden), torch.nan).bfloat16()
    for expert, count in enumerate(counts.tolist()):
        y[expert, :count] = rows(gen, count, case.hidden)
    return y


def poison(x):
    parts = (x.data.view(torch.uint8), x.scales) if isinstance(x, QuantizedTensor) else (x,)
    for part in parts:
        part.fill_(0x7F if part.dtype == torch.uint8 else torch.nan)


def one_round(buffer, case, inputs, round_, rank, form, between=None):
    """Dispatch and combine of one rank: what it received, and its sums. between: done before a hook."""
    got = buffer.low_latency_dispatch(
        inputs.x[rank],
        inputs.topk_idx[rank],
        form.num_sms,
        fp8=form.fp8,
        power_of_2_scales=form.power_of_2,
        return_recv_hook=form.hook,
    )
    if form.hook:
        poison(got.x)
        got.tokens_per_expert.fill_(-9)
        if between:
            between()
        got.hook()
    y = returned(case, round_, rank, got.tokens_per_expert)
    home = buffer.low_latency_combine(
        y, got.handle, inputs.topk_weights[rank], form.num_sms, return_recv_hook=form.hook
    )
    if form.hook:
        home.x.fill_(torch.nan)
        home.hook()
    return received(got), home.x


def received(got):
    """As plain tensors, which pass between processes."""
    x = got.x
    parts = [x.data.view(torch.uint8), x.scales] if isinstance(x, QuantizedTensor) else [x]
    if isinstance(x, QuantizedTensor):
        assert x.scales.stride()[1] == 1 and x.scales.stride()[2] % 4 == 0
    return parts, got.tokens_per_expert


def check(case, inputs, round_, form, outputs, where=""):
    """outputs: (received, sums) of each rank."""
    want = reference.dispatch(inputs.topk_idx, case.num_experts)
    for rank, (((parts, counts), _), part) in enumerate(zip(outputs, want, strict=True)):
        at = f"rank {rank}, round {round_}, {form}, {case} {where}"
        assert torch.equal(counts, part.tokens_per_expert), at
        for expert, origin in enumerate(part.rows):
            if not origin:
                continue
            x = torch.stack([inputs.x[source][token] for source, token, _ in origin])
            expected = [x]
            if form.fp8:
                q = quantize_1x128(x, power_of_2_scales=form.power_of_2)
                expected = [q.data.view(torch.uint8), q.scales]
            for got, rows_of in zip(parts, expected, strict=True):
                assert torch.equal(bits(got[expert, : len(origin)]), bits(rows_of)), at
    y = [returned(case, round_, rank, part.tokens_per_expert) for rank, part in enumerate(want)]
    sums = reference.combine(y, want, inputs.topk_weights)
    for rank, ((_, mine), expected) in enumerate(zip(outputs, sums, strict=True)):
        assert torch.equal(bits(mine), bits(expected)), f"rank {rank}, round {round_}, {form}, {case} {where}"
