"""python -m dsv3_kernels.train.prepare: text into a folder of tokens that the trainer maps.

A file is a document. Of the training documents a share (`--fim`) is turned round so that the model learns to
fill in the middle (section 4.1 of the DeepSeek-V3 report: prefix, suffix, middle, at a rate of 0.1, before
packing). What becomes of a document depends on its text, its name and the seed, and not on the others.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsv3_kernels.train.data.corpus import VALIDATION_SHARE, held_out, no_text, read_text, text_files
from dsv3_kernels.train.data.tokenizer import Bytes, DataTokenizer, FromFile, Sentinels, train_bpe
from dsv3_kernels.train.data.tokens import (
    FORMAT,
    HEADER,
    PARTS,
    Header,
    Part,
    dtype_of,
    map_part,
    read_header,
)
from dsv3_kernels.train.errors import TrainError

ENCODED_AT_ONCE = 1 << 22
"""Characters of text that are encoded at a time, in parallel."""


@dataclass(frozen=True)
class Document:
    part: str
    text: str
    seed: bytes


class Documents:
    """The text under a root, as training and validation documents."""

    def __init__(self, path: str | None, seed: int) -> None:
        self.root, self.names = text_files(path)
        self.seed = seed
        self.skipped: list[Path] = []
        sides = {held_out(name) for name in self.names}
        self.by_name = len(sides) == 2

    def read(self, progress: Progress, what: str) -> Iterator[Document]:
        """Every document, in an order that no file system changes."""
        self.skipped = []
        for name in progress.track(self.names, description=what):
            data = read_text(self.root / name)
            if data is None:
                self.skipped.append(self.root / name)
                continue
            text = data.decode()
            seed = f"{self.seed}/".encode() + name.as_posix().encode("utf-8", "surrogateescape")
            if self.by_name:
                yield Document("validation" if held_out(name) else "train", text, seed)
            else:  # every name falls on one side: the last part of each document is held out
                cut = len(text) - len(text) // VALIDATION_SHARE
                yield Document("train", text[:cut], seed)
                yield Document("validation", text[cut:], seed)


def pieces(document: Document, sentinels: Sentinels, fim: float) -> list[int | str]:
    """The document as sentinels and pieces of text, in their order."""
    draw, text = random.Random(document.seed), document.text
    if document.part != "train" or draw.random() >= fim:
        return [sentinels.end, text]
    first, second = sorted((draw.randint(0, len(text)), draw.randint(0, len(text))))
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    s = sentinels
    return [s.end, s.fim_begin, prefix, s.fim_hole, suffix, s.fim_end, middle]


class PartWriter:
    """Appends documents to a file of tokens, and counts and hashes what it writes."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 (open as long as the writer)
        self._dtype, self._digest = np.dtype(dtype).newbyteorder("<"), hashlib.sha256()
        self.documents = self.text_bytes = self.tokens = 0

    def write(self, document: Document, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.documents += 1
        self.text_bytes += len(document.text.encode())
        self.tokens += len(ids)

    def close(self) -> Part:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return Part(self.documents, self.text_bytes, self.tokens, self._digest.hexdigest())


def prepare(
    path: str | None,
    out: Path,
    *,
    tokenizer: str = "bytes",
    vocab_size: int = 4096,
    fim: float = 0.1,
    seed: int = 0,
    console: Console | None = None,
) -> Header:
    """Writes the folder `out`, whole or not at all. Raises TrainError; `out` must not exist yet."""
    if not 0 <= fim <= 1:
        raise TrainError(f"--fim is {fim}, expected a share from 0 to 1")
    if out.exists():
        raise TrainError(f"--out: {out} exists already. Mend: another --out, or remove it")
    documents = Documents(path, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    writing = out.with_name(f".writing-{out.name}-{os.getpid()}")
    writing.mkdir()
    try:
        with _progress(console or Console()) as progress:
            header = _write(writing, documents, tokenizer, vocab_size, fim, progress)
        writing.rename(out)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return header


def _write(
    folder: Path, documents: Documents, kind: str, vocab_size: int, fim: float, progress: Progress
) -> Header:
    chosen: DataTokenizer = Bytes()
    if kind == "bpe":
        path = folder / "tokenizer.json"
        texts = documents.read(progress, "learning tokens")
        try:
            train_bpe((d.text for d in texts if d.part == "train"), vocab_size, path)
            chosen = FromFile(path, special_tokens=False)
        except ValueError as error:
            raise TrainError(f"--tokenizer bpe: {error}") from error
    dtype = dtype_of(chosen.vocab_size)
    writers = {part: PartWriter(folder / f"{part}.tokens", dtype) for part in PARTS}
    for batch in _batches(documents.read(progress, "encoding")):
        for document, ids in zip(batch, encode(batch, chosen, fim), strict=True):
            writers[document.part].write(document, ids)
    parts = {part: writer.close() for part, writer in writers.items()}
    if not sum(part.text_bytes for part in parts.values()):
        raise TrainError(f"--data: {no_text(documents.root, documents.skipped)}")
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() if kind == "bpe" else ""
    header = Header(
        FORMAT,
        "bpe" if kind == "bpe" else "bytes",
        digest,
        chosen.vocab_size,
        dtype,
        str(documents.root),
        fim,
        documents.seed,
        **parts,
    )
    with open(folder / HEADER, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(header), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return header


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= ENCODED_AT_ONCE:
            yield batch
            batch, size = [], 0
    yield batch


def encode(batch: Sequence[Document], tokenizer: DataTokenizer, fim: float) -> Iterator[np.ndarray]:
    """Each document's ids, its sentinel first."""
    sentinels = tokenizer.sentinels
    documents = [pieces(document, sentinels, fim) for document in batch]
    encoded = iter(tokenizer.encode_batch([p for d in documents for p in d if isinstance(p, str)]))
    for document in documents:
        yield np.concatenate([next(encoded) if isinstance(p, str) else np.array([p]) for p in document])


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("files"),
        TimeRemainingColumn(compact=True),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def verify(folder: Path) -> Header:
    """Reads every byte of a prepared folder against its checksums. Raises TrainError."""
    header = read_header(folder)
    for part in PARTS:
        map_part(folder, part, header, verify=True)
    return header


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.train.prepare",
        description="Turns text into files of tokens for python -m dsv3_kernels.train --data DIR.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", help="a text file, or a folder of them; None: Python's standard library")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="the folder to write; it must not exist yet")
    target.add_argument("--verify", type=Path, metavar="DIR", help="only check a prepared folder")
    parser.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bytes", help="what a token is")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens of the BPE, trained on the text")
    parser.add_argument("--fim", type=float, default=0.1, help="share of documents to fill in the middle of")
    parser.add_argument("--seed", type=int, default=0, help="of the cuts for filling in")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = build_parser().parse_args(arguments)
    console = Console()
    try:
        if given.verify is not None:
            header, folder = verify(given.verify), given.verify
        else:
            folder = given.out
            header = prepare(
                given.data,
                folder,
                tokenizer=given.tokenizer,
                vocab_size=given.vocab,
                fim=given.fim,
                seed=given.seed,
                console=console,
            )
    except (TrainError, OSError) as error:
        print(f"dsv3_kernels.train.prepare: {error}", file=sys.stderr)
        return 1
    for name in PARTS:
        part: Part = getattr(header, name)
        each = part.text_bytes / max(1, part.tokens)
        console.print(
            f"{name}: {part.documents:,} documents, {part.tokens:,} tokens, {each:.2f} bytes a token",
            highlight=False,
        )
    console.print(
        f"{folder}: vocabulary {header.vocab_size:,}, {header.dtype}. "
        f"Next: python -m dsv3_kernels.train --data {folder}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
