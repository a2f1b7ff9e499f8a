"""The lean kernels across nodes: as `internode`, on fewer SMs, through static slots instead of rings.

An op is two launches: one on few SMs that moves tokens until all have come, and one on all SMs, dependent on
it, that puts them in order; that one waits for nobody.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import launch
from ..by_value import Struct
from . import kernels, lean_combine, lean_dispatch
from .internode_kernels import Layout
from .intranode import IntranodeTransport, KernelRank, Launch
from .lean import Link, Slots
from .transport import CombineCall, DispatchCall


class LeanRank(KernelRank):
    """addresses: of the memories of this node's ranks, as this rank sees them. symmetric: uint8 zeros,
    `slots.size` of them, for dispatch and for combine. queue_pairs: int32, a handle a channel.
    """

    def __init__(
        self,
        slots: Slots,
        rank: int,
        memory: Tensor,
        addresses: Sequence[int],
        symmetric: tuple[Tensor, ...],
        queue_pairs: Tensor,
        timeout: float,
        **options: Any,
    ) -> None:
        # A rank of another node stands for its forwarder here.
        everybody = list(addresses) * slots.shape.topology.nodes
        super().__init__(slots.shape, rank, memory, everybody, timeout, **options)
        self.link = Link.create(slots, self.peers, symmetric, queue_pairs)

    def channels_of(self, num_sms: int) -> int:
        return lean_dispatch.channels_of(self.shape, num_sms)

    def arrivals(self, call: DispatchCall, idx: Tensor, rows: int) -> Layout:
        if call.num_sms > self.link.slots.channels:
            raise ValueError(
                f"dispatch: num_sms is {call.num_sms}, expected at most {self.link.slots.channels}: an SM "
                "serves a channel or more. Mend: as few as do, by default 12, 6 or 4 on 2, 4 or 8 nodes"
            )
        return Layout.of(super().arrivals(call, idx, rows), self.shape)

    def launches(self, call: DispatchCall | CombineCall, launched: int) -> list[Launch]:
        if isinstance(call, CombineCall):
            return self._combine_launches(call, launched)
        again = call.handle is not None
        data = call.x if isinstance(call.x, Tensor) else call.x.data
        message, _ = lean_dispatch.message_of(self.shape, call.x, again)
        found: list[Launch] = []
        for kernel, blocks in zip(
            lean_dispatch.DISPATCH_AGAIN if again else lean_dispatch.DISPATCH,
            (
                lean_dispatch.blocks_of(self.shape, call.num_sms),
                lean_dispatch.blocks_of_epilogue(self.shape, launch.num_sms(data) // launched),
            ),
            strict=True,
        ):
            pieces = blocks.pieces(message)
            moved = (call.num_sms,) if found else ()
            arguments = blocks.count, *moved, pieces.bytes, pieces.stages
            found.append(Launch(kernel, *blocks.shape(pieces), arguments, dependent=bool(found)))
        return found

    def _combine_launches(self, call: CombineCall, launched: int) -> list[Launch]:
        layout = call.handle.layout
        if not isinstance(layout, Layout):
            raise TypeError(
                f"handle.layout is {type(layout).__name__}, expected that of kernels across nodes"
            )
        grid, block, shared, stages = lean_combine.shape_of_move(layout.ranges.shape[1], call.num_sms)
        sms = launch.num_sms(call.y) // launched
        epilogue = lean_combine.shape_of_epilogue(sms)
        return [
            Launch(lean_combine.MOVE, grid, block, shared, (call.num_sms, stages)),
            Launch(lean_combine.EPILOGUE, *epilogue, (sms, call.num_sms), dependent=True),
        ]

    def dispatch_call(self, operands: kernels.DispatchOperands) -> Struct:
        return lean_dispatch.dispatch_call(self.link, operands)

    def combine_call(self, operands: kernels.CombineOperands) -> Struct:
        return lean_combine.combine_call(self.link, operands)


class LeanTransport(IntranodeTransport, LeanRank):
    """A rank that launches alone."""
