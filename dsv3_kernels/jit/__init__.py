"""CUDA C++ text -> PTX -> cubin, without a GPU, a driver or a CUDA toolkit."""

from .compile import CompileError, compile_ptx

__all__ = ["CompileError", "compile_ptx"]
