"""FP8 training against BF16 training: several seeds, each trained in both on the same batches.

Two numbers answer two questions. The same weights computed both ways tell what FP8 does to the loss of a
model: that is sharp, since nothing else differs. The trained losses tell whether training in FP8 ends
elsewhere: there the smallest rounding sends a run another way, so single runs differ by about 1 % in any
precision, and only the paired difference over several seeds, with its spread, says anything.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bench.report import Report
from dsv3_kernels.model import PRESETS
from dsv3_kernels.train.cli import TRAINABLE
from dsv3_kernels.train.data.corpus import load_corpus, validation_windows
from dsv3_kernels.train.trainer import Trainer

STUDENT_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Half-width of a 95 % interval of a mean, in standard errors, by number of samples."""


def percent(fp8: float, bf16: float) -> float:
    return 100 * (fp8 / bf16 - 1)


def train(trainer: Trainer, validation: Tensor, other: str) -> tuple[float, float, list[float]]:
    """Trains to the end. Returns the validation loss in its precision and in the other, and tokens/s."""
    speeds = []
    while trainer.step < trainer.config.steps:
        speeds.append(trainer.train_step().tokens_per_second)
    return trainer.evaluate(validation), trainer.evaluate(validation, other), speeds


def conclusion(differences: list[float]) -> str:
    """What the paired differences (in percent) allow to be said, and no more."""
    mean, count = statistics.mean(differences), len(differences)
    if count not in STUDENT_95:
        return f"FP8 against BF16, trained: {mean:+.2f} %; {count} seeds give no interval"
    half = STUDENT_95[count] * statistics.stdev(differences) / count**0.5
    claim = "no difference is shown" if abs(mean) <= half else f"FP8 ends {'higher' if mean > 0 else 'lower'}"
    return f"FP8 against BF16, trained: {mean:+.2f} % +- {half:.2f} % (95 %, {count} seeds): {claim}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    train_config = TRAINABLE["tiny"]
    parser.add_argument("--seeds", type=int, default=3, help="pairs of runs (default 3)")
    parser.add_argument("--steps", type=int, default=train_config.steps, help="a run (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write the JSON (default runs/bench/train.json)")
    options = parser.parse_args()
    if not 1 <= options.seeds <= max(STUDENT_95) or options.steps < 1:
        parser.error(f"--seeds must be 1 to {max(STUDENT_95)}, and --steps at least 1")

    model = PRESETS["tiny"]
    window = train_config.seq_len + 1 + model.num_nextn_predict_layers
    corpus = load_corpus(None, window)
    validation = validation_windows(corpus.validation, window, 128)
    losses: dict[str, list[float]] = {"fp8": [], "bf16": []}
    speeds: dict[str, list[float]] = {"fp8": [], "bf16": []}
    start, end, paired = [], [], []
    for seed in range(options.seeds):
        config = replace(train_config, seed=seed, steps=options.steps)
        fp8, bf16 = (Trainer(model, config, precision, corpus) for precision in ("fp8", "bf16"))
        start.append(percent(fp8.evaluate(validation), fp8.evaluate(validation, "bf16")))
        own, other, fast = train(fp8, validation, "bf16")
        losses["fp8"].append(own)
        speeds["fp8"] += fast
        end.append(percent(own, other))
        own, other, fast = train(bf16, validation, "fp8")
        losses["bf16"].append(own)
        speeds["bf16"] += fast
        end.append(percent(other, own))
        paired.append(percent(losses["fp8"][-1], losses["bf16"][-1]))
        print(
            f"seed {seed}: FP8 {losses['fp8'][-1]:.4f}, BF16 {losses['bf16'][-1]:.4f}, {paired[-1]:+.2f} %",
            flush=True,
        )

    report = Report("train")
    print(report.add("same weights, at the start", start, "%", all=start))
    print(report.add("same weights, trained (both ways)", end, "%", all=end))
    for precision, values in losses.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(report.add(f"validation loss, trained in {precision}", values, "nats", std=spread, all=values))
        print(report.add(f"tokens a second, {precision}", speeds[precision], "1/s"))
    said = conclusion(paired)
    print(report.add("trained loss, FP8 against BF16, paired", paired, "%", conclusion=said, all=paired))
    print(f"{said}\nwritten: {report.write(options.out)}")


if __name__ == "__main__":
    main()
