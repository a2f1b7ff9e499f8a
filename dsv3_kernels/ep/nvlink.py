"""Memory that every GPU of a node has mapped, for the kernels to store into directly.

It comes from torch's symmetric memory: `empty` takes physical memory of this GPU from the driver
(cuMemCreate), `rendezvous` passes its handle to the other processes (a POSIX file descriptor, or a fabric
handle where the system has them) and maps theirs. The same few driver calls of our own would need a socket
between each two processes for the descriptors, and would be one more copy of what torch keeps working across
drivers and containers. What the kernels need of it is one address a rank; the protocol over it is theirs
(channel.cuh).
"""

import contextlib
import enum
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..launch import CAPABILITY
from .exchange import Exchange
from .kernels import MAX_RANKS, MAX_TOPK
from .transport import Shape

T = TypeVar("T")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of the host, the same in all of its containers


class Obstacle(enum.IntEnum):
    """Why the ranks cannot use it. `_REASONS` says what to do."""

    NONE = 0
    BACKEND = 1
    NODES = 2
    RANKS = 3
    SHAPE = 4
    TORCH = 5
    GPU = 6
    HOSTS = 7
    SHARED_GPU = 8
    PEER_ACCESS = 9
    FAILED = 10


_DOCTOR = "python -m dsv3_kernels.doctor says more"
_REASONS = {
    Obstacle.BACKEND: "the group's backend is not NCCL. Mend: init_process_group('nccl'), one GPU a process",
    Obstacle.NODES: "the ranks are on several nodes. Mend: a group for each node, or pass gpus_per_node",
    Obstacle.RANKS: f"the kernels know at most {MAX_RANKS} ranks of a node",
    Obstacle.SHAPE: f"the kernels know bfloat16 and at most {MAX_TOPK} experts a token",
    Obstacle.TORCH: "this torch has no symmetric memory for CUDA. Mend: torch 2.10 or later, built with CUDA",
    Obstacle.GPU: "its GPU is no Hopper (compute capability 9.0)",
    Obstacle.HOSTS: "it is on another host than rank 0. Mend: pass gpus_per_node, or a group for each host",
    Obstacle.SHARED_GPU: "it has the GPU of another rank. Mend: torch.cuda.set_device(local_rank) first",
    Obstacle.PEER_ACCESS: (
        "its GPU cannot map another's memory. Mend: GPUs joined by NVLink, IOMMU off or in passthrough, no "
        f"MIG; {_DOCTOR}"
    ),
    Obstacle.FAILED: (
        "torch's symmetric memory could not be set up. Mend: in a container, share the host's IPC namespace "
        f"and run all ranks as one user; {_DOCTOR}"
    ),
}


@dataclass(eq=False)
class Mapped:
    """memory: this rank's, uint8, zeros. addresses: of each rank's, as this one sees it, while this lives."""

    memory: Tensor
    addresses: list[int]
    handle: Any


def connect(exchange: Exchange, shape: Shape, device: torch.device, size: int) -> Mapped | str:
    """`size` bytes on every rank, mapped by all; or why that cannot be, on every rank alike.

    All ranks call it together. When it returns, all memories are zeros.
    """
    obstacle = _known_to_all(exchange, shape, device)
    if obstacle:
        return _REASONS[obstacle]
    obstacle = _alone(device)
    facts = (0, 0) if obstacle else (_host(), _gpu(device))
    every = exchange.all_gather("Buffer", [obstacle, *facts], device)
    found = _first(_compare(every))
    if found is not None:
        return found
    gpus = [gpu for _, _, gpu in every]
    obstacle = Obstacle.NONE if _maps_all(device, gpus) else Obstacle.PEER_ACCESS
    found = _first(exchange.all_gather("Buffer", [obstacle], device))
    if found is not None:
        return found
    # In two steps, so that none waits in the second for one that has failed in the first.
    memory, found, detail = _together(exchange, device, lambda: _allocate(device, size))
    if memory is None or found is not None:
        return f"{found}{detail}"
    mapped, found, detail = _together(exchange, device, lambda: _map(exchange, memory, device))
    return mapped if mapped is not None and found is None else f"{found}{detail}"


def _together(
    exchange: Exchange, device: torch.device, act: Callable[[], T]
) -> tuple[T | None, str | None, str]:
    """What act() gives; the reason of the first rank where it fails; what torch says of it here."""
    result, obstacle, detail = None, Obstacle.NONE, ""
    try:
        result = act()
    except Exception as error:  # torch's own, of many kinds
        obstacle = Obstacle.FAILED
        detail = f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return result, _first(exchange.all_gather("Buffer", [obstacle], device)), detail


def _known_to_all(exchange: Exchange, shape: Shape, device: torch.device) -> Obstacle:
    """What every rank finds alike."""
    group = exchange.group
    if group is None or device.type != "cuda" or "nccl" not in dist.get_backend(group):
        return Obstacle.BACKEND
    if shape.topology.nodes > 1:
        return Obstacle.NODES
    if shape.topology.size > MAX_RANKS:
        return Obstacle.RANKS
    if shape.num_topk > MAX_TOPK or shape.dtype != torch.bfloat16:
        return Obstacle.SHAPE
    return Obstacle.NONE


def _alone(device: torch.device) -> Obstacle:
    """What this rank finds without the others."""
    if _symmetric_memory() is None:
        return Obstacle.TORCH
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return Obstacle.GPU
    return Obstacle.NONE


def _compare(every: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """As `every`, with the obstacles that show only beside each other."""
    if any(code for code, _, _ in every):
        return list(every)
    seen: set[int] = set()
    found: list[Sequence[int]] = []
    for _, host, gpu in every:
        shared = Obstacle.SHARED_GPU if gpu in seen else Obstacle.NONE
        found.append([Obstacle.HOSTS if host != every[0][1] else shared])
        seen.add(gpu)
    return found


def _maps_all(device: torch.device, gpus: list[int]) -> bool:
    """Of the ranks' GPUs, those that this process sees: others show when they are mapped."""
    seen = {_gpu(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    peers = [seen[gpu] for gpu in gpus if gpu in seen and seen[gpu] != device.index]
    return all(torch.cuda.can_device_access_peer(device.index, peer) for peer in peers)


def _first(every: Iterable[Sequence[int]]) -> str | None:
    """The reason of the first rank that has one; its code is the first of its numbers."""
    for rank, (code, *_) in enumerate(every):
        if code:
            return f"rank {rank}: {_REASONS[Obstacle(code)]}"
    return None


def _allocate(device: torch.device, size: int) -> Tensor:
    memory: Tensor = _symmetric_memory().empty(size, dtype=torch.uint8, device=device)
    return memory


def _map(exchange: Exchange, memory: Tensor, device: torch.device) -> Mapped:
    with _patience(exchange):
        handle = _symmetric_memory().rendezvous(memory, exchange.group)
    bases = list(handle.buffer_ptrs)
    if len(bases) != exchange.size:
        raise RuntimeError(f"rendezvous gave {len(bases)} addresses for {exchange.size} ranks")
    # The memory lies at the same offset of each mapping; versions of torch differ in whether they add it.
    offset = memory.data_ptr() - bases[exchange.rank]
    if offset not in (0, getattr(handle, "offset", 0)):
        raise RuntimeError(f"rendezvous gave an address {offset} bytes before this rank's memory")
    memory.zero_()
    torch.cuda.synchronize(device)  # before any rank hears of it and may write
    return Mapped(memory, [base + offset for base in bases], handle)


@contextlib.contextmanager
def _patience(exchange: Exchange) -> Iterator[None]:
    """Waits in the group's store last half the buffer's timeout, for who has failed waits for the others."""
    if not isinstance(exchange.group, dist.ProcessGroup):
        yield
        return
    from torch.distributed.distributed_c10d import _get_process_group_store

    store: Any = _get_process_group_store(exchange.group)
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    before = store.timeout
    store.set_timeout(timedelta(seconds=exchange.timeout / 2))
    try:
        yield
    finally:
        store.set_timeout(before)


def _symmetric_memory() -> Any:
    """torch's module, or None."""
    try:
        import torch.distributed._symmetric_memory as module
    except ImportError:
        return None
    return module if hasattr(module, "empty") and hasattr(module, "rendezvous") else None


def _number(text: str) -> int:
    """63 bits of a name, for an exchange of integers."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _host() -> int:
    return _number(_BOOT_ID.read_text() if _BOOT_ID.is_file() else "")


def _gpu(device: torch.device) -> int:
    return _number(str(torch.cuda.get_device_properties(device).uuid))
