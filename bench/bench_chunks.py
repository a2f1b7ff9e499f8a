"""Chunk and depth of the rings between nodes: every choice of a grid against the one that ep.Buffer makes.

    python -m bench.bench_chunks                                    # topologies of --on, in virtual time
    torchrun --nnodes 2 --nproc-per-node 8 ... -m bench.bench_chunks --tokens 4096 --channels 12  # a cluster

What counts is a dispatch in FP8 and a combine, one after the other, the slowest rank's. The network of
virtual time is --network; on a cluster pass what was measured there, for the choice depends on it. Prints a
table for each topology with the choice's distance from the best, writes runs/bench/chunks.json and a plot.
Virtual time is for comparisons, no forecast.
"""

import argparse
import functools
import itertools
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bench import processes
from bench.bench_all2all import route, timed
from bench.report import RESULTS, Report
from dsv3_kernels import ep, quantize_1x128
from dsv3_kernels.ep import internode, tuning

CLOCK = 1.755e9  # of the emulator's SMs
Choice = tuple[int, int]  # chunk, depth


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--on", nargs="+", default=["2x1", "2x2", "4x1", "4x2"], help="nodes x GPUs (default: %(default)s)")
    add("--tokens", type=int, nargs="+", default=[48, 192], help="of each rank (default: %(default)s)")
    add("--chunks", type=int, nargs="+", default=[2, 4, 8, 16], help="(default: %(default)s)")
    add("--depths", type=int, nargs="+", default=[4, 8, 12], help="(default: %(default)s)")
    add("--channels", type=int, default=1, help="of two SMs each (default %(default)s)")
    add("--network", type=float, nargs=3, metavar=("GB/s", "us", "us"), help="bandwidth, latency, posting")
    add("--hidden", type=int, default=7168)
    add("--experts", type=int, default=4, help="of each rank (default %(default)s)")
    add("--topk", type=int, default=8)
    add("--nodes-per-token", type=int, default=4)
    add("--rounds", type=int, default=10, help="on a cluster")
    add("--draws", type=int, default=3, help="of the tokens' experts, averaged (default %(default)s)")
    add("--plot", type=Path, default=RESULTS / "chunks.png", help="(%(default)s)")
    return parser.parse_args()


@dataclass(frozen=True)
class Setting:
    """What is measured at each point of the grid."""

    topology: ep.Topology
    tokens: int
    options: argparse.Namespace
    network: ep.Network

    @property
    def experts(self) -> int:
        return self.options.experts * self.topology.size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As ep.Buffer takes them: experts, hidden, max_tokens_per_rank, topk."""
        return self.experts, self.options.hidden, self.tokens, min(self.options.topk, self.experts)

    def tuning(self, choice: Choice | None) -> ep.Tuning:
        chunk, depth = choice or (None, None)
        return ep.Tuning(self.options.channels, chunk, depth, self.network)

    def chosen(self) -> Choice:
        """What ep.Buffer takes by itself."""
        rings = tuning.rings_of(ep.transport.Shape(*self.shape, self.topology), self.tuning(None))
        return rings.chunk, rings.depth

    def grid(self) -> list[Choice]:
        options = self.options
        return sorted({*itertools.product(options.chunks, options.depths), self.chosen()})

    def __str__(self) -> str:
        nodes, gpus = self.topology.nodes, self.topology.gpus_per_node
        return f"{nodes} nodes x {gpus}, {self.tokens} tokens on {self.options.channels} channels"


class Rank:
    """One rank's tokens, and its two calls with one buffer."""

    def __init__(self, setting: Setting, buffer: ep.Buffer, device: torch.device, draw: int) -> None:
        options = setting.options
        generator = torch.Generator().manual_seed(1000 * draw + buffer.rank)
        routing = argparse.Namespace(**vars(options) | {"tokens": setting.tokens, "experts": setting.experts})
        routing.topk = setting.shape[3]
        idx = route(routing, setting.topology, generator)
        x = torch.randn(setting.tokens, options.hidden, generator=generator).bfloat16()
        self.buffer, self.num_sms = buffer, 2 * options.channels
        self.x, self.idx = quantize_1x128(x.to(device)), idx.to(device)
        self.weights = torch.rand(idx.shape, generator=generator).to(device)

    def dispatch(self, **given: int) -> ep.DispatchResult:
        return self.buffer.dispatch(self.x, self.idx, self.weights, self.num_sms, **given)

    def calls(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """Dispatch and combine, of what a first dispatch brought."""
        got = self.dispatch()
        shape = got.handle.rows, self.x.data.shape[1]
        y = torch.zeros(shape, dtype=torch.bfloat16, device=self.idx.device)
        return (
            functools.partial(self.dispatch, max_recv_tokens=got.handle.rows),
            functools.partial(self.buffer.combine, y, got.handle, got.topk_weights, num_sms=self.num_sms),
        )


def mean_of_draws(
    setting: Setting,
    buffer: ep.Buffer,
    device: torch.device,
    seconds: Callable[[Callable[[], object]], float],
) -> list[float]:
    """Of dispatch and of combine."""
    draws = [Rank(setting, buffer, device, draw) for draw in range(setting.options.draws)]
    taken = [[seconds(call) for call in draw.calls()] for draw in draws]
    return [statistics.fmean(values) for values in zip(*taken, strict=True)]


def emulated(setting: Setting, choice: Choice) -> list[float]:
    """Virtual seconds of dispatch and of combine, from the first rank's start to the last one's end."""
    from dsv3_kernels import emulator

    topology, network = setting.topology, setting.network
    link = emulator.Link(
        round(1000 * network.latency), network.bandwidth, posting=round(1000 * network.posting)
    )
    cluster = emulator.VirtualCluster(
        topology.nodes,
        topology.gpus_per_node,
        num_sms=2 * setting.options.channels,
        schedule="timed",
        checks=False,
        ib=link,
    )

    def program(rank: int, group: emulator.Group) -> list[float]:
        buffer = ep.Buffer(
            group, *setting.shape, gpus_per_node=topology.gpus_per_node, tuning=setting.tuning(choice)
        )

        def seconds(call: Callable[[], object]) -> float:
            group.barrier()
            before = cluster.counters["cycles"]
            group.barrier()
            call()
            group.barrier()
            return (cluster.counters["cycles"] - before) / CLOCK

        return mean_of_draws(setting, buffer, torch.device("cpu"), seconds)

    return cluster.run(program)[0]


def measured(setting: Setting, choice: Choice) -> list[float]:
    """On a cluster: medians of the slowest rank."""
    device = torch.device("cuda", torch.cuda.current_device())
    buffer = ep.Buffer(None, *setting.shape, transport="nvshmem", tuning=setting.tuning(choice))

    def seconds(call: Callable[[], object]) -> float:
        return statistics.median([timed(call, device) for _ in range(setting.options.rounds + 2)][2:])

    return mean_of_draws(setting, buffer, device, seconds)


@dataclass(frozen=True)
class Sweep:
    """Seconds of dispatch and of combine by choice."""

    setting: Setting
    taken: dict[Choice, list[float]]

    @property
    def best(self) -> Choice:
        return min(self.taken, key=self.total)

    def total(self, choice: Choice) -> float:
        return sum(self.taken[choice])

    def against_best(self, choice: Choice) -> float:
        return self.total(choice) / self.total(self.best)

    def table(self) -> str:
        """Dispatch and combine together, against the best."""
        chosen = self.setting.chosen()
        chunks, depths = (sorted({choice[i] for choice in self.taken}) for i in (0, 1))
        lines = ["chunk \\ depth" + "".join(f"{depth:8d}" for depth in depths)]
        for chunk in chunks:
            cells = []
            for depth in depths:
                at = (chunk, depth)
                value = f"{self.against_best(at):.2f}" if at in self.taken else ""
                cells.append(f"{'*' if at == chosen else ''}{value}".rjust(8))
            lines.append(f"{chunk:13d}" + "".join(cells))
        return "\n".join(lines)


def sweep(setting: Setting, report: Report, on_cluster: bool) -> Sweep:
    measure = measured if on_cluster else emulated
    result = Sweep(setting, {choice: measure(setting, choice) for choice in setting.grid()})
    chosen = setting.chosen()
    for (chunk, depth), (dispatch, combine) in result.taken.items():
        report.add(
            f"{setting}, chunk {chunk}, depth {depth}",
            [dispatch + combine],
            dispatch=dispatch,
            combine=combine,
            chosen=(chunk, depth) == chosen,
            against_best=result.against_best((chunk, depth)),
        )
    return result


def summary(result: Sweep) -> str:
    chosen, best = result.setting.chosen(), result.best
    return (
        f"{result.setting}: best {best}, {1e6 * result.total(best):.0f} us; chosen {chosen}, "
        f"{result.against_best(chosen) - 1:+.1%}\n{result.table()}"
    )


def plot(sweeps: list[Sweep], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    columns = min(4, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(sweeps) :]:
        axis.set_visible(False)
    for axis, result in zip(axes.flat, sweeps, strict=False):
        options, chosen = result.setting.options, result.setting.chosen()
        axis.axhspan(1.0, 1.05, color="#E6E8EA", zorder=0)
        for depth in options.depths:
            values = [result.against_best((chunk, depth)) for chunk in options.chunks]
            axis.plot(options.chunks, values, marker=".", label=f"depth {depth}")
        label = f"chosen: {chosen[0]}, {chosen[1]}"
        axis.plot(chosen[0], result.against_best(chosen), "k*", markersize=12, label=label)
        topology = result.setting.topology
        axis.set_title(f"{topology.nodes} nodes x {topology.gpus_per_node}, {result.setting.tokens} tokens")
        axis.set_xlabel("messages in a chunk")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_ylim(0.98, 1.4)  # what is slower is not worth its place
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    for line in axes[:, 0]:
        line.set_ylabel("time against the best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def network_of(options: argparse.Namespace) -> ep.Network:
    return ep.Network(*options.network) if options.network else ep.Network()


def on_cluster(rank: int, options: argparse.Namespace) -> None:
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    topology = ep.Topology(dist.get_world_size() // local, local)
    settings = [Setting(topology, tokens, options, network_of(options)) for tokens in options.tokens]
    needed = sum(
        internode.needed(tuning.rings_of(ep.transport.Shape(*s.shape, topology), s.tuning(choice)))
        for s in settings
        for choice in s.grid()
    )
    os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", str(needed + (64 << 20)))  # nothing is given back
    run(settings, options, rank == 0, True)


def run(settings: list[Setting], options: argparse.Namespace, speaks: bool, cluster: bool) -> None:
    report, sweeps = Report("chunks"), []
    for setting in settings:
        sweeps.append(sweep(setting, report, cluster))
        if speaks:
            print(summary(sweeps[-1]), flush=True)
    if speaks:
        plot(sweeps, options.plot)
        print(f"written: {report.write()}, {options.plot}")


def main() -> None:
    options = arguments()
    if processes.started():
        processes.run(on_cluster, options, 0)
        return
    topologies = [ep.Topology(*map(int, text.split("x"))) for text in options.on]
    settings = [
        Setting(topology, tokens, options, network_of(options))
        for topology in topologies
        for tokens in options.tokens
    ]
    run(settings, options, True, False)


if __name__ == "__main__":
    main()
