"""A model that is cut before it is built, and what a rank is said to hold against what it holds."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fp8_helpers import fresh_generator
from model_helpers import BYTES, SMALL

from dsv3_kernels.ep import Buffer
from dsv3_kernels.model import PRESETS, DeepSeekV3, count_parameters, initial
from dsv3_kernels.nn import Fp8Recipe
from dsv3_kernels.nn.recipe import RECOMPUTE
from dsv3_kernels.train import cli
from dsv3_kernels.train.config import TrainConfig
from dsv3_kernels.train.data.corpus import load_corpus
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.observe.memory import LiveMemory
from dsv3_kernels.train.observe.plan import kept_by, plan
from dsv3_kernels.train.parallel.groups import Layout
from dsv3_kernels.train.pipeline.schedules import SCHEDULES
from dsv3_kernels.train.pipeline.stages import StageRunner, cut, split
from dsv3_kernels.train.trainer import Trainer

CONFIG = replace(SMALL, num_hidden_layers=6)
NAN = float("nan")


def part_of(config, stages, ep=1, rank=0, recipe=None, buffer=None):
    """On the meta device: these stages, with the experts of one of ep ranks."""
    if ep > 1:
        experts = config.n_routed_experts
        buffer = SimpleNamespace(num_experts=experts, local_experts=experts // ep, rank=rank)
    with torch.device("meta"):
        model = DeepSeekV3(config, recipe, buffer)
    return cut(model, stages)


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_cut_model_has_the_values_of_the_whole(name, ep):
    seed = fresh_generator().initial_seed()
    print("seed", seed)
    whole = DeepSeekV3(CONFIG)
    whole.initialize(seed)
    expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
    found = set()
    schedule = SCHEDULES[name](2, 4)
    stages = split(CONFIG, schedule.stages)
    for rank in range(2):
        for expert_rank in range(ep):
            model = part_of(CONFIG, [stages[i] for i in schedule.stages_of(rank)], ep, expert_rank)
            model.to_empty(device="cpu")
            for key, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
                tensor.data.fill_(NAN)
                found.add(key)
            model.initialize(seed)
            for key, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
                full = expected[key]
                if ".experts." in key:
                    full = full.chunk(ep)[expert_rank]
                assert torch.equal(tensor, full), key
    assert found == expected.keys()


def test_no_two_weights_are_alike():
    model = DeepSeekV3(replace(CONFIG, initializer_range=1.0))
    model.initialize(5)
    rows = [m for p in model.parameters() if p.dim() > 1 for m in (p if p.dim() == 3 else [p])]
    starts = {tuple(row.flatten()[:4].tolist()) for row in rows}
    assert len(starts) == len(rows) > 60
    values = torch.cat([row.flatten() for row in rows]).double()
    assert abs(values.mean()) < 5 / len(values) ** 0.5
    assert values.std().item() == pytest.approx(1, abs=5 / len(values) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawn_in_parts_or_at_once(monkeypatch, dtype):
    """By the definition of the stream, whatever the size of the parts."""
    key = int.from_bytes(initial.hashlib.sha256(b"3/a.weight/7").digest()[:16], "little")
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(35, np.float32)
    expected = (torch.from_numpy(values) * 0.25).to(dtype).view(5, 7)
    for part in (1, 4, 35, 1000):
        monkeypatch.setattr(initial, "CHUNK", part)
        tensor = torch.full((5, 7), NAN, dtype=dtype)
        initial.fill_normal(tensor, 0.25, 3, "a.weight", 7)
        assert torch.equal(tensor, expected)


def test_a_rank_makes_no_more_than_its_part(monkeypatch):
    """Bytes of all storages made while a part is built: its own, and what a draw takes."""
    monkeypatch.setattr(initial, "CHUNK", 1 << 10)
    stages = split(CONFIG, 3)
    memory = LiveMemory()
    with memory:
        model = part_of(CONFIG, [stages[1]], ep=4, rank=1)
        assert memory.peak == 0
        model.to_empty(device="cpu")
        model.initialize(0)
    held = [*model.parameters(), *model.buffers()]
    own = sum(t.nbytes for t in held)
    assert all(t.device.type == "cpu" for t in held)
    whole = sum(p.nbytes for p in DeepSeekV3(CONFIG).parameters())
    assert own < whole / 5
    assert own <= memory.peak <= own + 4 * 2 * initial.CHUNK


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_kept_activations(index, spread):
    """What 256 more tokens add to all storages that a stage's forward leaves, so that no tile's tail counts.

    A CPU keeps more: what attention returns in FP32, and two FP32 copies of what the last norms read.
    """
    config = replace(PRESETS["tiny"], num_hidden_layers=5, first_k_dense_replace=2)
    stage = split(config, 3)[index]
    kept = []
    for tokens in (256, 512):
        sizes = config.n_routed_experts, config.hidden_size, tokens, config.num_experts_per_tok
        buffer = Buffer(None, *sizes) if spread else None
        model = part_of(config, [stage], recipe=Fp8Recipe(recompute=RECOMPUTE), buffer=buffer)
        model.to_empty(device="cpu").initialize(0)
        model.bfloat16().train()
        window = torch.randint(256, (1, tokens + 2), generator=fresh_generator())
        hidden = None if stage.first else torch.randn(1, tokens, 256, dtype=torch.bfloat16)
        memory = LiveMemory()
        with memory:
            hidden = None if hidden is None else hidden.clone().requires_grad_()
            output = StageRunner(model, 0.3, 1e-4).forward(stage, window, hidden)
            root = output.loss if stage.last else torch.autograd.graph.get_gradient_edge(output.hidden)
            output = output._replace(hidden=None)
            kept.append(memory.live)
        del root, output
    blocks, norms = len(stage.blocks) + stage.last, 2 * stage.last
    more = 256 * (blocks * config.num_attention_heads * 2 * config.v_head_dim + norms * 6 * 256)
    assert kept[1] - kept[0] == pytest.approx(kept_by(config, stage, 256, spread) + more, rel=0.015)


def test_states_of_one_process(text):
    """Every storage that a trainer makes, and what is left of a step."""
    train = TrainConfig(steps=2, batch_size=2, seq_len=16)
    corpus = load_corpus(text, 18)
    memory = LiveMemory()
    with memory:
        trainer = Trainer(BYTES, train, "fp8", corpus)
        (rank,) = plan(BYTES, Layout(), "dualpipe", 1, 2, 16)
        buffers = sum(b.nbytes for b in trainer.model.buffers())
        assert memory.live == rank.states + rank.gradients + buffers
        trainer.train_step()  # the order of the windows is there from now on
        gc.collect()
        before = memory.live
        losses = trainer._forward_backward()
        gc.collect()
        assert memory.live <= before + 64, "gradients are made beside the optimizer's"
        trainer.optimizer.gather_gradients()
        trainer.optimizer.step(1e-3)
        del losses
        gc.collect()
        assert memory.live == before
    assert rank.parameters == sum(p.numel() for p in trainer.model.parameters())


def test_plan_of_v3():
    """Against the report's counts; each parameter once over the ranks, or twice where DualPipe has it so."""
    count = count_parameters(PRESETS["v3"])
    whole = count.total + count.mtp
    for schedule, copies in (("dualpipe", 2), ("zb1p", 1)):
        layout = Layout(16, 64, 2)
        ranks = plan(PRESETS["v3"], layout, schedule, 32, 1, 4096)
        assert len(ranks) == 16
        masters = sum(rank.masters for rank in ranks) // 4 * layout.shares
        tied = 129280 * 7168 if schedule == "zb1p" else 0  # a second copy of the embedding, at the last rank
        assert masters == pytest.approx(whole, rel=1e-4)  # shares are padded
        experts = 58 * 256 * 3 * 7168 * 2048 + 256 * 3 * 7168 * 2048
        dense = whole - experts
        assert sum(rank.parameters for rank in ranks) == copies * (dense + experts // 64) + tied
        assert all(rank.total < 160 << 30 for rank in ranks)
    assert all(rank.activations > 0 for rank in ranks)
    assert [rank.logits > 0 for rank in ranks] == [False] * 15 + [True]


def test_v3_in_one_process_is_refused_before_it_is_built(text):
    train = TrainConfig(steps=1, batch_size=1, seq_len=16)
    with pytest.raises(
        TrainError, match=r"has 682,6\d\d million parameters.*Mend: more --pp or --ep; --plan"
    ):
        Trainer(PRESETS["v3"], train, "fp8", load_corpus(text, 18))


def test_plan_command(capsys):
    assert cli.main(["--plan", "--pp", "16", "--ep", "64"]) == 0
    out = capsys.readouterr().out
    assert "v3 on 1024 ranks, dualpipe, 32 micro-batches of 1 x 4096 tokens" in out
    assert "2 .. 13" in out and "…" not in out
    for bad, message in (
        (["--ep", "3"], "--ep is 3, expected a divisor of the 256 routed experts"),
        (["--pp", "3"], "dualpipe: got 3 ranks, expected an even number"),
        (["--dp", "0"], "--dp is 0, expected at least 1"),
        (["--pp", "80", "--pp-schedule", "1f1b"], "cannot cut 61 blocks into 80 stages"),
    ):
        assert cli.main(["--plan", *bad]) == 1
        assert message in capsys.readouterr().err
