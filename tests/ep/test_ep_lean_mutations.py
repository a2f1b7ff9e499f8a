"""The lean dispatch with one line of the protocol broken at a time: the emulator must say so."""

import functools
import re

import mutate
import pytest
from cases import Case, draw
from internode_cluster import check
from lean_cluster import LeanCluster
from test_ep_internode_mutations import DECLARE, HAZARD, PUT, PUT_SIGNAL, SIGNAL, TIMEOUT, WRONG

from dsv3_kernels import emulator
from dsv3_kernels.ep import Topology
from dsv3_kernels.ep.lean_dispatch import Pieces
from dsv3_kernels.jit import compile

SEEDS = 40
EXPRESSIONS = ["dsv3::dispatch_lean<false>", "dsv3::dispatch_lean_epilogue<false>"]
ANY = {HAZARD, WRONG, TIMEOUT}

# name: (what to replace, by what, what some schedule of 40 must give)
MUTATIONS = {
    "a signal on another queue pair than its data": (
        PUT_SIGNAL,
        PUT + SIGNAL.format(" + 1"),
        {HAZARD, WRONG},
    ),
    "the first word on another queue pair": (
        re.compile(
            r"(slots\.first\(number_at\(to\), channel\), value, like\(to\),\s*link\.queue_pairs\[channel\])"
        ),
        r"\1 + 1",
        ANY,
    ),
    "messages go before they lie in their slots": ("bulk::stores_done<kTold>();", "", {HAZARD}),
    "the last messages go when their stages have been read": (
        "bulk::stores_done();\n    stored = count;",
        "bulk::stores_read();\n    stored = count;",
        {HAZARD},
    ),
    "a tail over NVLink comes when the stages have been read": (
        "bulk::stores_done();\n    u64 sent = 0;",
        "bulk::stores_read();\n    u64 sent = 0;",
        {HAZARD},
    ),
    "no fence between a tail and the copy of its messages": ("if (left) bulk::acquired();", "", {HAZARD}),
    "no fence between lanes' writes and the copy of a stage": (
        re.compile(r"if \((fill<kAgain>\(.*?stage\))\) bulk::lanes_done\(\);"),
        r"\1;",
        {HAZARD},
    ),
    "a stage is loaded before its stores have read it": ("bulk::stores_read<1>();  //", "//", {HAZARD}),
    "an acknowledgement is lost": ("lean::Place{{self}, all.link}.acknowledge(epoch);", "", {TIMEOUT}),
    "slots over InfiniBand are reused early": (
        "free = o.place.wait_ack(node, o.channel, o.epoch - 1);",
        "free = true;",
        {HAZARD, WRONG},
    ),
    "slots over NVLink are reused early": (
        re.compile(r"free = o\.self\.wait\(o\.self\.mine\(\)\.ack\(peer\).*?;", re.DOTALL),
        "free = true;",
        {HAZARD, WRONG},
    ),
    "slots are free when one block has read them": (
        "finish(on_node, epoch, moved + blocks);",
        "finish(on_node, epoch, moved + 1);",
        ANY,
    ),
    "the finished tail comes before the header": (
        "m.bytes, o.tail(to));",
        "m.bytes, o.tail(to) | lean::kFinished);",
        ANY,
    ),
    "a message is read before its tail": (
        "__shfl_sync(kFullWarp, came, node),",
        "__shfl_sync(kFullWarp, came, node) + !__shfl_sync(kFullWarp, finished, node),",
        ANY,
    ),
    "a forwarder skips a node": (
        "bool open = lane < nodes &&",
        "bool open = lane > 0 && lane < nodes &&",
        ANY,
    ),
    "the first launch ends before all has come": ("kept = watch(o);", "kept = true;", {HAZARD, WRONG}),
}

CASE = Case(Topology(2, 2), local_experts=2, hidden=32, num_topk=3, tokens=9, seed=1)
# One node sends, the other hears late: nothing but the protocol holds the first one back.
ONE_WAY = Case(Topology(2, 1), "some ranks empty", local_experts=2, hidden=16, num_topk=2, tokens=6, seed=1)
ONE_WAYS = ("slots over InfiniBand are reused early", "the first word on another queue pair")


@functools.cache
def kernels(old="", new="", early=False):
    """early: the second launch may start with the first."""
    text = mutate.source("dispatch_lean.cuh dispatch_lean_epilogue.cuh", old, new)
    if early:
        begin = "const u64 epoch = self.epoch();\n"
        text = text.replace(begin, f"{begin}    ptx::launch_dependents();\n", 1)
    if "nvshmemx_qp_char_put_nbi_warp" in text:
        text = DECLARE + text
    options = compile.source_options(defines={"DSV3_NVSHMEM_DECLARED": 1}, lineinfo=True)
    done = compile.compile_source(text, EXPRESSIONS, options)
    return [(done.ptx, name) for name in done.names]


def outcome(both, seed, case=CASE):
    schedule = "pct" if seed % 2 else "random"
    pieces = [None, Pieces(48, 2), Pieces(64, 3)][seed % 3]
    cluster = LeanCluster(case, seed, 1, 1 + seed % 2, pieces, blocks=2, schedule=schedule)
    if case is ONE_WAY:
        cluster.cluster.stall(1, 0, until=20_000)
    rounds = [draw(case, round_) for round_ in range(3)]
    try:
        out = cluster.run(rounds, both, combine=False)
    except emulator.HazardError:
        return HAZARD
    except emulator.EmulationError as error:
        return type(error).__name__
    if cluster.failures():
        return TIMEOUT
    try:
        for round_, got in enumerate(out):
            check(cluster, round_, got, combine=False)
    except AssertionError:
        return WRONG
    return "nothing"


@pytest.mark.parametrize("case", [CASE, ONE_WAY], ids=["rounds", "one way"])
def test_the_protocol_as_it_is(case):
    assert {outcome(kernels(), seed, case) for seed in range(SEEDS // 8)} == {"nothing"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_protocol_is_noticed(name):
    old, new, expected = MUTATIONS[name]
    seen = []
    for seed in range(SEEDS):
        seen.append(outcome(kernels(old, new), seed, ONE_WAY if name in ONE_WAYS else CASE))
        if seen[-1] != "nothing":
            break
    assert seen[-1] in expected, seen


@pytest.mark.parametrize("waits", [True, False])
def test_the_second_launch_waits_for_the_first(waits):
    """Though it may start with it, and then takes what SMs the first has left."""
    both = kernels(*(("", "") if waits else ("ptx::grid_dependency_wait();", "")), early=True)
    seen = {outcome(both, seed) for seed in range(3)}
    assert seen == {"nothing"} if waits else seen & ANY
