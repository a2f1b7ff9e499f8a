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


def returned(case, inputs, round_, rank):
    """What the experts of a rank give back: y, poisoned where there are no rows."""
    counts = reference.dispatch(inputs.topk_idx, case.num_experts)[rank].tokens_per_expert
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


def dispatch(buffer, inputs, rank, form, hook=True):
    return buffer.low_latency_dispatch(
        inputs.x[rank],
        inputs.topk_idx[rank],
        form.num_sms,
        fp8=form.fp8,
        power_of_2_scales=form.power_of_2,
        return_recv_hook=hook,
    )


def one_round(buffer, case, inputs, round_, rank, form):
    """Dispatch and combine of one rank: what it received, and its sums."""
    got = dispatch(buffer, inputs, rank, form, form.hook)
    if form.hook:
        poison(got.x)
        got.tokens_per_expert.fill_(-9)
        got.hook()
    y = returned(case, inputs, round_, rank)
    home = buffer.low_latency_combine(
        y, got.handle, inputs.topk_weights[rank], form.num_sms, return_recv_hook=form.hook
    )
    if form.hook:
        home.x.fill_(torch.nan)
        home.hook()
    return received(got), home.x


def two_rounds(buffer, case, both, rank, form):
    """Two dispatches, then two combines, under way at a time, each received after the other has sent."""
    sent = [dispatch(buffer, inputs, rank, form) for inputs in both]
    homes = []
    for i, (got, inputs) in enumerate(zip(sent, both, strict=True)):
        got.hook()
        got.hook()  # once more does nothing
        weights = inputs.topk_weights[rank]
        y = returned(case, inputs, i, rank)
        homes.append(buffer.low_latency_combine(y, got.handle, weights, 2, return_recv_hook=True))
    for home in homes:
        home.hook()
    return [(received(got), home.x) for got, home in zip(sent, homes, strict=True)]


def dispatches_ahead(buffer, rounds, rank, form):
    """Dispatches alone, each sent before the one ahead of it is received: nothing else holds a rank back."""
    got = []
    for inputs in rounds:
        got.append(dispatch(buffer, inputs, rank, form))
        if len(got) > 1:
            got[-2].hook()
    got[-1].hook()
    return [received(result) for result in got]


def received(got):
    """As plain tensors, which pass between processes."""
    x = got.x
    parts = [x.data.view(torch.uint8), x.scales] if isinstance(x, QuantizedTensor) else [x]
    if isinstance(x, QuantizedTensor):
        assert x.scales.stride()[1] == 1 and x.scales.stride()[2] % 4 == 0
    return parts, got.tokens_per_expert


def check(case, inputs, round_, form, outputs):
    """outputs: (received, sums) of each rank."""
    check_dispatch(case, inputs, form, [got for got, _ in outputs], f"round {round_}")
    y = [returned(case, inputs, round_, rank) for rank in range(len(outputs))]
    want = reference.combine(y, reference.dispatch(inputs.topk_idx, case.num_experts), inputs.topk_weights)
    for rank, ((_, mine), expected) in enumerate(zip(outputs, want, strict=True)):
        assert torch.equal(bits(mine), bits(expected)), f"rank {rank}, round {round_}, {form}, {case}"


def check_dispatch(case, inputs, form, outputs, where=""):
    want = reference.dispatch(inputs.topk_idx, case.num_experts)
    for rank, ((parts, counts), part) in enumerate(zip(outputs, want, strict=True)):
        at = f"rank {rank}, {where}, {form}, {case}"
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
