"""The all-to-all of expert parallelism, by whatever there is to run it on.

    torchrun --nproc-per-node 8 -m bench.bench_all2all   # on GPUs over NVLink, or on CPUs over gloo
    python -m bench.bench_all2all                        # one GPU: its virtual ranks; none: --ranks processes

Between processes it is timed against `all_to_all_single` of the same bytes, in the same run, on --sms SMs
where kernels run. On one GPU it is tables of the GPU report (bench/cases/dispatch.py, combine.py and those
*_internode.py: virtual ranks of one node, and of several, against a copy of as many bytes on the same SMs),
then bench_overlap.

Between processes routing is node-limited as in DeepSeek-V3: a token's experts are on at most so many nodes as
--nodes-per-token says. The bytes are those that this rank sends to others, payload only; the peer sends as
many to each. A rank's clock starts after a barrier, and the slowest rank of a round counts.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from bench import bench_overlap, loopback, processes
from bench.report import Report
from dsv3_kernels import ep, quantize_1x128


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes to start where torchrun has not (default 2)")
    add("--cpu", action="store_true", help="start processes though there is a GPU")
    add("--seconds", type=float, default=60.0, help="for each table of virtual ranks (default 60)")
    add("--sms", type=int, nargs="+", default=[20], help="of each rank, where kernels run (default 20)")
    add("--tokens", type=int, default=256, help="of each rank (default 256; DeepSeek-V3's figure is 4096)")
    add("--hidden", type=int, default=7168)
    add("--experts", type=int, default=64)
    add("--topk", type=int, default=8)
    add("--nodes-per-token", type=int, default=4)
    add("--rounds", type=int, default=10)
    return parser.parse_args()


def route(options: argparse.Namespace, topology: ep.Topology, generator: torch.Generator) -> torch.Tensor:
    """topk experts of each token, spread evenly over its random nodes."""
    per_node = options.experts // topology.nodes
    nodes = min(options.nodes_per_token, topology.nodes)
    scores = torch.rand(options.tokens, topology.nodes, per_node, generator=generator)
    chosen = torch.rand(options.tokens, topology.nodes, generator=generator).topk(nodes).indices
    scores.scatter_add_(
        1, chosen.unsqueeze(2).expand(-1, -1, per_node), torch.ones(1).expand_as(scores[:, :nodes])
    )
    return scores.flatten(1).topk(options.topk).indices


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - start, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def plain(send: list[int], receive: list[int], device: torch.device) -> Callable[[], object]:
    """all_to_all_single of that many bytes to and from each rank."""
    source = torch.zeros(sum(send), dtype=torch.uint8, device=device)
    target = torch.empty(sum(receive), dtype=torch.uint8, device=device)
    return lambda: dist.all_to_all_single(target, source, receive, send)


def measure(rank: int, options: argparse.Namespace) -> None:
    size = dist.get_world_size()
    nccl = dist.get_backend() == "nccl"
    device = torch.device("cuda", rank % torch.cuda.device_count()) if nccl else torch.device("cpu")
    buffer = ep.Buffer(None, options.experts, options.hidden, options.tokens, options.topk)
    generator = torch.Generator().manual_seed(rank)
    idx = route(options, buffer.topology, generator)
    owner = idx // buffer.local_experts
    rows = [int((owner == r).any(1).sum()) for r in range(size)]
    x = torch.randn(options.tokens, options.hidden, generator=generator).bfloat16().to(device)
    idx, weights = idx.to(device), torch.rand(idx.shape, generator=generator).to(device)
    report = Report("all2all")
    status = buffer.status()
    counts_of = [[0] * size for _ in range(size)]
    dist.all_gather_object(counts_of, rows)
    arrived = [counts[rank] for counts in counts_of]
    sms = options.sms if status.transport == "nvlink" else options.sms[:1]
    if rank == 0:
        print(
            f"{size} ranks on {dist.get_backend()}, {options.tokens} tokens x {options.hidden} each, "
            f"top {options.topk} of {options.experts}, {buffer.topology}\n"
            f"transport: {status.transport}" + (f" ({status.reason})" if status.reason else "")
        )
    for (name, tokens), num_sms in itertools.product({"BF16": x, "FP8": quantize_1x128(x)}.items(), sms):
        row = 2 * options.hidden if name == "BF16" else options.hidden + 4 * tokens.scales.shape[1]
        got = buffer.dispatch(tokens, idx, weights, num_sms)
        y = torch.randn(got.handle.rows, options.hidden).bfloat16().to(device)
        declared = got.handle.rows  # so that the host need not wait
        there = plain([n * row for n in rows], [n * row for n in arrived], device)
        home = plain(
            [2 * options.hidden * n for n in arrived], [2 * options.hidden * n for n in rows], device
        )
        dispatch = functools.partial(buffer.dispatch, tokens, num_sms=num_sms)
        cases = {
            f"dispatch {name}": (
                functools.partial(dispatch, idx, weights, max_recv_tokens=declared),
                there,
                rows,
                row,
            ),
            f"dispatch {name}, cached": (functools.partial(dispatch, handle=got.handle), there, rows, row),
        }
        if name == "BF16":
            combine = functools.partial(buffer.combine, y, got.handle, got.topk_weights, num_sms=num_sms)
            cases["combine BF16"] = (combine, home, arrived, 2 * options.hidden)
        for case, (call, peer, counts, width) in cases.items():
            sent = (sum(counts) - counts[rank]) * width
            ours, theirs = [], []
            for i in range(options.rounds + 1):  # the first is warm-up
                pair = timed(call, device), timed(peer, device)
                if i:
                    ours.append(pair[0])
                    theirs.append(pair[1])
            middle = statistics.median(ours)
            line = report.add(
                f"{case}, {size} ranks" + (f" x {num_sms} SMs" if status.transport == "nvlink" else ""),
                ours,
                payload_bytes=sent,
                GBps=sent / middle / 1e9,
                transport=status.transport,
                tokens_per_s=options.tokens / middle,
                peer="all_to_all_single of the same bytes",
                speed_against_peer=statistics.median(theirs) / middle,
            )
            if rank == 0:
                print(line)
    if rank == 0:
        print(f"written: {report.write()}")


def main() -> None:
    options = arguments()
    if torch.cuda.is_available() and not options.cpu and not processes.started():
        loopback.tables(options.seconds)
        bench_overlap.main([])
        print(loopback.NOTE, loopback.NOTE_OF_NODES, sep="\n")
        return
    processes.run(measure, options, options.ranks)


if __name__ == "__main__":
    main()
