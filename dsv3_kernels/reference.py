"""Every op in plain PyTorch: the specification, the CPU backend and the oracle of the tests.

The functions take checked arguments (the ops do that) and read in the order of the ops. GEMMs have two
arithmetics:

- "fp32", the CPU backend: both operands are dequantised to FP32 and multiplied by one FP32 matmul. Up to FP32
  rounding this is what the kernels compute.
- "hopper", the oracle: bit for bit what a kernel on Hopper computes. Per 128 of K the FP8 tensor core's own
  arithmetic (`tensor_core`), then `s = rn(scale_a·scale_b); y = fma(s, partial, y)` in FP32, K ascending.
"""

from functools import cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import ceil_div, round_up
from .quantized import ROW, SQUARE, TILE, QuantizedTensor, empty_mn_major, padded_tokens, scales_shape

Accumulation = Literal["fp32", "hopper"]
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126
WGMMA_K = 32
FRACTION_BITS = 13  # of the tensor core's accumulator, E8M13


def finish_scales(amax: Tensor, power_of_2: bool) -> Tensor:
    """In place: the largest magnitude of each tile becomes the tile's scale. NaN stays NaN, Inf stays Inf."""
    zero = amax == 0
    scales = amax.div_(E4M3_MAX).clamp_min_(SMALLEST_SCALE)
    if power_of_2:
        bits = scales.view(torch.int32)
        up = (bits + 0x7FFFFF) & 0x7F800000
        bits.copy_(torch.where(scales.isnan(), bits, up))
    return scales.masked_fill_(zero, 1.0)


def quantize_1x128(x: Tensor, power_of_2: bool) -> tuple[Tensor, Tensor]:
    *batch, m, k = x.shape
    scales = empty_mn_major(scales_shape(x.shape, ROW), x.device)
    tiles = pad(x, (0, -k % TILE)).float().view(*batch, m, ceil_div(k, TILE), TILE)
    torch.amax(tiles.abs(), -1, out=scales)
    finish_scales(scales, power_of_2)
    data = (tiles / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).view(*batch, m, round_up(k, TILE))
    return data[..., :k].contiguous(), scales


def quantize_1x128_t(x: Tensor, offsets: list[int] | None, power_of_2: bool) -> tuple[Tensor, Tensor]:
    tokens, width = x.shape
    bounds = [0, tokens] if offsets is None else offsets
    columns = padded_tokens(tokens, len(bounds) - 1)
    padded = torch.zeros(columns, width, device=x.device)
    start = 0
    for low, high in pairwise(bounds):
        padded[start : start + high - low] = x[low:high]
        start += round_up(high - low, TILE)
    tiles = padded.view(columns // TILE, TILE, width)
    scales = empty_mn_major((width, columns // TILE), x.device)
    torch.amax(tiles.abs(), 1, out=scales.t())
    finish_scales(scales, power_of_2)
    data = (tiles / scales.t().unsqueeze(1)).to(torch.float8_e4m3fn).view(columns, width)
    return data.t().contiguous(), scales


def quantize_128x128(w: Tensor, power_of_2: bool) -> tuple[Tensor, Tensor]:
    *batch, n, k = w.shape
    padded = pad(w, (0, -k % TILE, 0, -n % TILE)).float()
    tiles = padded.view(*batch, ceil_div(n, TILE), TILE, ceil_div(k, TILE), TILE)
    scales = finish_scales(tiles.abs().amax((-3, -1)), power_of_2)
    data = (tiles / scales[..., :, None, :, None]).to(torch.float8_e4m3fn).view(padded.shape)
    return data[..., :n, :k].contiguous(), scales


@cache
def _decode_table(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


def decode(data: Tensor) -> Tensor:
    """float8_e4m3fn to FP32: a table of 256 entries is three times as fast as PyTorch's own conversion."""
    codes = data.view(torch.uint8).int().view(-1)
    return _decode_table(data.device).index_select(0, codes).view(data.shape)


def dequantize(q: QuantizedTensor) -> Tensor:
    """FP32 values, each the product of a code and its scale, rounded once."""
    values = decode(q.data)
    *batch, m, k = values.shape
    scales = q.scales
    if k % TILE == 0 and m % q.block[0] == 0:
        tiles = values.view(*batch, m // q.block[0], q.block[0], k // TILE, TILE)
        tiles.mul_(scales[..., :, None, :, None])
        return values
    if q.block == SQUARE:
        scales = scales.repeat_interleave(TILE, -2)[..., :m, :]
    return values.mul_(scales.repeat_interleave(TILE, -1)[..., :k])


def _matmul_nt(a: QuantizedTensor, b: QuantizedTensor, accumulation: Accumulation) -> Tensor:
    """FP32 a·bᵀ."""
    if accumulation == "fp32":
        return dequantize(a) @ dequantize(b).t()
    return _hopper_matmul_nt(a, b)


def _rows(q: QuantizedTensor, low: int, high: int) -> QuantizedTensor:
    return QuantizedTensor(q.data[low:high], q.scales[low:high], q.block)


def _member(q: QuantizedTensor, g: int) -> QuantizedTensor:
    return QuantizedTensor(q.data[g], q.scales[g], q.block)


def fp8_gemm(a: QuantizedTensor, b: QuantizedTensor, accumulation: Accumulation = "fp32") -> Tensor:
    return _matmul_nt(a, b, accumulation).bfloat16()


def grouped_fp8_gemm(
    a: QuantizedTensor, b: QuantizedTensor, offsets: list[int], accumulation: Accumulation = "fp32"
) -> Tensor:
    out = a.data.new_zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    for g, (low, high) in enumerate(pairwise(offsets)):
        if low < high:
            out[low:high] = _matmul_nt(_rows(a, low, high), _member(b, g), accumulation)
    return out


def masked_grouped_fp8_gemm(
    a: QuantizedTensor, b: QuantizedTensor, counts: list[int], accumulation: Accumulation = "fp32"
) -> Tensor:
    out = a.data.new_zeros(a.shape[0], a.shape[1], b.shape[1], dtype=torch.bfloat16)
    for g, count in enumerate(counts):
        if count:
            out[g, :count] = _matmul_nt(_rows(_member(a, g), 0, count), _member(b, g), accumulation)
    return out


def fp8_wgrad(
    dy_t: QuantizedTensor,
    x_t: QuantizedTensor,
    out: Tensor,
    accumulate: bool,
    offsets: list[int] | None = None,
    accumulation: Accumulation = "fp32",
) -> None:
    """Writes `out`; with `accumulate`, one FP32 addition to `out` after the whole sum."""
    if offsets is None:
        _store(out, _matmul_nt(dy_t, x_t, accumulation), accumulate)
        return
    start = 0
    for g, (low, high) in enumerate(pairwise(offsets)):
        end = start + round_up(high - low, TILE)
        _store(
            out[g],
            _matmul_nt(_columns(dy_t, start, end), _columns(x_t, start, end), accumulation),
            accumulate,
        )
        start = end


def _columns(q: QuantizedTensor, low: int, high: int) -> QuantizedTensor:
    return QuantizedTensor(q.data[:, low:high], q.scales[:, low // TILE : high // TILE], q.block)


def _store(out: Tensor, y: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(y)
    else:
        out.copy_(y)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2|x|) of normal FP32 numbers."""
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


def _power_of_2(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def tensor_core(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """One `wgmma` step of Hopper's FP8 tensor core, bit for bit: c + a·bᵀ of `[M, 32]`, `[N, 32]`, `[M, N]`.

    `a` and `b` hold e4m3 values as FP32; `c` and the result are FP32 with 13 fraction bits (E8M13). A product
    keeps the exponent ea + eb of its operands (subnormals have exponent -6), un-normalised. All nonzero terms
    are truncated toward zero to 13 fraction bits below the largest exponent, added exactly, and the sum is
    truncated toward zero to 13 fraction bits. Source: the published bit-accurate models (MMA-Sim, arXiv
    2511.10909).
    """
    never = -(1 << 20)
    products = a[:, None, :] * b[None, :, :]
    ea = _exponent(a).clamp_min_(-6).masked_fill_(a == 0, never)
    eb = _exponent(b).clamp_min_(-6).masked_fill_(b == 0, never)
    largest = (ea[:, None, :] + eb[None, :, :]).amax(-1)
    largest = torch.maximum(largest, _exponent(c).masked_fill_(c == 0, never)).clamp_min_(-100)
    # At most 33 integers below 2^15: any order of FP32 additions is exact.
    to_units = _power_of_2(FRACTION_BITS - largest)
    units = products.mul_(to_units.unsqueeze(-1)).trunc_().sum(-1) + (c * to_units).trunc_()
    kept = (units.view(torch.int32) & -(1 << (23 - FRACTION_BITS))).view(torch.float32)
    return torch.where(units.isnan(), units, kept * _power_of_2(largest - FRACTION_BITS))


def tensor_core_dot(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ `[M, N]` of e4m3 values held as FP32, summed over K in the tensor core's accumulator alone."""
    c = a.new_zeros(a.shape[0], b.shape[0])
    rows = max(1, (1 << 20) // max(1, b.shape[0] * WGMMA_K))  # bounds the products held at once
    for m in range(0, a.shape[0], rows):
        for k in range(0, a.shape[1], WGMMA_K):
            part = slice(k, k + WGMMA_K)
            c[m : m + rows] = tensor_core(a[m : m + rows, part], b[:, part], c[m : m + rows])
    return c


def fma(s: Tensor, partial: Tensor, y: Tensor) -> Tensor:
    """`s·partial + y` in FP32 with one rounding, where `partial` has at most 14 significant bits.

    The product is then exact in FP64. Its FP64 sum with `y` is rounded to odd (two-sum finds the error, the
    last bit absorbs it), which makes the second rounding, to FP32, the only one that counts.
    """
    p, y64 = s.double() * partial.double(), y.double()
    total = p + y64
    back = total - p
    error = (p - (total - back)) + (y64 - back)
    even = (total.view(torch.int64) & 1) == 0
    inexact = (error != 0) & error.isfinite() & even
    toward = torch.where(error > 0, torch.inf, -torch.inf).double()
    return torch.where(inexact, torch.nextafter(total, toward), total).float()


def _hopper_matmul_nt(a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
    values_a, values_b = decode(a.data), decode(b.data)
    y = values_a.new_zeros(a.shape[0], b.shape[0])
    for tile in range(a.scales.shape[1]):
        part = slice(tile * TILE, (tile + 1) * TILE)
        scale_b = b.scales[:, tile].repeat_interleave(b.block[0])[: b.shape[0]]
        s = a.scales[:, tile, None] * scale_b
        y = fma(s, tensor_core_dot(values_a[:, part], values_b[:, part]), y)
    return y
