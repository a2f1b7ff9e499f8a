"""The virtual Hopper: runs the PTX that NVRTC makes for sm_90a, on the CPU, deterministic and harsher than hardware.

    gpu = VirtualGPU(num_sms=8, seed=0)
    gpu.launch(ptx, "kernel", grid=(2, 1, 1), block=(128, 1, 1), args=[x, y, 3])

Warps, copy engine and tensor cores move in an order drawn from `seed`. Kernels see virtual addresses, so that a run
depends on nothing but its inputs and its seed: a tensor passed as an argument becomes its address;
`VirtualGPU.address_of` gives the one to put in a table of pointers.
"""

import contextlib
import functools
import json
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _emulator
from .tensor_map import TensorMap

__all__ = [
    "DeadlockError",
    "EmulationError",
    "Group",
    "HazardError",
    "MemoryAccessError",
    "TensorMap",
    "UnsupportedInstructionError",
    "VirtualCluster",
    "VirtualGPU",
    "current",
    "explore",
    "virtual_gpu",
]

SCHEDULES = ("random", "round_robin", "pct", "exhaustive")
Dim3 = Sequence[int]
Argument = Tensor | TensorMap | int | float | bytes


class EmulationError(RuntimeError):
    """A kernel could not be loaded or run. The fields say where, as far as it applies.

    message, kernel, block (x, y, z), rank, warp (in the block), lane, ptx_line, source ("file.cu:12"; inlined code
    names all its places, innermost first), seed.
    """

    def __init__(
        self,
        message: str,
        *,
        kernel: str = "",
        block: tuple[int, int, int] | None = None,
        rank: int | None = None,
        warp: int | None = None,
        lane: int | None = None,
        ptx_line: int | None = None,
        source: str = "",
    ) -> None:
        super().__init__(message)
        self.message, self.kernel, self.block, self.rank = message, kernel, block, rank
        self.warp, self.lane, self.ptx_line, self.source = warp, lane, ptx_line, source
        self.seed: int | None = None

    def __str__(self) -> str:
        place = [f"kernel {self.kernel}"] if self.kernel else []
        for name in ("rank", "block", "warp", "lane"):
            value = getattr(self, name)
            place += [] if value is None else [f"{name} {value}"]
        place += [] if self.ptx_line is None else [f"PTX line {self.ptx_line}"]
        place += [self.source] if self.source else []
        place += [] if self.seed is None else [f"seed {self.seed}"]
        return self.message + (f"\n  at {', '.join(place)}" if place else "")


class DeadlockError(EmulationError):
    """Nothing can move; the message lists every blocked warp and what it waits for."""


class HazardError(EmulationError):
    """The program is wrong, though this run may have computed the right values: a race, a missing fence, ..."""


class MemoryAccessError(EmulationError):
    """Out of bounds, misaligned, freed, or the wrong state space."""


class UnsupportedInstructionError(EmulationError):
    """The PTX holds an instruction that the emulator does not execute; found when it is loaded."""


@functools.lru_cache(maxsize=256)
def _program(ptx: str) -> Any:
    return _emulator.load(ptx)


class _Memory:
    """Which host storage is where in the machine's address space."""

    def __init__(self, machine: Any) -> None:
        self._machine = machine
        self._bases: dict[int, tuple[int, int]] = {}  # host address -> (virtual address, bytes)

    def address(self, tensor: Tensor, rank: int) -> int:
        if tensor.device.type != "cpu":
            raise ValueError(f"the emulator takes CPU tensors, got one on {tensor.device}")
        storage = tensor.untyped_storage()
        host, size = storage.data_ptr(), storage.nbytes()
        known = self._bases.get(host)
        if known is None or known[1] != size:
            if known is not None:
                self._release(host, known[0])
            name = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            base = self._machine.map(host, size, name, rank)
            self._bases[host] = (base, size)
            weakref.finalize(storage, self._release, host, base)
        return self._bases[host][0] + tensor.data_ptr() - host

    def _release(self, host: int, base: int) -> None:
        if self._bases.get(host, (None,))[0] == base:
            del self._bases[host]
        self._machine.release(base)


class _Machine:
    """One address space and its devices; VirtualGPU and VirtualCluster are views of it."""

    def __init__(self, devices: int, num_sms: int, seed: int, schedule: str, checks: bool, exact_accumulate: bool,
                 max_steps: int, choices: Sequence[int]) -> None:  # fmt: skip
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {schedule!r}, expected one of {SCHEDULES}")
        if num_sms < 1 or devices < 1:
            raise ValueError(f"num_sms is {num_sms} and there are {devices} GPUs, expected 1 or more of each")
        self.core = _emulator.Machine(
            devices, num_sms, seed & (2**64 - 1), schedule, checks, exact_accumulate, max_steps, list(choices)
        )
        self.memory = _Memory(self.core)
        self.seed, self.num_sms = seed, num_sms

    def submit(self, ptx: str, kernel: str, rank: int, grid: Dim3, block: Dim3, args: Sequence[Argument],
               cluster: Dim3 | None, shared_bytes: int, dependent: bool) -> Any:  # fmt: skip
        with self.naming_seed():
            program = _program(ptx)
            parameters = program.parameters(kernel)
            if len(args) != len(parameters):
                raise EmulationError(
                    f"launch of {kernel!r}: got {len(args)} arguments, expected {len(parameters)}", kernel=kernel
                )
            data = b""
            for i, (argument, (_, kind, size, offset, total)) in enumerate(zip(args, parameters, strict=True)):
                value = self._encode(argument, kind, size, total, rank, f"launch of {kernel!r}: argument {i}")
                data = data.ljust(offset, b"\0") + value
            return self.core.submit(
                program, kernel, rank, list(grid), list(block), list(cluster or ()), shared_bytes, data, dependent
            )

    def run(self, until: Sequence[Any]) -> None:
        with self.naming_seed():
            self.core.run(list(until))

    @contextlib.contextmanager
    def naming_seed(self) -> Iterator[None]:
        try:
            yield
        except EmulationError as error:
            error.seed = self.seed
            raise

    def _encode(self, value: Argument, kind: str, size: int, total: int, rank: int, what: str) -> bytes:
        if isinstance(value, bytes | bytearray):
            result = bytes(value)
        elif isinstance(value, TensorMap):
            result = self._encode_map(value, rank)
        elif isinstance(value, Tensor):
            result = struct.pack("<Q", self.memory.address(value, rank))
        elif isinstance(value, bool | int) and kind != "f":
            try:
                result = (int(value) % 2 ** (8 * size) if value < 0 else int(value)).to_bytes(size, "little")
            except OverflowError:
                raise EmulationError(f"{what} is {value}, which does not fit {size} bytes") from None
        elif isinstance(value, int | float):
            result = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value) if kind == "f" else b""
        else:
            raise TypeError(f"{what} is a {type(value).__name__}, expected a tensor, a TensorMap, a number or bytes")
        if len(result) != total:
            raise EmulationError(f"{what} ({type(value).__name__}) does not fit the parameter of {total} bytes ({kind})")
        return result

    def _encode_map(self, tensor_map: TensorMap, rank: int) -> bytes:
        e = tensor_map.encoding
        return bytes(
            _emulator.encode_tensor_map(
                self.memory.address(tensor_map.tensor, rank), e.data_type, list(e.shape), list(e.strides),
                list(e.box), list(e.element_strides), e.swizzle, e.fill_nan,
            )  # fmt: skip
        )

    def trace(self, path: str | Path) -> None:
        engines = {1000: "copy engine, loads", 1001: "copy engine, stores"}
        events: list[dict[str, Any]] = []
        rows = set()
        for block, row, start, length, name in self.core.spans():
            rows.add((block, row))
            events.append({"ph": "X", "pid": block, "tid": row, "ts": start / 1e3, "dur": max(length, 1) / 1e3, "name": name})
        for block, row in sorted(rows):
            name = engines.get(row) or (f"tensor core {row - 1010}" if row >= 1010 else f"warp {row}")
            events.append({"ph": "M", "pid": block, "tid": row, "name": "thread_name", "args": {"name": name}})
            events.append({"ph": "M", "pid": block, "name": "process_name", "args": {"name": f"block {block}"}})
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))


class VirtualGPU:
    """A Hopper on the CPU.

    num_sms: blocks that do not fit wait, as on a GPU. seed, schedule: see the module; "pct" runs by random priorities
        with few changes, "exhaustive" follows `choices` (see `explore`). checks=False runs faster and reports only
        deadlocks and accesses outside memory. exact_accumulate: FP32 sums in wgmma instead of the tensor core's.
    """

    def __init__(self, num_sms: int = 8, seed: int = 0, schedule: str = "random", *, checks: bool = True,
                 exact_accumulate: bool = False, max_steps: int = 2**40, choices: Sequence[int] = ()) -> None:  # fmt: skip
        self._machine = _Machine(1, num_sms, seed, schedule, checks, exact_accumulate, max_steps, choices)
        self.num_sms, self.seed, self._rank = num_sms, seed, 0

    def launch(self, ptx: str, kernel: str, *, grid: Dim3, block: Dim3, args: Sequence[Argument] = (),
               cluster: Dim3 | None = None, shared_bytes: int = 0, dependent: bool = False) -> None:  # fmt: skip
        """Run one kernel to its end. `dependent`: queue it only, behind the running launches of a `submit`."""
        launch = self._machine.submit(ptx, kernel, 0, grid, block, args, cluster, shared_bytes, dependent)
        self._machine.run([launch])

    def launch_chain(self, launches: Sequence[Mapping[str, Any]]) -> None:
        """Launches in stream order, all but the first by programmatic dependent launch (griddepcontrol).

        Each is a mapping of `launch`'s arguments.
        """
        queued = [
            self._machine.submit(
                x["ptx"], x["kernel"], 0, x["grid"], x["block"], x.get("args", ()), x.get("cluster"),
                x.get("shared_bytes", 0), i > 0,
            )  # fmt: skip
            for i, x in enumerate(launches)
        ]
        self._machine.run([])
        del queued

    def address_of(self, tensor: Tensor) -> int:
        """Where kernels see the tensor's first element."""
        return self._machine.memory.address(tensor, self._rank)

    def mark_unwritten(self, tensor: Tensor) -> None:
        """Declare that nobody wrote this (contiguous) tensor: reading it before a kernel writes it is a hazard."""
        if not tensor.is_contiguous():
            raise ValueError(f"mark_unwritten: a tensor of strides {tensor.stride()} is not contiguous")
        self._machine.core.poison(self.address_of(tensor), tensor.numel() * tensor.element_size())

    def bind(self, name: str, handler: Callable[[list[bytes]], bytes | None]) -> None:
        """Provide a function that the PTX declares `.extern`: called once a lane, with each parameter's bytes."""
        self._machine.core.bind(name, handler)

    @property
    def counters(self) -> dict[str, Any]:
        """Deterministic figures of everything run so far: instructions by class, bytes by memory, launches, ..."""
        return self._machine.core.counters()

    def trace(self, path: str | Path) -> None:
        """Write what ran so far as JSON for Perfetto or chrome://tracing."""
        self._machine.trace(path)


class Group:
    """A rank's view of the others inside `VirtualCluster.run`."""

    def __init__(self, runner: "_Runner", rank: int, size: int) -> None:
        self._runner, self.rank, self._size = runner, rank, size

    def size(self) -> int:
        return self._size

    def barrier(self) -> None:
        self.all_gather_object(None)

    def all_gather_object(self, value: Any) -> list[Any]:
        """One object from each rank, in the order of ranks."""
        return self._runner.gather(self.rank, value)


class _RankGPU(VirtualGPU):
    """One GPU of a cluster, as a rank's thread sees it."""

    def __init__(self, machine: _Machine, rank: int, runner: "_Runner | None" = None) -> None:
        self._machine, self._rank, self._runner = machine, rank, runner
        self.num_sms, self.seed = machine.num_sms, machine.seed

    def launch(self, ptx: str, kernel: str, *, grid: Dim3, block: Dim3, args: Sequence[Argument] = (),
               cluster: Dim3 | None = None, shared_bytes: int = 0, dependent: bool = False) -> None:  # fmt: skip
        launch = self._machine.submit(ptx, kernel, self._rank, grid, block, args, cluster, shared_bytes, dependent)
        if self._runner is None:
            self._machine.run([launch])
        else:
            self._runner.wait_for(self._rank, launch)


class VirtualCluster:
    """`nodes` x `gpus_per_node` virtual GPUs whose memories are one address space, as with NVLink peers."""

    def __init__(self, nodes: int = 1, gpus_per_node: int = 8, seed: int = 0, schedule: str = "random", *, num_sms: int = 8,
                 checks: bool = True, exact_accumulate: bool = False, max_steps: int = 2**40) -> None:  # fmt: skip
        self.nodes, self.gpus_per_node = nodes, gpus_per_node
        self.size = nodes * gpus_per_node
        self._machine = _Machine(self.size, num_sms, seed, schedule, checks, exact_accumulate, max_steps, ())

    def launch(self, ptx: str, kernel: str, *, grid: Dim3, block: Dim3, args: Sequence[Sequence[Argument]],
               cluster: Dim3 | None = None, shared_bytes: int = 0) -> None:  # fmt: skip
        """One launch on every rank at once; args[rank] are that rank's."""
        if len(args) != self.size:
            raise ValueError(f"launch: args holds lists for {len(args)} ranks, expected {self.size}")
        for rank, mine in enumerate(args):
            self._machine.submit(ptx, kernel, rank, grid, block, mine, cluster, shared_bytes, False)
        self._machine.run([])

    def run(self, fn: Callable[[int, Group], Any]) -> list[Any]:
        """fn(rank, group) for each rank, in threads that move one at a time; what they launch runs interleaved by seed."""
        return _Runner(self._machine, self.size).run(fn)

    def address_of(self, tensor: Tensor, rank: int) -> int:
        return self._machine.memory.address(tensor, rank)

    @property
    def counters(self) -> dict[str, Any]:
        return self._machine.core.counters()

    def trace(self, path: str | Path) -> None:
        self._machine.trace(path)


class _Runner:
    """Ranks' programs as threads with one baton: the lowest ready rank runs Python until it waits for a launch or for
    the others; when all wait, the machine runs until some launch has finished. So a run depends on nothing but the
    seed."""

    def __init__(self, machine: _Machine, size: int) -> None:
        self.machine, self.size = machine, size
        self.condition = threading.Condition()
        self.turn = -1
        self.waiting: dict[int, Any] = {}  # rank -> its launch
        self.gathering: dict[int, Any] = {}
        self.gathered: list[Any] = []
        self.alive: set[int] = set()
        self.error: BaseException | None = None

    def run(self, fn: Callable[[int, Group], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def program(rank: int) -> None:
            _active.gpu = _RankGPU(self.machine, rank, self)
            try:
                self._take(rank)
                results[rank] = fn(rank, Group(self, rank, self.size))
            except BaseException as error:
                self.error = self.error or error
            finally:
                self.alive.discard(rank)
                self._pass_on()

        self.alive = set(range(self.size))
        self.ready = set(range(self.size))
        threads = [threading.Thread(target=program, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error
        return results

    def wait_for(self, rank: int, launch: Any) -> None:
        self.waiting[rank] = launch
        self._pass_on()
        self._take(rank)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.gathering[rank] = value
        self._pass_on()
        self._take(rank)
        return list(self.gathered)

    def _take(self, rank: int) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.turn == rank or self.error is not None)
            self.ready.discard(rank)
        if self.error is not None:
            raise EmulationError(f"another rank failed: {self.error}")

    def _pass_on(self) -> None:
        """Called by the thread that holds the baton (or before the first)."""
        try:
            while not self.ready & self.alive and self.alive and self.error is None:
                if self.gathering.keys() == self.alive and len(self.alive) == self.size:
                    self.gathered = [self.gathering[r] for r in range(self.size)]
                    self.gathering = {}
                    self.ready = set(self.alive)
                elif self.waiting:
                    self.machine.run(list(self.waiting.values()))
                    done = [r for r, launch in self.waiting.items() if launch.finished]
                    self.ready |= set(done)
                    for r in done:
                        del self.waiting[r]
                else:
                    missing = sorted(set(range(self.size)) - self.gathering.keys())
                    raise DeadlockError(f"ranks {sorted(self.gathering)} wait for ranks {missing}, which have ended")
        except BaseException as error:
            self.error = self.error or error
        with self.condition:
            self.turn = min(self.ready & self.alive, default=-1)
            self.condition.notify_all()


_active = threading.local()


def current() -> VirtualGPU | None:
    """The VirtualGPU of the innermost `with virtual_gpu(...)` of this thread, or None."""
    return getattr(_active, "gpu", None)


@contextlib.contextmanager
def virtual_gpu(num_sms: int = 8, seed: int = 0, schedule: str = "random", **options: Any) -> Iterator[VirtualGPU]:
    """Inside, ops on CPU tensors run their kernels' PTX on this GPU; options are VirtualGPU's."""
    before, _active.gpu = current(), VirtualGPU(num_sms, seed, schedule, **options)
    try:
        yield _active.gpu
    finally:
        _active.gpu = before


def explore(run: Callable[[VirtualGPU], Any], *, limit: int = 10_000, **options: Any) -> int:
    """Calls `run` with a GPU for every interleaving of synchronising steps; returns how many there were.

    For small cases: raises `EmulationError` when there are more than `limit`. What `run` raises passes through, the
    choices that led there in its `choices`.
    """
    choices: list[int] = []
    for count in range(1, limit + 1):
        gpu = VirtualGPU(schedule="exhaustive", choices=choices, **options)
        try:
            run(gpu)
        except EmulationError as error:
            error.choices = choices  # type: ignore[attr-defined]
            raise
        widths = gpu._machine.core.choice_widths
        taken = choices + [0] * (len(widths) - len(choices))
        while taken and taken[-1] + 1 >= widths[len(taken) - 1]:
            taken.pop()
        if not taken:
            return count
        choices = [*taken[:-1], taken[-1] + 1]
    raise EmulationError(f"more than {limit} interleavings: make the case smaller")
