"""The one door to the three worlds: the reference, the GPU, the emulator."""

import enum
import functools
import importlib
import sys
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from . import nvshmem
from .by_value import Struct
from .device_error import DeviceValueError
from .jit import Kernel, toolchain
from .tensor_map import Encoding, MapLayout, TensorMap

World = Literal["reference", "cuda", "emulator"]
Dim3 = tuple[int, int, int]
Argument = Tensor | TensorMap | Struct | int | float


class Slot(enum.Enum):
    """A parameter of a prepared launch that is no number and no tensor map."""

    ADDRESS = "of the first element of the call's next tensor"
    ERROR_WORD = "of the device, as `error_flag`"


Parameter = MapLayout | Slot | int | float

CAPABILITY = (9, 0)

_NUMBERS = (int, float)

_virtual_words: "weakref.WeakKeyDictionary[Any, Tensor]" = weakref.WeakKeyDictionary()  # of each virtual GPU


class UnsupportedDeviceError(RuntimeError):
    """The GPU or its driver cannot run these kernels."""


def world(*tensors: Tensor) -> World:
    """Where a call on these tensors runs.

    CUDA tensors take the kernel; CPU tensors the reference, or the PTX inside `emulator.virtual_gpu(...)`.
    Raises `ValueError` for tensors of several devices and for other kinds of device.
    """
    first = tensors[0]
    for i, tensor in enumerate(tensors[1:], start=1):
        if tensor.device != first.device:
            raise ValueError(
                f"tensors are on several devices: number 0 is on {first.device}, number {i} is on "
                f"{tensor.device}; move it with .to({str(first.device)!r})"
            )
    if first.is_cuda:
        return "cuda"
    if not first.is_cpu:
        raise ValueError(f"tensors are on device {str(first.device)!r}, expected 'cpu' or 'cuda'")
    return "reference" if _virtual_gpu() is None else "emulator"


def num_sms(tensor: Tensor, most: int | None = None) -> int:
    """SMs of the GPU, real or virtual, that a call on this tensor runs on; at most `most`."""
    there = _multiprocessors(tensor.get_device()) if tensor.is_cuda else _virtual_gpu().num_sms
    return there if most is None else min(most, there)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    kernel: Kernel,
    grid: Dim3,
    block: Dim3,
    args: tuple[Argument, ...],
    *,
    cluster: Dim3 = (1, 1, 1),
    shared_bytes: int = 0,
    stream: "torch.cuda.Stream | None" = None,
    cooperative: bool = False,
    programmatic: bool = False,
) -> None:
    """Run `kernel` on the GPU that holds the tensors of `args`, or on the virtual GPU; first use compiles it.

    grid, block, cluster: blocks, threads a block, blocks a cluster, each (x, y, z).
    args: in the kernel's order; a tensor passes the address of its first element, a `Struct` its bytes.
    shared_bytes: dynamic shared memory a block. stream: the device's current stream if None.
    cooperative: all blocks are resident at once. programmatic: may start before the stream's last kernel
        has ended.
    Asynchronous on a GPU. Raises `UnsupportedDeviceError`, `DriverError` (RuntimeErrors, both), what
    `Kernel.cubin` raises, and `TypeError` or `ValueError` for arguments that do not fit the parameters.
    """
    tensor = next((t for a in args for t in _tensors(a)), None)
    if tensor is None:
        raise ValueError(f"launch: {kernel} got no tensor, which would say where to run")
    if not tensor.is_cuda:
        _emulate(kernel, args, grid, block, cluster, shared_bytes)
        return
    device = tensor.get_device()
    values = tuple([a if type(a) in _NUMBERS else _value(kernel, device, i, a) for i, a in enumerate(args)])
    raw_stream = torch._C._cuda_getCurrentRawStream(device) if stream is None else stream.cuda_stream
    code = _loaded(kernel, device).launch(
        device, raw_stream, grid, block, values, cluster, shared_bytes, cooperative, programmatic
    )
    if code:
        raise DeviceValueError(code, f"cuda:{device}")


class Prepared:
    """A launch of which everything is settled but the tensors: for calls that come again and again.

    The arguments are those of `launch`, with `parameters` in the kernel's order for its `args`: a number
    stands for itself; a `MapLayout` takes the next tensor of a call as a tensor map, `Slot.ADDRESS` as an
    address.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Dim3,
        block: Dim3,
        parameters: Sequence[Parameter],
        *,
        cluster: Dim3 = (1, 1, 1),
        shared_bytes: int = 0,
        cooperative: bool = False,
        programmatic: bool = False,
    ) -> None:
        self.kernel, self.parameters = kernel, tuple(parameters)
        self._shape = grid, block, cluster, shared_bytes
        self._options = cooperative, programmatic
        slots = [(i, p) for i, p in enumerate(parameters) if isinstance(p, MapLayout) or p is Slot.ADDRESS]
        self._slots = [(i, p if isinstance(p, MapLayout) else None) for i, p in slots]
        self._on: dict[int, tuple[Any, list[Any]]] = {}  # by device: what launches, and values to complete

    def __call__(self, *tensors: Tensor, stream: "torch.cuda.Stream | None" = None) -> None:
        """Launch on the device of `tensors`, whose dtypes, shapes and strides are those of the parameters.

        stream: the device's current stream if None. Raises as `launch`.
        """
        if len(tensors) != len(self._slots):
            raise TypeError(
                f"launch: {self.kernel} got {len(tensors)} tensors, expected {len(self._slots)}: one for "
                "each tensor map and address of its parameters"
            )
        device = tensors[0].get_device()
        if not tensors[0].is_cuda:
            _emulate(self.kernel, self.arguments(tensors), *self._shape)
            return
        run, values = self._on.get(device) or self._load(device)
        values = values.copy()
        for (i, layout), tensor in zip(self._slots, tensors, strict=True):
            if tensor.get_device() != device:
                raise _elsewhere(self.kernel, i, tensor, device)
            address = tensor.data_ptr()
            values[i] = address if layout is None else _map_bytes(layout, address)
        raw_stream = torch._C._cuda_getCurrentRawStream(device) if stream is None else stream.cuda_stream
        code = run(raw_stream, tuple(values))
        if code:
            raise DeviceValueError(code, f"cuda:{device}")

    def _load(self, device: int) -> tuple[Any, list[Any]]:
        word = _runtime().error_word(device) if Slot.ERROR_WORD in self.parameters else None
        values = [word if p is Slot.ERROR_WORD else p for p in self.parameters]
        run = _loaded(self.kernel, device).prepare(device, *self._shape, *self._options)
        return self._on.setdefault(device, (run, values))

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Argument, ...]:
        """What `launch` would take."""
        args: list[Any] = list(self.parameters)
        for (i, layout), tensor in zip(self._slots, tensors, strict=True):
            args[i] = tensor if layout is None else layout.of(tensor)
        return tuple(error_flag(tensors[0]) if a is Slot.ERROR_WORD else a for a in args)


@functools.lru_cache(maxsize=8192)
def _map_bytes(layout: MapLayout, address: int) -> bytes:
    return _encoded(layout.encoding(address))


def address_of(tensor: Tensor) -> int:
    """Where kernels on the GPU, real or virtual, of this tensor see its first element."""
    return tensor.data_ptr() if tensor.is_cuda else _virtual_gpu().address_of(tensor)


def error_flag(tensor: Tensor) -> Tensor | int:
    """The error word of the device that holds `tensor`, as a launch takes it for a parameter `u32* error`.

    It lives as long as the process (a CUDA graph may hold it), or as the virtual GPU. csrc/kernels/error.cuh
    says how kernels use it; the next launch on that device, or `synchronize`, raises what they stored there.
    """
    if tensor.is_cuda:
        return _runtime().error_word(tensor.get_device())
    return _virtual_words.setdefault(_virtual_gpu(), torch.zeros(1, dtype=torch.int32))


def synchronize(device: torch.device | int | str | None = None) -> None:
    """Wait until a GPU has done all that was asked of it, then raise what its kernels reported.

    device: the current CUDA device if None. Without CUDA there is nothing to wait for: the reference raises
    at once, and so does the emulator.
    Raises `DeviceValueError` (a ValueError) for values out of range in a tensor on the device, and what the
    buffers of `ep` have failed with.
    """
    if not torch.cuda.is_available():
        return
    torch.cuda.synchronize(device)
    number = torch.cuda._utils._get_device_index(device, optional=True)
    _raise_reported(_runtime().take_error(number), f"cuda:{number}")
    for reporter in list(_reporters):
        reporter.check()


class Reporter(Protocol):
    """Has words of its own in which kernels say what went wrong."""

    def check(self) -> None:
        """Raises what they have said so far; asks nothing of the device."""


_reporters: "weakref.WeakSet[Reporter]" = weakref.WeakSet()


def also_raise(reporter: Reporter) -> None:
    """From now on `synchronize` calls the reporter's `check`, as long as the reporter lives."""
    _reporters.add(reporter)


def _raise_reported(code: int, device: str) -> None:
    if code:
        raise DeviceValueError(code, device)


def _virtual_gpu() -> Any:
    """The active virtual GPU. None is active while nobody has imported the emulator."""
    emulator = sys.modules.get(f"{__package__}.emulator")
    return emulator.current() if emulator is not None else None


def _emulate(
    kernel: Kernel, args: tuple[Argument, ...], grid: Dim3, block: Dim3, cluster: Dim3, shared_bytes: int
) -> None:
    gpu = _virtual_gpu()
    if gpu is None:
        raise ValueError(
            f"launch: {kernel} got CPU tensors and no virtual GPU is active; "
            "pass CUDA tensors, or call inside `with dsv3_kernels.emulator.virtual_gpu():`"
        )
    ptx = kernel.ptx(lineinfo=True)  # so that the emulator's errors name lines of the source
    gpu.launch(
        ptx.text,
        ptx.name,
        grid=grid,
        block=block,
        args=args,
        cluster=cluster,
        shared_bytes=shared_bytes,
    )
    word = _virtual_words.get(gpu)
    if word is not None:
        code = int(word)
        word.zero_()
        _raise_reported(code, "the virtual GPU")


def _value(kernel: Kernel, device: int, index: int, argument: Argument) -> int | float | bytes:
    """The argument as the runtime takes it: an address, a number, or the bytes of a tensor map."""
    if isinstance(argument, _NUMBERS):
        return argument
    for tensor in _tensors(argument):
        if tensor.get_device() != device:
            raise _elsewhere(kernel, index, tensor, device)
    if isinstance(argument, Struct):
        return argument.encode(Tensor.data_ptr)
    return _encoded(argument.encoding) if isinstance(argument, TensorMap) else argument.data_ptr()


def _tensors(argument: Argument) -> Sequence[Tensor]:
    if isinstance(argument, Tensor):
        return (argument,)
    if isinstance(argument, TensorMap):
        return (argument.tensor,)
    return argument.tensors if isinstance(argument, Struct) else ()


def _elsewhere(kernel: Kernel, index: int, tensor: Tensor, device: int) -> ValueError:
    return ValueError(
        f"launch: {kernel} got argument {index} on {tensor.device}, expected cuda:{device}, "
        "where the first tensor is"
    )


def _encoded(encoding: Encoding) -> bytes:
    if encoding.driver_bytes is not None:
        return encoding.driver_bytes
    encoding.driver_bytes = _runtime().encode_tensor_map(
        encoding.data_type,
        encoding.address,
        encoding.shape,
        encoding.strides,
        encoding.box,
        encoding.element_strides,
        encoding.swizzle,
        encoding.l2_promotion,
        encoding.fill_nan,
    )
    return encoding.driver_bytes


@functools.cache
def _runtime() -> ModuleType:
    try:
        return importlib.import_module("._runtime", __package__)
    except ImportError as error:
        raise RuntimeError(
            f"the C++ part of dsv3_kernels is not built ({error}). Mend: pip install -e . in the checkout"
        ) from None


@functools.cache
def _loaded(kernel: Kernel, device: int) -> Any:
    """The kernel, on the GPU. One image serves all devices; each is checked once."""
    _check_device(device)
    return _load(kernel)


@functools.cache
def _load(kernel: Kernel) -> Any:
    cubin = kernel.cubin()
    loaded = _runtime().Kernel(cubin.image, cubin.name, list(cubin.parameters), str(kernel))
    if kernel.nvshmem:
        nvshmem.current().initialise(loaded.library)
    return loaded


@functools.cache
def _check_device(device: int) -> None:
    properties = _runtime().device_properties(device)
    if properties["capability"] != CAPABILITY:
        major, minor = properties["capability"]
        raise UnsupportedDeviceError(
            f"cuda:{device} is a {properties['name']} of compute capability {major}.{minor}, expected 9.0 "
            "(Hopper: H100, H200, H800, H20, GH200). Mend: pass CPU tensors, which take the reference"
        )
    driver, compiler = _runtime().driver_version() // 1000, toolchain.nvrtc().version
    if driver < compiler[0]:
        raise UnsupportedDeviceError(
            f"the driver supports CUDA {driver}.x, but the kernels are compiled by NVRTC {compiler[0]}."
            f"{compiler[1]}. Mend: pip install 'dsv3_kernels[cu{driver}]', or a driver for CUDA {compiler[0]}"
        )
