"""Dispatch among virtual nodes of one GPU: bit by bit; speed against a copy of as many bytes on those SMs."""

import itertools

from dsv3_kernels.ep import Topology

from .. import loopback
from .dispatch import case

NOTE = loopback.NOTE_OF_NODES
NODES = [Topology(*sizes) for sizes in ((2, 2), (2, 3), (2, 1), (4, 2))]
CASES = [case("dispatch_internode", *facts) for facts in itertools.product(NODES, (True, False), (2,))]
WORKLOADS = [
    loopback.workload("dispatch FP8 across nodes", setup, "dispatch") for setup in loopback.SETUPS_OF_NODES
]
