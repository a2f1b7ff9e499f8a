"""A block-scaled FP8 GEMM in Triton, as a project would write that has no other kernel. A peer only."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    a, a_scales, b, b_scales, out, m, n, k, a_scale_row, a_scale_column, b_scale_row,
    block_m: tl.constexpr, block_n: tl.constexpr, strip: tl.constexpr,
):  # fmt: skip
    # Programs walk strips of `strip` rows of tiles, so that what they read stays in L2.
    columns = tl.cdiv(n, block_n)
    in_strip = strip * columns
    index = tl.program_id(0)
    first = index // in_strip * strip
    height = min(tl.cdiv(m, block_m) - first, strip)
    row = first + index % in_strip % height
    column = index % in_strip // height

    rows = row * block_m + tl.arange(0, block_m)
    cols = column * block_n + tl.arange(0, block_n)
    ks = tl.arange(0, 128)
    # Rows past the end read the first ones again; they are not stored.
    a_at = a + (rows % m)[:, None] * k + ks[None, :]
    b_at = b + (cols % n)[None, :] * k + ks[:, None]
    a_scale_at = a_scales + (rows % m) * a_scale_row
    b_scale_at = b_scales + (cols % n) // 128 * b_scale_row
    total = tl.zeros((block_m, block_n), dtype=tl.float32)
    for block in range(tl.cdiv(k, 128)):
        inside = ks < k - block * 128
        x = tl.load(a_at + block * 128, mask=inside[None, :], other=0.0)
        w = tl.load(b_at + block * 128, mask=inside[:, None], other=0.0)
        scale_a = tl.load(a_scale_at + block * a_scale_column)
        scale_b = tl.load(b_scale_at + block)
        total += tl.dot(x, w) * scale_a[:, None] * scale_b[None, :]
    where = out + rows[:, None].to(tl.int64) * n + cols[None, :]
    tl.store(where, total.to(tl.bfloat16), mask=(rows < m)[:, None] & (cols < n)[None, :])


def fp8_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """As `dsv3_kernels.fp8_gemm`, of its operands' parts."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=torch.bfloat16, device=a.device)
    block_m, block_n, warps, stages = (128, 128, 8, 3) if m > 128 else (64, 128, 4, 5)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    _kernel[grid](
        a, a_scales, b, b_scales, out, m, n, k, a_scales.stride(0), a_scales.stride(1), b_scales.stride(0),
        block_m=block_m, block_n=block_n, strip=8, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
