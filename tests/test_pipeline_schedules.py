"""Action lists of the pipeline schedules, judged by a simulation and by rules written independently of it."""

import json
import random
import re
from collections import Counter

import pytest
import torch.distributed.pipelining.schedules as torch_schedules

from dsv3_kernels.train import show_schedule
from dsv3_kernels.train.dualpipe import dualpipe, dualpipev
from dsv3_kernels.train.pipeline.actions import Overlap, Schedule, Work, works
from dsv3_kernels.train.pipeline.link import posts
from dsv3_kernels.train.pipeline.schedules import SCHEDULES, compare, published_bubble
from dsv3_kernels.train.pipeline.simulate import Times, simulate

RANKS = [2, 4, 8, 16]
EVEN = Times(1, 2, 1)  # F = W = B / 2: where the published formulas are exact


def counts(ranks):
    """Micro-batches: the fewest, and some up to many."""
    return [2 * ranks, 2 * ranks + 2, 3 * ranks, 4 * ranks + 6, 6 * ranks]


CASES = [(name, p, m) for name in SCHEDULES for p in RANKS for m in counts(p)]
CASES += [(name, 1, m) for name in ("1f1b", "zb1p", "dualpipev") for m in (2, 3, 7)]
CASES += [("1f1b", 4, 1), ("1f1b", 4, 3), ("zb1p", 4, 1), ("zb1p", 8, 3), ("dualpipev", 3, 7), ("zb1p", 5, 9)]


def random_times(generator):
    forward, weight, inputs = (generator.uniform(0.1, 3) for _ in range(3))
    both = generator.choice([None, generator.uniform(0.1, 6)])
    return Times(forward, inputs + weight, weight, both)


def assert_order(schedule, timeline):
    """Every dependency is kept, seen from the times alone."""
    start, end = {}, {}
    for spans in timeline.ranks:
        free = 0.0
        for span in spans:
            assert span.start >= free
            free = span.end
            for work in works(span.action):
                key = work.kind.replace("I", "B"), work.stage, work.micro_batch
                assert key not in start
                start[key], end[key] = span.start, span.end
    for micro_batch in range(schedule.micro_batches):
        for stage in range(schedule.stages):
            if stage:
                assert start["F", stage, micro_batch] >= end["F", stage - 1, micro_batch]
                assert start["B", stage - 1, micro_batch] >= end["B", stage, micro_batch]
            assert start["B", stage, micro_batch] >= end["F", stage, micro_batch]
            if ("W", stage, micro_batch) in start:
                assert start["W", stage, micro_batch] >= end["B", stage, micro_batch]


@pytest.mark.parametrize(("name", "ranks", "micro_batches"), CASES)
def test_every_schedule_is_complete_and_ends(name, ranks, micro_batches):
    schedule = SCHEDULES[name](ranks, micro_batches)
    assert schedule.name == name and len(schedule.ranks) == ranks
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    done = Counter(work for _, work in schedule.all_works())
    assert max(done.values()) == 1
    for stage in range(schedule.stages):
        for i in range(micro_batches):
            of = {kind: done[Work(kind, stage, i)] for kind in "FBIW"}
            assert of["F"] == 1 and of["B"] + of["I"] == 1 and of["W"] == of["I"]
    where = {}
    for rank, (_, stage, i) in schedule.all_works():
        assert where.setdefault((stage, i), rank) == rank == schedule.places[stage, i]
    for times in (EVEN, *(random_times(generator) for _ in range(3))):
        assert_order(schedule, simulate(schedule, times))


@pytest.mark.parametrize("ranks", RANKS)
def test_dualpipe_bubbles_are_those_of_the_paper(ranks):
    for micro_batches in counts(ranks):
        timeline = simulate(dualpipe(ranks, micro_batches), EVEN)
        assert timeline.bubbles() == [(ranks // 2 - 1) * (3 + 2 - 3)] * ranks
        assert timeline.makespan == 3 * micro_batches + 2 * (ranks // 2 - 1)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_bubbles_of_every_schedule(name, ranks):
    """The published formula, exactly, where F = W = B / 2 and F&B is between B and F + B; in any unit."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    unit = random.Random(seed).uniform(0.1, 10)
    for share in (None, 2.0, random.Random(seed).uniform(2, 3)):
        times = Times(unit, 2 * unit, unit, share and share * unit)
        for micro_batches in counts(ranks):
            timeline = simulate(SCHEDULES[name](ranks, micro_batches), times)
            expected = published_bubble(name, ranks, times)
            assert max(timeline.bubbles()) == pytest.approx(expected, abs=1e-9 * timeline.makespan)


@pytest.mark.parametrize("ranks", RANKS)
def test_live_activations(ranks):
    for micro_batches in counts(ranks):
        live = simulate(dualpipe(ranks, micro_batches)).live_activations(until_weights=True)
        assert live == [ranks + 1] * ranks
        plain = simulate(SCHEDULES["1f1b"](ranks, micro_batches))
        assert plain.live_activations() == [ranks - r for r in range(ranks)]
        split = simulate(SCHEDULES["zb1p"](ranks, micro_batches))
        assert split.live_activations(until_weights=True) == [ranks] * ranks
        assert max(split.live_activations()) == ranks
        half = simulate(dualpipev(ranks, micro_batches)).live_activations(until_weights=True)
        assert half == [(2 * ranks + 1) / 2] * ranks


@pytest.mark.parametrize("ranks", RANKS)
def test_dualpipe_is_mirrored(ranks):
    micro_batches = 4 * ranks
    schedule = dualpipe(ranks, micro_batches)
    half = micro_batches // 2

    def mirrored(action):
        if isinstance(action, Overlap):
            return Overlap(*map(mirrored, action))
        return action._replace(micro_batch=(action.micro_batch + half) % micro_batches)

    for rank in range(ranks):
        assert schedule.stages_of(rank) == tuple(sorted((rank, ranks - 1 - rank)))
        assert tuple(map(mirrored, schedule.ranks[rank])) == schedule.ranks[ranks - 1 - rank]


def test_dualpipev_is_the_half_of_dualpipe():
    whole, half = dualpipe(8, 24), dualpipev(4, 12)

    def folded(action):
        if isinstance(action, Overlap):
            return Overlap(*map(folded, action))
        return action._replace(micro_batch=action.micro_batch % 12)

    assert half.ranks == tuple(tuple(map(folded, actions)) for actions in whole.ranks[:4])
    assert [half.stages_of(r) for r in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]


TORCHS = getattr(torch_schedules, "ScheduleDualPipeV", None)


@pytest.mark.skipif(
    not hasattr(TORCHS, "_calculate_single_rank_operations"),
    reason="this version of torch does not give DualPipeV's actions",
)
def test_dualpipev_is_torchs():
    """Action by action."""
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    for ranks, micro_batches in ((1, 2), (2, 4), (4, 8), (4, 13), (8, 20)):
        schedule = object.__new__(TORCHS)
        schedule._n_microbatches, schedule.pp_group_size = micro_batches, ranks
        for rank, actions in enumerate(dualpipev(ranks, micro_batches).ranks):
            found = [a for a in schedule._calculate_single_rank_operations(rank) if a is not None]
            theirs = [
                tuple(
                    (kinds[part.computation_type.name], part.stage_index, part.microbatch_index)
                    for part in (action.sub_actions or (action,))
                )
                for action in found
            ]
            assert [works(action) for action in actions] == theirs


def test_a_list_written_out():
    """Rank 0 of 8 with 20 micro-batches, the case of figure 5 of the report."""
    text = " ".join(
        "&".join(f"{w.kind}{w.micro_batch}" for w in works(action)) for action in dualpipe(8, 20).ranks[0]
    )
    assert text == (
        "F0 F1 F2 F3 F4 F5 F6 F10 I10 W10 F11 I11 W11 F12 I12 W12 F13 "
        "F7&B13 F14&B0 F8&B14 F15&B1 F9&B15 F16&B2 B16 F17&B3 B17 F18&B4 B18 F19&B5 B19 "
        "I6 W6 I7 W7 I8 W8 I9 W9"
    )


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches", "message"),
    [
        (
            "dualpipe",
            3,
            12,
            r"got 3 ranks, expected an even number.*Mend: --pp 4, or --pp-schedule dualpipev",
        ),
        ("dualpipe", 0, 12, "got 0 ranks"),
        ("dualpipe", 4, 9, "got 9 micro-batches, expected an even number.*Mend: --micro-batches 10"),
        ("dualpipe", 4, 6, r"at least 2 x 4 ranks = 8.*Mend: --micro-batches 8"),
        ("dualpipev", 4, 7, r"expected at least 2 x 4 ranks = 8. Mend: --micro-batches 8"),
        ("dualpipev", 0, 7, "got 0 ranks"),
        ("1f1b", 0, 4, "got 0 ranks"),
        ("1f1b", 4, 0, "got 0 micro-batches"),
        ("zb1p", 4, -1, "got -1 micro-batches"),
    ],
)
def test_schedules_that_do_not_exist(name, ranks, micro_batches, message):
    with pytest.raises(ValueError, match=message):
        SCHEDULES[name](ranks, micro_batches)


def test_a_schedule_that_waits_for_itself_is_found():
    good = SCHEDULES["1f1b"](2, 2)
    backward_first = (tuple(reversed(good.ranks[0])), good.ranks[1])
    with pytest.raises(ValueError, match="never ends: rank 0 before B1 stage 0; rank 1 before F0 stage 1"):
        simulate(Schedule("turned", 2, 2, backward_first))
    missing = (good.ranks[0][1:], good.ranks[1])
    with pytest.raises(ValueError, match="never ends: .*rank 1 before F0 stage 1"):
        simulate(Schedule("short", 2, 2, missing))


@pytest.mark.parametrize(
    "times", [(0, 2, 1), (1, 1, 1), (1, 2, 0), (float("nan"), 2, 1), (1, 2, 1, 0), (1, 2, 1, -3)]
)
def test_times_that_make_no_sense(times):
    with pytest.raises(ValueError, match="Times: "):
        Times(*times)


# Messages


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_messages_served_strictly_in_turn_never_deadlock(name, ranks):
    """As on a stream per rank where every send waits for its receive, and batches end together."""
    schedule = SCHEDULES[name](ranks, 3 * ranks)
    plans = [posts(schedule, rank) for rank in range(ranks)]
    sent = Counter(
        m for r, plan in enumerate(plans) for step in plan for b in step for m in b if m.source == r
    )
    got = Counter(
        m for r, plan in enumerate(plans) for step in plan for b in step for m in b if m.target == r
    )
    assert sent == got and set(sent.values()) <= {1}
    needed = {
        (stage + 1 if kind == "F" else stage - 1, kind, i)
        for kind in "FB"
        for (stage, i) in schedule.places
        if 0 <= (to := stage + (1 if kind == "F" else -1)) < schedule.stages
        and schedule.places[to, i] != schedule.places[stage, i]
    }
    assert {(m.stage + (1 if m.kind == "F" else -1), m.kind, m.micro_batch) for m in sent} == needed
    run_in_turn(schedule, plans)


def run_in_turn(schedule, plans):
    ranks = len(schedule.ranks)
    queues = [list(plan[0]) for plan in plans]  # batches that are posted and not over
    passed, arrived, done = set(), set(), set()
    position = [0] * ranks

    def ready(rank, action):
        for kind, stage, i in works(action):
            source = (stage - 1, "F") if kind == "F" else (stage + 1, "B")
            if kind == "W" or not 0 <= source[0] < schedule.stages:
                continue
            here = schedule.places[source[0], i] == rank
            if (*source, i) not in (done if here else arrived):
                return False
        return True

    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            actions = schedule.ranks[rank]
            if position[rank] < len(actions) and ready(rank, actions[position[rank]]):
                for kind, stage, i in works(actions[position[rank]]):
                    done.add((stage, "F" if kind == "F" else "B", i))
                position[rank] += 1
                queues[rank] += plans[rank][position[rank]]
                moved = True
        heads = [set(queue[0]) if queue else set() for queue in queues]
        passed |= {m for head in heads for m in head if m in heads[m.source] and m in heads[m.target]}
        for rank in range(ranks):
            if heads[rank] and heads[rank] <= passed:
                arrived |= {(m.stage, m.kind, m.micro_batch) for m in queues[rank].pop(0) if m.target == rank}
                moved = True
    assert position == [len(actions) for actions in schedule.ranks]
    assert not any(queues)


# The command


def test_the_comparison_table(capsys):
    rows = {row.name: row for row in compare(8, 20, EVEN)}
    assert {n: (r.makespan, r.bubble, r.parameters, r.activations) for n, r in rows.items()} == {
        "1f1b": (81, 21, 1, 8),
        "zb1p": (67, 7, 1, 8),
        "dualpipe": (66, 6, 2, 9),
        "dualpipev": (67, 7, 1, 8.5),
    }
    assert [row.name for row in compare(3, 4, EVEN)] == ["1f1b", "zb1p"]
    assert show_schedule.main(["--pp", "8", "--micro-batches", "20"]) == 0
    shown = capsys.readouterr().out
    assert "dualpipe" in shown and "9.1%" in shown


@pytest.mark.parametrize("name", SCHEDULES)
def test_picture_and_trace(name, tmp_path, capsys):
    picture, trace = tmp_path / "schedule.png", tmp_path / "trace.json"
    arguments = ["--pp", "2", "--micro-batches", "6", "--schedule", name, "--fb", "2.5"]
    assert show_schedule.main([*arguments, "--out", str(picture), "--trace", str(trace)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(events) == sum(map(len, SCHEDULES[name](2, 6).ranks))
    assert {e["pid"] for e in events} == {0, 1}
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(
        1e6 * simulate(SCHEDULES[name](2, 6), Times(overlapped=2.5)).makespan
    )


def test_bad_commands(capsys, tmp_path):
    for arguments, message in [
        (["--pp", "3"], "show_schedule: dualpipe: got 3 ranks"),
        (["--w", "3"], "show_schedule: Times: "),
        (["--out", str(tmp_path / "missing" / "x.png")], "show_schedule: .*No such file"),
    ]:
        assert show_schedule.main(arguments) == 1
        assert re.search(message, capsys.readouterr().err)
