"""What of a model's training is in FP8: the choices of the DeepSeek-V3 report, section 3.3, by name."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

Precision = Literal["fp8", "bf16"]
SwigluInput = Literal["fp8", "bf16"]
AttentionOutput = Literal["e5m6", "fp8"]
Dispatch = Literal["fp8", "bf16"]
Combine = Literal["bf16"]
Recompute = Literal["norms", "up_projections", "weights", "head"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
"""All that can be made again."""


@dataclass(frozen=True)
class Fp8Recipe:
    """How linear layers and experts run their three GEMMs (forward, input gradient, weight gradient), what
    they keep for the backward, and what travels between ranks. Embedding, head, gates, norms, the core of
    attention and weight gradients are never FP8.
    """

    precision: Precision = "fp8"
    """Of the GEMMs. "fp8": both operands in e4m3, scales of 1x128 (activations, gradients) and 128x128
    (weights). "bf16": plain matmuls in the weights' own dtype, the baseline to compare with; the other fields
    then mean nothing."""
    power_of_2_scales: bool = False
    """Round every scale up to a power of two."""
    retiled_power_of_2_scales: bool = True
    """Round up the scales that a second quantisation follows, which they make nearly exact: of tokens and
    gradients that were dispatched in FP8 and are re-tiled from 1x128 to tiles of 128 tokens for the weight
    gradient, and of what was kept of attention's output."""
    swiglu_input: SwigluInput = "fp8"
    """How the input of SwiGLU is kept for the backward, which makes its output again. "fp8": e4m3, 1x128."""
    attention_output: AttentionOutput = "e5m6"
    """How the input of the linear layer after attention is kept for the backward. "e5m6": 12 bits a value;
    "fp8": as that of any other layer."""
    dispatch: Dispatch = "fp8"
    """How tokens travel to their experts on other ranks, and gradients in the backward of combine. What came
    in FP8 goes into the GEMMs as it is."""
    combine: Combine = "bf16"
    """How the experts' outputs travel home, and gradients in the backward of dispatch."""
    recompute: tuple[Recompute, ...] = ()
    """What a model of `dsv3_kernels.model` makes again in the backward, bit for bit, instead of keeping it.
    "norms": their outputs, as all their readers would keep them (FP8 layers, the gate, experts that are not
    spread over ranks); "up_projections": queries, keys and values, with the GEMMs that make them, while the
    output of attention is kept once; "weights": the transposed FP8 copy that each call of a layer keeps
    (or all calls of a step together, `constant_weights`); "head": logits, with their GEMM. In BF16 the plain
    matmuls still keep their inputs."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), _ALLOWED.get(field.name, (False, True))
            if field.name == "recompute":
                self._check_recompute()
            elif not any(type(value) is type(choice) and value == choice for choice in allowed):
                raise ValueError(f"Fp8Recipe: {field.name} is {value!r}, expected one of {allowed}")

    def _check_recompute(self) -> None:
        if not isinstance(self.recompute, tuple) or not set(self.recompute) <= set(RECOMPUTE):
            raise ValueError(f"Fp8Recipe: recompute is {self.recompute!r}, expected a tuple of {RECOMPUTE}")

    @property
    def retiled_power_of_2(self) -> bool:
        """Of scales that a second quantisation follows."""
        return self.power_of_2_scales or self.retiled_power_of_2_scales


_ALLOWED: dict[str, tuple[str, ...]] = {
    "precision": get_args(Precision),
    "swiglu_input": get_args(SwigluInput),
    "attention_output": get_args(AttentionOutput),
    "dispatch": get_args(Dispatch),
    "combine": get_args(Combine),
}

FP8 = Fp8Recipe("fp8")
BF16 = Fp8Recipe("bf16")
