"""Weight gradients put off: the split into input and weight passes that zero-bubble pipeline schedules need.

A stage's input gradient is what the stage before it waits for; its weight gradients can fill bubbles later.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator

Work = Callable[[], None]

_active: "WgradStore | None" = None


class WgradStore:
    """Weight gradients that backward passes have put off, oldest first; `len` counts what is left to do."""

    def __init__(self) -> None:
        self._waiting: deque[Work] = deque()
        self._taken: list[deque[Work]] = []

    def put(self, work: Work) -> None:
        self._waiting.append(work)

    def run(self) -> None:
        """Compute all that wait and that no `take` has taken. What fails, and all behind it, stays."""
        _drain(self._waiting)

    def take(self) -> Work:
        """A function that computes what waits now; what comes later is not its business.

        One call after each micro-batch's backward keeps them apart: `PipelineStage(dw_builder=store.take)`.
        """
        taken, self._waiting = self._waiting, deque()
        self._taken = [batch for batch in (*self._taken, taken) if batch]
        return functools.partial(_drain, taken)

    def __len__(self) -> int:
        return len(self._waiting) + sum(map(len, self._taken))


def _drain(batch: deque[Work]) -> None:
    while batch:
        batch[0]()
        batch.popleft()


@contextlib.contextmanager
def deferred_wgrad() -> Iterator[WgradStore]:
    """Inside, backward passes of the linear layers only store their weight gradients.

        with nn.deferred_wgrad() as store:
            loss.backward()  # input gradients
            store.run()  # weight gradients, into .grad or .main_grad, bit for bit as without the store

    It holds for the whole process, so that autograd's own threads see it, and for weights that are leaves:
    the gradients of others flow on at once. Of layers in BF16 or FP32 the forward must run inside as well, or
    their backward defers nothing. Backwards compiled by torch.compile defer nothing, and hooks on a
    weight's gradient are not called.
    Raises RuntimeError when gradients were never computed by the block's end, and where another such block is
    active.
    """
    global _active
    if _active is not None:
        raise RuntimeError(
            "deferred_wgrad: another block is active in this process, expected one at a time; use its store"
        )
    _active = store = WgradStore()
    try:
        yield store
    finally:
        _active = None
    if len(store):
        raise RuntimeError(
            f"deferred_wgrad: {len(store)} weight gradients were put off and never computed, expected 0 at "
            "the block's end; call store.run(), or each function that store.take() gave"
        )


@contextlib.contextmanager
def as_with(store: WgradStore | None) -> Iterator[None]:
    """Inside, that store is the active one: for a forward that is run again, to take the way it took."""
    global _active
    now, _active = _active, store
    try:
        yield
    finally:
        _active = now


def active_store() -> WgradStore | None:
    """The store of the block that is active, if any."""
    return _active
