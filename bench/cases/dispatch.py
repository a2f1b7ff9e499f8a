"""Dispatch among virtual ranks of one GPU: bit by bit; speed against a copy of as many bytes on those SMs."""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3_kernels import ep, quantize_1x128
from dsv3_kernels.ep import Topology, reference
from dsv3_kernels.quantized import ROW, QuantizedTensor

from .. import loopback
from . import Case, Tensors

NOTE = loopback.NOTE
TOKENS, HIDDEN, LOCAL_EXPERTS, TOPK = 10, 272, 3, 3
ROWS = 8 * TOKENS * TOPK  # more than any of these cases brings


@functools.cache
def _kept(topology: Topology, device: torch.device, internode: str) -> ep.LoopbackBuffer:
    """Also across a CUDA graph's capture, which can allocate nothing that outlives it."""
    ranks, node = topology.size, topology.gpus_per_node
    sizes = ranks * LOCAL_EXPERTS, HIDDEN, TOKENS, min(TOPK, ranks * LOCAL_EXPERTS)
    return ep.LoopbackBuffer(ranks, *sizes, gpus_per_node=node, internode=internode, device=device)


def buffer_of(topology: Topology, device: torch.device, internode: str = "rings") -> ep.LoopbackBuffer:
    """Each virtual GPU has memory of its own, so that only a real one's buffer can be kept."""
    make = _kept if device.type == "cuda" else _kept.__wrapped__
    return make(topology, device, internode)


def name_of(topology: Topology, num_sms: int) -> str:
    nodes, gpus = topology.nodes, topology.gpus_per_node
    return f"{nodes}x{gpus} ranks x {num_sms} SMs" if nodes > 1 else f"{gpus} ranks x {num_sms} SMs"


def routing(ranks: int, generator: torch.Generator) -> list[Tensor]:
    """topk_idx of each rank: uneven, with holes, the last rank without tokens if it is not alone."""
    experts = ranks * LOCAL_EXPERTS
    chances = torch.rand(experts, generator=generator) ** 4 + 1e-3
    found = []
    for rank in range(ranks):
        count = 0 if 0 < rank == ranks - 1 else TOKENS - rank
        idx = chances.expand(TOKENS, -1).multinomial(min(TOPK, experts), generator=generator)
        idx[torch.rand(idx.shape, generator=generator) < 0.2] = -1
        found.append(idx[:count].clone())
    return found


def by_rank(tensors: Sequence[Tensor], ranks: int) -> list[tuple[Tensor, ...]]:
    """Flat inputs, the tensors of rank 0 first."""
    each = len(tensors) // ranks
    return [tuple(tensors[r * each : (r + 1) * each]) for r in range(ranks)]


def written(x: Tensor, offsets: Tensor) -> Tensor:
    """Rows that came, and zeros for those past them, which nobody wrote.

    A sanitizer objects to a look at those; a capture, to asking how many they are.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        there = torch.arange(x.shape[0], device=x.device) < offsets[-1]
        return torch.where(there.unsqueeze(1), x, torch.zeros_like(x))
    return padded(x[: int(offsets[-1])])


def padded(x: Tensor, filler: float = 0) -> Tensor:
    out = x.new_full((ROWS, *x.shape[1:]), filler)
    out[: x.shape[0]] = x
    return out


def case(op: str, topology: Topology, fp8: bool, num_sms: int, internode: str = "rings") -> Case:
    ranks = topology.size

    def inputs(generator: torch.Generator) -> Tensors:
        flat: list[Tensor] = []
        for idx in routing(ranks, generator):
            x = torch.randn(idx.shape[0], HIDDEN, generator=generator).bfloat16()
            q = quantize_1x128(x)
            flat += [q.data, q.scales] if fp8 else [x]
            flat += [idx, torch.rand(idx.shape, generator=generator)]
        return tuple(flat)

    def tokens(parts: Sequence[Tensor]) -> Tensor | QuantizedTensor:
        return QuantizedTensor(parts[0], parts[1], ROW) if fp8 else parts[0]

    def bits(x: Tensor | QuantizedTensor) -> Tensors:
        return (x.data.view(torch.uint8), x.scales) if isinstance(x, QuantizedTensor) else (x,)

    def run(*tensors: Tensor) -> Tensors:
        each = by_rank(tensors, ranks)
        got = buffer_of(topology, tensors[0].device, internode).dispatch(
            [tokens(parts) for parts in each],
            [parts[-2] for parts in each],
            [parts[-1] for parts in each],
            num_sms=num_sms,
            max_recv_tokens=ROWS,
        )
        flat: list[Tensor] = []
        for part in got:
            assert part.group_offsets is not None and part.topk_weights is not None
            flat += [written(x, part.group_offsets) for x in bits(part.x)]
            flat += [part.topk_idx, part.topk_weights, part.group_offsets]
        return tuple(flat)

    def expected(*tensors: Tensor) -> Tensors:
        each = by_rank(tensors, ranks)
        want = reference.dispatch(
            [tokens(parts) for parts in each],
            [parts[-2] for parts in each],
            [parts[-1] for parts in each],
            ranks * LOCAL_EXPERTS,
        )
        flat: list[Tensor] = []
        for part in want:
            assert part.topk_weights is not None and part.group_offsets is not None
            flat += [padded(x) for x in bits(part.x)]
            flat += [padded(part.topk_idx, -1), padded(part.topk_weights), part.group_offsets]
        return tuple(flat)

    name = f"{op} {'fp8' if fp8 else 'bf16'} {name_of(topology, num_sms)}"
    return Case(name, inputs, run, expected)


ONE_NODE = [Topology(1, ranks) for ranks in (2, 1, 3)]
CASES = [case("dispatch", *facts) for facts in itertools.product(ONE_NODE, (True, False), (2, 4))]
WORKLOADS = [loopback.workload("dispatch FP8", setup, "dispatch") for setup in loopback.SETUPS]
