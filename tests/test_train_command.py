"""python -m dsv3_kernels.train: a run from end to end, stopped and resumed, and bad input."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_kernels.train.config import RunConfig, from_json
from dsv3_kernels.train.trainer import StepMetrics

FAST = ["--batch-size", "1", "--seq-len", "24", "--validation-windows", "2", "--sample-bytes", "6"]
PATIENCE = 600
"""Seconds until a process counts as hung; on a busy machine a short run takes minutes."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "dsv3_kernels.train", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=ENVIRONMENT,
        **options,
    )


@pytest.fixture
def inside(capsys):
    """The command in this process, which saves the start of another."""

    def run(*arguments):
        from dsv3_kernels.train.cli import main

        code = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_tensors(folder, precision):
    checkpoints = folder / "checkpoints" / precision
    return (
        checkpoints / (checkpoints / "latest").read_text().strip() / "rank-00000.safetensors"
    ).read_bytes()


@pytest.fixture(scope="module")
def whole_run(text, tmp_path_factory):
    """Eight steps of the tiny preset in both precisions, uninterrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = command(*FAST, "--steps", 8, "--data", text, "--out", folder, "--validate-every", 4)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_from_end_to_end(whole_run):
    folder, done = whole_run
    assert done.stderr == ""
    for words in (
        "training loss before",
        "validation loss after",
        "FP8 against BF16",
        "trained in BF16",
        "A sample of the weights trained in FP8",
        "def ",
        "step 8/8",
        "tokens/s",
    ):
        assert words in done.stdout
    rows = rows_of(folder)
    assert [(r["step"], r["precision"]) for r in rows] == [
        (s, p) for s in range(1, 9) for p in ("fp8", "bf16")
    ]
    fields = {f.name for f in dataclasses.fields(StepMetrics)}
    fields |= {"validation_loss", "validation_loss_ema", "mfu", "memory"}
    for row in rows:
        assert row.keys() == fields
        assert row["loss"] > 0
        assert row["tokens_per_second"] == pytest.approx(24 / row["seconds"])
        assert (row["validation_loss"] is not None) == (row["step"] in (4, 8))
        assert row["validation_loss_ema"] is None, "there is no average without --ema"
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    config = from_json(RunConfig, json.loads((folder / "config.json").read_text()), "config.json")
    assert (config.train.steps, config.train.batch_size, config.preset) == (8, 1, "tiny")
    summary = json.loads((folder / "summary.json").read_text())
    assert [s["weights"] for s in summary["same_weights"]] == [
        "at the start",
        "trained in FP8",
        "trained in BF16",
    ]
    assert all(abs(s["difference"]) < 0.01 for s in summary["same_weights"])
    assert summary["training"]["fp8"]["before"] == rows[0]["loss"]
    assert {p.name for p in folder.iterdir()} == {
        "checkpoints",
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "report.html",
        "summary.json",
    }


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "dsv3_kernels.train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def wait_for_rows(process, folder, count):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(rows_of(folder)) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} rows came: {process.communicate()}")


def without_times(rows):
    taken = ("seconds", "tokens_per_second", "memory")
    return [{k: v for k, v in row.items() if k not in taken} for row in rows]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_resumed_equals_uninterrupted(whole_run, text, tmp_path, number):
    folder = tmp_path / "run"
    options = ["--steps", 8, "--data", text, "--validate-every", 4, "--checkpoint-every", 3]
    process = start(*FAST, *options, "--out", folder)
    wait_for_rows(process, folder, 8)  # past the first checkpoint
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert stderr == ""
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + number
        assert f"--resume {folder}" in stdout
        saved = (folder / "checkpoints" / "fp8" / "latest").read_text().strip()
        assert saved == f"step-{rows_of(folder)[-1]['step']:06d}"
    done = command("--resume", folder, "--sample-bytes", 6)
    assert (done.returncode, done.stderr) == (0, "")
    whole, whole_done = whole_run
    for precision in ("fp8", "bf16"):
        assert final_tensors(folder, precision) == final_tensors(whole, precision)
    rows = sorted(without_times(rows_of(folder)), key=lambda r: (r["step"], r["precision"]))
    assert rows == sorted(without_times(rows_of(whole)), key=lambda r: (r["step"], r["precision"]))
    last_line = [line for line in done.stdout.splitlines() if line.startswith("def ")]
    assert last_line == [line for line in whole_done.stdout.splitlines() if line.startswith("def ")]


def copy_of(whole_run, tmp_path):
    return Path(shutil.copytree(whole_run[0], tmp_path / "copy"))


def test_a_finished_run_can_be_prolonged(whole_run, tmp_path, inside):
    folder = copy_of(whole_run, tmp_path)
    done = inside("--resume", folder, "--steps", 10, "--sample-bytes", 0, "--validate-every", 50)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in rows_of(folder)] == sorted([*range(1, 11)] * 2)
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 10
    done = inside("--resume", folder, "--steps", 9)
    assert done.returncode == 1
    assert "at step 10 already" in done.stderr
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 10


def assert_one_line(done, *words):
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dsv3_kernels.train: ")
    for word in words:
        assert word in done.stderr


def test_damaged_checkpoint(whole_run, tmp_path, inside):
    folder = copy_of(whole_run, tmp_path)
    path = folder / "checkpoints" / "bf16" / "step-000008" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    before = rows_of(folder)
    assert_one_line(inside("--resume", folder), "step-000008 is damaged", "SHA256SUMS")
    assert rows_of(folder) == before


def test_full_disk(whole_run, text, tmp_path):
    """A limit on the size of files stands for the disk: the tensors are the only file above it."""
    folder = tmp_path / "run"
    process = start(*FAST, "--steps", 40, "--data", text, "--out", folder, "--precision", "bf16")
    wait_for_rows(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    pointer = (folder / "checkpoints" / "bf16" / "latest").read_text()
    tensors = final_tensors(folder, "bf16")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = command("--resume", folder, "--checkpoint-every", 1, preexec_fn=limit)
    assert_one_line(done, "cannot save the checkpoint", pointer.strip(), "is untouched")
    assert (folder / "checkpoints" / "bf16" / "latest").read_text() == pointer
    assert final_tensors(folder, "bf16") == tensors
    assert not list((folder / "checkpoints" / "bf16").glob(".writing-*"))


def test_diverging_run_stops_at_its_step(text, tmp_path, inside):
    arguments = ["--steps", 9, "--lr", 1e30, "--warmup-steps", 0, "--precision", "bf16", "--data", text]
    done = inside(*FAST, *arguments, "--out", tmp_path / "run")
    assert_one_line(done, "bf16: the ", " of step 2 is nan", "Mend:")


def test_bad_command_lines(whole_run, text, tmp_path, capsys, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.mkdir()
    binary.write_bytes(b"\0\1\2" * 999)
    config = copy_of(whole_run, tmp_path) / "config.json"
    broken, foreign = tmp_path / "broken", tmp_path / "foreign"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    foreign.mkdir()
    (foreign / "config.json").write_text(config.read_text().replace('"lr"', '"__import__"'))
    cases = [
        (["--data", "none"], "none does not exist"),
        (["--data", empty], "is an empty folder"),
        (["--data", binary], "is binary, expected UTF-8 text"),
        (["--data", text / "0.txt", "--seq-len", 200], "Mend: more text, or a smaller --seq-len"),
        (["--seq-len", 4096], "--seq-len is 4096, expected at most 2048"),
        (["--steps", 0], "steps is 0, expected at least 1"),
        (["--lr", "nan"], "lr is nan"),
        (["--batch-size", -1], "batch_size is -1"),
        (["--threads", 0], "--threads must be at least 1"),
        (["--keep", 0], "keep is 0"),
        (["--out", whole_run[0]], "already holds a run"),
        (["--out", binary], "File exists"),
        (["--resume", "none"], "expected the folder of a run"),
        (["--resume", empty], "expected the folder of a run"),
        (["--resume", broken], "config.json is not JSON"),
        (["--resume", foreign], "unknown keys ['__import__'], missing keys ['lr']"),
        (["--resume", whole_run[0], "--lr", 1], "--lr cannot be given with --resume"),
        (["--resume", whole_run[0], "--precision", "fp8"], "--precision cannot be given with --resume"),
    ]
    for arguments, message in cases:
        assert_one_line(inside(*arguments), message)
    for arguments in (["--preset", "huge"], ["--precision", "fp4"], ["--steps", "many"], ["--unknown"]):
        with pytest.raises(SystemExit) as caught:
            inside(*arguments)
        assert caught.value.code == 2
        assert arguments[0] in capsys.readouterr().err


def test_help_names_every_option_with_its_default(capsys):
    from dsv3_kernels.train.cli import build_parser, main

    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for action in build_parser()._actions[1:]:
        assert action.option_strings[0] in text
        assert "(default: " in action.help
    for group in ("run:", "text:", "optimisation:", "validation and checkpoints:", "sample:"):
        assert f"\n{group}" in text
