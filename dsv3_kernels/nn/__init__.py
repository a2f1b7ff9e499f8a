"""Drop-in autograd functions and modules over the FP8 ops."""

from dsv3_kernels.nn.conversion import convert
from dsv3_kernels.nn.deferred import WgradStore, deferred_wgrad
from dsv3_kernels.nn.exchange import MoECombine, MoEDispatch
from dsv3_kernels.nn.experts import Dispatched, Experts
from dsv3_kernels.nn.gate import Gate, Routing, sequence_balance_loss
from dsv3_kernels.nn.gemms import constant_weights
from dsv3_kernels.nn.linear import (
    Fp8Linear,
    GroupedFp8Linear,
    Linear,
    fp8_linear,
    grouped_fp8_linear,
    set_recipe,
)
from dsv3_kernels.nn.mlp import MLP, swiglu_mlp
from dsv3_kernels.nn.moe import MoE
from dsv3_kernels.nn.permutation import ExpertOrder, expert_order, permute, unpermute
from dsv3_kernels.nn.recipe import BF16, FP8, Fp8Recipe
from dsv3_kernels.nn.rows import Fp8Rows
from dsv3_kernels.nn.stored import store_fp8_weights

__all__ = [
    "BF16",
    "FP8",
    "MLP",
    "Dispatched",
    "ExpertOrder",
    "Experts",
    "Fp8Linear",
    "Fp8Recipe",
    "Fp8Rows",
    "Gate",
    "GroupedFp8Linear",
    "Linear",
    "MoE",
    "MoECombine",
    "MoEDispatch",
    "Routing",
    "WgradStore",
    "constant_weights",
    "convert",
    "deferred_wgrad",
    "expert_order",
    "fp8_linear",
    "grouped_fp8_linear",
    "permute",
    "sequence_balance_loss",
    "set_recipe",
    "store_fp8_weights",
    "swiglu_mlp",
    "unpermute",
]
