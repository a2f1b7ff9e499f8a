"""Training on many processes against one: losses, gradients, weights. A single launch of 8 runs it all."""

import dataclasses
from typing import NamedTuple

import pytest
import ranks
import torch
import torch.distributed as dist
from fp8_helpers import fresh_generator
from model_helpers import BYTES

from dsv3_kernels.ep import Buffer
from dsv3_kernels.train.config import ParallelConfig, TrainConfig
from dsv3_kernels.train.data.corpus import load_corpus
from dsv3_kernels.train.observe.plan import plan
from dsv3_kernels.train.parallel.groups import Groups, Layout
from dsv3_kernels.train.trainer import Trainer

SMALL = dataclasses.replace(
    BYTES, num_hidden_layers=4, n_routed_experts=8, n_group=4, topk_group=2, initializer_range=0.05
)
STEPS = 3
PATIENCE = 600.0
"""Seconds; ranks wait for those that are in more cases, on a busy machine for minutes."""


class Case(NamedTuple):
    pp: int
    ep: int
    dp: int
    micro_batches: int = 1
    precision: str = "fp32"
    schedule: str = "dualpipe"
    saving: bool = False
    """Memory: activations made again, and an average of the weights."""

    @property
    def layout(self):
        return Layout(self.pp, self.ep, self.dp)


ONE = [*(Case(1, 1, 1, m) for m in (1, 2, 4)), *(Case(1, 1, 1, m, "fp8") for m in (2, 4))]
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
    Case(2, 2, 1, 4, saving=True),
    *(Case(pp, 1, dp, m, "fp8", saving=True) for pp, dp, m in ((1, 2, 1), (2, 1, 4))),
]
# Each goes on from what the one before has saved: four sequences are always added up in the same order.
ON = [Case(1, 1, 4), Case(1, 1, 1, 4), Case(1, 1, 4)]
# Each goes on from what the last of these has saved.
ELSEWHERE = [Case(1, 1, 1), Case(1, 2, 2), Case(2, 2, 1, 4), Case(4, 1, 2, 4, schedule="1f1b")]


class OverTheWire(Trainer):
    """Sends every token to its expert through the all-to-all, alone too: what travels is quantised."""

    def _buffer(self):
        tokens = self.config.batch_size * self.config.seq_len
        model = self.model_config
        sizes = (model.n_routed_experts, model.hidden_size, tokens, model.num_experts_per_tok)
        return Buffer(self.groups.experts or self.alone, *sizes, timeout=PATIENCE)


def trainer_of(case, groups, text, seed, model=SMALL, kind=Trainer):
    settings = TrainConfig(steps=STEPS, batch_size=8, seq_len=16, warmup_steps=1, lr=3e-3, seed=seed)
    if case.saving:
        settings = dataclasses.replace(settings, recompute=True, ema=0.75)
    return kind(
        model,
        settings,
        "fp8" if case.precision == "fp8" else "bf16",
        load_corpus(text, settings.seq_len + 2),
        ParallelConfig(case.pp, case.ep, case.micro_batches, case.schedule, timeout=PATIENCE),
        groups,
        dtype=torch.bfloat16 if case.precision == "fp8" else torch.float32,
    )


def state_of(trainer):
    """The pieces that this rank would save."""
    return {n: (p.values.clone(), p.first) for n, p in trainer._pieces(owned=True).items()}


def trained(case, groups, text, seed):
    """Of one rank: losses and gradient norms of some steps, its gradients of the first, its last weights."""
    trainer = trainer_of(case, groups, text, seed)
    trainer._forward_backward()
    trainer.optimizer.gather_gradients()
    gradients = {n: (p.values.clone(), p.first) for n, p in trainer.optimizer.gradients().items()}
    for gate in trainer.model.gates():
        gate.load.zero_()
    history, rows = {n: t.clone() for n, t in trainer.optimizer.masters().items()}, []
    for step in range(1, STEPS + 1):
        rows.append(dataclasses.astuple(trainer.train_step())[2:6])
        for n, master in trainer.optimizer.masters().items():
            history[n].lerp_(master, 1 - min(0.75, (1 + step) / (10 + step)))
    windows = trainer.corpus.validation[: 18 * 5].view(5, 18).long()
    validation, averaged = trainer.evaluate(windows), trainer.evaluate_average(windows)
    parameters = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return {
        "rows": rows,
        "validation": validation,
        "averaged": averaged,
        "history": {n: (t, trainer.optimizer.pieces()[f"master/{n}"].first) for n, t in history.items()},
        "gradients": gradients,
        "weights": state_of(trainer),
        "parameters": parameters,
        "held": held_by(trainer),
    }


def held_by(trainer):
    """Bytes, and elements of parameters: as `RankPlan` has them."""
    buckets = trainer.optimizer._buckets
    gradients = {
        g.untyped_storage().data_ptr(): g.untyped_storage() for b in buckets for g in (b._flat_grad, b.grad)
    }
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "masters": sum(b.master.nbytes for b in buckets),
        "moments": sum(b.exp_avg.nbytes + b.exp_avg_sq.nbytes for b in buckets),
        "gradients": sum(storage.nbytes() for storage in gradients.values()),
    }


def experts_in_fp8(ep, groups, text, seed):
    """Losses of a step and the gradients of the experts; all experts of a token are on one rank."""
    trainer = trainer_of(
        Case(1, ep, 1, 1, "fp8"), groups, text, seed, dataclasses.replace(SMALL, topk_group=1), OverTheWire
    )
    losses = trainer._forward_backward()
    trainer.optimizer.gather_gradients()
    gradients = trainer.optimizer.gradients().items()
    return {
        "losses": [losses.main.item(), losses.mtp.item(), losses.balance.item()],
        "gradients": {n: (p.values.clone(), p.first) for n, p in gradients if ".experts." in n},
    }


def resharded(case, groups, text, seed, folder, saves):
    """Goes on from the folder by a step, however many wrote it. What was loaded, and what came out."""
    trainer = trainer_of(case, groups, text, seed)
    if folder.exists():
        trainer.load(folder)
    loaded, step = state_of(trainer), trainer.step
    metrics = trainer.train_step()
    if saves:
        trainer.save(folder, keep=2)
        trainer.saver.wait()
    return {"loaded": loaded, "weights": state_of(trainer), "step": step, "loss": metrics.loss}


def everything(rank, size, text, seed, folder):
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
    OverTheWire.alone = new_group([0], "compute")
    for ep in (1, 2, 4):
        groups = Groups(Layout(ep=ep), rank, new_group)
        if rank < ep:
            results[f"fp8-{ep}"] = experts_in_fp8(ep, groups, text, seed)
    for index, case in enumerate([*ON, *ELSEWHERE]):
        groups = Groups(case.layout, rank, new_group)
        if rank < case.layout.world:
            results[f"on{index}"] = resharded(case, groups, text, seed, folder, saves=index < len(ON))
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def results(text, tmp_path_factory):
    seed = fresh_generator().initial_seed() % (1 << 20)
    print("seed", seed)
    folder = tmp_path_factory.mktemp("parallel")
    got = ranks.run(
        folder / "ranks", 8, everything, str(text), seed, folder / "checkpoints", seconds=PATIENCE
    )  # a busy machine is slow
    found = {
        case: [got[rank]["-".join(map(str, case))] for rank in range(case.layout.world)]
        for case in [*ONE, *MANY]
    }
    for index, case in enumerate([*ON, *ELSEWHERE]):
        found[index] = [got[rank][f"on{index}"] for rank in range(case.layout.world)]
    for ep in (1, 2, 4):
        found[f"fp8-{ep}"] = [got[rank][f"fp8-{ep}"] for rank in range(ep)]
    return found


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
    saving = "-saving" if case.saving else ""
    return f"pp{case.pp}-ep{case.ep}-dp{case.dp}-m{case.micro_batches}-{case.precision}{schedule}{saving}"


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
    return case.ep == case.pp == case.micro_batches == 1 and not case.saving


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


@pytest.mark.parametrize("case", [c for c in MANY if c.saving], ids=name)
def test_what_saves_memory_changes_no_bit(results, case):
    """Against the same processes that keep everything. The average is that of the masters' own history."""
    for part, plain in zip(results[case], results[case._replace(saving=False)], strict=True):
        assert part["rows"] == plain["rows"]
        assert part["validation"] == plain["validation"]
    for kind in ("gradients", "weights"):
        got, expected = (whole(results[c], kind) for c in (case, case._replace(saving=False)))
        assert got.keys() - expected.keys() == {n for n in got if n.startswith("ema/")}
        assert all(torch.equal(got[n], tensor) for n, tensor in expected.items())
    averages = whole(results[case], "history")
    got = whole(results[case], "weights")
    assert averages.keys() == {n.replace("master/", "") for n in got if n.startswith("master/")}
    assert all(torch.equal(got[f"ema/{n}"], tensor) for n, tensor in averages.items())
    (first, *others) = (part["averaged"] for part in results[case])
    assert first != results[case][0]["validation"]
    assert all(other == first for other in others)


@pytest.mark.parametrize("ep", [2, 4])
def test_experts_in_fp8_are_bit_equal_wherever_they_are(results, ep):
    """Where a token's experts share a rank combine rounds once, as alone; an expert's tokens have one order.

    Dense weights' gradients quantise each rank's own tokens, 128 at a time, and differ by that.
    """
    (one,) = results["fp8-1"]
    for part in results[f"fp8-{ep}"]:  # means over ranks of means over tokens
        assert part["losses"] == pytest.approx(one["losses"], rel=1e-6)
    got, expected = whole(results[f"fp8-{ep}"], "gradients"), whole([one], "gradients")
    assert got.keys() == expected.keys() and len(got) == 8
    assert all(torch.equal(got[n], expected[n]) for n in got)


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


@pytest.mark.parametrize("case", MANY, ids=name)
def test_optimizer_states_are_shared_out(results, case):
    """ZeRO-1: of the states of its parameters a rank keeps a part, as large as any other replica's."""
    parts = results[case]
    sizes = [sum(v.numel() for n, (v, _) in p["weights"].items() if n.startswith("master/")) for p in parts]
    held = [sum(p.numel() for p in part["parameters"].values()) for part in parts]
    total = sum(t.numel() for n, t in whole(parts, "weights").items() if n.startswith("master/"))
    assert sum(sizes) == total
    if case.pp == 1:
        experts = sum(v.numel() for n, v in parts[0]["parameters"].items() if ".experts." in n)
        expected = (held[0] - experts) / (case.ep * case.dp) + experts / case.dp
        assert max(sizes) <= expected + 2 * 64 * case.layout.world


@pytest.mark.parametrize("case", [*ONE, *MANY], ids=name)
def test_a_rank_holds_what_was_planned(results, case):
    ranks = plan(SMALL, case.layout, case.schedule, case.micro_batches, 1, 16)
    for rank, part in enumerate(results[case]):
        planned = ranks[rank // case.layout.shares]
        assert part["held"] == {kind: getattr(planned, kind) for kind in part["held"]}


def test_checkpoints_go_on_elsewhere_bit_for_bit(results):
    """A step each on 4 processes, 1 and 4 again, through checkpoints, are 3 steps of one process."""
    (one,) = results[Case(1, 1, 1, 4)]
    got, expected = whole(results[len(ON) - 1], "weights"), whole([one], "weights")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in got)
    assert [results[i][0]["step"] for i in range(len(ON))] == [0, 1, 2]


@pytest.mark.parametrize(
    "index", range(len(ON), len(ON) + len(ELSEWHERE)), ids=lambda i: name(ELSEWHERE[i - len(ON)])
)
def test_any_layout_reads_what_another_wrote(results, index):
    parts = results[index]
    got, saved = whole(parts, "loaded"), whole(results[len(ON) - 1], "weights")
    assert got.keys() == saved.keys()
    assert all(torch.equal(got[n], saved[n]) for n in got)
    (first,) = results[len(ON)]  # one process, which the loss of the next step is compared with
    assert all(part["loss"] == pytest.approx(first["loss"], rel=1e-5) for part in parts)
