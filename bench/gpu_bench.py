"""The GPU half of every bench/bench_<op>.py: the workloads of bench/cases/<op>.py against their peers.

Cold L2, CUDA events, medians, candidates in turn in one run. A peer that is missing, refuses a shape or
computes something else is named with the reason, and not compared. "of floor" is the least time that the
bytes and operations could take at ceilings measured in the same run, over the time that was.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import cases, gpu_timing
from bench.cases import Call, Workload
from bench.report import Report

LARGEST_DIFFERENCE = 0.02  # relative, in the Frobenius norm; two roundings of one product stay below 0.01


def script(op: str) -> int:
    """What `python -m bench.bench_<op> --gpu` does."""
    return main([op, *(argument for argument in sys.argv[1:] if argument != "--gpu")])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", choices=cases.ops())
    parser.add_argument("--out", type=Path, help="where to write the JSON (default runs/bench/<op>-gpu.json)")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all rows together (default 120)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--synthetic", action="store_true", help="made-up times, to try what reads them")
    options = parser.parse_args(arguments)
    rows = [row for row in cases.workloads(options.op) if options.only in str(row)]
    if options.synthetic:
        report = synthetic(options.op, rows)
        report.write(options.out)
        return 0
    if not torch.cuda.is_available():
        raise SystemExit(f"bench of {options.op}: found no CUDA device, or torch is a CPU build")
    report = run(options.op, rows, options.seconds, options.out)
    return int(any("error" in row for row in report.results))


def synthetic(op: str, rows: Sequence[Workload]) -> Report:
    """A report of the same form whose times are made up, and which says so."""
    report = Report(f"{op}-gpu")
    ceilings = {"copy_bytes_per_s": 4e12, "fp8_flops_per_s": 1.5e15}
    report.machine |= {**ceilings, "synthetic": True, "note": cases.note(op)}
    for i, row in enumerate(rows):
        floor = max(row.bytes / 4e12, row.flops / 1.5e15)
        times = {name: [floor * (1 + share + 0.01 * (i % 7))] * 5 for name, share in _MADE_UP.items()}
        report.add(str(row), times["ours"], **row_facts(row, times, {"absent": "a made-up reason"}, ceilings))
    return report


_MADE_UP = {"ours": 0.25, "a peer": 0.3, "another": 0.6}


def run(op: str, rows: Sequence[Workload], seconds: float, out: Path | None) -> Report:
    """Measure `rows` within `seconds`, in their order; those that are not reached are listed as such."""
    end = time.monotonic() + seconds
    report = Report(f"{op}-gpu")
    timer = gpu_timing.ColdTimer()
    ceilings = measure_ceilings(timer)
    report.machine |= {**ceilings, "note": cases.note(op)}
    print("  ".join(f"{name} {value:.4g}" for name, value in ceilings.items()), flush=True)
    for i, row in enumerate(rows):
        left = end - time.monotonic()
        if left <= 0:
            report.note(str(row), "not reached within the time limit", group=row.group)
            continue
        try:
            print(measure_row(report, timer, row, ceilings, min(2.0, left / (len(rows) - i))), flush=True)
        except Exception as error:  # a row that fails must not stop the others
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            print(report.note(str(row), reason, group=row.group), flush=True)
        torch.cuda.empty_cache()
        report.write(out)  # after every row: what was measured outlives a time limit
    print(f"written: {report.write(out)}")
    return report


def measure_ceilings(timer: gpu_timing.ColdTimer) -> dict[str, float]:
    ceilings = {"copy_bytes_per_s": gpu_timing.copy_bandwidth(timer)}
    try:
        ceilings["fp8_flops_per_s"] = gpu_timing.fp8_peak(timer)
    except (RuntimeError, TypeError) as error:
        print(f"no FP8 ceiling: {error}")
    return ceilings


def measure_row(
    report: Report, timer: gpu_timing.ColdTimer, row: Workload, ceilings: dict[str, float], seconds: float
) -> str:
    candidates = row.build()
    calls: dict[str, Call] = {"ours": candidates.ours}
    expected = candidates.ours()
    torch.cuda.synchronize()
    left_out: dict[str, str] = {}
    for name, make in candidates.peers.items():
        try:
            call = make()
            result = call()
            torch.cuda.synchronize()
            if name not in candidates.unlike:
                apart = relative_difference(result, expected)
                if not apart <= LARGEST_DIFFERENCE:
                    left_out[name] = f"its result is {apart:.2g} from ours, allowed {LARGEST_DIFFERENCE}"
                    continue
            calls[name] = call
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:200]}"
    del expected
    times = timer.measure(calls, seconds)
    return report.add(str(row), times["ours"], **row_facts(row, times, left_out, ceilings))


def row_facts(
    row: Workload, times: dict[str, list[float]], left_out: dict[str, str], ceilings: dict[str, float]
) -> dict[str, object]:
    """What a row of the report says beside its times."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians.pop("ours")
    floors = [row.bytes / ceilings["copy_bytes_per_s"]]
    if row.peak == "fp8" and "fp8_flops_per_s" in ceilings:
        floors.append(row.flops / ceilings["fp8_flops_per_s"])
    facts: dict[str, object] = {
        "group": row.group,
        "flops": row.flops,
        "bytes": row.bytes,
        "tflops": row.flops / ours * 1e-12,
        "gbytes_per_s": row.bytes / ours * 1e-9,
        "of_floor": max(floors) / ours,
        "peers": medians,
        "left_out": left_out,
    }
    if row.payload:
        facts["payload_gbytes_per_s_an_sm"] = row.payload / row.sms / ours * 1e-9
    if row.hops:
        facts["bytes_by_hop"] = dict(row.hops)
    if medians:
        best = min(medians, key=lambda name: medians[name])
        facts |= {"best_peer": best, "speed_against_best_peer": medians[best] / ours}
    return facts


def relative_difference(got: object, want: object) -> float:
    if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor):
        raise TypeError(f"cannot compare a {type(got).__name__} with a {type(want).__name__}")
    x, y = got.float(), want.float()
    return float((x - y).norm() / y.norm())


if __name__ == "__main__":
    raise SystemExit(main())
