"""Dispatch among virtual nodes of one GPU: bit by bit; speed against a copy of as many bytes on those SMs."""

import itertools

from dsv3_kernels.ep import Topology

from .. import loopback
from .dispatch import case

NOTE = loopback.NOTE_OF_NODES
NODES = [Topology(*sizes) for sizes in ((2, 2), (2, 3), (2, 1), (4, 2))]
KINDS = [*(("rings", topology) for topology in NODES), *(("lean", topology) for topology in NODES[:2])]
CASES = [
    case(f"dispatch_internode {internode}", topology, flag, 2, internode)
    for (internode, topology), flag in itertools.product(KINDS, (True, False))
]
WORKLOADS = [
    loopback.workload(f"dispatch FP8 across nodes, {setup.internode}", setup, "dispatch")
    for setup in loopback.SETUPS_OF_NODES
]
