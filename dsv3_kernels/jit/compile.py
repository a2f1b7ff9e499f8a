"""NVRTC: CUDA C++ text to PTX. nvJitLink: PTX to a cubin. Neither needs a GPU, a driver or a CUDA toolkit."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import toolchain

ARCHITECTURE = "sm_90a"
# Absolute, so that the folder in which Python happens to run does not end up in the PTX's line tables.
_PROGRAM = "/dsv3_kernels/instance.cu"


class CompileError(RuntimeError):
    """NVRTC or nvJitLink refused the source; the message holds the compiler's own log."""


@dataclass(frozen=True)
class Resources:
    """What ptxas says one kernel takes; None where its log does not say."""

    registers: int | None
    stack_bytes: int | None
    spill_store_bytes: int | None
    spill_load_bytes: int | None


def kernel_dir() -> Path:
    """The folder of the device sources: package data in a wheel, csrc/kernels in a checkout."""
    packaged = Path(__file__).parents[1] / "kernels"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "csrc" / "kernels"


def ptx_options(
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, object] | None = None,
    lineinfo: bool = False,
) -> list[str]:
    """NVRTC's options; csrc/kernels is always on the include path."""
    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17"]
    options += [f"--include-path={path}" for path in (kernel_dir(), *include_dirs)]
    options += [f"--define-macro={name}={value}" for name, value in (defines or {}).items()]
    options += ["--generate-line-info"] if lineinfo else []
    return options


def compile_ptx(
    source: str,
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, object] | None = None,
    lineinfo: bool = False,
) -> str:
    """Compile CUDA C++ text for sm_90a to PTX text, uncached.

    With `lineinfo` the PTX carries `.file` and `.loc`, which name the real files of csrc/kernels.
    Raises `CompileError` with the compiler's log, `ToolchainError` if there is no NVRTC.
    """
    return compile_names(source, (), ptx_options(include_dirs, defines, lineinfo))[0]


def compile_names(source: str, expressions: Sequence[str], options: Sequence[str]) -> tuple[str, list[str]]:
    """PTX text in which every function of `expressions` is instantiated, and the name each has there."""
    ptx, _, names, _ = _compile(source, expressions, options)
    return ptx, names


def compile_cubin(source: str, expression: str, options: Sequence[str]) -> tuple[bytes, Resources]:
    """The cubin of one kernel, as NVRTC assembles the PTX of `compile_names`.

    Unlike nvJitLink, which assembles for later linking, it honours `setmaxnreg`: without that a warpgroup has
    to make do with the registers of the launch, and spills.
    """
    _, cubin, (name,), log = _compile(source, [expression], [*options, "--ptxas-options=-v"])
    return cubin, _resources(log, name)


def _compile(
    source: str, expressions: Sequence[str], options: Sequence[str]
) -> tuple[str, bytes, list[str], str]:
    """PTX, cubin, the lowered names and the log."""
    nvrtc = toolchain.nvrtc().module

    def check(status: object, what: str) -> None:
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC: {what}: {nvrtc.nvrtcGetErrorString(status)[1].decode()}\n{log()}")

    def log() -> str:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        text = b" " * size
        nvrtc.nvrtcGetProgramLog(program, text)
        return text.rstrip(b"\0").decode(errors="replace").strip()

    status, program = nvrtc.nvrtcCreateProgram(source.encode(), _PROGRAM.encode(), 0, None, None)
    check(status, "could not create the program")
    try:
        for expression in expressions:
            (status,) = nvrtc.nvrtcAddNameExpression(program, expression.encode())
            check(status, f"bad name {expression!r}")
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        check(status, f"could not compile {', '.join(expressions) or 'the source'} with {' '.join(options)}")
        names = []
        for expression in expressions:
            status, lowered = nvrtc.nvrtcGetLoweredName(program, expression.encode())
            check(status, f"no lowered name for {expression!r}")
            names.append(lowered.decode())
        status, size = nvrtc.nvrtcGetPTXSize(program)
        check(status, "no PTX")
        ptx = b" " * size
        (status,) = nvrtc.nvrtcGetPTX(program, ptx)
        check(status, "no PTX")
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        check(status, "no cubin")
        cubin = b" " * size
        (status,) = nvrtc.nvrtcGetCUBIN(program, cubin)
        check(status, "no cubin")
        return ptx.rstrip(b"\0").decode(), cubin, names, log()
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def link_cubin(ptx: str, name: str) -> tuple[bytes, Resources]:
    """Assemble PTX for sm_90a; `name` is the kernel whose resources are wanted."""
    nvjitlink = toolchain.nvjitlink().module
    handle = nvjitlink.create(2, [f"-arch={ARCHITECTURE}", "-verbose"])
    try:
        data = ptx.encode()
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), f"{name}.ptx")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            raise CompileError(f"nvJitLink: could not assemble {name}: {error}\n{_text(log)}") from None
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
        return bytes(cubin), _resources(_text(log), name)
    finally:
        nvjitlink.destroy(handle)


def _text(log: bytearray) -> str:
    return log.rstrip(b"\0").decode(errors="replace").strip()


def _resources(log: str, name: str) -> Resources:
    """Reads the part of ptxas's report that follows the name of the entry function."""
    _, _, report = log.partition(f"Compiling entry function '{name}'")
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
