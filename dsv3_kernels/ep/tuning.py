"""How large the rings between nodes are: a chunk, and how many chunks may be under way."""

import math
from dataclasses import dataclass

from .internode_kernels import WARPS, Rings
from .kernels import MAX_CHANNELS, OPS, Workspace
from .transport import Shape

COPY = 2.9  # GB/s of a warp that copies rows into a ring and out of it
HAND_OVER = 1.6  # microseconds of a warp that waits for a chunk's word and releases what it has written
NODES_PER_TOKEN = 4  # as DeepSeek-V3's gate has it


@dataclass(frozen=True)
class Network:
    """From one GPU to those of other nodes. `python -m bench.bench_chunks` measures what follows from it.

    bandwidth: GB/s of a GPU's NIC, each way. latency: microseconds from a put until its word is seen there.
    posting: microseconds that a put or a signal keeps the warp that makes it (work request and doorbell).
    """

    bandwidth: float = 50.0
    latency: float = 2.5
    posting: float = 0.7

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if (
                type(value) not in (int, float)
                or not 0 <= value < math.inf
                or (name == "bandwidth" and not value)
            ):
                raise ValueError(
                    f"Network: {name} is {value!r}, expected a number, 0 or more; bandwidth above 0"
                )


@dataclass(frozen=True)
class Tuning:
    """What a buffer's rings between nodes are made for, alike on all ranks; without a use on one node.

    channels: the most that a call may use, two SMs each: `num_sms` is at most twice as many, 64 at most.
        Memory grows with it, and chunks are sized for calls that use them all: with few SMs declare few.
    chunk: messages (tokens to a node) that travel as one put. depth: chunks under way to one node in a
        channel. None: as `chunk_of` and `depth_of` have it.
    memory: bytes that all rings of a rank may take, where depth is None.
    """

    channels: int = 12
    chunk: int | None = None
    depth: int | None = None
    network: Network = Network()
    memory: int = 1 << 30

    def __post_init__(self) -> None:
        for name, value, most in (
            ("channels", self.channels, MAX_CHANNELS),
            ("chunk", self.chunk, 1024),
            ("depth", self.depth, 1024),
            ("memory", self.memory, 1 << 50),
        ):
            if value is None and name in ("chunk", "depth"):
                continue
            if type(value) is not int:
                raise TypeError(
                    f"Tuning: {name} is {value!r} of type {type(value).__name__}, expected an int"
                )
            if not 1 <= value <= most:
                raise ValueError(f"Tuning: {name} is {value}, expected 1 to {most}")
        if not isinstance(self.network, Network):
            raise TypeError(f"Tuning: network is {type(self.network).__name__}, expected an ep.Network")


def rings_of(shape: Shape, tuning: Tuning) -> Rings:
    """Those of a buffer. Raises ValueError where the memory is too small."""
    chunk = tuning.chunk or chunk_of(shape, tuning)
    return Rings(shape, chunk, tuning.depth or depth_of(shape, tuning, chunk), tuning.channels)


def chunk_of(shape: Shape, tuning: Tuning) -> int:
    """A chunk costs its two work requests, the put and the credit, and the words that hand it over. And it
    delays the call once, by the time to fill it, to send it and to empty it: none of it goes on before all of
    it is there. So n messages take n / chunk * cost + chunk * delay longer than the same in one stream, and
    least where both are alike, a flat minimum. A short last chunk costs as much as a full one and leaves
    warps idle: a power of two divides most batches evenly.
    """
    cost = 2 * tuning.network.posting + HAND_OVER
    delay = _message(shape) * (1 / COPY + tuning.channels / tuning.network.bandwidth)
    messages = shape.max_tokens_per_rank / tuning.channels * min(1.0, NODES_PER_TOKEN / shape.topology.nodes)
    return 2 ** round(math.log2(max(1.0, math.sqrt(messages * cost / delay))))


def depth_of(shape: Shape, tuning: Tuning, chunk: int) -> int:
    """Half of a block's warps fill a slot each, one is being emptied, and the network holds what it carries
    until a credit is back, as far as the channel's part of it goes or those warps can fill it. All that in
    each ring, for a call may go to one node alone; but no more than the memory allows.
    """
    network, senders = tuning.network, WARPS // 2
    rate = min(network.bandwidth / tuning.channels, senders * COPY)
    carried = 2 * network.latency * rate / _message(shape)
    depth = senders + 1 + math.ceil(carried / chunk)
    one, two = (len(OPS) * Rings(shape, chunk, slots, tuning.channels).size for slots in (1, 2))
    if tuning.memory < two:
        raise ValueError(
            f"Tuning: memory is {tuning.memory}, expected at least {two} bytes: {tuning.channels} channels, "
            f"two chunks of {chunk} messages to each of {shape.topology.nodes} nodes"
        )
    return min(depth, 1 + (tuning.memory - one) // (two - one))


def _message(shape: Shape) -> float:
    """kB: the microseconds that it takes at 1 GB/s."""
    return Workspace(shape).slot_bytes / 1e3
