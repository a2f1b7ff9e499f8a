"""Pipeline schedules in one run: step times in turn, and how much of the all-to-all F&B hides.

    python -m bench.bench_pipeline                                 # starts --ranks processes on this machine
    torchrun --nproc-per-node 4 -m bench.bench_pipeline            # or joins those of torchrun

First what no clock decides: simulated step and bubbles (F = W = 1, B = 2), what a rank sends to neighbours,
and the share of dispatches and combines that have another micro-batch's computation beside them.

A step is forward and backward of all micro-batches, without an update; the slowest rank counts. Every round
runs each schedule once, so that a slow moment falls on all, and compares them with each other: a difference
is claimed only where all rounds agree. Ranks that share a core fill each other's bubbles, and on a busy
machine the rounds disagree: step times say something only where each rank has cores, or a GPU, of its own.

The second part spreads the experts over half of the ranks and runs DualPipe twice a round: with forward and
backward in turns around each dispatch and combine, and one after the other. Hidden is the part of the
latter's waits for dispatch and combine that the former does not wait.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from bench import processes
from bench.report import Report
from dsv3_kernels import ep
from dsv3_kernels.model import PRESETS, DeepSeekV3
from dsv3_kernels.nn import BF16, FP8
from dsv3_kernels.train.pipeline.actions import Overlap, Schedule, works
from dsv3_kernels.train.pipeline.executor import PipelineExecutor
from dsv3_kernels.train.pipeline.link import posts
from dsv3_kernels.train.pipeline.schedules import SCHEDULES, compare
from dsv3_kernels.train.pipeline.simulate import Times


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, default=4, help="processes to start where torchrun has not (default 4)")
    add("--preset", choices=sorted(PRESETS), default="tiny")
    add("--layers", type=int, default=7, help="instead of the preset's (default 7)")
    add("--precision", choices=["bf16", "fp8"], default="bf16")
    add("--micro-batches", type=int, default=16)
    add("--batch", type=int, default=1, help="sequences a micro-batch (default 1)")
    add("--seq-len", type=int, default=128)
    add("--rounds", type=int, default=5)
    add("--trace", type=Path, help="where to write the timeline of one DualPipe step, for ui.perfetto.dev")
    return parser.parse_args()


def messages_from(schedule: Schedule, rank: int) -> int:
    return sum(m.source == rank for moment in posts(schedule, rank) for batch in moment for m in batch)


def share_beside(schedule: Schedule) -> float:
    """Of the forwards and backwards, and so of their dispatches and combines, those within an F&B."""
    actions = [action for actions in schedule.ranks for action in actions]
    done = [w for action in actions for w in works(action) if w.kind != "W"]
    return 2 * sum(isinstance(action, Overlap) for action in actions) / len(done)


def verdict(values: Sequence[float], border: float, above: str, below: str) -> str:
    """What all rounds agree on, if they do."""
    sides = {value > border for value in values}
    if len(sides) > 1:
        return f"the rounds disagree ({min(values):.2f} to {max(values):.2f}): no difference shown"
    return above if sides == {True} else below


class Bench:
    def __init__(self, rank: int, options: argparse.Namespace) -> None:
        self.rank, self.size, self.options = rank, dist.get_world_size(), options
        nccl = dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self.config = replace(PRESETS[options.preset], num_hidden_layers=options.layers)
        self.report = Report("pipeline")

    def executor(
        self, name: str, group: "dist.ProcessGroup", buffer: ep.Buffer | None = None, overlap: bool = True
    ) -> PipelineExecutor:
        recipe = FP8 if self.options.precision == "fp8" else BF16
        model = DeepSeekV3(self.config, recipe, buffer)
        model.initialize(0)
        executor = PipelineExecutor(model, name, group, overlap=overlap)
        model.to(self.device, torch.bfloat16)
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
        return executor

    def windows(self, micro_batches: int) -> torch.Tensor:
        length = self.options.seq_len + 1 + self.config.num_nextn_predict_layers
        shape = (micro_batches, self.options.batch, length)
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.config.vocab_size, shape, generator=generator).to(self.device)

    def seconds(self, step: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        taken = torch.tensor(time.perf_counter() - start, device=self.device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return taken.item()

    def counts(self) -> None:
        """Of every schedule, the same on any machine."""
        state = self.options.batch * self.options.seq_len * self.config.hidden_size * torch.bfloat16.itemsize
        for row in compare(self.size, self.options.micro_batches, Times()):
            schedule = SCHEDULES[row.name](self.size, self.options.micro_batches)
            sent = [state * messages_from(schedule, rank) / 2**10 for rank in range(self.size)]
            facts = {"bubbles": row.bubble, "KiB_a_rank_sends": max(sent), "beside": share_beside(schedule)}
            self.line(self.report.add(f"simulated step, {row.name}", [row.makespan], "", **facts))

    def schedules(self) -> None:
        windows = self.windows(self.options.micro_batches)
        executors = {}
        for name, make in SCHEDULES.items():
            try:
                make(self.size, len(windows))
                executors[name] = self.executor(name, dist.group.WORLD)
            except ValueError as error:
                self.line(self.report.note(name, str(error)))
        times: dict[str, list[float]] = {name: [] for name in executors}
        for i in range(self.options.rounds + 1):  # the first is warm-up
            for name, executor in executors.items():
                taken = self.seconds(lambda e=executor: e.forward_backward(windows, 0.3, 1e-4))
                if i:
                    times[name].append(taken)
        for name, values in times.items():
            self.line(self.report.add(f"step, {name}, {self.size} ranks", values))
        for name, values in times.items():
            if name != "1f1b":
                ratios = [plain / own for plain, own in zip(times["1f1b"], values, strict=True)]
                said = verdict(ratios, 1.0, "faster than 1F1B", "slower than 1F1B")
                self.line(self.report.add(f"speed against 1f1b, {name}", ratios, "x", conclusion=said))
        if self.options.trace and "dualpipe" in executors:
            executors["dualpipe"].trace = []
            executors["dualpipe"].forward_backward(windows, 0.3, 1e-4)
            executors["dualpipe"].write_trace(self.options.trace)

    def overlap(self) -> None:
        """Pipelines of half the ranks, experts on two."""
        half = self.size // 2
        pipelines = [dist.new_group([2 * stage + lane for stage in range(half)]) for lane in (0, 1)]
        pairs = [dist.new_group([2 * stage, 2 * stage + 1]) for stage in range(half)]
        buffer = ep.Buffer(
            pairs[self.rank // 2],
            self.config.n_routed_experts,
            self.config.hidden_size,
            self.options.batch * self.options.seq_len,
            self.config.num_experts_per_tok,
        )
        group = pipelines[self.rank % 2]
        ways = {
            "in turns": self.executor("dualpipe", group, buffer),
            "one after the other": self.executor("dualpipe", group, buffer, overlap=False),
        }
        windows = self.windows(max(self.options.micro_batches // 2, 2 * half))
        times: dict[str, list[float]] = {way: [] for way in ways}
        waits: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(self.options.rounds + 1):
            for way, executor in ways.items():
                executor.trace = []
                taken = self.seconds(lambda e=executor: e.forward_backward(windows, 0.3, 1e-4))
                events = [
                    e for e in executor.trace if e.lane == "waits" and e.name in ("dispatch", "combine")
                ]
                if i:
                    times[way].append(taken)
                    waits[way].append(sum(e.end - e.start for e in events))
        for way in ways:
            self.line(self.report.add(f"step, dualpipe, {half} x 2 experts, {way}", times[way]))
            self.line(self.report.add(f"waits for dispatch and combine, {way}", waits[way]))
        hidden = [1 - own / plain for own, plain in zip(*waits.values(), strict=True)]
        said = verdict(hidden, 0.0, "communication is hidden", "nothing is hidden")
        self.line(self.report.add("hidden share of the waits", hidden, "", conclusion=said))

    def line(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def measure(rank: int, options: argparse.Namespace) -> None:
    bench = Bench(rank, options)
    bench.counts()
    bench.schedules()
    if bench.size % 4 == 0 and bench.device.type == "cpu":
        bench.overlap()
    if rank == 0:
        print(f"written: {bench.report.write()}")


def main() -> None:
    options = arguments()
    processes.run(measure, options, options.ranks)


if __name__ == "__main__":
    main()
