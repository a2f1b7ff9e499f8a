"""Dispatch and combine among virtual ranks of one GPU: the setup that the benches share, and its bytes.

Every rank routes alike but for a rotation, so that each receives exactly tokens x top-k rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import gpu_bench
from bench.cases import Call, Candidates, Workload
from bench.copy_kernel import copy
from dsv3_kernels import ep, quantize_1x128
from dsv3_kernels.ep.design import INTERNODE

NOTE = (  # for the report of a GPU
    "Loopback: virtual ranks on one GPU, in one launch. It shows what the SMs cost and move. It cannot show "
    "NVLink (its latency, its bandwidth, the switch, stores to a peer's memory) nor ranks that start at "
    "different times: slots here are in the GPU's own memory, and partly in its L2. Figures for NVLink take "
    "several GPUs: `torchrun --nproc-per-node 8 -m bench.bench_all2all`."
)
NOTE_OF_NODES = (
    "Virtual nodes on one GPU, in one launch. In place of InfiniBand is the GPU's own memory: a put is a "
    "copy by the warp that asks for it, so SMs do a network card's work too, and its bytes are counted. Not "
    "shown: queue pairs and doorbells, what a network reorders, delays or loses, latency and bandwidth of "
    "InfiniBand and NVLink. Figures for those take a cluster: docs/cluster.md. The lean kernels end with a "
    "launch on all SMs, which the copy does not have."
)
RANKS, SMS = (2, 4, 6), (20, 12, 8, 4)  # SMs a rank
NODES = ((2, 2), (2, 3))  # nodes, GPUs a node
PEER = "copy of as many bytes, same SMs"


@dataclass(frozen=True)
class Setup:
    """What all virtual ranks together do in one call."""

    ranks: int
    num_sms: int  # of each rank
    tokens: int = 4096
    hidden: int = 7168
    topk: int = 8
    nodes: int = 1
    internode: str = "rings"

    @property
    def gpus(self) -> int:
        """Of a node."""
        return self.ranks // self.nodes

    @property
    def experts(self) -> int:
        return 256 // self.ranks * self.ranks

    @property
    def arrivals(self) -> int:
        """(token, rank) pairs, a rank with itself among them: each a row in a slot."""
        return self.ranks * int((_owners(self) >= 0).sum())

    @property
    def messages(self) -> int:
        """(token, node) pairs other than its own: each a put over InfiniBand."""
        owner = _owners(self)
        count = 0
        for rank in range(self.ranks):
            node = torch.where(owner < 0, -1, (owner + rank) % self.ranks // self.gpus)
            reached = (node.unsqueeze(2) == torch.arange(self.nodes)).any(1)
            count += int(reached.sum() - reached[:, rank // self.gpus].sum())
        return count

    @property
    def far_rows(self) -> int:
        """(token, expert) pairs of different nodes."""
        return int(_far(self).sum())

    @property
    def far_tokens(self) -> int:
        """Tokens with an expert on another node."""
        return int(_far(self).any(2).sum())

    @property
    def rows(self) -> int:
        """(token, expert) pairs, on each rank."""
        return self.tokens * self.topk

    @property
    def dispatch_row(self) -> int:
        """Bytes of a token in FP8 with its scales."""
        return self.hidden + self.hidden // 128 * 4

    def payload(self, op: str) -> int:
        """Bytes that reach a rank, without metadata."""
        return self.arrivals * (self.dispatch_row if op == "dispatch" else 2 * self.hidden)

    def hops(self, op: str) -> dict[str, int]:
        """What an op must read and write, with its metadata, by the part of the way.

        A token and a row once; a slot twice; a message over InfiniBand four times: it is staged, and copied
        by the put, and read by the forwarder.
        """
        choice = 8 + 4  # expert and weight
        token = row = message = slot = 2 * self.hidden
        if op == "dispatch":
            slot = self.dispatch_row + 8 * self.topk
            message = -(-slot // 16) * 16
            token, row = self.dispatch_row + choice * self.topk, self.dispatch_row + choice
        found = {
            "tokens": self.ranks * self.tokens * token,
            "InfiniBand": 4 * self.messages * message,
            "NVLink": 2 * self.arrivals * slot,
            "rows of experts": self.ranks * self.rows * row,
        }
        return {hop: count for hop, count in found.items() if count}

    def __str__(self) -> str:
        ranks = f"{self.nodes}x{self.gpus}" if self.nodes > 1 else f"{self.ranks}"
        return f"{ranks} ranks x {self.num_sms} SMs"


SETUPS = [Setup(ranks, num_sms) for ranks in RANKS for num_sms in SMS]
SETUPS_OF_NODES = [
    Setup(nodes * gpus, num_sms, nodes=nodes, internode=internode)
    for internode in INTERNODE
    for nodes, gpus in NODES
    for num_sms in SMS
]


@functools.cache
def _routing(tokens: int, experts: int, topk: int) -> Tensor:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1))
    return scores.topk(topk).indices


def _owner(setup: Setup) -> Tensor:
    """Of each token of the first rank: the ranks of its experts. Those of rank r are r further."""
    return _routing(setup.tokens, setup.experts, setup.topk) // (setup.experts // setup.ranks)


@functools.cache
def _far(setup: Setup) -> Tensor:
    """[ranks, tokens, topk]: is the expert on another node than the rank?"""
    rank = torch.arange(setup.ranks).view(-1, 1, 1)
    return (_owner(setup) + rank) % setup.ranks // setup.gpus != rank // setup.gpus


@functools.cache
def _owners(setup: Setup) -> Tensor:
    """Of each token of the first rank: the ranks that it goes to, once each, and -1."""
    owner = _owner(setup)
    again = (owner.unsqueeze(2) == owner.unsqueeze(1)).tril(-1).any(2)
    return owner.masked_fill(again, -1)


class Node:
    """The ranks, their tokens and what their experts return, on one device."""

    def __init__(self, setup: Setup, device: str = "cuda") -> None:
        self.setup = setup
        local = setup.experts // setup.ranks
        idx = _routing(setup.tokens, setup.experts, setup.topk)
        self.buffer = ep.LoopbackBuffer(
            setup.ranks,
            setup.experts,
            setup.hidden,
            setup.tokens,
            setup.topk,
            gpus_per_node=setup.gpus,
            internode=setup.internode,
            tuning=ep.Tuning(channels=setup.num_sms // 2),
            device=device,
        )
        x = [torch.randn(setup.tokens, setup.hidden, device=device).bfloat16() for _ in range(setup.ranks)]
        self.x = [quantize_1x128(rows) for rows in x]
        self.topk_idx = [((idx + r * local) % setup.experts).to(device) for r in range(setup.ranks)]
        self.topk_weights = [torch.rand(idx.shape, device=device) for _ in range(setup.ranks)]

    def dispatch(self, **options: object) -> list[ep.DispatchResult]:
        """Rows for as many as come are declared, so that the host never waits."""
        setup = self.setup
        return self.buffer.dispatch(
            self.x,
            self.topk_idx,
            self.topk_weights,
            num_sms=setup.num_sms,
            max_recv_tokens=setup.rows,
            **options,
        )

    def combine(self) -> Callable[[], list[ep.CombineResult]]:
        """A call; made once, for what the experts return."""
        got = self.dispatch()
        shape = self.setup.rows, self.setup.hidden
        y = [torch.randn(shape, dtype=torch.bfloat16, device=part.topk_idx.device) for part in got]
        handles = [part.handle for part in got]
        weights = [part.topk_weights for part in got]
        return lambda: self.buffer.combine(y, handles, weights, num_sms=self.setup.num_sms)


def workload(group: str, setup: Setup, op: str) -> Workload:
    def ours() -> Call:
        node = Node(setup)
        return node.dispatch if op == "dispatch" else node.combine()

    return against_copy(group, str(setup), setup, setup.hops(op), setup.payload(op), ours)


def against_copy(
    group: str, name: str, setup: Setup, hops: dict[str, int], payload: int, ours: Callable[[], Call]
) -> Workload:
    """A call of every rank, against a copy that reads and writes as many bytes in all."""
    moved, sms = sum(hops.values()), setup.ranks * setup.num_sms

    def peer() -> Call:
        size = moved // 2 // 16 * 16
        source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        return lambda: copy(source, target, sms)

    def build() -> Candidates:
        return Candidates(ours(), {PEER: peer}, frozenset({PEER}))

    return Workload(group, name, 0, moved, build, "none", payload, sms, hops)


def graphed(call: Call) -> Call:
    """The call as one replay of a CUDA graph: kernels that end before the host has called for all ranks."""
    call()  # what is compiled, loaded and allocated once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def tables(seconds: float) -> None:
    """Measures both ops within a node and across nodes, within so many seconds each."""
    for op in ("dispatch", "combine", "dispatch_internode", "combine_internode"):
        gpu_bench.main([op, "--seconds", str(seconds)])
