"""Latency and bandwidth in virtual time, of links between GPUs and of a GPU's memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """Latency in nanoseconds; bandwidth in GB/s, of a link between GPUs each way.

    The latency of a link is from one GPU to the other; that of a memory from a load to its data.
    posting: nanoseconds that a message of the network keeps the warp that sends it (a work request, the
    doorbell); a put and its signal are one. None but in `VirtualCluster`'s links.
    """

    latency: int
    bandwidth: float
    posting: int = 0

    def __post_init__(self) -> None:
        if self.latency < 0 or self.posting < 0 or not self.bandwidth > 0:
            raise ValueError(f"Link: got {self}, expected latency and posting >= 0 ns and bandwidth > 0 GB/s")


# Orders of magnitude to compare protocols with: NVLink 4, one 400 Gbit/s NIC a GPU, and HBM3e.
NVLINK = Link(latency=700, bandwidth=450.0)
IB = Link(latency=2500, bandwidth=50.0)
HBM = Link(latency=350, bandwidth=4800.0)
