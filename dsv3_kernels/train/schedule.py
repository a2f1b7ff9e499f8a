"""What changes with the step (section 4.2 of the DeepSeek-V3 report), scaled to the length of the run."""

import math

from dsv3_kernels.train.config import TrainConfig

LATE = 0.967
"""From this share of the run on, the expert biases rest (14.3T of 14.8T tokens)."""
MTP_LATE = 0.676
"""From this share of the run on, the MTP loss weighs a third (10T of 14.8T tokens)."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to final_lr of the highest at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = max(1, config.steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / length)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def mtp_weight(step: int, config: TrainConfig) -> float:
    return config.mtp_weight if step < MTP_LATE * config.steps else config.mtp_weight / 3


def bias_speed(step: int, config: TrainConfig) -> float:
    return config.bias_speed if step < LATE * config.steps else 0.0
