"""Pipelines on gloo: losses and gradients are those of one process. One start of four ranks runs all."""

import json
import re
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from model_helpers import SMALL

from dsv3_kernels import ep
from dsv3_kernels.model import DeepSeekV3
from dsv3_kernels.nn import BF16, FP8
from dsv3_kernels.train.dualpipe import dualpipe
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.executor import LocalExecutor
from dsv3_kernels.train.pipeline import executor as pipeline
from dsv3_kernels.train.pipeline.actions import label as name_of
from dsv3_kernels.train.pipeline.executor import PipelineExecutor
from dsv3_kernels.train.pipeline.schedules import SCHEDULES
from dsv3_kernels.train.pipeline.stages import StageRunner

SIZE = 4
MTP_WEIGHT, BALANCE_WEIGHT = 0.3, 0.05
CONFIG = replace(SMALL, num_hidden_layers=7)
CASES = [(pp, name) for pp in (1, 2, 4) for name in ("1f1b", "zb1p", "dualpipe", "dualpipev")]
CASES.remove((1, "dualpipe"))


def model_of(seed, config=CONFIG, recipe=BF16, dtype=torch.float32, ep_buffer=None):
    model = DeepSeekV3(config, recipe, ep_buffer)
    model.initialize(seed)
    model.to(dtype)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    return model


def windows_of(seed, micro_batches, config=CONFIG):
    generator = torch.Generator().manual_seed(seed)
    length = 12 + 1 + config.num_nextn_predict_layers
    return torch.randint(0, config.vocab_size, (micro_batches, 2, length), generator=generator)


def outcome(executor, windows):
    """Losses and gradients, as tensors that a rank can hand over."""
    losses = executor.forward_backward(windows, MTP_WEIGHT, BALANCE_WEIGHT)
    module = executor.modules[0]
    result = {f"loss/{k}": v for k, v in vars(losses).items()}
    result |= {f"grad/{name}": p.grad for name, p in module.named_parameters()}
    result |= {f"evaluation/{n}": executor.window_losses(windows[0].repeat(n, 1)[:, :9]) for n in (1, 2)}
    return result | {f"load/{name}": b for name, b in module.named_buffers() if name.endswith("load")}


def groups():
    """The first ranks as a pipeline of 1, 2 or 4."""
    return {pp: dist.new_group(list(range(pp))) for pp in (1, 2, 4)}


def expert_parallel(rank, seed, results):
    """Two pipelines of two ranks whose experts are spread over both; each has micro-batches of its own."""
    pipelines = [dist.new_group([lane, lane + 2]) for lane in (0, 1)]
    experts = [dist.new_group([stage * 2, stage * 2 + 1]) for stage in (0, 1)]
    lane = rank % 2
    config = replace(CONFIG, num_hidden_layers=3)
    windows = windows_of(seed, 12, config)
    if rank == 0:
        results["ep/local"] = outcome(LocalExecutor(model_of(seed, config)), windows)
    for label, overlapped in (("ep/overlapped", True), ("ep/in turn", False)):
        buffer = ep.Buffer(
            experts[rank // 2], config.n_routed_experts, config.hidden_size, 24, 4, dtype=torch.float32
        )
        model = model_of(seed, config, ep_buffer=buffer)
        shares = {n: p for n, p in model.named_parameters() if ".experts." in n}
        executor = PipelineExecutor(model, "dualpipe", pipelines[lane], overlap=overlapped)
        result = outcome(executor, windows[6 * lane : 6 * lane + 6])
        for name, share in shares.items():  # whole tensors, zero but for this rank's experts
            if (grad := result.get(f"grad/{name}")) is not None:
                whole = torch.zeros(2 * share.shape[0], *share.shape[1:])
                whole[lane * share.shape[0] :][: share.shape[0]] = grad
                result[f"grad/{name}"] = whole
        results[label] = result


def outputs_alive(size, seed, group):
    """By schedule: the most bytes of outputs for other ranks that a rank holds as a backward begins, and the
    most micro-batches that wait for theirs.
    """
    made, most = [], {}

    class Watched(StageRunner):
        def forward(self, stage, window, hidden):
            output = super().forward(stage, window, hidden)
            if output.hidden is not None and (name, stage.index) != ("dualpipev", size - 1):
                made.append(weakref.ref(output.hidden.untyped_storage()))
            return output

    class Step(pipeline._Step):
        def _backward(self, work):
            alive = [storage.nbytes() for ref in made if (storage := ref()) is not None]
            now = sum(alive), len(self._graphs)
            most[name] = tuple(map(max, most.get(name, (0, 0)), now))
            super()._backward(work)

    with mock.patch.multiple(pipeline, StageRunner=Watched, _Step=Step):
        for name in SCHEDULES:
            made.clear()
            PipelineExecutor(model_of(seed), name, group).forward_backward(windows_of(seed, 12), 0.3, 0.0)
    return most


def matrix(rank, size, seed):
    by_size = groups()
    results = {}
    expert_parallel(rank, seed, results)
    micro_batches = 8
    for label, recipe, dtype in (("fp32", BF16, torch.float32), ("fp8", FP8, torch.bfloat16)):
        if rank == 0:
            local = LocalExecutor(model_of(seed, recipe=recipe, dtype=dtype))
            results[f"{label}/local"] = outcome(local, windows_of(seed, micro_batches))
        for pp, name in CASES:
            if rank < pp and (label == "fp32" or (pp == 4 and name != "1f1b")):
                model = model_of(seed, recipe=recipe, dtype=dtype)
                executor = PipelineExecutor(model, name, by_size[pp])
                results[f"replicated/{pp}/{name}"] = sorted(executor.replicated)
                results[f"{label}/{pp}/{name}"] = outcome(executor, windows_of(seed, micro_batches))
    results["outputs alive"] = outputs_alive(size, seed, by_size[4])
    # A step after a step, of another size, with gradients added up; and models with other ends.
    for label, config in (
        ("no mtp", replace(CONFIG, num_hidden_layers=5, num_nextn_predict_layers=0)),
        ("two mtp", replace(CONFIG, num_hidden_layers=3, num_nextn_predict_layers=2, mtp_post_norm=False)),
        ("dense", replace(CONFIG, num_hidden_layers=4, first_k_dense_replace=4, num_nextn_predict_layers=0)),
    ):
        executors = {"4/dualpipe": PipelineExecutor(model_of(seed, config), "dualpipe", by_size[4])}
        if rank == 0:
            executors["local"] = LocalExecutor(model_of(seed, config))
        for key, executor in executors.items():
            executor.forward_backward(windows_of(seed, 8, config), MTP_WEIGHT, BALANCE_WEIGHT)
            results[f"{label}/{key}"] = outcome(executor, windows_of(seed + 1, 12, config))
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    seed = int(torch.randint(1 << 30, ()))
    print(f"seed {seed}")
    return ranks.run(tmp_path_factory.mktemp("pipeline") / "ranks", SIZE, matrix, seed, seconds=600.0)


def summed(results, case):
    """Over the ranks of a pipeline: gradients and loads of all holders together."""
    total = {}
    for of_rank in results:
        for key, tensor in of_rank.get(case, {}).items():
            if key.startswith(("loss/", "evaluation/")):
                assert torch.equal(total.setdefault(key, tensor), tensor), "ranks report other losses"
            elif tensor is not None:
                total[key] = total[key] + tensor if key in total else tensor
    return total


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        norm = tensor.norm().item()
        assert norm > 0 or key in ("loss/mtp", "loss/balance") or key.startswith("load/"), key
        assert (got[key] - tensor).norm().item() <= 1e-5 * norm, key


@pytest.mark.parametrize(("pp", "name"), CASES)
def test_losses_and_gradients_in_fp32(results, pp, name):
    expected = results[0]["fp32/local"]
    assert_close(summed(results, f"fp32/{pp}/{name}"), expected)


@pytest.mark.parametrize("name", ["zb1p", "dualpipev"])
def test_fp8_is_bit_equal_where_sums_keep_their_order(results, name):
    """Each layer is on one rank and sees the micro-batches in order, but what MTP shares its two uses."""
    got, expected = summed(results, f"fp8/4/{name}"), results[0]["fp8/local"]
    assert_close(got, expected)
    for key, tensor in expected.items():
        shared = ("grad/embedding.weight", "grad/head.weight", "loss/balance")
        if key not in shared and not key.startswith("evaluation/"):
            assert torch.equal(got[key], tensor), key


def test_fp8_in_dualpipe(results):
    """Two copies of a layer share the micro-batches: the same addends, summed in another order."""
    assert_close(summed(results, "fp8/4/dualpipe"), results[0]["fp8/local"])


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_outputs_go_once_they_are_sent(results, name):
    """Of those that a rank sends to each neighbour two are there, however many wait for their backward."""
    state = 2 * 12 * CONFIG.hidden_size * 4
    found = [of_rank["outputs alive"][name] for of_rank in results]
    streams = 2 if name.startswith("dual") else 1
    print(found)
    assert all(held <= 2 * streams * state for held, _ in found)
    assert max(waiting for _, waiting in found) > 2 * streams
    assert max(held for held, _ in found) > 0


@pytest.mark.parametrize("label", ["no mtp", "two mtp", "dense"])
def test_other_models_and_a_second_step(results, label):
    assert_close(summed(results, f"{label}/4/dualpipe"), results[0][f"{label}/local"])


def test_overlapped_with_expert_parallel(results):
    """Overlapped or in turn: the same bits. And the mean over both pipelines is what one process has."""
    for rank, of_rank in enumerate(results):
        for key, tensor in of_rank["ep/in turn"].items():
            assert torch.equal(of_rank["ep/overlapped"][key], tensor), (rank, key)
    expected = results[0]["ep/local"]
    total = {}
    for lane in (0, 1):
        for key, tensor in summed(results[lane::2], "ep/overlapped").items():
            if key.startswith("evaluation/"):
                total.setdefault(key, tensor)  # of the first windows, the first pipeline's
            else:
                total[key] = total.get(key, 0) + (tensor if key.startswith("load/") else tensor / 2)
    assert_close(total, expected)


def test_each_parameter_is_where_it_should_be(results):
    for case in ("4/1f1b", "4/dualpipe", "4/dualpipev"):
        held = [{k for k in r[f"fp32/{case}"] if k.startswith("grad/")} for r in results]
        for rank in range(4):
            twice = {k.removeprefix("grad/") for k in held[rank] & held[3 - rank]}
            assert results[rank][f"replicated/{case}"] == sorted(twice)
    held = [{k for k, v in r["fp32/4/dualpipe"].items() if k.startswith("grad/")} for r in results]
    assert held[0] == held[3] and held[1] == held[2] and not held[0] & held[1]
    tied = [r["fp32/4/1f1b"].get("grad/embedding.weight") is not None for r in results]
    assert tied == [True, False, False, True]
    folded = ["grad/embedding.weight" in r["fp32/4/dualpipev"] for r in results]
    assert folded == [True, False, False, False]


def eight_ranks(rank, size, seed):
    config = replace(CONFIG, num_hidden_layers=15)
    results = {}
    for micro_batches in (16, 22, 40):
        windows = windows_of(seed, micro_batches, config)
        if rank == 0:
            results[f"local/{micro_batches}"] = outcome(LocalExecutor(model_of(seed, config)), windows)
        for name in SCHEDULES:
            executor = PipelineExecutor(model_of(seed, config), name, dist.group.WORLD)
            results[f"{name}/{micro_batches}"] = outcome(executor, windows)
    return results


@pytest.mark.long
def test_eight_ranks(tmp_path):
    seed = int(torch.randint(1 << 30, ()))
    print(f"seed {seed}")
    results = ranks.run(tmp_path / "ranks", 8, eight_ranks, seed, seconds=1800.0)
    for micro_batches in (16, 22, 40):
        for name in SCHEDULES:
            assert_close(summed(results, f"{name}/{micro_batches}"), results[0][f"local/{micro_batches}"])


# Traces and failures


def traced(rank, size, folder):
    executor = PipelineExecutor(model_of(3), "dualpipe", dist.group.WORLD)
    executor.trace = []
    executor.forward_backward(windows_of(3, 4), MTP_WEIGHT, BALANCE_WEIGHT)
    executor.write_trace(folder / "trace.json")


def one_leaves(rank, size):
    """Rank 1 leaves after the first step."""
    executor = PipelineExecutor(model_of(3), "1f1b", dist.group.WORLD)
    windows = windows_of(3, 4)
    executor.forward_backward(windows, MTP_WEIGHT, BALANCE_WEIGHT)
    if rank == 1:
        return ""
    with pytest.raises(TrainError) as caught:
        executor.forward_backward(windows, MTP_WEIGHT, BALANCE_WEIGHT)
    return str(caught.value)


def two_programs(rank, size, folder):
    traced(rank, size, folder)
    return one_leaves(rank, size)


def test_trace_and_a_rank_that_leaves(tmp_path):
    messages = ranks.run(tmp_path / "ranks", 2, two_programs, tmp_path)
    assert re.match(r"pipeline rank 0: rank 1 is gone or stalls; the (state|gradient) of micro-", messages[0])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in spans} == {0, 1} and all(e["dur"] >= 0 for e in spans)
    names = [[e["name"] for e in spans if e["pid"] == rank and e["name"][0] in "FBIW"] for rank in (0, 1)]
    for rank, actions in enumerate(dualpipe(2, 4).ranks):
        assert [n for n in names[rank] if " of " not in n] == [name_of(action) for action in actions]
        assert sum(" of " in n for n in names[rank]) == 4, "each rank waits for a state or a gradient of each"
