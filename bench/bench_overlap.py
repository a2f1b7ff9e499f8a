"""A GEMM on most of a GPU's SMs beside dispatch on the others: how much each slows the other down.

Two virtual ranks dispatch on 10 SMs each, the GEMM has the other 112 of a Hopper's 132. Each is first timed
alone, as often as fills --milliseconds, then both at once from one starting signal. To reach: 5 % at most.
What they share is L2 and memory. Where `ncu` is on the PATH, it counts how often L2 had what the SMs asked
for, in both alone and in both at once, in a process of its own.
"""

import argparse
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import dsv3_kernels as dk
from bench import l2
from bench.loopback import NOTE, Node, Setup
from bench.report import Report

SETUP = Setup(2, 10)
SHAPE = (8192, 4096, 7168)  # M, N, K
SLEEP = 40_000_000  # cycles: time for the host to queue what follows
BOTH = "both at once"
PROFILE_SECONDS = 60

Call = Callable[[], object]
Times = dict[str, dict[str, list[float]]]


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


def workloads() -> dict[str, Call]:
    """The two, by name, each called once."""
    sms = torch.cuda.get_device_properties().multi_processor_count - SETUP.ranks * SETUP.num_sms
    calls: dict[str, Call] = {
        f"fp8_gemm on {sms} SMs": gemm(sms),
        f"dispatch FP8, {SETUP}": Node(SETUP).dispatch,
    }
    for call in calls.values():
        call()
    return calls


def measure(calls: dict[str, Call], counts: dict[str, int], rounds: int) -> Times:
    """Seconds of one call, by name, alone and beside the other."""
    found: Times = {name: {"alone": [], "beside": []} for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            (seconds,) = together([(call, counts[name])])
            found[name]["alone"].append(seconds / counts[name])
        both = together([(call, counts[name]) for name, call in calls.items()])
        for name, seconds in zip(calls, both, strict=True):
            found[name]["beside"].append(seconds / counts[name])
    return found


def ranges(calls: Sequence[tuple[Call, int]]) -> None:
    """For a profiler: each alone, then all at once, a range each."""
    for part in (*([call] for call in calls), calls):
        torch.cuda.profiler.start()
        together(part)
        torch.cuda.profiler.stop()


def lookups(counts: dict[str, int]) -> dict[str, object]:
    """What L2 had, by what ran; or why it is not known."""
    again = ("-m", "bench.bench_overlap", "--ranges", *map(str, counts.values()))
    names = [*(f"{name}, alone" for name in counts), BOTH]
    try:
        found = l2.count([sys.executable, *again], len(names), PROFILE_SECONDS)
    except l2.NotCounted as reason:
        return {"left_out": str(reason)}
    alone = l2.Lookups(sum(part.hit for part in found[:-1]), sum(part.missed for part in found[:-1]))
    return {"rates": {name: part.rate for name, part in zip(names, found, strict=True)}, "apart": alone.rate}


def report_of(found: Times) -> Report:
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
    parser.add_argument("--ranges", type=int, nargs=2, help="calls of each, once, for a profiler; no times")
    options = parser.parse_args(arguments)
    if options.synthetic:
        made_up = {
            "a GEMM": {"alone": [1e-3], "beside": [1.04e-3]},
            "dispatch": {"alone": [2e-3], "beside": [2.2e-3]},
        }
        rates = {"a GEMM, alone": 0.8, "dispatch, alone": 0.3, BOTH: 0.6}
        report = report_of(made_up)
        report.machine |= {"synthetic": True, "l2": {"rates": rates, "apart": 0.65}}
    elif not torch.cuda.is_available():
        raise SystemExit("bench of overlap: found no CUDA device, or torch is a CPU build")
    elif options.ranges:
        signal.alarm(PROFILE_SECONDS)  # a profiler that is ended leaves its program behind
        ranges(list(zip(workloads().values(), options.ranges, strict=True)))
        return 0
    else:
        calls = workloads()
        counts = {
            name: max(1, round(1e-3 * options.milliseconds / together([(call, 3)])[0] * 3))
            for name, call in calls.items()
        }
        found = measure(calls, counts, options.rounds)
        calls.clear()  # the profiler's process wants the memory too
        torch.cuda.empty_cache()
        report = report_of(found)
        report.write(options.out)  # whatever comes of the profiler
        report.machine["l2"] = lookups(counts)
        print(f"L2: {report.machine['l2']}")
    print(f"written: {report.write(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
