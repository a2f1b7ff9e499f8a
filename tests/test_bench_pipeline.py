"""What bench_pipeline counts and what it concludes."""

import pytest

from bench.bench_pipeline import messages_from, share_beside, verdict
from dsv3_kernels.train.pipeline.actions import Overlap
from dsv3_kernels.train.pipeline.schedules import SCHEDULES


@pytest.mark.parametrize(("name", "stages"), [("1f1b", 4), ("zb1p", 4), ("dualpipe", 4), ("dualpipev", 8)])
def test_every_state_and_every_gradient_is_sent_once(name, stages):
    schedule = SCHEDULES[name](4, 12)
    local = 12 if name == "dualpipev" else 0  # there the last rank's two stages are neighbours
    sent = [messages_from(schedule, rank) for rank in range(4)]
    assert sum(sent) == 2 * (12 * (stages - 1) - local)
    assert sent[1] == 2 * 12 * stages // 4


def test_share_beside():
    schedule = SCHEDULES["dualpipe"](4, 12)
    overlaps = sum(isinstance(action, Overlap) for rank in schedule.ranks for action in rank)
    assert share_beside(schedule) == pytest.approx(2 * overlaps / (2 * 12 * 4))
    assert share_beside(SCHEDULES["1f1b"](4, 12)) == 0


def test_a_verdict_needs_all_rounds():
    assert verdict([1.1, 1.3, 1.01], 1.0, "faster", "slower") == "faster"
    assert verdict([0.9, 0.5], 1.0, "faster", "slower") == "slower"
    said = verdict([1.1, 0.97, 1.2], 1.0, "faster", "slower")
    assert said == "the rounds disagree (0.97 to 1.20): no difference shown"
