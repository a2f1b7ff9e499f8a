"""FP8 weight gradient: tiles of 1x128 along tokens, FP32 result (DeepSeek-V3 report, section 3.3.2).

Per 128 tokens the tensor core's partial sum is promoted: `s = rn(scale_dy·scale_x); y = fma(s, partial, y)`
in FP32, tokens ascending. The CPU backend sums in FP32 throughout (reference.py says more).
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks, launch, quantized, reference
from .checks import ceil_div, round_up
from .hopper import L2_BYTES, SHARED_MEMORY, WARPGROUP, WAVE
from .jit import Kernel
from .quantized import ROW, TILE, QuantizedTensor, mn_major
from .tensor_map import MapLayout

BLOCK_M = 2 * WAVE  # two warpgroups multiply
THREADS = 3 * WARPGROUP  # and one moves data
PANEL = 32  # columns of the gradient that move in one bulk copy
MAX_STAGES = 6
BLOCK_N = (64, 96, 128, 160, 192)


@dataclass(frozen=True)
class WgradConfig:
    """How csrc/kernels/wgrad.cuh is instantiated; what follows from the width of a tile is in its `Layout`.

    block_n: columns of an output tile of 128 rows. stages: tiles of operands in flight, 128 tokens each.
    cluster: blocks that take tiles one below the other and load x together, 1 or 2. strip: width in tiles of
    the strips in which tiles are taken.
    """

    block_n: int
    stages: int
    cluster: int = 1
    strip: int = 8

    @property
    def shared_bytes(self) -> int:
        barriers = 2 * 8 * (self.stages + 2)
        used = self.stages * stage_bytes(self.block_n) + BLOCK_M * self.block_n * 4 + barriers
        return round_up(used, 1024)

    @property
    def kernel(self) -> Kernel:
        return Kernel("wgrad.cuh", "fp8_wgrad", (self.block_n, self.stages, self.cluster))

    def clusters(self, groups: int, n: int, k: int) -> int:
        """Of tiles, in gradients `[groups, n, k]`."""
        return groups * ceil_div(n, self.cluster * BLOCK_M) * ceil_div(k, self.block_n)


def stage_bytes(block_n: int) -> int:
    """Shared memory of one stage: 128 tokens of both operands and a scale a row."""
    return (BLOCK_M + block_n) * (TILE + 4)


def config_of_width(block_n: int, cluster: int = 1) -> WgradConfig:
    """The deepest ring that fits beside the FP32 output tile."""
    room = SHARED_MEMORY - BLOCK_M * block_n * 4 - 1024
    return WgradConfig(block_n, min(MAX_STAGES, room // stage_bytes(block_n)), cluster)


CONFIGS = tuple(config_of_width(width, cluster) for width in BLOCK_N for cluster in (1, 2))


@functools.lru_cache(maxsize=4096)
def choose_config(groups: int, n: int, k: int, num_sms: int) -> WgradConfig:
    """The one of `CONFIGS` with the least estimated time for `[groups, n, k]` on `num_sms` SMs.

    Blocks take tiles in waves of `num_sms`. Per 128 tokens a tile costs the larger of its tensor core's
    cycles (512 for 128x128) and its loads' from L2, which a cluster of two halves for x. How many tokens
    there are is not asked: a group's count lies on the device, and all tiles of a group have the same. Of
    equals the one that loads less.
    """

    def cost(config: WgradConfig) -> tuple[float, float]:
        shared = config.block_n * TILE // 2 if config.cluster == 2 else 0
        load = (stage_bytes(config.block_n) - shared) / L2_BYTES
        waves = ceil_div(config.clusters(groups, n, k), num_sms // config.cluster)
        return waves * max(BLOCK_M * config.block_n / 32, load), load / config.block_n

    most = min(num_sms, ceil_div(n, BLOCK_M))  # a lone row of tiles has nobody to share x with
    return min((config for config in CONFIGS if config.cluster <= most), key=cost)


def kernels() -> dict[str, list[Kernel]]:
    """Every instance that the ops here may launch, for `warmup`."""
    return {"fp8_wgrad": [config.kernel for config in CONFIGS]}


def fp8_wgrad(
    dy_t: QuantizedTensor,
    x_t: QuantizedTensor,
    out: Tensor | None = None,
    accumulate: bool = False,
    group_offsets: Tensor | None = None,
    *,
    num_sms: int | None = None,
) -> Tensor:
    """dWᵍ = dyᵀ·x over the tokens of each group: the weight gradient of y = x·Wᵀ.

    dy_t, x_t: block (1, 128) from `quantize_1x128_t` with the same `group_offsets`: data `[N, T]` and `[K,
        T]`, N and K multiples of 8, T of 128. A (data, scales) tuple is taken for either. Scales may have any
        strides; kernels read MN-major ones as they are and copy others first.
    out: float32 `[N, K]`, or `[G, N, K]` with groups, contiguous, 16-byte aligned, sharing no memory with
        another argument; made when None. Written in place and returned.
    accumulate: add to `out` instead of overwriting it: `out = out + y`, one FP32 addition after the whole sum
        y.
    group_offsets: int32 `[G+1]`, the offsets in tokens that both operands were quantised with. A group
        without tokens has gradient zero; with `accumulate` its part of `out` is left alone.
    num_sms: how many SMs of the GPU the kernel may take; all when None. The result does not depend on it.
    Raises TypeError for a wrong type or dtype, ValueError for a wrong rank, shape, block, stride, alignment,
    device, offsets or num_sms, or for an `out` that overlaps another argument. Offsets on a GPU are not read
    back; there the kernel clamps them, and the next launch or `synchronize()` raises DeviceValueError.
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
        read = [("dy_t.data", dy_t.data), ("dy_t.scales", dy_t.scales)]
        read += [("x_t.data", x_t.data), ("x_t.scales", x_t.scales)]
        read += [("group_offsets", group_offsets)] if group_offsets is not None else []
        checks.apart(op, "out", out, read)
    checks.at_least_one(op, "num_sms", num_sms)
    run = torch.ops.dsv3_kernels.fp8_wgrad if torch.compiler.is_compiling() else _fp8_wgrad
    run(dy_t.data, dy_t.scales, x_t.data, x_t.scales, out, accumulate, group_offsets, num_sms)
    return out


def _fp8_wgrad(
    dy_t: Tensor,
    dy_scales: Tensor,
    x_t: Tensor,
    x_scales: Tensor,
    out: Tensor,
    accumulate: bool,
    group_offsets: Tensor | None,
    num_sms: int | None,
) -> None:
    if launch.world(dy_t) == "reference":
        q_dy, q_x = QuantizedTensor(dy_t, dy_scales, ROW), QuantizedTensor(x_t, x_scales, ROW)
        reference.fp8_wgrad(q_dy, q_x, out, accumulate, group_offsets)
        return
    if out.numel() == 0 or dy_t.shape[1] == 0:  # a tensor map cannot hold nothing
        if not accumulate:
            out.zero_()
        return
    groups, n, k = out.shape if out.ndim == 3 else (1, *out.shape)
    config = choose_config(groups, n, k, launch.num_sms(dy_t, num_sms))
    _launch(config, dy_t, dy_scales, x_t, x_scales, out, accumulate, group_offsets, num_sms)


def _launch(
    config: WgradConfig,
    dy_t: Tensor,
    dy_scales: Tensor,
    x_t: Tensor,
    x_scales: Tensor,
    out: Tensor,
    accumulate: bool,
    group_offsets: Tensor | None,
    num_sms: int | None,
) -> None:
    sms = launch.num_sms(dy_t, num_sms)
    prepared = prepare(config, tuple(out.shape), dy_t.shape[1], group_offsets is not None, accumulate, sms)
    offsets = () if group_offsets is None else (group_offsets,)
    prepared(dy_t, x_t, mn_major(dy_scales), mn_major(x_scales), out, *offsets)


@functools.lru_cache(maxsize=4096)
def prepare(
    config: WgradConfig, shape: tuple[int, ...], tokens: int, grouped: bool, accumulate: bool, num_sms: int
) -> launch.Prepared:
    """The launch for a gradient of `shape`; takes both operands, their scales, the gradient, any offsets."""
    groups, n, k = shape if len(shape) == 3 else (1, *shape)
    clusters = min(config.clusters(groups, n, k), num_sms // config.cluster)
    return launch.Prepared(
        config.kernel,
        (clusters * config.cluster, 1, 1),
        (THREADS, 1, 1),
        (
            MapLayout(torch.float8_e4m3fn, (BLOCK_M, TILE), (n, tokens), (tokens, 1)),
            MapLayout(
                torch.float8_e4m3fn, (config.block_n // config.cluster, TILE), (k, tokens), (tokens, 1)
            ),
            _scales_layout(n, tokens, BLOCK_M),
            _scales_layout(k, tokens, config.block_n),
            MapLayout(torch.float32, (1, WAVE, PANEL), (groups, n, k), (n * k, k, 1)),
            launch.Slot.ADDRESS if grouped else 0,
            *(groups, n, k, tokens // TILE, config.strip, int(accumulate)),
            launch.Slot.ERROR_WORD,
        ),
        cluster=(config.cluster, 1, 1),
        shared_bytes=config.shared_bytes,
        programmatic=True,
    )


def _scales_layout(width: int, tokens: int, rows: int) -> MapLayout:
    return MapLayout(torch.float32, (1, rows), (tokens // TILE, width), (round_up(width, 4), 1), swizzle=0)


torch.library.custom_op("dsv3_kernels::fp8_wgrad", _fp8_wgrad, mutates_args=("out",)).register_fake(
    lambda *_: None
)
