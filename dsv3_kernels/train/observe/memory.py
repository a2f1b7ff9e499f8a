"""python -m dsv3_kernels.train --memory-report: what each saving saves, measured.

Activations are what lives between the forward and the backward, counted by storages as they are made and
freed, so that nothing kept by whatever means is missed; on a GPU, by torch's allocator. What the states of a
parameter take is counted.
"""

import argparse
import dataclasses
import gc
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from dsv3_kernels.model import PRESETS, DeepSeekV3, ModelConfig
from dsv3_kernels.nn import Fp8Recipe, set_recipe
from dsv3_kernels.nn.recipe import RECOMPUTE

PLAIN = Fp8Recipe("fp8", swiglu_input="bf16", attention_output="fp8")
SAVINGS: dict[str, Fp8Recipe] = {
    "BF16 GEMMs": Fp8Recipe("bf16"),
    "FP8 GEMMs, their inputs kept in FP8": PLAIN,
    "+ SwiGLU again from its input in FP8": dataclasses.replace(PLAIN, swiglu_input="fp8"),
    "+ output of attention in 12 bits": Fp8Recipe("fp8"),
    "+ norms recomputed": Fp8Recipe("fp8", recompute=RECOMPUTE[:1]),
    "+ MLA up-projections recomputed": Fp8Recipe("fp8", recompute=RECOMPUTE[:2]),
    "+ transposed FP8 weights recomputed": Fp8Recipe("fp8", recompute=RECOMPUTE[:3]),
    "+ logits recomputed": Fp8Recipe("fp8", recompute=RECOMPUTE),
}
"""Each row has all that the rows above it have."""


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the storages made inside it that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = set()
        tree_map_only(Tensor, lambda t: known.add(_address(t)), (args, kwargs))
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda t: None if _address(t) in known else self._note(t), result)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen or tensor.is_meta:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Used:
    """Bytes: kept from the forward to the backward, and the most during both beyond what was there before."""

    kept: int
    peak: int


def measure(model: DeepSeekV3, window: Tensor) -> Used:
    """One forward and backward, gradients not counted. window: int64 [B, S + 1 + D], where the model is."""
    for parameter in model.parameters():  # from here on the backward adds in place
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or torch.float32)
    gc.collect()
    if window.device.type == "cuda":
        return _measure_on_gpu(model, window)
    memory = LiveMemory()
    with memory:
        loss = _loss(model, window)
        kept = memory.live
        loss.backward()
    return Used(kept, memory.peak)


def _measure_on_gpu(model: DeepSeekV3, window: Tensor) -> Used:
    _loss(model, window).backward()  # kernels are compiled and workspaces there
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = _loss(model, window)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return Used(kept, torch.cuda.max_memory_allocated() - before)


def _loss(model: DeepSeekV3, window: Tensor) -> Tensor:
    losses = model.losses(window)
    return losses.main + 0.3 * losses.mtp + 1e-4 * losses.balance


def build(config: ModelConfig, device: torch.device | str) -> DeepSeekV3:
    model = DeepSeekV3(config)
    model.initialize(0)
    model.to(device).bfloat16().train()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    return model


def report(
    config: ModelConfig, batch: int, seq_len: int, device: torch.device | str, console: Console, name: str
) -> dict[str, Used]:
    """Measures every row of SAVINGS on random tokens, prints the table, returns what it holds."""
    window = seq_len + 1 + config.num_nextn_predict_layers
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch, window), generator=generator).to(device)
    model = build(config, device)
    used = {}
    for row, recipe in SAVINGS.items():
        set_recipe(model, recipe)
        used[row] = measure(model, tokens)
    first = next(iter(used.values()))
    title = f"activations of {name}, {batch} x {seq_len} tokens, on {device}"
    table = Table(title=title, title_justify="left")
    for column in ("", "kept, MiB", "share", "peak, MiB", "share"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row, u in used.items():
        shares = f"{u.kept / first.kept:.0%}", f"{u.peak / first.peak:.0%}"
        table.add_row(row, _mebibytes(u.kept), shares[0], _mebibytes(u.peak), shares[1])
    console.print(table)
    _print_states(sum(p.numel() for p in model.parameters()), console)
    return used


def _print_states(count: int, console: Console) -> None:
    """Beside the BF16 weights, by arithmetic: masters, gradients and the average are FP32."""
    table = Table(title=f"states of its {count / 1e6:,.1f}M parameters, counted", title_justify="left")
    for column in ("", "plain, MiB", "saved, MiB", "how"):
        table.add_column(column, justify="right" if "MiB" in column else "left")
    rows = {
        "moments": (8.0, 4.0, "BF16 instead of FP32"),
        "average of the weights": (4.0, 0.0, "in CPU memory (--ema)"),
        "masters, gradients, moments": (12.0, 12.0 / 8, "ZeRO-1, on each of 8 ranks"),
    }
    for name, (plain, saved, how) in rows.items():
        table.add_row(name, _mebibytes(plain * count), _mebibytes(saved * count), how)
    console.print(table)


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.train --memory-report",
        description="Measures what each saving of memory saves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", choices=("tiny", "mini"), default="tiny", help="the model's sizes")
    parser.add_argument("--layers", type=int, help="take only so many of its layers")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens a sequence")
    return parser


def main(arguments: Sequence[str]) -> int:
    given = build_parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, name = PRESETS[given.preset], given.preset
    try:
        if given.layers is not None:
            config = dataclasses.replace(config, num_hidden_layers=given.layers)
            name = f"{given.layers} layers of {name}"
        if min(given.batch_size, given.seq_len) < 1 or given.seq_len > config.max_position_embeddings:
            raise ValueError(
                f"--batch-size is {given.batch_size} and --seq-len {given.seq_len}, expected at least 1, and "
                f"at most {config.max_position_embeddings} for --seq-len"
            )
        report(config, given.batch_size, given.seq_len, device, Console(), name)
    except ValueError as error:
        print(f"dsv3_kernels.train: {error}", file=sys.stderr)
        return 1
    return 0
