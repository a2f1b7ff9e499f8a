"""The model that a run trained, from its newest checkpoint."""

from pathlib import Path

import torch

from dsv3_kernels.model import DeepSeekV3
from dsv3_kernels.nn.recipe import Fp8Recipe, Precision
from dsv3_kernels.train.config import RunConfig, read_config
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.state.checkpoint import Checkpoint
from dsv3_kernels.train.state.optimizer import Piece


def load_trained(
    folder: Path, precision: Precision | None = None, *, ema: bool = False
) -> tuple[DeepSeekV3, RunConfig]:
    """The weights trained in `precision` (by default the run's first), in BF16 and its recipe.

    ema: their average instead. Whole in this process, however many wrote them. Raises TrainError where the
    folder holds no run, or none in that precision, or no average.
    """
    config = read_config(folder)
    chosen = precision or config.precisions[0]
    if chosen not in config.precisions:
        raise TrainError(f"{folder} trained in {' and '.join(config.precisions)}, expected {chosen}")
    if ema and config.train.ema is None:
        raise TrainError(f"{folder} keeps no average of its weights, expected one (--ema when it trained)")
    checkpoint = Checkpoint(folder / "checkpoints" / chosen)
    model = DeepSeekV3(config.model, Fp8Recipe(chosen, config.train.power_of_2_scales))
    kind = "ema" if ema else "master"
    targets = {f"{kind}/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    targets |= {f"buffer/{name}": b for name, b in model.state_dict().items() if name.endswith(".bias")}
    checkpoint.read({name: Piece(t.view(-1), 0, t.shape) for name, t in targets.items()}, None)
    return model.to(torch.bfloat16).eval(), config
