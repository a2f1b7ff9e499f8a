"""Low-latency dispatch and combine among virtual ranks of one GPU: bit by bit; speed against a plain copy."""

import functools
import itertools

import torch
from torch import Tensor

from dsv3_kernels import quantize_1x128
from dsv3_kernels.ep import Topology
from dsv3_kernels.ep import low_latency_reference as reference
from dsv3_kernels.quantized import QuantizedTensor

from .. import loopback
from . import Call, Case, Tensors, Workload
from .dispatch import LOCAL_EXPERTS, ONE_NODE, TOKENS, buffer_of, by_rank, name_of, routing
from .dispatch_internode import NODES

NOTE = (
    "To reach at 8 ranks x 16 SMs: half the speed of the copy, which is one kernel. An op is two launches, "
    f"here as one CUDA graph. {loopback.NOTE} {loopback.NOTE_OF_NODES}"
)
HIDDEN = 272  # of `buffer_of`


def _y(rank: int, counts: Tensor, room: int) -> Tensor:
    """What the experts of a rank return, the same wherever it is asked for; zeros where there are no rows."""
    generator = torch.Generator().manual_seed(rank)
    y = torch.randn(counts.numel(), room, HIDDEN, generator=generator).bfloat16()
    return y.masked_fill(torch.arange(room).view(1, -1, 1) >= counts.view(-1, 1, 1), 0.0)


def _case(topology: Topology, fp8: bool, num_sms: int) -> Case:
    ranks = topology.size
    room = ranks * TOKENS

    def inputs(generator: torch.Generator) -> Tensors:
        flat: list[Tensor] = []
        for rank, idx in enumerate(routing(ranks, generator)):
            x = torch.randn(idx.shape[0], HIDDEN, generator=generator).bfloat16()
            flat += [x, idx, torch.rand(idx.shape, generator=generator)]
            flat.append(torch.tensor(rank))  # the counts of its experts, once all are known
        each = by_rank(flat, ranks)
        want = reference.dispatch([parts[1] for parts in each], ranks * LOCAL_EXPERTS)
        return tuple(
            _y(i // 4, want[i // 4].tokens_per_expert, room) if i % 4 == 3 else part
            for i, part in enumerate(flat)
        )

    def bits(x: Tensor | QuantizedTensor) -> Tensors:
        return (x.data.view(torch.uint8), x.scales) if isinstance(x, QuantizedTensor) else (x,)

    def written(x: Tensor, counts: Tensor) -> Tensor:
        there = torch.arange(room, device=x.device).view(1, -1, 1) < counts.view(-1, 1, 1)
        return torch.where(there, x, torch.zeros_like(x))

    def run(*tensors: Tensor) -> Tensors:
        each, buffer = by_rank(tensors, ranks), buffer_of(topology, tensors[0].device)
        x, idx, weights, y = zip(*each, strict=True)
        got = buffer.low_latency_dispatch(x, idx, num_sms, fp8=fp8)
        home = buffer.low_latency_combine(y, [part.handle for part in got], weights, num_sms)
        flat: list[Tensor] = []
        for part, sums in zip(got, home, strict=True):
            counts = part.tokens_per_expert
            flat += [*(written(parts, counts) for parts in bits(part.x)), counts, sums.x]
        return tuple(flat)

    def expected(*tensors: Tensor) -> Tensors:
        x, idx, weights, y = zip(*by_rank(tensors, ranks), strict=True)
        want = reference.dispatch(idx, ranks * LOCAL_EXPERTS)
        sums = reference.combine(y, want, weights)
        rows = [bits(quantize_1x128(t)) if fp8 else (t,) for t in x]
        flat: list[Tensor] = []
        for part, home in zip(want, sums, strict=True):
            for i, like in enumerate(rows[0]):
                out = like.new_zeros(LOCAL_EXPERTS, room, like.shape[1])
                for expert, origin in enumerate(part.rows):
                    for row, (source, token, _) in enumerate(origin):
                        out[expert, row] = rows[source][i][token]
                flat.append(out)
            flat += [part.tokens_per_expert, home]
        return tuple(flat)

    name = f"low_latency {'fp8' if fp8 else 'bf16'} {name_of(topology, num_sms)}"
    return Case(name, inputs, run, expected)


CASES = [_case(*facts) for facts in itertools.product((*ONE_NODE, *NODES[:2]), (True, False), (2, 5))]


def _hops(op: str, setup: loopback.Setup) -> dict[str, int]:
    """Bytes read and written by the part of the way.

    A row to a near rank is written to its slot and read there. To a far rank it is staged first, by dispatch
    once a token, and the put reads it too.
    """
    sent, home = setup.dispatch_row, 2 * setup.hidden
    rows, tokens, far = setup.ranks * setup.rows, setup.ranks * setup.tokens, setup.far_rows
    width = sent if op == "dispatch" else home
    staged = setup.far_tokens if op == "dispatch" else far
    found = {
        "tokens": tokens * home,
        "InfiniBand": (staged + 3 * far) * width,
        "NVLink": 2 * (rows - far) * width,
        "rows of experts": rows * width,
    }
    return {hop: count for hop, count in found.items() if count}


def _workload(op: str, setup: loopback.Setup) -> Workload:
    def ours() -> Call:
        node = loopback.Node(setup)
        x = [torch.randn(setup.tokens, setup.hidden, device="cuda").bfloat16() for _ in range(setup.ranks)]
        dispatch = functools.partial(node.buffer.low_latency_dispatch, x, node.topk_idx, setup.num_sms)
        if op == "dispatch":
            return loopback.graphed(dispatch)
        got = dispatch()
        shape = (node.buffer.local_experts, setup.ranks * setup.tokens, setup.hidden)
        y = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in got]
        handles = [part.handle for part in got]
        combine = node.buffer.low_latency_combine
        return loopback.graphed(lambda: combine(y, handles, node.topk_weights, setup.num_sms))

    hops = _hops(op, setup)
    payload = setup.ranks * setup.rows * (setup.dispatch_row if op == "dispatch" else 2 * setup.hidden)
    name = f"{setup.tokens} tokens, {setup}"
    return loopback.against_copy(f"low latency {op}", name, setup, hops, payload, ours)


SETUPS = [
    loopback.Setup(8, 16, tokens=128),
    loopback.Setup(8, 8, tokens=128),
    loopback.Setup(8, 16, tokens=128, nodes=2),
]
WORKLOADS = [_workload(op, setup) for op in ("dispatch", "combine") for setup in SETUPS]
