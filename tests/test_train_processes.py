"""Runs of several processes from end to end: ranks that die, stall or disagree, torchrun's restarts."""

import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import ranks
import torch

from dsv3_kernels.train import cli, trainer
from dsv3_kernels.train.config import ParallelConfig
from dsv3_kernels.train.dualpipe import dualpipe
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.parallel import processes
from dsv3_kernels.train.parallel.groups import Layout, require_same
from dsv3_kernels.train.state.checkpoint import Checkpoint
from dsv3_kernels.train.state.trained import load_trained

FAST = ["--precision", "bf16", "--batch-size", "4", "--seq-len", "16", "--sample-bytes", "0"]
FAST += ["--validation-windows", "2", "--device", "cpu"]
PATIENCE = 200


def die_at(step):
    def wrapped(self, _original=trainer.Trainer.train_step):
        if self.groups.rank == 1 and self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return _original(self)

    trainer.Trainer.train_step = wrapped


def stall_at(step):
    def wrapped(self, _original=trainer.Trainer.train_step):
        if self.groups.rank == 1 and self.step == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        return _original(self)

    trainer.Trainer.train_step = wrapped


def other_code():
    if os.environ["RANK"] == "1":
        found = processes._code()
        processes._code = lambda: found | {"dsv3_kernels/train/trainer.py": "another"}


def nan_at(step):
    """Rank 1's expert 5, of the last layer, gets a weight that is NaN."""

    def wrapped(self, _original=trainer.Trainer.train_step):
        if self.groups.rank == 1 and self.step == step:
            with torch.no_grad():
                self.model.blocks[2].mlp.experts.down_proj.weight[1, 0, 0] = torch.nan
        return _original(self)

    trainer.Trainer.train_step = wrapped


def _main(rank, size, port, folder, arguments, hook):
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), number)
    if hook is not None:
        hook[0](*hook[1:])
    code = cli.main([str(argument) for argument in arguments])
    sys.stdout.flush()
    os._exit(code)


def start(folder, arguments, hook=None):
    """One process for each list of arguments."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(ranks.PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        context.Process(target=_main, args=(rank, len(arguments), port, folder, own, hook), daemon=True)
        for rank, own in enumerate(arguments)
    ]
    for process in started:
        process.start()
    return started


def end(folder, started, waited=None):
    """(exit code, stderr) of each rank; waited: those that must end by themselves, by default all."""
    deadline = time.monotonic() + PATIENCE
    for rank in range(len(started)) if waited is None else waited:
        started[rank].join(deadline - time.monotonic())
        assert started[rank].exitcode is not None, (folder / f"err{rank}").read_text()
    for process in started:
        if process.exitcode is None:
            process.kill()
            process.join()
    return [(p.exitcode, (folder / f"err{rank}").read_text()) for rank, p in enumerate(started)]


def last_line(text):
    return text.rstrip().splitlines()[-1]


@pytest.mark.parametrize(("hook", "how"), [(die_at, "SIGKILL"), (stall_at, "SIGSTOP")])
def test_a_dead_or_silent_rank_ends_all_and_is_named(text, tmp_path, hook, how):
    arguments = [*FAST, "--data", text, "--steps", 50, "--out", tmp_path / "run", "--ep", 2, "--timeout", 8]
    started = start(tmp_path / "ranks", [arguments] * 3 if how == "none" else [arguments] * 4, (hook, 2))
    ended = end(tmp_path / "ranks", started, waited=[0, 2, 3])
    for rank in (0, 2, 3):
        code, said = ended[rank]
        assert code == 1
        assert f"dsv3_kernels.train: rank {rank}: rank 1 died: no sign of life for " in last_line(said)


def test_ranks_that_disagree_are_refused(text, tmp_path):
    common = [*FAST, "--data", text, "--steps", 2, "--timeout", 20]
    for index, (own, hook, field) in enumerate(
        [
            (
                (["--lr", 1e-3], ["--lr", 2e-3]),
                None,
                ".config.train.lr is 0.001 on rank 0 and 0.002 on rank 1",
            ),
            (([], []), (other_code,), ".code.dsv3_kernels/train/trainer.py is "),
        ]
    ):
        folder = tmp_path / f"ranks{index}"
        started = start(folder, [[*common, "--out", tmp_path / "run", *more] for more in own], hook)
        for code, said in end(folder, started):
            assert code == 1
            assert field[1:] in last_line(said)
            assert "expected the same on all ranks" in last_line(said)
    assert not (tmp_path / "run").exists()


def test_not_finite_is_named_and_stops_or_is_skipped(text, tmp_path):
    common = [*FAST, "--data", text, "--steps", 4, "--ep", 2, "--timeout", 20]
    folder = tmp_path / "stop"
    started = start(folder, [[*common, "--out", tmp_path / "stopped"]] * 2, (nan_at, 2))
    for code, said in end(folder, started):
        assert code == 1
        assert "the loss of step 3 is nan" in last_line(said)
        assert "the weights blocks.2.mlp.experts.down_proj.weight on rank 1;" in last_line(said)
    arguments = [*common, "--on-not-finite", "skip", "--out", tmp_path / "skipped"]
    started = start(tmp_path / "skip", [arguments] * 2, (nan_at, 2))
    assert [code for code, _ in end(tmp_path / "skip", started)] == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "skipped" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] is not None for row in rows] == [False, False, True, True]
    assert "blocks.2.mlp.experts.down_proj.weight on rank 1" in rows[2]["skipped"]
    state = Checkpoint(tmp_path / "skipped" / "checkpoints" / "bf16").state
    assert (state["step"], state["updates"]) == (4, 2)


def test_a_signal_to_one_rank_stops_all_at_one_step(text, tmp_path):
    arguments = [*FAST, "--data", text, "--steps", 1000, "--out", tmp_path / "run"]
    started = start(tmp_path / "ranks", [arguments] * 2)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not log.exists() or log.read_text().count("\n") < 2:
        assert time.monotonic() < deadline and all(process.is_alive() for process in started)
        time.sleep(0.02)
    os.kill(started[1].pid, signal.SIGTERM)
    ended = end(tmp_path / "ranks", started)
    assert [code for code, _ in ended] == [128 + signal.SIGINT, 128 + signal.SIGTERM], ended
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert Checkpoint(tmp_path / "run" / "checkpoints" / "bf16").state["step"] == last < 1000


DYING = textwrap.dedent(
    """
    import os, signal, sys, torch
    from dsv3_kernels.train import cli, trainer
    torch.set_num_threads(1)
    original = trainer.Trainer.train_step
    death = int(os.environ["DIES_AT"])

    def step(self):
        if self.groups.rank == 1 and self.step == death and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    trainer.Trainer.train_step = step
    sys.exit(cli.main())
    """
)


@pytest.mark.parametrize("steps", [10, pytest.param(100, marks=pytest.mark.long)])
def test_torchrun_restarts_from_the_checkpoint(text, tmp_path, steps):
    """kill -9 past the half, again from there: bit for bit one process without a stop, with micro-batches."""
    script = tmp_path / "train.py"
    script.write_text(DYING)
    common = [*FAST, "--data", text, "--steps", steps, "--checkpoint-every", steps // 2]
    options = ["--nproc-per-node", "2", "--max-restarts", "1", "--master-port", "0", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", "localhost:0", script]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *common, "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DIES_AT": str(steps // 2 + 2)}
    done = subprocess.run(
        [*map(str, command), "--out", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    one = [*common, "--micro-batches", 2, "--out", tmp_path / "one"]
    assert cli.main([*map(str, one)]) == 0
    left, right = (load_trained(tmp_path / name)[0].state_dict() for name in ("run", "one"))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# What needs no second process


@pytest.mark.parametrize(
    ("pp", "ep", "world", "message"),
    [
        (2, 2, 6, "--pp 2 x --ep 2 = 4 does not divide the 6 processes. Mend: --nproc-per-node 4 or "),
        (3, 1, 2, "= 3 does not divide the 2 processes. Mend: --nproc-per-node 3, or a --pp and --ep"),
    ],
)
def test_processes_that_do_not_divide(pp, ep, world, message):
    with pytest.raises(TrainError, match=message):
        Layout.of(ParallelConfig(pp=pp, ep=ep), world)


def test_layouts():
    for pp, ep, dp in ((1, 1, 1), (2, 4, 3), (4, 1, 2), (3, 2, 1)):
        layout = Layout.of(ParallelConfig(pp=pp, ep=ep), pp * ep * dp)
        assert layout.dp == dp
        places = itertools.product(range(pp), range(dp), range(ep))
        assert [layout.rank(*place) for place in places] == list(range(layout.world))
        assert sorted({layout.share(rank) for rank in range(layout.world)}) == list(range(dp * ep))


def test_what_cannot_be_split_is_refused(text, tmp_path, capsys):
    cases = [
        (
            ["--micro-batches", 3],
            "--batch-size is 4, expected a multiple of dp x ep x micro-batches = 1 x 1 x 3",
        ),
        (["--ep", 2], "--pp 1 x --ep 2 = 2 does not divide the 1 processes"),
        (["--ep", 0], "ep is 0, expected at least 1"),
        (["--trace-step", 1], "--trace-step: --pp is 1, expected 2 or more"),
        (["--trace-step", 0], "trace_step is 0, expected a step from 1 up"),
        (["--timeout", "nan"], "timeout is nan, expected seconds"),
        (["--resume", "auto"], "--resume auto needs --out"),
        (["--ema", 1], "ema is 1.0, expected a number from 0"),
    ]
    for more, message in cases:
        assert cli.main([str(a) for a in [*FAST, "--data", text, "--steps", 2, *more]]) == 1
        assert message in capsys.readouterr().err
    from dsv3_kernels.model import PRESETS

    with pytest.raises(TrainError, match="--ep is 3, expected a divisor of the 8 routed experts: 1, 2, 4, 8"):
        Layout(ep=3).check(PRESETS["tiny"], 6, 1)


def test_a_pipeline_from_the_command_line(text, tmp_path):
    """DualPipe with MTP on two ranks; the timeline of the second step has what the schedule says."""
    common = [*FAST, "--data", text, "--steps", 2]
    pipeline = [*common, "--pp", 2, "--micro-batches", 4, "--trace-step", 2, "--out", tmp_path / "run"]
    assert [code for code, _ in end(tmp_path / "two", start(tmp_path / "two", [pipeline] * 2))] == [0, 0]
    assert cli.main([str(a) for a in [*common, "--micro-batches", 4, "--out", tmp_path / "one"]]) == 0
    runs = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "one")
    ]
    for ours, theirs in zip(*runs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    events = json.loads((tmp_path / "run" / "trace-bf16.json").read_text())["traceEvents"]
    actions = [e for e in events if e["ph"] == "X" and " stage " in e["name"] and " of " not in e["name"]]
    assert len(actions) == sum(map(len, dualpipe(2, 4).ranks))

    refused = [*common, "--pp", 2, "--micro-batches", 2]
    for code, error in end(tmp_path / "refused", start(tmp_path / "refused", [refused] * 2)):
        assert code == 1 and "at least 2 x 2 ranks = 4" in error and "Mend: --micro-batches 4" in error


def test_resume_auto(text, tmp_path, capsys):
    common = [*FAST, "--data", text, "--out", tmp_path / "run", "--resume", "auto"]

    def run(*more):
        return cli.main([str(argument) for argument in [*common, *more]]), capsys.readouterr()

    assert run("--steps", 2)[0] == 0
    assert run("--steps", 3, "--micro-batches", 2)[0] == 0
    assert Checkpoint(tmp_path / "run" / "checkpoints" / "bf16").state["step"] == 3
    code, said = run("--steps", 4, "--lr", 1)
    assert code == 1
    assert "--resume auto: train.lr is 1.0, expected 0.001 as in " in said.err


def test_same_everywhere_needs_no_second_rank():
    require_same({"a": {"b": 1}}, "settings", None)


def test_export(text, tmp_path, capsys):
    from dsv3_kernels.model import from_pretrained
    from dsv3_kernels.nn import BF16, set_recipe
    from dsv3_kernels.train import export

    assert cli.main([str(a) for a in [*FAST, "--data", text, "--steps", 2, "--out", tmp_path / "run"]]) == 0
    assert export.main([str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    got, expected = from_pretrained(tmp_path / "model"), load_trained(tmp_path / "run")[0]
    set_recipe(got, BF16)
    window = torch.arange(10).view(1, 10)
    with torch.no_grad():
        assert torch.equal(got(window), expected(window))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "model")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert export.main([str(tmp_path / "none"), str(tmp_path / "other")]) == 1
    assert not Path(tmp_path / "other").exists()
