"""FP8 GEMM: 1x128-scaled rows times 128x128-scaled weights to BF16 (DeepSeek-V3 report, section 3.3.2).

Per 128 of K the tensor core's partial sum is promoted: `s = rn(scale_a·scale_b); y = fma(s, partial, y)` in
FP32, K ascending; y is rounded to BF16, to nearest even. The reference backend equals this up to FP32
rounding.
"""

import torch
from torch import Tensor

from . import checks, launch, quantized, reference
from .quantized import ROW, SQUARE, QuantizedTensor


def _operands(
    op: str, a: object, b: object, rank_a: int, rank_b: int
) -> tuple[QuantizedTensor, QuantizedTensor]:
    qa = quantized.operand(op, "a", a, ROW, (rank_a,))
    qb = quantized.operand(op, "b", b, SQUARE, (rank_b,))
    checks.same_device(op, "b.data", qb.data, "a.data", qa.data)
    n, k = qb.shape[-2:]
    if qa.shape[-1] != k:
        raise ValueError(
            f"{op}: b.data has K = {k} (shape {tuple(qb.shape)}), "
            f"expected {qa.shape[-1]}, the K of a.data of shape {tuple(qa.shape)}"
        )
    checks.multiple(op, "a.data", "K", k, 16)
    checks.multiple(op, "b.data", "N", n, 8)
    return qa, qb


def fp8_gemm(a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
    """a·bᵀ.

    a: block (1, 128), data `[M, K]`; b: block (128, 128), data `[N, K]`; data contiguous and 16-byte aligned,
        K a multiple of 16, N of 8. A (data, scales) tuple is taken for either. `a.scales` may have any
        strides; kernels read MN-major ones as they are and copy others first.
    Returns bfloat16 `[M, N]`, contiguous. K = 0 gives zeros.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, block, stride, alignment
    or device.
    """
    a, b = _operands("fp8_gemm", a, b, 2, 2)
    run = torch.ops.dsv3_kernels.fp8_gemm if torch.compiler.is_compiling() else _fp8_gemm
    return run(a.data, a.scales, b.data, b.scales)


def _fp8_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    if launch.world(a) == "reference":
        return reference.fp8_gemm(QuantizedTensor(a, a_scales, ROW), QuantizedTensor(b, b_scales, SQUARE))
    launch.no_kernel("fp8_gemm")


def grouped_fp8_gemm(a: QuantizedTensor, b: QuantizedTensor, group_offsets: Tensor) -> Tensor:
    """Rows of `a`, sorted by group, each times its group's weight: `out[m] = a[m]·b[g]ᵀ`.

    a: block (1, 128), data `[M, K]`; b: block (128, 128), data `[G, N, K]`; as in `fp8_gemm`.
    group_offsets: int32 `[G+1]`, running sum of group sizes from 0 to at most M: rows group_offsets[g] to
        group_offsets[g+1] belong to group g. Any size, zero too, needs no padding.
    Returns bfloat16 `[M, N]`. Rows past the last group are zero here; kernels leave them unwritten.
    Raises as `fp8_gemm`, and ValueError for offsets that descend, overrun or do not start at 0. Offsets on a
    GPU are not read back; there the kernel clamps them to M.
    """
    op = "grouped_fp8_gemm"
    a, b = _operands(op, a, b, 2, 3)
    checks.offsets(op, group_offsets, "a.data", a.data, b.shape[0])
    run = torch.ops.dsv3_kernels.grouped_fp8_gemm if torch.compiler.is_compiling() else _grouped
    return run(a.data, a.scales, b.data, b.scales, group_offsets)


def _grouped(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, group_offsets: Tensor) -> Tensor:
    op = "grouped_fp8_gemm"
    if launch.world(a) == "reference":
        qa, qb = QuantizedTensor(a, a_scales, ROW), QuantizedTensor(b, b_scales, SQUARE)
        return reference.grouped_fp8_gemm(qa, qb, group_offsets)
    launch.no_kernel(op)


def masked_grouped_fp8_gemm(a: QuantizedTensor, b: QuantizedTensor, counts: Tensor) -> Tensor:
    """The first `counts[g]` rows of `a[g]` times the weight of group g: decode-time batches of fixed shape.

    a: block (1, 128), data `[G, max_m, K]`; b: block (128, 128), data `[G, N, K]`; as in `fp8_gemm`.
    counts: int32 `[G]`, each 0 to max_m.
    Returns bfloat16 `[G, max_m, N]`. Rows past a group's count are zero here; kernels leave them unwritten.
    Raises as `fp8_gemm`, and ValueError for counts out of range. Counts on a GPU are not read back; there the
    kernel clamps them to max_m.
    """
    op = "masked_grouped_fp8_gemm"
    a, b = _operands(op, a, b, 3, 3)
    groups = a.shape[0]
    if b.shape[0] != groups:
        raise ValueError(
            f"{op}: b.data has {b.shape[0]} groups (shape {tuple(b.shape)}), "
            f"expected {groups}, the groups of a.data of shape {tuple(a.shape)}"
        )
    checks.shape(op, "counts", checks.index_vector(op, "counts", counts, "a.data", a.data), (groups,), "(G,)")
    run = torch.ops.dsv3_kernels.masked_grouped_fp8_gemm if torch.compiler.is_compiling() else _masked
    return run(a.data, a.scales, b.data, b.scales, counts)


def _masked(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, counts: Tensor) -> Tensor:
    op = "masked_grouped_fp8_gemm"
    if launch.world(a) == "reference":
        qa, qb = QuantizedTensor(a, a_scales, ROW), QuantizedTensor(b, b_scales, SQUARE)
        return reference.masked_grouped_fp8_gemm(qa, qb, counts)
    launch.no_kernel(op)


def _fake(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    return torch.empty(*a.shape[:-1], b.shape[-2], dtype=torch.bfloat16, device=a.device)


def _fake_grouped(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, group_offsets: Tensor) -> Tensor:
    return _fake(a, a_scales, b, b_scales)


def _fake_masked(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, counts: Tensor) -> Tensor:
    return _fake(a, a_scales, b, b_scales)


torch.library.custom_op("dsv3_kernels::fp8_gemm", _fp8_gemm, mutates_args=()).register_fake(_fake)
torch.library.custom_op("dsv3_kernels::grouped_fp8_gemm", _grouped, mutates_args=()).register_fake(
    _fake_grouped
)
torch.library.custom_op("dsv3_kernels::masked_grouped_fp8_gemm", _masked, mutates_args=()).register_fake(
    _fake_masked
)
