"""Drop-in autograd functions and modules over the FP8 ops."""

from dsv3_kernels.nn.conversion import convert
from dsv3_kernels.nn.deferred import WgradStore, deferred_wgrad
from dsv3_kernels.nn.linear import (
    Fp8Linear,
    GroupedFp8Linear,
    Linear,
    fp8_linear,
    grouped_fp8_linear,
    set_recipe,
)
from dsv3_kernels.nn.moe import MoECombine, MoEDispatch
from dsv3_kernels.nn.recipe import BF16, FP8, Fp8Recipe
from dsv3_kernels.nn.stored import store_fp8_weights

__all__ = [
    "BF16",
    "FP8",
    "Fp8Linear",
    "Fp8Recipe",
    "GroupedFp8Linear",
    "Linear",
    "MoECombine",
    "MoEDispatch",
    "WgradStore",
    "convert",
    "deferred_wgrad",
    "fp8_linear",
    "grouped_fp8_linear",
    "set_recipe",
    "store_fp8_weights",
]
