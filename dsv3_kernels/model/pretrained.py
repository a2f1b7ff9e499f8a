"""Models on disk as DeepSeek-V3 is released: config.json, sharded safetensors, per-expert keys.

A released key is a piece of one of our parameters, since ours stack the experts and fuse projections that
read the same input; `pieces` is the whole table of it. FP8 weights come with their 128x128 scales under
`<key>_scale_inv` and stay FP8. Nothing is ever unpickled or evaluated.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsv3_kernels.checks import ceil_div
from dsv3_kernels.model.config import ModelConfig
from dsv3_kernels.model.config_json import PretrainedError, config_from_json, config_to_json
from dsv3_kernels.model.model import DeepSeekV3
from dsv3_kernels.nn import Fp8Linear, GroupedFp8Linear
from dsv3_kernels.quantize import quantize_128x128
from dsv3_kernels.quantized import TILE

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALES = "_scale_inv"
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Piece:
    """Key `key` of the files is rows `rows` of `parameter`, of its expert `expert` where it stacks them."""

    key: str
    parameter: str
    rows: tuple[int, int | None] = (0, None)
    expert: int | None = None
    copy: bool = False
    """A second name of what another key holds (the MTP module's embedding and head): written, not read."""

    def of(self, tensor: Tensor, block: int = 1) -> Tensor:
        """The view of it; with block 128, of the parameter's scales."""
        first, end = self.rows
        rows = slice(first // block, None if end is None else ceil_div(end, block))
        return (tensor if self.expert is None else tensor[self.expert])[rows]


def pieces(config: ModelConfig) -> Iterator[Piece]:
    yield Piece("model.embed_tokens.weight", "embedding.weight")
    yield Piece("model.norm.weight", "norm.weight")
    yield Piece("lm_head.weight", "head.weight")
    for i in range(config.num_hidden_layers):
        yield from _block(f"model.layers.{i}", f"blocks.{i}", config, i < config.first_k_dense_replace)
    for k in range(config.num_nextn_predict_layers):
        theirs, ours = f"model.layers.{config.num_hidden_layers + k}", f"mtp.{k}"
        yield Piece(f"{theirs}.embed_tokens.weight", "embedding.weight", copy=True)
        yield Piece(f"{theirs}.shared_head.head.weight", "head.weight", copy=True)
        for key, name in (
            ("enorm", "embedding_norm"),
            ("hnorm", "hidden_norm"),
            ("eh_proj", "eh_proj"),
            ("shared_head.norm", "norm"),
        ):
            yield Piece(f"{theirs}.{key}.weight", f"{ours}.{name}.weight")
        yield from _block(theirs, f"{ours}.block", config, dense=False)


def _block(theirs: str, ours: str, config: ModelConfig, dense: bool) -> Iterator[Piece]:
    for key, name in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "mlp_norm"),
        ("self_attn.q_a_layernorm", "attention.q_a_norm"),
        ("self_attn.q_b_proj", "attention.q_b_proj"),
        ("self_attn.kv_a_layernorm", "attention.kv_a_norm"),
        ("self_attn.kv_b_proj", "attention.kv_b_proj"),
        ("self_attn.o_proj", "attention.o_proj"),
    ):
        yield Piece(f"{theirs}.{key}.weight", f"{ours}.{name}.weight")
    q, kv = config.q_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim
    latents = f"{ours}.attention.qkv_a_proj.weight"
    yield Piece(f"{theirs}.self_attn.q_a_proj.weight", latents, (0, q))
    yield Piece(f"{theirs}.self_attn.kv_a_proj_with_mqa.weight", latents, (q, q + kv))
    if dense:
        yield from _mlp(f"{theirs}.mlp", f"{ours}.mlp", config.intermediate_size)
        return
    yield Piece(f"{theirs}.mlp.gate.weight", f"{ours}.mlp.gate.weight")
    yield Piece(f"{theirs}.mlp.gate.e_score_correction_bias", f"{ours}.mlp.gate.bias")
    inner = config.moe_intermediate_size
    if config.n_shared_experts:
        shared = inner * config.n_shared_experts
        yield from _mlp(f"{theirs}.mlp.shared_experts", f"{ours}.mlp.shared_experts", shared)
    for expert in range(config.n_routed_experts):
        yield from _mlp(f"{theirs}.mlp.experts.{expert}", f"{ours}.mlp.experts", inner, expert)


def _mlp(theirs: str, ours: str, inner: int, expert: int | None = None) -> Iterator[Piece]:
    gate_up = f"{ours}.gate_up_proj.weight"
    yield Piece(f"{theirs}.gate_proj.weight", gate_up, (0, inner), expert)
    yield Piece(f"{theirs}.up_proj.weight", gate_up, (inner, 2 * inner), expert)
    yield Piece(f"{theirs}.down_proj.weight", f"{ours}.down_proj.weight", expert=expert)


# Loading


@dataclass(frozen=True)
class _Stored:
    shard: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def from_pretrained(folder: Path | str) -> DeepSeekV3:
    """The model in a folder, each weight in the dtype it is stored in.

    Shards are read one at a time through a memory map, straight into the parameters: no second copy. FP8
    weights stay FP8 with their scales: such a model computes and generates, but does not train.
    Raises PretrainedError, which lists every key that is missing, unknown or of another shape, before any
    weight is read.
    """
    folder = Path(folder)
    config = config_from_json(_json(folder / "config.json"), str(folder / "config.json"))
    stored = _stored(folder)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    table = list(pieces(config))
    _compare(model, table, stored, folder)
    tensors = _allocate(model, table, stored)
    by_shard: dict[Path, list[tuple[str, Tensor]]] = {}
    for piece in table:
        if piece.copy:
            continue
        targets = {piece.key: piece.of(tensors[piece.parameter])}
        if piece.key + SCALES in stored:
            targets[piece.key + SCALES] = piece.of(tensors[piece.parameter + SCALES], TILE)
        for key, target in targets.items():
            by_shard.setdefault(stored[key].shard, []).append((key, target))
    for shard, targets_of_shard in by_shard.items():
        try:
            with safe_open(shard, "pt") as file:
                for key, target in targets_of_shard:
                    target.copy_(file.get_tensor(key))
        except (OSError, SafetensorError) as error:
            raise PretrainedError(f"cannot read {shard}: {error}") from error
    return model.eval()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PretrainedError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise PretrainedError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _stored(folder: Path) -> dict[str, _Stored]:
    """What the headers of all shards say."""
    if (folder / INDEX).exists():
        weight_map = _json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise PretrainedError(f"{folder / INDEX}: weight_map must give each key the name of a file")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise PretrainedError(f"{folder / INDEX}: {outside[0]!r} is not the name of a file in the folder")
    else:
        names = [SINGLE]
    stored: dict[str, _Stored] = {}
    for name in names:
        shard = folder / name
        try:
            with safe_open(shard, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(key)
                    dtype = safetensors.torch._TYPES.get(part.get_dtype())
                    if dtype is None:
                        raise PretrainedError(f"{shard}: {key} has the unknown dtype {part.get_dtype()}")
                    stored[key] = _Stored(shard, tuple(part.get_shape()), dtype)
        except (OSError, SafetensorError) as error:
            raise PretrainedError(f"cannot read {shard}: {error}") from error
    return stored


def _compare(model: DeepSeekV3, table: list[Piece], stored: dict[str, _Stored], folder: Path) -> None:
    tensors = model.state_dict()
    wrong = []
    known = set()
    for piece in table:
        shape = tuple(piece.of(tensors[piece.parameter]).shape)
        known.add(piece.key)
        found = stored.get(piece.key)
        if found is None:
            if not piece.copy:
                wrong.append(f"{piece.key} is missing")
            continue
        if found.shape != shape:
            wrong.append(f"{piece.key} has shape {found.shape}, expected {shape}")
        if found.dtype == torch.float8_e4m3fn:
            known.add(piece.key + SCALES)
            wrong += _wrong_scales(piece, stored.get(piece.key + SCALES), shape)
        elif not found.dtype.is_floating_point or found.dtype.itemsize < 2:
            wrong.append(f"{piece.key} has dtype {found.dtype}, expected float8_e4m3fn or a wider float")
    wrong += [f"{key} is unknown" for key in stored if key not in known]
    if wrong:
        more = f", and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise PretrainedError(
            f"{folder} does not hold the model of its config.json: {'; '.join(wrong[:20])}{more}"
        )


def _wrong_scales(piece: Piece, found: _Stored | None, shape: tuple[int, ...]) -> list[str]:
    if len(shape) != 2:
        return [f"{piece.key} is FP8, expected a wider float"]
    expected = (ceil_div(shape[0], TILE), ceil_div(shape[1], TILE))
    if found is None:
        return [f"{piece.key}{SCALES} is missing"]
    if found.shape != expected or found.dtype != torch.float32:
        return [f"{piece.key}{SCALES} is {found.dtype} {found.shape}, expected torch.float32 {expected}"]
    if piece.rows[0] % TILE:
        first = piece.rows[0]
        return [f"{piece.key} is FP8 from row {first} of a fused weight, expected a multiple of {TILE}"]
    return []


def _allocate(model: DeepSeekV3, table: list[Piece], stored: dict[str, _Stored]) -> dict[str, Tensor]:
    """Gives every parameter and buffer memory, in the dtype of its pieces."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in table:
        if piece.copy:
            continue
        dtype = stored[piece.key].dtype
        expected = dtypes.setdefault(piece.parameter, dtype)
        if dtype != expected:
            raise PretrainedError(
                f"{piece.key} is {dtype}, expected {expected} as the other pieces of {piece.parameter}"
            )
    for name, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            dtype = dtypes[f"{name}.{own}" if name else own]
            if dtype == torch.float8_e4m3fn:
                if not isinstance(module, (Fp8Linear, GroupedFp8Linear)):
                    raise PretrainedError(f"{name}.{own} is FP8, expected a wider float: it is no FP8 layer")
                blocks = (ceil_div(size, TILE) for size in parameter.shape[-2:])
                scales = torch.empty(*parameter.shape[:-2], *blocks)
                module.hold_fp8_weight(torch.empty(parameter.shape, dtype=dtype), scales)
            else:
                setattr(module, own, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        for own, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, own, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


# Saving


def save_pretrained(
    model: DeepSeekV3, folder: Path | str, *, fp8: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the model in the released layout, each weight in the dtype it has.

    folder: made; must not exist or be empty. fp8: the linear layers' weights are quantised to e4m3 with
    128x128 scales, as released. Raises PretrainedError where the folder holds something or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise PretrainedError(f"{folder} is not empty. Mend: name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = _write_shards(model, folder, fp8, shard_bytes)
        config = config_to_json(model.config, quantized=fp8 or _holds_fp8(model))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise PretrainedError(f"cannot write {folder}: {error}") from error


def _holds_fp8(model: DeepSeekV3) -> bool:
    return any(p.dtype == torch.float8_e4m3fn for p in model.parameters())


def _write_shards(model: DeepSeekV3, folder: Path, fp8: bool, shard_bytes: int) -> dict[str, str]:
    """Returns the name of the file of each key."""
    written: list[list[str]] = []
    shard: dict[str, Tensor] = {}

    def name_of(number: int) -> Path:
        return folder / f".part-{number:05d}.safetensors"

    def flush() -> None:
        safetensors.torch.save_file(shard, name_of(len(written)), metadata={"format": "pt"})
        written.append(list(shard))
        shard.clear()

    for key, tensor in _tensors(model, fp8):
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[key] = tensor
    flush()
    names: dict[str, str] = {}
    for number, keys in enumerate(written):
        final = folder / f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        name_of(number).rename(final)
        names |= dict.fromkeys(keys, final.name)
    return names


def _tensors(model: DeepSeekV3, fp8: bool) -> Iterator[tuple[str, Tensor]]:
    tensors = model.state_dict()
    quantizable = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (Fp8Linear, GroupedFp8Linear))
    }
    for piece in pieces(model.config):
        tensor = piece.of(tensors[piece.parameter])
        scales = tensors.get(piece.parameter + SCALES)
        if scales is not None:
            yield piece.key, tensor.clone()
            yield piece.key + SCALES, piece.of(scales, TILE).clone()
        elif fp8 and piece.parameter in quantizable:
            quantized = quantize_128x128(tensor.contiguous())
            yield piece.key, quantized.data
            yield piece.key + SCALES, quantized.scales
        else:
            yield piece.key, tensor.clone()
