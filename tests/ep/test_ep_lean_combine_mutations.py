"""The lean combine with one line of its protocol broken at a time: the emulator must say so."""

import functools
import re

import mutate
import pytest
from cases import Case, draw
from internode_cluster import check
from lean_combine_cluster import LeanCombine

from dsv3_kernels import emulator
from dsv3_kernels.ep import Topology
from dsv3_kernels.ep import internode_kernels as internode
from dsv3_kernels.jit import compile

SEEDS = 40
HAZARD, TIMEOUT, WRONG = "hazard", "timeout", "wrong result"
MOVE, EPILOGUE = "combine_lean", "combine_lean_epilogue"

# name: (which launch, what to replace, by what, what some schedule of 40 must give)
MUTATIONS = {
    "a tail over NVLink before its rows": (
        MOVE,
        "bulk::stores_done();\n            else",
        "bulk::stores_read();\n            else",
        {HAZARD, WRONG},
    ),
    "a put before the staging slot is written": (
        MOVE,
        "    if (walk.owes()) {\n        bulk::stores_done();",
        "    if (walk.owes()) {\n        bulk::stores_read();",
        {HAZARD, WRONG},
    ),
    "sums are stored before the copy engine sees them": (
        MOVE,
        "bulk::lanes_done();",
        "__syncwarp();",
        {HAZARD},
    ),
    "rows are loaded before they came": (
        MOVE,
        "if (!__any_sync(kFullWarp, waits)) return true;",
        "return true;",
        {HAZARD, WRONG},
    ),
    "slots over NVLink are reused before they were read": (
        MOVE,
        "free = miss.wait(o, o.self.mine().ack(peer), o.epoch - 1",
        "free = miss.wait(o, o.self.mine().ack(peer), 0",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "slots over InfiniBand are reused before they were read": (
        MOVE,
        "miss.wait(o, ack, o.epoch - 1",
        "miss.wait(o, ack, 0",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "nobody watches what comes over InfiniBand": (
        MOVE,
        "if (total) came = miss.wait(o, tail, expected",
        "if (false) came = miss.wait(o, tail, expected",
        {HAZARD, WRONG},
    ),
    "nobody watches what comes over NVLink": (
        MOVE,
        "if (total) came = miss.wait(o, tail, o.epoch",
        "if (false) came = miss.wait(o, tail, o.epoch",
        {HAZARD, WRONG},
    ),
    "a forwarder leaves out a node": (
        MOVE,
        "if (++turn_ + 1 >= o_.place.link.nodes)",
        "if (++turn_ + 1 >= o_.place.link.nodes - (o_.where.node() == 0))",
        {TIMEOUT},
    ),
    "a signal on another queue pair than its data": (
        MOVE,
        re.compile(r"nvshmemx_qp_char_put_signal_nbi_warp\(reinterpret_cast.*?\);", re.DOTALL),
        """char* to = reinterpret_cast<char*>(target);
        nvshmemx_qp_char_put_nbi_warp(to, reinterpret_cast<const char*>(source), bytes, rank, queue_pair);
        if (threadIdx.x % 32 == 0) nvshmemx_qp_signal_op(signal, value, 9, rank, queue_pair + 1);""",
        {HAZARD, WRONG},
    ),
    "slots are acknowledged by the first block that ends": (
        EPILOGUE,
        "place.finish(epoch, moved + blocks);",
        "place.finish(epoch, moved + 1);",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "nothing is acknowledged over InfiniBand": (
        EPILOGUE,
        "if (dsv3::finish(on_node, epoch, blocks)) acknowledge(epoch);",
        "dsv3::finish(on_node, epoch, blocks);",
        {TIMEOUT},
    ),
}

CASE = Case(Topology(2, 2), local_experts=2, hidden=32, num_topk=3, tokens=6, seed=1)


@functools.cache
def dispatch():
    ptx = internode.DISPATCH.ptx(lineinfo=True)
    return ptx.text, ptx.name


@functools.cache
def combine(which, old="", new=""):
    text = mutate.source(which + ".cuh", old, new)
    options = compile.source_options(defines={"DSV3_NVSHMEM_DECLARED": 1}, lineinfo=True)
    done = compile.compile_source(text, [f"dsv3::{which}"], options)
    return done.ptx, done.names[0]


def outcome(seed, which=None, old="", new=""):
    every = [dispatch()]
    every += [combine(name, *((old, new) if name == which else ())) for name in (MOVE, EPILOGUE)]
    schedule = "pct" if seed % 2 else "random"
    options = {"stages": 1 + seed % 3, "times": 3, "warps": 2, "schedule": schedule}
    cluster = LeanCombine(CASE, seed, **options)
    try:
        (out,) = cluster.run([draw(CASE)], every)
    except emulator.HazardError:
        return HAZARD
    except emulator.EmulationError as error:
        return type(error).__name__
    if cluster.failures():
        return TIMEOUT
    try:
        check(cluster, 0, out)
    except AssertionError:
        return WRONG
    return "nothing"


def test_the_protocol_as_it_is():
    assert {outcome(seed) for seed in range(4)} == {"nothing"}


# What test_bulk.py and the broken protocols of the rings notice much the same way.
LONG = (
    "sums are stored before the copy engine sees them",
    "a forwarder leaves out a node",
    "nothing is acknowledged over InfiniBand",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in MUTATIONS]
)
def test_a_broken_protocol_is_noticed(name):
    which, old, new, expected = MUTATIONS[name]
    seen = []
    for seed in range(SEEDS):
        seen.append(outcome(seed, which, old, new))
        if seen[-1] != "nothing":
            break
    assert seen[-1] in expected, seen
