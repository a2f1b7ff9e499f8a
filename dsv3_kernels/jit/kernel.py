"""A kernel by name: which file, which function, which template arguments; its PTX and its cubin, cached."""

import functools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import cache, toolchain
from .compile import ARCHITECTURE, Resources, compile_source, kernel_dir, source_options
from .link import link_nvshmem

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?\.align\s+\d+\s+)?[\w$]+(?:\[(\d+)\])?"
)


compiled_here: "set[Kernel]" = set()  # whose cubin this process had to build: it was not in the cache


@dataclass(frozen=True)
class Ptx:
    """PTX `text` with one kernel, called `name` in it, and its parameters' types: "u64", "f32", "b8[128]"."""

    text: str
    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Cubin:
    """A device `image` for sm_90a with one kernel, called `name` in it, its parameters and what it takes."""

    image: bytes
    name: str
    parameters: tuple[str, ...]
    resources: Resources


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel of csrc/kernels: `Kernel("quantize.cuh", "quantize_1x128", ("Bf16", False))`.

    `function` is looked up in namespace dsv3; `template` holds types (as text), integers and bools. With
    `nvshmem` the file may include NVSHMEM's headers, and its cubin is linked with NVSHMEM's device library.
    Compiled on first use, once for all processes (see `cache`), then held in this process.
    """

    file: str
    function: str
    template: tuple[str | int | bool, ...] = ()
    defines: tuple[tuple[str, str | int], ...] = ()
    nvshmem: bool = False

    def __str__(self) -> str:
        arguments = ", ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in self.template)
        return f"dsv3::{self.function}<{arguments}>" if self.template else f"dsv3::{self.function}"

    def ptx(self, lineinfo: bool = False) -> Ptx:
        """Raises `CompileError`, `ToolchainError`, `CacheError`."""
        return _ptx(self, lineinfo)

    def cubin(self) -> Cubin:
        """Raises `CompileError`, `ToolchainError`, `CacheError`."""
        return _cubin(self)


@functools.cache
def _ptx(kernel: Kernel, lineinfo: bool) -> Ptx:
    entry = _compiled(kernel, lineinfo, cubin=False)
    return Ptx(entry.content.decode(), str(entry.facts["name"]), _parameters(entry))


@functools.cache
def _cubin(kernel: Kernel) -> Cubin:
    entry = _compiled(kernel, lineinfo=False, cubin=True)
    resources = Resources(**entry.facts["resources"])  # type: ignore[arg-type]
    return Cubin(entry.content, str(entry.facts["name"]), _parameters(entry), resources)


def _compiled(kernel: Kernel, lineinfo: bool, cubin: bool) -> cache.Entry:
    """The kernel's PTX or cubin, from the cache or else from the compiler."""
    source = f'#include "{kernel.file}"\nusing namespace dsv3;\n'
    options = source_options(defines=dict(kernel.defines), lineinfo=lineinfo, nvshmem=kernel.nvshmem)

    def build() -> cache.Entry:
        links = cubin and kernel.nvshmem
        done = compile_source(source, [str(kernel)], options, cubin and not links)
        (name,) = done.names
        if links:
            image, log = link_nvshmem(done.ptx, str(kernel))
            done = replace(done, cubin=image, log=log)
        facts: dict[str, object] = {
            "kernel": str(kernel),
            "name": name,
            "parameters": parameters(done.ptx, name),
        }
        if cubin:
            compiled_here.add(kernel)
            facts["resources"] = asdict(done.resources(name))
        return cache.Entry(facts, done.cubin if cubin else done.ptx.encode())

    recipe = [str(kernel), *options, *_closure(source, [kernel_dir()])]
    if kernel.nvshmem:
        recipe.append(toolchain.nvshmem_headers().versions)
        recipe.append(f"{toolchain.nvjitlink().build}, {toolchain.nvshmem().build}" if cubin else "")
    kind = "cubin" if cubin else "ptx"
    key = cache.key_of(kind, str(cache.FORMAT), ARCHITECTURE, toolchain.nvrtc().build, *recipe)
    return cache.get_or_build(key, build)


def _closure(source: str, folders: Sequence[Path]) -> list[str]:
    """Name and text of every file that `source` could include, those behind #if too; found by name alone."""
    parts, seen, pending = [source], set[str](), _INCLUDE.findall(source)
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        found = (folder / name for folder in folders if (folder / name).is_file())
        text = next((path.read_text() for path in found), "")
        parts += [name, text]
        pending += _INCLUDE.findall(text)
    return parts


def _parameters(entry: cache.Entry) -> tuple[str, ...]:
    return tuple(entry.facts["parameters"])  # type: ignore[arg-type]


def parameters(ptx: str, name: str) -> tuple[str, ...]:
    """The types of a kernel's parameters, from its .entry directive."""
    match = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)", ptx, re.DOTALL)
    if match is None:
        return ()
    return tuple(f"{kind}[{count}]" if count else kind for kind, count in _PARAMETER.findall(match[1]))
