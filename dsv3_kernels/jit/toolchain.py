"""Finds NVRTC, nvJitLink, nvdisasm and NVSHMEM, of CUDA 12 or 13, in PyPI wheels or in a system toolkit."""

import ctypes
import functools
import importlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

MEND = {
    "cuda-python": "pip install 'cuda-python>=12.9,<14'",
    "nvrtc": "pip install 'dsv3_kernels[cu13]' (with a CUDA 12 driver: 'dsv3_kernels[cu12]')",
    "nvjitlink": "pip install 'dsv3_kernels[cu13]' (with a CUDA 12 driver: 'dsv3_kernels[cu12]')",
    "nvdisasm": "pip install 'nvidia-cuda-nvdisasm>=13.2,<14'",
    "nvshmem": "pip install 'nvidia-nvshmem-cu13>=3.5' (with a CUDA 12 driver: 'nvidia-nvshmem-cu12>=3.5')",
}


class ToolchainError(RuntimeError):
    """A part of the CUDA toolchain is missing; the message says which, what for, and how to get it."""


@dataclass(frozen=True)
class Library:
    """A compiler library: its `cuda.bindings` module, version (major, minor) and file."""

    module: ModuleType
    version: tuple[int, int]
    path: str

    @property
    def build(self) -> str:
        """Tells two builds apart, also two of one release: those differ in the file's size."""
        return f"{self.version[0]}.{self.version[1]}, {os.path.getsize(self.path)} bytes"

    def __str__(self) -> str:
        return f"{self.version[0]}.{self.version[1]} ({self.path})"


@dataclass(frozen=True)
class Nvshmem:
    """NVSHMEM's headers and libraries; `version` is that of the headers and of the device library."""

    version: str
    include: Path
    device_library: Path
    host_library: Path

    def host_version(self) -> str:
        """What the host library says of itself. Raises `OSError` if it does not load."""
        numbers = [ctypes.c_int() for _ in range(3)]
        library = ctypes.CDLL(str(self.host_library))
        library.nvshmemx_vendor_get_version_info(*(ctypes.byref(number) for number in numbers))
        return ".".join(str(number.value) for number in numbers)


def _bindings(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise ToolchainError(
            f"found no cuda.bindings.{name}, through which kernels are compiled ({error}). "
            f"Mend: {MEND['cuda-python']}"
        ) from None


def _library_path(name: str) -> str:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return load_nvidia_dynamic_lib(name).abs_path or name


@functools.cache
def nvrtc() -> Library:
    """The CUDA C++ compiler. Raises `ToolchainError` if there is none."""
    module = _bindings("nvrtc")
    try:
        _, major, minor = module.nvrtcVersion()
        return Library(module, (major, minor), _library_path("nvrtc"))
    except (ImportError, RuntimeError, OSError) as error:
        raise _missing("NVRTC (libnvrtc, which compiles CUDA C++ to PTX)", "nvrtc", error) from None


@functools.cache
def nvjitlink() -> Library:
    """The PTX assembler and linker. Raises `ToolchainError` if there is none."""
    module = _bindings("nvjitlink")
    try:
        major, minor = module.version()
        return Library(module, (major, minor), _library_path("nvJitLink"))
    except (ImportError, RuntimeError, OSError) as error:
        raise _missing("nvJitLink (libnvJitLink, which assembles PTX)", "nvjitlink", error) from None


def _missing(what: str, mend: str, error: Exception) -> ToolchainError:
    reason = " ".join(str(error).split())[:200]
    return ToolchainError(f"found no {what}: {reason}. Mend: {MEND[mend]}")


def _wheel_folders() -> Iterator[Path]:
    """Every folder nvidia/<component> of every installed wheel."""
    try:
        import nvidia
    except ImportError:
        return
    for root in nvidia.__path__:
        yield from sorted(path for path in Path(root).iterdir() if path.is_dir())


def nvdisasm() -> Path:
    """The disassembler, which only tests and benchmarks need. Raises `ToolchainError` if there is none."""
    for folder in _wheel_folders():
        tool = folder / "bin" / "nvdisasm"
        if os.access(tool, os.X_OK):
            return tool
    on_path = shutil.which("nvdisasm")
    if on_path is None:
        raise ToolchainError(f"found no nvdisasm (the disassembler). Mend: {MEND['nvdisasm']}")
    return Path(on_path)


def nvshmem() -> Nvshmem:
    """NVSHMEM, for communication between nodes. Raises `ToolchainError` if it is not installed whole."""
    roots = [folder for folder in _wheel_folders() if folder.name == "nvshmem"]
    roots += [Path(home) for home in [os.environ.get("NVSHMEM_HOME")] if home]
    for root in roots:
        header = root / "include" / "non_abi" / "nvshmem_version.h"
        device, host = root / "lib" / "libnvshmem_device.a", root / "lib" / "libnvshmem_host.so.3"
        if header.is_file() and device.is_file() and host.is_file():
            pattern = r"#define NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION (\d+)"
            numbers = dict(re.findall(pattern, header.read_text()))
            version = ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
            return Nvshmem(version, root / "include", device, host)
    raise ToolchainError(f"found no NVSHMEM (headers, device and host library). Mend: {MEND['nvshmem']}")
