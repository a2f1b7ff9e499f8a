"""A tensor map (TMA descriptor), as Hopper's bulk tensor copies take it: which box of which tensor."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# The driver's CUtensorMapDataType; TMA only moves bytes, so that e4m3 travels as UINT8.
_DATA_TYPES = {
    torch.uint8: 0,
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
    torch.float8_e5m2: 0,
    torch.int32: 3,
    torch.int64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
_SWIZZLES = (0, 32, 64, 128)
_L2_PROMOTIONS = (0, 64, 128, 256)


@dataclass(eq=False, slots=True)
class Encoding:
    """In the driver's order: innermost dimension first, strides in bytes, and of dimensions 1 and up only."""

    data_type: int
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    swizzle: int
    l2_promotion: int
    fill_nan: bool
    driver_bytes: bytes | None = None  # what the driver makes of it, once a launch has asked


class TensorMap:
    """Describes copies of `box` out of (or into) `tensor`; made on the host, passed to a kernel by value.

    Everything is in torch's order, outermost dimension first, and counted in elements. `shape` and `strides`
    are the tensor's own unless given (for another view of the memory that starts at its first element).
    `swizzle` is the span in bytes, 0 for none; reads outside `shape` give zeros, or NaN with `fill_nan`.
    `encoding` is the same in the driver's order. Raises `ValueError` for what the hardware cannot do (see
    "Tensors" in the PTX ISA, and cuTensorMapEncodeTiled).
    """

    __slots__ = ("encoding", "tensor")

    def __init__(
        self,
        tensor: torch.Tensor,
        box: Sequence[int],
        swizzle: int = 128,
        *,
        shape: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        element_strides: Sequence[int] | None = None,
        l2_promotion: int = 256,
        fill_nan: bool = False,
    ) -> None:
        self.tensor = tensor
        self.encoding = _encode(
            tensor.dtype,
            tensor.data_ptr(),
            tuple(tensor.shape if shape is None else shape),
            tensor.stride() if strides is None else tuple(strides),
            tuple(box),
            None if element_strides is None else tuple(element_strides),
            swizzle,
            l2_promotion,
            fill_nan,
        )


@dataclass(frozen=True, eq=False)
class MapLayout:
    """A tensor map whose tensor comes later: all that `TensorMap` takes besides, with the tensor's dtype."""

    dtype: torch.dtype
    box: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    swizzle: int = 128
    element_strides: tuple[int, ...] | None = None
    l2_promotion: int = 256
    fill_nan: bool = False

    def encoding(self, address: int) -> Encoding:
        """For a tensor that starts at `address`. Raises as `TensorMap`."""
        return _encode(
            self.dtype,
            address,
            self.shape,
            self.strides,
            self.box,
            self.element_strides,
            self.swizzle,
            self.l2_promotion,
            self.fill_nan,
        )

    def of(self, tensor: torch.Tensor) -> TensorMap:
        return TensorMap(
            tensor,
            self.box,
            self.swizzle,
            shape=self.shape,
            strides=self.strides,
            element_strides=self.element_strides,
            l2_promotion=self.l2_promotion,
            fill_nan=self.fill_nan,
        )


@functools.lru_cache(maxsize=8192)
def _encode(
    dtype: torch.dtype,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    element_strides: tuple[int, ...] | None,
    swizzle: int,
    l2_promotion: int,
    fill_nan: bool,
) -> Encoding:
    """The one place where torch's order becomes the driver's, checked.

    Remembered, because a training step launches on the same few buffers again and again. Nothing about the
    memory behind the address enters: when it is freed and another tensor comes to lie there, equal arguments
    still mean equal bytes, and different ones are another entry.
    """
    element_strides = element_strides or (1,) * len(box)
    _check(dtype, address, shape, strides, box, element_strides, swizzle, l2_promotion)
    size = dtype.itemsize
    return Encoding(
        _DATA_TYPES[dtype],
        address,
        shape[::-1],
        tuple(stride * size for stride in strides[-2::-1]),
        box[::-1],
        element_strides[::-1],
        swizzle,
        l2_promotion,
        fill_nan,
    )


def _check(
    dtype: torch.dtype,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    element_strides: tuple[int, ...],
    swizzle: int,
    l2_promotion: int,
) -> None:
    if dtype not in _DATA_TYPES:
        raise ValueError(f"TensorMap: tensor has dtype {dtype}, which a tensor map cannot hold")
    rank, size = len(shape), dtype.itemsize
    if not 1 <= rank <= 5:
        raise ValueError(f"TensorMap: shape {shape} has {rank} dimensions, expected 1 to 5")
    for name, value in (("box", box), ("strides", strides), ("element_strides", element_strides)):
        if len(value) != rank:
            raise ValueError(
                f"TensorMap: {name} {value} has {len(value)} entries, expected {rank}: shape {shape}"
            )
    if not all(1 <= extent <= 2**32 for extent in shape):
        raise ValueError(f"TensorMap: shape {shape}, expected each extent in 1..2^32")
    if not all(1 <= extent <= 256 for extent in box):
        raise ValueError(f"TensorMap: box {box}, expected each extent in 1..256")
    if not all(1 <= stride <= 8 for stride in element_strides):
        raise ValueError(f"TensorMap: element_strides {element_strides}, expected each in 1..8")
    if strides[-1] != 1:
        raise ValueError(f"TensorMap: strides {strides}, expected 1 for the last dimension")
    byte_strides = tuple(stride * size for stride in strides[:-1])
    if not all(0 < stride < 2**40 and stride % 16 == 0 for stride in byte_strides):
        raise ValueError(
            f"TensorMap: strides {strides} of {size}-byte elements are {byte_strides} bytes, "
            "expected positive multiples of 16 below 2^40"
        )
    if address % 16:
        raise ValueError(f"TensorMap: tensor starts at {address:#x}, expected a multiple of 16 bytes")
    if swizzle not in _SWIZZLES:
        raise ValueError(f"TensorMap: swizzle {swizzle}, expected one of {_SWIZZLES} bytes")
    if l2_promotion not in _L2_PROMOTIONS:
        raise ValueError(f"TensorMap: l2_promotion {l2_promotion}, expected one of {_L2_PROMOTIONS} bytes")
    width = box[-1] * size
    if width % 16 or (swizzle and width > swizzle):
        most = f" and at most the swizzle's {swizzle}" if swizzle else ""
        raise ValueError(f"TensorMap: box {box} is {width} bytes wide, expected a multiple of 16{most}")
