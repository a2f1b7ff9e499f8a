"""A run: one trainer a precision, side by side over the same batches, all results in one folder."""

import contextlib
import itertools
import json
import signal
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from rich.console import Console
from torch import Tensor

from dsv3_kernels.model import Generator, Sampling, count_parameters
from dsv3_kernels.nn import BF16, set_recipe
from dsv3_kernels.nn.recipe import Precision
from dsv3_kernels.train.config import RunConfig, to_json
from dsv3_kernels.train.data.corpus import load_corpus, validation_windows
from dsv3_kernels.train.data.tokenizer import FromFile
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.observe import report
from dsv3_kernels.train.observe.metrics import Meter, MetricsLog
from dsv3_kernels.train.observe.page import write_page
from dsv3_kernels.train.parallel.groups import Layout, gather
from dsv3_kernels.train.parallel.processes import Processes, agree
from dsv3_kernels.train.pipeline.executor import PipelineExecutor
from dsv3_kernels.train.state import checkpoint
from dsv3_kernels.train.state.checkpoint import replace_file
from dsv3_kernels.train.state.saver import Saver
from dsv3_kernels.train.trainer import StepMetrics, Trainer

TEMPERATURE = 0.7


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def new_folder() -> Path:
    """runs/<time>, numbered where another run began in the same second."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    while True:
        folder = Path("runs", next(names))
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


class Run:
    """Trains to the configured step, or until asked to stop."""

    def __init__(
        self, config: RunConfig, folder: Path | None, console: Console, process: Processes | None = None
    ) -> None:
        """Goes on from the checkpoints in the folder where there are any; None makes a new folder.

        process: this one among those of the run, by default one alone. Rank 0 writes and prints.
        """
        process = process or Processes.alone()
        layout = Layout.of(config.parallel, process.size)
        self.groups, self.leads = process.groups(layout), process.rank == 0
        window = config.train.seq_len + 1 + config.model.num_nextn_predict_layers
        self.config, self.console = config, console
        self.corpus = load_corpus(config.data, window)
        if self.corpus.vocab_size > config.model.vocab_size:
            raise TrainError(
                f"--data: the vocabulary of {self.corpus.source} has {self.corpus.vocab_size} tokens, "
                f"expected at most the model's {config.model.vocab_size}"
            )
        agree({"config": to_json(config), "text_sha256": self.corpus.sha256}, self.groups.control)
        self.validation = validation_windows(self.corpus.validation, window, config.validation_windows)
        self.saver = Saver(self.groups.saving)
        self.trainers = [
            Trainer(
                config.model,
                config.train,
                precision,
                self.corpus,
                config.parallel,
                self.groups,
                self.saver,
                process.device,
            )
            for precision in config.precisions
        ]
        self.folder = self._agreed_folder(folder)
        self.announce()
        self.start = _same_weights("at the start", self.trainers[0], self.validation)
        for trainer in self.trainers:
            self._load(trainer)
        self.log: MetricsLog | None = None
        if self.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / "config.json", (json.dumps(to_json(config), indent=1) + "\n").encode())
            if isinstance(self.corpus.tokenizer, FromFile):  # the data may move away
                self.corpus.tokenizer.save(self.folder / "tokenizer.json")
            steps: dict[str, int] = {t.precision: t.step for t in self.trainers}
            meter = Meter(config.model, config.train.seq_len, process.device, devices=process.size)
            self.log = MetricsLog(self.folder / "metrics.jsonl", steps, meter)

    def _agreed_folder(self, folder: Path | None) -> Path:
        """Rank 0's, so that all mean the same one."""
        if folder is None and self.leads:
            folder = new_folder()
        if self.groups.control is not None:
            folder = folder and folder.resolve()
        return Path(gather(str(folder), self.groups.control)[0])

    def _load(self, trainer: Trainer) -> None:
        checkpoints = self.checkpoints(trainer.precision)
        if any(gather(checkpoint.exists(checkpoints), self.groups.control)):
            trainer.load(checkpoints)
        if trainer.step > self.config.train.steps:
            raise TrainError(
                f"--steps is {self.config.train.steps}, but {checkpoints} is at step {trainer.step} already"
            )

    def command(self) -> str:
        world = self.groups.layout.world
        start = "python" if world == 1 else "torchrun with as many processes, or others,"
        return f"{start} -m dsv3_kernels.train"

    def checkpoints(self, precision: Precision) -> Path:
        return self.folder / "checkpoints" / precision

    def announce(self) -> None:
        corpus = self.corpus
        count = count_parameters(self.config.model)
        train = self.config.train
        million = "MB" if corpus.unit == "byte" else "million tokens"
        skipped = f" ({corpus.skipped} files that are not text left out)" if corpus.skipped else ""
        self.console.print(
            f"Training {self.config.preset} ({count.total / 1e6:.1f}M parameters, "
            f"{count.active / 1e6:.1f}M active, and {count.mtp / 1e6:.1f}M of MTP) "
            f"in {' and '.join(self.config.precisions)} "
            f"for {train.steps} steps of {train.batch_size} x {train.seq_len} {corpus.unit}s\n"
            f"on {corpus.train.numel() / 1e6:.1f} {million} of text from {corpus.source}{skipped}, "
            f"validated on {corpus.validation.numel() / 1e6:.1f} {million}. Results: {self.folder}"
            f"{self._processes()}",
            highlight=False,
            soft_wrap=True,
        )

    def _processes(self) -> str:
        layout = self.groups.layout
        if layout.world == 1:
            return ""
        return f"\n{layout.world} processes: pp {layout.pp} x ep {layout.ep} x dp {layout.dp}"

    def train(self, stop: StopRequest) -> bool:
        """True when the last step is reached, False when stopped before. Either way a checkpoint is there."""
        steps = self.config.train.steps
        first = min(trainer.step for trainer in self.trainers)
        with report.ProgressLine(self.console, first, steps) as progress:
            for step in range(first + 1, steps + 1):
                due = [trainer for trainer in self.trainers if trainer.step < step]
                rows = [self._step(trainer) for trainer in due]
                progress.update(step, rows)
                stopping = any(gather(stop.signal is not None, self.groups.control))
                if step % self.config.checkpoint_every == 0 or step == steps or stopping:
                    for trainer in due:
                        trainer.save(self.checkpoints(trainer.precision), self.config.keep)
                if stopping and step < steps:
                    break
            else:
                step = steps
        self.saver.wait()
        return step == steps

    def _step(self, trainer: Trainer) -> dict:
        traced = trainer.step + 1 == self.config.parallel.trace_step
        metrics = self._traced_step(trainer) if traced else trainer.train_step()
        due = trainer.step % self.config.validate_every == 0 or trainer.step == self.config.train.steps
        validation = trainer.evaluate(self.validation) if due else None
        averaged = trainer.evaluate_average(self.validation) if due else None
        row = asdict(metrics) | {"validation_loss": validation, "validation_loss_ema": averaged}
        if self.log is not None:
            self.log.append(row)
        return row

    def _traced_step(self, trainer: Trainer) -> StepMetrics:
        """A step whose timeline the first of the pipelines writes."""
        executor = trainer.executor
        if not isinstance(executor, PipelineExecutor):
            return trainer.train_step()
        executor.trace = []
        metrics = trainer.train_step()
        first = self.groups.layout.share(self.groups.rank) == 0
        executor.write_trace(self.folder / f"trace-{trainer.precision}.json" if first else None)
        executor.trace = None
        return metrics

    def finish(self, seconds: float, prompt: str, sample_bytes: int) -> None:
        """Prints the tables and a sample, writes summary.json, loss.png and report.html."""
        ends = {
            t.precision: _same_weights(f"trained in {t.precision.upper()}", t, self.validation)
            for t in self.trainers
        }
        if self.log is None:
            return
        unigram, bigram = report.entropies(self.corpus.train)
        summary = report.Summary(
            steps=self.config.train.steps,
            seconds=seconds,
            unigram=unigram,
            bigram=bigram,
            validation_before={p: getattr(self.start, p) for p in self.config.precisions},
            validation_after={p: getattr(ends[p], p) for p in self.config.precisions},
            same_weights=[self.start, *ends.values()],
            unit=self.corpus.unit,
        )
        summary.write(self.folder / "summary.json", self.log)
        report.plot(self.folder / "loss.png", self.log, summary)
        write_page(self.folder / "report.html", self.config, self.log, summary)
        summary.print(self.console, self.log)
        if sample_bytes and self.groups.layout.pp * self.groups.layout.ep == 1:
            self._print_sample(prompt, sample_bytes)

    def _print_sample(self, prompt: str, length: int) -> None:
        trainer = self.trainers[0]
        model = trainer.model.cpu()
        set_recipe(model, BF16)
        generator = Generator(model, Sampling(TEMPERATURE), seed=self.config.train.seed)
        tokenizer = self.corpus.tokenizer
        tokens = generator.tokens(tokenizer.encode(prompt) or tokenizer.encode("\n"), length)
        text = prompt + "".join(tokenizer.stream(tokens))
        self.console.print(
            f"\nA sample of the weights trained in {trainer.precision.upper()}, temperature {TEMPERATURE}:",
            highlight=False,
        )
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _same_weights(name: str, trainer: Trainer, validation: Tensor) -> report.SameWeights:
    return report.SameWeights(name, trainer.evaluate(validation, "fp8"), trainer.evaluate(validation, "bf16"))


def execute(
    config: RunConfig,
    folder: Path | None,
    console: Console,
    prompt: str,
    sample_bytes: int,
    process: Processes | None = None,
) -> int:
    """Runs, and returns the exit code: 0 at the end, 128 + the signal's number when stopped by one."""
    stop = StopRequest()
    start = time.perf_counter()
    try:
        run = Run(config, folder, console, process)
        try:
            if run.train(stop):
                run.finish(time.perf_counter() - start, prompt, sample_bytes)
                return 0
        finally:
            if run.log is not None:
                run.log.close()
    finally:
        stop.restore()
    console.print(
        f"Stopped; the checkpoint is saved. To go on: {run.command()} --resume {run.folder}",
        highlight=False,
        soft_wrap=True,
    )
    return 128 + (stop.signal or signal.SIGINT)
