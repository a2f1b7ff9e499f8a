"""report.html: a run on one page, in one file that needs no network."""

import base64
import dataclasses
import html
import io
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dsv3_kernels.train import schedule
from dsv3_kernels.train.config import RunConfig
from dsv3_kernels.train.observe.metrics import MetricsLog
from dsv3_kernels.train.observe.report import Summary, draw_losses
from dsv3_kernels.train.state.checkpoint import replace_file

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2 { font-weight: 600 } img { max-width: 100% } table { border-collapse: collapse }
td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } details { margin: 1em 0 }
"""


def write_page(path: Path, config: RunConfig, log: MetricsLog, summary: Summary) -> None:
    """Losses, expert loads by layer, speed and memory, schedules, settings."""
    precisions = list(summary.validation_after)
    sections = [
        _table(
            ["", *(p.upper() for p in precisions)],
            [
                ["validation loss before", *(f"{summary.validation_before[p]:.4f}" for p in precisions)],
                ["validation loss after", *(f"{summary.validation_after[p]:.4f}" for p in precisions)],
            ],
        ),
        _section("Loss", _picture(lambda f: draw_losses(f.subplots(), log, summary), 4.5)),
        _section(
            "Expert load",
            "<p>The most loaded expert of each layer over the mean: 1 is even. The last row is the MTP "
            "module's, where there is one.</p>"
            + "".join(_picture(partial(_draw_loads, log=log, precision=p), 2.5) for p in precisions),
        ),
        _section("Speed and memory", _picture(lambda f: _draw_machine(f, log, precisions), 3.5)),
        _section("Schedule", _picture(lambda f: schedule.plot(f.subplots(), config.train), 3.5)),
        _settings(config),
    ]
    title = f"{config.preset}, {summary.steps} steps, {summary.seconds:,.0f} s"
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p>Losses are nats a {html.escape(summary.unit)}.</p>{''.join(sections)}</html>\n"
    )
    replace_file(path, page.encode())


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _picture(draw: Callable[[Any], None], height: float) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9, height), dpi=110, layout="constrained")
    draw(figure)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    pyplot.close(figure)
    return f'<p><img alt="" src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'


def _draw_loads(figure: Any, log: MetricsLog, precision: str) -> None:
    """A row a layer, a column a step."""
    rows = [row for row in log.of(precision) if row.get("expert_loads")]
    axes = figure.subplots()
    axes.set_title(precision.upper(), fontsize=10)
    if not rows:
        axes.text(0.5, 0.5, "no layer has experts", ha="center", transform=axes.transAxes)
        return
    loads = list(zip(*(row["expert_loads"] for row in rows), strict=True))
    extent = (rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5, len(loads) - 0.5, -0.5)
    image = axes.imshow(
        loads, aspect="auto", interpolation="nearest", extent=extent, cmap="magma_r", vmin=1.0
    )
    axes.set(xlabel="step", ylabel="MoE layer", yticks=range(0, len(loads), max(1, len(loads) // 10)))
    figure.colorbar(image, label="max / mean")


def _draw_machine(figure: Any, log: MetricsLog, precisions: list[str]) -> None:
    speed, memory = figure.subplots(1, 2)
    for precision in precisions:
        rows = log.of(precision)
        steps = [row["step"] for row in rows]
        speed.plot(steps, [row["tokens_per_second"] for row in rows], label=precision.upper())
        gigabytes = [(row.get("memory") or math.nan) / 1e9 for row in rows]
        memory.plot(steps, gigabytes, label=precision.upper())
    speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
    memory.set(xlabel="step", ylabel="memory, GB", ylim=(0, None))
    speed.legend()


def _settings(config: RunConfig) -> str:
    def rows(value: Any, prefix: str = "") -> list[list[str]]:
        found = []
        for name, item in dataclasses.asdict(value).items():
            found += (
                [[f"{prefix}{name}.{k}", str(v)] for k, v in item.items()]
                if isinstance(item, dict)
                else [[f"{prefix}{name}", str(item)]]
            )
        return found

    return f"<details><summary>Settings</summary>{_table(['name', 'value'], rows(config))}</details>"
