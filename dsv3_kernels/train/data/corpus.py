"""Text or prepared tokens: read, split into training and validation, cut into windows in a seed's order.

Documents stand one after the other and windows are cut without regard to them: a window may hold the end of
one and the beginning of the next, and attention sees both.
"""

import hashlib
import os
import sysconfig
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dsv3_kernels.train.data.tokenizer import Bytes, Tokenizer
from dsv3_kernels.train.data.tokens import HEADER, map_part, read_header, read_tokenizer
from dsv3_kernels.train.errors import TrainError

SEPARATOR = b"\0"
"""Stands before each file; text files do not contain it."""
VALIDATION_SHARE = 20
"""One file in so many is held out (or the last part of the text, if that leaves a side too short)."""
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # token ids, one dimension: uint8, or as prepared
    validation: Tensor
    source: str
    skipped: int  # files in the folder that are not text
    sha256: str  # of both parts
    vocab_size: int = 256
    unit: str = "byte"
    tokenizer: Tokenizer = field(default_factory=Bytes)


def load_corpus(path: str | None, window: int) -> Corpus:
    """A file or folder of text as bytes, a folder of prepared tokens, or (None) the standard library's .py.

    window: how many tokens a training sample takes; each part must hold one.
    """
    if path is not None and (Path(path) / HEADER).exists():
        return _prepared(Path(path), window)
    root, names = text_files(path)
    texts: dict[Path, bytes] = {}
    binary = []
    for name in names:
        text = read_text(root / name)
        if text is None:
            binary.append(root / name)
        else:
            texts[name] = text
    if not any(texts.values()):
        raise TrainError(f"--data: {no_text(root, binary)}")
    train, validation = _split(texts, window)
    _require_window(root, len(train), len(validation), "bytes", window)
    digest = hashlib.sha256(train)
    digest.update(validation)
    return Corpus(_tensor(train), _tensor(validation), str(root), len(binary), digest.hexdigest())


def _prepared(folder: Path, window: int) -> Corpus:
    header = read_header(folder)
    tokenizer = read_tokenizer(folder, header)
    train, validation = (map_part(folder, name, header) for name in ("train", "validation"))
    _require_window(folder, len(train), len(validation), "tokens", window)
    digest = hashlib.sha256((header.train.sha256 + header.validation.sha256).encode()).hexdigest()
    unit = "byte" if header.tokenizer == "bytes" else "token"
    return Corpus(train, validation, str(folder), 0, digest, header.vocab_size, unit, tokenizer)


def _require_window(root: Path, train: int, validation: int, unit: str, window: int) -> None:
    if min(train, validation) < window:
        raise TrainError(
            f"--data: {root} gives {train} {unit} to train and {validation} to validate, expected "
            f"at least one window of {window} in each. Mend: more text, or a smaller --seq-len"
        )


def text_files(path: str | None) -> tuple[Path, list[Path]]:
    """A root and the files under it that may be text, in a fixed order; None: the standard library's .py."""
    if path is not None:
        return _given(Path(path))
    root = Path(sysconfig.get_path("stdlib"))
    names = [name for name in _files(root) if name.suffix == ".py" and not _NOT_LIBRARY & set(name.parts)]
    if not names:
        raise TrainError(
            f"found no .py files in {root}: this Python has no library sources. Mend: --data PATH"
        )
    return root, names


def no_text(root: Path, binary: list[Path]) -> str:
    """What is wrong with a root none of whose files hold text."""
    if binary:
        return f"{binary[0]} is binary, expected UTF-8 text"
    return f"{root} holds no text (all files are empty)"


def _given(path: Path) -> tuple[Path, list[Path]]:
    if path.is_dir():
        names = _files(path)
        if not names:
            raise TrainError(f"--data: {path} is an empty folder, expected text files in it")
        return path, names
    if not path.exists():
        raise TrainError(f"--data: {path} does not exist")
    if not path.is_file():
        raise TrainError(f"--data: {path} is neither a file nor a folder")
    return path, [Path()]


def _files(root: Path) -> list[Path]:
    """Every regular, not hidden file under root, relative to it, in an order that no file system changes."""

    def fail(error: OSError) -> None:
        raise TrainError(f"--data: cannot list {error.filename}: {error.strerror}") from error

    found = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path.relative_to(root) for path in paths if path.is_file()]
    return sorted(found, key=lambda path: path.as_posix())


def read_text(path: Path) -> bytes | None:
    """None for a file that is not UTF-8, or has a zero byte."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainError(f"--data: cannot read {path}: {error.strerror}") from error
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if SEPARATOR in data else data


def held_out(name: Path) -> bool:
    """Whether a file is for validation: by its name alone, so that adding a file moves no other."""
    return zlib.crc32(name.as_posix().encode("utf-8", "surrogateescape")) % VALIDATION_SHARE == 0


def _split(texts: dict[Path, bytes], window: int) -> tuple[bytes, bytes]:
    """Splits by file, or by place where that leaves a side too short."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name, text in texts.items():
        parts[held_out(name)].append(SEPARATOR + text)
    train, validation = (b"".join(part) for part in parts)
    if min(len(train), len(validation)) >= window:
        return train, validation
    everything = b"".join(SEPARATOR + text for text in texts.values())
    cut = len(everything) - max(window, len(everything) // VALIDATION_SHARE)
    return everything[: max(cut, 0)], everything[max(cut, 0) :]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class Batches:
    """Training windows as a function of the sample's number: going on after a stop needs no other state.

    Sample i is the same window whoever asks: the ranks of a data-parallel step take parts of its range.
    Each epoch cuts the text at a new offset and takes the windows in a new order, both drawn from (seed,
    epoch).
    """

    def __init__(
        self, text: Tensor, window: int, batch_size: int, seed: int, vocab_size: int | None = None
    ) -> None:
        """vocab_size: ids from there on are an error; files past `tokens.CHECKED` are not read before."""
        self.vocab_size = vocab_size
        self.text, self.window, self.batch_size, self.seed = text, window, batch_size, seed
        # One fewer than fit, which leaves room to begin anywhere within the first.
        self.windows = max(1, text.numel() // window - 1)
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """int64 [batch_size, window]."""
        return self.samples(step * self.batch_size, self.batch_size)

    def samples(self, first: int, count: int) -> Tensor:
        """Samples first to first + count: int64 [count, window]."""
        starts = [self._start(sample) for sample in range(first, first + count)]
        rows = _windows(self.text, starts, self.window)
        if self.vocab_size is not None and rows.numel() and int(rows.max()) >= self.vocab_size:
            raise TrainError(
                f"--data: samples {first} to {first + count - 1} hold the token id {int(rows.max())}, "
                f"expected ids below {self.vocab_size}. See python -m dsv3_kernels.train.prepare --verify"
            )
        return rows

    def _start(self, sample: int) -> int:
        epoch, index = divmod(sample, self.windows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            spare = self.text.numel() - self.windows * self.window
            offset = int(torch.randint(spare + 1, (), generator=generator))
            self._starts = torch.randperm(self.windows, generator=generator) * self.window + offset
            self._epoch = epoch
        return int(self._starts[index])


def validation_windows(text: Tensor, window: int, count: int) -> Tensor:
    """At most `count` windows spread evenly over the text: int64 [n, window]."""
    count = min(count, text.numel() // window)
    starts = torch.linspace(0, text.numel() - window, count, dtype=torch.float64).long()
    return _windows(text, starts.tolist(), window)


def _windows(text: Tensor, starts: list[int], window: int) -> Tensor:
    rows = [text[start : start + window].long() for start in starts]
    return torch.stack(rows) if rows else torch.empty(0, window, dtype=torch.int64)
