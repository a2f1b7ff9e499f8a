"""Which precision the linear layers of a model compute in."""

from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["fp8", "bf16"]


@dataclass(frozen=True)
class Fp8Recipe:
    """How a linear layer runs its three GEMMs (forward, input gradient, weight gradient).

    precision: "fp8" quantises both operands of each GEMM to e4m3 with 1x128 scales (activations, gradients)
        and 128x128 scales (weights), as in section 3.3 of the DeepSeek-V3 report; "bf16" is the plain matmul
        in the weights' own dtype, the baseline to compare with.
    power_of_2_scales: round every scale up to a power of two.
    """

    precision: Precision = "fp8"
    power_of_2_scales: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"Fp8Recipe: precision is {self.precision!r}, expected one of {get_args(Precision)}"
            )


FP8 = Fp8Recipe("fp8")
BF16 = Fp8Recipe("bf16")
