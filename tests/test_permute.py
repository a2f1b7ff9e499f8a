"""Permuting and unpermuting: reference against plain loops, kernels in the emulator against the reference."""

import pytest
import torch
from fp8_helpers import SCALINGS, assert_same, commit_generator, each_dtype, each_scaling, wide

import dsv3_kernels as dk
from dsv3_kernels import emulator, permute, reference
from dsv3_kernels.jit.compile import compile_source, source_options


def index_of(generator, rows, tokens, *shape):
    index = torch.randint(-1, tokens, (rows, *shape), generator=generator, dtype=torch.int32)
    return index if tokens else torch.full_like(index, -1)


def check_permute(x, index, offsets=None, scaling=SCALINGS["exact"], **gpu):
    with emulator.virtual_gpu(**gpu):
        q = dk.permute_quantize(x, index, **scaling)
        both = dk.permute_quantize(x, index, transpose=True, group_offsets=offsets, **scaling)
    rows = torch.zeros(index.shape[0], x.shape[1], dtype=x.dtype)
    for r, i in enumerate(index.tolist()):
        if i >= 0:
            rows[r] = x[i]
    want = reference.quantize_1x128_both(rows, offsets, **scaling)
    outside = dk.permute_quantize(x, index, transpose=True, group_offsets=offsets, **scaling)
    for got in ((q, both[1]), both, outside):
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)


def check_unpermute(rows, slots, weights=None, **gpu):
    want = torch.zeros(slots.shape[0], rows.shape[1])
    for t, of_token in enumerate(slots.tolist()):
        for k, slot in enumerate(of_token):
            if slot >= 0:
                want[t] += rows[slot].float() * (1.0 if weights is None else weights[t, k])
    with emulator.virtual_gpu(**gpu):
        got = dk.unpermute(rows, slots, weights)
    for y in (got, dk.unpermute(rows, slots, weights)):
        assert y.dtype == torch.bfloat16 and torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.nan_to_num(7).view(torch.int16), want.bfloat16().nan_to_num(7).view(torch.int16))


@each_dtype
@each_scaling
@pytest.mark.parametrize("shape", [(1, 1, 16), (40, 130, 144), (70, 200, 256)])
def test_permute(dtype, scaling, shape):
    tokens, rows, width = shape
    generator = commit_generator()
    index = index_of(generator, rows, tokens)
    check_permute(wide(generator, tokens, width).to(dtype), index, None, scaling)
    offsets = torch.tensor([0, rows // 3, rows // 3, rows - rows // 4], dtype=torch.int32)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    x[0, 3] = float("nan")
    check_permute(x, index, offsets, scaling)


def test_permute_empty():
    generator = commit_generator()
    for tokens, rows, width in ((0, 5, 16), (5, 0, 16), (5, 5, 0), (0, 0, 0)):
        index = index_of(generator, rows, tokens)
        check_permute(torch.zeros(tokens, width), index, torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("top_k", [1, 3, 8, 33])
@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute(top_k, weighted):
    generator = commit_generator()
    for rows, tokens, width in ((1, 1, 8), (30, 9, 264), (50, 5, 512)):
        values = torch.randn(rows, width, generator=generator).bfloat16()
        slots = index_of(generator, tokens, rows, top_k)
        slots[-1] = -1
        weights = torch.rand(tokens, top_k, generator=generator) if weighted else None
        check_unpermute(values, slots, weights)


def test_unpermute_infinities_nan_and_what_is_left_out():
    """A slot of -1 adds nothing, whatever its weight; nor does it turn -0 into NaN."""
    rows = torch.randn(6, 16, generator=commit_generator()).bfloat16()
    rows[1, 3], rows[2, 3], rows[3, 5], rows[4] = float("inf"), float("-inf"), float("nan"), -0.0
    slots = torch.tensor([[1, 2, -1], [3, 0, 5], [-1, 4, -1], [4, -1, -1]], dtype=torch.int32)
    weights = torch.tensor([[1.0, 1, torch.nan], [1, 2, 3], [torch.inf, 1, torch.nan], [1, 1, 1]])
    check_unpermute(rows, slots, weights)
    check_unpermute(rows, slots)


def test_unpermute_empty():
    generator = commit_generator()
    for rows, tokens, top_k, width in ((0, 4, 2, 8), (4, 0, 2, 8), (4, 3, 0, 8), (4, 3, 2, 0)):
        check_unpermute(torch.zeros(rows, width).bfloat16(), index_of(generator, tokens, rows, top_k))


def test_there_and_back():
    """Every token through two experts with weights that add up to 1: it comes back."""
    generator = commit_generator()
    x = torch.randn(20, 32, generator=generator).bfloat16()
    order = torch.randperm(40, generator=generator).int()
    slots = torch.empty(40, dtype=torch.int32)
    slots[order.long()] = torch.arange(40, dtype=torch.int32)
    rows = reference.permute(x, order // 2)
    assert torch.equal(dk.unpermute(rows, slots.view(20, 2), torch.full((20, 2), 0.5)), x)


def test_indices_on_a_gpu_are_not_trusted():
    """There nobody reads them back: one that is out of range is none, and nothing is read outside x."""
    generator = commit_generator()
    x = torch.randn(5, 32, generator=generator).bfloat16()
    index = torch.tensor([-(2**31), -2, 5, 2**31 - 1, 4, -1], dtype=torch.int32)
    within = torch.where((index >= 0) & (index < 5), index, -1)
    want = dk.permute_quantize(x, within), dk.unpermute(x, within.view(2, 3))
    with emulator.virtual_gpu():
        got = dk.permute_quantize(x, index), dk.unpermute(x, index.view(2, 3))
    assert_same(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_each_byte_moves_once_and_without_bank_conflicts():
    generator = commit_generator()
    x = torch.randn(256, 384, generator=generator).bfloat16()
    index = torch.randperm(256, generator=generator).int()
    quantized = x.numel() + x.numel() // 128 * 4
    for both in (False, True):
        with emulator.virtual_gpu(checks=False) as gpu:
            dk.permute_quantize(x, index, transpose=both)
        lanes = 3 * 16  # tiles across, and lanes that share a row: each loads its index
        assert gpu.counters["global_bytes_read"] == x.nbytes + index.nbytes * lanes
        assert gpu.counters["global_bytes_written"] == quantized * (1 + both)
        assert gpu.counters["bank_conflicts"] == 0
    slots, weights = index.view(64, 4), torch.rand(64, 4, generator=generator)
    with emulator.virtual_gpu(checks=False) as gpu:
        y = dk.unpermute(x, slots, weights)
    warps = 2  # a token
    assert gpu.counters["global_bytes_read"] == x.nbytes + (slots.nbytes + weights.nbytes) * warps
    assert gpu.counters["global_bytes_written"] == y.nbytes


def test_blocks_take_more_than_one_turn(monkeypatch):
    monkeypatch.setattr(permute, "MAX_GRID", 1)
    generator = commit_generator()
    rows = torch.randn(30, 520, generator=generator).bfloat16()
    check_unpermute(rows, index_of(generator, 11, 30, 2))


def test_the_launch_constants_are_those_of_the_kernel():
    compile_source(
        f"""
        #include "permute.cuh"
        static_assert(dsv3::permute::kThreads == {permute.THREADS});
        static_assert(dsv3::permute::kColumnsOfWarp == {permute.COLUMNS_OF_WARP});
        """,
        (),
        source_options(),
    )
