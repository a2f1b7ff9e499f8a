"""The compile cache: a database of executables in one folder, shared by all processes of one user.

An entry is a file named by its key, a full SHA-256. It is written to a temporary file, synced and renamed, so
a reader needs no lock: it sees a whole entry or none. Builders of one key exclude each other by flock, which
the system drops when a process dies. An entry is believed only if it is our own regular file, writable by
nobody else, and if the digest in its first line is that of its key, facts and content; all else is rebuilt.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = "DSV3_KERNELS_CACHE"
FORMAT = 1
_MAGIC = f"dsv3_kernels cache {FORMAT} ".encode()
_LOCK_TIMEOUT = 300.0  # seconds to wait for another process that builds the same key

_log = logging.getLogger("dsv3_kernels")
_warned: set[str] = set()


class CacheError(RuntimeError):
    """The cache folder cannot be trusted with executables; the message says why and how to mend it."""


@dataclass(frozen=True)
class Entry:
    """What a key stands for: `content` and JSON-able facts about it."""

    facts: dict[str, object]
    content: bytes


@dataclass(frozen=True)
class Usage:
    path: Path
    entries: int
    bytes: int


def default_path() -> Path:
    """$DSV3_KERNELS_CACHE, else dsv3_kernels in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dsv3_kernels"


def key_of(*parts: str) -> str:
    """The SHA-256 of the parts; no two lists of parts share one, because each is preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def get_or_build(key: str, build: Callable[[], Entry], path: Path | None = None) -> Entry:
    """The entry of `key`, built at most once by all processes together.

    A folder that cannot be used (read-only, full disk) costs one warning, and the entry is built uncached.
    Raises `CacheError` if others could write to the folder, and whatever `build` raises.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_open_folder(path or default_path()))
            entry = _read(folder, key)
            if entry is None:
                stack.enter_context(_lock(folder, key))
                entry = _read(folder, key)  # built while we waited for the lock
        except OSError as error:
            _warn(error, path)
            return build()
        if entry is None:
            entry = build()
            try:
                _write(folder, key, entry)
            except OSError as error:
                _warn(error, path)
        return entry


def usage(path: Path | None = None) -> Usage:
    """What the folder holds. Raises `OSError` if it is not there, `CacheError` if it cannot be trusted."""
    path = path or default_path()
    with _open_folder(path, create=False) as folder:
        sizes = [os.stat(name, dir_fd=folder, follow_symlinks=False).st_size for name in os.listdir(folder)]
        entries = [name for name in os.listdir(folder) if "." not in name]
    return Usage(path, len(entries), sum(sizes))


def _warn(error: OSError, path: Path | None) -> None:
    reason = os.strerror(error.errno) if error.errno else str(error)
    message = (
        f"kernel cache {path or default_path()} is not usable ({reason}): compiling without it. "
        f"Mend: set {ENVIRONMENT} to a folder that can be written"
    )
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)


@contextlib.contextmanager
def _open_folder(path: Path, create: bool = True) -> Iterator[int]:
    """A descriptor of the folder. All else happens relative to it, so nobody can swap the folder under us."""
    if create:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        status = os.fstat(folder)
        if status.st_uid != os.geteuid():
            raise CacheError(
                f"kernel cache {path} belongs to user {status.st_uid}, expected {os.geteuid()} (you), "
                f"because what it holds is run. Mend: set {ENVIRONMENT} to a folder of your own"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CacheError(
                f"kernel cache {path} has mode {stat.S_IMODE(status.st_mode):04o}, expected 0700: "
                f"others could plant code in it. Mend: chmod 700 {path}"
            )
        yield folder
    finally:
        os.close(folder)


@contextlib.contextmanager
def _lock(folder: int, key: str) -> Iterator[None]:
    """Holds the key's lock. The file stays: removing it would let two holders lock two files of one name."""
    lock = os.open(f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        pause = 0.001
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        yield
    finally:
        os.close(lock)


def _digest(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + body).hexdigest().encode()


def _read(folder: int, key: str) -> Entry | None:
    """The entry, or None if there is none that can be trusted."""
    try:
        # Without O_NONBLOCK a planted fifo would hold us for ever.
        file = os.open(key, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    with open(file, "rb") as stream:
        status = os.fstat(file)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if not ours or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        head, _, body = stream.read().partition(b"\n")
    if head != _MAGIC + _digest(key, body):
        return None
    facts, _, content = body.partition(b"\n")
    return Entry(json.loads(facts), content)


def _write(folder: int, key: str, entry: Entry) -> None:
    """Puts the entry in place, durably and in one step. The caller holds the key's lock."""
    for name in os.listdir(folder):  # whoever left these died: we hold the lock
        if name.startswith(key) and name.endswith(".tmp"):
            os.unlink(name, dir_fd=folder)
    body = json.dumps(entry.facts).encode() + b"\n" + entry.content
    temporary = f"{key}.{secrets.token_hex(8)}.tmp"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    try:
        with open(file, "wb") as stream:
            stream.write(_MAGIC + _digest(key, body) + b"\n" + body)
            stream.flush()
            os.fsync(file)
        os.replace(temporary, key, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    os.fsync(folder)
