"""What changes with the step: pure functions of it and the settings (section 4.2 of the DeepSeek-V3 report).

python -m dsv3_kernels.train.schedule --schedule paper --steps 1000 --out schedule.png
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_kernels.train import phases
from dsv3_kernels.train.config import TrainConfig, from_json, read_json
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.phases import Schedule, Steps

MTP_FALL = 3
"""What the weight of the MTP loss is divided by late in the run (0.3 to 0.1)."""


def _moments(config: TrainConfig) -> Steps:
    return phases.resolve(
        config.schedule, config.steps, config.batch_size, config.seq_len, config.warmup_steps
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, a rest, a cosine down to final_lr of the highest, a rest, and the last rate.

    Without a schedule there is no rest, and the cosine ends at the last step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    moments = _moments(config)
    if config.schedule is not None and config.schedule.last_lr is not None and step >= moments.last_lr_from:
        return config.lr * config.schedule.last_lr
    since, length = step - moments.constant_until, moments.decay_until - moments.constant_until
    progress = min(1.0, max(0.0, since) / length) if length else float(since >= 0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def batch_size(step: int, config: TrainConfig) -> int:
    """Sequences of the step, over all ranks."""
    ramp = _moments(config).ramp
    return ramp[step + 1] - ramp[step] if step + 1 < len(ramp) else config.batch_size


def first_sample(step: int, config: TrainConfig) -> int:
    """How many sequences the steps before this one took."""
    ramp = _moments(config).ramp
    last = min(step, len(ramp) - 1)
    return ramp[last] + (step - last) * config.batch_size


def mtp_weight(step: int, config: TrainConfig) -> float:
    """The paper's lambda."""
    early = step < _moments(config).mtp_weight_until
    return config.mtp_weight if early else config.mtp_weight / MTP_FALL


def bias_speed(step: int, config: TrainConfig) -> float:
    """The paper's gamma."""
    return config.bias_speed if step < _moments(config).bias_speed_until else 0.0


def load_schedule(name: str, batch_size: int, multiple: int = 1) -> Schedule | None:
    """cosine is none; paper, or a JSON file with the fields of `Schedule` that are to be set.

    multiple: of which the paper's batches are to be while they grow.
    """
    if name == "cosine":
        return None
    if name == "paper":
        return phases.paper(batch_size, multiple)
    value = read_json(Path(name), "--schedule", expected="cosine, paper or a JSON file")
    return from_json(Schedule, value, f"--schedule: {name}")


def plot(axes: Any, config: TrainConfig) -> None:
    """Draws all that changes, each as a share of its highest value, over the run."""
    steps = range(0, config.steps, max(1, config.steps // 2000))
    curves = {
        f"learning rate (of {config.lr:g})": [learning_rate(s, config) / (config.lr or 1) for s in steps],
        f"batch (of {config.batch_size})": [batch_size(s, config) / config.batch_size for s in steps],
        f"MTP weight (of {config.mtp_weight:g})": [
            mtp_weight(s, config) / (config.mtp_weight or 1) for s in steps
        ],
        f"bias speed (of {config.bias_speed:g})": [
            bias_speed(s, config) / (config.bias_speed or 1) for s in steps
        ],
    }
    for (name, values), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=True):
        axes.plot(steps, values, style, label=name)
    axes.set(xlabel="step", ylabel="share of the highest", ylim=(0, 1.05))
    axes.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.train.schedule",
        description="Draws what changes over a run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--schedule", default="paper", help="cosine, paper or a JSON file")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup-steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("schedule.png"))
    given = parser.parse_args(arguments)
    try:
        config = TrainConfig(
            steps=given.steps,
            warmup_steps=given.warmup_steps,
            batch_size=given.batch_size,
            schedule=load_schedule(given.schedule, given.batch_size),
        )
    except TrainError as error:
        print(f"dsv3_kernels.train.schedule: {error}", file=sys.stderr)
        return 1
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5), dpi=120, layout="constrained")
    plot(axes, config)
    figure.savefig(given.out)
    print(f"{given.out}: {first_sample(config.steps, config):,} sequences in {config.steps:,} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
