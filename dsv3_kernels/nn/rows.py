"""Rows that travel in FP8 between autograd functions: to autograd a tensor like any other."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dsv3_kernels.quantize import dequantize
from dsv3_kernels.quantized import QuantizedTensor


class Fp8Rows(Tensor):
    """`[rows, width]` of BF16 or FP32 by its looks; in memory e4m3 codes with scales of 1x128.

    A layer of this library takes the codes as they are. Any other operation sees their values, dequantised
    for it. autograd passes one on as a value or as a gradient, and adds it to others by its values.
    """

    rows: QuantizedTensor
    transposed: QuantizedTensor | None
    """The same rows in tiles of 128 tokens that restart at each group, where both came of one read."""

    @staticmethod
    def __new__(
        cls, rows: QuantizedTensor, transposed: QuantizedTensor | None, dtype: torch.dtype
    ) -> "Fp8Rows":
        made = Tensor._make_wrapper_subclass(cls, rows.shape, dtype=dtype, device=rows.data.device)
        made.rows, made.transposed = rows, transposed
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Fp8Rows({dequantize(self.rows, self.dtype)!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].rows, args[0].transposed, args[0].dtype)
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) == args[0].device:
            return cls(args[0].rows, args[0].transposed, kwargs.get("dtype", args[0].dtype))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise TypeError(
                    f"Fp8Rows: {func} would write to rows that are kept in FP8, expected none that does; "
                    "write to a clone()"
                )
        args, kwargs = tree_map_only(cls, lambda x: dequantize(x.rows, x.dtype), (args, kwargs))
        return func(*args, **kwargs)
