"""nvJitLink: PTX of a kernel that uses NVSHMEM, and NVSHMEM's device library, to a cubin.

Only such kernels go this way. nvJitLink assembles PTX as an object that others will be linked to, and for
those ptxas ignores `setmaxnreg` (advisory C7504): warpgroups could not trade registers, and a GEMM would
spill. All others are assembled whole by NVRTC; see `compile`. So a kernel that communicates must fit its
registers as they are dealt out at launch.
"""

import contextlib
import re
from typing import Any

from . import toolchain
from .compile import ARCHITECTURE, CompileError

# NVRTC's uint64_t is `unsigned long long` (y), the library was compiled with `unsigned long` (m). It matters
# where the type is an argument's own; templates over the type are in the library with both.
_UINT64 = re.compile(r"(_Z\d+nvshmemi_transfer_put_signal\w*?S1_mS1_)y(14nvshmemi_amo_t)")


def with_library_names(ptx: str) -> str:
    """The PTX with NVSHMEM's functions called as its device library spells them."""
    return _UINT64.sub(r"\1m\2", ptx)


def link_nvshmem(ptx: str, name: str) -> tuple[bytes, str]:
    """PTX text to a cubin for sm_90a with NVSHMEM linked in, and the linker's log; about 5 s.

    `name` stands for the PTX in messages. Before its first launch the loaded module goes to
    `nvshmemx_cumodule_init`. Raises `CompileError` with the linker's log, `ToolchainError`.
    """
    linker = toolchain.nvjitlink().module
    library = toolchain.nvshmem().device_library
    handle = None

    def log(kind: str) -> str:
        size = getattr(linker, f"get_{kind}_log_size")(handle)
        data = bytearray(size)
        if size:
            getattr(linker, f"get_{kind}_log")(handle, data)
        return bytes(data).rstrip(b"\0").decode(errors="replace").strip()

    def call(function: str, *arguments: Any) -> Any:
        try:
            return getattr(linker, function)(*arguments)
        except linker.nvJitLinkError as error:
            report = ""
            if handle is not None:
                with contextlib.suppress(linker.nvJitLinkError):
                    report = log("error")
            raise CompileError(f"nvJitLink, {function}: {error}: {name} with {library}\n{report}") from None

    options = [f"-arch={ARCHITECTURE}", "-verbose"]
    handle = call("create", len(options), options)
    try:
        data = with_library_names(ptx).encode() + b"\0"
        call("add_data", handle, linker.InputType.PTX, data, len(data), name)
        call("add_file", handle, linker.InputType.LIBRARY, str(library))
        call("complete", handle)
        image = bytearray(call("get_linked_cubin_size", handle))
        call("get_linked_cubin", handle, image)
        return bytes(image), log("info")
    finally:
        linker.destroy(handle)
