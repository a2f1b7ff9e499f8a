"""Other people's models in FP8."""

from collections.abc import Callable

import torch
from torch import nn

from dsv3_kernels.nn.linear import Fp8Linear
from dsv3_kernels.nn.recipe import FP8, Fp8Recipe

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MULTIPLE = 16  # of both widths: 16 bytes of codes, whichever way the weight lies


def convert(
    model: nn.Module,
    filter: Callable[[str, nn.Linear], bool] | None = None,
    *,
    recipe: Fp8Recipe = FP8,
) -> list[str]:
    """Turns the `nn.Linear`s of a model into `Fp8Linear`s, in place, and returns their names.

        nn.convert(model, lambda name, layer: name != "lm_head")

    filter: which layers, by name (as in `named_modules`) and layer; all if None. DeepSeek-V3 keeps the output
        head and the gates of its experts out of FP8.
    The layers stay the objects they are: parameters, biases, ties, hooks and optimizers that hold them stay
    valid, and so do the keys of the state dict. Subclasses of `nn.Linear` compute in their own way and are
    left alone.
    Raises ValueError, and changes nothing, where a chosen layer cannot compute in FP8.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (filter is None or filter(name, module))
    }
    reasons = [f"{name!r} {reason}" for name, layer in layers.items() if (reason := _obstacle(layer))]
    if reasons:
        raise ValueError(f"convert: {'; '.join(reasons)}; leave these layers out by `filter`")
    for layer in layers.values():
        layer.__class__ = Fp8Linear
        layer.register_buffer("weight_scale_inv", None)
        setattr(layer, "recipe", recipe)  # noqa: B010
    return list(layers)


def _obstacle(layer: nn.Linear) -> str | None:
    """Why the layer cannot compute in FP8."""
    for name in ("in_features", "out_features"):
        if getattr(layer, name) % _MULTIPLE:
            return f"has {name} = {getattr(layer, name)}, expected a multiple of {_MULTIPLE}"
    if layer.weight.dtype not in _DTYPES:
        return f"has weights of {layer.weight.dtype}, expected one of {', '.join(map(str, _DTYPES))}"
    if "forward" in vars(layer):
        return "has a `forward` of its own, expected that of nn.Linear"
    return None
