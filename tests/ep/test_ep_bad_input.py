"""Malformed calls of the buffer: each of 1,000 an op raises an error that names op and argument."""

import random
import re

import pytest
import torch
from fp8_helpers import fresh_generator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_input import (
    ANY_TENSOR,
    DENSE,
    FLOAT,
    NO_FLAG,
    UNSPOILT,
    at,
    longer,
    of_another_dtype,
    operand,
    other,
    shorter,
)

import dsv3_kernels as dk
from dsv3_kernels import ep

HIDDEN, EXPERTS, TOPK, MOST = 144, 6, 3, 16
BUFFER = ep.Buffer(None, EXPERTS, HIDDEN, MOST, TOPK)
OTHER_BUFFER = ep.Buffer(None, EXPERTS, HIDDEN, MOST, TOPK)


def routing(rng):
    rows = [rng.sample(range(-1, EXPERTS), TOPK) for _ in range(rng.randint(2, MOST))]
    return torch.tensor(rows)


def tokens(rng, count):
    x = torch.randn(count, HIDDEN).bfloat16()
    return dk.quantize_1x128(x) if rng.random() < 0.5 else x


def draw_dispatch(rng):
    idx = routing(rng)
    slots = {
        "x": tokens(rng, len(idx)),
        "topk_idx": idx,
        "topk_weights": torch.randn(idx.shape),
        "num_sms": 2 * rng.randint(1, 20),
        "expert_order": rng.random() < 0.5,
        "max_recv_tokens": rng.choice([None, MOST * TOPK]),
        "async_op": False,
        "previous_event": rng.choice([None, ep.Event()]),
        "handle": None,
    }
    if rng.random() < 0.3:
        slots["handle"] = BUFFER.dispatch(slots["x"], idx).handle
        slots |= {"topk_idx": None, "topk_weights": None, "max_recv_tokens": None}
    return slots


def draw_combine(rng):
    idx = routing(rng)
    got = BUFFER.dispatch(torch.randn(len(idx), HIDDEN).bfloat16(), idx, torch.randn(idx.shape))
    return {
        "y": torch.randn(got.handle.rows, HIDDEN).bfloat16(),
        "handle": got.handle,
        "topk_weights": got.topk_weights,
        "bias": torch.randn(len(idx), HIDDEN).bfloat16(),
        "weights_grad": torch.randn(got.handle.rows),
        "num_sms": 2 * rng.randint(1, 20),
        "async_op": False,
        "previous_event": rng.choice([None, ep.Event()]),
    }


DRAW = {"dispatch": draw_dispatch, "combine": draw_combine}


def spoil_x(mutation):
    """A mutation of a quantised operand's slot, or of a plain tensor, at x."""

    def spoil(x, rng):
        if not isinstance(x, dk.QuantizedTensor):
            return UNSPOILT
        slot, _, change = mutation
        parts = {"x.data": x.data, "x.scales": x.scales, "x.block": x.block}
        if slot == "x":
            return change(x, rng)
        parts[slot] = change(parts[slot], rng)
        return UNSPOILT if parts[slot] is UNSPOILT else dk.QuantizedTensor(*parts.values())

    return spoil


def plain(spoil):
    return lambda x, rng: spoil(x, rng) if isinstance(x, torch.Tensor) else UNSPOILT


def present(spoil):
    return lambda value, rng: UNSPOILT if value is None else spoil(value, rng)


def twice(t, rng):
    t = t.clone()
    t[-1, 0] = t[-1, 2] = 1
    return t


COUNTS = {"negative": other(-1, -(2**40)), "no integer": other(2.0, "8", True, torch.tensor(4), [2])}
LAUNCH = {
    "num_sms": COUNTS | {"odd": other(1, 3, 21), "zero": other(0)},
    "async_op": {"flag": NO_FLAG},
    "previous_event": {"type": other(1, "event", torch.ones(1), object())},
}


def matrix_only(t, rng):
    return DENSE["column major"](t, rng) if t.ndim == 2 else UNSPOILT


def beside(*dtypes):
    sizes = {"longer": longer(0), "shorter": shorter(0)}
    dense = DENSE | {"column major": matrix_only}
    dtype = {"dtype": of_another_dtype(*dtypes)}
    return ANY_TENSOR | dense | sizes | dtype | {"layout": FLOAT["layout"]}


def mutations(op):
    """(slot, what the message must name, spoil)."""
    spoils = dict(LAUNCH)
    if op == "dispatch":
        spoils |= {
            "topk_idx": beside(torch.int64)
            | {"K": longer(1), "twice": twice}
            | {name: at((-1, 1), v) for name, v in {"high": EXPERTS, "low": -2, "huge": 2**62}.items()},
            "topk_weights": beside(torch.float32) | {"K": shorter(1), "gradient": FLOAT["gradient"]},
            "expert_order": {"flag": NO_FLAG},
            "max_recv_tokens": COUNTS,
            "handle": {"type": other(1, "x", {}, torch.zeros(1))},
        }
        x = ANY_TENSOR | DENSE | FLOAT | {"dtype": of_another_dtype(torch.bfloat16)}
        x |= {"wider": longer(1), "narrower": shorter(1), "longer": longer(0), "shorter": shorter(0)}
        yield from (("x", r"\bx\b|topk_idx|handle", plain(spoil)) for spoil in x.values())
        for mutation in operand("x", "row"):
            yield "x", rf"{mutation[1]}|\bx\b|topk_idx|handle", spoil_x(mutation)
    else:
        gradient = {"gradient": FLOAT["gradient"]}
        spoils |= {
            "y": beside(torch.bfloat16) | gradient | {"narrower": shorter(1)},
            "topk_weights": beside(torch.float32) | gradient,
            "bias": beside(torch.bfloat16) | gradient | {"wider": longer(1)},
            "weights_grad": beside(torch.float32) | gradient,
            "handle": {"type": other(None, 1, "x", {}), "another": another_handle},
        }
    for slot, changes in spoils.items():
        named = r"\by\b|handle" if slot == "y" else slot
        for change in changes.values():
            optional = slot in ("max_recv_tokens", "previous_event", "handle")
            yield slot, named, change if optional else present(change)


def another_handle(handle, rng):
    x = torch.randn(handle.num_tokens, HIDDEN).bfloat16()
    return OTHER_BUFFER.dispatch(x, handle.topk_idx).handle


@pytest.mark.parametrize("op", DRAW)
@settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_malformed_calls(op, data):
    every = list(mutations(op))
    slot, named, spoil = every[data.draw(st.integers(0, len(every) - 1), label="mutation")]
    rng = random.Random(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    torch.manual_seed(rng.getrandbits(32))
    bad = UNSPOILT
    tries = 0
    while bad is UNSPOILT and tries < 100:
        slots, tries = DRAW[op](rng), tries + 1
        bad = spoil(slots[slot], rng)
    if bad is UNSPOILT:
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(BUFFER, op)(**(slots | {slot: bad}))
    message = str(caught.value)
    assert message.startswith(f"{op}: ") and "expected" in message, message
    assert re.search(named, message), f"{message!r} does not name {named}"
    assert BUFFER.status().failure is None


@pytest.mark.parametrize("op", DRAW)
def test_valid_calls(op):
    """The generator's calls are valid before they are spoiled."""
    rng = random.Random(fresh_generator().initial_seed())
    for _ in range(200):
        getattr(BUFFER, op)(**DRAW[op](rng))


GOOD = {"group": None, "num_experts": 8, "hidden": 64, "max_tokens_per_rank": 4, "num_topk": 2}
BAD_BUFFERS = [
    ({"num_experts": 0}, ValueError, "num_experts is 0, expected at least 1"),
    ({"num_experts": 8.0}, TypeError, "num_experts is 8.0 of type float, expected an int"),
    ({"hidden": 8}, ValueError, "hidden is 8, expected at least 16"),
    ({"hidden": 72}, ValueError, "hidden is 72, expected a multiple of 16"),
    ({"max_tokens_per_rank": -1}, ValueError, "max_tokens_per_rank is -1, expected at least 0"),
    ({"num_topk": 9}, ValueError, "num_topk is 9, expected at most num_experts = 8"),
    ({"num_topk": True}, TypeError, "num_topk is True of type bool, expected an int"),
    ({"gpus_per_node": 2}, ValueError, "gpus_per_node is 2, expected a divisor of the 1 ranks"),
    ({"timeout": 0}, ValueError, "timeout is 0, expected seconds above 0"),
    ({"timeout": float("nan")}, ValueError, "timeout is nan, expected seconds above 0"),
    ({"timeout": "30"}, TypeError, "timeout is '30' of type str, expected seconds"),
    ({"group": 3}, TypeError, "group is int, expected a torch.distributed group"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_BUFFERS, ids=str)
def test_malformed_buffers(change, error, message):
    with pytest.raises(error, match=f"^Buffer: {re.escape(message)}"):
        ep.Buffer(**(GOOD | change))


def test_environment(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ep.Buffer(**GOOD).topology == ep.Topology(1, 1)
    monkeypatch.setenv("DSV3_EP_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="DSV3_EP_TIMEOUT is 'soon', expected a number of seconds"):
        ep.Buffer(**GOOD)


def test_too_many_tokens_and_rows():
    x, idx = torch.ones(5, 64).bfloat16(), torch.zeros(5, 2, dtype=torch.int64)
    buffer = ep.Buffer(**GOOD)
    with pytest.raises(ValueError, match=r"x has 5 tokens, expected at most max_tokens_per_rank = 4"):
        buffer.dispatch(x, idx)
    idx[:, 1] = 1
    with pytest.raises(ValueError, match=r"rank 0 is sent 8 rows, expected at most its max_recv_tokens = 7"):
        buffer.dispatch(x[:4], idx[:4], max_recv_tokens=7)
    assert buffer.dispatch(x[:4], idx[:4], max_recv_tokens=8).x.shape == (8, 64)


def test_token_order_has_no_weights_in_combine():
    buffer = ep.Buffer(**GOOD)
    got = buffer.dispatch(torch.ones(2, 64).bfloat16(), torch.tensor([[0, 1], [2, 3]]), expert_order=False)
    with pytest.raises(ValueError, match="topk_weights is given in token order, expected None"):
        buffer.combine(got.x, got.handle, torch.ones(2))


def test_dtype_of_a_buffer():
    buffer = ep.Buffer(None, 4, 64, 8, 2, dtype=torch.float32)
    assert buffer.dtype == torch.float32
    with pytest.raises(TypeError, match="dispatch: x has dtype torch.bfloat16, expected torch.float32"):
        buffer.dispatch(torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="Buffer: dtype is torch.float16, expected one of"):
        ep.Buffer(None, 4, 64, 8, 2, dtype=torch.float16)
