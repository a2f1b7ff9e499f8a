"""Litmus tests of the memory model: what relaxed accesses may show, some seed shows; what an order forbids, none does.

Threads are blocks of one lane, on SMs of their own. Results are (r0, r1, ...) as the loads saw them.
"""

import pytest
import torch
from test_sync import cuda

from dsv3_kernels import emulator

FORBIDDEN_SEEDS = range(200)
WEAK_SEEDS = range(20)
SCHEDULES = ["random", "round_robin", "pct"]

MACROS = """
#define ST(p, v) asm volatile("st.relaxed.SCOPE.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory")
#define ST_RELEASE(p, v) asm volatile("st.release.SCOPE.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory")
#define LD(p) [](const u32* q) { u32 v; asm volatile("ld.relaxed.SCOPE.global.u32 %0, [%1];" : "=r"(v) : "l"(q) : "memory"); return v; }(p)
#define LD_ACQUIRE(p) [](const u32* q) { u32 v; asm volatile("ld.acquire.SCOPE.global.u32 %0, [%1];" : "=r"(v) : "l"(q) : "memory"); return v; }(p)
#define FENCE asm volatile("fence.sc.SCOPE;" ::: "memory")
"""


def outcomes(threads, seeds, schedule="random", scope="gpu", block=1):
    """The results of a litmus test of one block a thread; x, y and the results lie in words of their own."""
    bodies = "".join(f"if (blockIdx.x == {i}) {{ {body} }}\n" for i, body in enumerate(threads))
    source = f"k(u32* m, u32* r) {{ u32 *x = m, *y = m + 64;\n{MACROS.replace('SCOPE', scope)}\n{bodies} }}"
    seen = set()
    for seed in seeds:
        memory, results = torch.zeros(128, dtype=torch.int32), torch.full((4,), -1, dtype=torch.int32)
        cuda(source, memory, results, grid=len(threads), block=block, seed=seed, schedule=schedule)
        seen.add(tuple(v for v in results.tolist() if v >= 0))
    return seen


# Message passing by a flag that the reader polls: old data (0) is weak.
MP = ["ST(x, 1); {order} {flag};", "while (({poll}) == 0) {{}} {after} r[0] = LD(x);"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "flag", ["ST(y, 1)", "atomicExch(y, 1)"]
)  # a relaxed atomic passes earlier stores
def test_message_passing_by_a_relaxed_flag_shows_old_data(schedule, flag):
    """The spin ends though nothing else moves, and some seed shows the data before it arrived."""
    threads = [MP[0].format(order="", flag=flag), MP[1].format(poll="LD_ACQUIRE(y)", after="")]
    assert outcomes(threads, WEAK_SEEDS, schedule) == {(0,), (1,)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("order", "flag", "poll", "after"),
    [
        ("", "ST_RELEASE(y, 1)", "LD_ACQUIRE(y)", ""),
        ("FENCE;", "ST(y, 1)", "LD(y)", "FENCE;"),
        ("__threadfence();", "atomicExch(y, 1)", "atomicAdd(y, 0)", "__threadfence();"),
    ],
)
def test_message_passing_with_an_order_shows_new_data(schedule, order, flag, poll, after):
    threads = [MP[0].format(order=order, flag=flag), MP[1].format(poll=poll, after=after)]
    seeds = FORBIDDEN_SEEDS if schedule == "random" else WEAK_SEEDS
    assert outcomes(threads, seeds, schedule) == {(1,)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_store_buffering(schedule):
    """Dekker: without a fence both may miss the other's store, with one never."""
    threads = ["ST(x, 1); {0} r[0] = LD(y);", "ST(y, 1); {0} r[1] = LD(x);"]
    assert (0, 0) in outcomes([t.format("") for t in threads], WEAK_SEEDS, schedule)
    seeds = FORBIDDEN_SEEDS if schedule == "random" else WEAK_SEEDS
    assert (0, 0) not in outcomes([t.format("FENCE;") for t in threads], seeds, schedule)


def test_store_buffering_by_release_and_acquire_is_allowed():
    threads = ["ST_RELEASE(x, 1); r[0] = LD_ACQUIRE(y);", "ST_RELEASE(y, 1); r[1] = LD_ACQUIRE(x);"]
    assert (0, 0) in outcomes(threads, WEAK_SEEDS)


# Independent reads of independent writes: each reader shares a block, and so an SM, with one writer.
IRIW = [
    "if (threadIdx.x == 0) {{ ST({mine}, 1); }}"
    "if (threadIdx.x == 32) {{ r[{at}] = LD({mine}); {fence} r[{at} + 1] = LD({other}); }}"
] * 2


def iriw(fence):
    places = [dict(mine="x", other="y", at=0), dict(mine="y", other="x", at=2)]  # noqa: C408
    return [body.format(fence=fence, **place) for body, place in zip(IRIW, places, strict=True)]


def test_independent_reads_of_independent_writes():
    """Readers may disagree on the order of two stores; with fences between their loads they never do."""
    assert (1, 0, 1, 0) in outcomes(iriw(""), range(100), block=64)
    assert (1, 0, 1, 0) not in outcomes(iriw("FENCE;"), FORBIDDEN_SEEDS, block=64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_location_never_goes_back(schedule):
    """Coherence: two writers, two readers; each value is followed by none that came before it."""
    read = "u32 a = LD(x), b = LD(x), c = LD(x); r[{at}] = a << 16 | b << 8 | c;"
    threads = [
        "ST(x, 1); ST(x, 2); ST(x, 3);",
        "ST(x, 11); u32 own = LD(x); ST(x, 12); if (own < 11 && own > 3) asm volatile(\"trap;\");",
        read.format(at=0),
        read.format(at=1),
    ]
    orders = set()
    for first, second in outcomes(threads, FORBIDDEN_SEEDS, schedule):
        for word in (first, second):
            values = [word >> 16, word >> 8 & 255, word & 255]
            orders.add(tuple(values))
            for writer in ([0, 1, 2, 3], [0, 11, 12]):
                own = [v for v in values if v in writer]
                assert own == sorted(own), f"read {values} of a location written {writer}"
    assert len(orders) > 3


def test_what_a_releasing_thread_has_seen_goes_along():
    """Cumulativity: a block's other warp stores, its neighbour reads that and releases a flag."""
    threads = [
        "if (threadIdx.x == 0) ST(x, 1); if (threadIdx.x == 32) { while (LD(x) == 0) {} ST_RELEASE(y, 1); }",
        "if (threadIdx.x == 0) { while (LD_ACQUIRE(y) == 0) {} r[0] = LD(x); }",
    ]
    assert outcomes(threads, FORBIDDEN_SEEDS, block=64) == {(1,)}
    unordered = [threads[0].replace("while (LD(x) == 0) {}", ""), threads[1]]
    assert outcomes(unordered, WEAK_SEEDS, block=64) == {(0,), (1,)}


def test_a_block_sees_its_own_stores_at_once():
    body = "ST(x, 1); ST(x, 2); r[0] = LD(x); r[1] = atomicAdd(x, 1); r[2] = LD(x);"
    assert outcomes([body], WEAK_SEEDS) == {(2, 2, 3)}


def test_a_store_ends_with_its_kernel():
    gpu = emulator.VirtualGPU(num_sms=4)
    memory, results = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    store = 'k(u32* m, u32* r) { asm volatile("st.relaxed.gpu.u32 [%0], 7;" :: "l"(m)); }'
    for _ in range(3):
        memory.zero_()
        cuda(store, memory, results, block=1, gpu=gpu)
        cuda("k(u32* m, u32* r) { r[0] = m[0]; }", memory, results, block=1, gpu=gpu)
        assert results.item() == 7


@pytest.mark.parametrize(("scope", "weak"), [("gpu", True), ("sys", False)])
def test_a_release_reaches_other_ranks_by_its_scope(scope, weak):
    """Flag and data of .sys scope, ordered by a fence of `scope`: only .sys forbids another rank the old data."""
    source = f"""k(u32* m, u32* r, int rank) {{ u32 *x = m, *y = m + 64;\n{MACROS.replace("SCOPE", "sys")}
    if (rank == 0) {{ ST(x, 1); asm volatile("fence.acq_rel.{scope};" ::: "memory"); ST(y, 1); }}
    else {{ while (LD(y) == 0) {{}} asm volatile("fence.acq_rel.sys;" ::: "memory"); r[0] = LD(x); }} }}"""
    seen = {across_ranks(source, seed) for seed in (WEAK_SEEDS if weak else FORBIDDEN_SEEDS)}
    assert seen == ({0, 1} if weak else {1})


def across_ranks(source, seed):
    from test_sync import compiled

    cluster = emulator.VirtualCluster(nodes=1, gpus_per_node=2, seed=seed)
    memory, results = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cluster.launch(
        compiled(source),
        "k",
        grid=(1, 1, 1),
        block=(1, 1, 1),
        args=[[memory, results, 0], [memory, results, 1]],
    )
    return results.item()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_flag_that_nobody_sets_is_still_a_deadlock(schedule):
    with pytest.raises(emulator.DeadlockError):
        outcomes(["ST(x, 1); while (LD(y) == 0) {}", "while (LD(x) == 0) {} while (LD(y) == 0) {}"], [0], schedule)
