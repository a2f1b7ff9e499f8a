"""Ranks on several nodes in the emulator with the lean kernels: their launches run round after round."""

import torch
from internode_cluster import Cluster

from dsv3_kernels import emulator
from dsv3_kernels.ep import internode_kernels as internode
from dsv3_kernels.ep import kernels, lean, lean_dispatch


def compiled(*parts):
    return [(ptx.text, ptx.name) for ptx in (kernel.ptx(lineinfo=True) for kernel in parts)]


class LeanCluster(Cluster):
    """pairs: channels of a block. pieces: of a message, None for whole ones. blocks: of second launches."""

    def __init__(self, case, seed=0, num_sms=2, pairs=1, pieces=None, blocks=2, **options):
        self.pairs, self.pieces, self.blocks = pairs, pieces, blocks
        super().__init__(case, seed, num_sms, channels=num_sms * pairs, **options)

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
        chain = []
        for (ptx, kernel), blocks in zip(compiled, of_launch, strict=False):
            arguments = table, blocks.count, pieces.bytes, pieces.stages
            chain.append((ptx, kernel, *blocks.shape(pieces), arguments))
        names = "ptx", "kernel", "grid", "block", "shared_bytes", "args"
        emulator.current().launch_chain([dict(zip(names, part, strict=True)) for part in chain])

    def combine(self, compiled, rank, operands):
        self.launch(compiled[1], internode.combine_call(self.links[rank], operands))
