"""Prepared tokens: what the files hold, that nothing is lost, and that damage is noticed."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from dsv3_kernels.train import prepare as prepare_module
from dsv3_kernels.train.data import tokens
from dsv3_kernels.train.data.corpus import Batches, load_corpus, validation_windows
from dsv3_kernels.train.data.tokenizer import Bytes, FromFile, train_bpe
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.prepare import Document, main, pieces, prepare

ALPHABET = "abc def,\n\t{}é中🙂\u200b\N{COMBINING ACUTE ACCENT}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of 80 documents, an empty one, one of one character, one that spells sentinels, a binary file.

    None of the 80 is so short that those for validation, chosen by their names, have no window.
    """
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(os.urandom(8))
    documents = {f"{i}.txt": "".join(draw.choices(ALPHABET, k=draw.randrange(100, 400))) for i in range(80)}
    documents |= {"empty.txt": "", "one.txt": "é", "names.txt": "<|end|> and <|fim_hole|> are text here " * 5}
    for name, content in documents.items():
        (folder / name).write_bytes(content.encode())
    (folder / "image.bin").write_bytes(b"\x00\xff" * 50)
    return folder, documents


@pytest.fixture(scope="module")
def bpe(texts, tmp_path_factory):
    """(folder, header) of the texts in a BPE, without filling in."""
    folder = tmp_path_factory.mktemp("bpe") / "out"
    return folder, prepare(str(texts[0]), folder, tokenizer="bpe", vocab_size=300, fim=0.0)


def documents_of(part, end):
    """The ids of each document, without the sentinel before it."""
    ids = part.long().numpy()
    starts = np.flatnonzero(ids == end)
    assert starts[0] == 0
    return [document[1:] for document in np.split(ids, starts[1:])]


def test_bytes_are_what_the_trainer_reads_from_the_text_itself(texts, tmp_path):
    header = prepare(str(texts[0]), tmp_path / "out", fim=0.0)
    got, expected = load_corpus(str(tmp_path / "out"), 20), load_corpus(str(texts[0]), 20)
    assert torch.equal(got.train, expected.train)
    assert torch.equal(got.validation, expected.validation)
    assert (header.dtype, header.vocab_size, got.vocab_size, got.unit) == ("uint8", 256, 256, "byte")
    assert header.train.documents + header.validation.documents == 83
    assert header.train.tokens == header.train.text_bytes + header.train.documents


def test_bpe_loses_nothing(texts, bpe):
    folder, header = bpe
    corpus = load_corpus(str(folder), 20)
    assert (header.dtype, header.tokenizer, corpus.unit) == ("uint16", "bpe", "token")
    assert corpus.train.dtype == torch.uint16
    assert 260 < corpus.vocab_size == header.vocab_size <= 300
    assert len(corpus.train) + len(corpus.validation) < sum(len(t.encode()) for t in texts[1].values())
    decode = corpus.tokenizer.tokenizer.decode
    found = [
        decode(ids.tolist(), skip_special_tokens=False)
        for part in (corpus.train, corpus.validation)
        for ids in documents_of(part, 0)
    ]
    assert sorted(found) == sorted(texts[1].values())


def test_sentinels_in_text_are_text(bpe):
    tokenizer = FromFile(bpe[0] / "tokenizer.json", special_tokens=False)
    (ids,) = tokenizer.encode_batch(["<|end|>x<|fim_begin|>"])
    assert ids.min() > 3
    assert tokenizer.tokenizer.decode(ids.tolist()) == "<|end|>x<|fim_begin|>"
    assert FromFile(bpe[0] / "tokenizer.json").encode("<|end|>") == [0]
    assert not set(Bytes().encode("".join(map(chr, range(0x800))))) & {0xF8, 0xF9, 0xFA}


def test_a_streamed_text_is_whole_characters(bpe):
    tokenizer = load_corpus(str(bpe[0]), 20).tokenizer
    text = "é中🙂 and more 中é"
    got = list(tokenizer.stream(tokenizer.encode(text)))
    assert "".join(got) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in got)


# Filling in the middle


def test_filling_in_turns_a_document_round_and_loses_nothing():
    sentinels, turned = Bytes.sentinels, 0
    for i in range(2000):
        text = ALPHABET[: i % 17]
        got = pieces(Document("train", text, f"{i}".encode()), sentinels, 0.1)
        if len(got) == 2:
            assert got == [0, text]
            continue
        turned += 1
        end, begin, prefix, hole, suffix, finish, middle = got
        assert (end, begin, hole, finish) == (0, 0xF8, 0xF9, 0xFA)
        assert prefix + middle + suffix == text
    assert 140 < turned < 260  # 200 +- 4.5 standard deviations


def test_filling_in_cuts_anywhere():
    cuts = [pieces(Document("train", "x" * 9, f"{i}".encode()), Bytes.sentinels, 1.0) for i in range(2000)]
    assert {(len(c[2]), len(c[6])) for c in cuts} == {(p, m) for p in range(10) for m in range(10 - p)}


def test_filling_in_depends_on_seed_and_name_alone(texts, tmp_path):
    def train_documents(folder, seed):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        prepare(str(folder), out, fim=0.5, seed=seed)
        return {d.tobytes() for d in documents_of(load_corpus(str(out), 20).train, 0)}

    one = train_documents(texts[0], 0)
    assert train_documents(texts[0], 0) == one != train_documents(texts[0], 1)
    more = tmp_path / "more"
    shutil.copytree(texts[0], more)
    (more / "0000.txt").write_text("a new document, the first of all")
    assert len(train_documents(more, 0) - one) <= 1
    validation = load_corpus(str(tmp_path / "out0"), 20).validation
    assert torch.equal(validation, load_corpus(str(texts[0]), 20).validation)


# What is prepared does not depend on how


def test_batches_of_documents_change_nothing(texts, tmp_path, monkeypatch, bpe):
    monkeypatch.setattr(prepare_module, "ENCODED_AT_ONCE", 500)
    header = prepare(str(texts[0]), tmp_path / "out", tokenizer="bpe", vocab_size=300, fim=0.0)
    assert header == bpe[1]
    for name in ("train.tokens", "validation.tokens", "tokenizer.json", "tokens.json"):
        assert (tmp_path / "out" / name).read_bytes() == (bpe[0] / name).read_bytes()


def test_a_single_file_is_split_by_place(tmp_path):
    text = os.urandom(3000).hex()
    (tmp_path / "text").write_text(text)
    header = prepare(str(tmp_path / "text"), tmp_path / "out", fim=1.0)
    corpus = load_corpus(str(tmp_path / "out"), 20)
    assert bytes(corpus.validation.numpy()) == b"\0" + text[-300:].encode()
    assert header.train.tokens == 5700 + 4


def test_four_byte_ids(bpe, tmp_path):
    """A vocabulary past 65,536, written by hand."""
    folder = tmp_path / "wide"
    folder.mkdir()
    draw = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    header = json.loads((bpe[0] / "tokens.json").read_text())
    header |= {"vocab_size": 100_000, "dtype": "uint32"}
    shutil.copy(bpe[0] / "tokenizer.json", folder)
    ids = {}
    for part in ("train", "validation"):
        ids[part] = draw.integers(0, 100_000, 500, dtype=np.uint32)
        data = ids[part].astype("<u4").tobytes()
        (folder / f"{part}.tokens").write_bytes(data)
        header[part] |= {"tokens": 500, "sha256": tokens.hashlib.sha256(data).hexdigest()}
    (folder / "tokens.json").write_text(json.dumps(header))
    corpus = load_corpus(str(folder), 20)
    assert corpus.train.tolist() == ids["train"].tolist()
    windows = validation_windows(corpus.validation, 20, 3)
    assert windows.dtype == torch.int64
    assert windows[0].tolist() == ids["validation"][:20].tolist()


# Samples


def test_samples_do_not_depend_on_who_asks(bpe):
    """The global batch, cut over any number of ranks, is the same rows in the same order."""
    text = load_corpus(str(bpe[0]), 20).train
    whole = Batches(text, 20, 12, seed=5)
    for ranks in (1, 2, 3, 4, 6):
        readers = [Batches(text, 20, 12, seed=5) for _ in range(ranks)]
        for step in (0, 3, 40):
            share = 12 // ranks
            rows = [reader.samples(step * 12 + r * share, share) for r, reader in enumerate(readers)]
            assert torch.equal(torch.cat(rows), whole.batch(step))


# Damage


@pytest.fixture
def damaged(bpe, tmp_path):
    """A copy of prepared tokens to damage."""
    return shutil.copytree(bpe[0], tmp_path / "copy")


def edit(folder, **changes):
    header = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(header | changes))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "train.tokens"), r"train\.tokens is damaged: its SHA-256"),
        (lambda f: flip(f / "validation.tokens"), r"validation\.tokens is damaged"),
        (lambda f: flip(f / "tokenizer.json"), r"tokenizer\.json is damaged"),
        (lambda f: (f / "tokenizer.json").unlink(), r"cannot read .*tokenizer\.json"),
        (lambda f: (f / "train.tokens").unlink(), r"train\.tokens is missing"),
        (lambda f: os.truncate(f / "train.tokens", 100), r"has 100 bytes, expected \d+ tokens of 2 bytes"),
        (lambda f: (f / "tokens.json").write_text("{"), r"tokens\.json is not JSON"),
        (lambda f: (f / "tokens.json").write_text("[" * 100_000), r"tokens\.json is not JSON"),
        (lambda f: (f / "tokens.json").write_text("[]"), "has format None, expected"),
        (lambda f: edit(f, format="tokens 0"), "has format 'tokens 0', expected"),
        (lambda f: edit(f, dtype="object"), r"tokens\.json\.dtype: found 'object'"),
        (lambda f: edit(f, dtype="uint8"), "says uint8 for a vocabulary of"),
        (lambda f: edit(f, vocab_size=0), "for a vocabulary of 0"),
        (lambda f: edit(f, vocab_size=True), "found True, expected int"),
        (lambda f: edit(f, extra=1), r"unknown keys \['extra'\]"),
        (lambda f: edit(f, train={"tokens": 1}), "missing keys"),
        (lambda f: edit(f, vocab_size=257), r"holds the token id \d+, expected ids below vocab_size = 257"),
        (
            lambda f: edit(f, train={"documents": 0, "text_bytes": 0, "tokens": -5, "sha256": ""}),
            "expected -5 tokens",
        ),
    ],
)
def test_damaged_folders(damaged, damage, message):
    damage(damaged)
    with pytest.raises(TrainError, match=message):
        load_corpus(str(damaged), 20)


def test_a_part_that_is_no_file(damaged):
    (damaged / "train.tokens").unlink()
    os.mkfifo(damaged / "train.tokens")  # reading it would hang
    with pytest.raises(TrainError, match="missing or not a file"):
        load_corpus(str(damaged), 20)


def test_large_files_are_checked_when_asked(damaged, monkeypatch, capsys):
    monkeypatch.setattr(tokens, "CHECKED", 10)
    flip(damaged / "train.tokens")
    load_corpus(str(damaged), 20)
    assert main(["--verify", str(damaged)]) == 1
    assert "train.tokens is damaged" in capsys.readouterr().err


def test_ids_past_the_vocabulary_in_files_that_were_not_checked():
    text = torch.randint(300, (500,)).to(torch.uint16)
    assert Batches(text, 20, 4, 0, 300).samples(0, 4).shape == (4, 20)
    text[250] = 299
    batches = Batches(text, 20, 4, 0, 299)
    with pytest.raises(TrainError, match="hold the token id 299, expected ids below 299"):
        for step in range(20):
            batches.batch(step)


def test_too_little_for_a_window(damaged):
    with pytest.raises(TrainError, match="tokens to train and .* expected at least one window of 100000"):
        load_corpus(str(damaged), 100_000)


# The command


def test_command(texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--data", str(texts[0]), "--out", str(out), "--tokenizer", "bpe", "--vocab", "280"]) == 0
    text = capsys.readouterr().out
    assert "bytes a token" in text
    assert f"--data {out}" in text
    assert main(["--verify", str(out)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none"], "none does not exist"),
        (["--fim", "1.5"], "--fim is 1.5, expected a share from 0 to 1"),
        (["--fim", "nan"], "--fim is nan"),
        (["--tokenizer", "bpe", "--vocab", "100"], "vocab_size is 100, expected at least 260"),
    ],
)
def test_bad_command_lines(texts, tmp_path, capsys, arguments, message):
    assert main(["--data", str(texts[0]), "--out", str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dsv3_kernels.train.prepare: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_overwritten(texts, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(TrainError, match="exists already"):
        prepare(str(texts[0]), tmp_path / "out")


def test_an_interrupted_preparation_leaves_nothing(texts, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module.PartWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(texts[0]), tmp_path / "out", console=Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_text_that_holds_none(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"\0")
    with pytest.raises(TrainError, match="is binary, expected UTF-8"):
        prepare(str(tmp_path / "in"), tmp_path / "out")


def test_bpe_training_is_deterministic(tmp_path):
    text = ["the same text, twice over"] * 9
    for name in ("a", "b"):
        train_bpe(iter(text), 270, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
