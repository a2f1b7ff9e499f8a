"""Which layer, on which rank, first made a number that is not finite."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_kernels.train.executor import Executor
from dsv3_kernels.train.parallel.groups import gather, named_parameters

SHOWN = 3
"""How many ranks a message names."""


def layer_of_loss(executor: Executor, again: Callable[[], object], group: "dist.ProcessGroup | None") -> str:
    """The first weights that are not finite, or else what a run of the step again shows: the first layer with
    finite inputs and an output that is not. All ranks call it together.
    """
    weights = [name for name, parameter in named_parameters(executor) if not _finite(parameter)]
    where = _name(f"the weights {weights[0]}" if weights else None, group)
    if where is not None:
        return where
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if not found and _finite(inputs) and not _finite(output):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for part in executor.modules
        for name, module in part.named_modules()
        if name
    ]
    try:
        again()
    finally:
        for handle in handles:
            handle.remove()
    return _name(f"the output of {found[0]}" if found else None, group) or "no layer's output alone"


def layer_of_gradient(executor: Executor, names: list[str], group: "dist.ProcessGroup | None") -> str:
    """names: the parameters of this rank whose gradients are not finite. The backward comes from the loss, so
    that the last of them in the model is where it began.
    """
    order = {name: index for index, (name, _) in enumerate(named_parameters(executor))}
    last = max(names, key=order.__getitem__, default=None)
    return _name(None if last is None else f"the gradient of {last}", group) or "no gradient alone"


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value.float()).all())
    return all(map(_finite, value)) if isinstance(value, tuple | list) else True


def _name(found: str | None, group: "dist.ProcessGroup | None") -> str | None:
    """What was found, and where."""
    ranks: dict[str, list[int]] = {}
    for rank, name in enumerate(gather(found, group)):
        if name is not None:
            ranks.setdefault(name, []).append(rank)
    return "; ".join(f"{name} on rank {_list(where)}" for name, where in ranks.items()) or None


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" * (len(ranks) > SHOWN))
