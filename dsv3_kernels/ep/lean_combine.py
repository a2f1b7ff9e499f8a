"""csrc/kernels/combine_lean.cuh, combine_lean_epilogue.cuh: what its two launches pass, and their shapes."""

from .. import launch
from ..by_value import Struct
from ..jit import Kernel
from . import internode_kernels
from .kernels import CombineOperands
from .lean import Link

MOVE = Kernel("combine_lean.cuh", "combine_lean", nvshmem=True)
EPILOGUE = Kernel("combine_lean_epilogue.cuh", "combine_lean_epilogue", nvshmem=True)
KERNELS = (MOVE, EPILOGUE)

MAX_PAIRS = 8  # warps of a block for their registers: a channel takes two
PIECE = 7 * 32 * 16  # csrc/kernels/rows.cuh, kPieceBytes
BARRIER = 16  # csrc/kernels/bulk.cuh, Ring::kBarrierBytes
SHARED_BYTES = 227 * 1024  # of a block
MAX_STAGES = 12  # of a warp: more under way no memory needs
EPILOGUE_WARPS = 12


def combine_call(link: Link, o: CombineOperands) -> Struct:
    """`lean::CombineCall`."""
    return internode_kernels.combine_struct(link.slots.shape, link.peers, link.struct("combine"), o)


def shape_of_move(channels: int, num_sms: int) -> tuple[launch.Dim3, launch.Dim3, int, int]:
    """Of one rank: grid, block, bytes of shared memory, and the stages of a warp, which is an argument.

    channels: of the dispatch. What more there are than warps for them are taken in turn.
    """
    warps = 2 * min(MAX_PAIRS, -(-channels // num_sms))
    stages = min(MAX_STAGES, (SHARED_BYTES // warps - PIECE) // (PIECE + BARRIER))
    return (num_sms, 1, 1), (32 * warps, 1, 1), warps * warp_bytes(stages), stages


def warp_bytes(stages: int) -> int:
    """Of shared memory."""
    return stages * (PIECE + BARRIER) + PIECE


def shape_of_epilogue(sms: int) -> tuple[launch.Dim3, launch.Dim3, int]:
    """Of one rank, on so many SMs: grid, block, bytes of shared memory."""
    return (sms, 1, 1), (32 * EPILOGUE_WARPS, 1, 1), 0
