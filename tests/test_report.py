"""What a run shows: utilisation, rows, TensorBoard, and the page at its end."""

import dataclasses
import importlib.util
import itertools
import json
import mmap
import os
import re
import sys
import types

import pytest
import torch

from dsv3_kernels.model import PRESETS
from dsv3_kernels.train.config import RunConfig
from dsv3_kernels.train.observe import metrics as metrics_module
from dsv3_kernels.train.observe.metrics import Meter, MetricsLog, flops_per_token
from dsv3_kernels.train.observe.page import write_page
from dsv3_kernels.train.observe.report import SameWeights, Summary, entropies
from dsv3_kernels.train.trainer import StepMetrics

LOADS = {"expert_loads": (1.25, 2.0, 1.5)}


def step_row(precision, step):
    values = {f.name: 1.5 for f in dataclasses.fields(StepMetrics) if f.default is dataclasses.MISSING}
    values |= {"precision": precision, "step": step, "loss": 5.0 - step / 10}
    row = dataclasses.asdict(StepMetrics(**values | LOADS))
    return row | {"validation_loss": 4.0 if step % 10 == 0 else None}


def filled(path, steps=30, meter=None):
    log = MetricsLog(path, {"fp8": 0, "bf16": 0}, meter)
    for step in range(1, steps + 1):
        for precision in ("fp8", "bf16"):
            log.append(step_row(precision, step))
    return log


def summary(unit="byte"):
    both = {"fp8": 4.5, "bf16": 4.25}
    return Summary(30, 12.0, 3.2, 2.4, both, both, [SameWeights("at the start", 4.5, 4.25)], unit)


def test_utilisation_is_counted_as_deepseek_counts_it():
    """272.8B tokens a day on 2048 H800: 385 TFLOPS causal, 38.94 % (Insights into DeepSeek-V3, table 4)."""
    tokens = 272.8e9 / 86400 / 2048
    flops = flops_per_token(PRESETS["v3"], 4096) * tokens
    assert flops == pytest.approx(385e12, rel=0.01)
    assert flops / 989e12 == pytest.approx(0.3894, rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA RTX 9999", None)]
)
def test_known_gpus(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(metrics_module, "_memory", lambda _: 7)
    got = Meter(PRESETS["tiny"], 128, "cuda", devices=4).read(1000.0)
    expected = None if peak is None else 1000 * flops_per_token(PRESETS["tiny"], 128) / peak / 4
    assert got == {"mfu": expected if expected is None else pytest.approx(expected), "memory": 7}


def test_memory_of_the_process():
    meter = Meter(PRESETS["tiny"], 128)
    before = meter.read(1.0)
    assert before["mfu"] is None
    with mmap.mmap(-1, 50 << 20) as block:  # malloc could give memory that the process has already
        block.write(bytes(50 << 20))
        assert meter.read(1.0)["memory"] - before["memory"] > 40 << 20


def test_rows_go_on_where_the_checkpoint_stands(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path, meter=Meter(PRESETS["tiny"], 128)).close()
    with open(path, "a") as file:
        file.write('{"step": 31, "prec')  # killed while it wrote
    again = MetricsLog(path, {"fp8": 20, "bf16": 10})
    again.append(step_row("bf16", 11))
    again.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((r["precision"], r["step"]) for r in rows) == sorted(
        [("fp8", s) for s in range(1, 21)] + [("bf16", s) for s in range(1, 12)]
    )
    assert rows[0]["memory"] > 1 << 20
    assert rows[0]["mfu"] is None


def test_tensorboard_where_installed(tmp_path, monkeypatch):
    written = {}

    class Writer:
        def __init__(self, folder, purge_step):
            self.name = os.path.basename(folder)
            written[self.name] = {"purge": purge_step, "scalars": [], "closed": False}

        def add_scalar(self, name, value, step):
            assert isinstance(value, int | float)
            written[self.name]["scalars"].append((name, step))

        def close(self):
            written[self.name]["closed"] = True

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "tensorboard" else found(name)
    )
    filled(tmp_path / "metrics.jsonl", steps=10).close()
    assert written.keys() == {"fp8", "bf16"}
    for run in written.values():
        assert run["closed"]
        assert run["purge"] == 1
        assert [step for name, step in run["scalars"] if name == "loss"] == list(range(1, 11))
        assert [step for name, step in run["scalars"] if name == "validation_loss"] == [10]
        assert "step" not in {name for name, _ in run["scalars"]}


@pytest.mark.parametrize("loads", [True, False])
def test_page_is_whole_and_alone(tmp_path, loads):
    log = filled(tmp_path / "metrics.jsonl", meter=Meter(PRESETS["tiny"], 128))
    for row in log.rows:
        row.pop("expert_loads", None)
        if loads:
            row |= LOADS
    config = RunConfig(data="<script>alert(1)</script>")
    path = tmp_path / "report.html"
    write_page(path, config, log, summary("token"))
    text = path.read_text("utf-8")
    assert text.count("data:image/png;base64,") == 5
    assert "nats a token" in text
    assert "4.2500" in text
    assert "train.batch_size" in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    log.close()


# Entropies


@pytest.mark.parametrize("size", [200, 5000])
def test_entropies_against_a_count_by_hand(size):
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
    ids = torch.randint(size, (3000,), generator=generator)
    ids[1::2] = ids[::2] % 7
    one, two = entropies(ids.to(torch.uint16))

    def entropy(values):
        counts = {}
        for value in values:
            counts[value] = counts.get(value, 0) + 1
        shares = torch.tensor(list(counts.values()), dtype=torch.float64) / len(values)
        return float(-(shares * shares.log()).sum())

    items = ids.tolist()
    assert one == pytest.approx(entropy(items))
    assert two == pytest.approx(entropy(list(itertools.pairwise(items))) - one)
