"""Text in, batches out: deterministic, without overlap between training and validation."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch

from dsv3_kernels.train.data.corpus import Batches, load_corpus, validation_windows
from dsv3_kernels.train.errors import TrainError


def folder_of(path, files):
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return str(path)


def test_default_text_is_the_standard_library():
    corpus = load_corpus(None, 130)
    assert corpus.source == sysconfig.get_path("stdlib")
    text, held_out = bytes(corpus.train.numpy()), bytes(corpus.validation.numpy())
    argparse_source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    assert (b"\0" + argparse_source in text) != (b"\0" + argparse_source in held_out)
    assert len(text) > 4_000_000
    assert len(held_out) > 100_000
    again = load_corpus(None, 130)
    assert again.sha256 == corpus.sha256
    assert torch.equal(again.train, corpus.train)


def test_split_is_by_file_and_stable(tmp_path):
    files = {f"part{i}/{i}.txt": f"file {i} ".encode() * 20 for i in range(200)}
    corpus = load_corpus(folder_of(tmp_path, files), 50)
    train, held_out = (set(bytes(t.numpy()).split(b"\0")[1:]) for t in (corpus.train, corpus.validation))
    assert train | held_out == set(files.values())
    assert not train & held_out
    assert 1 <= len(held_out) <= 30
    # One more file moves no other to the other side.
    more = load_corpus(folder_of(tmp_path, {"part0/new.txt": b"new " * 30}), 50)
    kept = set(bytes(more.validation.numpy()).split(b"\0")[1:]) - {b"new " * 30}
    assert kept == held_out
    assert more.sha256 != corpus.sha256


def test_one_file_is_split_by_place(tmp_path):
    content = os.urandom(5000).hex().encode()
    path = tmp_path / "text"
    path.write_bytes(content)
    corpus = load_corpus(str(path), 100)
    assert bytes(corpus.train.numpy()) + bytes(corpus.validation.numpy()) == b"\0" + content
    assert corpus.validation.numel() == 500


def test_binary_files_in_a_folder_are_left_out(tmp_path):
    files = {
        "a.txt": b"text " * 400,
        "b.bin": b"\x00\x01" * 400,
        "c.bin": b"\xff\xfe" * 400,
        ".hidden": b"x" * 999,
    }
    corpus = load_corpus(folder_of(tmp_path, files), 20)
    assert corpus.skipped == 2
    assert set(bytes(corpus.train.numpy())) == set(b"\0text ")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "empty folder"),
        ({"a.txt": b"", "b.txt": b""}, "holds no text"),
        ({"a.bin": b"\x7fELF\0\0"}, r"a\.bin is binary, expected UTF-8"),
        ({"a.txt": b"short"}, "expected at least one window of 100"),
    ],
)
def test_useless_folders(tmp_path, files, message):
    with pytest.raises(TrainError, match=message):
        load_corpus(folder_of(tmp_path, files), 100)


def test_useless_paths(tmp_path):
    with pytest.raises(TrainError, match="does not exist"):
        load_corpus(str(tmp_path / "none"), 10)
    binary = tmp_path / "image"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(TrainError, match="is binary"):
        load_corpus(str(binary), 10)
    os.mkfifo(tmp_path / "pipe")  # reading it would hang
    with pytest.raises(TrainError, match="neither a file nor a folder"):
        load_corpus(str(tmp_path / "pipe"), 10)
    with pytest.raises(TrainError, match="neither a file nor a folder"):
        load_corpus("/dev/zero", 10)


def test_unreadable_file_and_folder(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, {"sub/a.txt": b"text " * 100})

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(TrainError, match=r"cannot read .*a\.txt: Permission denied"):
            load_corpus(folder, 10)

    def refuse_listing(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse_listing)
    with pytest.raises(TrainError, match=r"cannot list .*: Permission denied"):
        load_corpus(folder, 10)


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_bytes(b"text " * 400)
    assert load_corpus(str(tmp_path), 20).train.numel() > 1000


def test_an_epoch_takes_every_window_once():
    text = torch.arange(252, dtype=torch.uint8)
    batches = Batches(text, window=7, batch_size=5, seed=3)
    assert batches.windows == 35
    orders = []
    for epoch in range(4):
        starts = [int(row[0]) for step in range(7) for row in batches.batch(epoch * 7 + step)]
        assert len(set(starts)) == 35
        assert len({s % 7 for s in starts}) == 1  # none overlap
        assert starts != sorted(starts)
        orders.append(starts)
    assert len({tuple(s // 7 for s in starts) for starts in orders}) == 4
    assert len({starts[0] % 7 for starts in orders}) > 1
    rows = batches.batch(0)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, rows[:, :1] + torch.arange(7))


def test_batches_are_a_function_of_seed_and_step():
    text = torch.randint(256, (1000,), dtype=torch.uint8)
    one, other = (Batches(text, 10, 4, seed=1) for _ in range(2))
    forward = [one.batch(step) for step in range(60)]
    for step in reversed(range(60)):
        assert torch.equal(other.batch(step), forward[step])
    assert not torch.equal(Batches(text, 10, 4, seed=2).batch(0), forward[0])


def test_text_of_one_window():
    text = torch.arange(10, dtype=torch.uint8)
    assert torch.equal(Batches(text, 10, 2, seed=0).batch(5), text.long().expand(2, 10))


def test_validation_windows_are_spread_over_the_text():
    text = torch.arange(200, dtype=torch.uint8)
    windows = validation_windows(text, 10, 5)
    assert windows[:, 0].tolist() == [0, 47, 95, 142, 190]
    assert validation_windows(text, 10, 1000).shape == (20, 10)
