"""A tensor map (TMA descriptor), as Hopper's bulk tensor copies take it: which box of which tensor."""

from collections.abc import Sequence
from typing import NamedTuple

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


class Encoding(NamedTuple):
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


class TensorMap:
    """Describes copies of `box` out of (or into) `tensor`; made on the host, passed to a kernel by value.

    Everything is in torch's order, outermost dimension first, and counted in elements. `shape` and `strides`
    are the tensor's own unless given (for another view of the memory that starts at its first element).
    `swizzle` is the span in bytes, 0 for none; reads outside `shape` give zeros, or NaN with `fill_nan`.
    `encoding` is the same in the driver's order. Raises `ValueError` for what the hardware cannot do (see
    "Tensors" in the PTX ISA, and cuTensorMapEncodeTiled).
    """

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
        self.box = tuple(box)
        self.swizzle = swizzle
        self.shape = tuple(tensor.shape if shape is None else shape)
        self.strides = tuple(tensor.stride() if strides is None else strides)
        self.element_strides = tuple(element_strides or (1,) * len(self.box))
        self.l2_promotion = l2_promotion
        self.fill_nan = fill_nan
        self._check()
        self.encoding = self._encode()

    def _encode(self) -> Encoding:
        """The one place where torch's order becomes the driver's."""
        size = self.tensor.element_size()
        return Encoding(
            _DATA_TYPES[self.tensor.dtype],
            self.tensor.data_ptr(),
            self.shape[::-1],
            tuple(stride * size for stride in self.strides[-2::-1]),
            self.box[::-1],
            self.element_strides[::-1],
            self.swizzle,
            self.l2_promotion,
            self.fill_nan,
        )

    def _check(self) -> None:
        if self.tensor.dtype not in _DATA_TYPES:
            raise ValueError(
                f"TensorMap: tensor has dtype {self.tensor.dtype}, which a tensor map cannot hold"
            )
        rank, size = len(self.shape), self.tensor.element_size()
        if not 1 <= rank <= 5:
            raise ValueError(f"TensorMap: shape {self.shape} has {rank} dimensions, expected 1 to 5")
        for name in ("box", "strides", "element_strides"):
            value = getattr(self, name)
            if len(value) != rank:
                raise ValueError(
                    f"TensorMap: {name} {value} has {len(value)} entries, expected {rank}: shape {self.shape}"
                )
        if not all(1 <= extent <= 2**32 for extent in self.shape):
            raise ValueError(f"TensorMap: shape {self.shape}, expected each extent in 1..2^32")
        if not all(1 <= extent <= 256 for extent in self.box):
            raise ValueError(f"TensorMap: box {self.box}, expected each extent in 1..256")
        if not all(1 <= stride <= 8 for stride in self.element_strides):
            raise ValueError(f"TensorMap: element_strides {self.element_strides}, expected each in 1..8")
        if self.strides[-1] != 1:
            raise ValueError(f"TensorMap: strides {self.strides}, expected 1 for the last dimension")
        byte_strides = tuple(stride * size for stride in self.strides[:-1])
        if not all(0 < stride < 2**40 and stride % 16 == 0 for stride in byte_strides):
            raise ValueError(
                f"TensorMap: strides {self.strides} of {size}-byte elements are {byte_strides} bytes, "
                "expected positive multiples of 16 below 2^40"
            )
        if self.tensor.data_ptr() % 16:
            raise ValueError(
                f"TensorMap: tensor starts at {self.tensor.data_ptr():#x}, expected a multiple of 16 bytes"
            )
        if self.swizzle not in _SWIZZLES:
            raise ValueError(f"TensorMap: swizzle {self.swizzle}, expected one of {_SWIZZLES} bytes")
        if self.l2_promotion not in _L2_PROMOTIONS:
            raise ValueError(
                f"TensorMap: l2_promotion {self.l2_promotion}, expected one of {_L2_PROMOTIONS} bytes"
            )
        width = self.box[-1] * size
        if width % 16 or (self.swizzle and width > self.swizzle):
            most = f" and at most the swizzle's {self.swizzle}" if self.swizzle else ""
            raise ValueError(
                f"TensorMap: box {self.box} is {width} bytes wide, expected a multiple of 16{most}"
            )
