"""Warps dealt out by counts against fixed splits, in virtual time; docs/all2all.md has the table."""

import functools

import mutate
import pytest
from cases import Case, draw
from internode_cluster import Cluster

from dsv3_kernels.ep import Topology
from dsv3_kernels.jit import compile

EXPRESSIONS = ["dsv3::dispatch_internode<false>", "dsv3::combine_internode"]
CHOICE = "    u32 best = 1, soonest = ~0u;"
WARPS, FIXED = 12, (2, 4, 6, 8)
ROUTINGS = [((4, 2), "every node", 4), ((2, 4), "balanced", 4), ((2, 2), "one node far", 2)]


@functools.cache
def kernels(fixed):
    """Dispatch and combine that give `fixed` warps to the first role; None: as the counts say."""
    new = CHOICE if fixed is None else f"    return min({fixed}u, warps - least);\n{CHOICE}"
    text = mutate.source("dispatch_internode.cuh combine_internode.cuh", CHOICE, new)
    options = compile.source_options(defines={"DSV3_NVSHMEM_DECLARED": 1})
    done = compile.compile_source(text, EXPRESSIONS, options)
    return [(done.ptx, name) for name in done.names]


def cycles(topology, routing, topk, fixed):
    """Of dispatch, and of combine."""
    case = Case(Topology(*topology), routing, hidden=1024, tokens=64, local_experts=4, num_topk=topk, seed=0)
    ends = []
    for both in (kernels(fixed)[:1], kernels(fixed)):
        cluster = Cluster(case, num_sms=2, chunk=4, depth=8, warps=WARPS, schedule="timed", checks=False)
        cluster.run([draw(case)], both, combine=len(both) > 1)
        ends.append(cluster.cluster.counters["launch_cycles"])
    return ends


@pytest.mark.long
@pytest.mark.parametrize("topology, routing, topk", ROUTINGS, ids=[row[1] for row in ROUTINGS])
def test_no_fixed_split_is_better(topology, routing, topk):
    """Within 2 % of the best fixed split of the routing, whichever that is."""
    by_counts = cycles(topology, routing, topk, None)
    fixed = {n: cycles(topology, routing, topk, n) for n in FIXED}
    print(f"{topology[0]} nodes x {topology[1]}, {routing}: by counts {by_counts}, fixed {fixed}")
    for op in (0, 1):
        assert by_counts[op] <= 1.02 * min(times[op] for times in fixed.values())
