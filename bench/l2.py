"""How often SMs found in L2 what they asked for, by Nsight Compute's `ncu`.

Its usual way, a kernel at a time, would part kernels that run beside each other. Here it counts over ranges,
between cudaProfilerStart and cudaProfilerStop, and runs the program again where one pass is too few.
"""

import csv
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HIT, MISS = (f"lts__t_sectors_srcunit_tex_lookup_{what}.sum" for what in ("hit", "miss"))
OPTIONS = (
    *("--replay-mode", "app-range", "--clock-control", "none", "--cache-control", "none"),
    *("--metrics", f"{HIT},{MISS}", "--csv", "--page", "raw", "--print-units", "base"),
)


class NotCounted(Exception):
    """Says in a sentence why there are no figures."""


@dataclass(frozen=True)
class Lookups:
    """Sectors of 32 bytes."""

    hit: float
    missed: float

    @property
    def rate(self) -> float:
        return self.hit / max(1.0, self.hit + self.missed)


def count(command: Sequence[str], ranges: int, seconds: float) -> list[Lookups]:
    """Of each of the `ranges` that the program `command` has, in `seconds` at most. Raises NotCounted."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise NotCounted("found no ncu (Nsight Compute) on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        whole = [ncu, *OPTIONS, "--log-file", str(log), *command]
        try:
            done = subprocess.run(whole, capture_output=True, text=True, errors="replace", timeout=seconds)
        except subprocess.TimeoutExpired:
            raise NotCounted(f"ncu took longer than {seconds:.0f} s") from None
        except OSError as error:
            raise NotCounted(f"ncu did not start: {error}") from None
        written = log.read_text(errors="replace") if log.is_file() else ""
        if done.returncode:
            said = [line.strip() for line in f"{done.stdout}\n{done.stderr}\n{written}".splitlines()]
            said = [line for line in said if "==ERROR==" in line] or [line for line in said if line]
            words = " | ".join(said[-3:])[:400]
            raise NotCounted(f"ncu ended with exit status {done.returncode}: {words}")
    found = read(written)
    if len(found) != ranges:
        raise NotCounted(f"ncu counted {len(found)} ranges, expected {ranges}")
    return found


def read(text: str) -> list[Lookups]:
    """Of what `ncu --csv --page raw` writes: its own remarks, names, units, a line a range."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    try:
        rows = [row for row in csv.DictReader(lines[start:]) if row["ID"]]
        return [Lookups(*(float(row[name].replace(",", "")) for name in (HIT, MISS))) for row in rows]
    except (csv.Error, KeyError, ValueError, AttributeError) as error:
        raise NotCounted(f"ncu wrote something else than its counts: {error!r}") from None
