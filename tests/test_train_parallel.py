"""Training on many processes against one: losses, gradients, weights. A single launch of 8 runs it all."""

import dataclasses
from typing import NamedTuple

import pytest
import ranks
import torch
import torch.distributed as dist
from fp8_helpers import fresh_generator

from dsv3_kernels.model import ModelConfig
from dsv3_kernels.train.config import ParallelConfig, TrainConfig
from dsv3_kernels.train.data import load_corpus
from dsv3_kernels.train.parallel import Groups, Layout
from dsv3_kernels.train.trainer import Trainer

SMALL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    max_position_embeddings=64,
    initializer_range=0.05,
)
STEPS = 3


class Case(NamedTuple):
    pp: int
    ep: int
    dp: int
    micro_batches: int = 1
    precision: str = "fp32"
    schedule: str = "dualpipe"

    @property
    def layout(self):
        return Layout(self.pp, self.ep, self.dp)


ONE = [Case(1, 1, 1, m, p) for p in ("fp32", "fp8") for m in (1, 2, 4)]
MANY = [
    *(Case(1, ep, dp) for ep in (1, 2, 4) for dp in (1, 2) if ep * dp > 1),
    Case(1, 1, 4),
    Case(1, 2, 2, micro_batches=2),
    *(Case(1, 1, dp, 1, "fp8") for dp in (2, 4)),
    Case(2, 1, 1, 4),
    Case(2, 2, 1, 4),
    Case(2, 1, 2, 4),
    Case(4, 1, 1, 8),
    Case(4, 2, 1, 4, schedule="zb1p"),
    Case(2, 2, 2, 2, schedule="1f1b"),
    Case(2, 2, 1, 4, schedule="dualpipev"),
    Case(2, 1, 1, 4, "fp8", "1f1b"),
    Case(2, 1, 1, 4, "fp8"),
]


def trained(case, groups, text, seed):
    """Of one rank: losses and gradient norms of some steps, its gradients of the first, its last weights."""
    settings = TrainConfig(steps=STEPS, batch_size=8, seq_len=16, warmup_steps=1, lr=3e-3, seed=seed)
    trainer = Trainer(
        SMALL,
        settings,
        "fp8" if case.precision == "fp8" else "bf16",
        load_corpus(text, settings.seq_len + 2),
        ParallelConfig(case.pp, case.ep, case.micro_batches, case.schedule, timeout=120),
        groups,
        dtype=torch.bfloat16 if case.precision == "fp8" else torch.float32,
    )
    trainer._forward_backward()
    trainer.optimizer.gather_gradients()
    gradients = {n: (p.values.clone(), p.first) for n, p in trainer.optimizer.gradients().items()}
    for gate in trainer.model.gates():
        gate.load.zero_()
    rows = [dataclasses.astuple(trainer.train_step())[2:6] for _ in range(STEPS)]
    validation = trainer.evaluate(trainer.corpus.validation[: 18 * 5].view(5, 18).long())
    weights = {n: (p.values.clone(), p.first) for n, p in trainer._pieces(owned=True).items()}
    parameters = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return {
        "rows": rows,
        "validation": validation,
        "gradients": gradients,
        "weights": weights,
        "parameters": parameters,
    }


def everything(rank, size, text, seed):
    made = {}

    def new_group(members, purpose):
        key = (purpose == "saving", *members)
        if key not in made:
            made[key] = dist.new_group(members)
        return made[key]

    results = {}
    for case in [*ONE, *MANY]:
        groups = Groups(case.layout, rank, new_group)
        if rank < case.layout.world:
            results["-".join(map(str, case))] = trained(case, groups, text, seed)
    return results


@pytest.fixture(scope="module")
def results(text, tmp_path_factory):
    seed = fresh_generator().initial_seed() % (1 << 20)
    print("seed", seed)
    got = ranks.run(tmp_path_factory.mktemp("parallel") / "ranks", 8, everything, str(text), seed)
    return {
        case: [got[rank]["-".join(map(str, case))] for rank in range(case.layout.world)]
        for case in [*ONE, *MANY]
    }


def whole(parts, kind):
    """The tensors of all ranks together; each element must be there once."""
    found = {}
    for part in parts:
        for name, (values, first) in part[kind].items():
            found.setdefault(name, []).append((first, values))
    joined = {}
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: piece[0])
        assert [first for first, _ in pieces] == [
            sum(v.numel() for _, v in pieces[:i]) for i in range(len(pieces))
        ]
        joined[name] = torch.cat([v.flatten() for _, v in pieces])
    return joined


def assert_close(got, expected, bound=1e-5):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        error, scale = (tensor.double() - expected[name].double()).abs().max(), expected[name].abs().max()
        assert error <= bound * scale, f"{name}: {error} of {scale}"


def name(case):
    schedule = f"-{case.schedule}" if case.pp > 1 else ""
    return f"pp{case.pp}-ep{case.ep}-dp{case.dp}-m{case.micro_batches}-{case.precision}{schedule}"


@pytest.mark.parametrize("case", [c for c in MANY if c.precision == "fp32"], ids=name)
def test_equals_one_process_in_fp32(results, case):
    (one,) = results[Case(1, 1, 1)]
    for part in results[case]:
        assert part["rows"] == results[case][0]["rows"]
        assert part["validation"] == pytest.approx(one["validation"], rel=1e-5)
        for row, expected in zip(part["rows"], one["rows"], strict=True):
            assert row == pytest.approx(expected, rel=1e-5)
    assert_close(whole(results[case], "gradients"), whole([one], "gradients"))


def is_ordered(case):
    """Whether gradients are added in the order of sequences, as one process adds those of micro-batches."""
    return case.ep == case.pp == case.micro_batches == 1


@pytest.mark.parametrize("case", list(filter(is_ordered, MANY)), ids=name)
def test_is_bit_equal_where_sums_keep_their_order(results, case):
    (one,) = results[Case(1, 1, 1, case.dp * case.micro_batches, case.precision)]
    got, expected = whole(results[case], "gradients"), whole([one], "gradients")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    got, expected = whole(results[case], "weights"), whole([one], "weights")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    for part in results[case]:
        assert all(torch.equal(p, one["parameters"][n]) for n, p in part["parameters"].items())
        assert [row[3] for row in part["rows"]] == [row[3] for row in one["rows"]]


@pytest.mark.parametrize("case", [c for c in MANY if c.precision == "fp8" and c.pp > 1], ids=name)
def test_a_pipeline_in_fp8_computes_what_one_process_does(results, case):
    """The same codes everywhere: only sums over uses, directions and micro-batches have another order."""
    (one,) = results[Case(1, 1, 1, case.micro_batches, "fp8")]
    for part in results[case]:
        assert part["rows"][0][:3] == pytest.approx(one["rows"][0][:3], rel=1e-6)
    assert_close(whole(results[case], "gradients"), whole([one], "gradients"))


@pytest.mark.parametrize("case", MANY, ids=name)
def test_replicas_hold_the_same_weights(results, case):
    """Bit for bit: every rank's parameters are what the shares of all ranks say."""
    masters = whole(results[case], "weights")
    for rank, part in enumerate(results[case]):
        for n, parameter in part["parameters"].items():
            master = masters[f"master/{n}"]
            if parameter.numel() < master.numel():  # experts
                first = rank % case.ep * parameter.numel()
                master = master[first : first + parameter.numel()]
            assert torch.equal(parameter.flatten(), master.to(parameter.dtype))
