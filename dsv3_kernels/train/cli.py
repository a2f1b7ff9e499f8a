"""The command line of the trainer."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dsv3_kernels.model import PRESETS
from dsv3_kernels.train.config import RunConfig, TrainConfig
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.run import execute, read_config

TRAINABLE = {"tiny": TrainConfig()}
"""The presets that one machine can train, with their training settings."""
SAMPLE_BYTES = 120  # with a short prompt no longer than the sequences that the presets train on
_RESUMABLE = {"steps", "checkpoint_every", "validate_every", "validation_windows", "keep"}
_RUN_FIELDS = {f.name for f in dataclasses.fields(RunConfig)}
_TRAIN_FIELDS = {f.name for f in dataclasses.fields(TrainConfig)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.train",
        description="Trains a small DeepSeek-V3 on text, byte by byte, with the FP8 GEMMs of dsv3_kernels, "
        "and beside it the same run in BF16. Ctrl-C saves a checkpoint first.",
        # A setting that was not given is absent, so that --resume can tell it from one that was.
        argument_default=argparse.SUPPRESS,
    )
    train, run = TRAINABLE["tiny"], RunConfig()

    def option(group: Any, name: str, kind: Any, text: str, default: object, **more: Any) -> None:
        metavar = None if "choices" in more else {int: "N", float: "X", str: "TEXT", Path: "PATH"}[kind]
        group.add_argument(name, type=kind, metavar=metavar, help=f"{text} (default: {default})", **more)

    group = parser.add_argument_group("run")
    option(group, "--preset", str, "The model's sizes.", "tiny", choices=sorted(TRAINABLE))
    option(group, "--precision", str, "Train in one precision only.", "both", choices=["fp8", "bf16"])
    option(group, "--steps", int, "Updates of the weights.", train.steps)
    option(group, "--seed", int, "Fixes the initial weights and the order of the text.", train.seed)
    option(group, "--out", Path, "Folder for everything the run writes.", "runs/<time>")
    option(
        group,
        "--resume",
        Path,
        "Go on, bit for bit, with the run in this folder, with its settings.",
        "a new run",
    )
    option(group, "--threads", int, "CPU threads.", "as torch chooses")

    group = parser.add_argument_group("text")
    option(
        group,
        "--data",
        str,
        "A text file, or a folder of them.",
        "the .py files of Python's standard library",
    )
    option(group, "--batch-size", int, "Sequences a step.", train.batch_size)
    option(group, "--seq-len", int, "Bytes a sequence.", train.seq_len)

    group = parser.add_argument_group("optimisation")
    option(group, "--lr", float, "The highest learning rate.", train.lr)
    option(
        group, "--final-lr", float, "The last learning rate, as a fraction of the highest.", train.final_lr
    )
    option(group, "--warmup-steps", int, "Steps over which the learning rate rises.", train.warmup_steps)
    option(group, "--weight-decay", float, "AdamW's decay of matrices.", train.weight_decay)
    option(group, "--grad-clip", float, "The gradient's norm is cut to this.", train.grad_clip)
    option(group, "--mtp-weight", float, "Weight of the multi-token-prediction loss.", train.mtp_weight)
    option(
        group, "--balance-weight", float, "Weight of the sequence-wise balance loss.", train.balance_weight
    )
    option(group, "--bias-speed", float, "How far a step moves an expert's bias.", train.bias_speed)
    group.add_argument(
        "--power-of-2-scales", action="store_true", help="Round FP8 scales up to powers of two (default: off)"
    )

    group = parser.add_argument_group("validation and checkpoints")
    option(group, "--validate-every", int, "Steps between validations.", run.validate_every)
    option(group, "--validation-windows", int, "Sequences of held-out text.", run.validation_windows)
    option(group, "--checkpoint-every", int, "Steps between checkpoints.", run.checkpoint_every)
    option(group, "--keep", int, "Checkpoints kept a precision.", run.keep)

    group = parser.add_argument_group("sample")
    option(group, "--prompt", str, "What the sample of generated text begins with.", repr("def "))
    option(group, "--sample-bytes", int, "Its length; 0 for none.", SAMPLE_BYTES)
    return parser


def new_run(given: dict[str, Any]) -> tuple[RunConfig, Path | None]:
    """The settings, and the folder if one was named."""
    preset = given.get("preset", "tiny")
    precision = given.get("precision")
    if "data" in given:
        given = given | {"data": str(Path(given["data"]).resolve())}  # --resume may run elsewhere
    config = RunConfig(
        preset=preset,
        precisions=(precision,) if precision else ("fp8", "bf16"),
        model=PRESETS[preset],
        train=dataclasses.replace(TRAINABLE[preset], **_only(given, _TRAIN_FIELDS)),
        **_only(given, _RUN_FIELDS - {"preset"}),
    )
    limit = config.model.max_position_embeddings
    if config.train.seq_len > limit:
        raise TrainError(
            f"--seq-len is {config.train.seq_len}, expected at most {limit} for the preset {preset}"
        )
    folder = given.get("out")
    if folder is not None and (folder / "config.json").exists():
        raise TrainError(f"--out: {folder} already holds a run. Mend: another --out, or --resume {folder}")
    return config, folder


def resumed_run(given: dict[str, Any]) -> tuple[RunConfig, Path]:
    fixed = sorted((given.keys() & (_RUN_FIELDS | _TRAIN_FIELDS | {"precision", "out"})) - _RESUMABLE)
    if fixed:
        option = "--" + fixed[0].replace("_", "-")
        raise TrainError(f"{option} cannot be given with --resume: the run goes on with its own settings")
    folder = given["resume"]
    config = read_config(folder)
    train = dataclasses.replace(config.train, **_only(given, _TRAIN_FIELDS))
    return dataclasses.replace(config, train=train, **_only(given, _RUN_FIELDS)), folder


def _only(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    given = vars(build_parser().parse_args(arguments))
    try:
        if given.get("threads", 1) < 1 or given.get("sample_bytes", 0) < 0:
            raise TrainError("--threads must be at least 1 and --sample-bytes at least 0")
        if "threads" in given:
            torch.set_num_threads(given["threads"])
        config, folder = resumed_run(given) if "resume" in given else new_run(given)
        prompt, length = given.get("prompt", "def "), given.get("sample_bytes", SAMPLE_BYTES)
        limit = config.model.max_position_embeddings
        if len(prompt.encode()) + length > limit:
            raise TrainError(f"--prompt and --sample-bytes: expected at most {limit} bytes together")
        return execute(config, folder, Console(), prompt, length)
    except (TrainError, OSError) as error:
        print(f"dsv3_kernels.train: {error}", file=sys.stderr)
        return 1
