"""The released layout on disk, and the model against transformers' DeepseekV3ForCausalLM."""

import dataclasses
import json
import struct

import pytest
import safetensors.torch
import torch
from model_helpers import SMALL, model_of

from dsv3_kernels.model import PRESETS, DeepSeekV3
from dsv3_kernels.model.config_json import PretrainedError, config_from_json, config_to_json
from dsv3_kernels.model.pretrained import from_pretrained, pieces, save_pretrained
from dsv3_kernels.nn import BF16, FP8, set_recipe, store_fp8_weights
from dsv3_kernels.quantize import dequantize, quantize_128x128

pytestmark = pytest.mark.usefixtures("seed")


# Against transformers

YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32}


def their_model(**changes):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    sizes = {name: getattr(SMALL, name) for name in vars(SMALL) if name != "rope_scaling"}
    sizes |= {"num_hidden_layers": 3, "num_key_value_heads": 2, "num_nextn_predict_layers": 0} | changes
    sizes["max_position_embeddings"] = 1280
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 4, "beta_slow": 2}},
        {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 2},
        {"rms_norm_eps": 1e-3, "routed_scaling_factor": 2.5, "rope_theta": 500.0},
    ],
)
def test_logits_gradients_and_files_agree_with_transformers(changes, tmp_path):
    theirs = their_model(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    set_recipe(ours, BF16)
    tokens = torch.randint(40, (2, 90))
    expected = theirs(tokens).logits
    got = ours(tokens)
    assert (got - expected).abs().max() <= 5e-5
    dy = torch.randn_like(expected) / expected.numel() ** 0.5
    expected.backward(dy)
    got.backward(dy)
    theirs_by_name = dict(theirs.named_parameters())
    for piece in pieces(ours.config):
        if ".experts." in piece.key or piece.parameter.endswith("gate.bias"):
            continue  # transformers stacks the experts too: below
        gradient = piece.of(ours.get_parameter(piece.parameter).grad)
        other = theirs_by_name[piece.key].grad
        assert (gradient - other).abs().max() <= 1e-4 * max(1, other.abs().max()), piece.key
    for i in range(1, 3):
        for name in ("gate_up_proj", "down_proj"):
            gradient = getattr(ours.blocks[i].mlp.experts, name).weight.grad
            other = getattr(theirs.model.layers[i].mlp.experts, name).grad
            assert (gradient - other).abs().max() <= 1e-4 * max(1, other.abs().max())

    save_pretrained(ours, tmp_path / "ours", shard_bytes=20_000)
    again = type(theirs).from_pretrained(tmp_path / "ours")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3


# Our own round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modules", [0, 1, 2])
def test_round_trip(tmp_path, dtype, modules):
    config = dataclasses.replace(SMALL, num_nextn_predict_layers=modules, n_shared_experts=modules)
    model = model_of(config, dtype=dtype)
    for gate in model.gates():
        gate.bias.normal_()
    save_pretrained(model, tmp_path / "m")
    again = from_pretrained(tmp_path / "m")
    assert again.config == config
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name


ALIGNED = dataclasses.replace(SMALL, q_lora_rank=128, intermediate_size=128, moe_intermediate_size=128)


def test_fp8_weights_stay_fp8(tmp_path):
    model = model_of(ALIGNED, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "fp8", fp8=True)
    quantized = from_pretrained(tmp_path / "fp8")
    weight = quantized.blocks[1].mlp.experts.gate_up_proj
    assert weight.weight.dtype == torch.float8_e4m3fn
    assert quantized.embedding.weight.dtype == quantized.blocks[1].mlp.gate.weight.dtype == torch.bfloat16
    exact = model.blocks[1].mlp.experts.gate_up_proj.weight.detach()
    for expert in range(8):
        halves = [dequantize(quantize_128x128(half), torch.bfloat16) for half in exact[expert].split(128)]
        assert torch.equal(weight.dequantized_weight()[expert], torch.cat(halves))
    save_pretrained(quantized, tmp_path / "again")
    first, second = (one_shard(tmp_path / name)[1] for name in ("fp8", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8)) for key in first)


def test_fp8_weights_compute_as_their_quantised_originals(tmp_path):
    """An FP8 layer quantises its weight at each call; one that is kept in FP8 must give the same bits."""
    model = model_of(ALIGNED, FP8, torch.bfloat16).eval()
    save_pretrained(model, tmp_path / "fp8", fp8=True)
    quantized = from_pretrained(tmp_path / "fp8")
    tokens = torch.randint(40, (2, 20))
    with torch.no_grad():
        expected = model(tokens)
        assert torch.equal(quantized(tokens), expected)
        set_recipe(quantized, BF16)
        quantized.float()  # all but the FP8 weights: in BF16 a near tie of two experts could go either way
        plain = quantized(tokens)
        assert not torch.equal(plain, expected)
        cache = quantized.new_cache(2, 20)
        parts = [quantized.decode(part, cache)[0] for part in tokens.split(5, 1)]
    assert (torch.cat(parts, 1) - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_weights_quantised_once_give_the_same_bits():
    model = model_of(SMALL, FP8, torch.bfloat16).eval()
    tokens = torch.randint(40, (2, 20))
    with torch.no_grad():
        expected = model(tokens)
        store_fp8_weights(model)
        assert model.blocks[1].mlp.experts.down_proj.weight.dtype == torch.float8_e4m3fn
        assert torch.equal(model(tokens), expected)


def test_a_cast_leaves_fp8_weights_alone(tmp_path):
    save_pretrained(model_of(ALIGNED, dtype=torch.bfloat16), tmp_path / "fp8", fp8=True)
    model = from_pretrained(tmp_path / "fp8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.float()
    for name, tensor in model.state_dict().items():
        if before[name].dtype == torch.float8_e4m3fn or name.endswith("_scale_inv"):
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
        else:
            assert tensor.dtype == torch.float32


def test_the_keys_of_deepseek_v3():
    """A handful of keys of the released index, and how many it has."""
    with torch.device("meta"):
        model = DeepSeekV3(PRESETS["v3"])
    table = list(pieces(model.config))
    keys = [piece.key for piece in table]
    assert len(set(keys)) == len(keys)
    tensors = model.state_dict()
    shapes = {piece.key: tuple(piece.of(tensors[piece.parameter]).shape) for piece in table}
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.2.mlp.up_proj.weight"] == (18432, 7168)
    assert {
        "model.layers.60.mlp.experts.255.down_proj.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.61.enorm.weight",
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
        "model.layers.61.mlp.shared_experts.gate_proj.weight",
    } <= set(keys)
    parameters = {name for name, _ in model.named_parameters()} | {
        name for name, _ in model.named_buffers() if name.endswith("gate.bias")
    }
    assert {piece.parameter for piece in table} == parameters


def test_config_json_of_the_released_model():
    content = config_to_json(PRESETS["v3"], quantized=True)
    assert config_from_json(content, "x") == PRESETS["v3"]
    assert content["rope_scaling"]["factor"] == 40
    assert content["quantization_config"]["weight_block_size"] == [128, 128]
    del content["num_nextn_predict_layers"]
    assert config_from_json(content, "x").num_nextn_predict_layers == 0


# Bad input


def saved(tmp_path, **changes):
    folder = tmp_path / "model"
    save_pretrained(model_of(dataclasses.replace(SMALL, **changes)), folder)
    return folder


def one_shard(folder):
    (path,) = folder.glob("*.safetensors")
    return path, safetensors.torch.load_file(path)


def test_all_wrong_keys_are_listed_at_once(tmp_path):
    folder = saved(tmp_path)
    path, tensors = one_shard(folder)
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.layers.7.extra"] = torch.zeros(2)
    tensors["lm_head.weight"] = torch.zeros(40, 63)
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int32)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(PretrainedError) as caught:
        from_pretrained(folder)
    for words in (
        "model.layers.0.mlp.up_proj.weight is missing",
        "model.layers.7.extra is unknown",
        "lm_head.weight has shape (40, 63), expected (40, 64)",
        "model.norm.weight has dtype torch.int32",
    ):
        assert words in str(caught.value)


def test_many_missing_keys_are_counted(tmp_path):
    folder = saved(tmp_path)
    path, tensors = one_shard(folder)
    safetensors.torch.save_file({"lm_head.weight": tensors["lm_head.weight"]}, path)
    with pytest.raises(PretrainedError, match=r"is missing.*, and \d+ more"):
        from_pretrained(folder)


def test_fp8_where_it_cannot_be(tmp_path):
    folder = saved(tmp_path)
    path, tensors = one_shard(folder)
    for key in ("model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"):
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] = torch.ones(1, 1)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(PretrainedError) as caught:
        from_pretrained(folder)
    for words in (
        "model.norm.weight is FP8, expected a wider float",
        "lm_head.weight_scale_inv is missing",
        "kv_a_proj_with_mqa.weight is FP8 from row 32 of a fused weight, expected a multiple of 128",
    ):
        assert words in str(caught.value)


def test_mixed_dtypes_of_one_parameter(tmp_path):
    folder = saved(tmp_path)
    path, tensors = one_shard(folder)
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[key] = tensors[key].bfloat16()
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(PretrainedError, match="expected torch.float32 as the other pieces"):
        from_pretrained(folder)


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 40) + b"{}",
        header({"lm_head.weight": {"dtype": "F32", "shape": [40, 64], "data_offsets": [0, 10240]}}),
        header(
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            }
        )
        + bytes(12),
        header({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 8]}}) + bytes(8),
        header({"a": {"dtype": "EVIL", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
        b"\x80\x04\x95cposix\nsystem\n",
    ],
    ids=[
        "empty",
        "garbage",
        "header past the file",
        "data past the file",
        "overlap",
        "overflow",
        "dtype",
        "pickle",
    ],
)
def test_hostile_files(tmp_path, content):
    folder = saved(tmp_path)
    path, _ = one_shard(folder)
    path.write_bytes(content)
    with pytest.raises(PretrainedError, match="cannot read .*safetensors"):
        from_pretrained(folder)


def test_an_index_that_leads_outside(tmp_path):
    folder = saved(tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    with pytest.raises(PretrainedError, match="'../secret.safetensors' is not the name of a file"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"model_type": "llama"}, "model_type is 'llama', expected 'deepseek_v3'"),
        ({"n_group": 3}, "n_group is 3"),
        ({"topk_group": 99}, "topk_group is 99, expected at most"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected an integer"),
        ({"hidden_size": True}, "hidden_size is True, expected an integer"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
        ({"q_lora_rank": None}, "q_lora_rank is None"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, expected num_attention_heads = 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "the rope type is 'linear', expected 'yarn'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            "original_max_position_embeddings of rope_scaling is",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 8}},
            "factor is 0.5",
        ),
        ({"rope_scaling": 7}, "rope_scaling is 7, expected an object"),
    ],
)
def test_impossible_configs(tmp_path, changes, message):
    folder = saved(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(PretrainedError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff"])
def test_damaged_config(tmp_path, content):
    folder = saved(tmp_path)
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(PretrainedError, match="config.json"):
        from_pretrained(folder)


def test_no_model_at_all(tmp_path):
    with pytest.raises(PretrainedError, match=r"cannot read .*config.json"):
        from_pretrained(tmp_path)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PretrainedError, match="is not empty. Mend: name a new folder"):
        save_pretrained(model_of(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
