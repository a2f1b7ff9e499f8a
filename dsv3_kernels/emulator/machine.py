"""The C++ machine, with tensors for addresses and arguments for parameter bytes."""

import contextlib
import functools
import importlib
import json
import struct
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..by_value import Struct
from ..tensor_map import TensorMap
from .errors import EmulationError
from .trace import chrome_trace

_emulator: Any = importlib.import_module("dsv3_kernels._emulator")

SCHEDULES = ("random", "round_robin", "pct", "timed", "exhaustive", "sequential")
Dim3 = Sequence[int]
Argument = Tensor | TensorMap | Struct | int | float | bytes


@functools.lru_cache(maxsize=256)
def _program(ptx: str) -> Any:
    return _emulator.load(ptx)


class _Memory:
    """Which host storage is where in the machine's address space."""

    def __init__(self, machine: Any) -> None:
        self._machine = machine
        self._bases: dict[int, tuple[int, int]] = {}  # host address -> (virtual address, bytes)
        self._heap_used = 0

    def address(self, tensor: Tensor, rank: int) -> int:
        if tensor.device.type != "cpu":
            raise ValueError(f"the emulator takes CPU tensors, got one on {tensor.device}")
        storage = tensor.untyped_storage()
        host, size = storage.data_ptr(), storage.nbytes()
        known = self._bases.get(host)
        if known is None or known[1] != size:
            if known is not None:
                self._release(host, known[0])
            name = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            base = self._machine.map(host, size, name, rank)
            self._bases[host] = (base, size)
            weakref.finalize(storage, self._release, host, base)
        return self._bases[host][0] + tensor.data_ptr() - host

    def symmetric(self, shape: Sequence[int], dtype: torch.dtype, ranks: int) -> list[Tensor]:
        """A zeroed tensor a rank, at one offset in every rank's symmetric heap."""
        tensors = [torch.zeros(tuple(shape), dtype=dtype) for _ in range(ranks)]
        offset, size = self._heap_used, tensors[0].untyped_storage().nbytes()
        # Never reused, and apart by a guard: an overrun hits no neighbour.
        self._heap_used += -(-size // 512) * 512 + 65536
        # The last MiB is NVSHMEM's own, for its barriers.
        if not size or self._heap_used > 2**36 - 2**20:
            raise ValueError(f"symmetric: shape {tuple(shape)} takes {size} bytes, expected 1 up to the rest")
        name = f"symmetric {str(dtype).removeprefix('torch.')}{list(tensors[0].shape)}"
        for rank, tensor in enumerate(tensors):
            storage = tensor.untyped_storage()
            host = storage.data_ptr()
            if host in self._bases:
                self._release(host, self._bases[host][0])
            base = self._machine.map_symmetric(host, size, f"{name} of rank {rank}", rank, offset)
            self._bases[host] = (base, size)
            weakref.finalize(storage, self._release, host, base)
        return tensors

    def _release(self, host: int, base: int) -> None:
        if self._bases.get(host, (None,))[0] == base:
            del self._bases[host]
        self._machine.release(base)


class Machine:
    """One address space and its devices; VirtualGPU and VirtualCluster are views of it."""

    def __init__(
        self,
        devices: int,
        num_sms: int,
        seed: int,
        schedule: str,
        checks: bool,
        exact_accumulate: bool,
        max_steps: int,
        choices: Sequence[int],
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {schedule!r}, expected one of {SCHEDULES}")
        if num_sms < 1 or devices < 1:
            raise ValueError(f"num_sms is {num_sms} and there are {devices} GPUs, expected 1 or more of each")
        self.core = _emulator.Machine(
            devices, num_sms, seed & (2**64 - 1), schedule, checks, exact_accumulate, max_steps, list(choices)
        )
        self.memory = _Memory(self.core)
        self.seed, self.num_sms = seed, num_sms

    def submit(
        self,
        ptx: str,
        kernel: str,
        rank: int,
        grid: Dim3,
        block: Dim3,
        args: Sequence[Argument],
        cluster: Dim3 | None,
        shared_bytes: int,
        dependent: bool,
    ) -> Any:
        with self.naming_seed():
            program = _program(ptx)
            parameters = program.parameters(kernel)
            if len(args) != len(parameters):
                raise EmulationError(
                    f"launch of {kernel!r}: got {len(args)} arguments, expected {len(parameters)}",
                    kernel=kernel,
                )
            data = b""
            for i, (argument, (_, kind, size, offset, total)) in enumerate(
                zip(args, parameters, strict=True)
            ):
                value = self._encode(argument, kind, size, total, rank, f"launch of {kernel!r}: argument {i}")
                data = data.ljust(offset, b"\0") + value
            return self.core.submit(
                program,
                kernel,
                rank,
                list(grid),
                list(block),
                list(cluster or ()),
                shared_bytes,
                data,
                dependent,
            )

    def run(self, until: Sequence[Any]) -> None:
        with self.naming_seed():
            self.core.run(list(until))

    @contextlib.contextmanager
    def naming_seed(self) -> Iterator[None]:
        try:
            yield
        except EmulationError as error:
            error.seed = self.seed
            raise

    def _encode(self, value: Argument, kind: str, size: int, total: int, rank: int, what: str) -> bytes:
        if isinstance(value, bytes | bytearray):
            result = bytes(value)
        elif isinstance(value, TensorMap):
            result = self._encode_map(value, rank)
        elif isinstance(value, Struct):
            result = value.encode(lambda tensor: self.memory.address(tensor, rank))
        elif isinstance(value, Tensor):
            result = struct.pack("<Q", self.memory.address(value, rank))
        elif isinstance(value, bool | int) and kind != "f":
            try:
                result = (int(value) % 2 ** (8 * size) if value < 0 else int(value)).to_bytes(size, "little")
            except OverflowError:
                raise EmulationError(f"{what} is {value}, which does not fit {size} bytes") from None
        elif isinstance(value, int | float):
            result = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value) if kind == "f" else b""
        else:
            raise TypeError(
                f"{what} is a {type(value).__name__}, expected a tensor, a TensorMap, a number or bytes"
            )
        if len(result) != total:
            raise EmulationError(
                f"{what} ({type(value).__name__}) does not fit the parameter of {total} bytes ({kind})"
            )
        return result

    def _encode_map(self, tensor_map: TensorMap, rank: int) -> bytes:
        e = tensor_map.encoding
        return bytes(
            _emulator.encode_tensor_map(
                self.memory.address(tensor_map.tensor, rank),
                e.data_type,
                list(e.shape),
                list(e.strides),
                list(e.box),
                list(e.element_strides),
                e.swizzle,
                e.fill_nan,
            )
        )

    def trace(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(chrome_trace(self.core)))
