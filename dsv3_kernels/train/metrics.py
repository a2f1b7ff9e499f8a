"""metrics.jsonl: one row a step and precision, kept free of duplicates when a run goes on."""

import json
from pathlib import Path
from typing import Any

from dsv3_kernels.train.checkpoint import replace_file
from dsv3_kernels.train.errors import TrainError


class MetricsLog:
    """Appends rows to a file, after dropping those the checkpoints do not know (a killed run's last ones)."""

    def __init__(self, path: Path, steps: dict[str, int]) -> None:
        """steps: for each precision, the step its checkpoint stands at."""
        self.rows = [row for row in _read(path) if row["step"] <= steps.get(row["precision"], 0)]
        replace_file(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the log)

    def append(self, row: dict[str, Any]) -> None:
        """row: a StepMetrics as a dict, and validation_loss."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def of(self, precision: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["precision"] == precision]

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break  # the row that a killed run was writing
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"]), "precision": str(row["precision"])})
        except (ValueError, TypeError, KeyError) as error:
            raise TrainError(f"{path}, line {number}: not a row of metrics: {error}") from error
    return rows
