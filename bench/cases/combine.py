"""Combine among virtual ranks of one GPU: bit by bit; speed against a copy of as many bytes on those SMs."""

import itertools

import torch
from torch import Tensor

from dsv3_kernels.ep import Topology, reference

from .. import loopback
from . import Case, Tensors
from .dispatch import HIDDEN, LOCAL_EXPERTS, ONE_NODE, ROWS, buffer_of, by_rank, name_of, routing

NOTE = loopback.NOTE


def case(op: str, topology: Topology, weighted: bool, num_sms: int, internode: str = "rings") -> Case:
    """Weighted: with a bias and gradients of the weights too."""
    ranks = topology.size

    def inputs(generator: torch.Generator) -> Tensors:
        flat: list[Tensor] = []
        for idx in routing(ranks, generator):
            flat += [torch.randn(idx.shape[0], HIDDEN, generator=generator).bfloat16(), idx]
            flat += [torch.rand(idx.shape, generator=generator)]
            flat += [torch.randn(ROWS, HIDDEN, generator=generator).bfloat16()]  # of the experts
            flat += [torch.randn(ROWS, generator=generator)]
        return tuple(flat)

    def run(*tensors: Tensor) -> Tensors:
        x, idx, weights, y, grads = (list(t) for t in zip(*by_rank(tensors, ranks), strict=True))
        buffer = buffer_of(topology, tensors[0].device, internode)
        got = buffer.dispatch(x, idx, weights, num_sms=num_sms, max_recv_tokens=ROWS)
        out = buffer.combine(
            y,
            [part.handle for part in got],
            [part.topk_weights for part in got] if weighted else None,
            x if weighted else None,
            num_sms=2,
            weights_grad=grads if weighted else None,
        )
        return tuple(t for part in out for t in (part.x, part.weights_grad) if t is not None)

    def expected(*tensors: Tensor) -> Tensors:
        x, idx, weights, y, grads = (list(t) for t in zip(*by_rank(tensors, ranks), strict=True))
        came = reference.dispatch(x, idx, weights, ranks * LOCAL_EXPERTS)
        counts = [t.shape[0] for t in idx]
        sums = reference.combine(
            [t[: len(part.origin)] for t, part in zip(y, came, strict=True)],
            came,
            counts,
            topology,
            [part.topk_weights for part in came] if weighted else None,
            x if weighted else None,
        )
        if not weighted:
            return tuple(sums)
        cut = [t[: len(part.origin)] for t, part in zip(grads, came, strict=True)]
        home = reference.combine_weights_grad(cut, came, counts, idx[0].shape[1])
        return tuple(t for pair in zip(sums, home, strict=True) for t in pair)

    return Case(f"{op} {name_of(topology, num_sms)} weighted={weighted}", inputs, run, expected)


CASES = [case("combine", *facts) for facts in itertools.product(ONE_NODE, (True, False), (2, 4))]
WORKLOADS = [loopback.workload("combine BF16", setup, "combine") for setup in loopback.SETUPS]
