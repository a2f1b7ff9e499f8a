"""What goes wrong between ranks."""

import builtins
from collections.abc import Sequence


class TimeoutError(builtins.TimeoutError):
    """Ranks that this one waited for did not answer in time, or are gone.

    op: "dispatch", "combine" or "Buffer" (the check at construction). rank: who waited. peers: who is
    missing. role, channel: what waited, where a transport has several. seconds: how long. The buffer is of no
    use after it: its ranks no longer agree on which call they are in.
    """

    def __init__(
        self, op: str, rank: int, peers: Sequence[int], role: str, channel: int, seconds: float, cause: str
    ) -> None:
        self.op, self.rank, self.peers = op, rank, tuple(peers)
        self.role, self.channel, self.seconds = role, channel, seconds
        who = "rank" if len(self.peers) == 1 else "ranks"
        names = ", ".join(map(str, self.peers))
        super().__init__(
            f"{op}: rank {rank} ({role}, channel {channel}) waited {seconds:.1f} s for {who} {names}: {cause}"
            ". See whether that process is alive and has called the same ops in the same order"
        )


class Fault(ValueError):
    """A fault in one rank's values, found before any token moved; every rank of the call raises it."""
