"""What a run shows: the progress line while it trains; a table, a plot and summary.json at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from torch import Tensor

from dsv3_kernels.train.observe.metrics import MetricsLog
from dsv3_kernels.train.state.checkpoint import replace_file

AVERAGED = 20
"""The training loss after a run is the mean of its last steps, at most this many."""
COUNTED = 1 << 24
"""Tokens that unigram and bigram models are made of."""


class ProgressLine:
    """A live bar on a terminal; elsewhere a line every tenth of the run."""

    def __init__(self, console: Console, done: int, steps: int) -> None:
        self.console, self.steps = console, steps
        self._every = max(1, steps // 10)
        columns = (
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, expand=True)
        self._task = self._progress.add_task("training", total=steps, completed=done, text="")

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: int, rows: list[dict[str, Any]]) -> None:
        losses = ", ".join(f"{row['loss']:.3f} {row['precision']}" for row in rows)
        speeds = ", ".join(f"{row['tokens_per_second']:,.0f}" for row in rows)
        used = [row["mfu"] for row in rows if row.get("mfu") is not None]
        mfu = f", {max(used):.0%} MFU" if used else ""
        load = max((row["expert_load"] for row in rows), default=1.0)
        # All columns together fit into a line of 80.
        text = f"loss {losses}; {speeds} tokens/s{mfu}; load {load:.1f}"
        self._progress.update(self._task, completed=step, text=text)
        if not self.console.is_terminal and (step % self._every == 0 or step == self.steps):
            self.console.print(f"step {step}/{self.steps}  {text}", highlight=False)


@dataclass(frozen=True)
class SameWeights:
    """Validation loss of one set of weights, computed in FP8 and in BF16."""

    weights: str
    fp8: float
    bf16: float

    @property
    def difference(self) -> float:
        return self.fp8 / self.bf16 - 1


@dataclass(frozen=True)
class Summary:
    """What the run came to; losses in nats a token, or byte."""

    steps: int
    seconds: float
    unigram: float
    bigram: float
    validation_before: dict[str, float]
    validation_after: dict[str, float]
    same_weights: list[SameWeights]
    unit: str = "byte"

    def write(self, path: Path, log: MetricsLog) -> None:
        training = {p: {"before": _first(log, p), "after": _last(log, p)} for p in self.validation_after}
        same = [vars(s) | {"difference": s.difference} for s in self.same_weights]
        content = vars(self) | {"training": training, "same_weights": same}
        replace_file(path, (json.dumps(content, indent=1) + "\n").encode())

    def print(self, console: Console, log: MetricsLog) -> None:
        precisions = list(self.validation_after)
        table = Table(title=f"{self.steps} steps, losses in nats a {self.unit}", title_justify="left")
        table.add_column("")
        for precision in precisions:
            table.add_column(precision.upper(), justify="right")
        paired = len(precisions) == 2
        if paired:
            table.add_column(f"{precisions[0].upper()} against {precisions[1].upper()}", justify="right")
        rows = {
            "training loss before": {p: _first(log, p) for p in precisions},
            f"training loss after (mean of {AVERAGED})": {p: _last(log, p) for p in precisions},
            "validation loss before": self.validation_before,
            "validation loss after": self.validation_after,
        }
        averages: dict[str, Any] = {p: log.of(p)[-1].get("validation_loss_ema") for p in precisions}
        if None not in averages.values():
            rows["validation loss of the average"] = averages
        for name, values in rows.items():
            cells = [f"{values[p]:.4f}" for p in precisions]
            if paired:
                cells.append(_percent(values[precisions[0]] / values[precisions[1]] - 1))
            table.add_row(name, *cells)
        speeds = [_speed(log, p) for p in precisions]
        ratio = [f"{speeds[0] / speeds[1]:.2f}x"] if paired else []
        table.add_row("tokens/s", *(f"{s:,.0f}" for s in speeds), *ratio)
        console.print(table)
        same = Table(title="the same weights computed both ways, validation loss", title_justify="left")
        for column in ("weights", "in FP8", "in BF16", "difference"):
            same.add_column(column, justify="left" if column == "weights" else "right")
        for s in self.same_weights:
            same.add_row(s.weights, f"{s.fp8:.4f}", f"{s.bf16:.4f}", _percent(s.difference))
        console.print(same)
        console.print(
            f"A unigram model of the text has {self.unigram:.2f}, a bigram model {self.bigram:.2f}. "
            "Chance alone moves a trained loss by about 1 %: bench/bench_train.py compares several seeds.",
            highlight=False,
        )


def _first(log: MetricsLog, precision: str) -> float:
    return log.of(precision)[0]["loss"]


def _last(log: MetricsLog, precision: str) -> float:
    losses = [row["loss"] for row in log.of(precision)[-AVERAGED:]]
    return sum(losses) / len(losses)


def _speed(log: MetricsLog, precision: str) -> float:
    rows = log.of(precision)
    return sum(row["tokens_per_second"] * row["seconds"] for row in rows) / sum(
        row["seconds"] for row in rows
    )


def _percent(difference: float) -> str:
    return f"{100 * difference:+.3f} %"


def entropies(text: Tensor) -> tuple[float, float]:
    """Nats a token of the best unigram and bigram model of the text itself (its first COUNTED tokens)."""
    ids = text[:COUNTED].long()
    size = int(ids.max()) + 1
    unigrams = torch.bincount(ids).double()
    pairs = ids[:-1] * size + ids[1:]
    counts = torch.bincount(pairs) if size <= 256 else pairs.unique(return_counts=True)[1]
    one, two = (float(-(c / c.sum()).xlogy(c / c.sum()).sum()) for c in (unigrams, counts.double()))
    return one, two - one


def plot(path: Path, log: MetricsLog, summary: Summary) -> None:
    """loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    draw_losses(axes, log, summary)
    writing = path.with_name(f".{path.name}")
    figure.savefig(writing, format="png")
    pyplot.close(figure)
    writing.replace(path)


def draw_losses(axes: Any, log: MetricsLog, summary: Summary) -> None:
    """Each precision's training loss, faint and averaged, with validation as points."""
    for color, precision in zip(("tab:blue", "tab:orange"), summary.validation_after, strict=False):
        rows = log.of(precision)
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        averaged = [sum(losses[low:high]) / (high - low) for low, high in _windows(len(losses))]
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, averaged, color=color, label=f"{precision.upper()} training")
        checked = [
            (row["step"], row["validation_loss"]) for row in rows if row["validation_loss"] is not None
        ]
        axes.plot(*zip(*checked, strict=True), "o", color=color, label=f"{precision.upper()} validation")
    for name, value in (("unigram", summary.unigram), ("bigram", summary.bigram)):
        axes.axhline(value, color="gray", linewidth=0.8, linestyle=":")
        axes.annotate(name, (0, value), textcoords="offset points", xytext=(2, 2), fontsize=8, color="gray")
    axes.set(xlabel="step", ylabel=f"loss, nats a {summary.unit}")
    axes.legend()


def _windows(count: int) -> list[tuple[int, int]]:
    """(low, high) of the window around each step: 4 steps either side, fewer at the ends of the run."""
    return [(i - min(i, 4), min(count, i + min(i, 4) + 1)) for i in range(count)]
