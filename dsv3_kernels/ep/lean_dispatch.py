"""csrc/kernels/dispatch_lean.cuh and its epilogue: how tokens move in pieces, and what the launches pass."""

from dataclasses import dataclass

from torch import Tensor

from .. import launch
from ..by_value import Struct, join
from ..checks import round_up
from ..jit import Kernel
from ..quantized import QuantizedTensor
from . import internode_kernels, kernels
from .kernels import MAX_CHANNELS, DispatchOperands, Workspace
from .lean import Link
from .transport import Shape

KERNELS = ("dispatch_lean", "dispatch_lean_epilogue")  # the first launch and the second
DISPATCH = tuple(Kernel(f"{name}.cuh", name, (False,), nvshmem=True) for name in KERNELS)
DISPATCH_AGAIN = tuple(Kernel(f"{name}.cuh", name, (True,), nvshmem=True) for name in KERNELS)

MAX_PAIRS = 8  # channels of a block, two warps each
TOKENS = 2  # of a rank for a channel to be worth its warps
EPILOGUE_WARPS = 8  # of a block
SHARED_BYTES = 227 * 1024  # of a block
BARRIER = 16  # bytes behind a stage, csrc/kernels/bulk.cuh
LEAST_STAGES, MOST_STAGES = 3, 8  # of a warp: two loads under way, and no more than memory needs


@dataclass(frozen=True)
class Pieces:
    """bytes: what a stage holds of a message. stages: of a warp."""

    bytes: int
    stages: int

    @classmethod
    def fit(cls, message_bytes: int, room: int) -> "Pieces":
        """The largest of which enough stages fit into so many bytes; whole messages, if those do."""
        for count in range(1, message_bytes // 16 + 1):
            size = round_up(-(-message_bytes // count), 16)
            stages = room // (size + BARRIER)
            if stages >= LEAST_STAGES:
                return cls(size, min(stages, MOST_STAGES))
        least = LEAST_STAGES * (16 + BARRIER)
        raise ValueError(f"stages: {room} bytes of shared memory a warp, expected at least {least}")


@dataclass(frozen=True)
class Blocks:
    """Of one rank's launch. words: of shared memory behind the stages."""

    count: int
    warps: int
    words: int

    def pieces(self, message_bytes: int) -> Pieces:
        return Pieces.fit(message_bytes, (SHARED_BYTES - 4 * self.words) // self.warps)

    def shape(self, pieces: Pieces) -> tuple[launch.Dim3, launch.Dim3, int]:
        """Grid, block, bytes of shared memory."""
        stages = self.warps * pieces.stages * (pieces.bytes + BARRIER)
        return (self.count, 1, 1), (32 * self.warps, 1, 1), max(stages + 4 * self.words, kernels.OWN_SM)


def blocks_of(shape: Shape, num_sms: int, pairs: int | None = None) -> Blocks:
    """Of the first launch."""
    pairs = pairs_of(shape, num_sms) if pairs is None else pairs
    return Blocks(num_sms, 2 * pairs, pairs * (shape.num_experts + 3 * shape.topology.size))


def blocks_of_epilogue(shape: Shape, sms: int, warps: int = EPILOGUE_WARPS) -> Blocks:
    """Of the second one."""
    return Blocks(sms, warps, 2 * shape.num_experts + max(shape.topology.size, shape.local_experts))


def pairs_of(shape: Shape, num_sms: int) -> int:
    """Channels of a block: as many as there are, while each has some tokens."""
    with_work = shape.max_tokens_per_rank // (TOKENS * num_sms)
    return max(1, min(MAX_PAIRS, MAX_CHANNELS // num_sms, with_work))


def channels_of(shape: Shape, num_sms: int) -> int:
    return num_sms * pairs_of(shape, num_sms)


def few_sms(nodes: int) -> int:
    """As many SMs as a public design with copies of whole tokens takes to fill InfiniBand; even."""
    return 12 if nodes <= 2 else 6 if nodes <= 4 else 4


def message_of(shape: Shape, x: Tensor | QuantizedTensor, again: bool) -> tuple[int, int]:
    """Bytes of a message, and of the routing at its head: none where the layout is known."""
    routing = 0 if again else round_up(8 * shape.num_topk, 16)
    return round_up(routing + internode_kernels.row_bytes(x), 16), routing


def dispatch_call(link: Link, o: DispatchOperands) -> Struct:
    """`dispatch::LeanCall`."""
    shape = link.slots.shape
    return join(
        [
            kernels.dispatch_call(Workspace(shape), link.peers, o),
            link.struct("dispatch"),
            internode_kernels.layout_of(o).struct(),
            Struct("II", *message_of(shape, o.x, o.topk_idx is None)),
        ]
    )
