"""The two designs of the kernels between nodes against each other, in the emulator: rings and lean.

    python -m bench.bench_lean                      # topologies of --on, designs with their SMs of --designs

A dispatch in FP8 and a combine of the same tokens. What it counts: instructions, bytes over InfiniBand and
NVLink, bytes of global memory (loads, stores and copies), cycles of virtual time, and SM cycles: how many
SMs an op holds, times how long. The lean ops end on all SMs of a GPU (--sms). Prints a table for each
topology and writes runs/bench/lean.json. Virtual time is for comparisons, no forecast.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.bench_all2all import route
from bench.report import Report
from dsv3_kernels import emulator, ep, quantize_1x128


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--on", nargs="+", default=["2x2", "4x1"], help="nodes x GPUs (default: %(default)s)")
    designs = ["rings:10", "rings:6", "lean:6", "lean:2"]
    add("--designs", nargs="+", default=designs, help="with SMs (default: %(default)s)")
    add("--sms", type=int, default=16, help="of a GPU (default %(default)s)")
    add("--tokens", type=int, default=96, help="of each rank (default %(default)s)")
    add("--hidden", type=int, default=7168)
    add("--experts", type=int, default=16, help="of all ranks (default %(default)s)")
    add("--topk", type=int, default=8)
    add("--nodes-per-token", type=int, default=4)
    return parser.parse_args()


@dataclass(frozen=True)
class Cost:
    """Of one op of all ranks."""

    instructions: int
    infiniband: int
    nvlink: int
    memory: int
    cycles: int
    sm_cycles: int  # of a rank

    def row(self) -> str:
        kilo = [self.instructions, self.infiniband, self.nvlink, self.memory, self.cycles, self.sm_cycles]
        return "".join(f"{value / 1000:12,.0f}" for value in kilo)


def cost(before: dict[str, object], after: dict[str, object], num_sms: int, all_sms: int | None) -> Cost:
    """all_sms: of the second launch of an op, or None where there is one."""

    def grown(*names: str) -> int:
        return sum(after[name] - before[name] for name in names)  # type: ignore[operator]

    def network(counters: dict[str, object]) -> int:
        links = counters["links"].values()  # type: ignore[attr-defined]
        return sum(link["bytes"] for link in links if link["kind"] == "IB")

    cycles, last = grown("cycles"), after["launch_cycles"] if all_sms else 0
    return Cost(
        grown("instructions"),
        network(after) - network(before),
        grown("peer_bytes"),
        grown("global_bytes_read", "global_bytes_written", "copy_bytes_read", "copy_bytes_written"),
        cycles,
        num_sms * (cycles - last) + (all_sms or 0) * last,  # type: ignore[operator]
    )


def measured(options: argparse.Namespace, topology: ep.Topology, design: str, num_sms: int) -> list[Cost]:
    """Of dispatch, and of combine; each rank's second call, when all is warm."""
    cluster = emulator.VirtualCluster(
        topology.nodes, topology.gpus_per_node, num_sms=options.sms, schedule="timed", checks=False
    )
    sizes = options.experts, options.hidden, options.tokens, options.topk

    def program(rank: int, group: emulator.Group) -> list[Cost]:
        generator = torch.Generator().manual_seed(rank)
        idx = route(options, topology, generator)
        x = quantize_1x128(torch.randn(options.tokens, options.hidden, generator=generator).bfloat16())
        weights = torch.rand(idx.shape, generator=generator)
        buffer = ep.Buffer(group, *sizes, gpus_per_node=topology.gpus_per_node, internode=design)

        def counted(call: Callable[[], object]) -> tuple[object, Cost]:
            group.barrier()
            before = cluster.counters
            group.barrier()
            result = call()
            group.barrier()
            all_sms = options.sms if design == "lean" else None
            return result, cost(before, cluster.counters, num_sms, all_sms)

        dispatch = functools.partial(buffer.dispatch, x, idx, weights, num_sms)
        got, of_dispatch = counted(dispatch)
        y = torch.zeros(got.handle.rows, options.hidden, dtype=torch.bfloat16)
        combine = functools.partial(buffer.combine, y, got.handle, got.topk_weights, num_sms=num_sms)
        return [of_dispatch, counted(combine)[1]]

    return cluster.run(program)[0]


def main() -> None:
    options, report = arguments(), Report("lean")
    for where in options.on:
        topology = ep.Topology(*map(int, where.split("x")))
        print(f"{where}, {options.tokens} tokens of {options.hidden}, in thousands")
        names = "instructions", "IB", "NVLink", "memory", "cycles", "SM cycles"
        print(" " * 22 + "".join(name.rjust(12) for name in names))
        for text in options.designs:
            design, sms = text.split(":")
            costs = measured(options, topology, design, int(sms))
            for op, of_op in zip(("dispatch", "combine"), costs, strict=True):
                print(f"{design:6}{sms:>3} SMs {op:9}{of_op.row()}", flush=True)
                report.add(f"{where} {op}, {text}", [of_op.cycles], unit="cycles", **vars(of_op))
    print(report.write())


if __name__ == "__main__":
    main()
