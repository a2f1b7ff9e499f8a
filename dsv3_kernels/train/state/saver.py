"""Checkpoints written by a thread, from a copy, while training goes on."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsv3_kernels.train.state import checkpoint
from dsv3_kernels.train.state.optimizer import Piece


class Saver:
    """At most one checkpoint is under way; `submit` waits for the one before.

    group: the ranks that save together; used here alone, so that its messages never meet those of training.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self._group = group
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(
        self, folder: Path, step: int, pieces: Mapping[str, Piece], state: dict[str, Any], keep: int
    ) -> None:
        """As `checkpoint.save`, whose error comes from the next submit or wait."""
        self.wait()
        copies = {
            name: Piece(p.values.detach().to("cpu", copy=True), p.first, p.shape)
            for name, p in pieces.items()
        }

        def save() -> None:
            try:
                checkpoint.save(folder, step, copies, state, keep, self._group)
            except BaseException as error:  # handed to the thread that waits
                self._error = error

        self._thread = threading.Thread(target=save, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is under way any more; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
