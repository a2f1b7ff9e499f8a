"""Latency of low-latency dispatch and combine, decoding's all-to-all.

    torchrun --nproc-per-node 8 -m bench.bench_low_latency  # torchrun's ranks: GPUs (NCCL) or CPUs (gloo)
    python -m bench.bench_low_latency --nodes 2 --gpus 2    # the kernels in the emulator, in virtual time

On GPUs a CUDA graph holds one call; the clock is the slowest rank's. Bytes are what a rank sends, rows and
scales; the peer is `all_to_all_single` of as many to each. Virtual time is for comparisons, no forecast.
"""

import argparse
import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from bench.bench_all2all import plain, timed
from bench.report import Report
from dsv3_kernels import ep

CLOCK = 1.755e9  # of the emulator's SMs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=None, help="of each rank (default 128; 8 in the emulator)")
    add("--hidden", type=int, default=7168)
    add("--experts", type=int, default=None, help="of all ranks (default 256; 4 a rank in the emulator)")
    add("--topk", type=int, default=8)
    add("--bf16", action="store_true", help="dispatch BF16 rows instead of FP8")
    add("--num-sms", type=int, default=None, help="blocks a kernel (default 64; 4 in the emulator)")
    add("--rounds", type=int, default=20)
    add("--nodes", type=int, default=1, help="in the emulator")
    add("--gpus", type=int, default=4, help="a node, in the emulator")
    return parser.parse_args()


class Rank:
    """One rank's buffer, tokens and what its experts return."""

    def __init__(self, options: argparse.Namespace, buffer: ep.Buffer, device: torch.device) -> None:
        self.options, self.buffer = options, buffer
        generator = torch.Generator().manual_seed(buffer.rank)
        scores = torch.rand(options.tokens, options.experts, generator=generator)
        self.idx = scores.topk(options.topk).indices.to(device)
        self.x = torch.randn(options.tokens, options.hidden, generator=generator).bfloat16().to(device)
        self.weights = torch.rand(self.idx.shape, generator=generator).to(device)
        got = self.dispatch()
        shape = (buffer.local_experts, buffer.size * options.tokens, options.hidden)
        self.y = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.handle = got.handle

    @property
    def row(self) -> int:
        hidden = self.options.hidden
        return 2 * hidden if self.options.bf16 else hidden + 4 * -(-hidden // 128)

    def dispatch(self, hook: bool = False) -> ep.LowLatencyDispatched:
        options = self.options
        return self.buffer.low_latency_dispatch(
            self.x, self.idx, options.num_sms, fp8=not options.bf16, return_recv_hook=hook
        )

    def combine(self) -> ep.LowLatencyCombined:
        return self.buffer.low_latency_combine(self.y, self.handle, self.weights, self.options.num_sms)


def graph(call: Callable[[], object], device: torch.device, kept: list[object]) -> Callable[[], object]:
    """The call, on a GPU as one replay; what it gives is kept."""
    if device.type != "cuda":
        return call
    call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        kept.append(call())
    return captured.replay


def on_ranks(options: argparse.Namespace) -> None:
    """Under torchrun."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    buffer = ep.Buffer(None, options.experts, options.hidden, options.tokens, options.topk)
    rank, report = Rank(options, buffer, device), Report("low_latency")
    owner = (rank.idx // buffer.local_experts).flatten().cpu()
    sent = torch.bincount(owner, minlength=buffer.size).tolist()
    arrived = torch.empty(buffer.size, dtype=torch.int64, device=device)
    dist.all_to_all_single(arrived, torch.tensor(sent, device=device))
    if not buffer.rank:
        print(
            f"{buffer.topology}, {options.tokens} tokens x {options.hidden}, "
            f"{options.topk} of {options.experts} experts"
        )
    kept: list[object] = []
    for name, call, width, there, back in (
        ("dispatch", rank.dispatch, rank.row, sent, arrived.tolist()),
        ("combine", rank.combine, 2 * options.hidden, arrived.tolist(), sent),
    ):
        ours = graph(call, device, kept)
        theirs = plain([n * width for n in there], [n * width for n in back], device)
        pairs = [(timed(ours, device), timed(theirs, device)) for _ in range(options.rounds + 3)][3:]
        mine, peers = zip(*pairs, strict=True)
        payload = (sum(there) - there[buffer.rank]) * width
        line = report.add(
            f"low latency {name}, {buffer.size} ranks",
            mine,
            payload_bytes=payload,
            GBps=payload / statistics.median(mine) / 1e9,
            peer="all_to_all_single of the same bytes",
            speed_against_peer=statistics.median(peers) / statistics.median(mine),
        )
        if not buffer.rank:
            print(line)
    if not buffer.rank:
        print(f"written: {report.write()}")
    dist.destroy_process_group()


def emulated(options: argparse.Namespace) -> None:
    """In virtual time: what each launch takes, from the last rank's start to the last rank's end."""
    from dsv3_kernels import emulator

    cluster = emulator.VirtualCluster(
        options.nodes, options.gpus, num_sms=options.num_sms, schedule="timed", checks=False
    )
    report, spans = Report("low_latency_emulated"), dict[str, float]()

    def program(rank: int, group: emulator.Group) -> None:
        buffer = ep.Buffer(
            group,
            options.experts,
            options.hidden,
            options.tokens,
            options.topk,
            gpus_per_node=options.gpus,
        )
        mine = Rank(options, buffer, torch.device("cpu"))
        for _ in range(2):  # the second has both parities' memory touched
            for name, call in (("dispatch", mine.dispatch), ("combine", mine.combine)):
                group.barrier()
                before = cluster.counters["cycles"]
                group.barrier()
                call()
                group.barrier()
                spans[name] = (cluster.counters["cycles"] - before) / CLOCK

    cluster.run(program)
    shape = (
        f"{options.nodes}x{options.gpus}, {options.tokens} tokens x {options.hidden}, {options.num_sms} SMs"
    )
    for name, seconds in spans.items():
        print(report.add(f"{name}, {shape}, virtual time", [seconds]))
    print(f"written: {report.write()}")


def main() -> None:
    options = arguments()
    ranks = "RANK" in os.environ
    options.tokens = options.tokens or (128 if ranks else 8)
    options.experts = options.experts or (256 if ranks else 4 * options.nodes * options.gpus)
    options.num_sms = options.num_sms or (64 if ranks else 4)
    options.topk = min(options.topk, options.experts)
    (on_ranks if ranks else emulated)(options)


if __name__ == "__main__":
    main()
