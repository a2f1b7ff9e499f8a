"""Compile ahead, so that no training step or request waits for a compiler."""

import importlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Protocol

from .jit import Kernel
from .jit.kernel import compiled_here

# Modules; one with kernels has `kernels()`: op name -> its instances.
_OPS = ("gemm", "quantize", "wgrad", "swiglu", "permute", "e5m6", "gate", "ep.ahead")


class Configuration(Protocol):
    """What an op's chooser returns, `gemm.choose_config(...)` say."""

    @property
    def kernel(self) -> Kernel: ...


@dataclass(frozen=True)
class Warmed:
    """What `warmup` did: how many kernels, how many of them the cache held, seconds in all and at most."""

    kernels: int
    from_cache: int
    seconds: float
    slowest: float

    def __str__(self) -> str:
        return (
            f"{self.kernels} kernels in {self.seconds:.1f} s, {self.from_cache} of them from the cache; "
            f"the slowest took {self.slowest:.2f} s"
        )


def warmup(
    what: Iterable[str | Kernel | Configuration] | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Warmed:
    """Compile kernels into the cache that all processes share, in parallel. Needs no GPU.

    what: names of ops ("fp8_gemm": all instances that it may launch), configurations that a chooser returned,
        or kernels; every kernel of every op if None.
    workers: threads, one a core if None; the compiler runs outside Python's lock. progress: show a bar.
    Raises `ValueError` for an unknown op or a bad `workers`, and what `Kernel.cubin` raises.
    """
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise ValueError(f"warmup: workers is {workers!r}, expected an int of 1 or more, or None")
    kernels = _kernels(what)
    started = time.perf_counter()
    known = compiled_here.copy()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        pending = [pool.submit(_compile, kernel) for kernel in kernels]
        try:
            seconds = [done.result() for done in _shown(as_completed(pending), len(pending), progress)]
        except BaseException:  # a refusal by the compiler, or Ctrl-C: start no more
            pool.shutdown(cancel_futures=True)
            raise
    compiled = len((compiled_here - known).intersection(kernels))
    return Warmed(
        len(kernels), len(kernels) - compiled, time.perf_counter() - started, max(seconds, default=0)
    )


def _compile(kernel: Kernel) -> float:
    started = time.perf_counter()
    kernel.cubin()
    return time.perf_counter() - started


def _kernels(what: Iterable[str | Kernel | Configuration] | None) -> list[Kernel]:
    """Each kernel once, in the order in which it was named."""
    if isinstance(what, str):
        raise ValueError(f"warmup: what is {what!r}, expected a list; pass [{what!r}]")
    by_op: dict[str, list[Kernel]] = {}
    for name in _OPS:
        module = importlib.import_module(f".{name}", __package__)
        by_op |= getattr(module, "kernels", dict)()
    found: dict[Kernel, None] = {}
    for item in by_op if what is None else what:
        if isinstance(item, str):
            if item not in by_op:
                raise ValueError(f"warmup: {item!r} has no kernel, expected one of {', '.join(by_op)}")
            found |= dict.fromkeys(by_op[item])
        elif isinstance(item, Kernel):
            found[item] = None
        elif isinstance(getattr(item, "kernel", None), Kernel):
            found[item.kernel] = None
        else:
            raise ValueError(f"warmup: got {item!r}, expected the name of an op, a configuration or a Kernel")
    return list(found)


def _shown(done: Iterable, total: int, progress: bool) -> Iterable:
    if not progress:
        return done
    try:
        from rich.progress import track
    except ImportError:
        return done
    return track(done, description="compiling kernels", total=total)
