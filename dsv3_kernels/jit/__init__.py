"""CUDA C++ text -> PTX -> cubin, without a GPU, a driver, a CUDA toolkit or torch."""

from .cache import CacheError
from .compile import CompileError, Resources, compile_ptx, kernel_dir
from .kernel import Cubin, Kernel, Ptx
from .link import link_nvshmem
from .toolchain import ToolchainError

__all__ = [
    "CacheError",
    "CompileError",
    "Cubin",
    "Kernel",
    "Ptx",
    "Resources",
    "ToolchainError",
    "compile_ptx",
    "kernel_dir",
    "link_nvshmem",
]
