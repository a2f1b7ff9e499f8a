"""The average of the weights: exact, whatever the training does meanwhile."""

import os
import threading

import pytest
import torch

from dsv3_kernels.train.state.ema import CHUNK, Ema

SHAPES = {"a": (3, 5), "big": (CHUNK + 7,), "one": (1,), "empty": (0,)}


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def walk(generator, steps):
    """(the masters that training writes to, what they are after each step)."""
    masters = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    history = []
    for _ in range(steps):
        last = history[-1] if history else masters
        history.append({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in last.items()})
    return masters, history


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_against_float64(generator, decay):
    masters, history = walk(generator, 60)
    expected = {name: t.double() for name, t in masters.items()}
    same = {name: t.clone() for name, t in masters.items()}
    ema = Ema(masters, decay)
    for step, values in enumerate(history, start=1):
        for name, value in values.items():
            masters[name].copy_(value)
        ema.update(step)
        for master in masters.values():
            master.fill_(float("nan"))  # what training does while the thread averages
        d = min(decay, (1 + step) / (10 + step))
        for name, value in values.items():
            expected[name] = d * expected[name] + (1 - d) * value.double()
            same[name] = same[name].lerp(value, 1 - d)
    got = ema.tensors()
    assert got.keys() == SHAPES.keys()
    for name, average in got.items():
        assert torch.equal(average, same[name])  # the thread adds nothing to the rounding
        assert torch.allclose(average.double(), expected[name], rtol=0, atol=60 * 2**-22)
        assert (average.dtype, average.device.type) == (torch.float32, "cpu")


def test_update_returns_before_it_is_averaged(generator, monkeypatch):
    masters, _ = walk(generator, 0)
    ema, go = Ema(masters, 0.5), threading.Event()
    before = {name: t.clone() for name, t in ema.tensors().items()}
    lerp = torch._foreach_lerp_

    def slow(*arguments):
        assert go.wait(30)
        lerp(*arguments)

    monkeypatch.setattr(torch, "_foreach_lerp_", slow)
    masters["one"] += 1
    ema.update(100)
    assert torch.equal(ema._average["one"], before["one"])
    go.set()
    assert torch.allclose(ema.tensors()["one"], before["one"] + 0.5)


def test_a_failure_is_raised_by_whoever_comes_next(generator, monkeypatch):
    masters, _ = walk(generator, 0)
    ema = Ema(masters, 0.5)

    def fail(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(torch, "_foreach_lerp_", fail)
    ema.update(1)
    with pytest.raises(MemoryError, match="no memory"):
        ema.update(2)
    monkeypatch.undo()
    ema.update(3)
    ema.wait()


def test_in_place_and_taken_back(generator):
    masters, _ = walk(generator, 0)
    ema, written = Ema(masters, 0.5), []
    masters["one"] += 1
    ema.update(100)
    now = {name: t.clone() for name, t in masters.items()}
    averages = {name: t.clone() for name, t in ema.tensors().items()}
    assert not torch.equal(averages["one"], now["one"])

    def write():
        written.append({name: t.clone() for name, t in masters.items()})

    with pytest.raises(KeyboardInterrupt), ema.in_place(write):
        assert all(torch.equal(t, averages[name]) for name, t in masters.items())
        raise KeyboardInterrupt
    for values in (written[1], masters):
        assert all(torch.equal(t, now[name]) for name, t in values.items())
    assert len(written) == 2


def test_small_steps_are_not_lost():
    """A BF16 average, at this decay, would never move."""
    master = {"w": torch.ones(1)}
    ema = Ema(master, 0.9999)
    master["w"].fill_(1.01)
    for step in range(10**6, 10**6 + 100):
        ema.update(step)
    assert ema.tensors()["w"].item() == pytest.approx(1 + 0.01 * (1 - 0.9999**100), abs=2e-5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_decays_that_cannot_be(decay):
    with pytest.raises(ValueError, match="decay is .* expected a number from 0"):
        Ema({}, decay)
