"""Ranks for a bench: those that torchrun started, or processes of its own."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Measure = Callable[[int, Any], None]
"""Takes the rank and what was passed on; a function of a module, not a lambda."""


def started() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def run(measure: Measure, options: Any, ranks: int) -> None:
    """Calls it on every rank of an initialised group.

    Under torchrun: NCCL where there is a GPU for every local rank, else gloo. Otherwise `ranks` processes on
    this machine over gloo.
    """
    if not started():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_join, (measure, options, ranks, port), ranks)
        return
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= local
    if enough:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if enough else "gloo")
    measure(dist.get_rank(), options)
    dist.destroy_process_group()


def _join(rank: int, measure: Measure, options: Any, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    measure(rank, options)
    dist.destroy_process_group()
