"""The trainer: python -m dsv3_kernels.train."""

from dsv3_kernels.train.config import RunConfig, TrainConfig
from dsv3_kernels.train.errors import TrainError
from dsv3_kernels.train.trainer import StepMetrics, Trainer

__all__ = ["RunConfig", "StepMetrics", "TrainConfig", "TrainError", "Trainer"]
