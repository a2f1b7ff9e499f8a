"""Checkpoints that are either whole or not there.

    folder/latest                      the name of the checkpoint to go on from
    folder/step-000200/tensors.safetensors
    folder/step-000200/state.json      step, data position, settings
    folder/step-000200/SHA256SUMS      of both, as `sha256sum -c` reads it

A checkpoint is written into a hidden folder beside, flushed to the disk, renamed, and only then named in
`latest`; older ones are removed after that. Whatever moment the process dies, `latest` names a whole one.
Nothing here is ever unpickled or evaluated.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dsv3_kernels.train.errors import TrainError

_FILES = ("state.json", "tensors.safetensors")
_NAME = re.compile(r"step-\d{6,}")


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Publishes the state of a step; keeps the newest `keep` checkpoints. On an error the old ones stay."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:06d}"
    if target.exists():
        if _latest(folder) == target.name:
            return target  # the run stopped right where a checkpoint was due
        shutil.rmtree(target)  # left by a process that died before `latest` named it
    for stale in folder.glob(".writing-*"):
        shutil.rmtree(stale)
    writing = folder / f".writing-{target.name}"
    try:
        writing.mkdir()
        _write(writing / "state.json", (json.dumps(state, indent=1) + "\n").encode())
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, writing / "tensors.safetensors")
        _flush(writing / "tensors.safetensors")
        _write(writing / "SHA256SUMS", _checksums(writing))
        _flush(writing)
        writing.rename(target)
        _flush(folder)
        replace_file(folder / "latest", f"{target.name}\n".encode())
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        kept = _latest(folder)
        raise TrainError(
            f"cannot save the checkpoint {target}: {error}. "
            + (f"The previous one, {folder / kept}, is untouched" if kept else "There was none before it")
        ) from error
    for old in sorted(_steps(folder), reverse=True)[keep:]:
        if old != step:
            shutil.rmtree(folder / f"step-{old:06d}", ignore_errors=True)
    return target


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of the checkpoint that `latest` names, every byte of it checked."""
    name = _latest(folder)
    if name is None:
        raise TrainError(f"found no checkpoint in {folder}: {folder / 'latest'} is missing or damaged")
    checkpoint = folder / name
    others = [f"step-{step:06d}" for step in sorted(_steps(folder), reverse=True)]
    mend = "".join(f". Mend: write {other} into {folder / 'latest'}" for other in others if other != name)
    try:
        if (checkpoint / "SHA256SUMS").read_bytes() != _checksums(checkpoint):
            raise TrainError(
                f"the checkpoint {checkpoint} is damaged: its SHA256SUMS do not match its files{mend}"
            )
        state = json.loads((checkpoint / "state.json").read_bytes())
        tensors = safetensors.torch.load_file(checkpoint / "tensors.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainError(f"cannot load the checkpoint {checkpoint}: {error}{mend}") from error
    if not isinstance(state, dict):
        raise TrainError(f"{checkpoint / 'state.json'}: found {type(state).__name__}, expected an object")
    return tensors, state


def copy_checked(source: dict[str, Tensor], target: dict[str, Tensor], where: str) -> None:
    """Copies source into target, once every name, shape and dtype is found to be the same in both."""
    if source.keys() != target.keys():
        missing, unknown = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
        raise TrainError(f"{where}: missing tensors {missing[:5]}, unknown tensors {unknown[:5]}")
    for name, tensor in target.items():
        found, expected = (source[name].dtype, source[name].shape), (tensor.dtype, tensor.shape)
        if found != expected:
            raise TrainError(f"{where}: tensor {name} is {found}, expected {expected}")
    for name, tensor in target.items():
        tensor.copy_(source[name])


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


def _latest(folder: Path) -> str | None:
    try:
        name = (folder / "latest").read_text("ascii")
    except (OSError, ValueError):
        return None
    return name.strip() if _NAME.fullmatch(name.strip()) else None


def _steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in folder.iterdir() if _NAME.fullmatch(path.name)]


def _checksums(checkpoint: Path) -> bytes:
    lines = []
    for name in _FILES:
        with open(checkpoint / name, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        lines.append(f"{digest.hexdigest()}  {name}\n")
    return "".join(lines).encode()


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
