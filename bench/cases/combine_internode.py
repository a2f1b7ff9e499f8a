"""Combine among virtual nodes of one GPU: bit by bit; speed against a copy of as many bytes on those SMs."""

import itertools

from .. import loopback
from .combine import case
from .dispatch_internode import NODES

NOTE = loopback.NOTE_OF_NODES
CASES = [case("combine_internode", *facts) for facts in itertools.product(NODES, (True, False), (2,))]
WORKLOADS = [
    loopback.workload("combine BF16 across nodes", setup, "combine") for setup in loopback.SETUPS_OF_NODES
]
