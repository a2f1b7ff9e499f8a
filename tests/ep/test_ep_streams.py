"""Turns on a communication stream, with a stand-in for CUDA that records who waits for whom."""

import contextlib
import itertools
import types

import pytest
import torch

from dsv3_kernels.ep import Event
from dsv3_kernels.ep.streams import StreamTurn, Turn

LOG = []


class FakeStream:
    device = torch.device("cuda", 0)

    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        LOG.append(f"{self.name} waits for all of {other.name}")

    def wait_event(self, event):
        LOG.append(f"{self.name} waits for {event.name}")


class FakeEvent:
    names = itertools.count()

    def __init__(self):
        self.name = None

    def record(self, stream=None):
        stream = stream or torch.cuda.current_stream()
        self.name = f"the end of {stream.name}"

    def synchronize(self):
        LOG.append(f"the host waits for {self.name}")


class FakeTensor(torch.Tensor):
    def record_stream(self, stream):
        LOG.append(f"{self.label} is kept for {stream.name}")


def tensor(name):
    made = torch.zeros(1).as_subclass(FakeTensor)
    made.label = name
    return made


@pytest.fixture
def cuda(monkeypatch):
    caller, own = FakeStream("caller"), FakeStream("own")
    current = [caller]

    @contextlib.contextmanager
    def stream(chosen):
        current.append(chosen)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    LOG.clear()
    return types.SimpleNamespace(own=own, current=lambda: current[-1].name)


def call(cuda, previous=None, async_op=False, check=lambda: None):
    turn = StreamTurn(cuda.own, previous, async_op)
    with turn.memory():
        LOG.append(f"memory of {cuda.current()}")
    with turn.work():
        LOG.append(f"launch on {cuda.current()}")
    return turn.event([tensor("input"), None], [tensor("output")], check)


def test_a_plain_call_is_in_the_order_of_the_caller(cuda):
    call(cuda)
    assert LOG == [
        "memory of caller",
        "own waits for all of caller",
        "launch on own",
        "caller waits for the end of own",
    ]
    assert cuda.current() == "caller"


def test_an_asynchronous_call_is_waited_for_by_its_event_alone(cuda):
    event = call(cuda, async_op=True)
    assert LOG == [
        "memory of caller",
        "own waits for all of caller",
        "launch on own",
        "output is kept for own",
        "input is kept for own",
    ]
    event.wait()
    assert LOG[-1] == "caller waits for the end of own"
    event.synchronize()
    assert LOG[-1] == "the host waits for the end of own"


@pytest.mark.parametrize("async_op", [False, True])
def test_behind_an_event_a_call_waits_for_nothing_else_and_has_memory_of_its_own(cuda, async_op):
    call(cuda, Event.here(), async_op)
    expected = ["memory of own", "own waits for the end of caller", "launch on own"]
    expected += [] if async_op else ["caller waits for the end of own"]
    expected += ["output is kept for caller", *(["input is kept for own"] if async_op else [])]
    assert expected == LOG


def test_an_event_that_a_portable_call_gave_is_finished_on_the_callers_stream_first(cuda):
    call(cuda, Event(lambda: LOG.append(f"copies on {cuda.current()}")))
    assert LOG[:3] == ["memory of own", "copies on caller", "own waits for all of caller"]


def test_a_failure_is_raised_when_the_event_is_waited_for_and_not_before(cuda):
    class FailedError(Exception):
        pass

    failures = []

    def check():
        if failures:
            raise failures[0]

    event = call(cuda, async_op=True, check=check)
    failures.append(FailedError())
    for wait in (event.wait, event.wait, event.synchronize, lambda: call(cuda, event)):
        with pytest.raises(FailedError):
            wait()


def test_a_launch_that_fails_leaves_the_caller_on_its_stream(cuda):
    turn = StreamTurn(cuda.own, None, False)
    with pytest.raises(ValueError), turn.work():
        raise ValueError
    assert cuda.current() == "caller"


def test_on_the_cpu_everything_is_over_at_once():
    done = []
    turn = Turn(Event(lambda: done.append("previous")))
    with turn.memory(), turn.work():
        done.append("work")
    event = turn.event([], [], lambda: done.append("checked"))
    assert done == ["previous", "work", "checked"]
    event.wait()
    event.synchronize()
    assert len(done) == 3
