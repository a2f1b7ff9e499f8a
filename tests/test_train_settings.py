"""Runs with prepared tokens, a schedule, an average of the weights and recompute, end to end."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from dsv3_kernels import generate
from dsv3_kernels.model import PRESETS
from dsv3_kernels.train import cli, export, schedule
from dsv3_kernels.train.config import TrainConfig
from dsv3_kernels.train.data.corpus import load_corpus
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.phases import Schedule
from dsv3_kernels.train.prepare import prepare
from dsv3_kernels.train.run import Run
from dsv3_kernels.train.trainer import Trainer

MODEL = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1, vocab_size=300)
RAMP = Schedule(first_batch_size=1, ramp_until="4 steps", last_lr_from="5 steps", last_lr=0.5)
SETTINGS = TrainConfig(
    steps=7, batch_size=3, seq_len=16, warmup_steps=2, lr=3e-3, ema=0.9, schedule=RAMP, recompute=True
)


@pytest.fixture(scope="module")
def tokens(text, tmp_path_factory):
    """The text as a BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokens") / "out"
    prepare(str(text), folder, tokenizer="bpe", vocab_size=300)
    return folder


def trainer(tokens, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return Trainer(MODEL, settings, "fp8", load_corpus(str(tokens), 18))


def state(trainer):
    return {name: piece.values.clone() for name, piece in trainer._pieces(owned=True).items()}


def test_stopped_and_resumed_equals_uninterrupted(tokens, tmp_path):
    """Average and ramp included; the one that goes on keeps all activations, which changes nothing."""
    whole = trainer(tokens)
    rows = [whole.train_step() for _ in range(7)]
    first, second = trainer(tokens), trainer(tokens, recompute=None)
    for _ in range(3):
        first.train_step()
    first.save(tmp_path, keep=1)
    first.saver.wait()
    second.load(tmp_path)
    again = [second.train_step() for _ in range(4)]
    assert [row.loss for row in again] == [row.loss for row in rows[3:]]
    got, expected = state(second), state(whole)
    assert got.keys() == expected.keys()
    assert any(name.startswith("ema/") for name in got)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_the_batch_grows_and_no_sample_is_left_out(tokens):
    run, seen = trainer(tokens), []
    samples = run.batches.samples

    def record(first, count):
        seen.append((first, count))
        return samples(first, count)

    run.batches.samples = record
    for _ in range(6):
        run.train_step()
    assert [count for _, count in seen] == [1, 1, 2, 2, 3, 3]
    assert [first for first, _ in seen] == [0, 1, 2, 4, 6, 9]


def test_the_average_is_evaluated_and_the_weights_stay(tokens):
    run = trainer(tokens)
    for _ in range(4):
        run.train_step()
    windows = run.corpus.validation[: 18 * 4].long().view(4, 18)
    before, loss = state(run), run.evaluate(windows)
    averaged = run.evaluate_average(windows)
    assert averaged is not None
    assert averaged != loss
    assert run.evaluate(windows) == loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(run).items())
    expected = trainer(tokens)
    for name, parameter in expected.model.named_parameters():
        parameter.data.copy_(before[f"ema/{name}"].view(parameter.shape))
    for name, buffer in expected.model.named_buffers():
        if name.endswith(".bias"):
            buffer.copy_(before[f"buffer/{name}"])
    assert expected.evaluate(windows) == averaged
    assert trainer(tokens, ema=None).evaluate_average(windows) is None


def test_a_vocabulary_that_the_model_does_not_have(tokens, tmp_path):
    config, _ = cli.new_run({"data": str(tokens), "precision": "bf16", "seq_len": 16})
    assert config.model.vocab_size == 300
    small = dataclasses.replace(config, model=PRESETS["tiny"])
    with pytest.raises(TrainError, match="has 300 tokens, expected at most the model.s 256"):
        Run(small, tmp_path / "run", None)


def test_command_line(tokens, tmp_path, capsys):
    """Trained, generated from, exported."""
    folder, plan = tmp_path / "run", tmp_path / "plan.json"
    plan.write_text(json.dumps({"first_batch_size": 1, "ramp_until": "50%"}))
    options = ["--data", tokens, "--out", folder, "--schedule", plan, "--ema", 0.9, "--recompute"]
    sizes = ["--steps", 4, "--batch-size", 2, "--seq-len", 16, "--warmup-steps", 1, "--validation-windows", 2]
    arguments = [*options, *sizes, "--precision", "bf16", "--sample-bytes", 4]
    assert cli.main([*map(str, arguments)]) == 0
    shown = capsys.readouterr()
    assert "nats a token" in shown.out
    assert "validation loss of the average" in shown.out
    assert (folder / "report.html").stat().st_size > 10_000
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows[0]["expert_loads"]) == 3
    assert rows[-1]["validation_loss_ema"] > 0
    assert generate.main([str(folder), "--prompt", "The ", "--tokens", "3", "--ema"]) == 0
    assert "The " in capsys.readouterr().out
    weights = {}
    for name, more in (("last", []), ("average", ["--ema"])):
        assert export.main([str(folder), str(tmp_path / name), *more]) == 0
        shards = [load_file(path) for path in sorted((tmp_path / name).glob("*.safetensors"))]
        (weights[name],) = (shard["lm_head.weight"] for shard in shards if "lm_head.weight" in shard)
    assert weights["last"].shape[0] == 300
    assert not torch.equal(weights["last"], weights["average"])


def test_bad_schedules_and_averages(tmp_path, capsys):
    for arguments, message in (
        (["--schedule", "linear"], "expected cosine, paper or a JSON file"),
        (["--schedule", "paper", "--steps", "9"], "expected not before warmup_steps"),
        (["--ema", "1"], "ema is 1.0, expected"),
    ):
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["--memory-report", "--layers", "0"]) == 1
    assert schedule.load_schedule("cosine", 1) is None
