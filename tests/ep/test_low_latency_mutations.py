"""Low latency's kernel with one line of the protocol broken at a time: the emulator must say so."""

import functools

import mutate
import pytest
from cases import Case, draw
from low_latency_runs import Form, check, check_dispatch
from test_low_latency import run, run_ahead

from dsv3_kernels import emulator, ep, jit
from dsv3_kernels.ep import Topology, low_latency_kernels
from dsv3_kernels.jit.kernel import Ptx

SEEDS = 30
HAZARD, TIMEOUT, WRONG = "hazard", "timeout", "wrong result"

# name: (what to replace, by what, what some schedule must give)
MUTATIONS = {
    "a flag is set before the rows": (
        "ptx::fetch_add_device(routing.sent_rows + expert, 1) + 1 == plan.total[expert]",
        "ptx::fetch_add_device(routing.sent_rows + expert, 1) + 1 == 1",
        {HAZARD, WRONG},
    ),
    "a flag goes before the last row": (
        "for (u32 token = first; token < last; ++token) {",
        "for (u32 e = threadIdx.x; e < call.experts() && first < last; e += blockDim.x)\n"
        "        if (plan.total[e] > 0) announce(call, plan, e);\n"
        "    for (u32 token = first; token < last; ++token) {",
        {HAZARD, WRONG},
    ),
    "a flag goes by another queue pair than its rows": (
        "peer, queue_pair(stream));\n            return;",
        "peer, queue_pair(stream + 1));\n            return;",
        {HAZARD, WRONG},
    ),
    "a flag does not release": ("st.release.sys.global.u64", "st.relaxed.sys.global.u64", {HAZARD}),
    "a wait does not acquire": ("ld.acquire.sys.global.u64", "ld.relaxed.sys.global.u64", {HAZARD}),
    "the end of other blocks' rows is not acquired": (
        "atom.acq_rel.gpu.global.add.u64",
        "atom.relaxed.gpu.global.add.u64",
        {HAZARD},
    ),
    "slots are written before they were read": (
        "if (call.epoch > 2) {",
        "if (call.epoch > 2000) {",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "slots are written one epoch too early": (
        "call.epoch - 2, Role::kSend, peer, 0) >= call.epoch - 2",
        "call.epoch - 3, Role::kSend, peer, 0) >= call.epoch - 3",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "one parity for all": (
        "this->area.parity = epoch % 2;",
        "this->area.parity = 0;",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "the first block to end acknowledges": (
        "&call.progress->ended_receivers, 1) + 1 == call.block.count",
        "&call.progress->ended_receivers, 1) == 0",
        {HAZARD, WRONG, TIMEOUT},
    ),
    "the credit is lost": (
        "call.peers.set(call.area.ack(call.peers.rank), call.epoch, peer, peer);",
        ";",
        {TIMEOUT},
    ),
    "the count is lost": (
        "plan.first[expert] << 16 | plan.total[expert]",
        "plan.first[expert] << 16",
        {WRONG, TIMEOUT},
    ),
    "empty experts are not announced": ("if (plan.total[e] == 0) announce(call, plan, e);", ";", {TIMEOUT}),
    "rows of lower sources are not waited for": (
        "if (peer > source) continue;",
        "if (peer != source) continue;",
        {HAZARD, WRONG},
    ),
    "lanes do not see what others acquired": (
        "        __syncwarp();\n        if (!__all_sync(kFullWarp, kept)) return false;",
        "        if (!__all_sync(kFullWarp, kept)) return false;",
        {HAZARD},
        2,
    ),
    "targets are aimed while others still read them": (
        "const u32 turn = token % 2;",
        "const u32 turn = 0;",
        {HAZARD, WRONG},
    ),
    "a token leaves before it is staged": (
        "targets);\n        __syncthreads();\n        for (u32 k = warp",
        "targets);\n        for (u32 k = warp",
        {HAZARD},
    ),
    "combine's flag does not wait for its group": (
        "ptx::named_barrier_sync(1 + group, 32 * kWarpsOfGroup);",
        ";",
        {HAZARD, WRONG},
    ),
    "combine stages all rows at one place": (
        "static_cast<u64>(home) * call.places() + place + i",
        "static_cast<u64>(home) * call.places()",
        {HAZARD, WRONG},
    ),
    "combine reads before the flag": (
        "if (expert >= 0)\n                kept =",
        "if (expert >= 1)\n                kept =",
        {HAZARD, WRONG},
    ),
}

# Else other waits of the ops imply these.
AHEAD = ["slots are written before they were read", "slots are written one epoch too early"]
CASE = Case(Topology(2, 2), local_experts=2, hidden=144, num_topk=3, tokens=6, seed=1)
FORMS = [Form(), Form(fp8=False, hook=True), Form(hook=True), Form(num_sms=3)]


@functools.cache
def source(old="", new="", places=1):
    return mutate.source("low_latency.cuh", old, new, places=places)


def outcome(monkeypatch, text, seed, ahead=False):
    mutated = jit.compile_ptx(
        text.replace("__global__ void", 'extern "C" __global__ void'), defines={"DSV3_NVSHMEM_DECLARED": 1}
    )

    class Mutant:
        def ptx(self, lineinfo=False):
            return Ptx(mutated, "low_latency_step", ())

    monkeypatch.setattr(low_latency_kernels, "kernel", lambda nodes, emulated: Mutant())
    rounds = [draw(CASE, round_) for round_ in range(len(FORMS))]
    schedule = "pct" if seed % 2 else "random"
    try:
        if ahead:
            by_rank = run_ahead(CASE, rounds, FORMS[0], seed, schedule=schedule)
        else:
            _, by_rank = run(CASE, rounds, FORMS, seed, schedule=schedule)
        for i, (inputs, form) in enumerate(zip(rounds, FORMS, strict=True)):
            got = [of_rank[i] for of_rank in by_rank]
            if ahead:
                check_dispatch(CASE, inputs, FORMS[0], got)
            else:
                check(CASE, inputs, i, form, got)
    except emulator.HazardError:
        return HAZARD
    except ep.TimeoutError:
        return TIMEOUT
    except emulator.EmulationError as error:
        return type(error).__name__
    except AssertionError:
        return WRONG
    return "nothing"


def test_the_protocol_as_it_is(monkeypatch):
    outcomes = {outcome(monkeypatch, source(), seed, ahead) for seed in range(2) for ahead in (False, True)}
    assert outcomes == {"nothing"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_protocol_is_noticed(monkeypatch, name):
    old, new, expected, *places = MUTATIONS[name]
    text = source(old, new, *places)
    seen = []
    for seed in range(SEEDS):
        seen.append(outcome(monkeypatch, text, seed, name in AHEAD))
        if seen[-1] != "nothing":
            break
    assert seen[-1] in expected, seen
