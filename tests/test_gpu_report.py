"""The plumbing of a GPU day, where there is no GPU: registry, parts and their limits, timing, page, plots."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import cases, gpu_bench, gpu_page, gpu_report, gpu_results, gpu_timing, run_cases
from bench.cases import Candidates, Workload
from bench.report import Report

ROOT = Path(__file__).parents[1]
CEILINGS = {"copy_bytes_per_s": 4e12, "fp8_flops_per_s": 1e15}
FIRST = {case.name.split()[0]: case for case in reversed(list(cases.cases()))}


# ---- The registry


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_a_registered_case_is_right_in_the_emulator(case):
    assert run_cases.run(case, "emulator", seed=1) == []


def test_names_tell_cases_and_workloads_apart():
    for names in (
        [case.name for case in cases.cases()],
        [f"{op} {row}" for op in cases.ops() for row in cases.workloads(op)],
    ):
        assert len(set(names)) == len(names) > 10


def test_every_kernel_has_a_case():
    from dsv3_kernels import gemm, quantize, wgrad

    assert set(FIRST) >= {*gemm.kernels(), *quantize.kernels(), *wgrad.kernels()}


def test_a_sample_has_the_first_and_the_last_of_every_op():
    found = [
        cases.Case(f"{op} {i}", *[None] * 3)
        for op, count in (("a", 9), ("b", 2), ("c", 1))
        for i in range(count)
    ]
    assert [case.name for case in run_cases.spread(found, 3)] == ["a 0", "b 0", "c 0", "a 4", "b 1", "a 8"]
    assert len(run_cases.spread(found, 100)) == 12 and len(run_cases.spread(found, 1)) == 3


def test_a_run_of_cases_says_what_was_wrong_and_what_it_did_not_reach(monkeypatch, capsys):
    fine = list(FIRST.values())[-1]
    wrong = cases.Case("wrong 1", fine.inputs, fine.run, lambda *tensors: (tensors[0],))
    monkeypatch.setattr(cases, "cases", lambda: iter([fine, wrong]))
    assert run_cases.main(["--device", "emulator", "--only", fine.name]) == 0
    assert run_cases.main(["--device", "emulator"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert run_cases.main(["--device", "emulator", "--seconds", "0"]) == run_cases.NOT_REACHED
    assert f"not reached in 0 s: {fine.name}, wrong 1" in capsys.readouterr().out


def test_differences_are_found_to_the_bit():
    x = torch.tensor([0.0, 1.0, float("nan"), float("inf")])
    other_nan = x.clone()
    other_nan.view(torch.int32)[2] = -1
    assert other_nan.isnan()[2]
    assert cases.differences((x, x), (x.clone(), other_nan)) == []
    minus_zero = x.clone()
    minus_zero[0] = -0.0
    for wrong in ((minus_zero,), (x.nextafter(torch.tensor(2.0)),), (x[:3],), (x.double(),), (x, x)):
        assert cases.differences(wrong, (x,)), wrong
    codes = torch.tensor([0x7F, 0xFF, 3], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert cases.differences((codes[:1],), (codes[1:2],)) == []
    assert "1 of 1 differ" in cases.differences((codes[2:],), (codes[1:2],))[0]


def test_a_copy_keeps_its_strides():
    x = torch.empty_strided((3, 5), (1, 4)).fill_(7)
    copy = cases.to_device(x, "cpu")
    assert copy.stride() == (1, 4) and torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()


# ---- Timing


class Clock:
    """CUDA events whose clock advances with each call, and the order of everything that was queued."""

    def __init__(self, monkeypatch):
        self.now, self.queue = 0.0, []
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now
                clock.queue.append("event")

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        self.timer = object.__new__(gpu_timing.ColdTimer)
        self.timer._flush = self

    def sum(self):
        self.queue.append("flush")
        self.now += 100

    def call(self, name, milliseconds):
        def call():
            self.queue.append(name)
            self.now += milliseconds

        return call


def test_every_timed_call_follows_a_flush_and_candidates_take_turns(monkeypatch):
    clock = Clock(monkeypatch)
    times = clock.timer.measure({"a": clock.call("a", 2), "b": clock.call("b", 3)}, seconds=0.0)
    assert times == {"a": [pytest.approx(2e-3)] * 5, "b": [pytest.approx(3e-3)] * 5}
    one_round = [part for name in "ab" for part in ("flush", "event", name, "event")]
    assert clock.queue == ["a"] * 3 + ["b"] * 3 + one_round * 5


class GivenTimes:
    def __init__(self, **times):
        self.times, self.asked = times, None

    def measure(self, calls, seconds):
        for call in calls.values():
            call()
        self.asked = list(calls)
        return {name: [self.times[name]] * 3 for name in calls}


def test_a_peer_that_is_missing_or_computes_something_else_is_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    right = torch.ones(4, 4)

    def missing():
        raise ImportError("No module named 'deep_gemm'\nand more")

    peers = {
        "slow": lambda: lambda: right * 1.001,
        "fast": lambda: lambda: right * 0.999,
        "wrong": lambda: lambda: right * 1.1,
        "nan": lambda: lambda: right * float("nan"),
        "missing": missing,
        "BF16": lambda: lambda: right * 5,
    }
    row = Workload("dense", "x", 8e9, 4e6, lambda: Candidates(lambda: right, peers))
    report, timer = Report("test"), GivenTimes(ours=1e-5, slow=4e-5, fast=1.2e-5, BF16=2e-5)
    gpu_bench.measure_row(report, timer, row, CEILINGS, 1.0)
    (result,) = report.results
    assert timer.asked == ["ours", "slow", "fast", "BF16"]
    assert set(result["left_out"]) == {"wrong", "nan", "missing"}
    assert result["left_out"]["missing"] == "ImportError: No module named 'deep_gemm'"
    assert (result["best_peer"], result["speed_against_best_peer"]) == ("fast", pytest.approx(1.2))
    assert result["tflops"] == pytest.approx(800) and result["gbytes_per_s"] == pytest.approx(400)
    assert result["of_floor"] == pytest.approx(0.8)  # 8 us of operations, 1 us of bytes, in 10 us


def test_a_row_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_timing, "ColdTimer", lambda: GivenTimes(ours=1e-5))
    monkeypatch.setattr(gpu_bench, "measure_ceilings", lambda timer: dict(CEILINGS))

    def broken():
        raise RuntimeError("out of memory\nand more")

    fine = Candidates(lambda: torch.ones(1))
    rows = [Workload("g", "1", 0, 1, broken), Workload("g", "2", 0, 1, lambda: fine, peak="none")]
    out = tmp_path / "out.json"
    gpu_bench.run("test", rows, 10.0, out)
    first, second = json.loads(out.read_text())["results"]
    assert first["error"] == "RuntimeError: out of memory" and second["median"] == 1e-5
    gpu_bench.run("test", rows, -1.0, out)
    assert all("not reached" in row["error"] for row in json.loads(out.read_text())["results"])


# ---- Parts


def part(name, code, limit=30.0, **options):
    return gpu_report.Part(name, limit, [sys.executable, "-c", code], **options)


@pytest.fixture
def run(tmp_path):
    log = tmp_path / "log.txt"
    return lambda part, left=100.0: gpu_report.run_part(part, tmp_path, log, left)


def test_a_part_passes_or_fails_with_its_last_words(run, tmp_path):
    outcome = run(part("fine", "print('hello')"))
    assert (outcome.status, outcome.detail) == ("passed", "")
    outcome = run(part("bad", "import sys; print('one'); print('two'); sys.exit(3)"))
    assert (outcome.status, outcome.detail) == ("failed", "exit status 3; its last words: one | two")
    log = (tmp_path / "log.txt").read_text()
    assert log.count("====") == 2 and "hello" in log
    missing = gpu_report.Part("missing", 5, ["/no/such/program"])
    assert run(missing).detail.startswith("did not start: ")
    assert run(part("skipped", "", skip="no tool")).detail == "no tool"
    assert run(part("late", ""), left=0.5).detail == "no time was left"


def test_a_part_that_takes_too_long_ends_with_all_that_it_started(run, tmp_path):
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}])"
    code += "; print(p.pid, flush=True); p.wait()"
    started = time.monotonic()
    outcome = run(part("slow", code, limit=2.0))
    assert outcome.status == "timed out" and time.monotonic() - started < 15
    pid = int(outcome.detail.rpartition(" ")[2])
    deadline = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_a_part_wrote_is_read_even_if_it_was_cut_off(run, tmp_path):
    out = tmp_path / "x.json"
    code = f"open({str(out)!r}, 'w').write('{{\"results\": [1')"
    outcome = run(part("cut", code, read=lambda folder: json.loads(out.read_text())))
    assert outcome.findings == {} and "cannot be read" in outcome.detail


def test_tests_are_counted_from_their_report(tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a.test_x" name="one"/>'
        '<testcase classname="a.test_x" name="two"><failure message="wrong"/></testcase>'
        '<testcase classname="a.test_x" name="three"><skipped message="no GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = gpu_report._read_tests(tmp_path)
    assert found == {"passed": 1, "failed": ["test_x::two"], "skipped": 1, "reasons": ["no GPU", "wrong"]}


def test_parts_are_chosen_by_the_beginnings_of_their_names(tmp_path):
    found = gpu_report.parts(tmp_path, dry=True)
    names = [part.name for part in found]
    assert {"build", "tests", "host", "bench-gemm", "bench-quantize", "sanitize-racecheck"} <= set(names)
    assert [part.name for part in gpu_report.choose(found, "tests, sani")] == ["tests", *names[-4:]]
    assert gpu_report.choose(found, "") == found
    with pytest.raises(SystemExit, match="no part 'tset', expected one of machine, build"):
        gpu_report.choose(found, "tset")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run(tmp_path):
    with pytest.raises(SystemExit, match="found no CUDA device"):
        gpu_report.main(["--out", str(tmp_path)])


# ---- The whole, dry


def test_a_dry_run_writes_page_json_log_and_plots(tmp_path, capsys):
    out = tmp_path / "report"
    assert gpu_report.main(["--out", str(out), "--dry-run", "--parts", "bench-gemm,sanitize-memcheck"]) == 0
    assert {path.name for path in out.iterdir()} == {
        *("report.md", "report.json", "log.txt", "roofline.png", "ratios.png")
    }
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("roofline.png", "ratios.png"))
    page = (out / "report.md").read_text()
    assert "**A dry run: the times below are made up.**" in page
    for row in cases.workloads("gemm"):
        assert f"| {row.name} |" in page
    content = json.loads((out / "report.json").read_text())
    assert [part["status"] for part in content["parts"]] == ["passed", "passed"]
    with pytest.raises(ValueError, match="made up"):
        gpu_results.keep(out / "report.json", tmp_path / "results")


def test_the_page_says_what_a_training_step_took():
    rows = [
        {
            "name": "mini step, FP8",
            "median": 0.1,
            "tokens_per_s": 8e4,
            "peak_gib": 9.5,
            "speed_against_peer": 1.5,
        },
        {"name": "mini step, BF16", "median": 0.15, "tokens_per_s": 5e4, "peak_gib": 14.0},
    ]
    part = {"part": "model", "status": "passed", "seconds": 1.0, "detail": "", "findings": {"results": rows}}
    page = gpu_page.page({"synthetic": False, "machine": {"started": "2026-11-22"}, "parts": [part]})
    assert "- mini step, FP8: 100.0 ms, 80000 tokens/s, at most 9.50 GiB, 1.50 of BF16's speed" in page
    assert "- mini step, BF16: 150.0 ms, 50000 tokens/s, at most 14.00 GiB\n" in page


# ---- Results and README


def content_of(started, speed):
    rows = [Workload("dense", str(i), 1e12, 1e9, lambda: None) for i in range(2)]
    report = Report("gemm-gpu")
    report.machine |= CEILINGS
    for row in rows:
        times = {"ours": [1e-3], "peer": [speed * 1e-3]}
        report.add(str(row), times["ours"], **gpu_bench.row_facts(row, times, {}, CEILINGS))
    report.note("dense 9", "RuntimeError: refused", group="dense")
    findings = {"machine": report.machine, "results": report.results}
    machine = {"gpu": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "torch": "2.11", "started": started}
    part = {"part": "bench-gemm", "status": "passed", "seconds": 1.0, "detail": "", "findings": findings}
    return {"synthetic": False, "machine": machine, "parts": [part]}


def test_real_runs_are_kept_and_the_newest_makes_the_table(tmp_path):
    results = tmp_path / "results"
    assert gpu_results.newest(results) is None
    for started, speed in (("2026-12-02T00:00:00+00:00", 1.5), ("2026-12-01T00:00:00+00:00", 9.0)):
        report = tmp_path / "report.json"
        report.write_text(json.dumps(content_of(started, speed)))
        kept = gpu_results.keep(report, results)
        assert kept.name == f"{started[:10]}-NVIDIA-H200-580.1.json"
    readme = f"before\n{gpu_results.BEGIN}\nstale\n{gpu_results.END}\nafter\n"
    new = gpu_results.renewed(readme, gpu_results.newest(results))
    assert "stale" not in new and new.startswith("before\n") and new.endswith("\nafter\n")
    assert "| gemm, dense | 2 | 100 % | 1.50 | 1.50 |" in new and "2026-12-02" in new
    assert gpu_results.renewed(new, gpu_results.newest(results)) == new
    with pytest.raises(ValueError, match="found no <!-- gpu results"):
        gpu_results.renewed("nothing", None)


def test_the_page_names_what_failed():
    page = gpu_page.page(content_of("2026-12-01T00:00:00+00:00", 2.0))
    assert "| 9 | RuntimeError: refused |" in page
    assert "Geometric mean of the speed against the best peer: 2.000" in page


def test_readme_shows_the_newest_kept_result_or_that_there_is_none():
    readme = (ROOT / "README.md").read_text()
    newest = gpu_results.newest(gpu_results.RESULTS)
    assert gpu_results.renewed(readme, newest) == readme
    assert (gpu_page.NOT_MEASURED in gpu_page.readme_table(newest)) == (newest is None)
