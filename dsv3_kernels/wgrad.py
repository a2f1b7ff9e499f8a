"""FP8 weight gradient: tiles of 1x128 along tokens, FP32 result (DeepSeek-V3 report, section 3.3.2)."""

import torch
from torch import Tensor

from . import checks, launch, quantized, reference
from .quantized import ROW, TILE, QuantizedTensor


def fp8_wgrad(
    dy_t: QuantizedTensor,
    x_t: QuantizedTensor,
    out: Tensor | None = None,
    accumulate: bool = False,
    group_offsets: Tensor | None = None,
) -> Tensor:
    """dWᵍ = dyᵀ·x over the tokens of each group: the weight gradient of y = x·Wᵀ.

    dy_t, x_t: block (1, 128) from `quantize_1x128_t` with the same `group_offsets`: data `[N, T]` and `[K,
        T]`, N and K multiples of 8, T of 128. A (data, scales) tuple is taken for either.
    out: float32 `[N, K]`, or `[G, N, K]` with groups, contiguous; made when None. Written in place and
        returned.
    accumulate: add to `out` instead of overwriting it: `out = out + y`, one FP32 addition after the whole sum
        y.
    group_offsets: int32 `[G+1]`, the offsets in tokens that both operands were quantised with. A group
        without tokens has gradient zero.
    Per 128 tokens: `s = rn(scale_dy·scale_x); y = fma(s, partial, y)` in FP32, tokens ascending.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, block, stride, alignment,
    device or offsets.
    """
    op = "fp8_wgrad"
    dy_t = quantized.operand(op, "dy_t", dy_t, ROW, (2,))
    x_t = quantized.operand(op, "x_t", x_t, ROW, (2,))
    checks.same_device(op, "x_t.data", x_t.data, "dy_t.data", dy_t.data)
    (n, tokens), (k, tokens_x) = dy_t.shape, x_t.shape
    if tokens_x != tokens:
        raise ValueError(
            f"{op}: x_t.data has {tokens_x} token columns, expected {tokens}, those of dy_t.data"
        )
    checks.multiple(op, "dy_t.data", "T (token columns)", tokens, TILE)
    checks.multiple(op, "dy_t.data", "N", n, 8)
    checks.multiple(op, "x_t.data", "K", k, 8)
    expected: tuple[int, ...] = (n, k)
    if group_offsets is not None:
        checks.offsets(op, group_offsets, "dy_t.data", dy_t.data)
        expected = (group_offsets.shape[0] - 1, n, k)
    if checks.flag(op, "accumulate", accumulate) and out is None:
        raise ValueError(f"{op}: out is None with accumulate=True, expected the tensor to add to")
    if out is None:
        out = torch.empty(expected, dtype=torch.float32, device=dy_t.data.device)
    else:
        checks.tensor(op, "out", out, (torch.float32,), (len(expected),))
        checks.shape(op, "out", out, expected, "(G, N, K)" if len(expected) == 3 else "(N, K)")
        checks.same_device(op, "out", out, "dy_t.data", dy_t.data)
        checks.contiguous(op, "out", out)
    run = torch.ops.dsv3_kernels.fp8_wgrad if torch.compiler.is_compiling() else _fp8_wgrad
    run(dy_t.data, dy_t.scales, x_t.data, x_t.scales, out, accumulate, group_offsets)
    return out


def _fp8_wgrad(
    dy_t: Tensor,
    dy_scales: Tensor,
    x_t: Tensor,
    x_scales: Tensor,
    out: Tensor,
    accumulate: bool,
    group_offsets: Tensor | None,
) -> None:
    if launch.world(dy_t) == "reference":
        q_dy, q_x = QuantizedTensor(dy_t, dy_scales, ROW), QuantizedTensor(x_t, x_scales, ROW)
        reference.fp8_wgrad(q_dy, q_x, out, accumulate, group_offsets)
        return
    launch.no_kernel("fp8_wgrad")


def _fake(
    dy_t: Tensor,
    dy_scales: Tensor,
    x_t: Tensor,
    x_scales: Tensor,
    out: Tensor,
    accumulate: bool,
    group_offsets: Tensor | None,
) -> None:
    return None


torch.library.custom_op("dsv3_kernels::fp8_wgrad", _fp8_wgrad, mutates_args=("out",)).register_fake(_fake)
