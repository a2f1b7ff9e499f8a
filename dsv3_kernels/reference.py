"""Every op in plain PyTorch: the specification, the CPU backend and the oracle of the tests.

A function here has the name and the arguments of its op and takes them checked (the op does that); only the
values of `group_offsets` and `counts` are checked here, where they are read. GEMMs have two arithmetics:

- "fp32", the CPU backend: both operands dequantised to FP32, then FP32 matmuls (as precise as
  `torch.set_float32_matmul_precision` says). Kernels differ from it by FP32 rounding and by the truncation
  to 13 fraction bits inside the tensor core.
- "hopper", the oracle: what a kernel computes on Hopper, bit for bit. Per 128 of K the FP8 tensor core's own
  arithmetic (`tensor_core`), then `s = rn(scale_a·scale_b); y = fma(s, partial, y)` in FP32, K ascending.
"""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import ceil_div, read_counts, read_index, read_offsets, round_up
from .quantized import ROW, SQUARE, TILE, QuantizedTensor, empty_mn_major, padded_tokens

Accumulation = Literal["fp32", "hopper"]
E4M3_MAX = 448.0
E5M6_MAX = 65024.0
SMALLEST_SCALE = 2.0**-126
PANEL = 256  # columns dequantised at a time: larger temporaries cost more in page faults than they save
WGMMA_K = 32
FRACTION_BITS = 13  # of the tensor core's accumulator, E8M13


# Quantisation


def _amax(tiles: Tensor, dim: int) -> Tensor:
    """The largest magnitude along `dim`, NaN if any: two reductions cost less than a copy of |tiles|."""
    return torch.maximum(tiles.amax(dim), tiles.amin(dim).neg_())


def _scales(amax: Tensor, power_of_2: bool, largest: float = E4M3_MAX) -> Tensor:
    """Turns the magnitudes of tiles into their scales, in place. NaN stays NaN and Inf stays Inf."""
    zero = amax == 0
    scales = amax.div_(largest).clamp_min_(SMALLEST_SCALE)
    if power_of_2:
        bits = scales.view(torch.int32)
        bits.copy_(torch.where(scales.isnan(), bits, (bits + 0x7FFFFF) & 0x7F800000))
    return scales.masked_fill_(zero, 1.0)


def _finish(q: QuantizedTensor, ue8m0_scales: bool) -> QuantizedTensor:
    """Scales that are powers of two as the exponents of their floats, if asked; NaN and Inf become NaN."""
    if not ue8m0_scales:
        return q
    codes = (q.scales.view(torch.int32) >> 23).to(torch.uint8)
    if q.block == ROW:
        scales = empty_mn_major(tuple(codes.shape), codes.device, torch.uint8).copy_(codes)
    else:
        scales = codes.contiguous()
    return QuantizedTensor(q.data, scales.view(torch.float8_e8m0fnu), q.block)


def _encode(tiles: Tensor, scales: Tensor, scratch: bool) -> Tensor:
    """e4m3(tiles/scales). A quotient stays below 449 and rounds to 448: the cast never has to saturate."""
    return torch.div(tiles, scales, out=tiles if scratch else None).to(torch.float8_e4m3fn)


def quantize_1x128(
    x: Tensor, *, power_of_2_scales: bool = False, ue8m0_scales: bool = False
) -> QuantizedTensor:
    *batch, m, k = x.shape
    values = (x if k % TILE == 0 else pad(x, (0, -k % TILE))).float()
    tiles = values.view(*batch, m, ceil_div(k, TILE), TILE)
    scales = _scales(_amax(tiles, -1), power_of_2_scales or ue8m0_scales)
    data = _encode(tiles, scales.unsqueeze(-1), values is not x).view(values.shape)
    if k % TILE:
        data = data[..., :k].contiguous()
    scales = empty_mn_major(scales.shape, x.device).copy_(scales)
    return _finish(QuantizedTensor(data, scales, ROW), ue8m0_scales)


def quantize_1x128_t(
    x: Tensor,
    group_offsets: Tensor | None = None,
    *,
    power_of_2_scales: bool = False,
    ue8m0_scales: bool = False,
    op: str = "quantize_1x128_t",
) -> QuantizedTensor:
    """`op` is whom an error names."""
    tokens, width = x.shape
    offsets = [0, tokens]
    if group_offsets is not None:
        offsets = read_offsets(op, group_offsets, tokens, "the rows of x")
    columns = padded_tokens(tokens, len(offsets) - 1)
    if columns == tokens and len(offsets) == 2 and offsets[1] == tokens:
        values = x.float()
    else:
        values = torch.zeros(columns, width, dtype=torch.float32, device=x.device)
        start = 0
        for low, high in pairwise(offsets):
            values[start : start + high - low] = x[low:high]
            start += round_up(high - low, TILE)
    tiles = values.view(columns // TILE, TILE, width)
    scales = _scales(_amax(tiles, 1), power_of_2_scales or ue8m0_scales)
    data = _encode(tiles, scales.unsqueeze(1), values is not x).view(columns, width).t().contiguous()
    scales = empty_mn_major(scales.t().shape, x.device).copy_(scales.t())
    return _finish(QuantizedTensor(data, scales, ROW), ue8m0_scales)


def quantize_1x128_both(
    x: Tensor,
    group_offsets: Tensor | None = None,
    *,
    power_of_2_scales: bool = False,
    ue8m0_scales: bool = False,
    op: str = "quantize_1x128",
) -> tuple[QuantizedTensor, QuantizedTensor]:
    options = {"power_of_2_scales": power_of_2_scales, "ue8m0_scales": ue8m0_scales}
    return quantize_1x128(x, **options), quantize_1x128_t(x, group_offsets, **options, op=op)


def quantize_128x128(
    w: Tensor, *, power_of_2_scales: bool = False, ue8m0_scales: bool = False
) -> QuantizedTensor:
    *batch, n, k = w.shape
    tail = n % TILE or k % TILE
    values = (pad(w, (0, -k % TILE, 0, -n % TILE)) if tail else w).float()
    tiles = values.view(*batch, ceil_div(n, TILE), TILE, ceil_div(k, TILE), TILE)
    scales = _scales(_amax(tiles, -1).amax(-2), power_of_2_scales or ue8m0_scales)
    data = _encode(tiles, scales[..., :, None, :, None], values is not w).view(values.shape)
    if tail:
        data = data[..., :n, :k].contiguous()
    return _finish(QuantizedTensor(data, scales, SQUARE), ue8m0_scales)


def transpose(q: QuantizedTensor) -> QuantizedTensor:
    """The transpose of 128x128 blocks: the same codes and scales, in memory of their own."""
    data, scales = (t.mT.clone(memory_format=torch.contiguous_format) for t in (q.data, q.scales))
    return QuantizedTensor(data, scales, q.block)


def decode(data: Tensor) -> Tensor:
    """float8_e4m3fn to FP32, exactly. On CPUs several times as fast as PyTorch's own conversion.

    Sign, exponent and fraction of e4m3, moved up by 7 bits, are those of a float16 that is 2^-8 as large,
    for subnormals too.
    """
    if data.is_cuda:
        return data.float()
    codes = data.view(torch.int8)
    halves = codes.to(torch.int16).mul_(128).bitwise_and_(~0x4000).view(torch.float16)
    values = halves.float().mul_(256.0)
    if codes.numel() and (codes & 0x7F).max().item() == 0x7F:
        values.masked_fill_(values.abs() > E4M3_MAX, torch.nan)
    return values


def dequantize(q: QuantizedTensor) -> Tensor:
    """FP32 values, each the product of a code and its scale, rounded once."""
    values, rows = decode(q.data), q.block[0]
    *batch, m, k = values.shape
    if m % rows == 0 and k % TILE == 0:
        tiles = values.view(*batch, m // rows, rows, k // TILE, TILE)
        tiles.mul_(q.scales.contiguous()[..., :, None, :, None])
        return values
    scales = q.scales if rows == 1 else q.scales.repeat_interleave(rows, -2)[..., :m, :]
    return values.mul_(scales.repeat_interleave(TILE, -1)[..., :k])


def requantize_1x128_t(
    q: QuantizedTensor,
    group_offsets: Tensor | None = None,
    *,
    power_of_2_scales: bool = False,
    ue8m0_scales: bool = False,
) -> QuantizedTensor:
    options = {"power_of_2_scales": power_of_2_scales, "ue8m0_scales": ue8m0_scales}
    return quantize_1x128_t(dequantize(q), group_offsets, **options, op="requantize_1x128_t")


# Permutation


def permute(x: Tensor, index: Tensor, *, op: str = "permute") -> Tensor:
    """`x[index]`, zeros where index is -1."""
    read_index(op, "index", index, x.shape[0], "the rows of x")
    rows = x.new_zeros(index.shape[0], x.shape[1])
    there = index >= 0
    rows[there] = x[index[there].long()]
    return rows


def unpermute(rows: Tensor, slots: Tensor, weights: Tensor | None = None) -> Tensor:
    read_index("unpermute", "slots", slots, rows.shape[0], "the rows of rows")
    y = torch.zeros(slots.shape[0], rows.shape[1], dtype=torch.float32, device=rows.device)
    for k in range(slots.shape[1]):
        there = slots[:, k] >= 0
        terms = rows[slots[there, k].long()].float()
        y[there] += terms if weights is None else weights[there, k, None] * terms
    return y.bfloat16()


# E5M6


def pack_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two in three bytes, and power-of-two scales."""
    m, k = x.shape
    tiles = x.float().view(m, k // TILE, TILE)
    scales = _scales(_amax(tiles, -1), True, E5M6_MAX)
    values = tiles / scales.unsqueeze(-1)
    magnitude = values.abs().double()
    exponent = torch.frexp(magnitude.clamp_min(2.0**-14)).exponent - 1
    significand = torch.ldexp(magnitude, 6 - exponent).round()  # halves to even
    codes = significand.int() + (exponent + 14) * 64 + values.signbit().int() * 0x800
    codes.masked_fill_(values.isnan(), 0x7FF)
    pairs = codes.view(m, k // 2, 2)
    three = pairs[..., 0] | pairs[..., 1] << 12
    data = torch.stack([three & 0xFF, three >> 8 & 0xFF, three >> 16], -1).to(torch.uint8)
    return data.view(m, k // 2 * 3), scales


def unpack_e5m6(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A code is the upper 12 bits of a float16."""
    m, k = data.shape[0], data.shape[1] // 3 * 2
    three = data.view(m, k // 2, 3).int()
    low, middle, high = three.unbind(-1)
    codes = torch.stack([low | (middle & 0xF) << 8, middle >> 4 | high << 4], -1)
    halves = (codes << 4).to(torch.int16).view(torch.float16)
    tiles = halves.view(*scales.shape, TILE).float() * scales.unsqueeze(-1)
    return tiles.view(m, k).to(dtype)


# SwiGLU

LOG2_E = 1.44269502


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + 2^(-x·log2 e)), each operation rounded to FP32; 0 where that is below 2^-126.

    2^x and the reciprocal are the nearest floats, as in the emulator; a GPU's err in the last bits.
    """
    exp2 = torch.exp2((x * -LOG2_E).double()).float()
    y = 1 / (1 + exp2)
    return y.masked_fill_(y < SMALLEST_SCALE, 0.0)


def swiglu(
    x: Tensor, weights: Tensor | None = None, *, sigmoid: Callable[[Tensor], Tensor] = sigmoid
) -> Tensor:
    """silu(gate)·up·weight in FP32, rounded to BF16, for x = [gate, up] along the last dimension."""
    gate, up = x.float().chunk(2, -1)
    y = gate * sigmoid(gate) * up
    return (y if weights is None else y * weights.unsqueeze(-1)).bfloat16()


def swiglu_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor | None = None,
    *,
    sigmoid: Callable[[Tensor], Tensor] = sigmoid,
) -> tuple[Tensor, Tensor]:
    """The gradient of x = [gate, up] `[M, 2·I]`, and silu(gate)·up·weight `[M, I]`, both rounded to BF16."""
    gate, up = x.float().chunk(2, -1)
    d, s = dy.float(), sigmoid(gate)
    silu = gate * s
    y = silu * up
    if weights is not None:
        d, y = d * weights.unsqueeze(-1), y * weights.unsqueeze(-1)
    d_gate = (d * up) * (s * (1 + gate * (1 - s)))
    return torch.cat([d_gate, d * silu], -1).bfloat16(), y.bfloat16()


def swiglu_weight_gradients(
    dy: Tensor, x: Tensor, *, sigmoid: Callable[[Tensor], Tensor] = sigmoid
) -> Tensor:
    """Of each row of a tile the sum of dy·silu(gate)·up in FP32, `[I/128, M]`, in the kernel's order."""
    gate, up = x.float().chunk(2, -1)
    products = (dy.float() * (gate * sigmoid(gate) * up)).unflatten(-1, (-1, TILE // 4, 4))
    sums = products[..., 0] + products[..., 1] + products[..., 2] + products[..., 3]
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, -1)
        sums = low + high
    return sums.squeeze(-1).t()


# Routing


def choose_experts(scores: Tensor, n_group: int, topk_group: int, top_k: int) -> Tensor:
    """The top_k experts of each token, all from its topk_group best groups (node-limited routing).

    scores: [T, E], the bias added. A group's score is the sum of its top_k / topk_group highest, added from
    the highest down. NaN counts as the highest; equal scores go to the lower index.
    Returns int64 [T, top_k], ascending in a row.
    """
    if topk_group < n_group:
        grouped = scores.unflatten(-1, (n_group, -1))
        highest = grouped.topk(min(top_k // topk_group, grouped.shape[-1]), dim=-1).values
        best = _sum(highest).sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        allowed = torch.zeros(scores.shape[0], n_group, dtype=torch.bool, device=scores.device)
        allowed.scatter_(1, best, True)
        scores = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices
    return ranked[:, :top_k].sort(dim=-1).values


def routing_weights(chosen: Tensor, scaling: float) -> Tensor:
    """The unbiased scores [T, K] of the chosen experts over their sum, which is taken in their order."""
    return chosen / (_sum(chosen).unsqueeze(-1) + 1e-20) * scaling


def _sum(x: Tensor) -> Tensor:
    """Along the last dimension, in order: `Tensor.sum` leaves the order open."""
    return functools.reduce(torch.add, x.unbind(-1))


def route(
    scores: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, scaling: float, logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if logits:
        scores = sigmoid(scores)
    experts = choose_experts(scores + bias, n_group, topk_group, top_k)
    counts = torch.bincount(experts.flatten(), minlength=bias.shape[0]).int()
    return experts, routing_weights(scores.gather(1, experts), scaling), counts


# GEMM


@torch.autocast("cpu", enabled=False)
def _matmul_nt(a: QuantizedTensor, b: QuantizedTensor, accumulation: Accumulation) -> Tensor:
    """FP32 a·bᵀ."""
    if accumulation == "hopper":
        return _hopper_matmul_nt(a, b)
    if a.shape[1] <= PANEL:
        return dequantize(a) @ dequantize(b).t()
    y = dequantize(_columns(a, 0, PANEL)) @ dequantize(_columns(b, 0, PANEL)).t()
    for k in range(PANEL, a.shape[1], PANEL):
        y.addmm_(dequantize(_columns(a, k, k + PANEL)), dequantize(_columns(b, k, k + PANEL)).t())
    return y


def _rows(q: QuantizedTensor, low: int, high: int) -> QuantizedTensor:
    return QuantizedTensor(q.data[low:high], q.scales[low:high], q.block)


def _columns(q: QuantizedTensor, low: int, high: int) -> QuantizedTensor:
    return QuantizedTensor(q.data[:, low:high], q.scales[:, low // TILE : ceil_div(high, TILE)], q.block)


def _group(q: QuantizedTensor, g: int) -> QuantizedTensor:
    return QuantizedTensor(q.data[g], q.scales[g], q.block)


def fp8_gemm(a: QuantizedTensor, b: QuantizedTensor, accumulation: Accumulation = "fp32") -> Tensor:
    return _matmul_nt(a, b, accumulation).bfloat16()


def grouped_fp8_gemm(
    a: QuantizedTensor, b: QuantizedTensor, group_offsets: Tensor, accumulation: Accumulation = "fp32"
) -> Tensor:
    offsets = read_offsets("grouped_fp8_gemm", group_offsets, a.shape[0], "the rows of a.data")
    out = a.data.new_zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    for g, (low, high) in enumerate(pairwise(offsets)):
        if low < high:
            out[low:high] = _matmul_nt(_rows(a, low, high), _group(b, g), accumulation)
    return out


def masked_grouped_fp8_gemm(
    a: QuantizedTensor, b: QuantizedTensor, counts: Tensor, accumulation: Accumulation = "fp32"
) -> Tensor:
    out = a.data.new_zeros(a.shape[0], a.shape[1], b.shape[1], dtype=torch.bfloat16)
    for g, count in enumerate(read_counts("masked_grouped_fp8_gemm", counts, a.shape[1])):
        if count:
            out[g, :count] = _matmul_nt(_rows(_group(a, g), 0, count), _group(b, g), accumulation)
    return out


def fp8_wgrad(
    dy_t: QuantizedTensor,
    x_t: QuantizedTensor,
    out: Tensor,
    accumulate: bool = False,
    group_offsets: Tensor | None = None,
    accumulation: Accumulation = "fp32",
) -> Tensor:
    if group_offsets is None:
        return _write(out, _matmul_nt(dy_t, x_t, accumulation), accumulate)
    offsets = read_offsets("fp8_wgrad", group_offsets)
    starts = [0]
    for low, high in pairwise(offsets):
        starts.append(starts[-1] + round_up(high - low, TILE))
    if starts[-1] > dy_t.shape[1]:
        raise ValueError(
            f"fp8_wgrad: group_offsets takes {starts[-1]} token columns (in {TILE}s a group), expected "
            f"at most {dy_t.shape[1]}, those of dy_t.data; quantise both operands with the same group_offsets"
        )
    for g, (start, end) in enumerate(pairwise(starts)):
        if start == end and accumulate:
            continue
        y = _matmul_nt(_columns(dy_t, start, end), _columns(x_t, start, end), accumulation)
        _write(out[g], y, accumulate)
    return out


def _write(out: Tensor, y: Tensor, accumulate: bool) -> Tensor:
    return out.add_(y) if accumulate else out.copy_(y)


# Hopper's arithmetic


def _exponent(x: Tensor) -> Tensor:
    """floor(log2|x|) of normal FP32 numbers."""
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


def _power_of_2(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def tensor_core(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """One wgmma step of Hopper's FP8 tensor core, bit for bit: c + a·bᵀ of `[M, 32]`, `[N, 32]` and `[M, N]`.

    `a` and `b` hold e4m3 values as FP32; `c` and the result are FP32 with 13 fraction bits (E8M13). A product
    has the exponent ea + eb of its operands (a subnormal's is -6) and is not normalised. The nonzero products
    and c are truncated toward zero to 13 fraction bits under their largest exponent and added exactly; the
    sum is normalised and truncated toward zero to 13 fraction bits. NaN gives 0x7FFFFFFF.
    Source: the published bit-accurate models of the hardware (MMA-Sim, arXiv 2511.10909).
    """
    never = -(1 << 20)  # zeros take no part in the largest exponent
    ea = _exponent(a).clamp_min_(-6).masked_fill_(a == 0, never)
    eb = _exponent(b).clamp_min_(-6).masked_fill_(b == 0, never)
    ec = _exponent(c).masked_fill_(c == 0, never)
    largest = torch.maximum((ea[:, None, :] + eb[None, :, :]).amax(-1), ec).clamp_min_(-100)
    # 33 integers below 2^15: FP32 holds every partial sum exactly, in any order.
    to_units = _power_of_2(FRACTION_BITS - largest)
    units = (a[:, None, :] * b[None, :, :]).mul_(to_units.unsqueeze(-1)).trunc_().sum(-1)
    units += (c * to_units).trunc_()
    kept = (units.view(torch.int32) & -(1 << (23 - FRACTION_BITS))).view(torch.float32)
    result = kept.mul_(_power_of_2(largest - FRACTION_BITS))
    result.view(torch.int32).masked_fill_(units.isnan(), 0x7FFFFFFF)
    return result


def tensor_core_dot(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ `[M, N]` of e4m3 values held as FP32, summed over K in the tensor core's accumulator alone."""
    a, b = (pad(t, (0, -t.shape[1] % WGMMA_K)) for t in (a, b))
    c = a.new_zeros(a.shape[0], b.shape[0])
    rows = max(1, (1 << 20) // max(1, b.shape[0] * WGMMA_K))  # bounds the products held at once
    for m in range(0, a.shape[0], rows):
        for k in range(0, a.shape[1], WGMMA_K):
            part = slice(k, k + WGMMA_K)
            c[m : m + rows] = tensor_core(a[m : m + rows, part], b[:, part], c[m : m + rows])
    return c


def fma(s: Tensor, partial: Tensor, y: Tensor) -> Tensor:
    """FP32 `s·partial + y` with one rounding, where `partial` has at most 29 significant bits (here 14).

    The product is then exact in FP64. Its FP64 sum with `y` is rounded to odd (two-sum yields the error;
    where there is one, the last bit of the sum is made 1), after which rounding to FP32 gives what one
    rounding would have.
    """
    p, y64 = s.double() * partial.double(), y.double()
    total = p + y64
    share = total - p
    error = (p - (total - share)) + (y64 - share)
    to_odd = (error != 0) & error.isfinite() & ((total.view(torch.int64) & 1) == 0)
    toward = torch.where(error > 0, torch.inf, -torch.inf).double()
    return torch.where(to_odd, torch.nextafter(total, toward), total).float()


def _hopper_matmul_nt(a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
    values_a, values_b = decode(a.data), decode(b.data)
    y = values_a.new_zeros(a.shape[0], b.shape[0])
    for tile in range(a.scales.shape[1]):
        part = slice(tile * TILE, (tile + 1) * TILE)
        scales_b = b.scales[:, tile].repeat_interleave(b.block[0])[: b.shape[0]]
        s = a.scales[:, tile, None] * scales_b
        y = fma(s, tensor_core_dot(values_a[:, part], values_b[:, part]), y)
    return y
