"""A whole linear layer's training step: quantisers and three GEMMs, against the three GEMMs in BF16."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_kernels.nn import Fp8Linear, GroupedFp8Linear

from . import Candidates, Workload

Forward = Callable[[Tensor], Tensor]


def step(forward: Forward, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """Forward and backward of one layer. Returns the gradient of x."""
    x.grad = weight.grad = None
    forward(x).backward(dy)
    return x.grad


def _tensors(rows: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return x, torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)


def _with_main_grad(weight: Tensor) -> None:
    """Where a trainer lets the weight gradients add up; the BF16 layer writes a fresh one in BF16."""
    weight.main_grad = torch.zeros(weight.shape, device="cuda")


def _dense_row(rows: int, n: int, k: int) -> Workload:
    def build() -> Candidates:
        x, dy = _tensors(rows, n, k)
        ours = Fp8Linear(k, n, device="cuda", dtype=torch.bfloat16)
        plain = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
        _with_main_grad(ours.weight)
        return Candidates(
            lambda: step(ours, x, dy, ours.weight), {"BF16": lambda: lambda: step(plain, x, dy, plain.weight)}
        )

    return Workload("linear step", f"{rows} tokens, {n}x{k}", 6 * rows * n * k, _bytes(rows, n, k), build)


def _grouped_row(sizes: Sequence[int], n: int, k: int) -> Workload:
    rows, groups = sum(sizes), len(sizes)

    def build() -> Candidates:
        x, dy = _tensors(rows, n, k)
        offsets = torch.tensor([0, *sizes]).cumsum(0).int().cuda()
        layer = GroupedFp8Linear(groups, k, n, device="cuda", dtype=torch.bfloat16)
        plain = nn.Parameter(torch.randn(groups, n, k, device="cuda", dtype=torch.bfloat16))
        _with_main_grad(layer.weight)

        def ours(rows_of_x: Tensor) -> Tensor:
            return layer(rows_of_x, offsets)

        def bf16(rows_of_x: Tensor) -> Tensor:
            return F.grouped_mm(rows_of_x, plain.mT, offs=offsets[1:])

        return Candidates(
            lambda: step(ours, x, dy, layer.weight), {"BF16": lambda: lambda: step(bf16, x, dy, plain)}
        )

    least = _bytes(rows, n, k, groups)
    name = f"{groups}x{sizes[0]} tokens, {n}x{k}"
    return Workload("linear step, experts", name, 6 * rows * n * k, least, build)


def _bytes(rows: int, n: int, k: int, groups: int = 1) -> int:
    """x, dy and the weight read, y and dx written in BF16; the FP32 gradient read and written."""
    return 2 * (2 * rows * k + 2 * rows * n + groups * n * k) + 8 * groups * n * k


WORKLOADS = [
    *(_dense_row(4096, n, k) for n, k in ((7168, 7168), (4096, 7168), (7168, 2048), (7168, 16384))),
    *(_grouped_row([4096] * 8, n, k) for n, k in ((4096, 7168), (7168, 2048))),
]
