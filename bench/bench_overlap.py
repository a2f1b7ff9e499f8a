"""A GEMM on most of a GPU's SMs beside dispatch on the others: how much each slows the other down.

Two virtual ranks dispatch on 10 SMs each, the GEMM has the other 112 of a Hopper's 132. Each is first timed
alone, as often as fills --milliseconds, then both at once from one starting signal. To reach: 5 % at most.
What they share is L2 and memory. The hit rate of L2 is not measured here: it takes a profiler that leaves
kernels beside each other (ncu --replay-mode range).
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import dsv3_kernels as dk
from bench.loopback import NOTE, Node, Setup
from bench.report import Report

SETUP = Setup(2, 10)
SHAPE = (8192, 4096, 7168)  # M, N, K
SLEEP = 40_000_000  # cycles: time for the host to queue what follows

Call = Callable[[], object]


def gemm(num_sms: int) -> Call:
    m, n, k = SHAPE
    a = dk.quantize_1x128(torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
    b = dk.quantize_128x128(torch.randn(n, k, device="cuda", dtype=torch.bfloat16))
    return lambda: dk.fp8_gemm(a, b, num_sms=num_sms)


def together(calls: Sequence[tuple[Call, int]]) -> list[float]:
    """Seconds of each call, `count` times on a stream of its own; all streams start at one moment."""
    gate, start = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(gate):
        torch.cuda._sleep(SLEEP)
        start.record()
    ends = []
    for call, count in calls:
        stream, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            stream.wait_event(start)
            for _ in range(count):
                call()
            end.record()
        ends.append(end)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for end in ends]


def measure(milliseconds: float, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of one call, by name, alone and beside the other."""
    sms = torch.cuda.get_device_properties().multi_processor_count - SETUP.ranks * SETUP.num_sms
    node = Node(SETUP)
    calls: dict[str, Call] = {f"fp8_gemm on {sms} SMs": gemm(sms), f"dispatch FP8, {SETUP}": node.dispatch}
    for call in calls.values():
        call()
    counts = {
        name: max(1, round(1e-3 * milliseconds / together([(c, 3)])[0] * 3)) for name, c in calls.items()
    }
    found: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside": []} for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            (seconds,) = together([(call, counts[name])])
            found[name]["alone"].append(seconds / counts[name])
        both = together([(call, counts[name]) for name, call in calls.items()])
        for name, seconds in zip(calls, both, strict=True):
            found[name]["beside"].append(seconds / counts[name])
    return found


def report_of(found: dict[str, dict[str, list[float]]]) -> Report:
    report = Report("overlap")
    report.machine["note"] = NOTE
    for name, times in found.items():
        alone = statistics.median(times["alone"])
        slowdown = statistics.median(times["beside"]) / alone - 1
        print(report.add(name, times["beside"], alone=alone, slowdown=slowdown))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where to write the JSON (default runs/bench/overlap.json)")
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of each measurement (default 20)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--synthetic", action="store_true", help="made-up times, to try what reads them")
    options = parser.parse_args(arguments)
    if options.synthetic:
        made_up = {
            "a GEMM": {"alone": [1e-3], "beside": [1.04e-3]},
            "dispatch": {"alone": [2e-3], "beside": [2.2e-3]},
        }
        report = report_of(made_up)
        report.machine["synthetic"] = True
    elif torch.cuda.is_available():
        report = report_of(measure(options.milliseconds, options.rounds))
    else:
        raise SystemExit("bench of overlap: found no CUDA device, or torch is a CPU build")
    print(f"written: {report.write(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
