"""The compile cache: one build a key among cold processes; nothing damaged or foreign is ever believed."""

import errno
import fcntl
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv3_kernels.jit import cache

ROOT = Path(__file__).parents[1]
KEY = cache.key_of("a key")
ENTRY = cache.Entry({"name": "k", "registers": 32}, b"\x7fELF\n\0 the machine code \n\n")


not_root = pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")


class Builder:
    def __init__(self, entry=ENTRY):
        self.entry, self.builds = entry, 0

    def __call__(self):
        self.builds += 1
        return self.entry


@pytest.fixture
def folder(tmp_path):
    cache._warned.clear()
    return tmp_path / "cache"


def get(folder, build, key=KEY):
    return cache.get_or_build(key, build, folder)


def rebuilds(folder):
    """Whether the next reader rebuilds; it gets the right entry either way, and so does the one after it."""
    build = Builder()
    assert get(folder, build) == ENTRY
    untouched = Builder(cache.Entry({}, b"not this one"))
    assert get(folder, untouched) == ENTRY
    assert untouched.builds == 0
    return build.builds == 1


def give_away(path):
    try:
        os.chown(path, 12345, 12345)
    except PermissionError:
        pytest.skip("only root can give files away")


def test_an_entry_is_built_once_and_kept_privately(folder):
    assert rebuilds(folder)
    assert not rebuilds(folder)
    assert get(folder, Builder(cache.Entry({}, b"")), cache.key_of("other")) == cache.Entry({}, b"")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / KEY).stat().st_mode) == 0o600
    assert sorted(path.suffix for path in folder.iterdir()) == ["", "", ".lock", ".lock"]
    assert cache.usage(folder).entries == 2
    assert cache.usage(folder).bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_every_truncation_is_rebuilt(folder):
    get(folder, Builder())
    whole = (folder / KEY).read_bytes()
    for length in range(len(whole)):
        (folder / KEY).write_bytes(whole[:length])
        assert rebuilds(folder), f"cut to {length} of {len(whole)} bytes"
    (folder / KEY).write_bytes(whole + b"x")
    assert rebuilds(folder)
    assert (folder / KEY).read_bytes() == whole


def test_every_bit_flip_is_rebuilt(folder, seed):
    get(folder, Builder())
    whole = (folder / KEY).read_bytes()
    bits = range(8 * len(whole))
    for bit in random.Random(seed).sample(bits, 300):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / KEY).write_bytes(damaged)
        assert rebuilds(folder), f"bit {bit}"


def test_an_entry_of_another_key_or_format_is_not_taken(folder):
    other = cache.key_of("other")
    get(folder, Builder(cache.Entry({}, b"other")), other)
    os.replace(folder / other, folder / KEY)
    assert rebuilds(folder)
    head, _, body = (folder / KEY).read_bytes().partition(b"\n")
    newer = head.replace(b"cache %d" % cache.FORMAT, b"cache %d" % (cache.FORMAT + 1))
    assert newer != head
    (folder / KEY).write_bytes(newer + b"\n" + body)
    assert rebuilds(folder)


UNREADABLE = pytest.param("unreadable", marks=not_root)


@pytest.mark.parametrize("kind", ["symlink", "dangling", "fifo", "others may write", UNREADABLE, "foreign"])
def test_an_entry_that_is_not_our_own_file_is_rebuilt(folder, tmp_path, kind):
    get(folder, Builder())
    entry = folder / KEY
    if kind in ("symlink", "dangling"):
        target = tmp_path / "target"
        if kind == "symlink":
            target.write_bytes(entry.read_bytes())
        entry.unlink()
        entry.symlink_to(target)
    elif kind == "fifo":
        entry.unlink()
        os.mkfifo(entry)
    elif kind == "others may write":
        entry.chmod(0o622)
    elif kind == "unreadable":
        entry.chmod(0)
    else:
        give_away(entry)
    assert rebuilds(folder)
    assert entry.is_file() and not entry.is_symlink()
    assert entry.stat().st_uid == os.geteuid()
    if kind == "dangling":
        assert not (tmp_path / "target").exists(), "wrote through a symbolic link"


def test_a_folder_in_the_place_of_an_entry_costs_a_warning_only(folder, caplog):
    get(folder, Builder())
    (folder / KEY).unlink()
    (folder / KEY).mkdir()
    build = Builder()
    assert get(folder, build) == get(folder, build) == ENTRY
    assert build.builds == 2
    assert len(caplog.records) == 1


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_can_write_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    build = Builder()
    message = rf"has mode {mode:04o}, expected 0700.*Mend: chmod 700 {folder}"
    with pytest.raises(cache.CacheError, match=message):
        get(folder, build)
    with pytest.raises(cache.CacheError, match=message):
        cache.usage(folder)
    assert build.builds == 0
    folder.chmod(0o700)
    assert rebuilds(folder)


def test_a_folder_of_another_user_is_refused(folder):
    folder.mkdir(mode=0o700)
    give_away(folder)
    with pytest.raises(cache.CacheError, match=r"belongs to user 12345, expected \d+ .*DSV3_KERNELS_CACHE"):
        get(folder, Builder())


def test_a_symbolic_link_to_a_folder_of_ours_is_followed(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert rebuilds(folder)
    assert not rebuilds(folder)
    (tmp_path / "elsewhere").chmod(0o777)
    with pytest.raises(cache.CacheError, match="mode 0777"):
        get(folder, Builder())


def test_the_folder_may_vanish_at_any_time(folder):
    rebuilds(folder)
    clear(folder)
    folder.rmdir()
    assert rebuilds(folder)


@pytest.mark.parametrize("place", ["a file in the way", "no such device"])
def test_an_unusable_place_costs_one_warning(tmp_path, caplog, place):
    cache._warned.clear()
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "cache" if place == "a file in the way" else Path("/proc/no/cache")
    build = Builder()
    assert get(path, build) == get(path, build) == ENTRY
    assert build.builds == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert message.startswith(f"kernel cache {path} is not usable (")
    assert "compiling without it" in message and "DSV3_KERNELS_CACHE" in message and "\n" not in message


@not_root
def test_a_read_only_folder_is_read(folder, caplog):
    get(folder, Builder())
    folder.chmod(0o500)
    assert not rebuilds(folder)
    build = Builder()
    assert get(folder, build, cache.key_of("other")) == ENTRY
    assert build.builds == len(caplog.records) == 1


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_full_disk_costs_one_warning_and_leaves_no_temporary_file(folder, monkeypatch, caplog, call):
    rebuilds(folder)
    (folder / KEY).write_bytes(b"damaged")
    real_open = os.open

    def full(*args, **kwargs):
        if call == "open" and not (args[1] & os.O_CREAT and args[0].endswith(".tmp")):
            return real_open(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    build = Builder()
    assert get(folder, build) == get(folder, build) == ENTRY
    assert build.builds == 2
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []
    assert rebuilds(folder)


def test_an_error_of_the_build_is_passed_on_and_nothing_is_kept(folder, caplog):
    class Broken(OSError):
        pass

    def broken():
        raise Broken("the compiler's own trouble")

    for _ in range(2):
        with pytest.raises(Broken, match="own trouble"):
            get(folder, broken)
    assert not caplog.records
    assert not (folder / KEY).exists()
    assert rebuilds(folder), "the lock was released"


def test_what_dead_writers_left_is_cleared_away(folder):
    get(folder, Builder())
    (folder / KEY).unlink()
    leftovers = [folder / f"{KEY}.{i:016x}.tmp" for i in range(3)]
    other = folder / f"{cache.key_of('other')}.{0:016x}.tmp"
    for path in (*leftovers, other):
        path.write_bytes(b"half")
    assert rebuilds(folder)
    assert not any(path.exists() for path in leftovers)
    assert other.exists(), "another key's writer may be alive"


def test_a_stuck_builder_does_not_hold_others_for_ever(folder, monkeypatch, caplog):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(cache, "_LOCK_TIMEOUT", 0.05)
    with open(folder / f"{KEY}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build = Builder()
        assert get(folder, build) == ENTRY
        assert build.builds == 1
        assert "Connection timed out" in caplog.text
        assert not (folder / KEY).exists(), "wrote without the lock"
    assert rebuilds(folder)


def test_threads_of_one_process_share_one_build(folder):
    def slow():
        time.sleep(0.05)
        return build()

    build = Builder()
    results = []
    threads = [threading.Thread(target=lambda: results.append(get(folder, slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [ENTRY] * 8
    assert build.builds == 1


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(cache.ENVIRONMENT, raising=False)
    assert cache.default_path() == tmp_path / ".cache" / "dsv3_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default_path() == tmp_path / "xdg" / "dsv3_kernels"
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "chosen"))
    assert cache.default_path() == tmp_path / "chosen"


# A cold process: imports, says so, waits for its standard input to close, compiles, and reports what it got.
# It writes a line to $BUILDS for each time the compiler really ran.
COMPILING = """
import hashlib, os, sys
from dsv3_kernels.jit import Kernel, compile, kernel

def counted(source, expressions, options, cubin):
    file = os.open(os.environ["BUILDS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{expressions} {cubin}\\n".encode())
    os.close(file)
    return compile.compile_source(source, expressions, options, cubin)

kernel.compile_source = counted
print("ready", flush=True)
sys.stdin.read()
kernels = [Kernel("quantize.cuh", "quantize_1x128", ("Bf16", flag)) for flag in (False, True)]
images = [kernels[0].ptx().text.encode(), kernels[0].cubin().image, kernels[1].cubin().image]
assert "torch" not in sys.modules
print(*(hashlib.sha256(image).hexdigest() for image in images))
"""


def start(script, folder, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), cache.ENVIRONMENT: str(folder), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("processes", "rounds"), [(8, 3), pytest.param(64, 20, marks=pytest.mark.long)], ids=lambda n: str(n)
)
def test_cold_processes_compile_each_key_once(tmp_path, processes, rounds):
    for i in range(rounds):
        folder, builds = tmp_path / f"cache{i}", tmp_path / f"builds{i}"
        workers = [start(COMPILING, folder, BUILDS=str(builds)) for _ in range(processes)]
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            worker.stdin.close()
            worker.stdin = None  # or communicate would flush it
        outputs = set()
        for worker in workers:
            output, errors = worker.communicate(timeout=300)
            assert (worker.returncode, errors) == (0, "")
            outputs.add(output)
        assert len(outputs) == 1, "all got the same machine code"
        ran = builds.read_text().splitlines()
        assert len(ran) == len(set(ran)) == 3, "a PTX and two cubins, each compiled once"
        assert cache.usage(folder).entries == 3
        assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


# A process that builds entries for ever, so that a kill finds it in any part of a build or of a write.
WRITING = """
import os
from pathlib import Path
from dsv3_kernels.jit import cache
folder = Path(os.environ[cache.ENVIRONMENT])
entry = cache.Entry({"n": 1}, bytes(range(256)) * 2048)
print("ready", flush=True)
while True:
    cache.get_or_build(os.environ["KEY"], lambda: entry, folder)
    (folder / os.environ["KEY"]).unlink(missing_ok=True)
"""


@pytest.mark.parametrize("kills", [30, pytest.param(500, marks=pytest.mark.long)], ids=lambda n: str(n))
def test_kill_9_at_any_moment_loses_nothing(folder, seed, kills):
    moments = random.Random(seed)
    entry = cache.Entry({"n": 1}, bytes(range(256)) * 2048)
    found = dict.fromkeys(("whole", "absent", "temporary"), 0)
    for _ in range(kills):
        worker = start(WRITING, folder, KEY=KEY)
        assert worker.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.02))
        worker.kill()
        worker.communicate()
        assert worker.returncode == -signal.SIGKILL
        names = os.listdir(folder) if folder.exists() else []
        found["temporary"] += any(name.endswith(".tmp") for name in names)
        found["whole" if KEY in names else "absent"] += 1

        build = Builder(entry)
        assert get(folder, build) == entry
        assert build.builds == (KEY not in names), "whatever stood there was whole"
        assert get(folder, Builder()) == entry
        (folder / KEY).unlink()
    print(f"after the kill: {found}")
    assert get(folder, Builder(entry)) == entry
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


def clear(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.long)], ids=lambda n: str(n))
def test_kill_9_during_a_compile_leaves_the_next_process_well(tmp_path, seed, kills):
    moments = random.Random(seed)
    folder, builds = tmp_path / "cache", tmp_path / "builds"
    started = time.monotonic()
    assert start(COMPILING, folder, BUILDS=str(builds)).communicate(timeout=120)[1] == ""
    longest = time.monotonic() - started
    clear(folder)
    for _ in range(kills):
        worker = start(COMPILING, folder, BUILDS=str(builds))
        assert worker.stdout.readline() == "ready\n"
        worker.stdin.close()
        worker.stdin = None
        time.sleep(moments.uniform(0, longest))
        worker.kill()
        worker.communicate()
        built, cached = (start(COMPILING, folder, BUILDS=str(builds)).communicate(timeout=120) for _ in "12")
        assert built[1] == cached[1] == ""
        assert built[0] == cached[0] and len(built[0].split()) == 4
        clear(folder)


def test_facts_are_json_and_content_is_bytes(folder):
    entry = cache.Entry({"text": "é\n", "none": None, "list": [1, 2.5]}, os.urandom(100_000))
    get(folder, Builder(entry))
    assert get(folder, Builder()) == entry
    first, facts, _ = (folder / KEY).read_bytes().split(b"\n", 2)
    assert first.startswith(b"dsv3_kernels cache ")
    assert json.loads(facts) == entry.facts
