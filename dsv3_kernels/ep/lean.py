"""The lean kernels across nodes: static slots in symmetric memory, and two launches an op."""

from dataclasses import dataclass

from torch import Tensor

from ..by_value import Struct, join
from ..checks import round_up
from .kernels import MAX_CHANNELS, OPS, Peers, Workspace
from .transport import Shape


@dataclass(frozen=True)
class Slots:
    """A rank's symmetric memory for one op, as `lean::Slots` in csrc/kernels/lean.cuh lays it out."""

    shape: Shape
    channels: int = MAX_CHANNELS

    @property
    def others(self) -> int:
        return self.shape.topology.nodes - 1

    @property
    def message_bytes(self) -> int:
        """The most that a token takes: a row in BF16, or in FP8 with its scales, and 8 bytes a choice."""
        return Workspace(self.shape).slot_bytes

    @property
    def header_words(self) -> int:
        """Tokens of each expert and GPU of a node, rows of each rank, the announcement."""
        gpus, local = self.shape.topology.gpus_per_node, self.shape.local_experts
        return gpus * local + gpus + Workspace(self.shape).announcement_words

    @property
    def size(self) -> int:
        words = 8 * self.others * (1 + self.channels * (2 + self.header_words))
        return round_up(words, 16) + 2 * self.others * self.shape.max_tokens_per_rank * self.message_bytes


@dataclass(eq=False)
class Link:
    """What a rank keeps between calls: its peers on its node, and its slots for other nodes, for each op."""

    slots: Slots
    peers: Peers
    symmetric: tuple[Tensor, ...]  # of each op
    queue_pairs: Tensor  # int32 [channels]

    @classmethod
    def create(cls, slots: Slots, peers: Peers, symmetric: tuple[Tensor, ...], queue_pairs: Tensor) -> "Link":
        peers.queue_pairs = queue_pairs
        return cls(slots, peers, symmetric, queue_pairs)

    def struct(self, op: str) -> Struct:
        """`lean::Link`."""
        slots = self.slots
        return join(
            [
                Struct("I", slots.others + 1),
                Struct(
                    "PIIIIQ",
                    self.symmetric[OPS.index(op)],
                    slots.others,
                    slots.channels,
                    slots.shape.max_tokens_per_rank,
                    slots.header_words,
                    slots.message_bytes,
                ),
                Struct("P", self.queue_pairs),
            ]
        )
