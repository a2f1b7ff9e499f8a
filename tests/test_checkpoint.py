"""Checkpoints: exact, refused when a byte is wrong, and whole whatever moment the process dies."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dsv3_kernels.train import checkpoint
from dsv3_kernels.train.errors import TrainError


def tensors_of(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "a": torch.randn(7, 5, generator=generator),
        "b/c": torch.randn(33, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
    }


def save(folder, step, keep=2):
    return checkpoint.save(folder, step, tensors_of(step), {"step": step}, keep)


def assert_holds(folder, step):
    tensors, state = checkpoint.load(folder)
    assert state == {"step": step}
    expected = tensors_of(step)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_round_trip_and_pruning(tmp_path):
    for step in (10, 20, 30, 1234567):
        save(tmp_path / "x", step)
        assert_holds(tmp_path / "x", step)
    assert sorted(os.listdir(tmp_path / "x")) == ["latest", "step-000030", "step-1234567"]
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "x" / "step-1234567", capture_output=True
    )
    assert done.returncode == 0


def test_saving_a_step_again_keeps_it(tmp_path):
    first = save(tmp_path, 5)
    before = (first / "tensors.safetensors").stat()
    assert save(tmp_path, 5) == first
    assert (first / "tensors.safetensors").stat().st_ino == before.st_ino
    assert_holds(tmp_path, 5)


def test_a_checkpoint_that_latest_never_named_is_replaced(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 6)
    (tmp_path / "latest").write_text("step-000005\n")  # as if killed between the rename and `latest`
    (tmp_path / "step-000006" / "tensors.safetensors").write_bytes(b"old")
    save(tmp_path, 6)
    assert_holds(tmp_path, 6)


def test_every_flipped_byte_is_noticed(tmp_path):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    folder = save(tmp_path, 3)
    for _ in range(300):
        path = folder / rng.choice(["state.json", "tensors.safetensors", "SHA256SUMS"])
        content = path.read_bytes()
        position = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(TrainError, match="is damaged"):
            checkpoint.load(tmp_path)
        path.write_bytes(content)
    assert_holds(tmp_path, 3)


def test_truncated_files_and_missing_files_are_noticed(tmp_path):
    folder = save(tmp_path, 3)
    for name in ("state.json", "tensors.safetensors", "SHA256SUMS"):
        content = (folder / name).read_bytes()
        for length in {0, 1, len(content) // 2, len(content) - 1}:
            (folder / name).write_bytes(content[:length])
            with pytest.raises(TrainError, match="is damaged"):
                checkpoint.load(tmp_path)
        (folder / name).unlink()
        with pytest.raises(TrainError, match="cannot load"):
            checkpoint.load(tmp_path)
        (folder / name).write_bytes(content)


def with_sums(folder):
    (folder / "SHA256SUMS").write_bytes(checkpoint._checksums(folder))


def test_forged_checkpoints_with_right_checksums_are_refused(tmp_path):
    folder = save(tmp_path, 3)
    tensors = (folder / "tensors.safetensors").read_bytes()
    for content in (b"", b"\xff" * 64, (1 << 60).to_bytes(8, "little") + tensors[8:], tensors[:-4]):
        (folder / "tensors.safetensors").write_bytes(content)
        with_sums(folder)
        with pytest.raises(TrainError, match="cannot load"):
            checkpoint.load(tmp_path)
    (folder / "tensors.safetensors").write_bytes(tensors)
    for state in (b"__import__('os')", b"[1]", b"[" * 100_000, b"\xff"):
        (folder / "state.json").write_bytes(state)
        with_sums(folder)
        with pytest.raises(TrainError):
            checkpoint.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"step-", b"../../etc", b"step-000003/../x", b"\xff\xfe", None])
def test_a_damaged_pointer(tmp_path, content):
    save(tmp_path, 3)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    with pytest.raises(TrainError, match="latest is missing or damaged"):
        checkpoint.load(tmp_path)


def test_error_names_the_checkpoint_to_fall_back_to(tmp_path):
    save(tmp_path, 3)
    newest = save(tmp_path, 4)
    (newest / "state.json").write_bytes(b"{}")
    with pytest.raises(TrainError, match=r"step-000004 is damaged.*Mend: write step-000003 into .*latest"):
        checkpoint.load(tmp_path)
    (tmp_path / "latest").write_text("step-000003\n")
    assert_holds(tmp_path, 3)


def test_copy_checked_changes_nothing_unless_all_fit():
    target = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    good = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    bad = [
        ({"a": torch.ones(3)}, "missing tensors .'b'."),
        (good | {"c": torch.ones(1)}, "unknown tensors .'c'."),
        (good | {"b": torch.ones(4)}, "tensor b is"),
        (good | {"b": torch.ones(2, 2).bfloat16()}, "tensor b is"),
    ]
    for source, message in bad:
        with pytest.raises(TrainError, match=message):
            checkpoint.copy_checked(source, target, "here")
        assert (target["a"] == 0).all()
    checkpoint.copy_checked(good, target, "here")
    assert all((t == 1).all() for t in target.values())


class Died(BaseException):
    """The process ends here: no except clause of the code under test sees it coming."""


def operations(monkeypatch, at, action):
    """Runs action instead of the at-th call of those that reach the disk. Returns the counter."""
    count = [0]

    def wrap(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == at:
                action()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (os, "fsync"),
        (os, "mkdir"),
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (shutil, "rmtree"),
        (safetensors.torch, "save_file"),
        (checkpoint, "_write"),
        (checkpoint, "_flush"),
    ):
        wrap(owner, name)
    return count


@pytest.mark.parametrize("kind", ["death", "full disk"])
def test_every_point_of_failure_leaves_the_old_or_the_new(tmp_path, monkeypatch, kind):
    def die():
        raise Died

    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        count = operations(patch, 0, die)
        save(tmp_path / "count", 1)
        save(tmp_path / "count", 2)
        total = count[0]
    assert total > 15
    for at in range(1, total + 1):
        folder = tmp_path / f"{kind}-{at}"
        save(folder, 1, keep=1)
        with monkeypatch.context() as patch:
            operations(patch, at, die if kind == "death" else full)
            try:
                save(folder, 2, keep=1)
            except Died:
                pass
            except (TrainError, OSError) as error:
                assert "No space left on device" in str(error)
        newest = checkpoint.load(folder)[1]["step"]
        assert_holds(folder, newest)
        if kind == "full disk":
            assert not list(folder.glob(".writing-*"))
        save(folder, 3, keep=1)  # what a dead process left does not stand in the way
        assert_holds(folder, 3)
        assert sorted(os.listdir(folder)) == ["latest", "step-000003"]


SAVE_FOREVER = textwrap.dedent(
    """
    import sys, torch
    from pathlib import Path
    from dsv3_kernels.train import checkpoint
    folder, step = Path(sys.argv[1]), int(sys.argv[2])
    while True:
        step += 1
        tensors = {"a": torch.full((20_000,), float(step)), "b": torch.full((5,), float(step))}
        checkpoint.save(folder, step, tensors, {"step": step}, keep=2)
        print(step, flush=True)
    """
)


def test_kill_9_while_saving(tmp_path):
    rng = random.Random()
    step = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path), str(step)], stdout=subprocess.PIPE, text=True
        )
        try:
            first = process.stdout.readline()
            assert int(first) == step + 1
            time.sleep(rng.uniform(0, 0.3))
        finally:
            process.send_signal(signal.SIGKILL)
            printed = process.communicate()[0].split()
        tensors, state = checkpoint.load(tmp_path)
        assert state["step"] >= int(printed[-1] if printed else first)
        step = state["step"]
        assert all((t == step).all() for t in tensors.values())


def test_replace_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    checkpoint.replace_file(path, b"one")
    checkpoint.replace_file(path, b"two")
    assert path.read_bytes() == b"two"

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.replace_file(path, b"three")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["config.json"]
