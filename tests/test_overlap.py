"""The hit rate of L2 in the bench of a GEMM beside dispatch, with a stand-in for ncu."""

import json
import sys

import pytest
import torch

from bench import bench_overlap, gpu_page, l2

REMARKS = '==PROF== Connected to process 7\n==PROF== Profiling "range": 0%....100% - 1 pass\n'
NAMES = f'"ID","Process ID","Kernel Name","{l2.HIT}","{l2.MISS}"\n"","","","sector","sector"\n'
RANGES = '"0","7","range","9,000","1,000"\n"1","7","range","1000","3000"\n"2","7","range","7000","7,000.0"\n'


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """Puts a program of this Python text on the PATH, alone; `log` is where it is to write."""

    def put(body):
        program = tmp_path / "bin" / "ncu"
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f"#!{sys.executable}\nimport json, sys, time\nfrom pathlib import Path\n"
            "log = Path(sys.argv[sys.argv.index('--log-file') + 1])\n"
            f"Path({str(tmp_path / 'arguments')!r}).write_text(json.dumps(sys.argv[1:]))\n{body}\n"
        )
        program.chmod(0o755)
        return lambda: json.loads((tmp_path / "arguments").read_text())

    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return put


def test_hit_rates_alone_and_beside(ncu):
    arguments = ncu(f"log.write_text({REMARKS + NAMES + RANGES!r})")
    found = bench_overlap.lookups({"a GEMM": 12, "dispatch": 3})
    assert found["rates"] == {"a GEMM, alone": 0.9, "dispatch, alone": 0.25, "both at once": 0.5}
    assert found["apart"] == 10 / 14
    given = arguments()
    assert given[-6:] == [sys.executable, "-m", "bench.bench_overlap", "--ranges", "12", "3"]
    assert given[given.index("--replay-mode") + 1] == "app-range"
    assert given[given.index("--clock-control") + 1] == "none"


@pytest.mark.parametrize(
    "body, reason",
    [
        (
            "print('==ERROR== ERR_NVGPUCTRPERM - no permission'); print('==PROF== over'); sys.exit(1)",
            "ncu ended with exit status 1: ==ERROR== ERR_NVGPUCTRPERM - no permission",
        ),
        (
            "log.write_text('==ERROR== Unknown mode app-range'); sys.exit(2)",
            "status 2: ==ERROR== Unknown mode",
        ),
        ("sys.exit(3)", "exit status 3: "),
        ("time.sleep(60)", "longer than 2 s"),
        ("", "counted 0 ranges, expected 3"),
        (f"log.write_text({REMARKS!r})", "counted 0 ranges, expected 3"),
        (f"log.write_text({NAMES + RANGES[:22]!r})", "something else than its counts"),
        (f"log.write_text({NAMES.replace('miss', 'mist') + RANGES!r})", "something else than its counts"),
        (f"log.write_text({NAMES + RANGES.replace('3000', 'n/a')!r})", "something else than its counts"),
        ("log.write_bytes(bytes(range(256)))", "counted 0 ranges"),
    ],
)
def test_without_figures_there_is_a_reason(ncu, monkeypatch, body, reason):
    monkeypatch.setattr(bench_overlap, "PROFILE_SECONDS", 2)
    ncu(body)
    found = bench_overlap.lookups({"a GEMM": 1, "dispatch": 1})
    assert set(found) == {"left_out"} and reason in found["left_out"]


def test_no_ncu_is_a_reason_too(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = bench_overlap.lookups({"a GEMM": 1, "dispatch": 1})
    assert found == {"left_out": "found no ncu (Nsight Compute) on the PATH"}


def test_the_profiled_program_has_a_range_for_each_alone_and_one_for_both(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: events.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: events.append("stop"))
    monkeypatch.setattr(bench_overlap, "together", lambda calls: events.append(list(calls)))
    a, b = (len, 2), (max, 5)
    bench_overlap.ranges([a, b])
    assert events == ["start", [a], "stop", "start", [b], "stop", "start", [a, b], "stop"]


def test_the_page_has_the_rates_or_the_reason(tmp_path):
    out = tmp_path / "overlap.json"
    assert bench_overlap.main(["--synthetic", "--out", str(out)]) == 0
    findings = json.loads(out.read_text())

    def page():
        part = {"part": "overlap", "status": "passed", "seconds": 1.0, "detail": "", "findings": findings}
        return gpu_page.page({"synthetic": True, "machine": {"started": "2026-11-22"}, "parts": [part]})

    assert "| a GEMM | 1000.0 | 1040.0 | 4.0 % |" in page()
    assert "| a GEMM, alone | 80.0 % |" in page() and "| both at once | 60.0 % |" in page()
    assert "if neither disturbed the other | 65.0 % |" in page()
    findings["machine"]["l2"] = {"left_out": "found no ncu"}
    assert "Hit rate of L2: not measured, found no ncu." in page()
