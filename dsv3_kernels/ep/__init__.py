"""Expert-parallel all-to-all: every token to the ranks that hold its experts, and the results back.

    buffer = ep.Buffer(group, num_experts=256, hidden=7168, max_tokens_per_rank=4096, num_topk=8)
    got = buffer.dispatch(x, topk_idx, topk_weights)
    y = ...  # the experts, on got.x with got.group_offsets
    out = buffer.combine(y, got.handle, got.topk_weights).x

`reference` says what every transport computes, bit for bit. The portable transport runs on torch.distributed
(gloo on CPUs) and, one rank alone, without it.
"""

from .buffer import Buffer
from .errors import TimeoutError
from .loopback import LoopbackBuffer
from .low_latency import LowLatencyCombined, LowLatencyDispatched, LowLatencyHandle
from .tuning import Network, Tuning
from .types import CombineResult, DispatchResult, Event, Handle, Stall, Status, Topology

__all__ = [
    "Buffer",
    "CombineResult",
    "DispatchResult",
    "Event",
    "Handle",
    "LoopbackBuffer",
    "LowLatencyCombined",
    "LowLatencyDispatched",
    "LowLatencyHandle",
    "Network",
    "Stall",
    "Status",
    "TimeoutError",
    "Topology",
    "Tuning",
]
