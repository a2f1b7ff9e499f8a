"""How warps are dealt out to two roles: no split changes the bits, and none is faster than that by counts."""

import functools
import re

import mutate
import pytest
from cases import Case, draw
from fp8_helpers import fresh_generator
from internode_cluster import SECONDS, Cluster, check

from dsv3_kernels.ep import Topology
from dsv3_kernels.jit import compile

FILES = "dispatch_internode.cuh combine_internode.cuh"
EXPRESSIONS = ["dsv3::dispatch_internode<false>", "dsv3::combine_internode"]
CHOICE = "    u32 best = 1, soonest = ~0u;"
WARPS, FIXED = 12, (2, 4, 6, 8)
ROUTINGS = [((4, 2), "every node", 4), ((2, 4), "balanced", 4), ((2, 2), "one node far", 2)]


@functools.cache
def kernels(fixed):
    """Dispatch and combine that give `fixed` warps to the first role; None: as the counts say."""
    new = CHOICE if fixed is None else f"    return min({fixed}u, warps - least);\n{CHOICE}"
    return compiled(mutate.source(FILES, CHOICE, new))


def compiled(text, **how):
    options = compile.source_options(defines={"DSV3_NVSHMEM_DECLARED": 1}, **how)
    done = compile.compile_source(text, EXPRESSIONS, options)
    return [(done.ptx, name) for name in done.names]


@functools.cache
def kernels_of_any_split():
    """The first role gets as many warps as the timeout has nanoseconds over a multiple of 16."""
    text = mutate.source(FILES, re.compile(r"= split_warps\(warps,"), "= forced(o.self, warps,", places=2)
    start = "// One warp, whose lanes wait for several words"
    assert text.count(start) == 1
    text = text.replace(
        start,
        "__device__ __forceinline__ u32 forced(const Rank& self, u32 warps, Work first, Work, u32 least) {\n"
        "    return first.rows ? min(static_cast<u32>(self.timeout % 16), warps - least) : 0;\n}\n" + start,
    )
    return compiled(text, lineinfo=True)


@pytest.mark.parametrize("topology", [(2, 2), (3, 1)])
def test_every_split_gives_the_same(topology):
    """1 to 7 of 8 warps for the first role, whatever the counts say, over three rounds."""
    seed = fresh_generator().initial_seed() % (1 << 30)
    both = kernels_of_any_split()
    for first in range(1, 8):
        case = Case(Topology(*topology), local_experts=2, hidden=32, tokens=9, fp8=first % 2 == 0, seed=seed)
        schedule = ["random", "pct"][first % 2]
        cluster = Cluster(case, seed + first, chunk=1 + first % 3, depth=2, warps=8, schedule=schedule)
        cluster.seconds = SECONDS + (first + 0.5) * 1e-9
        for round_, out in enumerate(cluster.run([draw(case, round_) for round_ in range(3)], both)):
            check(cluster, round_, out)
        assert not cluster.failures(), (first, case)


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
