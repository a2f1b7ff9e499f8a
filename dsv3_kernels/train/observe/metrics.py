"""metrics.jsonl, a row a step and precision, kept free of duplicates when a run goes on; TensorBoard."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch

from dsv3_kernels.model import ModelConfig, count_parameters
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.state.checkpoint import replace_file

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12}
"""Dense BF16 of NVIDIA's data sheets, which model FLOPs utilisation is counted against, FP8 or not. The first
name that a device's contains."""


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Of forward and backward: 6 for each parameter that a token meets, and causal attention's own.

    MTP modules and what is recomputed do not count, as in DeepSeek's figures.
    """
    parameters = count_parameters(model).active - model.vocab_size * model.hidden_size
    width = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    attention = model.num_hidden_layers * model.num_attention_heads * width * seq_len / 2
    return 6.0 * (parameters + attention)


class Meter:
    """What a run makes of its machine: MFU where the GPU is known, and memory in use."""

    def __init__(
        self, model: ModelConfig, seq_len: int, device: torch.device | str = "cpu", devices: int = 1
    ) -> None:
        self._device = torch.device(device)
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else ""
        peak = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
        self._mfu = None if peak is None else flops_per_token(model, seq_len) / (peak * devices)

    def read(self, tokens_per_second: float) -> dict[str, Any]:
        """mfu: a share or None. memory: bytes, of the GPU at most since the last call, or of the process."""
        mfu = None if self._mfu is None else self._mfu * tokens_per_second
        return {"mfu": mfu, "memory": _memory(self._device)}


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None  # not Linux
    return pages * os.sysconf("SC_PAGE_SIZE")


class MetricsLog:
    """Appends rows to a file, after dropping those the checkpoints do not know (a killed run's last ones).

    Where TensorBoard is installed its event files are written beside, a run a precision.
    """

    def __init__(self, path: Path, steps: dict[str, int], meter: Meter | None = None) -> None:
        """steps: for each precision, the step its checkpoint stands at."""
        self.rows = [row for row in _read(path) if row["step"] <= steps.get(row["precision"], 0)]
        self._meter = meter
        replace_file(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the log)
        self._boards = _tensorboards(path.parent / "tensorboard", steps)

    def append(self, row: dict[str, Any]) -> None:
        """row: a StepMetrics as a dict, with validation_loss; what the meter reads is added to it."""
        if self._meter is not None:
            row |= self._meter.read(row["tokens_per_second"])
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        board = self._boards.get(row["precision"])
        if board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    board.add_scalar(name, value, row["step"])

    def of(self, precision: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["precision"] == precision]

    def close(self) -> None:
        self._file.close()
        for board in self._boards.values():
            board.close()


def _tensorboards(folder: Path, steps: dict[str, int]) -> dict[str, Any]:
    """A writer a precision, which hides what an earlier process wrote past its checkpoint."""
    if importlib.util.find_spec("tensorboard") is None:
        return {}
    from torch.utils.tensorboard import SummaryWriter

    return {p: SummaryWriter(str(folder / p), purge_step=step + 1) for p, step in steps.items()}


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
