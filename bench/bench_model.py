"""A training step of the reference model: on a CPU `tiny` against transformers' DeepseekV3ForCausalLM, in one
run and with the same weights; with --gpu `mini` in FP8 against itself in BF16, step time and peak memory.

A step is forward, backward and AdamW (torch's own, for both). transformers has no multi-token prediction, so
ours runs without it there; with it, it is given beside. Losses are compared before anything is timed.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.report import Report, interleaved
from dsv3_kernels.model import PRESETS, DeepSeekV3, ModelConfig, save_pretrained
from dsv3_kernels.nn import BF16, FP8, Fp8Recipe

BATCH, LENGTH = 8, 128
MTP_WEIGHT = 0.3


def trained_by(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step, which returns the loss before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def our_step(
    config: ModelConfig, recipe: Fp8Recipe, dtype: torch.dtype, window: Tensor
) -> Callable[[], Tensor]:
    """window: [B, S + 1 + D], as `DeepSeekV3.losses` takes it."""
    model = DeepSeekV3(config, recipe)
    model.initialize(0)
    model.to(device=window.device, dtype=dtype)

    def loss() -> Tensor:
        losses = model.losses(window)
        return losses.main + MTP_WEIGHT * losses.mtp

    return trained_by(model, loss)


def their_step(config: ModelConfig, dtype: torch.dtype, window: Tensor) -> Callable[[], Tensor]:
    """transformers' model with the weights that `our_step` draws. Raises ImportError without transformers."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        ours = DeepSeekV3(config)
        ours.initialize(0)
        save_pretrained(ours, Path(folder) / "model")
        model = transformers.DeepseekV3ForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
    model.train()

    def loss() -> Tensor:
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())

    return trained_by(model, loss)


def cpu(report: Report, seconds: float) -> None:
    tiny = PRESETS["tiny"]
    alone = replace(tiny, num_nextn_predict_layers=0)
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(tiny.vocab_size, (BATCH, LENGTH + 2), generator=generator)
    tokens = BATCH * LENGTH
    for name, dtype in (("FP32", torch.float32), ("BF16", torch.bfloat16)):
        steps = {"ours": our_step(alone, BF16, dtype, window[:, :-1])}
        try:
            steps["transformers"] = their_step(alone, dtype, window[:, :-1])
        except ImportError as error:
            print(report.note(f"tiny step, {name}, transformers", f"left out: {error}"))
        if dtype == torch.bfloat16:
            steps |= {
                "ours in FP8": our_step(alone, FP8, dtype, window[:, :-1]),
                "ours with MTP": our_step(tiny, BF16, dtype, window),
                "ours with MTP in FP8": our_step(tiny, FP8, dtype, window),
            }
        losses = [step().item() for step in steps.values()]
        if any(abs(loss / losses[0] - 1) > 0.01 for loss in losses[:2]):
            raise RuntimeError(f"the models differ: losses of the same weights are {losses[:2]}")
        times = dict(zip(steps, interleaved(*steps.values(), seconds=seconds), strict=True))
        for who, taken in times.items():
            facts: dict[str, object] = {"tokens_per_s": tokens / min(taken)}
            if who == "ours" and "transformers" in times:
                facts |= {
                    "peer": "transformers",
                    "speed_against_peer": min(times["transformers"]) / min(taken),
                }
            print(report.add(f"tiny step, {name}, {who}", taken, **facts))


def gpu(report: Report, seconds: float) -> None:
    """Step time by CUDA events, the two precisions in turn; peak memory of each alone."""
    from bench.gpu_timing import ColdTimer

    mini = PRESETS["mini"]
    tokens = BATCH * 1024
    window = torch.randint(mini.vocab_size, (BATCH, 1024 + 2), device="cuda")
    peaks = {}
    recipes = {"FP8": FP8, "BF16": BF16}
    for name, recipe in recipes.items():
        step = our_step(mini, recipe, torch.bfloat16, window)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        del step
        torch.cuda.empty_cache()
    steps = {
        name: our_step(mini, recipe, torch.bfloat16, window)
        for name, recipe in (("FP8", FP8), ("BF16", BF16))
    }
    times = ColdTimer().measure(steps, seconds)
    for name, taken in times.items():
        facts = {"tokens_per_s": tokens / min(taken), "peak_gib": peaks[name]}
        if name == "FP8":
            facts["speed_against_peer"] = min(times["BF16"]) / min(taken)
        print(report.add(f"mini step, {name}", taken, **facts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="`mini` on the GPU instead")
    parser.add_argument("--seconds", type=float, default=20.0, help="a group of candidates (default 20)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, help="where to write the JSON (default runs/bench/model.json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.gpu and not torch.cuda.is_available():
        raise SystemExit("bench of model: found no CUDA device, or torch is a CPU build")
    report = Report("model-gpu" if options.gpu else "model")
    (gpu if options.gpu else cpu)(report, options.seconds)
    print(f"written: {report.write(options.out)}")


if __name__ == "__main__":
    sys.exit(main())
