"""python -m dsv3_kernels.train.export RUN FOLDER: a trained model in the released layout."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dsv3_kernels.model import save_pretrained
from dsv3_kernels.model.pretrained import PretrainedError
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.state.trained import load_trained


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.train.export",
        description="Writes the newest checkpoint of a run as config.json and safetensors under the names of "
        "the released DeepSeek-V3, which `transformers` loads.",
    )
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("folder", type=Path, help="where to; new, or empty")
    parser.add_argument(
        "--precision", choices=["fp8", "bf16"], help="which of the run's (default: its first)"
    )
    parser.add_argument(
        "--fp8",
        action="store_true",
        help="linear layers in e4m3 with 128x128 scales, as released (default: BF16)",
    )
    parser.add_argument("--ema", action="store_true", help="the average of the weights (default: the last)")
    options = parser.parse_args(arguments)
    try:
        model, _ = load_trained(options.run, options.precision, ema=options.ema)
        save_pretrained(model, options.folder, fp8=options.fp8)
    except (TrainError, PretrainedError, OSError) as error:
        print(f"dsv3_kernels.train.export: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
