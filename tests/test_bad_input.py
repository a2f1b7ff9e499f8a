"""Malformed calls: each of 1,000 an op raises an error that names op, argument, what it got and expected.

A valid random call is taken apart into slots (`a.data`, `a.scales`, `group_offsets`, ...). One mutation
spoils one slot; the call must raise TypeError or ValueError naming that slot, and leave `out` as it was.
"""

import math
import random
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from fp8_helpers import fresh_generator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsv3_kernels as dk

INPUTS = (torch.float32, torch.bfloat16, torch.float16)
Slots = dict[str, object]
Spoil = Callable[[object, random.Random], object]  # the slot's value -> a bad one


# Valid calls


def add(slots: Slots, name: str, q: dk.QuantizedTensor) -> None:
    slots[f"{name}.data"], slots[f"{name}.scales"], slots[f"{name}.block"] = q.data, q.scales, q.block


def offsets_of(rng: random.Random, groups: int, rows: int) -> torch.Tensor:
    return torch.tensor([0, *sorted(rng.randint(0, rows) for _ in range(groups))], dtype=torch.int32)


def draw_input(rng: random.Random, name: str, *shape: int) -> Slots:
    dtype = rng.choice(INPUTS)
    return {name: torch.randn(shape).to(dtype), "power_of_2_scales": rng.random() < 0.5}


def draw_1x128(rng):
    return draw_input(rng, "x", *[2] * rng.randint(0, 1), rng.randint(1, 40), 16 * rng.randint(1, 20))


def draw_1x128_t(rng):
    tokens = rng.randint(1, 300)
    slots = draw_input(rng, "x", tokens, 8 * rng.randint(1, 8))
    return slots | {"group_offsets": offsets_of(rng, rng.randint(1, 4), tokens)}


def draw_1x128_both(rng):
    tokens = rng.randint(1, 40)
    slots = draw_input(rng, "x", tokens, 16 * rng.randint(1, 8)) | {"transpose": True}
    return slots | {"group_offsets": offsets_of(rng, rng.randint(1, 4), tokens)}


def draw_requantize(rng):
    tokens = rng.randint(1, 40)
    slots: Slots = {"group_offsets": offsets_of(rng, rng.randint(1, 4), tokens)}
    add(slots, "q", dk.quantize_1x128(torch.randn(tokens, 16 * rng.randint(1, 8))))
    return slots | {"power_of_2_scales": rng.random() < 0.5}


def draw_128x128(rng):
    slots = draw_input(rng, "w", *[2] * rng.randint(0, 1), 16 * rng.randint(1, 10), 16 * rng.randint(1, 20))
    return slots | {"transpose": rng.random() < 0.5}


def draw_swiglu(rng):
    tokens = rng.randint(1, 40)
    x = torch.randn(tokens, 32 * rng.randint(1, 8)).bfloat16()
    slots: Slots = {"x": x, "weights": torch.rand(tokens), "power_of_2_scales": rng.random() < 0.5}
    return slots | {"transpose": True, "group_offsets": offsets_of(rng, rng.randint(1, 4), tokens)}


def draw_swiglu_backward(rng):
    tokens, width = rng.randint(1, 40), 128 * rng.randint(1, 2)
    slots: Slots = {"dy": torch.randn(tokens, width).bfloat16(), "recompute": rng.random() < 0.5}
    slots["weights"] = torch.rand(tokens)
    add(slots, "x", dk.quantize_1x128(torch.randn(tokens, 2 * width)))
    slots["group_offsets"] = offsets_of(rng, rng.randint(1, 4), tokens)
    return slots | {"power_of_2_scales": rng.random() < 0.5}


def draw_permute(rng):
    tokens, rows = rng.randint(1, 100), rng.randint(1, 40)
    slots = draw_input(rng, "x", tokens, 16 * rng.randint(1, 8)) | {"transpose": True}
    slots["index"] = torch.randint(-1, tokens, (rows,), dtype=torch.int32)
    return slots | {"group_offsets": offsets_of(rng, rng.randint(1, 4), rows)}


def draw_unpermute(rng):
    rows, tokens, top_k = rng.randint(1, 100), rng.randint(2, 40), rng.randint(2, 8)
    slots: Slots = {"rows": torch.randn(rows, 8 * rng.randint(1, 8)).bfloat16()}
    slots["slots"] = torch.randint(-1, rows, (tokens, top_k), dtype=torch.int32)
    return slots | {"weights": torch.rand(tokens, top_k)}


def draw_route(rng):
    groups, size = rng.randint(2, 8), rng.randint(2, 8)
    best = rng.randint(1, groups - 1)
    slots: Slots = {
        "scores": torch.rand(rng.randint(1, 20), groups * size),
        "bias": torch.randn(groups * size),
    }
    slots |= {"n_group": groups, "topk_group": best, "top_k": best * rng.randint(1, size)}
    return slots | {"scaling": rng.random(), "logits": rng.random() < 0.5}


def draw_pack(rng):
    return {"x": torch.randn(rng.randint(1, 40), 128 * rng.randint(1, 3)).to(rng.choice(INPUTS))}


def draw_unpack(rng):
    packed = dk.pack_e5m6(torch.randn(rng.randint(2, 40), 128 * rng.randint(1, 3)))
    dtype = rng.choice([torch.bfloat16, torch.float32])
    return {"packed.data": packed.data, "packed.scales": packed.scales, "dtype": dtype}


def draw_dequantize(rng):
    shape = [2] * rng.randint(0, 1) + [rng.randint(2, 140), 16 * rng.randint(1, 20)]
    slots: Slots = {"dtype": rng.choice([*INPUTS, torch.float64])}
    add(slots, "q", rng.choice([dk.quantize_1x128, dk.quantize_128x128])(torch.randn(shape)))
    return slots


def draw_gemm(rng, groups=(), masked=False):
    m, n, k = rng.randint(1, 40), 8 * rng.randint(1, 20), 16 * rng.randint(1, 20)
    slots: Slots = {}
    add(slots, "a", dk.quantize_1x128(torch.randn(*(groups if masked else ()), m, k)))
    add(slots, "b", dk.quantize_128x128(torch.randn(*groups, n, k)))
    return slots


def draw_grouped(rng):
    groups = rng.randint(1, 4)
    slots = draw_gemm(rng, (groups,))
    return slots | {"group_offsets": offsets_of(rng, groups, slots["a.data"].shape[0])}


def draw_masked(rng):
    groups = rng.randint(1, 4)
    slots = draw_gemm(rng, (groups,), masked=True)
    max_m = slots["a.data"].shape[1]
    return slots | {"counts": torch.tensor([rng.randint(0, max_m) for _ in range(groups)], dtype=torch.int32)}


def draw_wgrad(rng):
    tokens, n, k, groups = (
        rng.randint(1, 200),
        8 * rng.randint(1, 6),
        8 * rng.randint(1, 6),
        rng.randint(1, 3),
    )
    offsets = offsets_of(rng, groups, tokens) if rng.random() < 0.7 else None
    slots: Slots = {"group_offsets": offsets, "accumulate": rng.random() < 0.5}
    slots["out"] = torch.randn(*([] if offsets is None else [groups]), n, k)
    add(slots, "dy_t", dk.quantize_1x128_t(torch.randn(tokens, n), offsets))
    add(slots, "x_t", dk.quantize_1x128_t(torch.randn(tokens, k), offsets))
    return slots


DRAW = {
    "quantize_1x128": draw_1x128,
    "quantize_1x128 transposed too": draw_1x128_both,
    "quantize_1x128_t": draw_1x128_t,
    "quantize_128x128": draw_128x128,
    "requantize_1x128_t": draw_requantize,
    "swiglu_quantize": draw_swiglu,
    "swiglu_backward_quantize": draw_swiglu_backward,
    "permute_quantize": draw_permute,
    "unpermute": draw_unpermute,
    "route": draw_route,
    "pack_e5m6": draw_pack,
    "unpack_e5m6": draw_unpack,
    "dequantize": draw_dequantize,
    "fp8_gemm": draw_gemm,
    "grouped_fp8_gemm": draw_grouped,
    "masked_grouped_fp8_gemm": draw_masked,
    "fp8_wgrad": draw_wgrad,
}


def call(op: str, slots: Slots) -> object:
    arguments = {name: value for name, value in slots.items() if "." not in name}
    for name in {name.split(".")[0] for name in slots if "." in name} - set(arguments):
        parts = [slots[f"{name}.{p}"] for p in ("data", "scales", "block") if f"{name}.{p}" in slots]
        arguments[name] = dk.QuantizedTensor(*parts) if len(parts) == 3 else tuple(parts)
    return getattr(dk, op.split()[0])(**arguments)


# What can be wrong with a value

UNSPOILT = object()  # this value cannot be spoilt that way


def strided(t, rng):
    return torch.stack([t, t], -1)[..., 0] if t.shape[-1] > 1 else UNSPOILT


def column_major(t, rng):
    return t.mT.contiguous().mT if min(t.shape[-2:]) > 1 else UNSPOILT


def misaligned(t, rng):
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def with_gradient(t, rng):
    return t.clone().requires_grad_()


def longer(dim):
    return lambda t, rng: torch.cat([t, t.narrow(dim, 0, 1)], dim)


def shorter(dim):
    return lambda t, rng: t.narrow(dim, 0, t.shape[dim] - 1).clone(memory_format=torch.contiguous_format)


def with_128_more_rows(t, rng):
    return torch.cat([t, t.new_zeros(*t.shape[:-2], 128, t.shape[-1])], -2)


def of_another_dtype(*allowed):
    every = {torch.float16, torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2, torch.uint8}
    every |= {torch.int64, torch.int32, torch.bool, torch.complex64}
    return lambda t, rng: t.to(torch.float32).to(rng.choice(sorted(every - set(allowed), key=str)))


def other(*values):
    return lambda _, rng: rng.choice(values)


def at(index, value):
    """The vector with one element replaced, by a number or by a function of the vector."""

    def spoil(t, rng):
        t = t.clone()
        t[index] = value(t) if callable(value) else value
        return t

    return spoil


NO_TENSOR = other(3, 2.5, "x", [1.0], {}, np.zeros((16, 16), np.float32))
NO_FLAG = other(1, 0, "yes", None, np.True_, torch.tensor(True))
ANY_TENSOR: dict[str, Spoil] = {
    "type": NO_TENSOR,
    "device": lambda t, rng: t.to("meta"),
    "rank above": lambda t, rng: t[None, None],
    "rank below": lambda t, rng: t.flatten()[0],
}
FLOAT = {"gradient": with_gradient, "layout": lambda t, rng: t.to_sparse()}
DENSE = {"strided": strided, "column major": column_major, "misaligned": misaligned}
INDEX = ANY_TENSOR | {"dtype": of_another_dtype(torch.int32), "strided": strided}
OFFSETS = INDEX | {
    "empty": lambda t, rng: t[:0],
    "start": at(0, 1),
    "negative start": at(0, -1),
    "descent": at(-1, lambda t: t[-2] - 1),
    "overrun": at(-1, 1 << 20),
}
BLOCKS = other(
    (1, 64), (64, 128), (128, 1), (1, 128, 1), [1, 128], [128, 128], "1x128", None, 128, torch.ones(2)
)


def operand(name: str, block: str) -> Iterator[tuple[str, str, Spoil]]:
    """Mutations of a quantised operand: (slot, what the message must name, spoil)."""
    wrong = (
        other((1, 128), (128, 128))
        if block == "either"
        else other((128, 128) if block == "row" else (1, 128))
    )
    data = ANY_TENSOR | DENSE | {"gradient": with_gradient, "dtype": of_another_dtype(torch.float8_e4m3fn)}
    scales = ANY_TENSOR | FLOAT | {"dtype": of_another_dtype(torch.float32)}
    scales |= {f"{change.__name__} {dim}": change(dim) for change in (longer, shorter) for dim in (-1, -2)}
    yield from ((f"{name}.data", rf"{name}\.data\b", spoil) for spoil in data.values())
    yield from ((f"{name}.scales", rf"{name}\.scales\b", spoil) for spoil in scales.values())
    yield f"{name}.data", rf"{name}\.(data|scales)\b", with_128_more_rows
    yield f"{name}.block", rf"{name}\.block\b", BLOCKS
    if block != "either":
        yield f"{name}.block", rf"{name}\.block\b", wrong
    container = other(None, 7, "x", [], (), (1,), (1, 2, 3), {"data": 1}, torch.zeros(2))
    yield name, rf"\b{name} is\b", container


def tensor_input(name: str, dtypes: tuple[torch.dtype, ...] = INPUTS) -> Iterator[tuple[str, str, Spoil]]:
    spoils = ANY_TENSOR | FLOAT | DENSE | {"dtype": of_another_dtype(*dtypes), "K": shorter(-1)}
    yield from ((name, rf"\b{name}\b", spoil) for spoil in spoils.values())


def all_of(name: str, spoils: dict[str, Spoil]) -> Iterator[tuple[str, str, Spoil]]:
    yield from ((name, name, spoil) for spoil in spoils.values())


def gemm_operands() -> Iterator[tuple[str, str, Spoil]]:
    yield from operand("a", "row")
    yield from operand("b", "square")
    for name in "ab":
        yield f"{name}.data", r"[ab]\.data has K", shorter(-1)
        yield f"{name}.data", r"[ab]\.(data has K|scales)", lambda t, rng: torch.cat([t] * 2, -1)
    yield "b.data", r"b\.data has N\b", shorter(-2)


def mutations(op: str) -> Iterator[tuple[str, str, Spoil]]:
    if "quantize" in op and op != "dequantize":
        yield "power_of_2_scales", "power_of_2_scales", NO_FLAG
        yield "ue8m0_scales", "ue8m0_scales", NO_FLAG
    if op.startswith("quantize"):
        yield from tensor_input("w" if op == "quantize_128x128" else "x")
    if op in ("quantize_128x128", "quantize_1x128 transposed too"):
        yield "transpose", "transpose", NO_FLAG
    if op == "dequantize":
        yield from operand("q", "either")
        yield "dtype", "dtype", other(torch.int8, torch.float8_e4m3fn, "float32", None, float, 32)
    if op.endswith("gemm"):
        yield from gemm_operands()
    if op == "grouped_fp8_gemm":
        yield from all_of("group_offsets", OFFSETS | {"longer": longer(0), "shorter": shorter(0)})
    if op == "masked_grouped_fp8_gemm":
        values = {"negative": at(-1, -1), "too many": at(0, 1000)}
        yield from all_of("counts", INDEX | values | {"longer": longer(0), "shorter": shorter(0)})
        yield "b.data", r"b\.(data|scales)", longer(0)
    if op == "fp8_wgrad":
        yield from operand("dy_t", "row")
        yield from operand("x_t", "row")
        yield "dy_t.data", r"dy_t\.(data|scales)", shorter(-2)
        yield "x_t.data", r"(x|dy)_t\.(data|scales)", shorter(-1)
        out = {"dtype": of_another_dtype(torch.float32), "longer": longer(-1), "shorter": shorter(-2)}
        yield from all_of("out", ANY_TENSOR | FLOAT | DENSE | out)
        yield "accumulate", "accumulate", NO_FLAG
    if op == "requantize_1x128_t":
        yield from operand("q", "row")
    if op in ("pack_e5m6", "permute_quantize"):
        yield from tensor_input("x")
    if op == "permute_quantize":
        out_of_range = {"negative": at(0, -2), "too large": at(-1, 100)}
        yield from all_of("index", INDEX | out_of_range)
        yield "transpose", "transpose", NO_FLAG
    if op == "unpermute":
        yield from tensor_input("rows", (torch.bfloat16,))
        out_of_range = {"negative": at((0, 0), -2), "too large": at((-1, -1), 100)}
        dense = ANY_TENSOR | DENSE
        yield from all_of("slots", dense | out_of_range | {"dtype": of_another_dtype(torch.int32)})
        weights = dense | FLOAT | {"dtype": of_another_dtype(torch.float32), "longer": longer(0)}
        yield from all_of("weights", weights)
    if op == "route":
        dense = ANY_TENSOR | FLOAT | {"dtype": of_another_dtype(torch.float32)}
        yield from all_of("scores", dense | DENSE | {"513": lambda t, rng: torch.zeros(len(t), 513)})
        yield from all_of("bias", dense | {"strided": strided, "longer": longer(0), "shorter": shorter(0)})
        no_count = other(0, -1, True, 1.0, None, "2", 1 << 40)
        yield from ((n, f"{n} is", no_count) for n in ("top_k", "n_group", "topk_group"))
        yield "scaling", "scaling", other(None, "1", True, math.nan, -math.inf)
        yield "logits", "logits", NO_FLAG
    if op == "unpack_e5m6":
        data = ANY_TENSOR | DENSE | {"dtype": of_another_dtype(torch.uint8), "K": shorter(-1)}
        scales = ANY_TENSOR | DENSE | FLOAT | {"dtype": of_another_dtype(torch.float32), "K": longer(-1)}
        yield from (
            (f"packed.{n}", rf"packed\.{n}", s)
            for n, d in (("data", data), ("scales", scales))
            for s in d.values()
        )
        yield "packed.data", r"packed\.scales", shorter(-2)
        yield "packed", r"packed is", other(None, 7, "x", [], (), (1,), (1, 2, 3), torch.zeros(2))
        yield "dtype", "dtype", other(torch.int8, torch.float8_e4m3fn, "float32", None, float, 32)
    if op == "swiglu_quantize":
        yield from tensor_input("x", (torch.bfloat16,))
        yield "transpose", "transpose", NO_FLAG
    if op == "swiglu_backward_quantize":
        yield from tensor_input("dy", (torch.bfloat16,))
        yield from operand("x", "row")
        yield "x.data", r"x\.(data|scales)", longer(-2)
        yield "recompute", "recompute", NO_FLAG
    if op.startswith("swiglu"):
        weights = INDEX | FLOAT | {"dtype": of_another_dtype(torch.float32), "longer": longer(0)}
        yield from all_of("weights", weights)
    if op in ("quantize_1x128 transposed too", "swiglu_quantize", "permute_quantize"):
        yield "transpose", "group_offsets", other(False)
    with_groups = ("quantize_1x128_t", "quantize_1x128 transposed too", "fp8_wgrad", "requantize_1x128_t")
    if op in with_groups or op.startswith(("swiglu", "permute")):
        yield from all_of("group_offsets", OFFSETS)


@pytest.mark.parametrize("op", DRAW)
@settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_malformed_calls(op, data):
    every = list(mutations(op))
    slot, named, spoil = every[data.draw(st.integers(0, len(every) - 1), label="mutation")]
    rng = random.Random(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    torch.manual_seed(rng.getrandbits(32))
    bad: object = UNSPOILT
    while bad is UNSPOILT:
        slots = DRAW[op](rng)
        if slot != "group_offsets" or slots[slot] is not None:
            bad = spoil(slots.get(slot), rng)
    out = slots.get("out")
    before = None if out is None else out.clone()
    with pytest.raises((TypeError, ValueError)) as caught:
        call(op, slots | {slot: bad})
    message = str(caught.value)
    assert message.startswith(f"{op.split()[0]}: ") and "expected" in message, message
    assert re.search(named, message), f"{message!r} does not name {named}"
    assert out is None or torch.equal(out, before)


@pytest.mark.parametrize("op", DRAW)
def test_valid_calls(op):
    """The generator's calls are valid before they are spoiled."""
    rng = random.Random(fresh_generator().initial_seed())
    for _ in range(200):
        call(op, DRAW[op](rng))


def test_transposed_weights_need_rows_in_sixteens():
    dk.quantize_128x128(torch.ones(24, 128))
    with pytest.raises(
        ValueError, match="quantize_128x128: w has N = 24, expected a multiple of 16; pad it to 32"
    ):
        dk.quantize_128x128(torch.ones(24, 128), transpose=True)


def test_accumulate_needs_out():
    q = dk.quantize_1x128_t(torch.ones(128, 16))
    with pytest.raises(ValueError, match="fp8_wgrad: out is None with accumulate=True, expected"):
        dk.fp8_wgrad(q, q, accumulate=True)


@pytest.mark.parametrize("name", ["dy_t.data", "dy_t.scales", "x_t.data", "x_t.scales", "group_offsets"])
def test_a_gradient_that_overlaps_an_operand_is_refused(name):
    """One byte in common is enough; neighbours in one storage are fine."""
    buffer = torch.zeros(2**16, dtype=torch.uint8)
    offsets = torch.tensor([0, 128], dtype=torch.int32)
    slots: Slots = {"group_offsets": offsets, "accumulate": False}
    add(slots, "dy_t", dk.quantize_1x128_t(torch.randn(128, 16), offsets))
    add(slots, "x_t", dk.quantize_1x128_t(torch.randn(128, 8), offsets))
    value = slots[name]
    size = value.untyped_storage().nbytes()
    within = buffer[4096 : 4096 + size].view(value.dtype).as_strided(value.shape, value.stride()).copy_(value)
    out_bytes = 16 * 8 * 4
    below, above = 4096 - out_bytes, 4096 + -(-size // 16) * 16
    for start in (below, above):
        slots["out"] = buffer[start : start + out_bytes].view(torch.float32).view(1, 16, 8)
        call("fp8_wgrad", slots | {name: within})
    for start in (below + 16, 4096 + (size - 1) // 16 * 16):
        slots["out"] = buffer[start : start + out_bytes].view(torch.float32).view(1, 16, 8)
        before = buffer.clone()
        with pytest.raises(
            ValueError, match=f"fp8_wgrad: out shares memory with {name}, expected memory of its"
        ):
            call("fp8_wgrad", slots | {name: within})
        assert torch.equal(buffer, before)


def test_gradients_are_refused_only_where_they_would_be_lost():
    x = torch.randn(4, 128, requires_grad=True)
    with pytest.raises(ValueError, match="quantize_1x128: x requires grad"):
        dk.quantize_1x128(x)
    with torch.no_grad():
        dk.quantize_1x128(x)
    dk.quantize_1x128(x.detach())


def test_messages_read_well():
    a, b = dk.quantize_1x128(torch.ones(4, 896)), dk.quantize_128x128(torch.ones(512, 896))
    wrong = dk.QuantizedTensor(b.data, torch.ones(3, 7), b.block)
    with pytest.raises(ValueError) as caught:
        dk.fp8_gemm(a, wrong)
    assert str(caught.value) == (
        "fp8_gemm: b.scales has shape (3, 7), expected (ceil(rows/128), ceil(columns/128)) = (4, 7) "
        "for b.data of shape (512, 896)"
    )
    with pytest.raises(ValueError) as caught:
        dk.grouped_fp8_gemm(
            a, dk.quantize_128x128(torch.ones(1, 512, 896)), torch.tensor([0, 9], dtype=torch.int32)
        )
    assert (
        str(caught.value)
        == "grouped_fp8_gemm: group_offsets ends at 9, expected at most 4, the rows of a.data"
    )
