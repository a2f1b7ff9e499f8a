"""The virtual Hopper: runs the PTX that NVRTC makes for sm_90a, on the CPU,
    deterministic and harsher than hardware.

    gpu = VirtualGPU(num_sms=8, seed=0)
    gpu.launch(ptx, "kernel", grid=(2, 1, 1), block=(128, 1, 1), args=[x, y, 3])

Warps, copy engine and tensor cores move in an order drawn from `seed`. Kernels see virtual addresses,
so that a run
depends on nothing but its inputs and its seed: a tensor passed as an argument becomes its address;
`VirtualGPU.address_of` gives the one to put in a table of pointers.
"""

from ..tensor_map import TensorMap
from .cluster import Group, VirtualCluster
from .errors import (
    DeadlockError,
    EmulationError,
    HazardError,
    MemoryAccessError,
    UnsupportedInstructionError,
)
from .gpu import VirtualGPU, current, explore, virtual_gpu
from .links import HBM, IB, NVLINK, Link

__all__ = [
    "HBM",
    "IB",
    "NVLINK",
    "DeadlockError",
    "EmulationError",
    "Group",
    "HazardError",
    "Link",
    "MemoryAccessError",
    "TensorMap",
    "UnsupportedInstructionError",
    "VirtualCluster",
    "VirtualGPU",
    "current",
    "explore",
    "virtual_gpu",
]
