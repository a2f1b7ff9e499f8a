"""Which rank does what, and which ranks hold the same parameters.

World = pp x dp x ep ranks: rank = (pipeline rank · dp + data rank) · ep + expert rank. The dp x ep ranks of a
pipeline stage each take their own sequences. They hold the same dense parameters; experts are spread over the
ep ranks, so that dp ranks hold the same ones. Where a pipeline keeps a parameter on two of its ranks, r and
P - 1 - r (DualPipe's mirrored stages; an embedding that both ends use), both belong to the group too.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_kernels.model import ModelConfig
from dsv3_kernels.nn.experts import Experts
from dsv3_kernels.train.config import ParallelConfig
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.executor import Executor

NewGroup = Callable[[Sequence[int], str], "dist.ProcessGroup | None"]


@dataclass(frozen=True)
class Layout:
    """Sizes of the three directions."""

    pp: int = 1
    ep: int = 1
    dp: int = 1

    @classmethod
    def of(cls, config: ParallelConfig, world: int) -> "Layout":
        """Takes dp from the number of processes."""
        each = config.pp * config.ep
        if world % each:
            fits = [f"--nproc-per-node {each * n}" for n in (world // each, world // each + 1) if n]
            raise TrainError(
                f"--pp {config.pp} x --ep {config.ep} = {each} does not divide the {world} processes. "
                f"Mend: {' or '.join(fits)}, or a --pp and --ep whose product divides {world}: "
                f"{', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}"
            )
        return cls(config.pp, config.ep, world // each)

    @property
    def world(self) -> int:
        return self.pp * self.ep * self.dp

    @property
    def shares(self) -> int:
        """Into how many parts a step's sequences are divided."""
        return self.dp * self.ep

    def rank(self, pipeline: int, data: int, expert: int) -> int:
        return (pipeline * self.dp + data) * self.ep + expert

    def share(self, rank: int) -> int:
        """Which part of a step's sequences the rank takes."""
        return rank % self.shares

    def check(self, model: ModelConfig, batch_size: int, micro_batches: int) -> None:
        """Raises TrainError where experts or sequences do not divide."""
        experts = model.n_routed_experts
        if experts % self.ep:
            fits = [n for n in range(1, experts + 1) if experts % n == 0]
            raise TrainError(
                f"--ep is {self.ep}, expected a divisor of the {experts} routed experts: "
                f"{', '.join(map(str, fits))}"
            )
        unit = self.shares * micro_batches
        if batch_size % unit:
            raise TrainError(
                f"--batch-size is {batch_size}, expected a multiple of dp x ep x micro-batches = {self.dp} x "
                f"{self.ep} x {micro_batches} = {unit}, for example {-(-batch_size // unit) * unit}"
            )


@dataclass(frozen=True)
class Placement:
    """Where a rank's parameter stands in the run.

    group: the ranks that hold the same one, None for this rank alone. shape: of the whole parameter; first:
    where, in the whole one flattened, this rank's begins (experts; 0 else).
    """

    group: "dist.ProcessGroup | None"
    shape: torch.Size
    first: int


class Groups:
    """The process groups of one rank.

    new_group: makes one from ranks and purpose ("compute", "control" between hosts, "saving" for the thread
    that writes checkpoints). All processes of the world call it, so all make their Groups together; a rank
    beyond the layout gets groups that are None.
    """

    def __init__(self, layout: Layout, rank: int = 0, new_group: NewGroup | None = None) -> None:
        make = new_group or make_group
        self.layout, self.rank = layout, rank

        def mine(sets: Iterable[Iterable[int]], purpose: str = "compute") -> "dist.ProcessGroup | None":
            found = None
            for members in map(sorted, sets):
                group = make(members, purpose) if len(members) > 1 else None
                found = group if rank in members else found
            return found

        pipeline, data, expert = range(layout.pp), range(layout.dp), range(layout.ep)
        at, everyone = layout.rank, range(layout.world)
        ends = [sorted({p, layout.pp - 1 - p}) for p in range((layout.pp + 1) // 2)]
        self.world = mine([everyone])
        self.control, self.saving = mine([everyone], "control"), mine([everyone], "saving")
        self.pipeline = mine([at(p, d, e) for p in pipeline] for d in data for e in expert)
        self.experts = mine([at(p, d, e) for e in expert] for p in pipeline for d in data)
        # Replicas: of dense parameters and of experts, on one rank of the pipeline and on two.
        self.dense = mine([at(p, d, e) for d in data for e in expert] for p in pipeline)
        self._experts_one = mine([at(p, d, e) for d in data] for p in pipeline for e in expert)
        self._dense_two, self._experts_two = self.dense, self._experts_one
        if layout.pp > 1:
            self._dense_two = mine([at(p, d, e) for p in end for d in data for e in expert] for end in ends)
            self._experts_two = mine([at(p, d, e) for p in end for d in data] for end in ends for e in expert)

    def placements(self, executor: Executor) -> dict[str, Placement]:
        """Of every parameter that this rank holds, by name."""
        placements = {}
        shares = {
            parameter: module
            for part in executor.modules
            for module in part.modules()
            if isinstance(module, Experts)
            for parameter in module.parameters()
        }
        for name, parameter in named_parameters(executor):
            two = name in executor.replicated
            shape, first = list(parameter.shape), 0
            if parameter in shares:
                group = self._experts_two if two else self._experts_one
                shape[0] = shares[parameter].num_experts
                first = shares[parameter].first_expert * parameter[0].numel()
            else:
                group = self._dense_two if two else self.dense
            placements[name] = Placement(group, torch.Size(shape), first)
        return placements

    def replicas(self, executor: Executor, name: str) -> "dist.ProcessGroup | None":
        """The ranks that hold the same dense parameter or buffer."""
        return self._dense_two if name in executor.replicated else self.dense


def make_group(
    ranks: Sequence[int], purpose: str, timeout: timedelta | None = None
) -> "dist.ProcessGroup | None":
    """A group over ranks of the world; gloo serves what passes between hosts."""
    return dist.new_group(list(ranks), backend=None if purpose == "compute" else "gloo", timeout=timeout)


def named_parameters(executor: Executor) -> list[tuple[str, torch.nn.Parameter]]:
    """Each once, under the name it has in the whole model."""
    found = dict(item for module in executor.modules for item in module.named_parameters())
    return list(found.items())


def size_of(group: "dist.ProcessGroup | None") -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: "dist.ProcessGroup | None") -> int:
    return 0 if group is None else dist.get_rank(group)


def add_up(values: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """values, replaced by their sums over the group."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def gather(value: Any, group: "dist.ProcessGroup | None") -> list[Any]:
    """What each rank passed, on every rank, as JSON: nothing that arrives is ever executed."""
    if group is None:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size_of(group))]
    dist.all_gather(lengths, torch.tensor([data.numel()]), group=group)
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
    padded[: data.numel()] = data
    every = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(every, padded, group=group)
    return [
        json.loads(bytes(part[: int(length)].tolist())) for part, length in zip(every, lengths, strict=True)
    ]


def require_same(values: dict[str, Any], what: str, group: "dist.ProcessGroup | None") -> None:
    """Raises TrainError, on every rank, naming the first field in which a rank differs from rank 0."""
    everywhere = gather(values, group)
    for rank, other in enumerate(everywhere):
        difference = _difference(what, everywhere[0], other)
        if difference is not None:
            name, first, found = difference
            raise TrainError(
                f"{name} is {first!r} on rank 0 and {found!r} on rank {rank}, expected the same on all ranks"
            )


def _difference(name: str, first: Any, other: Any) -> tuple[str, Any, Any] | None:
    if isinstance(first, dict) and isinstance(other, dict):
        for key in sorted(first.keys() | other.keys()):
            found = _difference(f"{name}.{key}", first.get(key), other.get(key))
            if found is not None:
                return found
        return None
    return None if first == other else (name, first, other)
