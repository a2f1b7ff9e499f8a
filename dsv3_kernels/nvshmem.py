"""The host side of NVSHMEM: one world a process, its symmetric memory, its queue pairs, its kernels' modules.

The library is the wheel's libnvshmem_host.so.3, through ctypes: a dozen calls, none of them on a hot path.
Processes meet through torch.distributed, which carries NVSHMEM's unique id. Nothing here launches a kernel.
"""

import ctypes
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from .jit import toolchain

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
INFINIBAND = Path("/sys/class/infiniband")
SYMMETRIC_SIZE = "NVSHMEM_SYMMETRIC_SIZE"
QUEUE_PAIRS = "NVSHMEM_IBGDA_NUM_RC_PER_PE"
HEAP = 1 << 30  # bytes, the least that a world is begun with: NVSHMEM's own default
OWN_SHARE = 64 << 20  # of the heap, for what NVSHMEM keeps there itself
_INIT_WITH_UNIQUEID = 1 << 3
_UNIQUEID_BYTES, _ATTRIBUTES_BYTES = 128, 144  # and where the versions stand: device_host/nvshmem_types.h
_VERSIONS = {0: _ATTRIBUTES_BYTES, 16: 128, 24: 24}
_HOST_QP, _DEFAULT_QP = 0, 1


class NvshmemError(RuntimeError):
    """NVSHMEM cannot serve here; the message says which part, and the mend."""


class World:
    """This process among those that NVSHMEM joins; made by `world`. ranks: its members, as global ranks."""

    def __init__(self, library: Any, rank: int, ranks: Sequence[int], heap: int) -> None:
        self._library, self.rank, self.ranks, self._heap = library, rank, tuple(ranks), heap
        self._allocated = 0

    @property
    def size(self) -> int:
        return len(self.ranks)

    def allocate(self, size: int) -> Tensor:
        """uint8 `[size]` on the current device, zeros, at the same place on every rank; all ranks call.

        It lives until `finalize`. Raises `NvshmemError` with the heap's size that it takes.
        """
        pointer = self._library.nvshmem_calloc(size, 1)
        if not pointer:
            needed = _round_heap(self._allocated + size)
            raise NvshmemError(
                f"NVSHMEM's symmetric heap is too small: {size} bytes do not fit beside the "
                f"{self._allocated} that are taken (the heap began with {self._heap}). Mend: set "
                f"{SYMMETRIC_SIZE}={needed} or more on all ranks; a smaller max_tokens_per_rank takes less"
            )
        self._allocated += size
        return _tensor(pointer, size)

    def mapped(self, memory: Tensor) -> list[int]:
        """Where this GPU sees each rank's own of what `allocate` gave; 0: only the network reaches it."""
        return [self._library.nvshmem_ptr(memory.data_ptr(), rank) or 0 for rank in range(self.size)]

    def queue_pairs(self, count: int) -> list[int]:
        """Numbers of new queue pairs, as kernels name them; all ranks call. Raises `NvshmemError`."""
        array = ctypes.POINTER(ctypes.c_int)()
        status = self._library.nvshmemx_qp_create(count, ctypes.byref(array))
        made = [] if status or not array else array[:count]
        usable = {number for number in made if number not in (_HOST_QP, _DEFAULT_QP)}
        if len(usable) < count:
            raise NvshmemError(
                f"NVSHMEM made {len(usable)} of {count} queue pairs (status {status}): too few. Mend: set "
                f"{QUEUE_PAIRS}={count} or more on all ranks, and NVSHMEM_IB_ENABLE_IBGDA=1; "
                "NVSHMEM_DEBUG=INFO says what the transport did"
            )
        return list(made)

    def initialise(self, library: int) -> None:
        """Makes a loaded CUlibrary's kernels know this world; before their first launch."""
        status = self._library.nvshmemx_culibrary_init(ctypes.c_void_p(library))
        if status:
            raise NvshmemError(f"nvshmemx_culibrary_init gave status {status}: {_VERSION_HINT}")


_VERSION_HINT = "the kernel was linked with a device library that this host library does not know"
_world: World | None = None


def current() -> World:
    """The world of this process. Raises `NvshmemError` if there is none."""
    if _world is None:
        raise NvshmemError("a kernel that uses NVSHMEM is loaded before its world: make an ep.Buffer first")
    return _world


def world(group: "dist.ProcessGroup", needed: int, timeout: float = 30.0) -> World:
    """The world of the ranks of `group`, begun at the first call; all of them call, their devices set.

    needed: bytes of symmetric memory that the caller is about to allocate. Environment: what is set stays;
    else several nodes get NVSHMEM_IB_ENABLE_IBGDA=1, one node NVSHMEM_REMOTE_TRANSPORT=none, and
    NVSHMEM_SYMMETRIC_SIZE fits `needed`. Raises `NvshmemError` (or `ToolchainError` without NVSHMEM), on
    every rank if on one; where one does not come, after `timeout` seconds.
    """
    import torch.distributed as dist

    global _world
    ranks = dist.get_process_group_ranks(group)
    if _world is not None:
        if _world.ranks != tuple(ranks):
            raise NvshmemError(
                f"NVSHMEM's world is that of ranks {list(_world.ranks)}, got a group of ranks {ranks}: a "
                "process has one world. Mend: make all buffers on one group"
            )
        return _world
    several = len(set(_Step(group, timeout).gather(os.uname().nodename))) > 1
    # A rank that cannot would leave the others waiting inside NVSHMEM's own bootstrap.
    library, heap = together(lambda: _prepare(several, needed), group, timeout)
    rank = dist.get_rank(group)
    made = together(lambda: _unique_id(library) if rank == 0 else b"", group, timeout)
    unique_id = bytes.fromhex(_Step(group, timeout).gather(made.hex())[0])
    _world = together(lambda: _begin(library, unique_id, rank, ranks, heap), group, timeout)
    return _world


def finalize() -> None:
    """Ends the world; all its ranks call, when no kernel uses it. Symmetric tensors are void after it.

    Not called at exit: there it would wait for ranks that died.
    """
    global _world
    if _world is not None:
        ended, _world = _world, None
        ended._library.nvshmemx_hostlib_finalize()


def together(act: Callable[[], T], group: "dist.ProcessGroup", timeout: float) -> T:
    """What act() gives on this rank, or `NvshmemError` on every rank, at once if it fails on one.

    act may wait for other ranks, inside NVSHMEM, where nothing ends a wait: so it runs in a thread, which is
    left behind when another rank has failed, or has not come in `timeout` seconds.
    """
    step = _Step(group, timeout)
    outcome: list[tuple[T | None, Exception | None]] = []
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            outcome.append((act(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        for pause in step.pauses("is still busy with it, or did not come"):
            thread.join(pause)
            if outcome:
                break
    except NvshmemError:
        thread.join(0.5)  # what this rank has to say itself says more
        if not outcome:
            raise
    result, problem = outcome[0]
    if problem is not None:
        step.fail(str(problem))
        raise problem
    step.gather("")
    return cast(T, result)


class _Step:
    """One step that all ranks of a group take, by the group's store, which a rank that died cannot block."""

    def __init__(self, group: "dist.ProcessGroup", timeout: float) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_process_group_store

        self._number = _steps[group.group_name] = _steps.get(group.group_name, 0) + 1
        prefix = f"dsv3_kernels.nvshmem/{self._number}"
        self._store = dist.PrefixStore(prefix, _get_process_group_store(group))
        self._rank, self._size, self._timeout = dist.get_rank(group), dist.get_world_size(group), timeout
        self._end = time.monotonic() + timeout

    def fail(self, text: str) -> None:
        self._store.set("problem", f"rank {self._rank} cannot use NVSHMEM: {text}")

    def gather(self, text: str) -> list[str]:
        """The text of every rank."""
        self._store.set(str(self._rank), text)
        keys = [str(rank) for rank in range(self._size)]
        for pause in self.pauses("has not answered"):
            if self._store.check(keys):
                break
            time.sleep(pause)
        return [self._store.get(key).decode() for key in keys]

    def pauses(self, absent: str) -> Iterator[float]:
        """Between looks; raises when a rank has failed, or too long a time is over."""
        pause = 1e-3
        while True:
            if self._store.check(["problem"]):
                raise NvshmemError(self._store.get("problem").decode())
            if time.monotonic() > self._end:
                silent = [rank for rank in range(self._size) if not self._store.check([str(rank)])]
                raise NvshmemError(
                    f"NVSHMEM's set-up did not end in {self._timeout:g} s: of ranks {silent} each {absent}. "
                    "Mend: see whether they are alive and make the same buffer; NVSHMEM_DEBUG=INFO says more"
                )
            yield pause
            pause = min(2 * pause, 0.2)


_steps: dict[str, int] = {}  # taken so far, by name of the group


def _prepare(several: bool, needed: int) -> tuple[Any, int]:
    """The library, and how large a heap it will make."""
    found = toolchain.nvshmem()
    found.check_versions()
    if several:
        _check_nic()
    _set_environment(several, needed)
    return _load(found.host_library), _bytes_of(os.environ[SYMMETRIC_SIZE])


def _check_nic() -> None:
    ports = INFINIBAND.glob("*/ports/*/state") if INFINIBAND.is_dir() else []
    if not any("ACTIVE" in port.read_text() for port in ports):
        raise NvshmemError(
            f"found no active port of an RDMA NIC in {INFINIBAND}, which several nodes need. Mend: "
            "python -m dsv3_kernels.doctor says what is there; in a container, pass /dev/infiniband"
        )


def _set_environment(several: bool, needed: int) -> None:
    if several:
        os.environ.setdefault("NVSHMEM_IB_ENABLE_IBGDA", "1")
    elif not INFINIBAND.is_dir():
        os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
    os.environ.setdefault(SYMMETRIC_SIZE, str(_round_heap(needed)))


def _round_heap(needed: int) -> int:
    granule = 2 << 20
    return max(HEAP, -(-(needed + OWN_SHARE) // granule) * granule)


def _load(path: Path) -> Any:
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # its transports look for its symbols
    library.nvshmem_calloc.restype = library.nvshmem_ptr.restype = ctypes.c_void_p
    library.nvshmem_calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    library.nvshmem_ptr.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library


def _unique_id(library: Any) -> bytes:
    """By which all meet."""
    unique_id = ctypes.create_string_buffer(_UNIQUEID_BYTES)
    struct.pack_into("<i", unique_id, 0, (1 << 16) + _UNIQUEID_BYTES)
    status = library.nvshmemx_get_uniqueid(unique_id)
    if status:
        raise NvshmemError(
            f"nvshmemx_get_uniqueid gave status {status} on rank 0. Mend: name the interface by which ranks "
            "meet in NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME; NVSHMEM_DEBUG=INFO says more"
        )
    return unique_id.raw


def _begin(library: Any, met: bytes, rank: int, ranks: list[int], heap: int) -> World:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # there is a context, of the device that this rank has chosen
    size = len(ranks)
    unique_id = ctypes.create_string_buffer(met, _UNIQUEID_BYTES)
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    for offset, size_of in _VERSIONS.items():
        struct.pack_into("<i", attributes, offset, (1 << 16) + size_of)
    status = library.nvshmemx_set_attr_uniqueid_args(rank, size, unique_id, attributes)
    status = status or library.nvshmemx_hostlib_init_attr(_INIT_WITH_UNIQUEID, attributes)
    if status:
        raise NvshmemError(
            f"NVSHMEM did not start on rank {rank} of {size} (status {status}). Mend: set NVSHMEM_DEBUG=INFO "
            "and read what it says; python -m dsv3_kernels.doctor looks at driver, GPU and NIC"
        )
    seen = library.nvshmem_my_pe(), library.nvshmem_n_pes()
    if seen != (rank, size):
        raise NvshmemError(
            f"NVSHMEM says that this is rank {seen[0]} of {seen[1]}, expected {rank} of {size}: something "
            "else in this process has started it. Mend: start it once, on the group of the buffers"
        )
    return World(library, rank, ranks, heap)


def _bytes_of(text: str) -> int:
    """A size as NVSHMEM reads it: 1073741824, 1G, 1.5GB."""
    digits = text.strip().upper().removesuffix("B")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    factor = units.get(digits[-1:], 1)
    try:
        return int(float(digits[:-1] if factor > 1 else digits) * factor)
    except ValueError:
        raise NvshmemError(
            f"{SYMMETRIC_SIZE} is {text!r}, expected a number of bytes, or one with K, M, G or T"
        ) from None


class _Memory:
    """Memory that somebody else owns, as PyTorch takes it."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


def _tensor(pointer: int, size: int) -> Tensor:
    return torch.as_tensor(_Memory(pointer, size), device="cuda")
