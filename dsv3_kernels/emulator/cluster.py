"""Several virtual GPUs in one address space, and programs of ranks that use them."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DeadlockError, EmulationError
from .gpu import VirtualGPU, _active
from .links import HBM, IB, NVLINK, Link
from .machine import Argument, Dim3, Machine


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

    def symmetric(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """This rank's own of what all ranks allocate together; see `VirtualCluster.symmetric`."""
        made = None
        if self.rank == 0:
            made = self._runner.machine.memory.symmetric(shape, dtype, self._size)
        tensors: list[Tensor] = self.all_gather_object(made)[0]
        return tensors[self.rank]


class _RankGPU(VirtualGPU):
    """One GPU of a cluster, as a rank's thread sees it."""

    def __init__(self, machine: Machine, rank: int, runner: "_Runner | None" = None) -> None:
        self._machine, self._rank, self._runner = machine, rank, runner
        self.num_sms, self.seed = machine.num_sms, machine.seed

    def _run(self, launch: Any) -> None:
        if self._runner is None:
            self._machine.run([launch])
        else:
            self._runner.wait_for(self._rank, launch)


class VirtualCluster:
    """`nodes` x `gpus_per_node` virtual GPUs whose memories are one address space, as with NVLink peers.

    PTX that NVSHMEM's headers make (`jit.compile_ptx(source, nvshmem=True)`) runs as it is. Inside a node it
    stores to the peer itself. What goes through the library runs on a virtual network: a message on a queue
    pair arrives behind the earlier ones of that queue pair, late, in pieces, and in no order with any other;
    the default queue pair is any of several. A queue pair is any number from 2 on, as if nvshmemx_qp_create
    had made it. Remote memory is named by tensors of `symmetric`. nvlink (inside a node), ib (between
    nodes) and memory (of a GPU): latency and bandwidth in virtual time. A GPU has one port to NVLink and one
    to InfiniBand, each with its link's bandwidth in and out, for all its peers together.

    Not there: teams but the world, collectives but barriers and syncs, regions, TMA within NVSHMEM, host
    calls. Reported as races, because plain loads and stores take part: a poll of what `nvshmem_<type>_p`
    writes (use a signal or an atomic), and the value that `nvshmem_signal_wait_until` returns where a peer of
    the node sent it (read it with `nvshmem_signal_fetch`).
    """

    def __init__(
        self,
        nodes: int = 1,
        gpus_per_node: int = 8,
        seed: int = 0,
        schedule: str = "random",
        *,
        num_sms: int = 8,
        checks: bool = True,
        exact_accumulate: bool = False,
        max_steps: int = 2**40,
        choices: Sequence[int] = (),
        nvlink: Link = NVLINK,
        ib: Link = IB,
        memory: Link = HBM,
    ) -> None:
        if nodes < 1 or gpus_per_node < 1:
            raise ValueError(f"nodes is {nodes}, gpus_per_node is {gpus_per_node}, expected 1 or more")
        self.nodes, self.gpus_per_node = nodes, gpus_per_node
        self.size = nodes * gpus_per_node
        self._machine = Machine(
            self.size, num_sms, seed, schedule, checks, exact_accumulate, max_steps, choices
        )
        self._machine.core.set_network(
            gpus_per_node, (nvlink.latency, nvlink.bandwidth), (ib.latency, ib.bandwidth)
        )
        if nvlink.posting or ib.posting:
            self._machine.core.set_posting(nvlink.posting, ib.posting)
        self._machine.core.set_memory(memory.latency, memory.bandwidth)

    def launch(
        self,
        ptx: str,
        kernel: str,
        *,
        grid: Dim3,
        block: Dim3,
        args: Sequence[Sequence[Argument]],
        cluster: Dim3 | None = None,
        shared_bytes: int = 0,
    ) -> None:
        """One launch on every rank at once; args[rank] are that rank's."""
        if len(args) != self.size:
            raise ValueError(f"launch: args holds lists for {len(args)} ranks, expected {self.size}")
        for rank, mine in enumerate(args):
            self._machine.submit(ptx, kernel, rank, grid, block, mine, cluster, shared_bytes, False)
        self._machine.run([])

    def run(self, fn: Callable[[int, Group], Any]) -> list[Any]:
        """fn(rank, group) for each rank, in threads that move one at a time; returns what they return.

        What the ranks launch runs interleaved by the seed.
        """
        return _Runner(self._machine, self.size).run(fn)

    def address_of(self, tensor: Tensor, rank: int) -> int:
        return self._machine.memory.address(tensor, rank)

    def symmetric(self, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """One zeroed tensor a rank, at the same place of every rank's symmetric heap (nvshmem_calloc)."""
        return self._machine.memory.symmetric(shape, dtype, self.size)

    def stall(self, source: int, destination: int, until: int | None = None) -> None:
        """A fault: the link between two ranks delivers nothing before virtual time `until` (ns), or ever."""
        self._check_ranks(source, destination)
        self._machine.core.stall_link(source, destination, 2**64 - 1 if until is None else until)

    def drop(self, source: int, destination: int, message: int) -> None:
        """A fault: the link loses its message of this number, from 0.

        A put with signal is two messages; a get or a fetching atomic is one on the link to the other rank,
        and its answer one on the link back. As on a reliable connection, nothing behind a lost message on its
        queue pair arrives either.
        """
        self._check_ranks(source, destination)
        self._machine.core.drop_message(source, destination, message)

    def kill(self, rank: int, step: int = 0) -> None:
        """A fault: the rank dies once the cluster has executed `step` instructions; it never runs again."""
        self._check_ranks(rank)
        self._machine.core.kill_device(rank, step)

    def _check_ranks(self, *ranks: int) -> None:
        for rank in ranks:
            if not 0 <= rank < self.size:
                raise ValueError(f"rank {rank} is not among the {self.size} of this cluster")

    @property
    def counters(self) -> dict[str, Any]:
        """As `VirtualGPU.counters`, over all ranks; `launch_cycles` is of the launch that ended last.

        Links count what goes through NVSHMEM's library (a get's request has no bytes, its answer has); direct
        loads and stores of a peer's memory are in `["peer_bytes"]`.
        """
        return self._machine.core.counters()

    def trace(self, path: str | Path) -> None:
        """As `VirtualGPU.trace`, with the links between ranks."""
        self._machine.trace(path)


class _Runner:
    """Ranks' programs as threads with one baton.

    The lowest ready rank runs Python until it waits for a launch or for the others; when all wait,
    the machine runs until some launch has finished. So a run depends on nothing but the seed.
    """

    def __init__(self, machine: Machine, size: int) -> None:
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
                    raise DeadlockError(
                        f"ranks {sorted(self.gathering)} wait for ranks {missing}, which have ended"
                    )
        except BaseException as error:
            self.error = self.error or error
        with self.condition:
            self.turn = min(self.ready & self.alive, default=-1)
            self.condition.notify_all()
