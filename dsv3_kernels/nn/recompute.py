"""What the backward makes again instead of keeping (section 3.2.3 of the DeepSeek-V3 report).

The output of a norm is the input of linear layers, each of which would keep it in a form of its own. `remade`
gives that output a function that makes it again; a layer that finds one on its input keeps the function.

In graphs of torch.compile all is kept, or not, as its partitioner says.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dsv3_kernels.nn.deferred import active_store, as_with

Remake = Callable[[], Tensor]

_NAME = "_dsv3_remake"


def remake_of(x: Tensor) -> Remake | None:
    """The function that makes x again, without a gradient, if x has one."""
    return getattr(x, _NAME, None)


def with_remake(x: Tensor, remake: Remake | None) -> Tensor:
    """x itself, from now on with this function. What an operation makes of x has none."""
    if remake is not None:
        setattr(x, _NAME, remake)
    return x


def remade(make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """make(*sources), of which nothing is kept for the backward but the sources."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make(*sources)
    return with_remake(keep_inputs(make, *sources), _again(make, *sources))


def made_of_kept(make: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
    """make(source), for a source that is kept by others: layers keep how, and not what is made."""
    if torch.compiler.is_compiling():
        return make(source)
    return with_remake(make(source), _again(make, source))


def then(make: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """make(x), a view of x, which is made again as x is."""
    remake = remake_of(x)
    return with_remake(make(x), None if remake is None else lambda: make(remake()))


def _again(make: Callable[..., Tensor], *sources: Tensor) -> Remake:
    return partial(torch.no_grad()(make), *(source.detach() for source in sources))


def keep_inputs(make: Callable[..., Any], *inputs: Tensor) -> Any:
    """make(*inputs), keeping the inputs only: the backward runs it again."""
    if torch.compiler.is_compiling():
        return make(*inputs)
    return checkpoint(_as_now(make), *inputs, use_reentrant=False, preserve_rng_state=False)


def _as_now(make: Callable[..., Any]) -> Callable[..., Any]:
    """make, with the store of weight gradients that is active now: layers keep other tensors with one."""
    store = active_store()

    def run(*inputs: Tensor) -> Any:
        with as_with(store):
            return make(*inputs)

    return run


def keep_remake(make: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """make(x), keeping how x is made, if that is known.

    The backward runs `make` again, up to the last tensor that autograd keeps in it: not its last GEMM.
    """
    remake = remake_of(x)
    if remake is None or not torch.is_grad_enabled():
        return make(x)
    now, needs_grad = [x], x.requires_grad
    return keep_inputs(lambda: make(now.pop() if now else remake().requires_grad_(needs_grad)))


def _attention_policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    core = "scaled_dot_product" in str(op)
    return CheckpointPolicy.MUST_SAVE if core else CheckpointPolicy.PREFER_RECOMPUTE


def keep_attention(make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """make(*inputs), keeping the inputs and what `F.scaled_dot_product_attention` returned in it.

    The backward runs all but that again.
    """
    if torch.compiler.is_compiling():
        return make(*inputs)
    context = partial(create_selective_checkpoint_contexts, _attention_policy)
    return checkpoint(
        _as_now(make), *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=context
    )
