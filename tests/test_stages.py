"""The model cut into stages."""

from dataclasses import replace

import pytest
import torch
from model_helpers import SMALL, model_of

from dsv3_kernels.model import PRESETS
from dsv3_kernels.train.executor import LocalExecutor
from dsv3_kernels.train.pipeline.executor import PipelineExecutor
from dsv3_kernels.train.pipeline.stages import cut, split

WINDOW = torch.zeros(2, 2, 8, dtype=torch.int64)


def sizes(stages):
    return [len(stage.blocks) for stage in stages]


@pytest.mark.parametrize("layers", range(1, 20))
@pytest.mark.parametrize("mtp", [0, 1, 2])
def test_split_is_even_and_complete(layers, mtp):
    config = replace(SMALL, num_hidden_layers=layers, num_nextn_predict_layers=mtp)
    for count in range(1, layers + 1 + (mtp > 0)):
        stages = split(config, count)
        assert [i for stage in stages for i in stage.blocks] == list(range(layers))
        assert [s.first for s in stages] == [True] + [False] * (count - 1)
        assert [s.last for s in stages] == [False] * (count - 1) + [True]
        weights = sizes(stages)
        weights[-1] += mtp
        assert min(weights) >= 1
        assert max(weights) - min(weights) <= 1 or (weights[-1] == mtp and max(weights[:-1]) <= mtp)
    with pytest.raises(ValueError, match=rf"split: cannot cut {layers} blocks into {layers + 2} stages"):
        split(config, layers + 2)
    with pytest.raises(ValueError, match="into 0 stages"):
        split(config, 0)


def test_split_of_the_presets():
    assert sizes(split(PRESETS["tiny"], 4)) == [1, 1, 1, 0]
    assert sizes(split(PRESETS["mini"], 4)) == [4, 3, 3, 2]
    assert sizes(split(PRESETS["v3"], 16)) == [4] * 14 + [3, 2]
    with pytest.raises(ValueError, match=r"expected 1 to 4: .* and the MTP modules one more. Mend: fewer"):
        split(PRESETS["tiny"], 8)


def test_cut_keeps_names_and_frees_the_rest():
    config = replace(SMALL, num_hidden_layers=5)
    whole = dict(model_of(config).named_parameters())
    stages = split(config, 3)
    held = []
    for stage in stages:
        model = model_of(config)
        before = dict(model.named_parameters())
        kept = dict(cut(model, [stage]).named_parameters())
        assert all(kept[name] is before[name] for name in kept)
        assert len(list(model.gates())) == sum("gate.weight" in name for name in kept)
        held.append(set(kept))
    assert held[0] & held[2] == {"embedding.weight"} and not held[0] & held[1] and not held[1] & held[2]
    assert held[0] | held[1] | held[2] == set(whole)
    ends = cut(model_of(config), [stages[0], stages[2]])
    assert {n for n, _ in ends.named_parameters()} == held[0] | held[2]
    plain = replace(config, num_nextn_predict_layers=0)
    assert "embedding.weight" not in dict(cut(model_of(plain), [split(plain, 3)[2]]).named_parameters())


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipev"])
@pytest.mark.parametrize("mtp", [0, 2])
def test_one_rank_is_a_pipeline_too(name, mtp):
    """DualPipeV on one rank has two stages: what passes between them takes no message."""
    torch.manual_seed(seed := int(torch.randint(1 << 30, ())))
    print(f"seed {seed}")
    config = replace(SMALL, num_hidden_layers=3, num_nextn_predict_layers=mtp)
    model, again = model_of(config), model_of(config)
    again.load_state_dict(model.state_dict())
    windows = torch.randint(0, config.vocab_size, (5, 2, 12))
    expected = LocalExecutor(model).forward_backward(windows, 0.3, 0.02)
    got = PipelineExecutor(again, name).forward_backward(windows, 0.3, 0.02)
    for a, b in zip(vars(got).values(), vars(expected).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for (key, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6 * b.grad.abs().max().item(), msg=key)


def test_bad_calls():
    with pytest.raises(ValueError, match="schedule is 'gpipe', expected one of"):
        PipelineExecutor(model_of(), "gpipe")
    with pytest.raises(ValueError, match="got 1 ranks, expected an even number"):
        PipelineExecutor(model_of(), "dualpipe")
    with pytest.raises(ValueError, match=r"cannot cut 1 blocks into 2 stages, expected 1 to 1"):
        PipelineExecutor(
            model_of(replace(SMALL, num_hidden_layers=1, num_nextn_predict_layers=0)), "dualpipev"
        )
    for executor in (PipelineExecutor(model_of(), "dualpipev"), LocalExecutor(model_of())):
        for bad in (WINDOW[0], WINDOW.int(), WINDOW[:0], WINDOW[:, :, :0]):
            with pytest.raises(ValueError, match="forward_backward: windows is torch.int"):
                executor.forward_backward(bad, 0.3, 0.0)
    with pytest.raises(ValueError, match=r"dualpipev: got 1 micro-batches, expected at least 2"):
        PipelineExecutor(model_of(), "dualpipev").forward_backward(WINDOW[:1], 0.3, 0.0)
