"""Rotary position embedding of interleaved pairs, and YaRN, which stretches it to longer contexts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071), under the names of `rope_scaling` in a released config.json.

    Pairs that turn more than beta_fast times within the original context keep their frequency, those that
    turn less than beta_slow times are slowed by `factor`, those between are mixed linearly.
    mscale, mscale_all_dim: the attention's temperature, in either of the two conventions in use: with
    mscale_all_dim the softmax is scaled by (0.1 mscale_all_dim ln(factor) + 1)², without it (0) cosines and
    sines are, each by 0.1 ln(factor) + 1.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and (value > 0 or (name.startswith("mscale") and value == 0))):
                raise ValueError(f"Yarn: {name} is {value}, expected a finite number above 0")
        if self.factor < 1:
            raise ValueError(f"Yarn: factor is {self.factor}, expected at least 1")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"Yarn: beta_fast is {self.beta_fast}, expected more than beta_slow = {self.beta_slow}"
            )

    @property
    def table_scale(self) -> float:
        """Of cosines and sines."""
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def softmax_scale(self) -> float:
        """What 1 / sqrt(d) is multiplied by."""
        return self._temperature(self.mscale_all_dim) ** 2

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """Of the pairs, mixed from the plain ones: FP32 [dim / 2]."""
        dim = 2 * plain.numel()

        def pair_that_turns(times: float) -> float:
            turns = self.original_max_position_embeddings / (times * 2 * math.pi)
            return dim * math.log(turns) / (2 * math.log(theta))

        low = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(self.beta_slow)), dim - 1)
        pairs = torch.arange(plain.numel(), device=plain.device, dtype=torch.float32)
        slowed = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain / self.factor * slowed + plain * (1 - slowed)


def rope_table(positions: Tensor, dim: int, theta: float, yarn: Yarn | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation of each pair at the positions [S]: FP32 [S, dim / 2] each."""
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    frequencies = 1.0 / theta**exponents
    if yarn is not None:
        frequencies = yarn.frequencies(frequencies, theta)
    angles = torch.outer(positions.float(), frequencies)
    scale = yarn.table_scale if yarn is not None else 1.0
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the interleaved pairs (x[2i], x[2i + 1]) of the last dimension by the position's angles.

    x: [B, S, heads, dim]; cos, sin: [S, dim / 2]. Returns x's shape and dtype; computed in FP32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
