"""Ranks that disagree, that die, that stall: every other rank learns of it, by name and in time."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ranks
import torch
from fp8_helpers import fresh_generator

from dsv3_kernels import ep

TIMEOUT = 1.5


def buffer_of(size, timeout=60.0, **changes):
    arguments = {"num_experts": 2 * size, "hidden": 32, "max_tokens_per_rank": 8, "num_topk": 2} | changes
    return ep.Buffer(torch.distributed.group.WORLD, **arguments, timeout=timeout)


def tokens(rank, size):
    gen = torch.Generator().manual_seed(rank)
    idx = torch.stack([torch.randperm(2 * size, generator=gen)[:2] for _ in range(8)])
    return torch.randn(8, 32, generator=gen).bfloat16(), idx


def message_of(call):
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def disagree(rank, size):
    """Each fault in turn on rank 1, and a good round after each."""
    messages = {}
    changes = {"hidden": 64, "num_experts": 4 * size, "num_topk": 1, "gpus_per_node": 1}
    for name, value in (changes | {"transport": "portable"}).items():
        messages[name] = message_of(lambda: buffer_of(size, **({name: value} if rank == 1 else {})))  # noqa: B023
    buffer = buffer_of(size)
    x, idx = tokens(rank, size)
    weights = torch.ones(idx.shape)

    def fault(name, bad, *arguments, **options):
        good = (x, idx, weights)
        call = arguments if rank == bad else good
        messages[name] = message_of(lambda: buffer.dispatch(*call, **(options if rank == bad else {})))
        got = buffer.dispatch(*good)
        assert got.x.shape[0] == got.group_offsets[-1]

    for name, value in {"too high": 2 * size, "negative": -2, "huge": 1 << 62}.items():
        wrong = idx.clone()
        wrong[5, 1] = value
        fault(name, 1, x, wrong, weights)
    wrong = idx.clone()
    wrong[7] = 3
    fault("twice", 1, x, wrong, weights)
    fault("weights", 1, x, idx)
    fault("order", 1, x, idx, weights, expert_order=False)
    fault("overflow", 0, x, idx, weights, max_recv_tokens=1)
    return messages


def test_ranks_that_disagree_all_hear_of_it(tmp_path):
    heard = ranks.run(tmp_path / "ranks", 3, disagree)
    for name, values in {"hidden": (32, 64), "num_experts": (6, 12), "num_topk": (2, 1)}.items():
        for messages in heard:
            assert messages[name] == (
                f"Buffer: {name} is {values[0]} on rank 0 and {values[1]} on rank 1, "
                "expected the same on all ranks"
            )
    for rank, messages in enumerate(heard):
        assert "gpus_per_node is 3 on rank 0 and 1 on rank 1" in messages["gpus_per_node"]
        assert "transport is None on rank 0 and 'portable' on rank 1" in messages["transport"]
        for name, got in {"too high": 6, "negative": -2, "huge": 1 << 62}.items():
            what = (
                f"topk_idx[5, 1] is {got}, out of range" if rank == 1 else "topk_idx[5, 1] of rank 1 is wrong"
            )
            assert what in messages[name] and "expected distinct experts" in messages[name]
        what = "topk_idx[7, 1] is 3, twice in its row" if rank == 1 else "topk_idx[7, 1] of rank 1 is wrong"
        assert what in messages["twice"]
        with_weights = "rank 0 passes BF16 x with topk_weights in expert order, rank 1 BF16 x with"
        assert f"{with_weights}out topk_weights in expert order" in messages["weights"]
        assert f"{with_weights} topk_weights in token order" in messages["order"]
        assert "rank 0 is sent" in messages["overflow"] and "max_recv_tokens = 1" in messages["overflow"]


def rounds_until(rank, size, victims, act, delays):
    """Rounds until a victim acts; the survivors return what they saw and how long the last call took."""
    buffer = buffer_of(size, TIMEOUT)
    x, idx = tokens(rank, size)
    for victim, delay in zip(victims, delays, strict=True):
        if rank == victim:
            threading.Timer(delay, os.kill, (os.getpid(), act)).start()
    while True:
        start = time.monotonic()
        try:
            got = buffer.dispatch(x, idx)
            buffer.combine(got.x, got.handle)
        except ep.TimeoutError as error:
            seconds = time.monotonic() - start
            with pytest.raises(ep.TimeoutError):  # at once, and from then on
                buffer.dispatch(x, idx)
            assert buffer.status().failure == str(error)
            return {
                "op": error.op,
                "rank": error.rank,
                "peers": list(error.peers),
                "seconds": seconds,
                "message": str(error),
            }


def survivors(folder, size, victims, act, delays):
    processes = ranks.start(folder, size, rounds_until, victims, act, delays)
    living = [rank for rank in range(size) if rank not in victims]
    end = time.monotonic() + 60
    for rank in living:
        processes[rank].join(end - time.monotonic())
    ended = [processes[rank].exitcode for rank in living]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    errors = [path.read_text() for path in folder.glob("error*")]
    assert ended == [0] * len(living), errors
    return {rank: torch.load(folder / f"result{rank}", weights_only=True) for rank in living}


TRIALS = [*range(3), *(pytest.param(t, marks=pytest.mark.long) for t in range(3, 50))]


@pytest.mark.parametrize("trial", TRIALS)
def test_a_killed_rank_is_named_in_time(trial, tmp_path):
    chance = random.Random(fresh_generator().initial_seed())
    victim = chance.randrange(3)
    seen = survivors(tmp_path / "ranks", 3, [victim], signal.SIGKILL, [chance.random() * 0.2])
    assert len(seen) == 2
    for rank, error in seen.items():
        assert error["rank"] == rank and victim in error["peers"], error
        assert error["op"] in ("dispatch", "combine") and error["seconds"] < TIMEOUT + 1, error
        assert error["message"].startswith(f"{error['op']}: rank {rank} ("), error


def test_a_stalled_rank_is_named_in_time(tmp_path):
    """A survivor a call ahead misses the other, which gave up: together they name the one."""
    seen = survivors(tmp_path / "ranks", 3, [1], signal.SIGSTOP, [0.05])
    for rank, error in seen.items():
        assert error["rank"] == rank and error["seconds"] < TIMEOUT + 1, error
    assert {peer for error in seen.values() for peer in error["peers"]} - seen.keys() == {1}, seen
    assert max(error["seconds"] for error in seen.values()) >= TIMEOUT


def test_a_process_ends_soon_after_a_timeout(tmp_path):
    """With the peer alive, and by the interpreter's ordinary end."""
    program = [sys.executable, str(Path(__file__).with_name("leave_after_timeout.py"))]
    command = [[*program, str(rank), str(tmp_path / "rendezvous")] for rank in range(2)]
    stalled = subprocess.Popen(command[1])
    try:
        done = subprocess.run(command[0], capture_output=True, text=True, timeout=120)
        ended = time.time()
        assert done.returncode == 0 and stalled.poll() is None, done.stderr
        peers, at = done.stdout.rsplit(" ", 1)
        assert peers == "(1,)" and ended - float(at) < 5
    finally:
        stalled.kill()
        stalled.wait()


def go_apart(rank, size):
    buffer = buffer_of(size, TIMEOUT)
    x, idx = tokens(rank, size)
    got = buffer.dispatch(x, idx)
    start = time.monotonic()
    try:
        if rank == 0:
            buffer.dispatch(x, handle=got.handle)
        else:
            buffer.combine(got.x, got.handle)
    except ep.TimeoutError as error:
        time.sleep(TIMEOUT)  # a rank that leaves at once would show the other a closed connection
        return time.monotonic() - start - TIMEOUT, str(error)
    return 0.0, "nothing"


def test_ranks_in_different_calls_time_out(tmp_path):
    for seconds, message in ranks.run(tmp_path / "ranks", 2, go_apart):
        assert seconds < TIMEOUT + 1 and "has called the same ops in the same order" in message


def make_alone(rank, size):
    if rank == 1:
        time.sleep(2 * TIMEOUT)
        return "absent"
    try:
        buffer_of(size, TIMEOUT)
    except ep.TimeoutError as error:
        return str(error)
    return "made"


def test_a_rank_that_makes_no_buffer_is_named(tmp_path):
    heard = ranks.run(tmp_path / "ranks", 2, make_alone)
    assert heard[0].startswith("Buffer: rank 0 (receive, channel 0) waited 1.5 s for rank 1: Timed out")
