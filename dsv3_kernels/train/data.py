"""Text as bytes: read, split into training and validation, cut into windows in an order that a seed fixes."""

import hashlib
import os
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3_kernels.train.errors import TrainError

SEPARATOR = b"\0"
"""Stands before each file; text files do not contain it."""
VALIDATION_SHARE = 20
"""One file in so many is held out (or the last part of the text, if that leaves a side too short)."""
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # uint8, one dimension
    validation: Tensor
    source: str
    skipped: int  # files in the folder that are not text
    sha256: str  # of both parts


def load_corpus(path: str | None, window: int) -> Corpus:
    """Reads a file, a folder of text files, or (None) the .py files of the running Python's standard library.

    window: how many bytes a training sample takes; each part must hold one.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        names = [name for name in _files(root) if name.suffix == ".py" and not _NOT_LIBRARY & set(name.parts)]
        if not names:
            raise TrainError(
                f"found no .py files in {root}: this Python has no library sources. Mend: --data PATH"
            )
    else:
        root, names = _given(Path(path))
    texts: dict[Path, bytes] = {}
    binary = []
    for name in names:
        text = _read(root / name)
        if _is_text(text):
            texts[name] = text
        else:
            binary.append(root / name)
    if not any(texts.values()):
        what = (
            f"{binary[0]} is binary, expected UTF-8 text"
            if binary
            else f"{root} holds no text (all files are empty)"
        )
        raise TrainError(f"--data: {what}")
    train, validation = _split(texts, window)
    if min(len(train), len(validation)) < window:
        raise TrainError(
            f"--data: {root} gives {len(train)} bytes to train and {len(validation)} to validate, expected "
            f"at least one window of {window} in each. Mend: more text, or a smaller --seq-len"
        )
    digest = hashlib.sha256(train)
    digest.update(validation)
    return Corpus(_tensor(train), _tensor(validation), str(root), len(binary), digest.hexdigest())


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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainError(f"--data: cannot read {path}: {error.strerror}") from error


def _is_text(data: bytes) -> bool:
    if SEPARATOR in data:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _split(texts: dict[Path, bytes], window: int) -> tuple[bytes, bytes]:
    """Splits by file, on the hash of its name, so that adding a file moves no other to the other side."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name, text in texts.items():
        held_out = zlib.crc32(name.as_posix().encode("utf-8", "surrogateescape")) % VALIDATION_SHARE == 0
        parts[held_out].append(SEPARATOR + text)
    train, validation = (b"".join(part) for part in parts)
    if min(len(train), len(validation)) >= window:
        return train, validation
    everything = b"".join(SEPARATOR + text for text in texts.values())
    cut = len(everything) - max(window, len(everything) // VALIDATION_SHARE)
    return everything[: max(cut, 0)], everything[max(cut, 0) :]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class Batches:
    """Training batches as a function of the step alone: going on after a stop needs no other state.

    Each epoch cuts the text at a new offset and takes the windows in a new order, both drawn from (seed,
    epoch).
    """

    def __init__(self, text: Tensor, window: int, batch_size: int, seed: int) -> None:
        self.text, self.window, self.batch_size, self.seed = text, window, batch_size, seed
        # One fewer than fit, which leaves room to begin anywhere within the first.
        self.windows = max(1, text.numel() // window - 1)
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """int64 [batch_size, window]."""
        first = step * self.batch_size
        starts = [self._start(sample) for sample in range(first, first + self.batch_size)]
        return torch.stack([self.text[s : s + self.window] for s in starts]).long()

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
    return torch.stack([text[s : s + window] for s in starts.tolist()]).long()
