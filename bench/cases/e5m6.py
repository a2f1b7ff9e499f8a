"""E5M6: every instance; bandwidth on what DeepSeek-V3 keeps behind attention (128 heads of 128)."""

import torch
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import reference

from . import Candidates, Case, Tensors, Workload


def _values(generator: torch.Generator) -> Tensor:
    x = torch.randn(37, 384, generator=generator)
    x *= torch.randint(-30, 14, (37, 1), generator=generator).float().exp2()
    x[3, 5], x[4, 200], x[5] = float("nan"), float("inf"), 0.0
    return x


def _pack(dtype: torch.dtype) -> Case:
    return Case(
        f"pack_e5m6 {str(dtype)[6:]}",
        lambda generator: (_values(generator).to(dtype),),
        lambda x: tuple(dk.pack_e5m6(x)),
        lambda x: reference.pack_e5m6(x),
    )


def _unpack(dtype: torch.dtype) -> Case:
    def run(*packed: Tensor) -> Tensors:
        return (dk.unpack_e5m6(dk.PackedE5M6(*packed), dtype),)

    def expected(*packed: Tensor) -> Tensors:
        return (reference.unpack_e5m6(*packed, dtype),)

    return Case(f"unpack_e5m6 {str(dtype)[6:]}", lambda g: reference.pack_e5m6(_values(g)), run, expected)


CASES = [_pack(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
CASES += [_unpack(dtype) for dtype in (torch.bfloat16, torch.float32)]


def _speed(op: str, rows: int, width: int) -> Workload:
    def build() -> Candidates:
        x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
        if op == "pack_e5m6":
            return Candidates(lambda: dk.pack_e5m6(x), {"x.half()": lambda: x.half}, frozenset({"x.half()"}))
        packed, halves = dk.pack_e5m6(x), x.half()
        peer = "x.bfloat16()"
        return Candidates(lambda: dk.unpack_e5m6(packed), {peer: lambda: halves.bfloat16}, frozenset({peer}))

    moved = rows * width * 7 // 2 + rows * width // 128 * 4
    return Workload(op, f"{rows}x{width}", 0, moved, build, "none")


WORKLOADS = [_speed(op, 4096, 16384) for op in ("pack_e5m6", "unpack_e5m6")]
