"""Combine among virtual nodes of one GPU: bit by bit; speed against a copy of as many bytes on those SMs."""

import itertools

from .. import loopback
from .combine import case
from .dispatch_internode import KINDS

NOTE = loopback.NOTE_OF_NODES
CASES = [
    case(f"combine_internode {internode}", topology, flag, 2, internode)
    for (internode, topology), flag in itertools.product(KINDS, (True, False))
]
WORKLOADS = [
    loopback.workload(f"combine BF16 across nodes, {setup.internode}", setup, "combine")
    for setup in loopback.SETUPS_OF_NODES
]
