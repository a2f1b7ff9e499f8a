"""Scripts in bench/ run by their path, from anywhere, as well as with -m."""

import re
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
