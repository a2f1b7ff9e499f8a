"""The all-to-all's kernels with one line of the protocol broken at a time: the emulator must say so."""

import re

import mutate
import pytest
from cases import Case, draw
from test_ep_kernels import Node, check, expected_of

from dsv3_kernels import emulator
from dsv3_kernels.ep import Topology

SEEDS = 40
HAZARD, TIMEOUT, WRONG = "hazard", "timeout", "wrong result"

# name: (what to replace, by what, what some schedule of 40 must give)
MUTATIONS = {
    "a tail announces a token that is not written yet": (
        "if (++sent % kChunk == 0) publish(tail, epoch << 32 | sent);",
        "if (++sent % kChunk == 1) publish(tail, epoch << 32 | (sent + 3));",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "a tail does not release": ("st.release.sys.global.u64", "st.relaxed.sys.global.u64", {HAZARD}),
    "a wait does not acquire": ("ld.acquire.sys.global.u64", "ld.relaxed.sys.global.u64", {HAZARD}),
    "the tail is released while other lanes still write": (
        "__syncwarp();\n    if (threadIdx.x % 32 == 0) ptx::store_release_system(tail, value);",
        "if (threadIdx.x % 32 == 0) ptx::store_release_system(tail, value);",
        {HAZARD},
    ),
    "other lanes do not see what lane 0 acquired": (
        "seen = __shfl_sync(kFullWarp, seen, 0);\n        __syncwarp();",
        "seen = __shfl_sync(kFullWarp, seen, 0);",
        {HAZARD},
    ),
    "slots are reused before they were read": (
        "self.wait_warp(ack, epoch - 1, Role::kSend, peer, channel) < epoch - 1",
        "false",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "the first block to end acknowledges for all": (
        "finished_blocks, 1) + 1 != blocks",
        "finished_blocks, 1) != 0",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "the credit is lost": (
        "ptx::store_release_system(self.workspace(peer).ack(self.rank), epoch);",
        ";",
        {TIMEOUT},
    ),
    "counts stand only after they are announced": (
        re.compile(r"(announce\(call, [^;]*;)\s*(publish\(theirs.tail[^;]*;)"),
        r"\2 \1",
        {HAZARD, WRONG},
    ),
    "counts are never announced": (
        "publish(theirs.tail(self.rank, channel), epoch << 32);",
        "",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "one token too many is counted": (
        "announced->tokens = tokens;",
        "announced->tokens = tokens + 1;",
        {TIMEOUT, HAZARD, WRONG},
    ),
    "counts of other channels are not waited for": (
        "if (lane < channels)\n            kept",
        "if (lane == 0)\n            kept",
        {HAZARD, WRONG},
    ),
    "rows of one channel are those of another": (
        "if (c == channel) next[source * mine.local_experts + e]",
        "if (c == 0) next[source * mine.local_experts + e]",
        {HAZARD, WRONG},
    ),
    "slots of a token are read before its tail": (
        "const u64 expected = epoch << 32 | (i + 1);",
        "const u64 expected = epoch << 32 | i;",
        {HAZARD, WRONG},
    ),
}

MUTATIONS |= {
    "combine's tail announces all tokens at once": (
        "publish(home.tail(self.rank, channel), epoch << 32 | (i + 1));",
        "publish(home.tail(self.rank, channel), epoch << 32 | total);",
        {HAZARD, WRONG},
    ),
    "combine reads a slot before its tail": (
        "(slot - share.first + 1);",
        "(slot - share.first);",
        {HAZARD, WRONG},
    ),
    "combine's lanes do not see what others acquired": (
        "return false;\n        __syncwarp();",
        "return false;",
        {HAZARD},
    ),
}

# Three rounds of few tokens; and one long stream, in which a reader can overtake the writer.
CASE = Case(Topology(1, 3), local_experts=2, hidden=32, num_topk=2, tokens=12, seed=1)
STREAM = Case(Topology(1, 2), local_experts=2, hidden=16, num_topk=4, tokens=64, seed=1)
TAILS = [name for name in MUTATIONS if "tail announces" in name or "before its tail" in name]


def source(old="", new=""):
    places = 2 if "wait_warp(ack" in str(old) else 1  # in dispatch and combine alike
    text = mutate.source("dispatch.cuh combine.cuh", old, new, places=places)
    return text.replace("__global__ void", 'extern "C" __global__ void')


def outcome(text, seed, case=CASE):
    if case is CASE:
        node = Node(case, seed, num_sms=4, schedule="pct" if seed % 2 else "random")
    else:
        node = Node(case, seed, num_sms=2, schedule="pct")
    rounds = [draw(case, round_) for round_ in range(3 if case is CASE else 1)]
    try:
        out = node.run(
            rounds, [[len(e.origin) for e in expected_of(case, inputs)] for inputs in rounds], text
        )
    except emulator.HazardError:
        return HAZARD
    except emulator.EmulationError as error:
        return type(error).__name__
    if node.failures():
        return TIMEOUT
    try:
        for round_, got in enumerate(out):
            check(case, round_, got)
    except AssertionError:
        return WRONG
    return "nothing"


@pytest.mark.parametrize("case", [CASE, STREAM], ids=["rounds", "stream"])
def test_the_protocol_as_it_is(case):
    text = source()
    assert {outcome(text, seed, case) for seed in range(SEEDS // 4)} == {"nothing"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_protocol_is_noticed(name):
    old, new, expected = MUTATIONS[name]
    text = source(old, new)
    seen = []
    for seed in range(SEEDS):
        seen.append(outcome(text, seed, STREAM if name in TAILS else CASE))
        if seen[-1] != "nothing":
            break
    assert seen[-1] in expected, seen
