"""One command for a day with a GPU: `python -m bench.gpu_report --out DIR`.

It builds, runs tests/gpu, measures every workload of bench/cases against the peers it finds, lets
compute-sanitizer watch the small cases, and writes DIR/report.md, report.json, log.txt and two plots. Each
part is a process with a time limit of its own; one that fails does not stop the others, and the report is
written anew after each. `python -m bench.gpu_results DIR/report.json` keeps a real run in bench/results and
renews README's table.

--dry-run needs no GPU: the same parts, with the emulator in place of the GPU and made-up times, marked so.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

from bench import cases, gpu_page
from bench.report import machine

ROOT = Path(__file__).parents[1]
MINUTES = 8.7  # in all, by default
BENCH_SECONDS = 150.0  # of them for what is measured
SANITIZER_SECONDS = 75.0  # for each of them
SANITIZERS = ("memcheck", "synccheck", "initcheck", "racecheck")
_FOUND_ERRORS = 86  # compute-sanitizer's exit status when it found something


@dataclass(frozen=True)
class Part:
    """A process of the report. limit: seconds at most. read: its findings, from the folder it wrote to."""

    name: str
    limit: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Path], dict[str, object]] = lambda folder: {}
    skip: str = ""  # why it cannot run here


@dataclass
class Outcome:
    part: str
    status: str  # passed, failed, timed out, skipped
    seconds: float
    detail: str = ""
    findings: dict[str, object] = field(default_factory=dict)


def parts(folder: Path, dry: bool) -> list[Part]:
    """In the order in which they run: what proves first, then what measures, then what is slow."""
    python = [sys.executable, "-m"]
    tests = [*python, "pytest", "tests/gpu", "-q", f"--junitxml={folder}/tests.xml"]
    tests += ["-k", "fresh_thread"] if dry else [*_in_parallel(), "--maxfail=40"]
    rows = {op: _rows(op) for op in cases.ops()}
    seconds = {
        op: max(15.0, BENCH_SECONDS * count / sum(rows.values())) for op, count in rows.items() if count
    }
    host = [*python, "bench.bench_launch", "--out", f"{folder}/host.json", *(["--fake"] if dry else [])]
    model = [*python, "bench.bench_model", "--gpu", "--seconds", "15", "--out", f"{folder}/model.json"]
    of_model = "a dry run trains nothing" if dry else ""
    return [
        Part("machine", 60, [*python, "dsv3_kernels.doctor"]),
        Part("build", 150, [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]),
        Part("tests", 150, tests, {"OMP_NUM_THREADS": "2"}, read=_read_tests),
        *(_bench(op, folder, dry, limit) for op, limit in seconds.items()),
        _overlap(folder, dry),
        Part("host", 40, host, read=lambda folder: _read_json(folder / "host.json")),
        Part("model", 60, model, read=lambda folder: _read_json(folder / "model.json"), skip=of_model),
        *(_sanitizer(tool, dry) for tool in SANITIZERS),
    ]


def _rows(op: str) -> int:
    """How many workloads an op has; 1 where its file cannot be read, so that its part runs and says why."""
    try:
        return len(cases.workloads(op))
    except Exception:
        return 1


def _in_parallel() -> list[str]:
    """Options that spread tests over processes: the emulator's half takes a core each."""
    try:
        import xdist  # noqa: F401
    except ImportError:
        return []
    return ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]


def _bench(op: str, folder: Path, dry: bool, seconds: float) -> Part:
    out = folder / f"bench-{op}.json"
    command = [sys.executable, "-m", "bench.gpu_bench", op, "--out", str(out), "--seconds", f"{seconds:.0f}"]
    return Part(
        f"bench-{op}",
        seconds + 40,
        [*command, "--synthetic"] if dry else command,
        read=lambda folder: _read_json(out),
    )


def _overlap(folder: Path, dry: bool) -> Part:
    out = folder / "overlap.json"
    command = [sys.executable, "-m", "bench.bench_overlap", "--out", str(out)]
    return Part(
        "overlap",
        100,  # of them at most 60 under a profiler
        [*command, "--synthetic"] if dry else command,
        read=lambda folder: json.loads(out.read_text()) if out.is_file() else {},
    )


def _sanitizer(tool: str, dry: bool) -> Part:
    run = [sys.executable, "-m", "bench.run_cases", "--each", "4", "--seconds", f"{SANITIZER_SECONDS - 25}"]
    if dry:
        return Part(f"sanitize-{tool}", 60, [*run, "--device", "emulator", "--only", "quantize_1x128 bf16"])
    sanitizer = find_sanitizer()
    command = [sanitizer or "", "--tool", tool, "--error-exitcode", str(_FOUND_ERRORS), "--print-limit", "20"]
    # Without its cache the allocator gives every tensor memory of its own: the tools know its end and state.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
    missing = "found no compute-sanitizer on the PATH, in /usr/local/cuda* or in $CUDA_HOME"
    return Part(
        f"sanitize-{tool}",
        SANITIZER_SECONDS,
        [*command, *run],
        environment,
        skip="" if sanitizer else missing,
    )


def find_sanitizer() -> str | None:
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    for home in homes:
        for place in ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"):
            if os.access(home / place, os.X_OK):
                return str(home / place)
    return shutil.which("compute-sanitizer")


def _read_tests(folder: Path) -> dict[str, object]:
    file = folder / "tests.xml"
    if not file.is_file():
        return {}
    tests = ElementTree.parse(file).getroot().iter("testcase")
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    reasons = set[str]()
    for test in tests:
        reports = [child for child in test if child.tag in ("skipped", "failure", "error")]
        verdicts = {child.tag for child in reports}
        verdict = "failed" if verdicts & {"failure", "error"} else "skipped" if verdicts else "passed"
        name = f"{test.get('classname', '').rpartition('.')[2]}::{test.get('name')}"
        found[verdict].append(name)
        reasons |= {child.get("message", "")[:300] for child in reports}
    return {
        "passed": len(found["passed"]),
        "failed": found["failed"],
        "skipped": len(found["skipped"]),
        "reasons": sorted(reasons)[:20],
    }


def _read_json(file: Path) -> dict[str, object]:
    return json.loads(file.read_text()) if file.is_file() else {}


def run_part(part: Part, folder: Path, log: Path, seconds_left: float) -> Outcome:
    """Run one part within its limit and what is left in all; its output goes to the end of `log`."""
    if part.skip:
        return Outcome(part.name, "skipped", 0.0, part.skip)
    limit = min(part.limit, seconds_left)
    if limit < 1:
        return Outcome(part.name, "skipped", 0.0, "no time was left")
    started = time.monotonic()
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **part.environment}
    with log.open("a") as output:
        output.write(f"\n==== {part.name}: {' '.join(part.command)}\n")
        output.flush()
        start = output.tell()
        try:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(part.name, "failed", 0.0, f"did not start: {error}")
        try:
            code = process.wait(timeout=limit)
            status, detail = ("passed", "") if code == 0 else ("failed", f"exit status {code}")
        except subprocess.TimeoutExpired:
            status, detail = "timed out", f"after {limit:.0f} s"
        finally:
            _end(process)
    seconds = time.monotonic() - started
    try:
        findings = part.read(folder)
    except (OSError, ValueError, ElementTree.ParseError) as error:  # a part that was cut off while it wrote
        findings, detail = {}, f"{detail}; what it wrote cannot be read: {error}"
    if status != "passed":
        detail += f"; its last words: {_last_words(log, start)}"
    return Outcome(part.name, status, seconds, detail, findings)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the part with all that it started; a session of its own holds exactly those."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def _last_words(log: Path, start: int, lines: int = 3) -> str:
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    return " | ".join([line.strip()[:200] for line in text.splitlines() if line.strip()][-lines:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the report; made if it is not there"
    )
    parser.add_argument(
        "--parts", default="", help="comma-separated names or beginnings of names; all if empty"
    )
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"in all (default {MINUTES})")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: emulator and made-up times")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    facts = machine() | {"started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    if "gpu" not in facts and not options.dry_run and not options.list:
        raise SystemExit("gpu_report: found no CUDA device, or torch is a CPU build; without one: --dry-run")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chosen = choose(parts(folder, options.dry_run), options.parts)
        if options.list:
            print(*(f"{part.name:20s} at most {part.limit:.0f} s" for part in chosen), sep="\n")
            return 0
        options.out.mkdir(parents=True, exist_ok=True)
        log = options.out / "log.txt"
        log.write_text("")
        content: dict[str, object] = {"synthetic": options.dry_run, "machine": facts}
        outcomes: list[Outcome] = []
        for part in chosen:
            outcome = run_part(part, folder, log, end - time.monotonic())
            outcomes.append(outcome)
            print(
                f"{outcome.status:10s} {outcome.seconds:6.1f} s  {part.name}  {outcome.detail[:300]}",
                flush=True,
            )
            content["parts"] = [asdict(outcome) for outcome in outcomes]
            _write(options.out, content)
    try:
        gpu_page.plot(content, options.out)
    except ImportError as error:
        print(f"no plots: {error}")
    print(f"written: {options.out / 'report.md'}")
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


def choose(found: Sequence[Part], wanted: str) -> list[Part]:
    """The parts whose names begin with one of `wanted`. Raises SystemExit for a word that fits none."""
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    for word in words:
        if not any(part.name.startswith(word) for part in found):
            raise SystemExit(
                f"gpu_report: no part {word!r}, expected one of {', '.join(p.name for p in found)}"
            )
    return [part for part in found if not words or part.name.startswith(tuple(words))]


def _write(out: Path, content: dict[str, object]) -> None:
    (out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "report.md").write_text(gpu_page.page(content))


if __name__ == "__main__":
    raise SystemExit(main())
