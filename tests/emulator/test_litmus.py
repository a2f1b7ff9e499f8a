"""Litmus tests of the memory model: what weak orders may show, some seed shows; what an order forbids, none does.

A thread of a test is a block of one thread, on an SM of its own, unless it says otherwise. Outcomes are tuples
of what the loads saw, in the order of the words of `r`. Names are the literature's: MP message passing, SB store
buffering, IRIW independent reads of independent writes, WRC write-to-read causality, ISA2 a chain of two flags.
"""

import itertools

import pytest
import torch
from test_sync import compiled, cuda

from dsv3_kernels import emulator

NEVER = range(200)
SOMETIMES = range(20)
SCHEDULES = ["random", "round_robin", "pct"]
WEAK_SCHEDULES = ["random", "pct"]  # round_robin is one fixed order, which need not show anything

MACROS = """
#define ORDER(text) asm volatile(text ";" ::: "memory")
#define STORE(order, p, v) asm volatile("st." order ".global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory")
#define LOAD(order, v, p) asm volatile("ld." order ".global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory")
#define ST(p, v) STORE("relaxed.SCOPE", p, v)
#define REL(p, v) STORE("release.SCOPE", p, v)
#define LD(v, p) LOAD("relaxed.SCOPE", v, p)
#define ACQ(v, p) LOAD("acquire.SCOPE", v, p)
#define AWAIT(load, p) do { u32 seen; do { load(seen, p); } while (seen == 0); } while (0)
#define ACQ_REL ORDER("fence.acq_rel.SCOPE")
#define SC ORDER("fence.sc.SCOPE")
"""


def source_of(threads, scope="gpu", who="blockIdx.x"):
    """x, y and z lie in words far apart; r holds the results."""
    bodies = "".join(f"if ({who} == {i}) {{ {body} }}\n" for i, body in enumerate(threads))
    variables = "u32 *x = m, *y = m + 64, *z = m + 128; u32 a = 0, b = 0, c = 0;"
    return f"k(u32* m, u32* r) {{ {variables}\n{MACROS.replace('SCOPE', scope)}\n{bodies} }}"


def outcomes(threads, seeds, schedule="random", scope="gpu", block=1, **options):
    source, seen = source_of(threads, scope), set()
    for seed in seeds:
        memory, results = torch.zeros(192, dtype=torch.int32), torch.full((8,), -1, dtype=torch.int32)
        cuda(
            source,
            memory,
            results,
            grid=len(threads),
            block=block,
            seed=seed,
            schedule=schedule,
            **options,
        )
        seen.add(tuple(v for v in results.tolist() if v >= 0))
    return seen


def often(schedule):
    """The seeds that must not show what is forbidden, and those that must show what is allowed."""
    return (NEVER, SOMETIMES) if schedule == "random" else (range(40), range(60))


def message_passing(before, write, read, after):
    return [f"ST(x, 1); {before}; {write};", f"{read}; {after}; LD(a, x); r[0] = a;"]


ADD_ZERO = "while (atomicAdd(y, 0) == 0) {}"


@pytest.mark.parametrize("schedule", WEAK_SCHEDULES)
@pytest.mark.parametrize(
    ("before", "write", "read", "after"),
    [
        ("", "ST(y, 1)", "AWAIT(LD, y)", ""),
        ("", "ST(y, 1)", "AWAIT(ACQ, y)", ""),
        ("", "ST(y, 1)", "AWAIT(LD, y)", "ACQ_REL"),
        ("", "REL(y, 1)", "AWAIT(LD, y)", ""),
        ("ACQ_REL", "ST(y, 1)", "AWAIT(LD, y)", ""),
        ("", "atomicExch(y, 1)", "AWAIT(ACQ, y)", ""),  # a relaxed atomic passes earlier stores
        ('ORDER("fence.acq_rel.cta")', "ST(y, 1)", "AWAIT(ACQ, y)", ""),
        ("ACQ_REL", "ST(y, 1)", "AWAIT(LD, y)", 'ORDER("fence.acq_rel.cta")'),
    ],
)
def test_mp_without_both_orders_shows_old_data(schedule, before, write, read, after):
    """And the spin ends, though nothing moves any more but the late store of the flag."""
    _, seeds = often(schedule)
    assert outcomes(message_passing(before, write, read, after), seeds, schedule) == {(0,), (1,)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("before", "write", "read", "after"),
    [
        ("", "REL(y, 1)", "AWAIT(ACQ, y)", ""),
        ("ACQ_REL", "ST(y, 1)", "AWAIT(LD, y)", "ACQ_REL"),
        ("SC", "ST(y, 1)", "AWAIT(LD, y)", "SC"),
        ("", "REL(y, 1)", "AWAIT(LD, y)", "ACQ_REL"),
        ("ACQ_REL", "ST(y, 1)", "AWAIT(ACQ, y)", ""),
        ("__threadfence()", "atomicExch(y, 1)", ADD_ZERO, "__threadfence()"),
        ("ACQ_REL", "atomicExch(y, 1)", ADD_ZERO, "ACQ_REL"),
    ],
)
def test_mp_with_both_orders_shows_new_data(schedule, before, write, read, after):
    seeds, _ = often(schedule)
    assert outcomes(message_passing(before, write, read, after), seeds, schedule) == {(1,)}


def test_mp_without_checks():
    """The same where no clocks are kept: a release carries all that its block sees."""
    weak = outcomes(message_passing("", "ST(y, 1)", "AWAIT(ACQ, y)", ""), SOMETIMES, checks=False)
    assert weak == {(0,), (1,)}
    for order in (("", "REL(y, 1)", "AWAIT(ACQ, y)", ""), ("ACQ_REL", "ST(y, 1)", "AWAIT(LD, y)", "ACQ_REL")):
        assert outcomes(message_passing(*order), NEVER, checks=False) == {(1,)}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (("", "ST(y, 1)", "AWAIT(LD, y)", ""), {0, 1}),
        (("", "REL(y, 1)", "AWAIT(ACQ, y)", ""), {1}),
        (("ACQ_REL", "ST(y, 1)", "AWAIT(LD, y)", "ACQ_REL"), {1}),
    ],
)
def test_mp_in_every_interleaving(order, expected):
    source, seen = source_of(message_passing(*order)), set()

    def run(gpu):
        memory, results = torch.zeros(192, dtype=torch.int32), torch.full((8,), -1, dtype=torch.int32)
        cuda(source, memory, results, grid=2, block=1, gpu=gpu)
        seen.add(results[0].item())

    assert emulator.explore(run, num_sms=2) > 10
    assert seen == expected


@pytest.mark.parametrize("schedule", WEAK_SCHEDULES)
@pytest.mark.parametrize(
    ("store", "load", "between", "allowed"),
    [
        ("ST", "LD", "", True),
        ("REL", "ACQ", "", True),
        ("ST", "LD", "ACQ_REL;", True),
        ("ST", "LD", "SC;", False),
        ("REL", "ACQ", "__threadfence();", False),
        ("ST", "LD", 'ORDER("fence.sc.cta");', True),
    ],
)
def test_sb(schedule, store, load, between, allowed):
    """Dekker: only fence.sc keeps both from missing the other's store."""
    threads = [
        f"{store}({mine}, 1); {between} {load}(a, {other}); r[{i}] = a;"
        for i, (mine, other) in enumerate(["xy", "yx"])
    ]
    never, sometimes = often(schedule)
    assert ((0, 0) in outcomes(threads, sometimes if allowed else never, schedule)) == allowed


@pytest.mark.parametrize(
    ("load", "fence", "allowed"), [("LD", "", True), ("ACQ", "", True), ("LD", "SC;", False)]
)
def test_iriw(load, fence, allowed):
    """Readers that share an SM with one writer each may disagree on the order of the stores."""
    threads = [
        f"if (threadIdx.x == 0) {{ ST({mine}, 1); }}"
        f"if (threadIdx.x == 32) {{ {load}(a, {mine}); {fence} {load}(b, {other}); r[{at}] = a; r[{at} + 1] = b; }}"
        for mine, other, at in (("x", "y", 0), ("y", "x", 2))
    ]
    assert ((1, 0, 1, 0) in outcomes(threads, range(100) if allowed else NEVER, block=64)) == allowed


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_location_never_goes_back(schedule):
    """CoRR, CoWR, CoRW: two writers, two readers; no value is followed by one that came before it."""
    read = "LD(a, x); LD(b, x); LD(c, x); r[{0}] = a << 16 | b << 8 | c;"
    threads = [
        "ST(x, 1); LD(a, x); ST(x, 2); LD(b, x); ST(x, 3); LD(c, x); r[0] = a << 16 | b << 8 | c;",
        "LD(a, x); ST(x, 11); LD(b, x); ST(x, 12); LD(c, x); r[1] = a << 16 | b << 8 | c;",
        read.format(2),
        read.format(3),
    ]
    kinds = set()
    for words in outcomes(threads, NEVER, schedule):
        lists = [[word >> 16, word >> 8 & 255, word & 255] for word in words]
        kinds |= {tuple(values) for values in lists}
        # What all readers saw must fit one order of the stores, in which each writer's are in program order.
        follows = {(1, 2), (2, 3), (11, 12), *((0, v) for v in (1, 2, 3, 11, 12))}
        lists[0] = [1, lists[0][0], 2, lists[0][1], 3, lists[0][2]]
        lists[1] = [lists[1][0], 11, lists[1][1], 12, lists[1][2]]
        follows |= {(v, w) for values in lists for v, w in itertools.pairwise(values) if v != w}
        order = {v: {w for u, w in follows if u == v} for v in (0, 1, 2, 3, 11, 12)}
        for _ in order:
            order = {v: after.union(*(order[w] for w in after)) for v, after in order.items()}
        assert not any(v in after for v, after in order.items()), f"no order of stores explains {lists}"
    assert len(kinds) > 10


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("scope", ["gpu", "sys"])
def test_wrc(schedule, together, scope):
    """A thread that has seen a store and then releases takes the store along, whosever it is."""
    store, forward = "ST(x, 1);", "AWAIT(LD, x); {0}"
    end = "AWAIT(ACQ, y); LD(a, x); r[0] = a;"
    release = "REL(y, 1);"
    for last in (release, "ACQ_REL; ST(y, 1);", 'ORDER("fence.acq_rel.sys"); atomicExch(y, 1);'):
        threads = [store, forward.format(last), end]
        if together:  # the second thread sees the store before any other block can
            first = f"if (threadIdx.x == 0) {{ {store} }} if (threadIdx.x == 32) {{ {threads[1]} }}"
            threads = [first, f"if (threadIdx.x == 0) {{ {end} }}"]
        seeds, _ = often(schedule)
        found = outcomes(threads, seeds, schedule, scope, block=64 if together else 1)
        assert found == {(1,)}, last


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("meet", ["__syncthreads();", 'ORDER("bar.sync 1, 64");'])
def test_a_barrier_hands_stores_on(schedule, meet):
    first = f"if (threadIdx.x == 0) {{ ST(x, 1); }} {meet} if (threadIdx.x == 32) {{ REL(y, 1); }}"
    end = "if (threadIdx.x == 0) { AWAIT(ACQ, y); LD(a, x); r[0] = a; }"
    assert outcomes([first, end], often(schedule)[0], schedule, block=64) == {(1,)}


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(("arrive", "weak"), [("release", False), ("relaxed", True)])
def test_a_cluster_barrier_hands_stores_on(checks, arrive, weak):
    meet = f'ORDER("barrier.cluster.arrive.{arrive}.aligned"); ptx::cluster_wait();'
    threads = [f"ST(x, 1); {meet}", f"{meet} LD(a, x); r[0] = a;"]
    seen = outcomes(threads, SOMETIMES if weak else NEVER, cluster=2, checks=checks)
    assert seen == ({(0,), (1,)} if weak else {(1,)})


def test_who_has_not_seen_a_store_does_not_take_it_along():
    threads = [
        "if (threadIdx.x == 0) { ST(x, 1); } if (threadIdx.x == 32) { REL(y, 1); }",
        "if (threadIdx.x == 0) { AWAIT(ACQ, y); LD(a, x); r[0] = a; }",
    ]
    assert outcomes(threads, SOMETIMES, block=64) == {(0,), (1,)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pass_on", ["AWAIT(ACQ, y); REL(z, 1);", "AWAIT(LD, y); ACQ_REL; ST(z, 1);"])
def test_isa2(schedule, pass_on):
    threads = ["ST(x, 1); REL(y, 1);", pass_on, "AWAIT(ACQ, z); LD(a, x); r[0] = a;"]
    never, sometimes = often(schedule)
    assert outcomes(threads, never, schedule) == {(1,)}
    broken = [threads[0], "AWAIT(LD, y); ST(z, 1);", threads[2]]
    assert schedule == "round_robin" or outcomes(broken, sometimes, schedule) == {(0,), (1,)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_read_modify_writes_act_on_the_newest_value(schedule):
    threads = ["ST(x, 100); atomicAdd(x, 1); atomicExch(y, 1);"] + ["atomicAdd(x, 1);"] * 2
    threads[1] += f"{ADD_ZERO} r[0] = atomicAdd(x, 0);"
    seeds, _ = often(schedule)
    assert outcomes(threads, seeds, schedule) <= {(101,), (102,), (103,)}


def test_a_block_sees_its_own_stores_at_once():
    body = "ST(x, 1); ST(x, 2); LD(a, x); r[0] = a; r[1] = atomicAdd(x, 1); LD(a, x); r[2] = a;"
    assert outcomes([body], SOMETIMES) == {(2, 2, 3)}


def test_bytes_of_a_word_are_late_one_by_one():
    """A byte that is on its way takes no neighbour back."""
    byte = 'asm volatile("{0}.global.u8 [%0], %1;" :: "l"((char*)x + {1}), "r"({2}) : "memory");'
    load = 'asm volatile("ld.relaxed.gpu.global.u8 %0, [%1];" : "=r"({0}) : "l"((char*)x + {1}) : "memory");'
    threads = [
        byte.format("st.relaxed.gpu", 0, 1),
        byte.format("st.relaxed.gpu", 1, 2) + "REL(y, 1);",
        f"AWAIT(ACQ, y); {load.format('a', 1)} {load.format('b', 0)} r[0] = a; r[1] = b;",
    ]
    assert outcomes(threads, NEVER) == {(2, 0), (2, 1)}


def test_a_vector_is_stored_element_by_element():
    store = 'asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {1, 1};" :: "l"(x) : "memory");'
    load = (
        'asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(x) : "memory");'
    )
    threads = [store, f"do {{ {load} }} while (a + b == 0); r[0] = a; r[1] = b;"]
    assert outcomes(threads, range(60)) == {(0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_stores_on_their_way(schedule):
    body = "for (u32 i = 0; i < 3000; i++) { ST(m + (i * 7 + 3 * blockIdx.x) % 192, i); } REL(x, 9);"
    threads = [body, body, "AWAIT(ACQ, x);"]
    memory, results = torch.zeros(192, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    cuda(source_of(threads), memory, results, grid=3, block=1, schedule=schedule)
    last = {i * 7 % 192: i for i in range(3000)}, {(i * 7 + 3) % 192: i for i in range(3000)}
    for at, value in enumerate(memory.tolist()):
        assert value in ((9,) if at == 0 else (last[0][at], last[1][at]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_stores_than_may_be_on_their_way(schedule):
    body = "for (u32 i = 0; i < 60; i++) ST(m + blockIdx.x * 32 + threadIdx.x, i);"
    watch = "do { LD(a, m + threadIdx.x); LD(b, m + 32 + threadIdx.x); } while (a + b != 118);"
    memory, results = torch.zeros(192, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    cuda(source_of([body, body, watch]), memory, results, grid=3, block=32, schedule=schedule)
    assert memory[:64].tolist() == [59] * 64


def test_a_store_has_arrived_when_its_kernel_ends():
    gpu = emulator.VirtualGPU(num_sms=4)
    memory, results = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    store = 'k(u32* m, u32* r) { asm volatile("st.relaxed.gpu.u32 [%0], 7;" :: "l"(m)); }'
    load = 'k(u32* m, u32* r) { asm volatile("{ .reg .u32 a; ld.relaxed.gpu.u32 a, [%0]; st.u32 [%1], a; }" :: "l"(m), "l"(r)); }'
    for _ in range(3):
        memory.zero_()
        cuda(store, memory, results, block=1, gpu=gpu)
        cuda(load, memory, results, block=1, gpu=gpu)
        assert results.item() == 7


def test_a_release_of_block_scope_is_a_race_between_blocks():
    threads = message_passing("", 'STORE("release.cta", y, 1)', "AWAIT(ACQ, y)", "")
    with pytest.raises(emulator.HazardError, match="data race"):
        outcomes(threads, SOMETIMES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_flag_that_nobody_sets_is_still_a_deadlock(schedule):
    with pytest.raises(emulator.DeadlockError, match="another value than 0"):
        outcomes(["ST(x, 1); AWAIT(LD, y);", "AWAIT(LD, x); AWAIT(LD, y);"], [0], schedule)


def across_ranks(threads, seeds, ranks=2, grid=1):
    """One block a thread: `grid` threads on each rank."""
    who = f"(rank * {grid} + blockIdx.x)"
    source = source_of(threads, "sys", who).replace("u32* r)", "u32* r, u32 rank)")
    seen = set()
    for seed in seeds:
        cluster = emulator.VirtualCluster(nodes=1, gpus_per_node=ranks, seed=seed)
        memory, results = torch.zeros(192, dtype=torch.int32), torch.full((8,), -1, dtype=torch.int32)
        arguments = [[memory, results, rank] for rank in range(ranks)]
        cluster.launch(compiled(source), "k", grid=(grid, 1, 1), block=(1, 1, 1), args=arguments)
        seen.add(tuple(v for v in results.tolist() if v >= 0))
    return seen


@pytest.mark.parametrize(("scope", "weak"), [("gpu", True), ("sys", False)])
def test_mp_across_ranks_needs_system_scope(scope, weak):
    fence = f'ORDER("fence.acq_rel.{scope}")'
    threads = message_passing(fence, "ST(y, 1)", "AWAIT(LD, y)", fence)
    assert across_ranks(threads, SOMETIMES if weak else NEVER) == ({(0,), (1,)} if weak else {(1,)})


def test_wrc_across_ranks():
    """Another block of the writer's device sees the store first; what it releases then takes it to the other rank."""
    threads = ["ST(x, 1);", "AWAIT(LD, x); REL(y, 1);", "AWAIT(ACQ, y); LD(a, x); r[0] = a;", ""]
    assert across_ranks(threads, NEVER, grid=2) == {(1,)}
    late = ["ST(x, 1);", "AWAIT(LD, x); ST(y, 1);", "AWAIT(ACQ, y); LD(a, x); r[0] = a;", ""]
    assert across_ranks(late, range(60), grid=2) == {(0,), (1,)}


def test_iriw_across_ranks():
    threads = [
        "ST(x, 1);",
        "AWAIT(LD, x); {0} LD(a, y); r[0] = a;",
        "ST(y, 1);",
        "AWAIT(LD, y); {0} LD(a, x); r[1] = a;",
    ]
    assert (0, 0) in across_ranks([t.format("") for t in threads], range(60), grid=2)
    assert (0, 0) not in across_ranks([t.format("SC;") for t in threads], NEVER, grid=2)
