"""The trainer: optimizer, schedules, bit-exact resuming, its settings and metrics."""

import dataclasses
import json
import shutil

import pytest
import torch
from model_helpers import BYTES
from torch import nn

from dsv3_kernels.train import schedule
from dsv3_kernels.train.config import RunConfig, TrainConfig, from_json, to_json
from dsv3_kernels.train.data.corpus import load_corpus
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.observe.metrics import MetricsLog
from dsv3_kernels.train.observe.report import entropies
from dsv3_kernels.train.state.optimizer import AdamW
from dsv3_kernels.train.trainer import StepMetrics, Trainer

SETTINGS = TrainConfig(steps=20, batch_size=2, seq_len=16, warmup_steps=3, lr=3e-3)


def trainer(text, precision="fp8", **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return Trainer(BYTES, settings, precision, load_corpus(str(text), settings.seq_len + 2))


def steps_to(trainer, step):
    return [trainer.train_step() for _ in range(trainer.step, step)]


def whole(pieces):
    """Of a process alone, where each piece is a whole tensor."""
    return {name: piece.values.view(piece.shape) for name, piece in pieces.items()}


def save(trainer, folder):
    trainer.save(folder, keep=1)
    trainer.saver.wait()


# Optimizer


def slow_adamw(initial, gradients, lr, decay, clip):
    """One parameter in float64, moments rounded to BF16 between the steps."""
    w, m, v = initial.double(), torch.zeros_like(initial).double(), torch.zeros_like(initial).double()
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.double() * clip
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * g * g
        w = w - lr * decay * w - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        m, v = m.bfloat16().double(), v.bfloat16().double()
    return w, m, v


def test_adamw_against_float64():
    torch.manual_seed(int(torch.randint(1 << 30, ())))
    model = nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model.named_parameters(), weight_decay=0.1)
    model.bfloat16()
    optimizer.write_parameters()
    history = {name: [] for name in initial}
    for _ in range(6):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape)
            history[name].append(parameter.grad.clone())
        expected_norm = sum(h[-1].double().square().sum() for h in history.values()).sqrt()
        assert float(optimizer.gather_gradients()) == pytest.approx(float(expected_norm), rel=1e-6)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step(0.01, 0.5)
    state = whole(optimizer.pieces())
    for name, parameter in model.named_parameters():
        decay = 0.1 if parameter.dim() > 1 else 0.0
        w, m, v = slow_adamw(initial[name], history[name], 0.01, decay, 0.5)
        assert torch.allclose(state[f"master/{name}"].double(), w, rtol=1e-4, atol=1e-6)
        assert state[f"exp_avg/{name}"].dtype == state[f"exp_avg_sq/{name}"].dtype == torch.bfloat16
        # FP32 and FP64 may round a moment to neighbouring BF16 numbers.
        assert torch.allclose(state[f"exp_avg/{name}"].double(), m, rtol=2**-7, atol=1e-6)
        assert torch.allclose(state[f"exp_avg_sq/{name}"].double(), v, rtol=2**-7, atol=1e-6)
        assert torch.equal(parameter, state[f"master/{name}"].bfloat16())


def test_masters_collect_updates_too_small_for_bf16():
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = AdamW(layer.named_parameters(), weight_decay=0.0)
    layer.bfloat16()
    for _ in range(100):
        layer.weight.grad = torch.ones(1, 1)
        optimizer.gather_gradients()
        optimizer.step(1e-4)
    assert layer.weight.item() == pytest.approx(0.99, abs=0.004)
    assert float(optimizer.masters()["weight"]) == pytest.approx(0.99, abs=1e-4)


def test_missing_gradients_are_zero():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = AdamW(model.named_parameters(), weight_decay=0.0)
    before = model[1].weight.detach().clone()
    model[0].weight.grad = torch.ones(2, 2)
    assert float(optimizer.gather_gradients()) == pytest.approx(2.0)
    optimizer.step(0.1)
    assert torch.equal(model[1].weight, before)


def test_gradients_reach_the_optimizer_in_fp32(text):
    run = trainer(text)
    run.model.losses(run.batches.batch(0)).main.backward()
    weight = run.model.blocks[0].attention.o_proj.weight
    assert weight.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


# Schedules


def test_learning_rate():
    config = TrainConfig(steps=100, warmup_steps=10, lr=2.0, final_lr=0.1)
    rates = [schedule.learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == max(rates) == 2.0
    assert rates[99] == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert schedule.learning_rate(10, config) + schedule.learning_rate(99, config) == pytest.approx(
        schedule.learning_rate(54, config) + schedule.learning_rate(55, config)
    )
    assert schedule.learning_rate(0, TrainConfig(steps=1, warmup_steps=0, lr=1.0)) == 1.0


def test_late_switches():
    config = TrainConfig(steps=1000, mtp_weight=0.3, bias_speed=0.01)
    assert [schedule.mtp_weight(step, config) for step in (0, 675, 676, 999)] == pytest.approx(
        [0.3, 0.3, 0.1, 0.1]
    )
    assert [schedule.bias_speed(step, config) for step in (0, 966, 967, 999)] == [0.01, 0.01, 0, 0]


# A step


def test_one_step_is_losses_gradients_and_update_by_hand(text):
    """The same through a plain float64 AdamW, from the model's own gradients."""
    run, other = trainer(text, "bf16"), trainer(text, "bf16")
    before = {name: t.clone() for name, t in whole(run.optimizer.pieces()).items()}
    losses = other.model.losses(other.batches.batch(0))
    (losses.main + 0.3 * losses.mtp + 1e-4 * losses.balance).backward()
    gradients = {name: p.grad.double() for name, p in other.model.named_parameters()}
    norm = sum(g.square().sum() for g in gradients.values()).sqrt()
    metrics = run.train_step()
    assert metrics.loss == losses.main.item()
    assert metrics.grad_norm == pytest.approx(float(norm), rel=1e-5)
    lr = schedule.learning_rate(0, SETTINGS)
    for name, gradient in gradients.items():
        decay = 0.1 if gradient.dim() > 1 else 0.0
        w, _, _ = slow_adamw(before[f"master/{name}"], [gradient], lr, decay, min(1.0, 1 / float(norm)))
        got = whole(run.optimizer.pieces())[f"master/{name}"]
        assert torch.allclose(got.double(), w, rtol=1e-5, atol=lr * 1e-3)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_learns(text, precision):
    metrics = steps_to(trainer(text, precision), 20)
    assert metrics[0].loss == pytest.approx(5.55, abs=0.1)
    assert metrics[-1].loss < 4.0
    assert [m.step for m in metrics] == list(range(1, 21))


def test_expert_biases_move_and_rest(text):
    run = trainer(text)
    biases = [gate.bias.clone() for gate in run.model.gates()]
    steps_to(run, 5)
    moved = [gate.bias.clone() for gate in run.model.gates()]
    assert len(moved) == 2
    for before, after in zip(biases, moved, strict=True):
        assert 0 < (after - before).abs().max() <= 5 * SETTINGS.bias_speed + 1e-6
        assert after.dtype == torch.float32
    steps_to(run, 20)
    assert schedule.bias_speed(19, SETTINGS) > 0  # with 20 steps the rest is empty; with 200 it is not
    assert schedule.bias_speed(199, dataclasses.replace(SETTINGS, steps=200)) == 0


def test_evaluation_changes_nothing(text):
    run, other = trainer(text), trainer(text)
    windows = run.corpus.validation[: 18 * 5].view(5, 18).long()
    steps_to(run, 2)
    fp8, bf16 = run.evaluate(windows), run.evaluate(windows, "bf16")
    assert fp8 != bf16
    assert fp8 == run.evaluate(windows)  # it went back to its own precision
    assert fp8 == pytest.approx(bf16, rel=0.01)
    losses = [run.model.next_token_loss(row[None, :17]).item() for row in windows]
    assert fp8 == pytest.approx(sum(losses) / 5, rel=1e-3)
    steps_to(other, 2)
    assert run.train_step().loss == other.train_step().loss


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_loss_that_is_not_finite_stops_before_the_update(text, what):
    run = trainer(text)
    steps_to(run, 3)
    before = {name: t.clone() for name, t in whole(run._pieces(owned=True)).items()}
    if what == "loss":
        with torch.no_grad():
            run.model.norm.weight[0] = torch.nan
    else:
        run.model.head.weight.register_hook(lambda g: g * torch.inf)
    with pytest.raises(TrainError, match=rf"fp8: the {what} of step 4 is (nan|inf)"):
        run.train_step()
    assert run.step == 3
    assert all(torch.equal(t, before[name]) for name, t in whole(run._pieces(owned=True)).items())


# Checkpoints of a trainer


def assert_same_state(a, b):
    assert a.step == b.step == a.optimizer.steps == b.optimizer.steps
    left, right = whole(a._pieces(owned=True)), whole(b._pieces(owned=True))
    assert left.keys() == right.keys()
    assert {name.split("/")[0] for name in left} == {"master", "exp_avg", "exp_avg_sq", "buffer"}
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_twenty_steps_equal_ten_and_ten(text, tmp_path, precision):
    whole = trainer(text, precision)
    expected = steps_to(whole, 20)
    first = trainer(text, precision)
    steps_to(first, 10)
    save(first, tmp_path)
    second = trainer(text, precision)
    second.load(tmp_path)
    assert_same_state(first, second)
    torch.manual_seed(0)  # whatever the global generator does meanwhile plays no part
    rest = steps_to(second, 20)
    assert_same_state(whole, second)
    for a, b in zip(expected[10:], rest, strict=True):
        assert dataclasses.replace(a, seconds=0, tokens_per_second=0) == dataclasses.replace(
            b, seconds=0, tokens_per_second=0
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1.0}, r"train\.lr is 0\.003, expected 1\.0"),
        ({"batch_size": 4}, "samples is 4, expected 8"),
        ({"power_of_2_scales": True}, r"train\.power_of_2_scales is False"),
    ],
)
def test_other_settings_are_refused(text, tmp_path, changes, message):
    run = trainer(text)
    steps_to(run, 2)
    save(run, tmp_path)
    with pytest.raises(TrainError, match=message):
        trainer(text, **changes).load(tmp_path)
    with pytest.raises(TrainError, match="precision is 'fp8', expected 'bf16'"):
        trainer(text, "bf16").load(tmp_path)
    longer = trainer(text, steps=30)
    longer.load(tmp_path)
    assert longer.step == 2


def test_other_text_is_refused(text, tmp_path):
    run = trainer(text)
    save(run, tmp_path / "checkpoints")
    copy = shutil.copytree(text, tmp_path / "text")
    (copy / "0.txt").write_text("another text " * 10)
    with pytest.raises(TrainError, match="its text was another"):
        trainer(copy).load(tmp_path / "checkpoints")


# Settings as JSON


def test_settings_survive_json():
    config = RunConfig(data="x", train=TrainConfig(lr=1), precisions=("bf16",))
    value = json.loads(json.dumps(to_json(config)))
    assert from_json(RunConfig, value, "here") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(extra=1), r"unknown keys \['extra'\]"),
        (lambda v: v["train"].pop("lr"), r"here\.train: .*missing keys \['lr'\]"),
        (lambda v: v["train"].update(steps="20"), r"here\.train\.steps: found '20', expected int"),
        (lambda v: v["train"].update(steps=True), r"here\.train\.steps: found True"),
        (lambda v: v["train"].update(steps=0), "steps is 0, expected at least 1"),
        (lambda v: v["train"].update(lr=float("nan")), "lr is nan"),
        (lambda v: v["train"].update(grad_clip=-1.0), "grad_clip is -1.0"),
        (lambda v: v["model"].update(n_group=3), r"here\.model: .*n_group is 3"),
        (lambda v: v["model"].update(rope_theta=0.0), "rope_theta is 0.0"),
        (lambda v: v.update(model=[]), r"here\.model: found list, expected an object"),
        (lambda v: v.update(precisions=["fp4"]), r"here\.precisions\[0\]: found 'fp4'"),
        (lambda v: v.update(precisions=[]), "precisions is"),
        (lambda v: v.update(precisions=["fp8", "fp8"]), "precisions is"),
        (lambda v: v.update(data=3), r"here\.data: found 3"),
        (lambda v: v.update(keep=0), "keep is 0"),
    ],
)
def test_settings_from_bad_json(change, message):
    value = json.loads(json.dumps(to_json(RunConfig())))
    change(value)
    with pytest.raises(TrainError, match=message):
        from_json(RunConfig, value, "here")


# Metrics


def metrics_of(step, precision="fp8"):
    values = {f.name: 1.0 for f in dataclasses.fields(StepMetrics)}
    metrics = StepMetrics(**(values | {"step": step, "precision": precision}))
    return dataclasses.asdict(metrics) | {"validation_loss": None}


def test_metrics_go_on_without_duplicates(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, {})
    for step in range(1, 8):
        log.append(metrics_of(step))
        log.append(metrics_of(step, "bf16"))
    log.close()
    with open(path, "a") as file:
        file.write('{"precision": "fp8", "st')  # the row a killed process was writing
    log = MetricsLog(path, {"fp8": 5, "bf16": 4})
    log.append(metrics_of(6))
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in rows if r["precision"] == "fp8"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows if r["precision"] == "bf16"] == [1, 2, 3, 4]
    path.write_text("not json\n")
    with pytest.raises(TrainError, match="line 1: not a row of metrics"):
        MetricsLog(path, {})


def test_entropies():
    text = torch.tensor(list(b"ab" * 500), dtype=torch.uint8)
    unigram, bigram = entropies(text)
    assert unigram == pytest.approx(0.6931, abs=1e-3)
    assert bigram == pytest.approx(0.0, abs=1e-3)
