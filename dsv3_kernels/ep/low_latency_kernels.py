"""The kernel transport of low latency: csrc/kernels/low_latency.cuh on memory that all ranks have alike."""

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..by_value import Struct, join
from ..checks import ceil_div, round_up
from ..device_error import DeviceValueError
from ..jit import Kernel
from ..nvshmem import World
from ..quantized import ROW, QuantizedTensor, empty_mn_major
from . import nvlink, one_gpu
from .errors import Fault, TimeoutError
from .kernels import cause_of, given_up_bytes
from .low_latency import Format, Hook, LowLatencyDispatched, LowLatencyHandle, received_rows
from .transport import Shape

OPS = ("low_latency_dispatch", "low_latency_combine")
ROLES = ("send", "receive")
GROUP = 128  # threads that share the rows of an (expert, rank)
MOST_THREADS = 512
MOST_RANKS = 8  # of a launch
IN_FLIGHT = 2  # epochs of an op: slots have two parities


class Phase(enum.IntEnum):
    """csrc/kernels/low_latency.cuh."""

    DISPATCH_SEND = 0
    DISPATCH_RECEIVE = 1
    COMBINE_SEND = 2
    COMBINE_RECEIVE = 3


@dataclass(frozen=True)
class Area:
    """One op's part of a rank's memory: csrc/kernels/low_latency.cuh. flags, slots, staged: of a parity."""

    start: int
    ranks: int
    flags: int
    slots: int
    staged: int
    slot_bytes: int

    @property
    def end(self) -> int:
        words = round_up(8 * (self.ranks + 2 * self.flags), 16)
        return self.start + words + 2 * (self.slots + self.staged) * self.slot_bytes


def areas(shape: Shape) -> tuple[Area, Area]:
    """Of dispatch and of combine; the end of the second is the size of a rank's memory."""
    ranks, tokens = shape.topology.size, shape.max_tokens_per_rank
    row = 2 * shape.hidden
    slot = round_up(max(row, shape.hidden + 4 * ceil_div(shape.hidden, 128)), 16)
    far = shape.topology.nodes > 1
    pairs = tokens * shape.num_topk
    there = Area(
        given_up_bytes(ranks), ranks, shape.num_experts, shape.num_experts * tokens, tokens * far, slot
    )
    home = Area(there.end, ranks, shape.num_experts, pairs, ranks * pairs * far, row)
    return there, home


@dataclass(frozen=True, eq=False)
class Connection:
    """How a rank reaches the others.

    memory: uint8, this rank's, symmetric; `areas` says how large. mapped: int64 `[R]`, where this GPU sees
    the memory of each rank, 0 where only the network reaches it. queue_pairs: int32, numbers of NVSHMEM's
    queue pairs, none within a node. kernel: one instance of `low_latency_step`. keep: what must live as long.
    """

    rank: int
    memory: Tensor
    mapped: Tensor
    queue_pairs: Tensor
    kernel: Kernel
    keep: object = None


def kernel(nodes: int, emulated: bool) -> Kernel:
    """The instance for a buffer: within a node it knows of no network."""
    if nodes == 1:
        return Kernel("low_latency.cuh", "low_latency_step")
    if emulated:
        return Kernel("low_latency.cuh", "low_latency_step", defines=(("DSV3_NVSHMEM_DECLARED", 1),))
    return Kernel("low_latency.cuh", "low_latency_step", nvshmem=True)


def connect_emulated(group: Any, gpu: Any, shape: Shape) -> Connection:
    """Inside `VirtualCluster.run`. A peer's memory lives on while it is mapped: its last word comes late."""
    memory = group.symmetric((areas(shape)[1].end,), torch.uint8)
    every = group.all_gather_object((gpu.address_of(memory), memory))
    node = shape.topology.gpus_per_node
    mapped = [address * (r // node == group.rank // node) for r, (address, _) in enumerate(every)]
    queue_pairs = torch.arange(2, 2 + shape.local_experts, dtype=torch.int32)
    which = kernel(shape.topology.nodes, emulated=True)
    return Connection(group.rank, memory, torch.tensor(mapped), queue_pairs, which, every)


def connect_nvlink(mapped: nvlink.Mapped, shape: Shape, rank: int) -> Connection:
    """Within a node, on memory that all have mapped."""
    device = mapped.memory.device
    table = torch.tensor(mapped.addresses, device=device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    return Connection(rank, mapped.memory, table, none, kernel(1, emulated=False), mapped)


def connect_loopback(shape: Shape, device: torch.device) -> list[Connection]:
    """All ranks, of one node or several, on one GPU, real or virtual."""
    node, several = shape.topology.gpus_per_node, shape.topology.nodes > 1
    heap = one_gpu.Heap(shape.topology.size, [areas(shape)[1].end], device)
    memories = [heap.memories(rank)[0] for rank in range(shape.topology.size)]
    addresses = [launch.address_of(memory) for memory in memories]
    within_node = kernel(1, emulated=True)
    which = one_gpu.on_one_gpu(within_node) if several else within_node
    found = []
    for rank, memory in enumerate(memories):
        mapped = [address * (r // node == rank // node) for r, address in enumerate(addresses)]
        pairs = heap.queue_pairs(rank, shape.local_experts * several)
        found.append(Connection(rank, memory, torch.tensor(mapped, device=device), pairs, which, heap))
    return found


def connect_nvshmem(world: World, shape: Shape) -> Connection:
    """Between nodes; all ranks of the world call. Raises `NvshmemError` before any kernel runs."""
    memory = world.allocate(areas(shape)[1].end)
    device = memory.device
    pairs = torch.tensor(world.queue_pairs(shape.local_experts), dtype=torch.int32, device=device)
    mapped = torch.tensor(world.mapped(memory), device=device)
    return Connection(world.rank, memory, mapped, pairs, kernel(shape.topology.nodes, emulated=False), world)


@dataclass(frozen=True)
class Failure:
    """Words of the record of a wait in vain: csrc/kernels/low_latency.cuh."""

    role: int
    peer: int
    expert: int
    expected: int
    seen: int
    missing: int
    recorded: int


@dataclass(frozen=True, eq=False)
class _Layout:
    segments: Tensor  # int32 [E_local, R, 3]
    places: Tensor  # int32 [T, K, 2]


class _Op:
    """What a rank keeps between calls of one op. records: of its failure and of its fault."""

    def __init__(self, name: str, area: Area, device: torch.device) -> None:
        self.name, self.area = name, area
        self.progress = torch.zeros(6, dtype=torch.int64, device=device)
        # The host reads them without asking the GPU.
        self.records = torch.zeros(7 + 3, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.failure, self.fault = self.records.numpy()[:7], self.records.numpy()[7:]
        self.outstanding: deque[object] = deque()  # calls whose receive has not been launched


class Launcher:
    """Launches what `ranks` ranks hand in, one after the other, as one grid when the last has."""

    def __init__(self, kernel: Kernel, shape: Shape, ranks: int = 1) -> None:
        self._kernel, self._shape, self._ranks = kernel, shape, ranks
        self._steps: list[Struct] = []

    def __call__(self, step: Struct, num_sms: int) -> None:
        self._steps.append(step)
        if len(self._steps) < self._ranks:
            return
        steps, self._steps = join(self._steps, MOST_RANKS), []
        grid, block = (num_sms * self._ranks, 1, 1), (threads(self._shape.hidden), 1, 1)
        shared = shared_bytes(self._shape)
        try:
            launch.launch(self._kernel, grid, block, (steps, num_sms), shared_bytes=shared)
        except DeviceValueError:
            if steps.tensors[0].is_cuda:  # an earlier kernel's, and in its place this one was not launched
                launch.launch(self._kernel, grid, block, (steps, num_sms), shared_bytes=shared)
            raise


class KernelLowLatency:
    """One rank. launcher: shared with the ranks of the same GPU, if there are any."""

    def __init__(
        self, shape: Shape, connection: Connection, timeout: float, launcher: Launcher | None = None
    ) -> None:
        self._shape, self._connection, self._timeout = shape, connection, timeout
        self._launcher = launcher or Launcher(connection.kernel, shape)
        device = connection.memory.device
        there, home = areas(shape)
        self._dispatch, self._combine = _Op(OPS[0], there, device), _Op(OPS[1], home, device)
        self._sent_rows = torch.zeros(shape.num_experts, dtype=torch.int64, device=device)
        self._failure: TimeoutError | None = None
        self._reported: DeviceValueError | None = None
        launch.also_raise(self)

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, form: Format, num_sms: int
    ) -> tuple[LowLatencyDispatched, Hook]:
        shape, device = self._shape, x.device
        size = (shape.local_experts, received_rows(shape), shape.hidden)
        data = torch.empty(size, dtype=torch.float8_e4m3fn if form.fp8 else torch.bfloat16, device=device)
        scales = empty_mn_major((*size[:2], ceil_div(shape.hidden, 128)), device) if form.fp8 else None

        def integers(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=torch.int32, device=device)

        counts = integers(shape.local_experts)
        layout = _Layout(
            integers(shape.local_experts, shape.topology.size, 3), integers(x.shape[0], shape.num_topk, 2)
        )
        format = int(form.fp8) + int(form.power_of_2_scales)

        def run(phase: Phase) -> None:
            step = self._step(self._dispatch, phase, layout, x, topk_idx, None, data, scales, counts, format)
            self._launch(step, num_sms)

        receive = self._send(self._dispatch, run, Phase.DISPATCH_SEND)
        rows = data if scales is None else QuantizedTensor(data, scales, ROW)
        handle = LowLatencyHandle(self, x.shape[0], layout)
        return LowLatencyDispatched(rows, counts, handle, None), receive

    def combine(
        self, y: Tensor, handle: LowLatencyHandle, topk_weights: Tensor, num_sms: int
    ) -> tuple[Tensor, Hook]:
        layout = handle.layout
        if not isinstance(layout, _Layout):
            raise TypeError(f"handle.layout is {type(layout).__name__}, expected that of the kernels")
        out = y.new_empty(handle.num_tokens, self._shape.hidden)

        def run(phase: Phase) -> None:
            step = self._step(self._combine, phase, layout, y, None, topk_weights, out)
            self._launch(step, num_sms)

        return out, self._send(self._combine, run, Phase.COMBINE_SEND)

    def check(self) -> None:
        """Raises what the kernels have reported so far; `dsv3_kernels.synchronize` does too."""
        self._raise_failed()
        self._raise_fault()

    def _send(self, op: _Op, run: Callable[[Phase], None], send: Phase) -> Hook:
        """Launches what sends; what is returned launches what receives."""
        self._raise_failed()
        if len(op.outstanding) == IN_FLIGHT:
            raise ValueError(
                f"{op.name}: {IN_FLIGHT} calls wait for their hook(), expected fewer: there are {IN_FLIGHT} "
                "buffers. Call the hook of the oldest first"
            )
        call = object()
        op.outstanding.append(call)

        def receive() -> None:
            if call not in op.outstanding:
                return
            self._raise_failed()
            if op.outstanding[0] is not call:
                raise ValueError(
                    f"{op.name}: hook() of a later call, expected hooks in the order of their calls"
                )
            op.outstanding.popleft()
            run(Phase(send + 1))
            # What was right has been sent, and the others go on: so did this rank, until it has received.
            self.check()
            reported, self._reported = self._reported, None
            if reported is not None:
                raise reported

        run(send)
        return receive

    def _launch(self, step: Struct, num_sms: int) -> None:
        try:
            self._launcher(step, num_sms)
        except DeviceValueError as error:
            self._reported = error  # of an earlier kernel: the others wait for this rank

    def _raise_failed(self) -> None:
        for op in (self._dispatch, self._combine):
            if self._failure is None and op.failure[-1]:
                record, rank = Failure(*op.failure.tolist()), self._connection.rank
                cause = cause_of(rank, record.peer, record.missing, record.seen, record.expected)
                role = ROLES[record.role - 1]
                self._failure = TimeoutError(
                    op.name, rank, [record.missing], role, record.expert, self._timeout, cause
                )
        if self._failure is not None:
            raise self._failure

    def _raise_fault(self) -> None:
        """Once for each that was recorded."""
        index, value, recorded = self._dispatch.fault.tolist()
        if not recorded:
            return
        self._dispatch.fault[:] = 0
        self._dispatch.progress[-1] = 0
        shape, (token, k) = self._shape, divmod(index, self._shape.num_topk)
        what = "twice in its row" if 0 <= value < shape.num_experts else "out of range"
        raise Fault(
            f"{OPS[0]}: topk_idx[{token}, {k}] of rank {self._connection.rank} is {value}, {what}; expected "
            f"distinct experts 0 to {shape.num_experts - 1}, or -1 for none; such choices were left out"
        )

    def _step(
        self,
        op: _Op,
        phase: Phase,
        layout: _Layout,
        source: Tensor,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        out: Tensor,
        scales: Tensor | None = None,
        counts: Tensor | None = None,
        format: int = 0,
    ) -> Struct:
        """`LowLatencyStep` of csrc/kernels/low_latency.cuh."""
        shape, connection, area = self._shape, self._connection, op.area
        records = (op.records[:7], op.records[7:])
        failure, fault = (words.data_ptr() if source.is_cuda else words for words in records)
        strides = (0, 0) if scales is None else (scales.stride(0), scales.stride(2))
        queue_pairs = connection.queue_pairs
        peers = (
            connection.memory,
            connection.mapped,
            queue_pairs,
            connection.rank,
            area.ranks,
            queue_pairs.numel(),
        )
        place = (area.start, area.slot_bytes, area.ranks, area.flags, area.slots, 0)
        sizes = (shape.local_experts, shape.max_tokens_per_rank, shape.num_topk, shape.hidden)
        return join(
            [
                Struct("PPPIII", *peers),
                Struct("QQIIII", *place),
                Struct("PPQ", op.progress, failure, int(self._timeout * 1e9)),
                Struct("PPP", topk_idx, layout.places, self._sent_rows),
                Struct("PPP", fault, topk_weights, source),
                Struct("PPqqPP", out, scales, *strides, counts, layout.segments),
                Struct("IIIIIII", phase, format, *sizes, layout.places.shape[0]),
            ]
        )


def threads(hidden: int) -> int:
    """Of a block: a lane for 16 columns of a token, in whole groups."""
    return min(round_up(ceil_div(hidden, 16), GROUP), MOST_THREADS)


def shared_bytes(shape: Shape) -> int:
    """What a sending block knows of the routing: `Plan` of csrc/kernels/low_latency_dispatch.cuh."""
    words = 3 * shape.num_experts + shape.num_experts % 2 + 4 * (shape.num_topk + 1) + 4 * shape.num_topk
    return 4 * words
