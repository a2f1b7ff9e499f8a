"""What the tests of gemm.cuh share: operands, and runs in the emulator on poisoned outputs."""

import torch

import dsv3_kernels as dsv3
from dsv3_kernels import emulator, gemm, reference

GROUPINGS = ("none", "offsets", "counts")
ALL_CONFIGS = [config for grouping in GROUPINGS for config in gemm.configs(grouping)]
POISON = torch.nan


def name_of(config):
    swap = "swapped-" if config.swap else ""
    share = "" if config.multicast == "none" else f"-share-{config.multicast}"
    return f"{config.grouping}-{swap}{config.block_m}x{config.block_n}{share}"


def schedule_of(seed):
    """Random steps, or random priorities with few changes: then some warps run far ahead of others."""
    return ("random", "pct")[seed % 2]


def operands(shape_a, shape_b, seed, ugly=False):
    """Quantised random operands. Ugly ones hold zeros, subnormals, huge tiles, NaN codes and NaN scales."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(shape, generator=generator) for shape in (shape_a, shape_b))
    if ugly:
        for t in (x, w):
            t *= 2.0 ** torch.randint(-20, 20, t.shape, generator=generator)
            t[torch.rand(t.shape, generator=generator) < 0.2] = 0
    a, b = dsv3.quantize_1x128(x.bfloat16()), dsv3.quantize_128x128(w.bfloat16())
    if ugly:
        codes = a.data.view(torch.uint8)
        codes[..., int(torch.randint(shape_a[-2], (1,), generator=generator)), -1] = 0x7F
        a.scales[..., 0, 0] = torch.nan
    return a, b


def assert_same_bits(got, expected):
    """Equal in every bit; of a NaN neither the sign nor the payload counts."""
    nan = expected.isnan()
    same = got.view(torch.int16) == expected.view(torch.int16)
    wrong = (~torch.where(nan, got.isnan(), same)).nonzero()[:5].tolist()
    assert not wrong, [(at, got[tuple(at)].item(), expected[tuple(at)].item()) for at in wrong]


def owned_rows(grouping, m, group_list):
    """Which rows of the output belong to a group."""
    if grouping == "none":
        return torch.ones(m, dtype=torch.bool)
    if grouping == "offsets":
        return torch.arange(m) < group_list[-1]
    return torch.arange(m) < group_list[:, None]


def run_config(config, a, a_scales, b, b_scales, out, group_list, num_sms):
    """Launch one instance of the kernel on at most `num_sms` SMs."""
    groups = b.shape[0] if b.ndim == 3 else 1
    launch = gemm.prepare(config, *a.shape[-2:], b.shape[-2], groups, num_sms)
    launch(*gemm.operands(a, a_scales, b, b_scales, out, group_list))


def check(config, m, n, k, seed, num_sms, sizes=None, ugly=False):
    """One run of a configuration, bit for bit; rows that belong to no group keep their poison.

    sizes: of the groups, with offsets or counts. m: rows in all, or of a group where they are counted.
    Returns the virtual GPU.
    """
    groups = () if sizes is None else (len(sizes),)
    counted = config.grouping == "counts"
    a, b = operands(((*groups, m, k) if counted else (m, k)), (*groups, n, k), seed, ugly)
    group_list = None
    if sizes is not None:
        group_list = torch.tensor(sizes if counted else [0, *sizes], dtype=torch.int32)
        group_list = group_list if counted else group_list.cumsum(0).int()
    out = torch.full((*a.shape[:-1], n), POISON, dtype=torch.bfloat16)
    with emulator.virtual_gpu(max(num_sms, config.cluster), seed, schedule_of(seed)) as gpu:
        run_config(config, a.data, a.scales, b.data, b.scales, out, group_list, num_sms)
    op, arguments = {
        "none": (reference.fp8_gemm, ()),
        "offsets": (reference.grouped_fp8_gemm, (group_list,)),
        "counts": (reference.masked_grouped_fp8_gemm, (group_list,)),
    }[config.grouping]
    owned = owned_rows(config.grouping, m, group_list)
    assert out[~owned].isnan().all(), "rows that belong to no group were written"
    assert_same_bits(out[owned], op(a, b, *arguments, accumulation="hopper")[owned])
    return gpu
