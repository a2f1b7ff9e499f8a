"""Checkpoints: exact, refused when a byte is wrong, and whole whatever moment the process dies."""

import copy
import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import ranks
import safetensors.torch
import torch
import torch.distributed as dist

from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.state import checkpoint
from dsv3_kernels.train.state.checkpoint import Checkpoint
from dsv3_kernels.train.state.optimizer import Piece
from dsv3_kernels.train.state.saver import Saver

SHARD = "rank-00000.safetensors"


def tensors_of(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "a": torch.randn(7, 5, generator=generator),
        "b/c": torch.randn(33, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
    }


def pieces_of(tensors):
    return {name: Piece(tensor.view(-1), 0, tensor.shape) for name, tensor in tensors.items()}


def save(folder, step, keep=2):
    return checkpoint.save(folder, step, pieces_of(tensors_of(step)), {"step": step}, keep)


def load(folder, like):
    """The state, and all tensors, which must be as many as in `like` and of its shapes and dtypes."""
    found = Checkpoint(folder)
    tensors = {name: torch.full_like(tensor, 77) for name, tensor in like.items()}
    found.read(pieces_of(tensors), set(like))
    return tensors, found.state


def assert_holds(folder, step):
    expected = tensors_of(step)
    tensors, state = load(folder, expected)
    assert state == {"step": step}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


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
    before = (first / SHARD).stat()
    assert save(tmp_path, 5) == first
    assert (first / SHARD).stat().st_ino == before.st_ino
    assert_holds(tmp_path, 5)


def test_a_checkpoint_that_latest_never_named_is_replaced(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 6)
    (tmp_path / "latest").write_text("step-000005\n")  # as if killed between the rename and `latest`
    (tmp_path / "step-000006" / SHARD).write_bytes(b"old")
    save(tmp_path, 6)
    assert_holds(tmp_path, 6)


def test_every_flipped_byte_is_noticed(tmp_path):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    folder = save(tmp_path, 3)
    for _ in range(300):
        path = folder / rng.choice(["manifest.json", SHARD, "SHA256SUMS"])
        content = path.read_bytes()
        position = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(TrainError, match="is damaged"):
            Checkpoint(tmp_path)
        path.write_bytes(content)
    assert_holds(tmp_path, 3)


def test_truncated_files_and_missing_files_are_noticed(tmp_path):
    folder = save(tmp_path, 3)
    for name in ("manifest.json", SHARD, "SHA256SUMS"):
        content = (folder / name).read_bytes()
        for length in {0, 1, len(content) // 2, len(content) - 1}:
            (folder / name).write_bytes(content[:length])
            with pytest.raises(TrainError, match="is damaged"):
                Checkpoint(tmp_path)
        (folder / name).unlink()
        with pytest.raises(TrainError, match="is damaged|cannot load"):
            Checkpoint(tmp_path)
        (folder / name).write_bytes(content)


def with_sums(folder):
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


def test_forged_checkpoints_with_right_checksums_are_refused(tmp_path):
    """Whoever wrote them: an error, nothing executed, no tensor half read."""
    folder = save(tmp_path, 3)
    shard, manifest = (folder / SHARD).read_bytes(), json.loads((folder / "manifest.json").read_text())
    for content in (b"", b"\xff" * 64, (1 << 60).to_bytes(8, "little") + shard[8:], shard[:-4]):
        (folder / SHARD).write_bytes(content)
        with_sums(folder)
        with pytest.raises(TrainError, match="cannot load"):
            load(tmp_path, tensors_of(3))
    (folder / SHARD).write_bytes(shard)
    for content in (b"__import__('os')", b"[1]", b"[" * 100_000, b"\xff"):
        (folder / "manifest.json").write_bytes(content)
        with_sums(folder)
        with pytest.raises(TrainError, match="cannot load"):
            Checkpoint(tmp_path)
    changes = [
        lambda m: m.update(format=3),
        lambda m: m.update(more=1),
        lambda m: m.update(state=[]),
        lambda m: m["tensors"].update(a=3),
        lambda m: m["tensors"]["a"].update(dtype="torch.complex64"),
        lambda m: m["tensors"]["a"].update(dtype=["x"]),
        lambda m: m["tensors"]["a"].update(shape=[7, -5]),
        lambda m: m["tensors"]["a"].update(shape=[7, 6]),
        lambda m: m["tensors"]["a"].update(pieces=[]),
        lambda m: m["tensors"]["a"].update(pieces=[["../x", 0, 35]]),
        lambda m: m["tensors"]["a"].update(pieces=[[SHARD, 0, 30]]),
        lambda m: m["tensors"]["a"].update(pieces=[[SHARD, 0, 20], [SHARD, 10, 25]]),
        lambda m: m["tensors"]["a"].update(pieces=[[SHARD, 0.0, 35]]),
        lambda m: m["tensors"]["a"].update(
            pieces=[[SHARD, 0, 20], [SHARD, 20, 15]]
        ),  # the file has one of 35
        lambda m: m["tensors"].update(d=m["tensors"]["a"]),  # which the file does not have
    ]
    for change in changes:
        forged = copy.deepcopy(manifest)
        change(forged)
        (folder / "manifest.json").write_text(json.dumps(forged))
        with_sums(folder)
        with pytest.raises(TrainError):
            load(tmp_path, tensors_of(3) | ({"d": torch.zeros(7, 5)} if "d" in forged["tensors"] else {}))


def test_the_first_format_is_refused_by_name(tmp_path):
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000003" / "state.json").write_text("{}")
    (tmp_path / "latest").write_text("step-000003\n")
    with pytest.raises(TrainError, match="is of format 1, an earlier version's, expected 2"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"step-", b"../../etc", b"step-000003/../x", b"\xff\xfe", None])
def test_a_damaged_pointer(tmp_path, content):
    save(tmp_path, 3)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    with pytest.raises(TrainError, match="latest is missing or damaged"):
        Checkpoint(tmp_path)


def test_error_names_the_checkpoint_to_fall_back_to(tmp_path):
    save(tmp_path, 3)
    newest = save(tmp_path, 4)
    (newest / "manifest.json").write_bytes(b"{}")
    with pytest.raises(TrainError, match=r"step-000004 is damaged.*Mend: write step-000003 into .*latest"):
        Checkpoint(tmp_path)
    (tmp_path / "latest").write_text("step-000003\n")
    assert_holds(tmp_path, 3)


def test_reading_changes_nothing_unless_all_fit(tmp_path):
    save(tmp_path, 3)
    found, good = Checkpoint(tmp_path), tensors_of(3)
    bad = [
        (good | {"d": torch.ones(1)}, r"missing tensors \['d'\]"),
        ({"a": good["a"]}, r"unknown tensors \['b/c', 'empty'\]"),
        (good | {"b/c": torch.ones(34).bfloat16()}, "tensor b/c is"),
        (good | {"a": torch.ones(7, 5).bfloat16()}, "tensor a is"),
    ]
    for tensors, message in bad:
        target = {name: torch.full_like(tensor, 77) for name, tensor in tensors.items()}
        with pytest.raises(TrainError, match=message):
            found.read(pieces_of(target), set(target))
        assert all((t == 77).all() for t in target.values())
    part = Piece(torch.zeros(9), 20, good["a"].shape)
    found.read({"a": part}, None)
    assert torch.equal(part.values, good["a"].flatten()[20:29])


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
        newest = Checkpoint(folder).state["step"]
        assert_holds(folder, newest)
        if kind == "full disk":
            assert not list(folder.glob(".writing-*"))
        save(folder, 3, keep=1)  # what a dead process left does not stand in the way
        assert_holds(folder, 3)
        assert sorted(os.listdir(folder)) == ["latest", "step-000003"]


# Several ranks, and a thread that writes


def share(rank, size, step):
    """A rank's pieces: of `a` the even cut, of `b` some elements, all of `c` on the last rank."""
    whole = {"a": torch.full((20_001,), float(step)), "b": torch.arange(7.0).bfloat16() + step}
    cut = {name: [i * t.numel() // size for i in range(size + 1)] for name, t in whole.items()}
    pieces = {
        name: Piece(t[cut[name][rank] : cut[name][rank + 1]], cut[name][rank], t.shape)
        for name, t in whole.items()
    }
    if rank == size - 1:
        pieces["c"] = Piece(torch.tensor([step]), 0, torch.Size([1, 1]))
    return pieces


def holds(folder):
    """The step of the checkpoint, every element of which is of that step."""
    found = Checkpoint(folder)
    step = found.state["step"]
    for ranks_now in (1, 4):  # read by other numbers of ranks than wrote it
        for rank in range(ranks_now):
            expected = share(rank, ranks_now, step)
            got = {n: Piece(torch.full_like(p.values, 77), p.first, p.shape) for n, p in expected.items()}
            found.read(got, {"a", "b", "c"})
            assert all(torch.equal(got[name].values, piece.values) for name, piece in expected.items())
    return step


def save_steps(rank, size, folder, first, count):
    saver = Saver(dist.group.WORLD if size > 1 else None)
    for step in range(first, first + count):
        pieces = share(rank, size, step)
        saver.submit(folder, step, pieces, {"step": step}, 2)
        for piece in pieces.values():
            piece.values.fill_(-1)  # training goes on, and changes what was handed over
        if rank == 0:
            (folder.parent / "begun.new").write_text(str(step))
            (folder.parent / "begun.new").replace(folder.parent / "begun")
    saver.wait()


def test_ranks_save_together(tmp_path):
    ranks.run(tmp_path / "ranks", 3, save_steps, tmp_path / "x", 1, 3)
    assert holds(tmp_path / "x") == 3
    assert len(list((tmp_path / "x" / "step-000003").glob("*.safetensors"))) == 3
    assert sorted(os.listdir(tmp_path / "x")) == ["latest", "step-000002", "step-000003"]


def save_where_one_cannot(rank, size, folder):
    saver = Saver(dist.group.WORLD)
    saver.submit(folder, 1, share(rank, size, 1), {"step": 1}, 2)
    saver.wait()
    if rank == 1:

        def full(*_):
            raise OSError(28, "No space left on device")

        safetensors.torch.save_file = full
    saver.submit(folder, 2, share(rank, size, 2), {"step": 2}, 2)
    try:
        saver.wait()
    except TrainError as error:
        return str(error)


def test_a_rank_that_cannot_write_stops_the_checkpoint_on_all(tmp_path):
    said = ranks.run(tmp_path / "ranks", 3, save_where_one_cannot, tmp_path / "x")
    for message in said:
        assert "cannot save the checkpoint" in message
        assert "rank 1: " in message and "No space left on device" in message
        assert "step-000001, is untouched" in message
    assert holds(tmp_path / "x") == 1
    assert not list((tmp_path / "x").glob(".writing-*"))


def test_pieces_that_do_not_cover_a_tensor_are_refused(tmp_path):
    for first, count in ((0, 6), (1, 6), (0, 8)):
        pieces = {"a": Piece(torch.zeros(count), first, torch.Size([7]))}
        with pytest.raises(TrainError, match="the pieces of a "):
            checkpoint.save(tmp_path, 1, pieces, {}, 2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.long)])
def test_kill_9_while_saving(tmp_path, kills):
    """One to three ranks, one or all of which die at a random moment: the newest or previous one is whole."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    newest, folder = 0, tmp_path / "x"
    for kill in range(kills):
        size = rng.choice([1, 2, 3])
        processes = ranks.start(tmp_path / f"ranks{kill}", size, save_steps, folder, newest + 1, 1_000_000)
        deadline = time.monotonic() + 120
        begun = tmp_path / "begun"
        while not (begun.exists() and int(begun.read_text()) > newest + 1):
            assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
        for process in victims:
            process.kill()
        time.sleep(rng.uniform(0, 0.05))  # the others find out, or go on
        for process in processes:
            process.kill()
            process.join()
        step = holds(folder)
        assert newest < step <= int(begun.read_text()) + 1
        newest = step


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
