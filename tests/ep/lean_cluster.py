"""Ranks on several nodes in the emulator with the lean kernels: their launches run round after round."""

import torch
from internode_cluster import Cluster

from dsv3_kernels import emulator
from dsv3_kernels.ep import internode_kernels as internode
from dsv3_kernels.ep import kernels, lean, lean_dispatch


def compiled(*parts):
    return [(ptx.text, ptx.name) for ptx in (kernel.ptx(lineinfo=True) for kernel in parts)]


class LeanCluster(Cluster):
    """pairs: channels of a block. pieces: of a message, None for the largest that fit. blocks: of the second
    launches."""

    def __init__(self, case, seed=0, num_sms=2, pairs=1, pieces=None, blocks=2, **options):
        self.pairs, self.pieces, self.blocks = pairs, pieces, blocks
        super().__init__(case, seed, num_sms, channels=num_sms * pairs, **options)
        slots = lean.Slots(self.shape, self.channels)
        symmetric = [self.cluster.symmetric((slots.size,), torch.uint8) for _ in kernels.OPS]
        self.lean = [
            lean.Link(slots, link.peers, tuple(of_op[rank] for of_op in symmetric), link.queue_pairs)
            for rank, link in enumerate(self.links)
        ]

    def dispatch(self, both, rank, operands):
        message = lean_dispatch.message_of(self.shape, operands)
        pieces = self.pieces or lean_dispatch.Pieces.fit(message[0], 20_000)
        call = lean_dispatch.call(self.lean[rank], operands, message, pieces)
        parts = []
        for kernel, blocks, threads, words in (
            (both[0], self.num_sms, 64 * self.pairs, lean_dispatch.words_to_move(self.shape, self.pairs)),
            (both[1], self.blocks, 96, lean_dispatch.words_to_order(self.shape)),
        ):
            launch = lean_dispatch.Launch(blocks, threads, words, pieces)
            grid, block, shared = launch.shape
            parts.append(
                {
                    "ptx": kernel[0],
                    "kernel": kernel[1],
                    "grid": grid,
                    "block": block,
                    "shared_bytes": shared,
                    "args": (kernels.table([call]), blocks),
                }
            )
        emulator.current().launch_chain(parts)

    def combine(self, rest, rank, operands):
        self.launch(rest[1], internode.combine_call(self.links[rank], operands))
