"""Node-limited routing: which experts a token goes to, and with which weights (section 2.1.2)."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, launch, reference
from .jit import Kernel

THREADS = 256  # as in csrc/kernels/gate.cuh
MAX_EXPERTS = 512
MAX_GRID = 4096  # blocks; a warp takes as many tokens as it must


class Routed(NamedTuple):
    """Where T tokens go: K experts each."""

    experts: Tensor  # int64 [T, K], ascending in a row
    weights: Tensor  # float32 [T, K]
    counts: Tensor  # int32 [E], the tokens of each expert


def route(
    scores: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    scaling: float = 1.0,
    logits: bool = False,
) -> Routed:
    """The top_k experts of each token within its topk_group best groups, and the weights of their outputs.

    scores: float32 `[T, E]`, contiguous, 16-byte aligned, E at most 512. bias: float32 `[E]`, contiguous:
        added for the choice, not for the weights.
    n_group: groups of E / n_group experts that lie one after another. topk_group: how many of them a token
        may use, a divisor of top_k; a group's score is the sum of its top_k / topk_group highest.
    scaling: a factor of every weight. logits: `scores` are logits, and the scores are `reference.sigmoid` of
        them (on a GPU within the last bits).
    Returns experts int64 `[T, top_k]`, ascending in a row; weights float32 `[T, top_k]`, score over (the sum
    of the row's scores + 1e-20), times scaling; counts int32 `[E]`, the tokens of each expert. Equal scores
    go to the lower index. NaN counts as the highest score: every expert exists, the row's weights are NaN.
    It has no derivative: for training, gather the scores at `experts`, as `reference.routing_weights` takes
    them.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, stride, alignment, device
    or number.
    """
    op = "route"
    checks.tensor(op, "scores", scores, (torch.float32,), (2,))
    checks.contiguous(op, "scores", scores)
    experts = scores.shape[1]
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"{op}: scores has E = {experts}, expected 1 to {MAX_EXPERTS} experts")
    checks.tensor(op, "bias", bias, (torch.float32,), (1,))
    checks.same_device(op, "bias", bias, "scores", scores)
    checks.shape(op, "bias", bias, (experts,), "(E,)")
    if not bias.is_contiguous():
        raise ValueError(f"{op}: bias has stride {bias.stride()}, expected (1,); pass bias.contiguous()")
    _check_numbers(op, experts, top_k, n_group, topk_group)
    if not isinstance(scaling, (int, float)) or isinstance(scaling, bool):
        raise TypeError(f"{op}: scaling is {scaling!r} of type {type(scaling).__name__}, expected a float")
    if not math.isfinite(scaling):
        raise ValueError(f"{op}: scaling is {scaling}, expected a finite number")
    checks.flag(op, "logits", logits)
    run: Any = torch.ops.dsv3_kernels.route if torch.compiler.is_compiling() else _route
    return Routed(*run(scores, bias, top_k, n_group, topk_group, float(scaling), logits))


def _check_numbers(op: str, experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    for name, value in (("top_k", top_k), ("n_group", n_group), ("topk_group", topk_group)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {value!r} of type {type(value).__name__}, expected an int")
        if value < 1:
            raise ValueError(f"{op}: {name} is {value}, expected 1 or more")
    if experts % n_group:
        raise ValueError(f"{op}: n_group is {n_group}, expected a divisor of E = {experts}")
    if topk_group > n_group:
        raise ValueError(f"{op}: topk_group is {topk_group}, expected at most n_group = {n_group}")
    if top_k % topk_group:
        raise ValueError(f"{op}: top_k is {top_k}, expected a multiple of topk_group = {topk_group}")
    most = topk_group * (experts // n_group)
    if top_k > most:
        raise ValueError(
            f"{op}: top_k is {top_k}, expected at most {most}, the experts of {topk_group} groups"
        )


Triple = tuple[Tensor, Tensor, Tensor]


def _route(
    scores: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, scaling: float, logits: bool
) -> Triple:
    if launch.world(scores) == "reference":
        return reference.route(scores, bias, top_k, n_group, topk_group, scaling, logits)
    routed = _fake_route(scores, bias, top_k, n_group, topk_group, scaling, logits)
    if scores.shape[0]:
        _prepared(*scores.shape, n_group, topk_group, top_k, scaling, logits)(scores, bias, *routed)
    return routed


@functools.lru_cache(maxsize=256)
def _prepared(
    tokens: int, experts: int, n_group: int, topk_group: int, top_k: int, scaling: float, logits: bool
) -> launch.Prepared:
    """Takes scores, bias, experts, weights, counts."""
    grid = min(checks.ceil_div(tokens, THREADS // 32), MAX_GRID)
    address = launch.Slot.ADDRESS
    parameters = (
        address,
        address,
        address,
        address,
        address,
        tokens,
        experts,
        n_group,
        topk_group,
        top_k,
        scaling,
    )
    return launch.Prepared(kernel_route(experts, logits), (grid, 1, 1), (THREADS, 1, 1), parameters)


def kernel_route(experts: int, logits: bool) -> Kernel:
    return _kernel(next(n for n in _SCORES_OF_LANE if 32 * n >= experts), logits)


_SCORES_OF_LANE = (1, 2, 4, 8, 16)


@functools.cache
def _kernel(scores_of_lane: int, logits: bool) -> Kernel:
    return Kernel("gate.cuh", "route", (scores_of_lane, logits))


def kernels() -> dict[str, list[Kernel]]:
    """Every instance that an op of this module may launch."""
    return {"route": [_kernel(*facts) for facts in itertools.product(_SCORES_OF_LANE, (False, True))]}


def _fake_route(
    scores: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, scaling: float, logits: bool
) -> Triple:
    shape = scores.shape[0], top_k
    experts = torch.empty(shape, dtype=torch.int64, device=scores.device)
    return experts, torch.empty(shape, device=scores.device), bias.new_zeros(bias.shape, dtype=torch.int32)


torch.library.custom_op("dsv3_kernels::route", _route, mutates_args=()).register_fake(_fake_route)
