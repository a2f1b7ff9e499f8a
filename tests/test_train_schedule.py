"""What changes with the step: the paper's shape, and properties that hold for any settings."""

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_kernels.train import schedule
from dsv3_kernels.train.config import TrainConfig, from_json, to_json
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.phases import Point, Schedule, paper
from dsv3_kernels.train.schedule import batch_size, first_sample, learning_rate


def test_the_papers_run():
    """Section 4.2: every number of it, at its true size."""
    sequences = 14.8e12 / 4096
    ramp = 469e9 / 4096
    steps = round(ramp / ((3072 + 15360) / 2) + (sequences - ramp) / 15360)
    config = TrainConfig(
        steps=steps,
        batch_size=15360,
        seq_len=4096,
        lr=2.2e-4,
        final_lr=0.1,
        warmup_steps=2000,
        mtp_weight=0.3,
        bias_speed=1e-3,
        schedule=dataclasses.replace(paper(15360), batch_multiple=512),
    )
    assert first_sample(steps, config) == pytest.approx(sequences, rel=1e-3)

    def at(tokens):
        """The step that has seen so many."""
        low, high = 0, steps
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if first_sample(middle, config) * 4096 < tokens else (low, middle)
        return low

    slack = steps // 1000  # the shares are written with four digits
    assert learning_rate(1999, config) == learning_rate(2000, config) == 2.2e-4
    assert learning_rate(999, config) == pytest.approx(1.1e-4)
    assert learning_rate(at(10e12) - slack, config) == 2.2e-4
    assert learning_rate(at(12.15e12), config) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=0.01)
    assert learning_rate(at(14.3e12) + slack, config) == pytest.approx(2.2e-5)
    assert learning_rate(at(14.8e12 - 167e9) - slack, config) == pytest.approx(2.2e-5)
    assert learning_rate(at(14.8e12 - 167e9) + slack, config) == pytest.approx(7.3e-6, rel=1e-3)
    assert batch_size(0, config) == 3072
    assert batch_size(at(469e9) - 2 * slack, config) < 15360 == batch_size(at(469e9) + slack, config)
    assert [schedule.mtp_weight(at(10e12) + d * slack, config) for d in (-1, 1)] == pytest.approx([0.3, 0.1])
    assert [schedule.bias_speed(at(14.3e12) + d * slack, config) for d in (-1, 1)] == [1e-3, 0.0]
    assert TrainConfig().grad_clip == 1.0


def test_without_a_schedule_nothing_has_changed():
    """Warm-up and one cosine, written out."""
    for config in (TrainConfig(), TrainConfig(steps=10), TrainConfig(steps=300, warmup_steps=0)):
        for step in range(config.steps):
            if step < config.warmup_steps:
                expected = config.lr * (step + 1) / config.warmup_steps
            else:
                share = min(
                    1.0, (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
                )
                expected = config.lr * (
                    config.final_lr + (1 - config.final_lr) * (0.5 * (1 + math.cos(math.pi * share)))
                )
            assert learning_rate(step, config) == expected
            assert batch_size(step, config) == config.batch_size
            assert first_sample(step, config) == step * config.batch_size


@st.composite
def configs(draw):
    """Any valid settings, moments in any unit."""
    steps = draw(st.integers(1, 400))
    batch, seq_len = draw(st.integers(1, 50)), draw(st.integers(1, 64))
    warmup = draw(st.integers(0, steps))
    multiple = draw(st.sampled_from([d for d in range(1, batch + 1) if batch % d == 0]))
    first = multiple * draw(st.integers(1, batch // multiple))
    order = sorted(draw(st.lists(st.integers(warmup, 2 * steps), min_size=3, max_size=3)))

    def write(step):
        kinds = ["steps", "%"] if step <= steps else ["steps"]
        return f"{step / steps * 100:.15f}%" if draw(st.sampled_from(kinds)) == "%" else f"{step} steps"

    ramped = draw(st.booleans())
    plan = Schedule(
        constant_until=f"{order[0]} steps",
        decay_until=f"{order[1]} steps",
        last_lr_from=f"{order[2]} steps",
        last_lr=draw(st.floats(0, 1)),
        first_batch_size=first if ramped else None,
        ramp_until=draw(st.sampled_from([write(draw(st.integers(0, 2 * steps))), "5000 tokens"]))
        if ramped
        else None,
        batch_multiple=multiple,
        mtp_weight_until=write(draw(st.integers(0, 2 * steps))),
        bias_speed_until=f"{draw(st.integers(0, 10**6))} tokens",
    )
    return TrainConfig(
        steps=steps,
        batch_size=batch,
        seq_len=seq_len,
        warmup_steps=warmup,
        lr=draw(st.floats(1e-6, 10)),
        final_lr=draw(st.floats(0, 1)),
        schedule=plan,
    )


@settings(max_examples=150, deadline=None)
@given(configs())
def test_properties(config):
    steps = range(config.steps)
    rates = [learning_rate(step, config) for step in steps]
    assert all(0 <= rate <= config.lr * (1 + 1e-12) for rate in rates)
    warm = config.warmup_steps
    assert rates[:warm] == sorted(rates[:warm])
    last = float(config.schedule.last_lr_from.split()[0])
    late = rates[warm : math.ceil(last)]
    assert all(a >= b - 1e-12 * config.lr for a, b in itertools.pairwise(late))
    constant = float(config.schedule.constant_until.split()[0])
    rest = [rate for step, rate in enumerate(rates) if warm <= step < constant]
    assert rest == [config.lr] * len(rest)
    sizes = [batch_size(step, config) for step in steps]
    assert sizes == sorted(sizes)
    first = config.schedule.first_batch_size or config.batch_size
    assert all(first <= size <= config.batch_size for size in sizes)
    assert all(size % config.schedule.batch_multiple == 0 for size in sizes)
    total = 0
    for step, size in enumerate(sizes):
        assert first_sample(step, config) == total
        total += size
    assert first_sample(config.steps, config) == total
    for name in ("mtp_weight", "bias_speed"):
        values = [getattr(schedule, name)(step, config) for step in steps]
        assert values == sorted(values, reverse=True)
        assert set(values) <= {getattr(config, name), getattr(config, name) / 3, 0.0}
    until = Point.parse(config.schedule.bias_speed_until, "bias_speed_until").number
    for step in steps:
        seen = first_sample(step, config) * config.seq_len
        assert (schedule.bias_speed(step, config) > 0) == (seen < until)


@settings(max_examples=30, deadline=None)
@given(configs())
def test_settings_survive_json(config):
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config))), "config") == config


def test_settings_of_earlier_versions_load():
    value = to_json(TrainConfig())
    del value["schedule"]
    assert from_json(TrainConfig, value, "config") == TrainConfig()


@pytest.mark.parametrize("text", ["", "10", "-5 steps", "5 hours", "nan%", "1e999 tokens%", "101%", "%"])
def test_moments_that_are_none(text):
    with pytest.raises(TrainError, match="decay_until is .*expected"):
        Schedule(decay_until=text)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"constant_until": "5 steps"},
            "at step 5 of 120, expected not before warmup_steps",
        ),
        (
            {"constant_until": "50%", "decay_until": "30 steps"},
            "decay_until is at step 30 of 120, expected not before constant_until = 60",
        ),
        ({"last_lr": 0.5}, "last_lr and last_lr_from belong together"),
        ({"last_lr": 2.0, "last_lr_from": "99%"}, "last_lr is 2.0, expected a share"),
        ({"first_batch_size": 2}, "first_batch_size and ramp_until belong together"),
        ({"first_batch_size": 0, "ramp_until": "9%"}, "first_batch_size is 0, expected at least 1"),
        (
            {"first_batch_size": 9, "ramp_until": "9%"},
            "is 9, expected at most batch_size = 8",
        ),
        (
            {"first_batch_size": 3, "ramp_until": "9%", "batch_multiple": 2},
            "both multiples of batch_multiple = 2",
        ),
    ],
)
def test_schedules_that_cannot_be(plan, message):
    with pytest.raises(TrainError, match=message):
        TrainConfig(schedule=Schedule(**plan))


def test_files(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"constant_until": "50%"}')
    assert schedule.load_schedule(str(path), 8) == Schedule(constant_until="50%")
    assert schedule.load_schedule("cosine", 8) is None
    assert schedule.load_schedule("paper", 80).first_batch_size == 16
    for batch, multiple in ((80, 8), (16, 8), (8, 8)):
        config = TrainConfig(
            steps=100,
            batch_size=batch,
            warmup_steps=1,
            schedule=schedule.load_schedule("paper", batch, multiple),
        )
        assert all(batch_size(step, config) % multiple == 0 for step in range(100))
    for content, message in (("{", "is not JSON"), ('{"when": 1}', "unknown keys"), ("[]", "found list")):
        path.write_text(content)
        with pytest.raises(TrainError, match=message):
            schedule.load_schedule(str(path), 8)
    with pytest.raises(TrainError, match="expected cosine, paper or a JSON file"):
        schedule.load_schedule("linear", 8)


def test_command(tmp_path, capsys):
    out = tmp_path / "schedule.png"
    assert schedule.main(["--out", str(out), "--steps", "200"]) == 0
    assert out.read_bytes()[1:4] == b"PNG"
    assert "sequences in 200 steps" in capsys.readouterr().out
    assert schedule.main(["--schedule", "none.json"]) == 1
