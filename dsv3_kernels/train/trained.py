"""The model that a run trained, from its newest checkpoint."""

from pathlib import Path

import torch

from dsv3_kernels.model import DeepSeekV3
from dsv3_kernels.nn.recipe import Fp8Recipe, Precision
from dsv3_kernels.train import checkpoint
from dsv3_kernels.train.config import RunConfig
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.run import read_config


def load_trained(folder: Path, precision: Precision | None = None) -> tuple[DeepSeekV3, RunConfig]:
    """The weights that were trained in `precision` (the run's first by default), in BF16 and its recipe.

    Raises TrainError where the folder holds no run, or none in that precision.
    """
    config = read_config(folder)
    chosen = precision or config.precisions[0]
    if chosen not in config.precisions:
        raise TrainError(f"{folder} trained in {' and '.join(config.precisions)}, expected {chosen}")
    checkpoints = folder / "checkpoints" / chosen
    tensors, _ = checkpoint.load(checkpoints)
    model = DeepSeekV3(config.model, Fp8Recipe(chosen, config.train.power_of_2_scales))
    targets = {f"master/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    targets |= {f"buffer/{name}": b for name, b in model.state_dict().items() if name.endswith(".bias")}
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("exp_avg")}
    checkpoint.copy_checked(own, targets, f"the checkpoint in {checkpoints}")
    return model.to(torch.bfloat16).eval(), config
