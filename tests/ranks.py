"""Ranks as processes for tests: started from one fork server that has imported torch once."""

import multiprocessing
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PRELOAD = [
    "torch",
    "torch.distributed",
    "dsv3_kernels.ep",
    "dsv3_kernels.model",
    "dsv3_kernels.train.run",
    "dsv3_kernels.train.pipeline.executor",
]


def _main(rank, size, folder, program, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
        result = program(rank, size, *arguments)
        torch.save(result, folder / f"result{rank}")
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        sys.exit(1)


def start(folder: Path, size: int, program, *arguments):
    """Processes that run program(rank, size, *arguments) inside a gloo group."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=_main, args=(rank, size, folder, program, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def run(folder: Path, size: int, program, *arguments, seconds: float = 240.0):
    """What the program returned on each rank."""
    processes = start(folder, size, program, *arguments)
    for process in processes:
        process.join(seconds)
    errors = [path.read_text() for path in sorted(folder.glob("error*"))]
    for process in processes:
        if process.is_alive():
            process.kill()
            errors.append(f"{process.name} did not end in {seconds} s")
    assert not errors, "\n".join(errors)
    return [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(size)]
