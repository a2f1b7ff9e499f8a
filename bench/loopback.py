"""Dispatch and combine among virtual ranks of one GPU: the setup that the benches share, and its bytes.

Every rank routes alike but for a rotation, so that each receives exactly tokens x top-k rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import gpu_bench
from bench.cases import Call, Candidates
from bench.copy_kernel import copy
from dsv3_kernels import ep, quantize_1x128

NOTE = (  # for the report of a GPU
    "Loopback: virtual ranks on one GPU, in one launch. It shows what the SMs cost and move. It cannot show "
    "NVLink (its latency, its bandwidth, the switch, stores to a peer's memory) nor ranks that start at "
    "different times: slots here are in the GPU's own memory, and partly in its L2. Figures for NVLink take "
    "several GPUs: `torchrun --nproc-per-node 8 -m bench.bench_all2all`."
)
RANKS, SMS = (2, 4, 6), (20, 12, 8, 4)  # SMs a rank
PEER = "copy of as many bytes, same SMs"


@dataclass(frozen=True)
class Setup:
    """What all virtual ranks together do in one call."""

    ranks: int
    num_sms: int  # of each rank
    tokens: int = 4096
    hidden: int = 7168
    topk: int = 8

    @property
    def experts(self) -> int:
        return 256 // self.ranks * self.ranks

    @property
    def arrivals(self) -> int:
        """(token, rank) pairs, a rank with itself among them: each a row in a slot."""
        return self.ranks * int((_owners(self) >= 0).sum())

    @property
    def rows(self) -> int:
        """(token, expert) pairs, on each rank."""
        return self.tokens * self.topk

    @property
    def dispatch_row(self) -> int:
        """Bytes of a token in FP8 with its scales."""
        return self.hidden + self.hidden // 128 * 4

    @property
    def dispatch_bytes(self) -> int:
        """What dispatch must read and write: a token once, a slot twice, a row once; with their metadata."""
        choice = 8 + 4  # expert and weight
        there = self.ranks * self.tokens * (self.dispatch_row + choice * self.topk)
        slots = 2 * self.arrivals * (self.dispatch_row + 8 * self.topk)
        return there + slots + self.ranks * self.rows * (self.dispatch_row + choice)

    @property
    def combine_bytes(self) -> int:
        """A row once, a slot twice, a token once."""
        rows = self.ranks * self.rows + 2 * self.arrivals + self.ranks * self.tokens
        return rows * 2 * self.hidden

    def __str__(self) -> str:
        return f"{self.ranks} ranks x {self.num_sms} SMs"


SETUPS = [Setup(ranks, num_sms) for ranks in RANKS for num_sms in SMS]


@functools.cache
def _routing(tokens: int, experts: int, topk: int) -> Tensor:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1))
    return scores.topk(topk).indices


@functools.cache
def _owners(setup: Setup) -> Tensor:
    """Of each token of a rank: the ranks that it goes to, once each, and -1."""
    owner = _routing(setup.tokens, setup.experts, setup.topk) // (setup.experts // setup.ranks)
    again = (owner.unsqueeze(2) == owner.unsqueeze(1)).tril(-1).any(2)
    return owner.masked_fill(again, -1)


class Node:
    """The ranks, their tokens and what their experts return, on one device."""

    def __init__(self, setup: Setup, device: str = "cuda") -> None:
        self.setup = setup
        local = setup.experts // setup.ranks
        idx = _routing(setup.tokens, setup.experts, setup.topk)
        self.buffer = ep.LoopbackBuffer(
            setup.ranks, setup.experts, setup.hidden, setup.tokens, setup.topk, device=device
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


def candidates(setup: Setup, op: str) -> Candidates:
    """A call of every rank, against a copy that reads and writes as many bytes in all."""
    node = Node(setup)
    ours: Call = node.dispatch if op == "dispatch" else node.combine()
    size = (setup.dispatch_bytes if op == "dispatch" else setup.combine_bytes) // 2 // 16 * 16

    def peer() -> Call:
        source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        return lambda: copy(source, target, setup.ranks * setup.num_sms)

    return Candidates(ours, {PEER: peer}, frozenset({PEER}))


def tables(seconds: float) -> None:
    """Measures SETUPS of both ops, within so many seconds each."""
    for op in ("dispatch", "combine"):
        gpu_bench.main([op, "--seconds", str(seconds)])
