"""Runs the small cases of bench/cases once each, against the reference: what sanitizers watch."""

import argparse
import contextlib
import time
from collections.abc import Sequence

import torch

from . import cases


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "emulator"), default="cuda")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    failed = 0
    for case in cases.cases():
        if options.only not in case.name:
            continue
        started = time.perf_counter()
        try:
            problems = run(case, options.device, options.seed)
        except Exception as error:  # the other cases still tell something
            problems = [f"{type(error).__name__}: {error}"]
        failed += bool(problems)
        print(
            f"{'FAILED' if problems else 'ok':6s} {time.perf_counter() - started:6.2f} s  {case.name}",
            flush=True,
        )
        for problem in problems:
            print(f"       {problem}", flush=True)
    return int(failed > 0)


def run(case: cases.Case, device: str, seed: int) -> list[str]:
    """What of the case's result differs from the reference."""
    inputs = case.inputs(torch.Generator().manual_seed(seed))
    if device == "cuda":
        got = case.run(*(cases.to_device(tensor, "cuda") for tensor in inputs))
        torch.cuda.synchronize()
    else:
        with _virtual_gpu(seed):
            got = case.run(*inputs)
    return cases.differences(got, case.reference(*inputs))


def _virtual_gpu(seed: int) -> contextlib.AbstractContextManager[object]:
    from dsv3_kernels import emulator

    return emulator.virtual_gpu(num_sms=132, seed=seed)


if __name__ == "__main__":
    raise SystemExit(main())
