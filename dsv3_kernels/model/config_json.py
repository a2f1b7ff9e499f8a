"""ModelConfig to and from the config.json of a released model."""

import dataclasses
import math
from typing import Any

from dsv3_kernels.model.config import ModelConfig
from dsv3_kernels.model.rope import Yarn


class PretrainedError(ValueError):
    """A folder that does not hold a model of ours; the message says what is wrong with it."""


_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
"""What every model here is, whether its config.json says so or not."""

_SIZES = [
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.name not in ("rope_scaling", "rope_theta", "mtp_post_norm")
]
_ROPE_NAMES = {"rope_type", "type", "rope_theta"}


def config_from_json(content: dict[str, Any], where: str) -> ModelConfig:
    """Names that are not ours are ignored unless they change what the model computes."""
    for name, value in _FIXED.items():
        if content.get(name, value) != value:
            raise PretrainedError(f"{where}: {name} is {content[name]!r}, expected {value!r}")
    defaults = ModelConfig()
    sizes: dict[str, Any] = {}
    for name in _SIZES:
        if name == "num_nextn_predict_layers":
            value = content.get(name, content.get("num_mtp_layers", 0))
        elif name not in content:
            raise PretrainedError(f"{where}: {name} is missing")
        else:
            value = content[name]
        sizes[name] = _number(value, type(getattr(defaults, name)), f"{where}: {name}")
    heads = content.get("num_key_value_heads", sizes["num_attention_heads"])
    if heads not in (None, sizes["num_attention_heads"]):
        expected = sizes["num_attention_heads"]
        raise PretrainedError(
            f"{where}: num_key_value_heads is {heads!r}, expected num_attention_heads = {expected}"
        )
    theta, yarn = _rope(content, where)
    try:
        return ModelConfig(**sizes, rope_theta=theta, rope_scaling=yarn)
    except ValueError as error:
        raise PretrainedError(f"{where}: {error}") from error


def _number(value: Any, kind: type, where: str) -> Any:
    """An integer is taken for a float, a bool for neither."""
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        expected = "an integer" if kind is int else "a finite number"
        raise PretrainedError(f"{where} is {value!r}, expected {expected}")
    return value


def _rope(content: dict[str, Any], where: str) -> tuple[float, Yarn | None]:
    """Both spellings: rope_theta beside rope_scaling, as released, or all in rope_parameters."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise PretrainedError(f"{where}: rope_scaling is {rope!r}, expected an object")
    theta = rope.get("rope_theta", content.get("rope_theta", ModelConfig().rope_theta))
    theta = _number(theta, float, f"{where}: rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise PretrainedError(f"{where}: the rope type is {kind!r}, expected 'yarn' or 'default'")
    fields = {f.name: f for f in dataclasses.fields(Yarn)}
    unknown = [
        name for name in rope if name not in fields and name not in _ROPE_NAMES and rope[name] is not None
    ]
    if unknown:
        raise PretrainedError(
            f"{where}: {unknown[0]} of rope_scaling is unknown, expected {', '.join(fields)}"
        )
    for name in ("factor", "original_max_position_embeddings"):
        if rope.get(name) is None:
            raise PretrainedError(f"{where}: {name} of rope_scaling is missing")
    given = {name: rope[name] for name in fields if rope.get(name) is not None}
    kinds = {name: int if name == "original_max_position_embeddings" else float for name in fields}
    checked: dict[str, Any] = {n: _number(v, kinds[n], f"{where}: {n}") for n, v in given.items()}
    try:
        return theta, Yarn(**checked)
    except ValueError as error:
        raise PretrainedError(f"{where}: {error}") from error


def config_to_json(config: ModelConfig, *, quantized: bool) -> dict[str, Any]:
    """As released; `quantized` adds what tells a reader that linear weights are FP8 with 128x128 scales."""
    content: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"]} | _FIXED
    content |= {name: getattr(config, name) for name in _SIZES}
    content |= {"num_key_value_heads": config.num_attention_heads, "rope_theta": config.rope_theta}
    yarn = config.rope_scaling
    content["rope_scaling"] = {"type": "yarn"} | dataclasses.asdict(yarn) if yarn is not None else None
    if quantized:
        content["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    return content
