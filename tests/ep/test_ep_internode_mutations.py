"""The kernels across nodes with one line of the protocol broken at a time: the emulator must say so."""

import functools
import re

import mutate
import pytest
from cases import Case, draw
from internode_cluster import Cluster, check

from dsv3_kernels import emulator
from dsv3_kernels.ep import Topology
from dsv3_kernels.jit import compile

SEEDS = 40
HAZARD, TIMEOUT, WRONG = "hazard", "timeout", "wrong result"
FILES = {
    "dispatch_internode.cuh": "dsv3::dispatch_internode<false>",
    "combine_internode.cuh": "dsv3::combine_internode",
}

PUT_SIGNAL = re.compile(r"nvshmemx_qp_char_put_signal_nbi_warp\(reinterpret_cast.*?\);", re.DOTALL)
PUT = """nvshmemx_qp_char_put_nbi_warp(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(source),
                                  bytes, static_cast<int>(rank), queue_pair);"""
SIGNAL = "if (threadIdx.x % 32 == 0) dsv3::transport::signal(signal, value, rank, queue_pair{});"
DECLARE = """extern "C" __device__ void nvshmemx_qp_char_put_nbi_warp(char*, const char*, unsigned long long,
    int, int);
namespace dsv3 { namespace transport { __device__ void signal(unsigned long long* signal,
    unsigned long long value, unsigned rank, int queue_pair); } }
"""

# name: (what to replace, by what, what some schedule of 40 must give)
MUTATIONS = {
    "a signal on another queue pair than its data": (
        PUT_SIGNAL,
        PUT + SIGNAL.format(" + 1"),
        {HAZARD, WRONG},
    ),
    "a signal before its data": (PUT_SIGNAL, SIGNAL.format("") + PUT, {HAZARD, WRONG}),
    "dispatch loses a credit": ("o.place.free_chunk(n, o.channel, p);", "", {TIMEOUT}),
    "combine loses a credit": ("o.place.free_chunk(lane, o.channel, position);", "", {TIMEOUT}),
    "dispatch reuses a slot early": (
        "before = ring.turn(position) - 1;",
        "before = 0;",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "combine reuses a slot early": (
        "const u64 before = ring.turn(base + next) - 1;",
        "const u64 before = 0;",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "a slot is free when the first GPU has it": ("+ 1 != o.self.gpus", "!= 0", {HAZARD, WRONG, TIMEOUT}),
    "a slot is free when its first message is read": ("+ 1 != messages", "!= 0", {HAZARD, WRONG, TIMEOUT}),
    "readers of a slot are counted on": ("*slot_readers = 0;", "", {TIMEOUT}),
    "a forwarder skips a node": (
        "const bool exists = stream < o.self.ranks,",
        "const bool exists = stream < o.self.ranks && node != 0,",
        {TIMEOUT},
    ),
    "combine's forwarder skips a node": (
        "const bool exists = ring_of_lane < others;",
        "const bool exists = ring_of_lane < others && o.place.other(ring_of_lane) != 0;",
        {TIMEOUT},
    ),
    "a tail comes before its data": ("o.epoch << 32 | after);", "o.epoch << 32 | (after + 1));", {HAZARD}),
    "a chunk is read before it came": ("ready = seen >= ring.turn(position);", "ready = true;", {HAZARD}),
    "combine reads a chunk before it came": (
        "ring.ready(position), ring.turn(position), Role::kReceive",
        "ring.ready(position), ring.turn(position) - 1, Role::kReceive",
        {TIMEOUT, HAZARD, WRONG},
    ),
    "a header is sent before the last was read": (
        "o.self.wait_warp(here.header_free(), before, Role::kSend, like, o.channel) < before",
        "false",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "a header is told before it came": (
        "o.self.wait_warp(here.header_ready(), number, Role::kForward, like, o.channel) < number",
        "false",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "a header is free before it is read": (
        re.compile(
            r"(header\.words = here\.header_in;\s*tell.*?__syncwarp\(\);)"
            r"(\s*if \(threadIdx[^;]*free_header[^;]*;)",
            re.DOTALL,
        ),
        r"\2 \1",
        {HAZARD},
    ),
    "the lanes do not see what one acquired": (
        "ready);\n        __syncwarp();\n        const bool changed",
        "ready);\n        const bool changed",
        {HAZARD},
    ),
    "positions begin anew": (
        "*o.link.received_chunks(node, o.channel) += o.link.chunks(o.layout.came(node, o.channel));",
        "",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "slots over NVLink are reused before they were read": (
        "if (threadIdx.x < all.call.self.gpus)",
        "if (false)",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "combine reads a slot before its tail": (
        "(slot - o.layout.first(node, o.channel) + 1);",
        "(slot - o.layout.first(node, o.channel));",
        {HAZARD, WRONG},
    ),
}

CASE = Case(Topology(2, 2), local_experts=2, hidden=32, num_topk=3, tokens=9, seed=1)
# One long stream, in which a reader can overtake the writer.
STREAM = Case(Topology(2, 1), "next node", local_experts=1, hidden=16, num_topk=1, tokens=40, seed=1)
STREAMS = ("a tail comes before its data", "combine reads a slot before its tail")
# One node sends, the other hears late: nothing but the protocol holds the first one back.
ONE_WAY = Case(Topology(2, 1), "some ranks empty", local_experts=2, hidden=16, num_topk=2, tokens=6, seed=1)
REUSED = "slots over NVLink are reused before they were read"  # which a combine in between would imply
ONE_WAYS = (
    "a header is sent before the last was read",
    "a header is free before it is read",
)


@functools.cache
def kernels(old="", new=""):
    """Dispatch and combine; whichever has nothing to replace stays as it is."""
    return [kernel(file, old, new) for file in FILES]


@functools.cache
def kernel(file, old="", new=""):
    whole = mutate.source(file)
    broken = bool(old) and bool(old.search(whole) if isinstance(old, re.Pattern) else old in whole)
    if old and not broken:
        return kernel(file)
    text = mutate.source(file, old, new)
    if "nvshmemx_qp_char_put_nbi_warp" in text:
        text = DECLARE + text
    options = compile.source_options(defines={"DSV3_NVSHMEM_DECLARED": 1}, lineinfo=True)
    done = compile.compile_source(text, [FILES[file]], options)
    return done.ptx, done.names[0]


def outcome(both, seed, case=CASE, combine=True):
    chunk, depth = (8, 5) if case is STREAM else [(1, 1), (2, 2), (3, 1)][seed % 3]
    schedule = "pct" if seed % 2 else "random"
    cluster = Cluster(case, seed, 2, chunk, depth, warps=[3, 8][seed % 2], schedule=schedule)
    if case is ONE_WAY:
        combine = False
        cluster.cluster.stall(1, 0, until=20_000)
    rounds = [draw(case, round_) for round_ in range(3)]
    try:
        out = cluster.run(rounds, both, combine)
    except emulator.HazardError:
        return HAZARD
    except emulator.EmulationError as error:
        return type(error).__name__
    if cluster.failures():
        return TIMEOUT
    try:
        for round_, got in enumerate(out):
            check(cluster, round_, got, combine)
    except AssertionError:
        return WRONG
    return "nothing"


@pytest.mark.parametrize("case", [CASE, STREAM, ONE_WAY], ids=["rounds", "stream", "one way"])
def test_the_protocol_as_it_is(case):
    assert {outcome(kernels(), seed, case) for seed in range(SEEDS // 4)} == {"nothing"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_protocol_is_noticed(name):
    old, new, expected = MUTATIONS[name]
    assert kernels(old, new) != kernels()
    seen = []
    for seed in range(SEEDS):
        case = STREAM if name in STREAMS else ONE_WAY if name in ONE_WAYS else CASE
        seen.append(outcome(kernels(old, new), seed, case, combine=name != REUSED))
        if seen[-1] != "nothing":
            break
    assert seen[-1] in expected, seen
