"""Runs the small cases of bench/cases once each, against the reference: what sanitizers watch."""

import argparse
import contextlib
import itertools
import time
from collections.abc import Sequence

import torch

from bench import cases

NOT_REACHED = 3  # exit status: all was right, but the time was over before the last case


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "emulator"), default="cuda")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--each", type=int, default=1000, help="at most so many of an op, spread over its cases"
    )
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no case after that")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    failed, left = 0, spread([case for case in cases.cases() if options.only in case.name], options.each)
    while left and time.monotonic() < end:
        case = left.pop(0)
        started = time.monotonic()
        try:
            problems = run(case, options.device, options.seed)
        except Exception as error:  # the other cases still tell something
            problems = [f"{type(error).__name__}: {error}"]
        failed += bool(problems)
        verdict, seconds = "FAILED" if problems else "ok", time.monotonic() - started
        print(f"{verdict:6s} {seconds:6.2f} s  {case.name}", *problems, sep="\n       ", flush=True)
    if left:
        print(f"not reached in {options.seconds:.0f} s: {', '.join(case.name for case in left)}")
    return 1 if failed else NOT_REACHED if left else 0


def spread(found: Sequence[cases.Case], each: int) -> list[cases.Case]:
    """At most `each` cases of an op, first, last and between; one of every op before a second of any."""
    by_op: dict[str, list[cases.Case]] = {}
    for case in found:
        by_op.setdefault(case.name.split()[0], []).append(case)
    for op, of_op in by_op.items():
        count = min(each, len(of_op))
        by_op[op] = [of_op[i * (len(of_op) - 1) // max(1, count - 1)] for i in range(count)]
    rounds = itertools.zip_longest(*by_op.values())
    return [case for one_each in rounds for case in one_each if case is not None]


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
