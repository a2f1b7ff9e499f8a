"""How often a token crosses InfiniBand: sent once an expert, once a rank, or once a node as the kernels do.

    python -m bench.all2all_copies    # the table of docs/all2all.md

DeepSeek-V3's gate with random scores: 8 of 256 experts, on the 4 nodes whose best two have the highest
sums. Nothing is sent; the bytes that kernels do send are asserted in tests/ep/test_ep_internode.py.
"""

import argparse

import torch

from dsv3_kernels.gate import route

GPUS, EXPERTS, TOPK, NODES_PER_TOKEN = 8, 256, 8, 4


def copies(nodes: int, tokens: int, seed: int = 0) -> list[float]:
    """Of a token of the first node, on average: to experts, ranks and nodes elsewhere."""
    scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))
    chosen = min(nodes, NODES_PER_TOKEN)
    idx, *_ = route(scores, torch.zeros(EXPERTS), top_k=TOPK, n_group=nodes, topk_group=chosen)
    counts = []
    for targets in (EXPERTS, nodes * GPUS, nodes):
        wanted = torch.zeros(tokens, targets, dtype=torch.bool).scatter_(1, idx // (EXPERTS // targets), True)
        counts.append(wanted[:, targets // nodes :].sum().item() / tokens)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=100_000)
    options = parser.parse_args()
    print(f"| nodes of {GPUS} GPUs | once an expert | once a rank | once a node (this) |\n|---|---|---|---|")
    for nodes in (2, 4, 8, 16):
        print(f"| {nodes} | " + " | ".join(f"{n:.2f}" for n in copies(nodes, options.tokens)) + " |")


if __name__ == "__main__":
    main()
