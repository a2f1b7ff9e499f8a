"""The all-to-all's kernels with one line of the protocol broken at a time: the emulator must say so."""

import functools
import re
from dataclasses import replace

import mutate
import pytest
from cases import Case, draw
from virtual_node import ONCE, Node, check, rows_of

from dsv3_kernels import emulator
from dsv3_kernels.ep import Topology, kernels

SEEDS = 40
HAZARD, TIMEOUT, WRONG = "hazard", "timeout", "wrong result"

# name: (what to replace, by what, what some schedule of 40 must give)
MUTATIONS = {
    "a tail announces a token that is not written yet": (
        "publish(tail, epoch << 32 | (sent - kChunk));",
        "publish(tail, epoch << 32 | (sent + 1));",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "a tail does not release": ("st.release.sys.global.u64", "st.relaxed.sys.global.u64", {HAZARD}),
    "a wait does not acquire": ("ld.acquire.sys.global.u64", "ld.relaxed.sys.global.u64", {HAZARD}),
    "the tail is released while other lanes still write": (
        "__syncwarp();\n    if (threadIdx.x % 32 == 0) ptx::store_release_system(tail, value);",
        "if (threadIdx.x % 32 == 0) ptx::store_release_system(tail, value);",
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
        "if (lane < call.to.channels)\n        kept",
        "if (lane == channel)\n        kept",
        {HAZARD, WRONG},
    ),
    "rows of one channel are those of another": (
        "if (begin + i == channel) next[",
        "if (begin + i == 0) next[",
        {HAZARD, WRONG},
    ),
    "slots of a token are read before its tail": (
        "const u64 expected = epoch << 32 | (loading + 1);",
        "const u64 expected = epoch << 32 | loading;",
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
        "const u64 expected = epoch << 32 | (slot - share.first + 1);",
        "const u64 expected = 0;",
        {HAZARD, WRONG},
    ),
    "combine's lanes do not see what others acquired": (
        "return false;\n        __syncwarp();",
        "return false;",
        {HAZARD},
    ),
}

MUTATIONS |= {
    "a tail announces stores that have only read": (
        "bulk::stores_done();\n    if (sent)",
        "bulk::stores_read();\n    if (sent)",
        {HAZARD, WRONG},
    ),
    "a tail announces stores that nobody waits for": ("bulk::stores_done<kChunk>();", "", {HAZARD, WRONG}),
    "a stage is sent before the lanes' part is there": (
        "bulk::lanes_done();\n                bulk::store",
        "bulk::store",
        {HAZARD},
    ),
    "a stage to send is loaded before it was read": (
        "bulk::stores_read();\n                    ring.load(row",
        "ring.load(row",
        {HAZARD},
    ),
    "a stage that came is loaded before it was read": (
        "bulk::stores_read();\n                ring.load(mine",
        "ring.load(mine",
        {HAZARD},
    ),
    "blocks end while their stages are read": (
        "bulk::stores_read();\n    if (!__syncthreads_or",
        "if (!__syncthreads_or",
        {HAZARD},
    ),
    "combine loads a slot without a fence behind its tail": (
        "__syncwarp();\n        bulk::acquired();",
        "__syncwarp();",
        {HAZARD},
    ),
}

MUTATIONS |= {
    "a handle's tokens keep one of their rows": (
        "if (kAgain && lane < topk) row = rows",
        "if (kAgain && lane < 1) row = rows",
        {WRONG},
    ),
    "a handle's tokens are sent from the start": (
        "kAgain ? range[1] : said->tokens",
        "said->tokens + kAgain",
        {TIMEOUT, HAZARD, WRONG},
    ),
    "a handle's channels are those of its launch": (
        "for (u32 channel = first; go && kept && channel < channels; channel += blocks / 2 * teams)",
        "for (u32 channel = first; go && kept && channel < channels; channel += channels)",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "tokens share a row": ("next[0] = taken + 1;", "next[0] = taken;", {HAZARD, WRONG}),
    "rows of tokens begin with those of a channel": (
        "if (c == channel) next[source * mine.local_experts] = running",
        "if (c == 0) next[source * mine.local_experts] = running",
        {HAZARD, WRONG},
    ),
    "tokens are announced as rows of experts": (
        "if (tokens.form & kTokenOrder) rows = total;",
        "",
        {WRONG},
    ),
    "room is refused where it is just enough": ("rows > at->limit", "rows >= at->limit", {WRONG}),
    "gradients of tokens come home by expert": (
        "call.token_order ? lane : place",
        "place",
        {WRONG},
    ),
    "weights of other ranks stay in a token's row": ("local < 0 ? 0.0f : weight", "weight", {WRONG}),
}

# Three rounds of few tokens, of the same with handles used again and in token order; and one long stream, in
# which a reader can overtake the writer.
ROUNDS = Case(Topology(1, 3), local_experts=2, hidden=32, num_topk=2, tokens=12, seed=1)
AGAIN = replace(ROUNDS, fp8=True, tokens=7, hidden=16)
TOKENS = replace(AGAIN, expert_order=False, num_topk=3)
STREAM = Case(Topology(1, 2), local_experts=2, hidden=16, num_topk=2, tokens=32, seed=1)


@pytest.fixture(autouse=True)
def one_channel_a_block(monkeypatch):
    """So that a channel has many tokens, and a stream its chunks."""
    monkeypatch.setattr(kernels, "MAX_THREADS", 1)


CALLS = {
    AGAIN: ("dispatch", "again", "combine", "again"),
    TOKENS: ("dispatch", "combine", "again"),
    STREAM: ("dispatch", "again", "combine"),
}


def case_of(name):
    if "tail announces" in name or "before its tail" in name:
        return STREAM
    # A combine in between would tell that the slots have been read.
    if "handle" in name or "reused" in name:
        return AGAIN
    return (
        TOKENS
        if re.search("tokens? (share|begin|are announced|come home)|of tokens|token's row", name)
        else ROUNDS
    )


def source(old="", new=""):
    places = 2 if "wait_warp(ack" in str(old) else 1  # in dispatch and combine alike
    text = mutate.source("dispatch.cuh combine.cuh", old, new, places=places)
    return text.replace("__global__ void", 'extern "C" __global__ void')


@functools.cache
def inputs_of(case):
    """By round, and how many rows each rank gets."""
    rounds = [draw(case, round_) for round_ in range(1 if case is STREAM else 3)]
    return rounds, [rows_of(case, inputs) for inputs in rounds]


def outcome(text, seed, case):
    sms, schedule = (2, "pct") if case is STREAM else (4, "pct" if seed % 2 else "random")
    node = Node(case, seed, num_sms=sms, schedule=schedule)
    try:
        out = node.run(*inputs_of(case), text, calls=CALLS.get(case, ONCE))
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


@pytest.mark.parametrize("case", [ROUNDS, AGAIN, TOKENS, STREAM], ids=["rounds", "again", "tokens", "stream"])
def test_the_protocol_as_it_is(case):
    text = source()
    assert {outcome(text, seed, case) for seed in range(SEEDS // 20)} == {"nothing"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_protocol_is_noticed(name):
    old, new, expected = MUTATIONS[name]
    text = source(old, new)
    seen = []
    for seed in range(SEEDS):
        seen.append(outcome(text, seed, case_of(name)))
        if seen[-1] != "nothing":
            break
    assert seen[-1] in expected, seen


# With several channels a block, each served by a team of its warps.
TEAMS = {
    "a team does not wait for its counts": (
        "team.sync();\n    for (u32 source = 0; source < self.ranks; ++source) kept",
        "for (u32 source = 0; source < self.ranks; ++source) kept",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "all teams plan in the memory of the first": (
        "number * words_of_team(self);",
        "0 * words_of_team(self);",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "all teams take the channel of the first": (
        "block / 2 * teams + number;  // channel of this team",
        "block / 2 * teams;",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "rows of one channel are those of another": MUTATIONS["rows of one channel are those of another"],
    "the first block to end acknowledges for all": MUTATIONS["the first block to end acknowledges for all"],
}


@pytest.mark.parametrize("name", [None, *TEAMS])
def test_a_broken_protocol_is_noticed_with_several_channels_a_block(monkeypatch, name):
    monkeypatch.setattr(kernels, "MAX_THREADS", 2 * 32 * ROUNDS.topology.size)
    old, new, expected = TEAMS[name] if name else ("", "", {"nothing"})
    text, seen = source(old, new), []
    for seed in range(SEEDS if name else 2):
        seen.append(outcome(text, seed, ROUNDS))
        if seen[-1] != "nothing":
            break
    assert seen[-1] in expected, seen
