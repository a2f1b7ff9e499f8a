"""The quantisers that transpose, their PTX run by the emulator: bit for bit what the reference computes."""

import re

import pytest
import torch
from fp8_helpers import assert_same, commit_generator, each_dtype, offsets_of, powers, wide

import dsv3_kernels as dk
from dsv3_kernels import emulator, launch, quantize, reference, tile
from dsv3_kernels.device_error import ErrorCode
from dsv3_kernels.jit.compile import compile_source, kernel_dir, source_options

GROUPS = (0, 128, 1, 300, 0)


def check_128x128(w, power_of_2=False, transpose=False, **gpu):
    with emulator.virtual_gpu(**gpu):
        got = dk.quantize_128x128(w, power_of_2_scales=power_of_2, transpose=transpose)
    q = got[0] if transpose else got
    want = reference.quantize_128x128(w, power_of_2_scales=power_of_2)
    assert_same(q, want)
    if transpose:
        assert_same(got[1], reference.transpose(want))
        assert got[1].data.data_ptr() != q.data.data_ptr() or not w.numel()
    return got


def check_1x128_t(x, offsets=None, power_of_2=False, **gpu):
    with emulator.virtual_gpu(**gpu):
        q = dk.quantize_1x128_t(x, offsets, power_of_2_scales=power_of_2)
    assert_same(q, reference.quantize_1x128_t(x, offsets, power_of_2_scales=power_of_2))
    return q


def check_both(x, offsets=None, power_of_2=False, **gpu):
    with emulator.virtual_gpu(**gpu):
        q, q_t = dk.quantize_1x128(x, transpose=True, group_offsets=offsets, power_of_2_scales=power_of_2)
    assert_same(q, reference.quantize_1x128(x, power_of_2_scales=power_of_2))
    assert_same(q_t, reference.quantize_1x128_t(x, offsets, power_of_2_scales=power_of_2))
    return q, q_t


# ---- 128x128


@each_dtype
@powers
@pytest.mark.parametrize("shape", [(1, 16), (129, 272), (2, 37, 144)])
def test_blocks(dtype, power_of_2, shape):
    check_128x128(wide(commit_generator(), *shape).to(dtype), power_of_2)


@each_dtype
@powers
@pytest.mark.parametrize("shape", [(16, 16), (144, 272), (2, 48, 144)])
def test_blocks_with_their_transpose(dtype, power_of_2, shape):
    generator = commit_generator()
    w = torch.randn(shape, generator=generator)
    w[..., ::3, :] *= torch.randn(w[..., ::3, :].shape, generator=generator).exp2()
    check_128x128(w.to(dtype), power_of_2, transpose=True)


def test_experts_take_one_launch():
    w = torch.randn(5, 32, 144, generator=commit_generator())
    with emulator.virtual_gpu() as gpu:
        q, q_t = dk.quantize_128x128(w, transpose=True)
    assert gpu.counters["launches"] == 1
    for g in range(5):
        want = reference.quantize_128x128(w[g])
        assert_same(dk.QuantizedTensor(q.data[g], q.scales[g], q.block), want)
        got_t = dk.QuantizedTensor(q_t.data[g], q_t.scales[g], q_t.block)
        assert_same(got_t, reference.transpose(want))


@each_dtype
@powers
def test_blocks_with_nan_infinity_zeros_and_subnormals(dtype, power_of_2):
    w = torch.randn(128, 6 * 128, generator=commit_generator()).to(dtype)
    w[127, 127] = float("nan")
    w[5, 128] = float("inf")
    w[0, 256], w[1, 256] = float("-inf"), float("nan")
    w[:, 384:512], w[3, 400] = 0.0, -0.0
    w[:, 512:640] *= torch.finfo(dtype).smallest_normal / 8
    q, q_t = check_128x128(w, power_of_2, transpose=True)
    for values in (dk.dequantize(q), dk.dequantize(q_t).mT):
        assert values[:, :384].isnan().all() and values[:, 384:].isfinite().all()
    assert q.scales[0, 3] == 1


# ---- 1x128 transposed


@each_dtype
@powers
@pytest.mark.parametrize("shape", [(1, 8), (128, 128), (300, 136)])
def test_transposed(dtype, power_of_2, shape):
    generator = commit_generator()
    check_1x128_t(torch.randn(shape, generator=generator).to(dtype), None, power_of_2)
    x = wide(generator, *shape[::-1]).t().contiguous()  # features from subnormal to nearly overflowing
    check_1x128_t(x.to(dtype), None, power_of_2)


@each_dtype
@powers
def test_tiles_restart_at_each_group(dtype, power_of_2):
    tokens = sum(GROUPS) + 11  # the last rows are of no group
    x = torch.randn(tokens, 24, generator=commit_generator()).to(dtype)
    q = check_1x128_t(x, offsets_of(*GROUPS), power_of_2)
    assert q.shape[1] == 128 * ((tokens + 127 * 5) // 128)
    codes = q.data.view(torch.uint8)
    assert (codes[:, 129:256] == 0).all() and (codes[:, 640:] == 0).all()
    assert (q.scales[:, 5:] == 1).all() and (q.scales[:, :5] != 1).all()


def test_groups_of_every_count():
    """The search for a tile's group takes 32 groups at a time."""
    generator = commit_generator()
    for groups in (1, 31, 32, 33, 70):
        sizes = torch.randint(0, 6, (groups,), generator=generator) ** 3
        sizes[torch.rand(groups, generator=generator) < 0.5] = 0
        x = torch.randn(int(sizes.sum()), 8, generator=generator)
        check_1x128_t(x, offsets_of(*sizes.tolist()), checks=False)


@pytest.mark.parametrize(
    ("tokens", "offsets"),
    [(0, [0, 0, 0, 0]), (0, [0, 0]), (5, [0, 0, 0]), (300, [0]), (128, [0, 128]), (129, [0, 0, 129])],
)
def test_empty_groups_and_empty_tensors(tokens, offsets):
    x = torch.randn(tokens, 16, generator=commit_generator()).bfloat16()
    check_1x128_t(x, torch.tensor(offsets, dtype=torch.int32))


@each_dtype
@powers
def test_transposed_with_nan_infinity_and_zeros(dtype, power_of_2):
    x = torch.randn(130, 16, generator=commit_generator()).to(dtype)
    x[127, 0] = float("nan")
    x[0, 1] = float("inf")
    x[3, 2], x[64, 2] = float("-inf"), float("nan")
    x[:, 3] = 0.0
    x[:128, 4] = -0.0
    x[129, 15] = float("nan")
    values = dk.dequantize(check_1x128_t(x, None, power_of_2))
    assert values[:3, :128].isnan().all() and values[3:, :128].isfinite().all()
    assert values[15, 128:].isnan().all() and values[:15, 128:].isfinite().all()


# ---- 1x128 in both orientations


@each_dtype
@powers
@pytest.mark.parametrize("shape", [(1, 16), (128, 128), (300, 144)])
def test_both_orientations(dtype, power_of_2, shape):
    generator = commit_generator()
    check_both(torch.randn(shape, generator=generator).to(dtype), None, power_of_2)
    check_both(wide(generator, *shape).to(dtype), None, power_of_2)
    check_both(wide(generator, *shape[::-1]).t().contiguous().to(dtype), None, power_of_2)


@each_dtype
@powers
@pytest.mark.parametrize("rest", [0, 11, 300])
def test_both_orientations_of_groups(dtype, power_of_2, rest):
    """Row-wise the rows past the last group count too."""
    tokens = sum(GROUPS) + rest
    x = torch.randn(tokens, 32, generator=commit_generator()).to(dtype)
    x[3, 5], x[200, 7], x[300, 16:] = float("nan"), float("inf"), 0.0
    check_both(x, offsets_of(*GROUPS), power_of_2)


def test_both_orientations_of_many_groups_and_of_none():
    generator = commit_generator()
    for groups in (0, 1, 31, 32, 33, 63, 64):
        sizes = torch.randint(0, 6, (groups,), generator=generator) ** 3
        sizes[torch.rand(groups, generator=generator) < 0.5] = 0
        x = torch.randn(int(sizes.sum()) + 5, 16, generator=generator)
        check_both(x, offsets_of(*sizes.tolist()), checks=False)
    for shape in ((0, 16), (5, 0), (0, 0)):
        check_both(torch.zeros(shape), offsets_of(0, 0, 0))
        check_both(torch.zeros(shape))


# ---- Scales as UE8M0


@each_dtype
def test_ue8m0_scales(dtype):
    generator = commit_generator()
    x = wide(generator, 300, 144).to(dtype)
    x[3, 5], x[200, 7] = float("nan"), float("inf")
    offsets, w = offsets_of(20, 0, 270), x[:288].contiguous()
    option = {"ue8m0_scales": True}
    with emulator.virtual_gpu():
        got = [dk.quantize_1x128(x, **option), dk.quantize_1x128(w.view(2, 144, 144), **option)]
        got += [dk.quantize_1x128_t(x, offsets, **option)]
        got += [*dk.quantize_1x128(x, transpose=True, group_offsets=offsets, **option)]
        got += [dk.quantize_128x128(w, **option), *dk.quantize_128x128(w, transpose=True, **option)]
    row, both = reference.quantize_1x128, reference.quantize_1x128_both(x, offsets, **option)
    square = reference.quantize_128x128(w, **option)
    want = [row(x, **option), row(w.view(2, 144, 144), **option), both[1], *both]
    want += [square, square, reference.transpose(square)]
    for g, e in zip(got, want, strict=True):
        assert g.scales.dtype == torch.float8_e8m0fnu
        assert_same(g, e)


# ---- All of them


@each_dtype
def test_nothing_is_written_outside_the_outputs(dtype):
    """Straight to the kernels: outputs poisoned, with guards around them."""
    generator = commit_generator()

    def guarded(elements, dtype, poison):
        memory = torch.full((elements + 512,), poison, dtype=dtype)
        return memory, memory[256:-256]

    def guards_are_whole(*memories):
        for memory in memories:
            guard = torch.cat([memory[:256], memory[-256:]])
            assert torch.equal(
                guard.nan_to_num(-1), torch.full_like(guard, -1 if guard.is_floating_point() else 0x55)
            )

    threads = 64 * dtype.itemsize
    g, n, k = 2, 144, 176
    w = torch.randn(g, n, k, generator=generator).to(dtype)
    want = reference.quantize_128x128(w)
    want_t = reference.transpose(want)
    codes, codes_t = (guarded(g * n * k, torch.uint8, 0x55) for _ in range(2))
    scales, scales_t = (guarded(g * 2 * 2, torch.float32, torch.nan) for _ in range(2))
    with emulator.virtual_gpu():
        arguments = (w, codes[1], scales[1], codes_t[1], scales_t[1], n, k)
        kernel = quantize.kernel_128x128(dtype, False, True)
        launch.launch(kernel, (g * 4, 1, 1), (threads, 1, 1), arguments)
    guards_are_whole(codes[0], codes_t[0], scales[0], scales_t[0])
    assert torch.equal(codes[1], want.data.view(torch.uint8).view(-1))
    assert torch.equal(codes_t[1], want_t.data.view(torch.uint8).view(-1))
    assert torch.equal(scales[1], want.scales.view(-1)) and torch.equal(scales_t[1], want_t.scales.view(-1))

    for row_wise in (False, True):
        width = 144 if row_wise else 136
        x = torch.randn(140, width, generator=generator).to(dtype)
        offsets = offsets_of(0, 3, 130, 0)
        want, want_t = reference.quantize_1x128_both(x, offsets)
        tiles, leading = want_t.scales.shape[1], 160  # more than there are: what lies between stays as it was
        codes_t, scales_t = (
            guarded(width * tiles * 128, torch.uint8, 0x55),
            guarded(tiles * leading, torch.float32, torch.nan),
        )
        codes, scales = (
            guarded(140 * width, torch.uint8, 0x55),
            guarded(2 * leading, torch.float32, torch.nan),
        )
        with emulator.virtual_gpu():
            outputs = (codes[1], scales[1], codes_t[1], scales_t[1])
            arguments = (x, offsets, 0, *outputs, 140, width, 4, tiles, leading, leading)
            kernel = quantize.kernel_1x128_t(dtype, False, row_wise)
            launch.launch(kernel, ((tiles + 1) * 2, 1, 1), (threads, 1, 1), arguments)
        guards_are_whole(codes[0], scales[0], codes_t[0], scales_t[0])
        assert torch.equal(codes_t[1], want_t.data.view(torch.uint8).view(-1))
        rows = scales_t[1].view(tiles, leading)
        assert torch.equal(rows[:, :width].mT, want_t.scales) and rows[:, width:].isnan().all()
        rows = scales[1].view(2, leading)
        if row_wise:
            assert torch.equal(codes[1], want.data.view(torch.uint8).view(-1))
            assert torch.equal(rows[:, :140].mT, want.scales) and rows[:, 140:].isnan().all()
        else:
            assert (codes[1] == 0x55).all() and rows.isnan().all()


@each_dtype
def test_each_byte_moves_once_and_without_bank_conflicts(dtype):
    x = torch.randn(256, 384, generator=commit_generator()).to(dtype)
    with emulator.virtual_gpu(checks=False) as gpu:
        dk.quantize_128x128(x, transpose=True)
    counters = gpu.counters
    assert counters["global_bytes_read"] == x.nbytes
    assert counters["global_bytes_written"] == 2 * (x.numel() + 6 * 4)
    assert counters["shared_bytes_written"] >= 2 * x.numel() and counters["bank_conflicts"] == 0

    with emulator.virtual_gpu(checks=False) as gpu:
        dk.quantize_1x128_t(x)
    counters = gpu.counters
    assert counters["global_bytes_read"] == x.nbytes
    assert counters["global_bytes_written"] == x.numel() + x.numel() // 128 * 4
    assert counters["shared_bytes_written"] >= x.numel() and counters["bank_conflicts"] == 0

    with emulator.virtual_gpu(checks=False) as gpu:
        dk.quantize_1x128(x, transpose=True)
    counters = gpu.counters
    assert counters["global_bytes_read"] == x.nbytes
    quantized = x.numel() + x.numel() // 128 * 4
    assert counters["global_bytes_written"] == 2 * quantized
    assert counters["shared_bytes_written"] >= 2 * x.numel() and counters["bank_conflicts"] == 0

    q = dk.quantize_1x128(x)
    with emulator.virtual_gpu(checks=False) as gpu:
        dk.requantize_1x128_t(q)
    counters = gpu.counters
    assert counters["global_bytes_read"] == counters["global_bytes_written"] == quantized
    assert counters["bank_conflicts"] == 0


# What to break in tile.cuh, by what, and what then must be seen.
MUTATIONS = {
    "chunks are not spread over the banks": ("(chunk ^ line / kColumns % kChunks)", "chunk", "conflicts"),
    "columns are not spread over the banks": ("+ kPositions / 4;", ";", "conflicts"),
    "row groups share banks": ("kStep + kPad]", "kStep]", "conflicts"),
    "maxima are read before all are there": (
        r"\n    __syncthreads\(\);(?=\n\n    for \(u32 line)",
        "",
        "HazardError",
    ),
    "scales are read before all are there": (
        r"    __syncthreads\(\);(?=\n\n    if \(kRowWise\) \{)",
        "",
        "HazardError",
    ),
    "the tile is read before all is there": (
        r"    __syncthreads\(\);(?=\n\n    if \(kRowWise\) row)",
        "",
        "HazardError",
    ),
    "a row's maximum is another's": ("amax[0], kRows", "amax[0], 0", "wrong"),
    "a lane keeps the row it should give": ("ptx::shuffle_xor(give, half)", "give", "wrong"),
}


def tile_sources(broken, by):
    """quantize_tile.cuh with tile.cuh in it, changed."""
    body, kernels = ((kernel_dir() / name).read_text() for name in ("tile.cuh", "quantize_tile.cuh"))
    body, count = re.subn(broken if "\\n" in broken else re.escape(broken), by, body)
    assert count == 1
    return body + kernels.replace('#include "tile.cuh"', "")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name):
    broken, by, sign = MUTATIONS[name]
    dtype = "float" if "kRows" in broken else "dsv3::Bf16"
    expression = f"dsv3::quantize_1x128_t<{dtype}, false, true>"
    compiled = compile_source(tile_sources(broken, by), (expression,), source_options())
    x = torch.randn(128, 128, generator=commit_generator())
    x = x if dtype == "float" else x.bfloat16()
    codes, codes_t = (torch.zeros(128, 128, dtype=torch.uint8) for _ in range(2))
    scales, scales_t = torch.empty(128), torch.empty(128)
    want = reference.quantize_1x128(x)
    seen = set()
    for seed in range(5):
        gpu = emulator.VirtualGPU(seed=seed)
        arguments = (x, 0, 0, codes, scales, codes_t, scales_t, 128, 128, 0, 1, 128, 128)
        threads = 32 * x.element_size() * 2
        try:
            gpu.launch(compiled.ptx, compiled.names[0], grid=(1, 1, 1), block=(threads, 1, 1), args=arguments)
        except emulator.EmulationError as error:
            seen.add(type(error).__name__)
        else:
            if not torch.equal(scales, want.scales[:, 0]):
                seen.add("wrong")
        if gpu.counters["bank_conflicts"]:
            seen.add("conflicts")
    assert sign in seen, seen


@pytest.mark.parametrize("schedule", ["random", "round_robin", "pct"])
def test_any_order_of_the_warps(schedule):
    generator = commit_generator()
    seed = int(torch.randint(2**31, (), generator=generator))
    x = torch.randn(144, 144, generator=generator).bfloat16()
    check_128x128(x, transpose=True, seed=seed, schedule=schedule, num_sms=1)
    check_1x128_t(x, offsets_of(3, 0, 141), seed=seed, schedule=schedule, num_sms=3)
    check_both(x, offsets_of(3, 0, 140), seed=seed, schedule=schedule, num_sms=2)


def test_tensors_of_more_than_2_to_the_32_elements():
    """Untouched memory costs nothing: x and q_t span 8 and 4 GiB, and one tile of them is real."""
    tokens, width, tiles = 2**17 + 256, 2**15, 2**18
    try:
        x = torch.empty(tokens, width, dtype=torch.float16)
        data = torch.empty(128, tiles * 128, dtype=torch.uint8)
    except RuntimeError as error:
        pytest.skip(f"this machine promises no more memory than it has: {error}")
    scales = torch.empty(128)
    first = 2**17 + 100
    values = torch.randn(128, 128, generator=commit_generator()).half()
    x[first : first + 128, :128] = values
    offsets, word = torch.tensor([first, first + 128], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with emulator.virtual_gpu(checks=False):
        kernel = quantize.kernel_1x128_t(torch.float16, False)
        arguments = (x, offsets, word, 0, 0, data, scales, tokens, width, 1, tiles, 0, 128)
        launch.launch(kernel, (1, 1, 1), (128, 1, 1), arguments)
    want = reference.quantize_1x128_t(values)
    assert torch.equal(data[:, :128], want.data.view(torch.uint8))
    assert torch.equal(scales, want.scales[:, 0])
    assert word == ErrorCode.QUANTIZE_OFFSETS, "they do not start at 0"


def test_empty_tensors_launch_nothing():
    for shape in ((0, 128), (16, 0), (0, 16, 128), (2, 0, 16)):
        check_128x128(torch.zeros(shape), transpose=True)
        check_128x128(torch.zeros(shape))
    for shape in ((0, 128), (16, 0)):
        check_1x128_t(torch.zeros(shape))
        check_both(torch.zeros(shape))


def test_too_many_tiles_are_refused(monkeypatch):
    monkeypatch.setattr(tile, "MAX_TILES", 2)
    with emulator.virtual_gpu():
        dk.quantize_128x128(torch.zeros(128, 256))
        with pytest.raises(
            ValueError,
            match=r"quantize_128x128: w of shape \(128, 272\) has 3 tiles of 128x128, expected at most 2",
        ):
            dk.quantize_128x128(torch.zeros(128, 272))
        with pytest.raises(
            ValueError, match=r"quantize_1x128_t: x of shape \(129, 136\) has 4 tiles of 128x128"
        ):
            dk.quantize_1x128_t(torch.zeros(129, 136))
