"""The one door to the worlds a call can run in."""

from typing import Literal, NoReturn

from torch import Tensor

World = Literal["reference", "cuda", "emulator"]


def world(*tensors: Tensor) -> World:
    """Where a call on these tensors runs: CPU tensors take the reference, CUDA tensors the kernel."""
    kind = tensors[0].device.type
    if kind == "cpu":
        return "reference"
    if kind == "cuda":
        return "cuda"
    raise ValueError(f"dsv3_kernels: tensors are on device {kind!r}, expected 'cpu' or 'cuda'")


def no_kernel(op: str) -> NoReturn:
    raise NotImplementedError(
        f"{op}: there is no CUDA kernel yet; move the tensors to the CPU (reference backend)"
    )
