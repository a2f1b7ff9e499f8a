"""The reference DeepSeek-V3."""

from dsv3_kernels.model.config import PRESETS, ModelConfig
from dsv3_kernels.model.config_json import PretrainedError
from dsv3_kernels.model.generate import Generator, Sampling
from dsv3_kernels.model.model import DeepSeekV3, Losses, ParameterCount, count_parameters
from dsv3_kernels.model.pretrained import from_pretrained, save_pretrained
from dsv3_kernels.model.rope import Yarn

__all__ = [
    "PRESETS",
    "DeepSeekV3",
    "Generator",
    "Losses",
    "ModelConfig",
    "ParameterCount",
    "PretrainedError",
    "Sampling",
    "Yarn",
    "count_parameters",
    "from_pretrained",
    "save_pretrained",
]
