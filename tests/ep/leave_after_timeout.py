"""One of two gloo ranks, as a process of its own: rank 0 waits in vain for rank 1, says so, and ends."""

import sys
import time

import torch
import torch.distributed as dist

from dsv3_kernels import ep


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    buffer = ep.Buffer(None, num_experts=4, hidden=32, max_tokens_per_rank=8, num_topk=2, timeout=1.0)
    if rank == 1:
        time.sleep(60)
    try:
        buffer.dispatch(torch.ones(8, 32).bfloat16(), torch.tensor([[0, 3]] * 8))
    except ep.TimeoutError as error:
        print(error.peers, time.time(), flush=True)


main(int(sys.argv[1]), sys.argv[2])
