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
    "cudart": "pip install 'nvidia-cuda-runtime>=13' (with CUDA 12: 'nvidia-cuda-runtime-cu12>=12.9')",
    "cccl": "pip install 'nvidia-cuda-cccl>=13' (with CUDA 12: 'nvidia-cuda-cccl-cu12>=12.9')",
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

    @property
    def build(self) -> str:
        """Tells two builds of the device library apart."""
        return f"{self.version}, {self.device_library.stat().st_size} bytes"

    def host_version(self) -> str:
        """What the host library says of itself. Raises `OSError` if it does not load."""
        numbers = [ctypes.c_int() for _ in range(3)]
        library = ctypes.CDLL(str(self.host_library))
        library.nvshmemx_vendor_get_version_info(*(ctypes.byref(number) for number in numbers))
        return ".".join(str(number.value) for number in numbers)

    def check_versions(self) -> None:
        """The host library has to be the device library's, or a newer one of its major version.

        Raises `ToolchainError` if it is not, `OSError` if it does not load.
        """
        host = self.host_version()
        ours, theirs = ([int(n) for n in version.split(".")] for version in (self.version, host))
        if ours[0] != theirs[0] or theirs < ours:
            raise ToolchainError(
                f"NVSHMEM's device library is {self.version} and its host library {host}, expected a host "
                f"library of major version {ours[0]}, {self.version} or newer. Mend: one NVSHMEM in the "
                "environment (pip list | grep nvshmem; unset NVSHMEM_HOME)"
            )


@dataclass(frozen=True)
class Headers:
    """What a source needs to include nvshmem.h: its folders, and the `versions` of what lies in them."""

    folders: tuple[Path, ...]
    versions: str


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


def nvshmem_headers() -> Headers:
    """Where nvshmem.h lies, and the CUDA runtime's and CCCL's headers that it includes.

    Looked for in wheels, then where CUDA_HOME points. Raises `ToolchainError` that names what is missing.
    """
    library = nvshmem()
    folders, versions = [library.include], [f"NVSHMEM {library.version}"]
    for name, label, file, macro in (
        ("cudart", "CUDA runtime", "cuda_runtime_api.h", "CUDART_VERSION"),
        ("cccl", "CUDA C++ libraries (CCCL)", "cuda/std/__cccl/version.h", "CCCL_VERSION"),
    ):
        folder = _header_folder(name)
        if folder is None:
            raise ToolchainError(
                f"found no headers of the {label}, which nvshmem.h includes ({file}). Mend: {MEND[name]}"
            )
        header = folder / file
        found = re.search(rf"#define\s+{macro}\s+(\d+)", header.read_text()) if header.is_file() else None
        folders.append(folder)
        versions.append(f"{macro} {found[1] if found else '?'}")
    return Headers(tuple(folders), ", ".join(versions))


def _header_folder(name: str) -> Path | None:
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError as error:
        raise ToolchainError(
            f"cuda.pathfinder is missing or older than 1.3 ({error}). Mend: {MEND['cuda-python']}"
        ) from None
    found = find_nvidia_header_directory(name)
    return Path(found) if found else None
