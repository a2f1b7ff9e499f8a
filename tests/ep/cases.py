"""Inputs of all ranks from one seed, so that every rank and the test draw the same."""

from dataclasses import dataclass

import torch

from dsv3_kernels import quantize_1x128
from dsv3_kernels.ep import Topology

ROUTINGS = ("balanced", "skewed", "empty", "single expert", "holes", "some ranks empty", "no expert at all")
BETWEEN_NODES = ("own node", "next node", "every node", "one node far", *ROUTINGS)


@dataclass(frozen=True)
class Case:
    """One exchange: its shape, its routing, and which options it uses."""

    topology: Topology
    routing: str = "balanced"
    fp8: bool = False
    local_experts: int = 3
    hidden: int = 144
    num_topk: int = 3
    tokens: int = 12
    expert_order: bool = True
    weights: bool = True
    seed: int = 0

    @property
    def num_experts(self):
        return self.topology.size * self.local_experts

    @property
    def topk(self):
        return min(self.num_topk, self.num_experts)


@dataclass
class Inputs:
    """Lists with an entry a rank."""

    x: list
    topk_idx: list
    topk_weights: list
    bias: list


def generator(*seeds):
    value = 0
    for seed in seeds:
        value = (value * 1_000_003 + seed + 1) % (1 << 62)
    return torch.Generator().manual_seed(value)


def rows(gen, count, hidden):
    """BF16 of many magnitudes, with zeros of both signs."""
    values = torch.randn(count, hidden, generator=gen) * torch.exp(3 * torch.randn(count, 1, generator=gen))
    values[torch.rand(values.shape, generator=gen) < 0.05] = 0.0
    return (values * torch.where(torch.rand(values.shape, generator=gen) < 0.5, -1.0, 1.0)).bfloat16()


def route(case, gen, rank):
    """topk_idx of one rank."""
    experts, k = case.num_experts, case.topk
    count = int(torch.randint(case.tokens // 2, case.tokens + 1, (), generator=gen))
    if case.routing == "empty" or (case.routing == "some ranks empty" and rank % 2 == 0):
        count = 0
    if case.routing == "no expert at all":
        return torch.full((count, k), -1)
    if case.routing == "single expert":
        idx = torch.full((count, k), -1)
        idx[:, int(torch.randint(k, (), generator=gen))] = experts - 1
        return idx
    if case.routing in BETWEEN_NODES[:4]:
        return _route_by_node(case, gen, rank, count)
    chances = torch.ones(experts)
    if case.routing == "skewed":
        chances = torch.rand(experts, generator=gen) ** 8 + 1e-6
    idx = torch.stack(
        [torch.multinomial(chances, k, generator=gen) for _ in range(count)] or [torch.zeros(k)]
    )
    idx = idx[:count].long()
    if case.routing == "holes":
        idx[torch.rand(idx.shape, generator=gen) < 0.4] = -1
    return idx


def _route_by_node(case, gen, rank, count):
    """On the token's own node, the next one, as many nodes as a token has experts, or mostly the first."""
    nodes, width = case.topology.nodes, case.topology.gpus_per_node * case.local_experts
    own = rank // case.topology.gpus_per_node
    idx = torch.full((count, case.topk), -1)
    for token in range(count):
        order = torch.randperm(width, generator=gen)
        for k in range(min(case.topk, width)):
            node = {"own node": own, "next node": own + 1, "every node": own + k}.get(case.routing, 0)
            if case.routing == "one node far" and token % 4 == 3:
                node = nodes - 1
            idx[token, k] = node % nodes * width + order[k]
    return idx


def draw(case, round_=0):
    gen = generator(case.seed, round_)
    idx = [route(case, gen, rank) for rank in range(case.topology.size)]
    x = [rows(gen, t.shape[0], case.hidden) for t in idx]
    return Inputs(
        [quantize_1x128(t) for t in x] if case.fp8 else x,
        idx,
        [torch.rand(t.shape, generator=gen) * 2 - 0.5 for t in idx],
        [rows(gen, t.shape[0], case.hidden) for t in idx],
    )


def results(case, round_, rank, count):
    """What the experts of a rank return: y, and a number for each row."""
    gen = generator(case.seed, round_, rank, 7)
    shape = (count,) if case.expert_order else (count, case.topk)
    return rows(gen, count, case.hidden), torch.randn(shape, generator=gen)


def bits(tensor):
    """To compare: the bits, NaNs all alike."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8)
    if not tensor.is_floating_point():
        return tensor
    plain = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return plain.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
