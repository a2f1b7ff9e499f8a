"""The quantisers: every instance bit by bit; bandwidth on activations and weights of DeepSeek-V3."""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import reference
from dsv3_kernels.quantized import QuantizedTensor, padded_tokens

from . import Call, Candidates, Case, Tensors, Workload

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _values(generator: torch.Generator, *shape: int) -> Tensor:
    """Rows of very different size, with zeros, a NaN and an infinity among them."""
    x = torch.randn(shape, generator=generator)
    x *= torch.randint(-30, 14, (*shape[:-1], 1), generator=generator).float().exp2()
    x.view(-1)[::7] = 0.0
    x[..., 0, 1], x[..., -1, 0] = float("nan"), float("inf")
    return x


def _parts(*quantized: QuantizedTensor) -> Tensors:
    return tuple(part for q in quantized for part in (q.data, q.scales))


def _case(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, groups: tuple[int, ...] = (), **options
) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        offsets = (torch.tensor([0, *groups]).cumsum(0).int(),) if groups else ()
        return (_values(generator, *shape).to(dtype), *offsets)

    def run(*arguments: Tensor) -> Tensors:
        result = getattr(dk, op)(*arguments, **options)
        return _parts(*result) if isinstance(result, tuple) else _parts(result)

    def expected(*arguments: Tensor) -> Tensors:
        q = getattr(reference, op)(*arguments, power_of_2_scales=options["power_of_2_scales"])
        return _parts(q, reference.transpose(q)) if options.get("transpose") else _parts(q)

    facts = [_DTYPES[dtype], "x".join(map(str, shape)), *(["groups"] if groups else [])]
    facts += [name for name, value in options.items() if value]
    return Case(f"{op} {' '.join(facts)}", inputs, run, expected)


def _both(dtype: torch.dtype, **options: bool) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        return _values(generator, 150, 144).to(dtype), torch.tensor([0, 0, 100, 101, 140], dtype=torch.int32)

    def run(x: Tensor, offsets: Tensor) -> Tensors:
        return _parts(*dk.quantize_1x128(x, transpose=True, group_offsets=offsets, **options))

    def expected(x: Tensor, offsets: Tensor) -> Tensors:
        return _parts(*reference.quantize_1x128_both(x, offsets, **options))

    facts = [_DTYPES[dtype], *(name for name, value in options.items() if value)]
    return Case(f"quantize_1x128 {' '.join(facts)} 150x144 both, groups", inputs, run, expected)


def _requantized(**options: bool) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        return _parts(reference.quantize_1x128(_values(generator, 150, 144), power_of_2_scales=bool(options)))

    def run(*q: Tensor) -> Tensors:
        return _parts(dk.requantize_1x128_t(q, **options))

    def expected(*q: Tensor) -> Tensors:
        return _parts(reference.requantize_1x128_t(QuantizedTensor(*q, (1, 128)), **options))

    return Case(" ".join(["requantize_1x128_t 150x144", *options]), inputs, run, expected)


def _all_cases() -> list[Case]:
    found = [_requantized(), _requantized(power_of_2_scales=True), _requantized(ue8m0_scales=True)]
    for dtype, power_of_2 in itertools.product(_DTYPES, (False, True)):
        options = {"power_of_2_scales": power_of_2}
        found += [
            _case("quantize_1x128", (37, 272), dtype, **options),
            _case("quantize_1x128_t", (150, 136), dtype, **options),
            _case("quantize_1x128_t", (150, 136), dtype, groups=(0, 100, 1, 40), **options),
            _both(dtype, **options),
            *(_case("quantize_128x128", (144, 272), dtype, **options, transpose=t) for t in (False, True)),
        ]
        found += [_both(dtype, ue8m0_scales=True)] if power_of_2 else []
    return [*found, _case("quantize_1x128", (3, 40, 144), torch.bfloat16, power_of_2_scales=False)]


CASES = _all_cases()


_CAST = "x.to(e4m3)"


def _cast(x: Tensor) -> dict[str, Callable[[], Call]]:
    """PyTorch's bare cast: no scales, no transpose."""
    return {_CAST: lambda: lambda: x.to(torch.float8_e4m3fn)}


def _speed(op: str, rows: int, width: int, groups: int = 0, **options) -> Workload:
    def build() -> Candidates:
        x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
        offsets = (
            (torch.arange(groups + 1, dtype=torch.int32, device="cuda") * (rows // groups),) if groups else ()
        )
        grouped = {"group_offsets": offsets[0]} if groups else {}
        run = functools.partial(getattr(dk, op), x, **grouped, **options)
        return Candidates(run, _cast(x), frozenset({_CAST}))

    padded = padded_tokens(rows, max(groups, 1))
    if op == "quantize_128x128":
        written = rows * width * (2 if options.get("transpose") else 1)
    else:
        written = (padded * (op == "quantize_1x128_t") + rows * (op == "quantize_1x128")) * width
        written += padded * width if options.get("transpose") else 0
    scales = 4 * written // (128 * 128 if op == "quantize_128x128" else 128)
    name = f"{rows}x{width}" + (f", {groups} groups" if groups else "") + "".join(f", {o}" for o in options)
    return Workload(op, name, 0, 2 * rows * width + written + scales, build, peak="none")


def _requantize(rows: int, width: int) -> Workload:
    def build() -> Candidates:
        q = dk.quantize_1x128(torch.randn(rows, width, device="cuda"), power_of_2_scales=True)
        copy = {"q.data.t(), copied": lambda: lambda: q.data.t().contiguous()}
        return Candidates(
            lambda: dk.requantize_1x128_t(q, power_of_2_scales=True), copy, frozenset({"q.data.t(), copied"})
        )

    return Workload("requantize_1x128_t", f"{rows}x{width}", 0, 2 * rows * width * 33 // 32, build, "none")


WORKLOADS = [
    _requantize(32768, 7168),
    _speed("quantize_1x128", 4096, 7168, transpose=True),
    _speed("quantize_1x128", 32768, 7168, groups=32, transpose=True),
    _speed("quantize_1x128", 4096, 7168),
    _speed("quantize_1x128", 32768, 7168),
    _speed("quantize_1x128_t", 4096, 7168),
    _speed("quantize_1x128_t", 32768, 7168, groups=32),
    _speed("quantize_128x128", 7168, 16384),
    _speed("quantize_128x128", 7168, 16384, transpose=True),
]
