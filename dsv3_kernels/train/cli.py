"""The command line of the trainer."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from dsv3_kernels.model import PRESETS, ModelConfig
from dsv3_kernels.train.config import (
    ParallelConfig,
    PipelineSchedule,
    RunConfig,
    TrainConfig,
    read_config,
    to_json,
)
from dsv3_kernels.train.data.tokens import HEADER, read_header
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.observe import memory, plan
from dsv3_kernels.train.parallel.processes import choose_device, processes, report
from dsv3_kernels.train.run import execute
from dsv3_kernels.train.schedule import load_schedule

TRAINABLE = {
    "tiny": TrainConfig(),
    "mini": TrainConfig(steps=300, batch_size=8, seq_len=1024, lr=4e-4, warmup_steps=30, bias_speed=1e-3),
    "v3": TrainConfig(
        steps=235_000,
        batch_size=15_360,
        seq_len=4096,
        lr=2.2e-4,
        warmup_steps=2000,
        bias_speed=1e-3,
        recompute=True,
    ),
}
"""The presets with their training settings; mini wants a GPU, v3 a thousand."""
AUTO = Path("auto")
SAMPLE_BYTES = 120  # with a short prompt no longer than the sequences that the presets train on
_RUN_FIELDS = {f.name for f in dataclasses.fields(RunConfig)}
_TRAIN_FIELDS = {f.name for f in dataclasses.fields(TrainConfig)}
_PARALLEL_FIELDS = {f.name for f in dataclasses.fields(ParallelConfig)}
_RESUMABLE = {
    "steps",
    "on_not_finite",
    "recompute",
    "checkpoint_every",
    "validate_every",
    "validation_windows",
    "keep",
    *_PARALLEL_FIELDS,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.train",
        description="Trains a small DeepSeek-V3 on text, byte by byte, with the FP8 GEMMs of dsv3_kernels, "
        "and beside it the same run in BF16. Ctrl-C saves a checkpoint first.",
        # A setting that was not given is absent, so that --resume can tell it from one that was.
        argument_default=argparse.SUPPRESS,
    )
    train, run, parallel = TRAINABLE["tiny"], RunConfig(), ParallelConfig()

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
        "Go on, bit for bit, with the run in this folder, with its settings. auto: with the run in --out "
        "where there is one, for torchrun --max-restarts.",
        "a new run",
    )
    option(group, "--threads", int, "CPU threads.", "as torch chooses")
    group.add_argument(
        "--recompute",
        action="store_true",
        help="Let the backward make activations again rather than keep them; same bits (default: off)",
    )
    group.add_argument(
        "--memory-report",
        action="store_true",
        help="Only measure what each saving of memory saves; more with --help after it (default: off)",
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="Only print what each rank of a run would hold, also of preset v3; more with --help after it "
        "(default: off)",
    )
    option(
        group,
        "--device",
        str,
        "Where to compute.",
        "a GPU that the kernels run on, else cpu",
        choices=["cpu", "cuda"],
    )

    group = parser.add_argument_group("processes, started by torchrun")
    option(group, "--pp", int, "Pipeline ranks.", parallel.pp)
    option(
        group, "--ep", int, "Ranks that the experts are spread over; the rest is data parallel.", parallel.ep
    )
    option(
        group,
        "--micro-batches",
        int,
        "Parts of a rank's sequences of a step, one after the other.",
        parallel.micro_batches,
    )
    schedules = get_args(PipelineSchedule)
    option(
        group, "--pp-schedule", str, "Order of a pipeline's work.", parallel.pp_schedule, choices=schedules
    )
    option(group, "--timeout", float, "Seconds of a rank's silence that end the run.", parallel.timeout)
    option(
        group,
        "--trace-step",
        int,
        "Write the pipeline's timeline of this step, for ui.perfetto.dev, to trace-<precision>.json.",
        "none",
    )

    group = parser.add_argument_group("text")
    option(
        group,
        "--data",
        str,
        "A text file, a folder of them, or what python -m dsv3_kernels.train.prepare wrote.",
        "the .py files of Python's standard library",
    )
    option(group, "--batch-size", int, "Sequences a step.", train.batch_size)
    option(group, "--seq-len", int, "Bytes, or tokens, a sequence.", train.seq_len)

    group = parser.add_argument_group("optimisation")
    option(group, "--lr", float, "The highest learning rate.", train.lr)
    option(
        group, "--final-lr", float, "The last learning rate, as a fraction of the highest.", train.final_lr
    )
    option(group, "--warmup-steps", int, "Steps over which the learning rate rises.", train.warmup_steps)
    option(
        group,
        "--schedule",
        str,
        "What changes over the run: cosine, paper (DeepSeek-V3's), or a JSON file.",
        "cosine",
    )
    option(group, "--ema", float, "Decay of an average of the weights, kept in CPU memory.", "none")
    option(group, "--weight-decay", float, "AdamW's decay of matrices.", train.weight_decay)
    option(group, "--grad-clip", float, "The gradient's norm is cut to this.", train.grad_clip)
    option(group, "--mtp-weight", float, "Weight of the multi-token-prediction loss.", train.mtp_weight)
    option(
        group, "--balance-weight", float, "Weight of the sequence-wise balance loss.", train.balance_weight
    )
    option(group, "--bias-speed", float, "How far a step moves an expert's bias.", train.bias_speed)
    option(
        group,
        "--on-not-finite",
        str,
        "What to do where a loss or gradient is NaN or Inf.",
        train.on_not_finite,
        choices=["stop", "skip"],
    )
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
    if "schedule" in given:
        batch_size = given.get("batch_size", TRAINABLE[preset].batch_size)
        ranks = int(os.environ.get("WORLD_SIZE", "1")) // max(1, given.get("pp", 1))
        parts = max(1, ranks * given.get("micro_batches", 1))
        given = given | {"schedule": load_schedule(given["schedule"], batch_size, parts)}
    config = RunConfig(
        preset=preset,
        precisions=(precision,) if precision else ("fp8", "bf16"),
        model=_model(preset, given.get("data")),
        train=dataclasses.replace(TRAINABLE[preset], **_only(given, _TRAIN_FIELDS)),
        parallel=ParallelConfig(**_only(given, _PARALLEL_FIELDS)),
        **_only(given, _RUN_FIELDS - {"preset"}),
    )
    limit = config.model.max_position_embeddings
    if config.train.seq_len > limit:
        raise TrainError(
            f"--seq-len is {config.train.seq_len}, expected at most {limit} for the preset {preset}"
        )
    folder = given.get("out")
    going_on = given.get("resume") == AUTO
    if going_on and folder is None:
        raise TrainError("--resume auto needs --out: the folder to go on with, or to begin")
    if folder is not None and (folder / "config.json").exists():
        if going_on:
            return _same_run(config, read_config(folder), folder), folder
        raise TrainError(f"--out: {folder} already holds a run. Mend: another --out, or --resume {folder}")
    return config, folder


def _model(preset: str, data: str | None) -> ModelConfig:
    """The preset, with room for the vocabulary of prepared tokens."""
    model = PRESETS[preset]
    if data is None or not (Path(data) / HEADER).exists():
        return model
    return dataclasses.replace(model, vocab_size=max(model.vocab_size, read_header(Path(data)).vocab_size))


def _same_run(config: RunConfig, saved: RunConfig, folder: Path) -> RunConfig:
    """config, once it differs from the run that is there in nothing but what may change."""
    given, found = (_flat(to_json(c)) for c in (config, saved))
    fixed = [n for n in sorted(given.keys() | found.keys()) if n.split(".")[-1] not in _RESUMABLE]
    for name in fixed:
        if given.get(name) != found.get(name):
            raise TrainError(
                f"--resume auto: {name} is {given.get(name)!r}, expected {found.get(name)!r} as in {folder}"
            )
    return config


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return flat


def resumed_run(given: dict[str, Any]) -> tuple[RunConfig, Path]:
    fixed = sorted((given.keys() & (_RUN_FIELDS | _TRAIN_FIELDS | {"precision", "out"})) - _RESUMABLE)
    if fixed:
        option = "--" + fixed[0].replace("_", "-")
        raise TrainError(f"{option} cannot be given with --resume: the run goes on with its own settings")
    folder = given["resume"]
    config = read_config(folder)
    train = dataclasses.replace(config.train, **_only(given, _TRAIN_FIELDS))
    parallel = dataclasses.replace(config.parallel, **_only(given, _PARALLEL_FIELDS))
    return dataclasses.replace(config, train=train, parallel=parallel, **_only(given, _RUN_FIELDS)), folder


def _only(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for option, other in (("--memory-report", memory.main), ("--plan", plan.main)):
        if option in arguments:
            return other([argument for argument in arguments if argument != option])
    given = vars(build_parser().parse_args(arguments))
    try:
        if given.get("threads", 1) < 1 or given.get("sample_bytes", 0) < 0:
            raise TrainError("--threads must be at least 1 and --sample-bytes at least 0")
        if "threads" in given:
            torch.set_num_threads(given["threads"])
        goes_on = given.get("resume", AUTO) != AUTO
        config, folder = resumed_run(given) if goes_on else new_run(given)
        if "trace_step" in given and config.parallel.pp == 1:
            raise TrainError("--trace-step: --pp is 1, expected 2 or more: one rank has no pipeline to trace")
        prompt, length = given.get("prompt", "def "), given.get("sample_bytes", SAMPLE_BYTES)
        limit = config.model.max_position_embeddings
        if len(prompt.encode()) + length > limit:
            raise TrainError(f"--prompt and --sample-bytes: expected at most {limit} bytes together")
        with processes(config.parallel.timeout, choose_device(given.get("device"))) as process:
            console = Console(quiet=process.rank > 0)
            return execute(config, folder, console, prompt, length, process)
    except (TrainError, OSError) as error:
        report(error)
        if torch.distributed.is_initialized():
            os._exit(1)  # at once: threads of torch.distributed would wait for peers that are gone
        return 1
