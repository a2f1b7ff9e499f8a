"""python -m dsv3_kernels.generate: text from a trained model, as it is made."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_kernels.model import DeepSeekV3, Generator, Sampling, from_pretrained
from dsv3_kernels.nn import Fp8Recipe, set_recipe, store_fp8_weights
from dsv3_kernels.train.data.tokenizer import Bytes, FromFile, Tokenizer
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.state.trained import load_trained


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.generate",
        description="Continues a prompt with a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Without a GPU: the tiny model writes some hundred bytes a second, large ones take long.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="a run of python -m dsv3_kernels.train, or a model in the released layout (config.json, "
        "safetensors, tokenizer.json); by default the newest run in runs/",
    )
    parser.add_argument("--prompt", default="def ", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=120, help="how many to add")
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    group.add_argument(
        "--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability"
    )
    group.add_argument("--seed", type=int, default=0, help="of the draws")
    group.add_argument(
        "--speculative",
        action="store_true",
        help="draft every other token with the MTP module; the distribution stays the same",
    )
    group = parser.add_argument_group("precision")
    group.add_argument(
        "--precision",
        choices=("fp8", "bf16"),
        help="of the GEMMs, and of a run which of its weights; by default what the run trained in first, FP8 "
        "for a released model",
    )
    group.add_argument("--ema", action="store_true", help="of a run the average of its weights")
    return parser


def newest_run() -> Path:
    runs = [path.parent for path in Path("runs").glob("*/config.json")]
    if not runs:
        raise ValueError("runs/ holds no run. Mend: python -m dsv3_kernels.train, or name a folder")
    return max(runs, key=lambda run: (run / "config.json").stat().st_mtime)


def load(folder: Path, precision: Any, ema: bool = False) -> tuple[DeepSeekV3, Tokenizer, int]:
    """The model, its tokenizer, and how many positions it was trained on."""
    if (folder / "checkpoints").exists():
        model, config = load_trained(folder, precision, ema=ema)
        if (precision or config.precisions[0]) == "fp8":
            store_fp8_weights(model, power_of_2_scales=config.train.power_of_2_scales)
        path = folder / "tokenizer.json"
        return model, FromFile(path) if path.exists() else Bytes(), config.train.seq_len
    model = from_pretrained(folder)
    set_recipe(model, Fp8Recipe(precision or "fp8"))
    if precision != "bf16":
        store_fp8_weights(model)
    path = folder / "tokenizer.json"
    if path.exists():
        return model, FromFile(path), model.config.max_position_embeddings
    if model.config.vocab_size != 256:
        raise ValueError(f"{path} is missing, expected for a vocabulary of {model.config.vocab_size} tokens")
    return model, Bytes(), model.config.max_position_embeddings


def generate(arguments: argparse.Namespace) -> None:
    if arguments.tokens < 1:
        raise ValueError(f"--tokens is {arguments.tokens}, expected at least 1")
    sampling = Sampling(arguments.temperature, arguments.top_p)
    folder = arguments.folder or newest_run()
    model, tokenizer, trained = load(folder, arguments.precision, arguments.ema)
    generator = Generator(model, sampling, seed=arguments.seed, speculative=arguments.speculative)
    prompt = tokenizer.encode(arguments.prompt)
    tokens = generator.tokens(prompt, arguments.tokens)
    print(arguments.prompt, end="", flush=True)
    start = time.perf_counter()
    for text in tokenizer.stream(tokens):
        print(text, end="", flush=True)
    seconds = time.perf_counter() - start
    print(
        f"\n\n{folder}: {arguments.tokens} tokens, {arguments.tokens / seconds:.1f} tokens/s", file=sys.stderr
    )
    if arguments.speculative:
        speculation = generator.speculation
        print(
            f"{speculation.accepted} of {speculation.drafted} drafts accepted ({speculation.acceptance:.0%})",
            file=sys.stderr,
        )
    if len(prompt) + arguments.tokens > trained:
        print(f"It was trained on {trained} positions; what is past them is a guess.", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        generate(build_parser().parse_args(arguments))
        return 0
    except (TrainError, ValueError, OSError) as error:
        print(f"\ndsv3_kernels.generate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
