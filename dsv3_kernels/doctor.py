"""`python -m dsv3_kernels.doctor`: what this machine has, what is missing, what for, and how to mend it.

Every part is looked for on its own: one that is not there, or that fails to load, is a line of the report.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .jit import CacheError, cache, toolchain
from .jit.compile import compile_source, source_options

Status = Literal["ok", "missing", "broken"]

_INFINIBAND = Path("/sys/class/infiniband")
_PEER_MODULES = (Path("/sys/module/nvidia_peermem"), Path("/sys/module/nv_peer_mem"))
_DRIVER_PARAMETERS = Path("/proc/driver/nvidia/params")
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_BUILD = "pip install -e . (in the checkout; needs a C++17 compiler)"


@dataclass(frozen=True)
class Finding:
    """One line of the report. `required`: every user needs it, with or without a GPU."""

    name: str
    status: Status
    found: str
    needed_for: str
    mend: str = ""
    required: bool = False


class Missing(Exception):
    """A part is not there: a normal state, unlike one that is there and does not work."""

    def __init__(self, found: str, mend: str) -> None:
        super().__init__(found)
        self.mend = mend


@dataclass(frozen=True)
class Check:
    name: str
    needed_for: str
    look: Callable[[], str]
    mend: str
    required: bool = False

    def run(self) -> Finding:
        status: Status = "ok"
        mend = ""
        try:
            found = self.look()
        except Missing as missing:
            status, found, mend = "missing", str(missing), missing.mend
        except toolchain.ToolchainError as error:
            found, _, mend = str(error).partition(" Mend: ")
            status = "missing"
        except CacheError as error:
            found, _, mend = str(error).partition(" Mend: ")
            status = "broken"
        except ImportError as error:
            status, found, mend = "missing", _one_line(str(error)), self.mend
        except Exception as error:  # a report must not fail for what it reports
            status, found, mend = "broken", f"{type(error).__name__}: {_one_line(str(error))}", self.mend
        return Finding(self.name, status, found, self.needed_for, mend, self.required)


def examine() -> list[Finding]:
    """Looks for every part, in the order in which they build on each other."""
    return [check.run() for check in CHECKS]


def _one_line(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _python() -> str:
    return f"{platform.python_version()} ({sys.executable})"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none: CPU build'}"


def _runtime() -> Any:
    try:
        from . import _runtime
    except ImportError as error:
        raise Missing(f"the C++ module _runtime is not built ({_one_line(str(error))})", _BUILD) from None
    return _runtime


def _emulator() -> str:
    try:
        from . import _emulator  # noqa: F401
    except ImportError as error:
        raise Missing(f"the C++ module _emulator is not built ({_one_line(str(error))})", _BUILD) from None
    return "built"


def _driver() -> str:
    runtime = _runtime()
    try:
        version = runtime.driver_version()
    except runtime.DriverError as error:
        if "found no CUDA driver" not in str(error):
            raise
        raise Missing(
            "found no libcuda.so.1", "install the NVIDIA driver, R580 or later for CUDA 13"
        ) from None
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def _gpus() -> str:
    runtime = _runtime()
    try:
        count = runtime.device_count()
    except runtime.DriverError:
        raise Missing("none can be used without a driver", "first mend the driver") from None
    if count == 0:
        raise Missing("no GPU is visible", "unset CUDA_VISIBLE_DEVICES, or use a machine with a Hopper GPU")
    gpus = [runtime.device_properties(i) for i in range(count)]
    found = ", ".join(
        f"{i}: {gpu['name']} (compute capability {gpu['capability'][0]}.{gpu['capability'][1]}, "
        f"{gpu['multiprocessors']} SMs)"
        for i, gpu in enumerate(gpus)
    )
    if all(gpu["capability"] != (9, 0) for gpu in gpus):
        raise Missing(f"{found}: none is a Hopper", "use an H100, H200, H800, H20 or GH200")
    return found


def _peer_access() -> str:
    import torch

    if torch.version.cuda is None:
        raise Missing("torch is a CPU build", "pip install torch, from its CUDA index")
    count = torch.cuda.device_count()
    if count < 2:
        raise Missing(
            f"{count} GPU is visible" if count == 1 else "no GPU is visible", "use a node of several"
        )
    pairs = list(itertools.combinations(range(count), 2))
    apart = [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        raise Missing(
            f"GPUs that cannot map each other's memory: {', '.join(apart)}",
            "nvidia-smi topo -p2p r says why; mostly an IOMMU (iommu=pt, or off), MIG, or no NVLink between",
        )
    import torch.distributed._symmetric_memory

    return f"all {len(pairs)} pairs of {count} GPUs; torch's symmetric memory is there"


def _nvshmem() -> str:
    nvshmem = toolchain.nvshmem()
    nvshmem.check_versions()
    return f"device {nvshmem.version}, host {nvshmem.host_version()} ({nvshmem.include.parent})"


def _nvshmem_headers() -> str:
    headers = toolchain.nvshmem_headers()
    return f"{headers.versions} ({', '.join(str(folder) for folder in headers.folders[1:])})"


def _nic() -> str:
    ports = sorted(_INFINIBAND.glob("*/ports/*")) if _INFINIBAND.is_dir() else []
    if not ports:
        raise Missing("no RDMA device in /sys/class/infiniband", "load the NIC's driver, say mlx5_ib")

    def read(port: Path, name: str) -> str:
        file = port / name
        return file.read_text().strip() if file.is_file() else "?"

    found = ", ".join(
        f"{port.parts[-3]}:{port.name} {read(port, 'link_layer')} {read(port, 'rate')} {read(port, 'state')}"
        for port in ports
    )
    if not any("ACTIVE" in read(port, "state") for port in ports):
        raise Missing(f"{found}: no port is active", "check the cable and the subnet manager (ibstat)")
    return found


def _peer_memory() -> str:
    """How a NIC reaches the GPU's memory."""
    for module in _PEER_MODULES:
        if module.is_dir():
            return f"kernel module {module.name}"
    if not _DRIVER_VERSION.is_file():
        raise Missing("no NVIDIA kernel driver is loaded", "first mend the driver")
    kernel = platform.release()
    recent = tuple(int(n) for n in re.findall(r"\d+", kernel)[:2]) >= (5, 12)
    if recent and "Open Kernel Module" in _DRIVER_VERSION.read_text():
        return f"dma-buf (Linux {kernel}, open kernel modules)"
    raise Missing(
        f"neither nvidia_peermem nor dma-buf (Linux {kernel}; that takes 5.12 and the open kernel modules)",
        "modprobe nvidia_peermem",
    )


def _driver_keys() -> str:
    """Whether kernels may ring a NIC's doorbell themselves."""
    if not _DRIVER_PARAMETERS.is_file():
        raise Missing("no NVIDIA kernel driver is loaded", "first mend the driver")
    text = _DRIVER_PARAMETERS.read_text()
    lacking = []
    if not re.search(r"EnableStreamMemOPs: *1", text):
        lacking.append("NVreg_EnableStreamMemOPs=1")
    if "PeerMappingOverride=1" not in text:
        lacking.append('NVreg_RegistryDwords="PeerMappingOverride=1;"')
    if lacking:
        raise Missing(
            f"not set: {', '.join(lacking)}. Without, NVSHMEM_IBGDA_NIC_HANDLER=auto lets the CPU ring the "
            "NIC's doorbell, which costs latency",
            f"options nvidia {' '.join(lacking)} in /etc/modprobe.d/nvidia.conf, update-initramfs -u, reboot",
        )
    return "NVreg_EnableStreamMemOPs and PeerMappingOverride are set"


def _compiler() -> str:
    command = shlex.split(os.environ.get("CXX") or "c++")
    path = shutil.which(command[0])
    if path is None:
        raise Missing(f"no {command[0]}", "apt install g++, or set CXX")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True)
    return f"{done.stdout.splitlines()[0]} ({path})"


def _cache() -> str:
    path = cache.default_path()
    try:
        usage = cache.usage(path)
    except FileNotFoundError:
        return f"{path}: empty (made on first use)"
    mode = stat.S_IMODE(path.stat().st_mode)
    size = f"{usage.entries} entries, {usage.bytes / 2**20:.1f} MiB, mode {mode:04o}"
    if not os.access(path, os.W_OK | os.X_OK):
        raise Missing(f"{path}: {size}, read-only", f"chmod u+wx {path}, or set {cache.ENVIRONMENT}")
    return f"{path}: {size}; to clear it: rm -r {shlex.quote(str(path))}"


def _compile() -> str:
    started = time.perf_counter()
    source = '#include "quantize.cuh"\nusing namespace dsv3;\n'
    done = compile_source(source, ["dsv3::quantize_1x128<Bf16, false>"], source_options(), cubin=True)
    seconds = time.perf_counter() - started
    registers = done.resources(done.names[0]).registers
    return f"quantize_1x128 in {seconds:.2f} s, uncached: {len(done.cubin)} bytes, {registers} registers"


_NODES = "communication between nodes"

CHECKS = (
    Check("Python", "everything", _python, "", required=True),
    Check("torch", "everything", _torch, "pip install 'torch>=2.9'", required=True),
    Check("runtime", "kernels on a GPU", lambda: "built" if _runtime() else "", _BUILD),
    Check("emulator", "kernels without a GPU", _emulator, _BUILD),
    Check("driver", "kernels on a GPU", _driver, "reinstall the NVIDIA driver"),
    Check("GPU", "kernels on a GPU", _gpus, "nvidia-smi says more"),
    Check("NVRTC", "kernels, on a GPU or emulated", lambda: str(toolchain.nvrtc()), toolchain.MEND["nvrtc"]),
    Check("nvJitLink", _NODES, lambda: str(toolchain.nvjitlink()), toolchain.MEND["nvjitlink"]),
    Check("compile", "kernels", _compile, toolchain.MEND["nvrtc"]),
    Check("cache", "quick starts", _cache, f"set {cache.ENVIRONMENT} to a folder of your own"),
    Check("nvdisasm", "tests of machine code", lambda: str(toolchain.nvdisasm()), toolchain.MEND["nvdisasm"]),
    Check("peer access", "all-to-all over NVLink", _peer_access, "nvidia-smi topo -m says more"),
    Check("NVSHMEM", _NODES, _nvshmem, toolchain.MEND["nvshmem"]),
    Check("headers", "kernels that call NVSHMEM", _nvshmem_headers, toolchain.MEND["cudart"]),
    Check("NIC", _NODES, _nic, "check the NIC's driver"),
    Check("peer memory", _NODES, _peer_memory, "modprobe nvidia_peermem"),
    Check("driver keys", "doorbells from the GPU", _driver_keys, "see docs/cluster.md"),
    Check("C++ compiler", "building from source", _compiler, "apt install g++, or set CXX"),
)


def summary(findings: Iterable[Finding]) -> list[str]:
    """Which of the worlds a call can run in, and why not."""
    status = {finding.name: finding.status for finding in findings}

    def line(world: str, *needs: str) -> str:
        lacking = [name for name in needs if status[name] != "ok"]
        return f"{world}: " + (f"no, for want of {', '.join(lacking)}" if lacking else "yes")

    gpu = ("torch", "runtime", "driver", "GPU", "NVRTC", "compile")
    linked = ("nvJitLink", "NVSHMEM", "headers")
    return [
        line("reference (CPU)", "Python", "torch"),
        line("emulator (CPU)", "Python", "torch", "emulator", "NVRTC", "compile"),
        line("one GPU", *gpu),
        line("one node, over NVLink", *gpu, "peer access"),
        line("several nodes", *gpu, *linked, "NIC", "peer memory"),
    ]


def _print_lines(findings: list[Finding]) -> None:
    for finding in findings:
        print(f"{finding.status:8}{finding.name}: {finding.found}")
        if finding.status != "ok":
            print(f"        needed for {finding.needed_for}\n        mend: {finding.mend}")
    print(*summary(findings), sep="\n")


def _print_table(findings: list[Finding]) -> None:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Column, Table
    except ImportError:
        print("dsv3_kernels doctor (no table, for want of rich; the trainer needs it too: pip install rich)")
        return _print_lines(findings)

    marks = {"ok": "[green]ok[/]", "missing": "[yellow]missing[/]", "broken": "[red]broken[/]"}
    console = Console()
    table = Table(
        "", "part", Column("found", overflow="fold"), title="dsv3_kernels doctor", title_justify="left"
    )
    for finding in findings:
        found = escape(finding.found)
        if finding.status != "ok":
            found += f"\n[bold]needed for[/] {finding.needed_for}\n[bold]mend:[/] {escape(finding.mend)}"
        table.add_row(marks[finding.status], finding.name, found)
    console.print(table)
    for line in summary(findings):
        console.print(escape(line))


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; 1 if something that every user needs is missing or broken, else 0."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_kernels.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args(arguments)
    findings = examine()
    if options.json:
        print(json.dumps({"findings": [asdict(f) for f in findings], "summary": summary(findings)}, indent=1))
    else:
        _print_table(findings)
    return int(any(finding.required and finding.status != "ok" for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())
