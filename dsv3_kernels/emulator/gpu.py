"""One virtual GPU."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import EmulationError
from .links import HBM, Link
from .machine import Argument, Dim3, Machine

_active = threading.local()


class VirtualGPU:
    """A Hopper on the CPU.

    num_sms: blocks that do not fit wait, as on a GPU. seed, schedule: see the module; "pct" runs by random
    priorities with few changes, "timed" moves who is earliest in virtual time (to compare figures of
    `counters["cycles"]` without the noise of a schedule; it finds few bugs), "exhaustive" follows `choices`
    (see `explore`), and so does "sequential", where everybody sees stores at once. checks=False runs faster
    and reports only deadlocks and accesses outside memory.
    exact_accumulate: FP32 sums in wgmma, not Hopper's. memory: latency and bandwidth of the GPU's memory in
    virtual time (see `trace`).

    A kernel that holds setmaxnreg begins with the registers a thread that ptxas gives it: .maxnreg, else
    65536 / (.minnctapersm * .maxntid), the threads rounded up to whole warpgroups and the quotient down to a
    multiple of 8 (at most 256), and no more than its largest setmaxnreg.inc. Without .maxnreg and
    .minnctapersm ptxas ignores setmaxnreg, and so does this GPU. Warps that have ended give nothing back.
    """

    def __init__(
        self,
        num_sms: int = 8,
        seed: int = 0,
        schedule: str = "random",
        *,
        checks: bool = True,
        exact_accumulate: bool = False,
        max_steps: int = 2**40,
        choices: Sequence[int] = (),
        memory: Link = HBM,
    ) -> None:
        self._machine = Machine(1, num_sms, seed, schedule, checks, exact_accumulate, max_steps, choices)
        self._machine.core.set_memory(memory.latency, memory.bandwidth)
        self.num_sms, self.seed, self._rank = num_sms, seed, 0

    def launch(
        self,
        ptx: str,
        kernel: str,
        *,
        grid: Dim3,
        block: Dim3,
        args: Sequence[Argument] = (),
        cluster: Dim3 | None = None,
        shared_bytes: int = 0,
    ) -> None:
        """Run one kernel to its end."""
        self._run(
            self._machine.submit(ptx, kernel, self._rank, grid, block, args, cluster, shared_bytes, False)
        )

    def launch_chain(self, launches: Sequence[Mapping[str, Any]]) -> None:
        """Launches in stream order, all but the first by programmatic dependent launch (griddepcontrol).

        Each is a mapping of `launch`'s arguments.
        """
        for launch in self._queue(launches):
            self._run(launch)

    def _queue(self, launches: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [
            self._machine.submit(
                x["ptx"],
                x["kernel"],
                self._rank,
                x["grid"],
                x["block"],
                x.get("args", ()),
                x.get("cluster"),
                x.get("shared_bytes", 0),
                i > 0,
            )
            for i, x in enumerate(launches)
        ]

    def _run(self, launch: Any) -> None:
        self._machine.run([launch])

    def address_of(self, tensor: Tensor) -> int:
        """Where kernels see the tensor's first element."""
        return self._machine.memory.address(tensor, self._rank)

    def mark_unwritten(self, tensor: Tensor) -> None:
        """Declare that nobody wrote this contiguous tensor: reading it before a write is a hazard."""
        if not tensor.is_contiguous():
            raise ValueError(f"mark_unwritten: a tensor of strides {tensor.stride()} is not contiguous")
        self._machine.core.poison(self.address_of(tensor), tensor.numel() * tensor.element_size())

    def bind(self, name: str, handler: Callable[[list[bytes]], bytes | None]) -> None:
        """Provide a function that the PTX declares `.extern`: called once a lane, with its arguments."""
        self._machine.core.bind(name, handler)

    @property
    def counters(self) -> dict[str, Any]:
        """Figures of all that ran so far; the same seed gives the same ones.

        launches: kernels submitted.
        cycles: virtual time at which the last launch ended, in cycles of an SM (1.755 GHz); launches follow
            each other without a gap. launch_cycles: of the launch that ended last, from its start to its end,
            with the stores and messages that it left behind. What virtual time is: see `trace`.
        instructions: executed by warps, one for up to 32 lanes; instructions_by_class: the same by "integer",
            "float", "convert", "move" (and address conversions), "memory" (ld, st, ldmatrix, stmatrix),
            "atomic", "barrier" (mbarrier, bar, fences), "async" (copies, and waits for them), "wgmma",
            "control", "warp" (shuffles, votes, ...). A test of a barrier that fails and is repeated counts
            each time.
        wgmma: wgmma.mma_async of whole warpgroups. tensor_core_cycles: how long they kept tensor cores busy.
        global_bytes_read, global_bytes_written: bytes by ld, st, atom and red (which do both).
        global_sectors: the 32-byte sectors those touched, each once an instruction: bytes / 32 where accesses
            coalesce.
        copy_bytes_read, copy_bytes_written: bytes of global memory by cp.async and bulk and tensor copies;
            what is out of bounds is not among them.
        multicast_bytes: bytes that multicast copies brought into shared memories, once for each.
        shared_bytes_read, shared_bytes_written: bytes by ld, st, atomics, ldmatrix, stmatrix, st.async and
            red.async, and what wgmma reads. distributed_shared_bytes: those of them by warps in another block
            of the cluster.
        bank_conflicts: passes through the 32 banks of shared memory beyond those that the access's width
            needs anyway, of the same instructions but wgmma. Lanes at one word share a pass.
        barrier_waits: waits of a warp at an mbarrier, bar or barrier.cluster that took virtual time.
            barrier_wait_cycles: how much.
        peak_shared_bytes: the largest shared memory of a block, static and dynamic.
        peer_bytes: bytes of other GPUs' memory by plain address. peer_bytes_by_link: the same by (source,
            destination) of the data.
        links: by (source, destination), the messages of NVSHMEM's functions: kind ("NVLink", "IB", "local"),
            messages, bytes, lost.
        nanoseconds: what kernels read as %globaltimer. It counts steps of the scheduler, not virtual time.
        """
        return self._machine.core.counters()

    def trace(self, path: str | Path) -> None:
        """Write what ran so far as JSON for ui.perfetto.dev or chrome://tracing: a row a warp, one an engine.

        Time in it is virtual: warps, copy engine, tensor core and links overlap, at rates that are round
        figures of a Hopper. It serves to compare schedules and protocols, not to predict seconds. The first
        2**18 slices are kept; `otherData.dropped_slices` says how many are not. Form and rates:
        `dsv3_kernels/emulator/trace.py`.
        """
        self._machine.trace(path)


def current() -> VirtualGPU | None:
    """The VirtualGPU of the innermost `with virtual_gpu(...)` of this thread, or None."""
    return getattr(_active, "gpu", None)


@contextlib.contextmanager
def virtual_gpu(
    num_sms: int = 8, seed: int = 0, schedule: str = "random", **options: Any
) -> Iterator[VirtualGPU]:
    """Inside, ops on CPU tensors run their kernels' PTX on this GPU; options are VirtualGPU's."""
    before, _active.gpu = current(), VirtualGPU(num_sms, seed, schedule, **options)
    try:
        yield _active.gpu
    finally:
        _active.gpu = before


def explore(
    run: Callable[[Any], Any],
    *,
    limit: int = 10_000,
    make: Callable[..., Any] = VirtualGPU,
    late_stores: bool = True,
    **options: Any,
) -> int:
    """Calls `run` with a GPU for every interleaving of synchronising steps; returns how many there were.

    make: VirtualGPU or VirtualCluster, called with `options`. late_stores: when each strong store reaches
    the others is a choice too; without it there are far fewer interleavings, and only a thread that reads
    elsewhere before its own store has arrived (store buffering) goes unseen.

    For small cases: raises `EmulationError` when there are more than `limit`. What `run` raises passes
    through, with the choices that led there in its `choices`.
    """
    choices: list[int] = []
    schedule = "exhaustive" if late_stores else "sequential"
    for count in range(1, limit + 1):
        gpu = make(schedule=schedule, choices=choices, **options)
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
