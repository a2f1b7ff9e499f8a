"""Keeps a GPU report in bench/results and renews README's table: `python -m bench.gpu_results report.json`.

Without a report it only renews the table, from the newest one kept; where none is, the table says so.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from bench import gpu_page

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- gpu results: written by bench/gpu_results.py -->", "<!-- end of gpu results -->"


def keep(report: Path, results: Path) -> Path:
    """Copy a real run's report, named by date, device and driver. Raises ValueError for a dry run's."""
    content = json.loads(report.read_text())
    facts = content["machine"]
    if content["synthetic"] or "gpu" not in facts:
        raise ValueError(f"{report}: its times are made up or of no GPU, expected a run on one")
    name = f"{facts['started'][:10]} {facts['gpu']} {facts['driver']}"
    target = results / (re.sub(r"[^A-Za-z0-9.]+", "-", name) + ".json")
    results.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")
    return target


def newest(results: Path) -> gpu_page.Content | None:
    kept = [json.loads(path.read_text()) for path in results.glob("*.json")]
    return max(kept, key=lambda content: content["machine"]["started"], default=None)


def renewed(readme: str, content: gpu_page.Content | None) -> str:
    """README with the table between its two marks. Raises ValueError if they are not there."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: found no {BEGIN} followed by {END}")
    return f"{before}{BEGIN}\n{gpu_page.readme_table(content)}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, nargs="?", help="report.json of a run on a GPU")
    options = parser.parse_args(arguments)
    if options.report is not None:
        print(f"kept: {keep(options.report, RESULTS)}")
    readme = ROOT / "README.md"
    readme.write_text(renewed(readme.read_text(), newest(RESULTS)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
