"""NVRTC: CUDA C++ text to PTX and to a cubin. It needs no GPU, no driver and no CUDA toolkit.

The cubin is what NVRTC assembles of the same PTX. nvJitLink, which assembles for linking, ignores
`setmaxnreg`, so that a kernel whose warpgroups trade registers would spill: it is for what links NVSHMEM (see
`link`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import toolchain

ARCHITECTURE = "sm_90a"
_VIRTUAL = "compute_90a"  # gives the same PTX, and spares the time of assembling it
# Absolute, so that the folder in which Python happens to run does not end up in the PTX's line tables.
_PROGRAM = "/dsv3_kernels/instance.cu"


class CompileError(RuntimeError):
    """NVRTC refused the source; the message holds the compiler's own log."""


@dataclass(frozen=True)
class Resources:
    """What ptxas says one kernel takes; None where its log does not say."""

    registers: int | None
    stack_bytes: int | None
    spill_store_bytes: int | None
    spill_load_bytes: int | None


@dataclass(frozen=True)
class Compiled:
    """PTX, cubin (empty if not asked for), the functions asked for by their names there, and the log."""

    ptx: str
    cubin: bytes
    names: tuple[str, ...]
    log: str

    def resources(self, name: str) -> Resources:
        """What kernel `name` takes, from the part of ptxas's report that follows its name."""
        _, _, report = self.log.partition(f"Compiling entry function '{name}'")
        report = report.partition("Compiling entry function")[0]

        def number(pattern: str) -> int | None:
            match = re.search(pattern, report)
            return int(match[1]) if match else None

        return Resources(
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill stores"),
            number(r"(\d+) bytes spill loads"),
        )


def kernel_dir() -> Path:
    """The folder of the device sources: package data in a wheel, csrc/kernels in a checkout."""
    packaged = Path(__file__).parents[1] / "kernels"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "csrc" / "kernels"


def source_options(
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, object] | None = None,
    lineinfo: bool = False,
    nvshmem: bool = False,
) -> list[str]:
    """NVRTC's options for what a source means; csrc/kernels is always on the include path.

    With `nvshmem` the source may include nvshmem.h and nvshmemx.h (`ToolchainError` if they are missing).
    """
    options = ["--std=c++17"]
    if nvshmem:
        # Relocatable: NVSHMEM's table stays extern, for the linker or the emulator to provide.
        include_dirs = (*include_dirs, *toolchain.nvshmem_headers().folders)
        options += ["--relocatable-device-code=true", "--define-macro=DSV3_NVSHMEM"]
    options += [f"--include-path={path}" for path in (kernel_dir(), *include_dirs)]
    options += [f"--define-macro={name}={value}" for name, value in (defines or {}).items()]
    options += ["--generate-line-info"] if lineinfo else []
    return options


def compile_ptx(
    source: str,
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, object] | None = None,
    lineinfo: bool = False,
    nvshmem: bool = False,
) -> str:
    """Compile CUDA C++ text for sm_90a to PTX text, uncached.

    With `lineinfo` the PTX carries `.file` and `.loc`, which name the real files of csrc/kernels. With
    `nvshmem` the source may include nvshmem.h and nvshmemx.h, whose parsing takes some 4 s; the PTX runs in
    the emulator's VirtualCluster, and `link_nvshmem` makes a cubin of it. Raises `CompileError` with the
    compiler's log, `ToolchainError` if there is no NVRTC.
    """
    return compile_source(source, (), source_options(include_dirs, defines, lineinfo, nvshmem)).ptx


def compile_source(
    source: str, expressions: Sequence[str], options: Sequence[str], cubin: bool = False
) -> Compiled:
    """Compile a source and instantiate in it every function that `expressions` names."""
    nvrtc = toolchain.nvrtc().module
    target = [ARCHITECTURE, "--ptxas-options=-v"] if cubin else [_VIRTUAL]
    options = ["--gpu-architecture=" + target[0], *target[1:], *options]

    def call(function: str, *arguments: object) -> Any:
        status, *values = getattr(nvrtc, function)(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            what = f"{', '.join(expressions) or 'the source'}, compiled with {' '.join(options)}"
            text = nvrtc.nvrtcGetErrorString(status)[1].decode()
            report = log() if function == "nvrtcCompileProgram" else ""
            raise CompileError(f"{function}: {text}: {what}\n{report}")
        return values[0] if values else None

    def fetch(what: str) -> bytes:
        # NVRTC writes into it. Never bytes: Python has one b" " for everybody, which an empty log overwrites.
        data = bytearray(call(f"nvrtcGet{what}Size", program))
        call(f"nvrtcGet{what}", program, data)
        return bytes(data)

    def log() -> str:
        return fetch("ProgramLog").rstrip(b"\0").decode(errors="replace").strip()

    program = call("nvrtcCreateProgram", source.encode(), _PROGRAM.encode(), 0, None, None)
    try:
        for expression in expressions:
            call("nvrtcAddNameExpression", program, expression.encode())
        call("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
        names = tuple(call("nvrtcGetLoweredName", program, name.encode()).decode() for name in expressions)
        ptx = fetch("PTX").rstrip(b"\0").decode()
        return Compiled(ptx, fetch("CUBIN") if cubin else b"", names, log())
    finally:
        nvrtc.nvrtcDestroyProgram(program)
