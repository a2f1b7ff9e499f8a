"""Checkpoints that are either whole or not there, written by all ranks, read by any number of them.

    folder/latest                              the name of the checkpoint to go on from
    folder/step-000200/rank-00000.safetensors  a rank's pieces, one-dimensional, a file a rank
    folder/step-000200/manifest.json           state (step, settings) and where each tensor's pieces are
    folder/step-000200/SHA256SUMS              of all of them, as `sha256sum -c` reads it

A piece is a range of a whole tensor, flattened; a tensor's pieces cover it once. So a run may go on with any
other number of processes. A checkpoint is written into a hidden folder beside, flushed to the disk, renamed,
and only then named in `latest`; older ones are removed after that. Whatever moment a process dies, `latest`
names a whole one. Nothing here is ever unpickled or evaluated.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.parallel.groups import gather, rank_in, size_of
from dsv3_kernels.train.state.optimizer import Piece

FORMAT = 2
_NAME = re.compile(r"step-\d{6,}")
_MANIFEST, _SUMS = "manifest.json", "SHA256SUMS"
_DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8)}


def save(
    folder: Path,
    step: int,
    pieces: Mapping[str, Piece],
    state: dict[str, Any],
    keep: int,
    group: "dist.ProcessGroup | None" = None,
) -> Path:
    """Publishes the state of a step; keeps the newest `keep` checkpoints. On an error the old ones stay.

    pieces: of this rank, on the CPU. group: the ranks that save together, each with the same other arguments.
    Every rank raises TrainError where one of them could not write.
    """
    target = folder / f"step-{step:06d}"
    writing = folder / f".writing-{target.name}"
    rank = rank_in(group)
    there: list[bool] = []

    def prepare() -> None:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if target.exists() and _latest(folder) == target.name:
                there.append(True)  # the run stopped right where a checkpoint was due
                return
            for stale in folder.glob(".writing-*"):
                shutil.rmtree(stale)
            if target.exists():
                shutil.rmtree(target)  # left by a process that died before `latest` named it
            writing.mkdir()

    def write() -> dict[str, Any]:
        name = f"rank-{rank:05d}.safetensors"
        safetensors.torch.save_file({n: p.values.contiguous() for n, p in pieces.items()}, writing / name)
        _flush(writing / name)
        entries = {
            n: [str(p.values.dtype), list(p.shape), p.first, p.values.numel()] for n, p in pieces.items()
        }
        return {"file": name, "sha256": _sha256(writing / name), "pieces": entries}

    def publish() -> None:
        if rank:
            return
        manifest = {"format": FORMAT, "state": state, "tensors": _join(parts)}
        _write(writing / _MANIFEST, (json.dumps(manifest) + "\n").encode())
        sums = {part["file"]: part["sha256"] for part in parts} | {_MANIFEST: _sha256(writing / _MANIFEST)}
        _write(writing / _SUMS, _lines(sums).encode())
        _flush(writing)
        writing.rename(target)
        _flush(folder)
        replace_file(folder / "latest", f"{target.name}\n".encode())

    try:
        _together(prepare, group)
        if any(gather(bool(there), group)):
            return target
        parts = _together(write, group)
        _together(publish, group)
    except TrainError as error:
        if rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
        kept = _latest(folder)
        raise TrainError(
            f"cannot save the checkpoint {target}: {error}. "
            + (f"The previous one, {folder / kept}, is untouched" if kept else "There was none before it")
        ) from error
    if rank == 0:
        for old in sorted(_steps(folder), reverse=True)[keep:]:
            if old != step:
                shutil.rmtree(folder / f"step-{old:06d}", ignore_errors=True)
    return target


def _lines(sums: Mapping[str, str]) -> str:
    """Digests by file name, as sha256sum writes them."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def _together(part: Callable[[], Any], group: "dist.ProcessGroup | None") -> list[Any]:
    """What part gave on each rank; raises TrainError on all ranks where it failed on one."""
    error: str | None = None
    result = None
    try:
        result = part()
    except (OSError, SafetensorError, TrainError) as caught:
        error = str(caught)
    every = gather([error, result], group)
    for rank, (failed, _) in enumerate(every):
        if failed is not None:
            raise TrainError(f"rank {rank}: {failed}" if len(every) > 1 else failed)
    return [result for _, result in every]


def _join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's tensors by name: dtype, shape, and [file, first, count] of the pieces."""
    tensors: dict[str, Any] = {}
    for part in parts:
        for name, (dtype, shape, first, count) in part["pieces"].items():
            entry = tensors.setdefault(name, {"dtype": dtype, "shape": shape, "pieces": []})
            entry["pieces"].append([part["file"], first, count])
    for name, entry in tensors.items():
        _check_cover(name, entry)
    return tensors


def _check_cover(name: str, entry: dict[str, Any]) -> None:
    end = 0
    for _, first, count in sorted(entry["pieces"], key=lambda piece: (piece[1], piece[2])):
        if first != end:
            raise TrainError(f"the pieces of {name} leave a gap or overlap at element {min(first, end)}")
        end += count
    if end != math.prod(entry["shape"]):
        raise TrainError(f"the pieces of {name} hold {end} elements, expected {math.prod(entry['shape'])}")


class Checkpoint:
    """One on the disk, every byte of it checked; tensors are read when they are asked for."""

    def __init__(self, folder: Path, group: "dist.ProcessGroup | None" = None) -> None:
        """The one that folder's `latest` names. The ranks of the group divide the checking of its files."""
        name = gather(_latest(folder), group)[0]
        if name is None:
            raise TrainError(f"found no checkpoint in {folder}: {folder / 'latest'} is missing or damaged")
        self.path = folder / name
        others = [f"step-{step:06d}" for step in sorted(_steps(folder), reverse=True)]
        mend = "".join(f". Mend: write {other} into {folder / 'latest'}" for other in others if other != name)

        def check() -> None:
            self._check(rank_in(group), size_of(group))

        try:
            _together(check, group)
        except TrainError as error:
            raise TrainError(f"{error}{mend}") from error

    def _check(self, rank: int, ranks: int) -> None:
        try:
            if (self.path / "state.json").exists() and not (self.path / _MANIFEST).exists():
                raise TrainError(
                    f"the checkpoint {self.path} is of format 1, an earlier version's, expected {FORMAT}. "
                    "Mend: train again, or load it with the version that wrote it"
                )
            text = (self.path / _SUMS).read_bytes().decode("ascii", "replace")
            sums = {line[66:]: line[:64] for line in text.split("\n")[:-1]}
            files = {path.name for path in self.path.iterdir()} - {_SUMS}
            if text != _lines(sums) or sums.keys() != files or _MANIFEST not in files:
                raise self._damaged()
            for index, name in enumerate(sorted(files)):
                mine = index % ranks == rank or name == _MANIFEST
                if mine and _sha256(self.path / name) != sums[name]:
                    raise self._damaged()
            manifest = json.loads((self.path / _MANIFEST).read_bytes())
            self.state, self._tensors = _manifest(manifest, files)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise TrainError(f"cannot load the checkpoint {self.path}: {error}") from error

    def _damaged(self) -> TrainError:
        return TrainError(f"the checkpoint {self.path} is damaged: its {_SUMS} do not match its files")

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Whole tensors whose names begin so."""
        found = {}
        for name, entry in self._tensors.items():
            if name.startswith(prefix):
                shape = torch.Size(entry["shape"])
                found[name] = torch.empty(shape, dtype=_DTYPES[entry["dtype"]])
        self.read({name: Piece(tensor.view(-1), 0, tensor.shape) for name, tensor in found.items()}, None)
        return found

    def read(self, targets: Mapping[str, Piece], expected: "set[str] | None") -> None:
        """Fills the pieces, once every name, shape and dtype is found to be as expected.

        expected: the names of all tensors, those of other ranks too; None leaves that open.
        """
        where = f"the checkpoint {self.path}"
        names = set(targets) if expected is None else expected
        missing, unknown = sorted(names - self._tensors.keys()), sorted(self._tensors.keys() - names)
        if missing or (unknown and expected is not None):
            raise TrainError(f"{where}: missing tensors {missing[:5]}, unknown tensors {unknown[:5]}")
        for name, piece in targets.items():
            entry = self._tensors[name]
            found, want = (entry["dtype"], entry["shape"]), (str(piece.values.dtype), list(piece.shape))
            if found != want:
                raise TrainError(f"{where}: tensor {name} is {found}, expected {want}")
        try:
            with contextlib.ExitStack() as stack:
                files: dict[str, Any] = {}
                for name, piece in targets.items():
                    for file, first, count in self._tensors[name]["pieces"]:
                        low, high = (
                            max(first, piece.first),
                            min(first + count, piece.first + piece.values.numel()),
                        )
                        if low >= high:
                            continue
                        if file not in files:
                            files[file] = stack.enter_context(safe_open(self.path / file, framework="pt"))
                        part = files[file].get_slice(name)
                        if part.get_shape() != [count] or high - low > count:
                            raise TrainError(f"{where}: {name} in {file} is not as its {_MANIFEST} says")
                        values = part[low - first : high - first]
                        piece.values[low - piece.first : high - piece.first].copy_(values)
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainError(f"cannot load {where}: {error}") from error


def _manifest(value: Any, files: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and tensors of a manifest, whose every field is checked."""
    if not isinstance(value, dict) or value.keys() != {"format", "state", "tensors"}:
        raise ValueError(f"{_MANIFEST} is not an object of format, state and tensors")
    if value["format"] != FORMAT:
        raise ValueError(f"{_MANIFEST} has format {value['format']!r}, expected {FORMAT}")
    if not isinstance(value["state"], dict) or not isinstance(value["tensors"], dict):
        raise ValueError(f"{_MANIFEST}: state and tensors must be objects")
    for name, entry in value["tensors"].items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "pieces"}:
            raise ValueError(f"{_MANIFEST}: {name} is not an object of dtype, shape and pieces")
        if (
            entry["dtype"] not in list(_DTYPES)
            or not _sizes(entry["shape"])
            or not isinstance(entry["pieces"], list)
        ):
            raise ValueError(f"{_MANIFEST}: {name} has a dtype, shape or pieces that are not such")
        for piece in entry["pieces"]:
            known = isinstance(piece, list) and len(piece) == 3 and isinstance(piece[0], str)
            if not known or piece[0] not in files or not _sizes(piece[1:]):
                raise ValueError(
                    f"{_MANIFEST}: {name} has the piece {piece!r}, expected [file, first, count]"
                )
        _check_cover(name, entry)
    return value["state"], value["tensors"]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file's content so that a reader, or a crash, sees the old or the new, never a part."""
    writing = path.with_name(f".{path.name}.writing")
    try:
        _write(writing, data)
        writing.replace(path)
        _flush(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            writing.unlink(missing_ok=True)
        raise


def exists(folder: Path) -> bool:
    """Whether a checkpoint was ever written there."""
    return any(folder.glob("step-*"))


def _latest(folder: Path) -> str | None:
    try:
        name = (folder / "latest").read_text("ascii")
    except (OSError, ValueError):
        return None
    return name.strip() if _NAME.fullmatch(name.strip()) else None


def _steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in folder.iterdir() if _NAME.fullmatch(path.name)]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """fsync of a file written by someone else, or of a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
