"""Ranks on several nodes in the emulator with the lean kernels: their launches run round after round."""

import functools

import torch
from internode_cluster import Cluster

from dsv3_kernels import emulator
from dsv3_kernels.ep import internode_kernels as internode
from dsv3_kernels.ep import kernels, lean, lean_combine, lean_dispatch

ALL = (*lean_dispatch.DISPATCH, *lean_combine.KERNELS)


@functools.cache
def compiled(*parts):
    """Dispatch's two launches and combine's, one by rings or two."""
    return [(ptx.text, ptx.name) for ptx in (kernel.ptx(lineinfo=True) for kernel in parts)]


class LeanCluster(Cluster):
    """pairs: channels of a block. pieces: of a message, None for whole ones. blocks: of second launches."""

    def __init__(self, case, seed=0, num_sms=2, pairs=1, pieces=None, blocks=2, **options):
        self.pairs, self.pieces, self.blocks = pairs, pieces, blocks
        # So many that the second launches may begin beside the first.
        sms = num_sms + blocks
        super().__init__(case, seed, num_sms, channels=num_sms * pairs, sms=sms, **options)

    def connect(self):
        links = super().connect()
        slots = lean.Slots(self.shape, self.channels)
        symmetric = [self.cluster.symmetric((slots.size,), torch.uint8) for _ in kernels.OPS]
        self.lean = [
            lean.Link.create(slots, link.peers, tuple(of_op[rank] for of_op in symmetric), link.queue_pairs)
            for rank, link in enumerate(links)
        ]
        return links

    def dispatch(self, compiled, rank, operands):
        message, _ = lean_dispatch.message_of(self.shape, operands.x, operands.topk_idx is None)
        pieces = self.pieces or lean_dispatch.Pieces(message, 3)
        table = kernels.table([lean_dispatch.dispatch_call(self.lean[rank], operands)])
        of_launch = (
            lean_dispatch.blocks_of(self.shape, self.num_sms, self.pairs),
            lean_dispatch.blocks_of_epilogue(self.shape, self.blocks, 3),
        )
        self._chain(
            (*part, *blocks.shape(pieces), (table, blocks.count, *moved, pieces.bytes, pieces.stages))
            for part, blocks, moved in zip(compiled, of_launch, ((), (self.num_sms,)), strict=False)
        )

    def combine(self, compiled, rank, operands):
        if len(compiled) == 2:  # the second launch of dispatch, and combine by rings
            self.launch(compiled[1], internode.combine_call(self.links[rank], operands))
            return
        table = kernels.table([lean_combine.combine_call(self.lean[rank], operands)])
        warps, stages = 2 * self.pairs, 2
        grid, block = (self.num_sms, 1, 1), (32 * warps, 1, 1)
        self._chain(
            [
                (
                    *compiled[1],
                    grid,
                    block,
                    warps * lean_combine.warp_bytes(stages),
                    (table, grid[0], stages),
                ),
                (*compiled[2], (self.blocks, 1, 1), (96, 1, 1), 0, (table, self.blocks, grid[0])),
            ]
        )

    def _chain(self, parts):
        names = "ptx", "kernel", "grid", "block", "shared_bytes", "args"
        emulator.current().launch_chain([dict(zip(names, part, strict=True)) for part in parts])
