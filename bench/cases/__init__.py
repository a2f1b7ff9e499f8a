"""The registry by which an op joins the GPU tests, the sanitizers and the benches: bench/cases/<op>.py.

Such a file holds `CASES`, small calls that are compared bit by bit, and `WORKLOADS`, what is timed against
peers. Nothing else lists them: tests/gpu, bench.gpu_report and bench/bench_<op>.py read them here.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call of an op, small enough for the emulator and the sanitizers.

    inputs: fresh CPU tensors from a generator. run: the op on such tensors, on either device; only what it
    promises to write is in its result. reference: the same result on the CPU, bit for bit.
    """

    name: str
    inputs: Callable[[torch.Generator], Tensors]
    run: Callable[..., Tensors]
    reference: Callable[..., Tensors]

    def __str__(self) -> str:
        return self.name


Call = Callable[[], object]


@dataclass(frozen=True)
class Candidates:
    """Calls that compute the same, and return it, so that a peer that computes something else is noticed.

    peers: made late, each by a function that may raise; then it is left out and the reason reported.
    unlike: peers of another arithmetic, whose results are not compared.
    """

    ours: Call
    peers: Mapping[str, Callable[[], Call]] = field(default_factory=dict)
    unlike: frozenset[str] = frozenset({"BF16"})


@dataclass(frozen=True)
class Workload:
    """One row of a GPU bench: the least operations and bytes that its result takes; `build` runs on the GPU.

    group: rows of one table. peak: which ceiling `flops` is held against, "fp8" or "none".
    payload: bytes that reach another rank, with which `sms` are busy; 0 where there are no ranks.
    hops: of `bytes` those of each part of the way between ranks.
    """

    group: str
    name: str
    flops: float
    bytes: float
    build: Callable[[], Candidates]
    peak: str = "fp8"
    payload: float = 0
    sms: int = 0
    hops: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.group} {self.name}"


@functools.cache
def ops() -> tuple[str, ...]:
    """The files of this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def cases() -> Iterator[Case]:
    for op in ops():
        yield from getattr(importlib.import_module(f"{__name__}.{op}"), "CASES", ())


def workloads(op: str) -> Sequence[Workload]:
    return tuple(getattr(importlib.import_module(f"{__name__}.{op}"), "WORKLOADS", ()))


def note(op: str) -> str:
    """What a reader of its figures has to know, from `NOTE` of the op's file; mostly nothing."""
    if op not in ops():
        return ""
    return getattr(importlib.import_module(f"{__name__}.{op}"), "NOTE", "")


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """A copy with the same strides, which `Tensor.to` would pack."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def differences(got: Tensors, want: Tensors) -> list[str]:
    """What differs bit by bit, but for the sign and payload of NaNs; the first five elements of a tensor."""
    found = [] if len(got) == len(want) else [f"{len(got)} results, expected {len(want)}"]
    for i, (x, y) in enumerate(zip(got, want, strict=False)):
        x, y = x.cpu(), y.cpu()
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            found.append(f"result {i} is {x.dtype} {tuple(x.shape)}, expected {y.dtype} {tuple(y.shape)}")
            continue
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        wrong = x.contiguous().view(integer) != y.contiguous().view(integer)
        if x.is_floating_point():
            wrong &= ~(x.float().isnan() & y.float().isnan())
        at = wrong.nonzero()[:5].tolist()
        if at:
            shown = [(*index, x[tuple(index)].item(), y[tuple(index)].item()) for index in at]
            found.append(
                f"result {i}: {int(wrong.sum())} of {x.numel()} differ, at (index, got, want) {shown}"
            )
    return found
