"""csrc/kernels/dispatch_lean.cuh and its epilogue: how tokens move in pieces, and what the launches pass."""

from dataclasses import dataclass

from .. import launch
from ..by_value import Struct, join
from ..checks import round_up
from ..jit import Kernel
from . import internode_kernels, kernels
from .kernels import MAX_CHANNELS, DispatchOperands, Workspace
from .lean import Link
from .transport import Shape

MOVE = Kernel("dispatch_lean.cuh", "dispatch_lean", (False,), nvshmem=True)
MOVE_AGAIN = Kernel("dispatch_lean.cuh", "dispatch_lean", (True,), nvshmem=True)
ORDER = Kernel("dispatch_lean_epilogue.cuh", "dispatch_lean_epilogue", (False,), nvshmem=True)
ORDER_AGAIN = Kernel("dispatch_lean_epilogue.cuh", "dispatch_lean_epilogue", (True,), nvshmem=True)

MAX_PAIRS = 8  # channels of a block
ORDER_WARPS = 8
SHARED = 227 * 1024  # bytes a block may have
BARRIER = 16  # bytes behind a stage, csrc/kernels/bulk.cuh
MOST_STAGES = 8


@dataclass(frozen=True)
class Pieces:
    """What a stage holds of a message, and how many stages a warp has."""

    bytes: int
    stages: int

    @classmethod
    def fit(cls, message_bytes: int, room: int) -> "Pieces":
        """The largest pieces of which three or more stages fit into `room` bytes of shared memory."""
        for count in range(1, message_bytes // 16 + 1):
            size = round_up(-(-message_bytes // count), 16)
            stages = room // (size + BARRIER)
            if stages >= 3:
                return cls(size, min(stages, MOST_STAGES))
        raise ValueError(f"no three stages fit into {room} bytes of shared memory, expected 96 or more")

    def bytes_of(self, warps: int) -> int:
        return warps * self.stages * (self.bytes + BARRIER)


def pairs_of(num_sms: int) -> int:
    """Channels of a block."""
    return max(1, min(MAX_PAIRS, MAX_CHANNELS // num_sms))


def channels_of(num_sms: int) -> int:
    return num_sms * pairs_of(num_sms)


def few_sms(nodes: int) -> int:
    """As many SMs as let copies of whole tokens fill InfiniBand, by the figures of the public design."""
    return 12 if nodes <= 2 else 6 if nodes <= 4 else 4


@dataclass(frozen=True)
class Launch:
    """One of the two launches of a rank: grid, block, shared memory, and pieces."""

    blocks: int
    threads: int
    words: int  # of shared memory behind the stages
    pieces: Pieces

    @property
    def shared_bytes(self) -> int:
        return max(self.pieces.bytes_of(self.threads // 32) + 4 * self.words, kernels.OWN_SM)

    @property
    def shape(self) -> tuple[launch.Dim3, launch.Dim3, int]:
        return (self.blocks, 1, 1), (self.threads, 1, 1), self.shared_bytes


def words_to_move(shape: Shape, pairs: int) -> int:
    return pairs * (shape.num_experts + 3 * shape.topology.size)


def words_to_order(shape: Shape) -> int:
    return 2 * shape.num_experts + max(shape.topology.size, shape.local_experts)


def move_launch(shape: Shape, message_bytes: int, num_sms: int) -> Launch:
    """Of `MOVE`, and `MOVE_AGAIN`."""
    pairs = pairs_of(num_sms)
    words = words_to_move(shape, pairs)
    pieces = Pieces.fit(message_bytes, (SHARED - 4 * words) // (2 * pairs))
    return Launch(num_sms, 64 * pairs, words, pieces)


def order_launch(shape: Shape, message_bytes: int, blocks: int) -> Launch:
    """Of `ORDER`, and `ORDER_AGAIN`."""
    words = words_to_order(shape)
    pieces = Pieces.fit(message_bytes, (SHARED - 4 * words) // ORDER_WARPS)
    return Launch(blocks, 32 * ORDER_WARPS, words, pieces)


def message_of(shape: Shape, o: DispatchOperands) -> tuple[int, int]:
    """Bytes of a message, and of the routing at its head."""
    routing = 0 if o.topk_idx is None else round_up(8 * shape.num_topk, 16)
    return round_up(routing + internode_kernels.row_bytes(o.x), 16), routing


def call(link: Link, o: DispatchOperands, message: tuple[int, int], pieces: Pieces) -> Struct:
    """`dispatch::LeanCall`."""
    shape = link.slots.shape
    return join(
        [
            kernels.dispatch_call(Workspace(shape), link.peers, o),
            link.struct("dispatch"),
            internode_kernels.layout_of(o).struct(),
            Struct("IIII", *message, pieces.bytes, pieces.stages),
        ]
    )
