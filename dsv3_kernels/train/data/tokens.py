"""Prepared tokens: a folder that `python -m dsv3_kernels.train.prepare` writes and the trainer maps.

    tokens.json          the header below: which tokenizer, how many tokens, checksums
    train.tokens         raw little-endian token ids, one after the other: a sentinel, a document, a
    validation.tokens        sentinel, a document, ...
    tokenizer.json       for a BPE

An id takes 1, 2 or 4 bytes, the fewest that hold the vocabulary. Loading reads JSON and maps files; nothing
in them is executed.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsv3_kernels.train.config import from_json, read_json
from dsv3_kernels.train.data.tokenizer import Bytes, FromFile, Tokenizer
from dsv3_kernels.train.errors import TrainError

FORMAT = "dsv3_kernels tokens 1"
HEADER = "tokens.json"
PARTS = ("train", "validation")
CHECKED = 1 << 30
"""Files of up to so many bytes are checked whole when loaded; prepare --verify checks any."""
DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "uint32": torch.uint32}


@dataclass(frozen=True)
class Part:
    documents: int
    text_bytes: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Header:
    format: str
    tokenizer: Literal["bytes", "bpe"]
    tokenizer_sha256: str
    """Of tokenizer.json; empty for bytes."""
    vocab_size: int
    dtype: Literal["uint8", "uint16", "uint32"]
    source: str
    fim: float
    """The share of training documents that were turned round, to be filled in the middle."""
    seed: int
    train: Part
    validation: Part


def dtype_of(vocab_size: int) -> Literal["uint8", "uint16", "uint32"]:
    return "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_header(folder: Path) -> Header:
    """Raises TrainError for a header that is missing, damaged, of another format or at odds with itself."""
    path = folder / HEADER
    value = read_json(path, "--data", mend="prepare it again")
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise TrainError(f"--data: {path} has format {found!r}, expected {FORMAT!r}. Mend: prepare it again")
    header = from_json(Header, value, f"--data: {path}")
    if header.vocab_size < 1 or header.dtype != dtype_of(header.vocab_size):
        raise TrainError(
            f"--data: {path} says {header.dtype} for a vocabulary of {header.vocab_size}, expected "
            f"{dtype_of(header.vocab_size)}"
        )
    return header


def read_tokenizer(folder: Path, header: Header) -> Tokenizer:
    if header.tokenizer == "bytes":
        return Bytes()
    path = folder / "tokenizer.json"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != header.tokenizer_sha256:
            raise TrainError(f"--data: {path} is damaged: its SHA-256 is not that in {HEADER}")
        return FromFile(path)
    except (OSError, ValueError) as error:
        raise TrainError(f"--data: cannot read {path}: {error}") from error


def map_part(folder: Path, name: str, header: Header, *, verify: bool | None = None) -> Tensor:
    """Token ids of a part, mapped and not read: uint8, uint16 or uint32, one dimension.

    verify: whether to read it once, against its checksum and the vocabulary; None: where it is small.
    """
    path = folder / f"{name}.tokens"
    part: Part = getattr(header, name)
    dtype = DTYPES[header.dtype]
    expected = part.tokens * dtype.itemsize
    if not path.is_file():
        raise TrainError(f"--data: {path} is missing or not a file. Mend: prepare it again")
    if path.stat().st_size != expected:
        raise TrainError(
            f"--data: {path} has {path.stat().st_size} bytes, expected {part.tokens} tokens of "
            f"{dtype.itemsize} bytes = {expected}. Mend: prepare it again"
        )
    if sys.byteorder != "little" and dtype.itemsize > 1:
        raise TrainError(f"--data: {path} is little-endian, and this machine is not")
    if part.tokens <= 0:
        return torch.empty(0, dtype=dtype)
    tokens = torch.from_file(str(path), shared=False, size=part.tokens, dtype=dtype)
    if verify or (verify is None and expected <= CHECKED):
        _verify(path, part, header, tokens)
    return tokens


def _verify(path: Path, part: Part, header: Header, tokens: Tensor) -> None:
    digest, largest = hashlib.sha256(), 0
    for chunk in tokens.split(1 << 22):
        digest.update(chunk.numpy())
        largest = max(largest, int(chunk.long().max()))
    if digest.hexdigest() != part.sha256:
        raise TrainError(
            f"--data: {path} is damaged: its SHA-256 is not that in {HEADER}. Mend: prepare it again"
        )
    if largest >= header.vocab_size:
        raise TrainError(
            f"--data: {path} holds the token id {largest}, expected ids below vocab_size = "
            f"{header.vocab_size}"
        )
