"""Scripts in bench/ run by their path, from anywhere, as well as with -m."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
SCRIPTS = [path for path in sorted(BENCH.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("by", ["path", "name"])
def test_a_script_starts(by, tmp_path):
    script = BENCH / "bench_train.py"
    command = [str(script)] if by == "path" else ["-m", "bench.bench_train"]
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path if by == "path" else BENCH.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--seeds" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_by_full_names(script):
    """A relative import would need the package that a script run by its path is not in."""
    assert not re.search(r"^\s*from \.", script.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "script",
    [path for path in SCRIPTS if "gpu_bench" in path.read_text() and path.stem.startswith("bench_")],
    ids=lambda path: path.stem,
)
def test_the_gpu_half_of_a_bench_takes_its_options(script, tmp_path, monkeypatch):
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", [str(script), "--gpu", "--synthetic", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
    assert json.loads(out.read_text())["results"]
