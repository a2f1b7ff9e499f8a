"""Ranks on several nodes in the emulator that dispatch by rings and combine by the lean kernels."""

import torch
from internode_cluster import Cluster

from dsv3_kernels import emulator
from dsv3_kernels.ep import internode_kernels as internode
from dsv3_kernels.ep import kernels, lean, lean_combine


def compiled():
    """The dispatch, and the combine's two."""
    return [(ptx.text, ptx.name) for ptx in map(ptx_of, (internode.DISPATCH, *lean_combine.KERNELS))]


def ptx_of(kernel):
    return kernel.ptx(lineinfo=True)


class LeanCombine(Cluster):
    """sms, pairs: blocks of the first launch, and channels that each has under way. stages: of a warp. times:
    a dispatch is combined so often, one call behind the other."""

    def __init__(self, case, seed=0, num_sms=2, sms=1, pairs=1, stages=2, times=1, **options):
        self.sms, self.pairs, self.stages, self.times = sms, pairs, stages, times
        super().__init__(case, seed, num_sms, **options)

    def connect(self):
        links = super().connect()
        slots = lean.Slots(self.shape)
        symmetric = self.cluster.symmetric((slots.size,), torch.uint8)
        self.lean = [
            lean.Link(slots, link.peers, (own, own), torch.arange(2, 2 + slots.channels, dtype=torch.int32))
            for link, own in zip(links, symmetric, strict=True)
        ]
        return links

    def run(self, rounds, every=None, combine=True):
        return super().run(rounds, every or compiled(), combine)

    def combine(self, every, rank, operands):
        call = kernels.table([lean_combine.combine_call(self.lean[rank], operands)])
        gpu, blocks, warps = emulator.current(), self.num_sms, 2 * self.pairs
        for _ in range(self.times):
            if self.links[rank].peers.failure.any():
                return
            gpu.launch(
                *every[0],
                args=(call, self.sms, self.stages),
                grid=(self.sms, 1, 1),
                block=(32 * warps, 1, 1),
                shared_bytes=warps * lean_combine.warp_bytes(self.stages),
            )
            gpu.launch(*every[1], args=(call, blocks, self.sms), grid=(blocks, 1, 1), block=(64, 1, 1))
