"""A C struct that a kernel takes by value."""

import struct
from collections.abc import Callable, Sequence

from torch import Tensor


class Struct:
    """The fields of a struct in C's order; C's alignment follows.

    layout: a code of Python's `struct` module for each value: "P" a pointer, "Q" u64, "q" i64, "I" u32, "i"
    i32, "f" float. values: a tensor stands for the address of its first element, None for null. The struct
    holds a pointer or another 8 bytes, so that C aligns it to 8.
    """

    def __init__(self, layout: str, *values: Tensor | int | float | None) -> None:
        self.layout, self.values = f"{layout}0Q", values

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in self.values if isinstance(value, Tensor)]

    def encode(self, address: Callable[[Tensor], int]) -> bytes:
        """Raises `struct.error` for a number that its field cannot hold."""
        numbers = [address(v) if isinstance(v, Tensor) else 0 if v is None else v for v in self.values]
        return struct.pack(self.layout, *numbers)


def join(parts: Sequence[Struct], length: int | None = None) -> Struct:
    """The struct of these structs; or an array of `length` such as the first, zeros behind those given."""
    whole = Struct("".join(p.layout for p in parts), *(v for p in parts for v in p.values))
    if length is not None:
        missing = (length - len(parts)) * struct.calcsize(parts[0].layout)
        whole.layout += f"{missing}x"
    return whole
