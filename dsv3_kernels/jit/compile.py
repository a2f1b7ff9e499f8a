"""NVRTC: CUDA C++ text to PTX."""

from collections.abc import Mapping, Sequence
from pathlib import Path

ARCHITECTURE = "sm_90a"


class CompileError(RuntimeError):
    """NVRTC or nvJitLink refused the source; the message holds the compiler's own log."""


def kernel_dir() -> Path:
    """The folder of the device sources: package data in a wheel, csrc/kernels in a checkout."""
    packaged = Path(__file__).parents[1] / "kernels"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "csrc" / "kernels"


def compile_ptx(
    source: str,
    *,
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, object] | None = None,
    lineinfo: bool = False,
) -> str:
    """Compile CUDA C++ text for sm_90a to PTX text; csrc/kernels is always on the include path."""
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", f"-I{kernel_dir()}"]
    options += [f"-I{path}" for path in include_dirs]
    options += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    options += ["-lineinfo"] if lineinfo else []
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, None, None)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CompileError(log.rstrip(b"\0").decode())
        _, size = nvrtc.nvrtcGetPTXSize(program)
        ptx = b" " * size
        nvrtc.nvrtcGetPTX(program, ptx)
        return ptx.rstrip(b"\0").decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)
