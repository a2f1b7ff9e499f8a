"""FP8 GEMM: 1x128-scaled rows times 128x128-scaled weights to BF16 (DeepSeek-V3 report, section 3.3.2).

Per 128 of K the tensor core's partial sum is promoted: `s = rn(scale_a·scale_b); y = fma(s, partial, y)` in
FP32, K ascending; y is rounded to BF16, to nearest even. The CPU backend sums in FP32 throughout
(reference.py says more). An operand that requires grad is refused while gradients are recorded.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks, launch, quantized, reference
from .checks import ceil_div, round_up
from .jit import Kernel
from .quantized import ROW, SQUARE, TILE, QuantizedTensor, mn_major
from .tensor_map import TensorMap

SHARED_MEMORY = 227 * 1024  # bytes a block may have on Hopper
WARPGROUP = 128  # threads
WAVE = 64  # rows of a wgmma
MAX_STAGES = 8
TILES = (
    *((256, 64), (256, 96), (256, 128)),
    *((128, n) for n in (32, 64, 96, 128, 160, 192)),
    *((64, n) for n in (16, 32, 64, 96, 128, 160, 192)),
)


@dataclass(frozen=True)
class GemmConfig:
    """How csrc/kernels/gemm.cuh is instantiated; what follows from a tile's shape is in its `Layout`.

    block_m, block_n: rows and columns of an output tile. stages: tiles of operands in flight, 128 of K each.
    strip: width in tiles of the strips in which tiles are taken.
    """

    block_m: int
    block_n: int
    stages: int
    strip: int = 16

    @property
    def math_warpgroups(self) -> int:
        return 2 if self.block_m > WAVE else 1

    @property
    def threads(self) -> int:
        return (self.math_warpgroups + 1) * WARPGROUP

    @property
    def panel(self) -> int:
        """Columns of D that leave in one bulk store."""
        return next(width for width in (64, 32, 16) if self.block_n % width == 0)

    @property
    def shared_bytes(self) -> int:
        barriers = 2 * 8 * self.stages
        used = (
            self.stages * stage_bytes(self.block_m, self.block_n) + self.block_m * self.block_n * 2 + barriers
        )
        return round_up(used, 1024)

    @property
    def kernel(self) -> Kernel:
        return _kernel(self)


@functools.cache
def _kernel(config: GemmConfig) -> Kernel:
    template = (config.block_m, config.block_n, config.stages, config.strip)
    return Kernel("gemm.cuh", "fp8_gemm", template)


def stage_bytes(block_m: int, block_n: int) -> int:
    """Shared memory of one stage: both operands and the scales of A."""
    return (block_m + block_n) * TILE + block_m * 4


def config_of_tile(block_m: int, block_n: int) -> GemmConfig:
    """The deepest ring that fits beside the output tile."""
    room = SHARED_MEMORY - block_m * block_n * 2 - 1024
    return GemmConfig(block_m, block_n, min(MAX_STAGES, room // stage_bytes(block_m, block_n)))


@functools.lru_cache(maxsize=4096)
def choose_config(m: int, n: int, num_sms: int) -> GemmConfig:
    """The tile of `TILES` with the least estimated time for `[m, n]` on `num_sms` SMs.

    Blocks take tiles in waves of `num_sms`. Per 128 of K a tile costs the larger of its tensor core's cycles
    (512 for 128x128) and its loads' (64 bytes a cycle from L2); a lone warpgroup's promotion is not hidden
    behind another's wgmma. Of equals the larger tile, which reads less.
    """

    def cycles(tile: tuple[int, int]) -> tuple[float, int]:
        block_m, block_n = tile
        waves = ceil_div(ceil_div(m, block_m) * ceil_div(n, block_n), num_sms)
        multiply = block_m * block_n / 32
        promote = block_m * block_n / 128 if block_m == WAVE else 0
        load = stage_bytes(block_m, block_n) / 64
        return waves * max(multiply + promote, load), -block_m * block_n

    return config_of_tile(*min(TILES, key=cycles))


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
    out = _fake(a, a_scales, b, b_scales)
    if out.numel() == 0 or a.shape[1] == 0:
        return out.zero_()
    num_sms = launch.num_sms(a)
    _launch(choose_config(*out.shape, num_sms), a, a_scales, b, b_scales, out, num_sms)
    return out


def _launch(
    config: GemmConfig, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor, num_sms: int
) -> None:
    tiles = ceil_div(out.shape[0], config.block_m) * ceil_div(out.shape[1], config.block_n)
    launch.launch(
        config.kernel,
        (min(tiles, num_sms), 1, 1),
        (config.threads, 1, 1),
        arguments(config, a, a_scales, b, b_scales, out),
        shared_bytes=config.shared_bytes,
        programmatic=True,
    )


def arguments(
    config: GemmConfig, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor
) -> tuple[launch.Argument, ...]:
    """The arguments of the kernel, in its order."""
    (m, k), n = a.shape, b.shape[0]
    a_scales = mn_major(a_scales)
    k_tiles = a_scales.shape[1]
    return (
        TensorMap(a, (config.block_m, TILE)),
        TensorMap(b, (config.block_n, TILE)),
        TensorMap(a_scales, (1, config.block_m), 0, shape=(k_tiles, m), strides=(round_up(m, 4), 1)),
        TensorMap(out, (WAVE, config.panel), 2 * config.panel),
        b_scales.contiguous(),
        m,
        n,
        k,
    )


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
