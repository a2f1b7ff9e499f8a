"""The processes of a run: how they find each other, agree before they begin, and end together."""

import contextlib
import functools
import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dsv3_kernels
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.parallel.groups import Groups, Layout, make_group, require_same

BEAT = 1.0
"""Seconds between two signs of life."""
SURE = 5.0
"""Seconds of silence after which a rank counts as dead once something has gone wrong."""
GRACE = 3.0
"""Seconds for the training thread to end by itself once the watch knows why."""


class Watch:
    """Tells who died. Every second each rank writes a sign of life into the store and reads its neighbour's.

    Whoever finds a rank silent for `timeout` seconds, or fails itself, writes why under one key; all ranks
    read that key every second and end. So a run ends everywhere even where a collective would wait for ever,
    and every rank names the same cause.
    """

    def __init__(self, store: "dist.Store", rank: int, size: int, timeout: float) -> None:
        # A connection of its own: waits on the other must not stop the signs.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._size, self._timeout = rank, size, timeout
        self._done = threading.Event()
        self.verdict: str | None = None
        self._beats = 0
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def fail(self, why: str) -> str:
        """Tells all ranks why the run ends; returns the first such cause, whoever gave it."""
        with contextlib.suppress(RuntimeError):
            why = self._store.compare_set("ended", "", why).decode()
        self.verdict = why
        return why

    def linger(self) -> None:
        """Rank 0 may be the store's host: the others get time to read why before it goes."""
        if self._rank == 0:
            time.sleep(3 * BEAT)

    def explain(self) -> str | None:
        """Why a collective failed here, once somebody knows or a rank is found silent; None if none is."""
        before, start = self._signs(), time.monotonic()
        while time.monotonic() - start < SURE and self.verdict is None:
            time.sleep(BEAT / 4)
        if self.verdict is None:
            after = self._signs()
            if after is None or before is None:
                return self.fail("the store of the processes is gone, and with it rank 0 or torchrun")
            silent = [
                rank for rank in range(self._size) if after[rank] == before[rank] and rank != self._rank
            ]
            if silent:
                return self.fail(f"{_ranks(silent)} died: no sign of life for {SURE:.0f} s")
        return self.verdict

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"alive/{self._rank}", str(self._beats))

    def _signs(self) -> list[bytes] | None:
        try:
            return self._store.multi_get([f"alive/{rank}" for rank in range(self._size)])
        except RuntimeError:
            return None

    def _run(self) -> None:
        neighbour = (self._rank + 1) % self._size
        seen, since = b"", time.monotonic()
        try:
            while not self._done.wait(BEAT):
                self._beat()
                if self._store.check(["ended"]):
                    return self._end(self._store.get("ended").decode())
                sign = (
                    self._store.get(f"alive/{neighbour}")
                    if self._store.check([f"alive/{neighbour}"])
                    else b""
                )
                if sign != seen:
                    seen, since = sign, time.monotonic()
                elif time.monotonic() - since > self._timeout:
                    return self._end(
                        self.fail(f"rank {neighbour} died: no sign of life for {self._timeout:.0f} s")
                    )
        except RuntimeError:
            self._end("the store of the processes is gone, and with it rank 0 or torchrun")

    def _end(self, why: str) -> None:
        """The training thread learns it from a collective that fails; if none does, the process ends here."""
        self.verdict = why
        if not self._done.wait(SURE + GRACE):
            report(TrainError(why))
            os._exit(1)


class Processes:
    """This process and its peers. rank, size: in the world. device: what this one computes on."""

    def __init__(self, rank: int, size: int, device: torch.device, timeout: float) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._timeout = timedelta(seconds=timeout)

    @classmethod
    def alone(cls, device: torch.device | None = None) -> "Processes":
        return cls(0, 1, device or torch.device("cpu"), 1.0)

    def groups(self, layout: Layout) -> Groups:
        return Groups(layout, self.rank, functools.partial(make_group, timeout=self._timeout))


def choose_device(name: str | None) -> torch.device:
    """cpu, or this process's GPU; None takes a GPU where there is one that the kernels run on."""
    usable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainError(
            "--device is cuda, but torch sees no GPU. Mend: --device cpu; dsv3_kernels.doctor says more"
        )
    if name == "cpu" or (name is None and not usable):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise TrainError(
            f"local rank {index} has no GPU of its own: torch sees {torch.cuda.device_count()}. "
            "Mend: as many processes a node as it has GPUs, or --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextlib.contextmanager
def processes(timeout: float, device: torch.device) -> Iterator[Processes]:
    """Inside, the processes that torchrun started are connected; without torchrun this is one alone.

    An error that leaves the block ends all ranks, and each names the rank that it came from.
    """
    if "RANK" not in os.environ:
        yield Processes.alone(device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(rank)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    watch = Watch(store, rank, size, timeout)
    try:
        dist.barrier()  # every rank has given its first sign
        yield Processes(rank, size, device, timeout)
        dist.barrier()
        watch.stop()
    except Exception as error:
        # A lost peer is a RuntimeError of torch.distributed, or a TimeoutError of ep.Buffer.
        lost = any(isinstance(e, RuntimeError | TimeoutError) for e in (error, error.__cause__))
        why = watch.explain() if lost else None
        if why is None:
            watch.fail(f"rank {rank} failed: {_one_line(error)}")
        watch.linger()
        if why is None:
            raise
        raise TrainError(why) from error
    dist.destroy_process_group()


def _store(rank: int) -> "dist.Store":
    """The one that torch.distributed would take, with room for each attempt: torch 2.13 reads what an attempt
    before left in torchrun's, and connects to processes that are gone.
    """
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=rank == 0 and not of_torchrun)
    return dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def agree(settings: dict[str, Any], group: "dist.ProcessGroup | None") -> None:
    """Raises TrainError, on every rank, unless all run the same code with the same settings."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    require_same({"version": versions, "code": _code(), **settings}, "", group)


def _code() -> dict[str, str]:
    """A digest of every source file of this package."""
    root = Path(dsv3_kernels.__file__).parent
    folders = (root, root.parent / "csrc" / "kernels")
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cuh"))
    return {
        str(path.relative_to(root.parent)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in files
    }


def report(error: Exception) -> None:
    """The one line that a run ends with."""
    where = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"dsv3_kernels.train: {where}{error}", file=sys.stderr, flush=True)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _one_line(error: BaseException) -> str:
    return f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
