"""The reference DeepSeek-V3."""

from dsv3_kernels.model.config import PRESETS, ModelConfig
from dsv3_kernels.model.model import DeepSeekV3, Losses, ParameterCount, count_parameters

__all__ = ["PRESETS", "DeepSeekV3", "Losses", "ModelConfig", "ParameterCount", "count_parameters"]
