"""Argument checks shared by every op: a failure names op, argument, what it got, what was expected, the mend.

`TypeError` for a wrong type or dtype, `ValueError` for everything else. A check reads metadata only, except
`read_offsets` and `read_counts`, which read values and therefore take CPU tensors.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: TMA and the 16-byte loads of the kernels


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    return ceil_div(a, multiple) * multiple


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d) for d in dtypes)


def tensor(op: str, name: str, value: object, dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Tensor:
    """`value` as a dense tensor of one of `dtypes` and `ranks` that carries no gradient.

    Dynamo refuses to trace `layout` in the backward of an autograd.Function, so a trace does without it.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected {_names(dtypes)}")
    if not torch.compiler.is_compiling() and value.layout != torch.strided:
        raise ValueError(
            f"{op}: {name} has layout {value.layout}, expected torch.strided; pass {name}.to_dense()"
        )
    if value.ndim not in ranks:
        raise ValueError(
            f"{op}: {name} has rank {value.ndim} (shape {tuple(value.shape)}), "
            f"expected rank {' or '.join(map(str, ranks))}"
        )
    if not value.is_cuda and not value.is_cpu:
        raise ValueError(
            f"{op}: {name} is on {value.device}, expected a CPU or a CUDA tensor; pass {name}.cpu()"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} requires grad, expected one that does not: the op has no derivative and would "
            f"lose the gradient; pass {name}.detach(), call it under torch.no_grad(), or use dsv3_kernels.nn"
        )
    return value


def contiguous(op: str, name: str, value: Tensor) -> None:
    """`value` is row-major contiguous and starts on a 16-byte border."""
    if not value.is_contiguous():
        raise ValueError(
            f"{op}: {name} of shape {tuple(value.shape)} has strides {value.stride()}, "
            f"expected row-major contiguous; pass {name}.contiguous()"
        )
    if not torch.compiler.is_compiling() and value.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"{op}: {name} starts {value.data_ptr() % ALIGNMENT} bytes past a {ALIGNMENT}-byte border, "
            f"expected 16-byte alignment; pass {name}.clone()"
        )


def shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected {meaning} = {expected}")


def multiple(op: str, name: str, dimension: str, size: int, of: int) -> None:
    if size % of:
        raise ValueError(
            f"{op}: {name} has {dimension} = {size}, expected a multiple of {of}; "
            f"pad it to {round_up(size, of)}"
        )


def same_device(op: str, name: str, value: Tensor, first_name: str, first: Tensor) -> None:
    if value.device != first.device:
        raise ValueError(
            f"{op}: {name} is on {value.device}, expected {first.device}, the device of {first_name}; "
            f"pass {name}.to({str(first.device)!r})"
        )


def _end(value: Tensor) -> int:
    """The address past the last byte of a strided tensor."""
    if value.numel() == 0:
        return value.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr() + (last + 1) * value.element_size()


def apart(op: str, name: str, value: Tensor, others: Iterable[tuple[str, Tensor]]) -> None:
    """`value`, which is written, shares no memory with `others`. A trace has no addresses to compare."""
    if torch.compiler.is_compiling():
        return
    low, high = value.data_ptr(), _end(value)
    for other_name, other in others:
        if other.data_ptr() < high and _end(other) > low and other.numel() and value.numel():
            raise ValueError(
                f"{op}: {name} shares memory with {other_name}, expected memory of its own: it is written "
                f"while {other_name} is read; pass {name}.clone()"
            )


def flag(op: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r} of type {type(value).__name__}, expected True or False")
    return value


def at_least_one(op: str, name: str, value: object) -> None:
    """An optional number of something."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r} of type {type(value).__name__}, expected an int or None")
    if value < 1:
        raise ValueError(f"{op}: {name} is {value}, expected 1 or more, or None for all")


def index_vector(op: str, name: str, value: object, first_name: str, first: Tensor) -> Tensor:
    """An int32 vector that lives beside the data: `group_offsets` or `counts`."""
    vector = tensor(op, name, value, (torch.int32,), (1,))
    same_device(op, name, vector, first_name, first)
    if not vector.is_contiguous():
        raise ValueError(
            f"{op}: {name} has stride {vector.stride()}, expected (1,); pass {name}.contiguous()"
        )
    return vector


def offsets(op: str, value: object, first_name: str, first: Tensor, groups: int | None = None) -> Tensor:
    """The metadata of `group_offsets`, int32 `[G+1]`."""
    vector = index_vector(op, "group_offsets", value, first_name, first)
    if vector.shape[0] == 0:
        raise ValueError(f"{op}: group_offsets has shape (0,), expected (G+1,), starting with 0")
    if groups is not None and vector.shape[0] != groups + 1:
        raise ValueError(
            f"{op}: group_offsets has shape {tuple(vector.shape)}, expected (G+1,) = "
            f"({groups + 1},) for {groups} groups"
        )
    return vector


def transposed_groups(op: str, group_offsets: object, transpose: bool, x: Tensor) -> None:
    """`group_offsets` of an op whose transposed result alone has groups."""
    if group_offsets is None:
        return
    offsets(op, group_offsets, "x", x)
    if not transpose:
        raise ValueError(
            f"{op}: group_offsets is given with transpose=False, expected None: only the transposed form has "
            "groups; pass transpose=True"
        )


def read_offsets(op: str, group_offsets: Tensor, rows: int | None = None, of: str = "") -> list[int]:
    """The values of a CPU `group_offsets`: they start at 0, do not descend, and end within `rows`."""
    values: list[int] = group_offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"{op}: group_offsets[0] is {values[0]}, expected 0")
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            raise ValueError(
                f"{op}: group_offsets descends: [{i - 1}] is {values[i - 1]}, [{i}] is {values[i]}; "
                "expected a running sum of group sizes"
            )
    if rows is not None and values[-1] > rows:
        raise ValueError(f"{op}: group_offsets ends at {values[-1]}, expected at most {rows}, {of}")
    return values


def read_counts(op: str, counts: Tensor, max_m: int) -> list[int]:
    """The values of a CPU `counts`: each within 0..max_m."""
    values: list[int] = counts.tolist()
    for g, count in enumerate(values):
        if not 0 <= count <= max_m:
            raise ValueError(f"{op}: counts[{g}] is {count}, expected 0 to {max_m}, the rows of a group of a")
    return values


def read_index(op: str, name: str, index: Tensor, below: int, of: str) -> None:
    """The values of a CPU `index`: each -1 or within 0..below - 1."""
    wrong = ((index < -1) | (index >= below)).nonzero()
    if wrong.numel():
        at = wrong[0].tolist()
        raise ValueError(
            f"{op}: {name}{at} is {int(index[tuple(at)])}, expected -1 (none) to {below - 1}, "
            f"{of} being {below}"
        )
