"""Two computations in turns."""

import threading

import pytest
import torch

from dsv3_kernels.ep import Event
from dsv3_kernels.nn.interleave import await_event, filled, interleaved, observed, pause


def steps(name, count, seen, result=None):
    def run():
        for i in range(count):
            seen.append(f"{name}{i}")
            pause()
        seen.append(f"{name}.")
        return result

    return run


@pytest.mark.parametrize(
    ("first", "second", "order"),
    [
        (2, 2, "a0 b0 a1 b1 a. b."),
        (1, 3, "a0 b0 a. b1 b2 b."),
        (3, 1, "a0 b0 a1 b. a2 a."),
        (0, 2, "a. b0 b1 b."),
        (2, 0, "a0 b. a1 a."),
    ],
)
def test_turns(first, second, order):
    for _ in range(20):
        seen = []
        assert interleaved(steps("a", first, seen, 1), steps("b", second, seen, 2)) == (1, 2)
        assert " ".join(seen) == order


def test_only_one_runs_at_a_time():
    running = threading.Lock()

    def work():
        for _ in range(50):
            assert running.acquire(blocking=False)
            sum(range(2000))
            running.release()
            pause()

    interleaved(work, work)


def test_a_pause_inside_a_backward():
    """As a layer of experts has it: autograd's function pauses in both passes."""
    seen = []

    class Travel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            seen.append(f"{name} out")
            pause()
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            seen.append(f"{ctx.name} back")
            pause()
            return dy * 2, None

    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    loss = Travel.apply(Travel.apply(x, "x1"), "x2").sum()
    seen.clear()
    result, _ = interleaved(lambda: Travel.apply(Travel.apply(y, "y1"), "y2"), loss.backward)
    assert seen == ["y1 out", "x2 back", "y2 out", "x1 back"]
    assert torch.equal(x.grad, torch.full((3,), 4.0)) and torch.equal(result, torch.full((3,), 4.0))
    assert result.requires_grad


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_lets_the_other_end(broken):
    seen = []

    def breaks():
        pause()
        raise KeyError("broken")

    sides = [steps("a", 3, seen), steps("b", 3, seen)]
    sides[broken] = breaks
    with pytest.raises(KeyError, match="broken"):
        interleaved(*sides)
    assert len(seen) == 4
    assert interleaved(lambda: 1, lambda: 2) == (1, 2)


def test_pauses_are_filled():
    done = []
    pause()  # nothing to do
    with filled(lambda: done.append("work")):
        pause()
        interleaved(pause, pause)
        pause()
    pause()
    assert done == ["work", "work"]


def test_an_event_is_awaited_after_the_pause():
    order, seen = [], []

    def communicate(name):
        def run():
            order.append(f"{name} starts")
            await_event(Event(lambda: order.append(f"{name} ends")), name)

        return run

    with observed(lambda *what: seen.append(what)):
        interleaved(communicate("a"), communicate("b"))
    await_event(Event(lambda: order.append("alone")), "alone")
    assert order == ["a starts", "b starts", "a ends", "b ends", "alone"]
    assert [name for name, *_ in seen] == ["a", "b"]
    assert all(started <= resumed <= over for _, started, resumed, over in seen)
