"""python -m dsv3_kernels.train.show_schedule: a pipeline schedule, drawn, and its bubbles."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dsv3_kernels.train.observe.trace import TraceEvent, write_trace
from dsv3_kernels.train.pipeline.actions import Work, label, works
from dsv3_kernels.train.pipeline.schedules import SCHEDULES, compare
from dsv3_kernels.train.pipeline.simulate import Span, Timeline, Times, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "F": ("#f6c667", "#f2994a"),
    "B": ("#7fb3e6", "#3d7fc1"),
    "I": ("#a8dadc", "#6dbabd"),
    "W": ("#b8d8a0", "#8fbc6f"),
}
"""Of each kind of work, in the two directions."""
MEANINGS = {"F": "forward", "B": "backward", "I": "backward, inputs only", "W": "weight gradients"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.train.show_schedule",
        description="Draws what each rank of a pipeline does when, and compares its bubbles with other "
        "schedules'. Times are those of one P-th of the layers on one micro-batch, in any unit.",
    )
    parser.add_argument("--pp", type=int, default=8, metavar="P", help="Ranks (default: 8).")
    parser.add_argument("--micro-batches", type=int, default=20, metavar="N", help="A step (default: 20).")
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="dualpipe", help="(default: dualpipe)")
    parser.add_argument("--f", type=float, default=1.0, metavar="T", help="A forward (default: 1).")
    parser.add_argument("--b", type=float, default=2.0, metavar="T", help="A whole backward (default: 2).")
    parser.add_argument(
        "--w", type=float, default=1.0, metavar="T", help="Weight gradients alone (default: 1)."
    )
    parser.add_argument(
        "--fb", type=float, metavar="T", help="Forward and backward overlapped (default: F + B)."
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="Where to draw it (default: nowhere).")
    parser.add_argument(
        "--trace", type=Path, metavar="JSON", help="The same for ui.perfetto.dev, a unit a second."
    )
    return parser


def draw(timeline: Timeline, path: Path, unit: str = "") -> None:
    """Ranks downwards, time to the right; an overlapped pair shares its box, the forward above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    ranks, end = len(timeline.ranks), timeline.makespan
    actions = max(map(len, timeline.ranks))
    figure, axes = plt.subplots(
        figsize=(min(24.0, 2.0 + 0.3 * actions), 1.6 + 0.36 * ranks), layout="constrained"
    )
    for rank, spans in enumerate(timeline.ranks):
        for span in spans:
            _draw_span(axes, rank, span, timeline)
    axes.set(xlim=(0, end), ylim=(ranks - 0.5, -0.5), xlabel=f"time{unit}", yticks=range(ranks))
    axes.set_yticklabels([f"rank {rank}" for rank in range(ranks)])
    schedule = timeline.schedule
    axes.set_title(
        f"{schedule.name}, {ranks} ranks, {schedule.micro_batches} micro-batches: {end:.4g}, "
        f"of it bubbles {max(timeline.bubbles()):.4g}"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    kinds = {w.kind for _, w in schedule.all_works()}
    handles = [Patch(color=c[0], label=MEANINGS[k]) for k, c in COLOURS.items() if k in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_span(axes: "Axes", rank: int, span: Span, timeline: Timeline) -> None:
    from matplotlib.patches import Rectangle

    parts = works(span.action)
    height = 0.86 / len(parts)
    for i, work in enumerate(parts):
        top = rank - 0.43 + i * height
        colour = COLOURS[work.kind][_direction(work, rank, timeline)]
        width = span.end - span.start
        axes.add_patch(
            Rectangle((span.start, top), width, height, facecolor=colour, edgecolor="white", linewidth=0.6)
        )
        size = 7.0 if len(parts) == 1 else 5.5
        axes.text(
            span.start + width / 2,
            top + height / 2,
            str(work.micro_batch),
            ha="center",
            va="center",
            size=size,
        )


def _direction(work: Work, rank: int, timeline: Timeline) -> int:
    """1 for what came in at the other end, or is on its way back."""
    schedule = timeline.schedule
    ranks = len(timeline.ranks)
    if schedule.stages > ranks:
        return int(work.stage >= ranks)
    return int(work.stage != rank)


def table(ranks: int, micro_batches: int, times: Times) -> Table:
    rows = compare(ranks, micro_batches, times)
    title = f"{ranks} ranks, {micro_batches} micro-batches, F {times.forward:g}, B {times.backward:g}, "
    result = Table(title=f"{title}W {times.weight:g}, F&B {times.both:g}")
    result.add_column("schedule")
    for heading in ("step", "bubbles", "share", "published", "parameters", "activations"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.name,
            f"{row.makespan:.4g}",
            f"{row.bubble:.4g}",
            f"{row.bubble / row.makespan:.1%}",
            f"{row.published:.4g}",
            f"{row.parameters}x",
            f"{row.activations:g}",
        )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    given = build_parser().parse_args(arguments)
    try:
        times = Times(given.f, given.b, given.w, given.fb)
        timeline = simulate(SCHEDULES[given.schedule](given.pp, given.micro_batches), times)
        console = Console()
        console.print(table(given.pp, given.micro_batches, times))
        if given.out is not None:
            draw(timeline, given.out)
            console.print(f"Drawn: {given.out}", highlight=False, soft_wrap=True)
        if given.trace is not None:
            spans = [(rank, span) for rank, of_rank in enumerate(timeline.ranks) for span in of_rank]
            write_trace(
                given.trace, [TraceEvent(r, "compute", label(s.action), s.start, s.end) for r, s in spans]
            )
    except (ValueError, OSError) as error:
        print(f"show_schedule: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
