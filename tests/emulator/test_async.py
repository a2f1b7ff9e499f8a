"""Copy engine, tensor cores and matrix moves end to end: CUDA kernels against NumPy, over several seeds."""

import functools

import numpy as np
import pytest
import torch

from dsv3_kernels import _emulator, emulator, jit
from dsv3_kernels.tensor_map import TensorMap

leaves = _emulator.leaves
SEEDS = range(3)
compiled = functools.cache(jit.compile_ptx)


def run(source, args, *, seed=0, grid=1, block=128, cluster=1, shared_bytes=0):
    gpu = emulator.VirtualGPU(num_sms=4, seed=seed)
    gpu.launch(
        compiled('#include "ptx_wgmma.cuh"\nusing namespace dsv3;\n' + source),
        "k",
        grid=(grid, 1, 1),
        block=(block, 1, 1),
        cluster=(cluster, 1, 1),
        args=args,
        shared_bytes=shared_bytes,
    )
    return gpu


def swizzled(address, width):
    return address ^ ((address >> 7) & (width // 16 - 1 if width else 0)) << 4


# ---- The copy engine

TENSOR_COPY = """
extern "C" __global__ void k(const __grid_constant__ TensorMap source,
                             const __grid_constant__ TensorMap target,
                             u8* raw, u32 bytes, u32 raw_bytes, COORDINATES) {
    extern __shared__ __align__(1024) u8 box[];
    __shared__ u64 full;
    for (u32 i = threadIdx.x; i < raw_bytes; i += blockDim.x) box[i] = 0xa5;
    if (threadIdx.x == 0) ptx::mbarrier_init(&full, 1);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&full, bytes);
        asm volatile("cp.async.bulk.tensor.RANKd.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {NAMES}], [%2];"
                     ::"r"(ptx::shared_address(box)), "l"(&source), "r"(ptx::shared_address(&full)), OPERANDS
                     : "memory");
    }
    ptx::mbarrier_wait(&full, 0);
    for (u32 i = threadIdx.x; i < raw_bytes; i += blockDim.x) raw[i] = box[i];
    if (threadIdx.x == 0) {
        asm volatile("STORE.RANKd.global.shared::cta.REDUCE.bulk_group [%1, {NAMES}], [%0];"
                     ::"r"(ptx::shared_address(box)), "l"(&target), "r"(0), OPERANDS : "memory");
        ptx::bulk_commit_group();
        ptx::bulk_wait_group_read<0>();
    }
}
"""


def tensor_copy(rank, reduce):
    source = TENSOR_COPY.replace("RANK", str(rank))
    source = source.replace("COORDINATES", ", ".join(f"int c{i}" for i in range(rank)))
    source = source.replace("NAMES", ", ".join(f"%{3 + i}" for i in range(rank)))
    source = source.replace("OPERANDS", ", ".join(f'"r"(c{i})' for i in range(rank)))
    store = "cp.reduce.async.bulk.tensor" if reduce else "cp.async.bulk.tensor"
    return source.replace("STORE", store).replace("REDUCE", f"{reduce}.tile" if reduce else "tile")


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("reduce", ["", "add"])
def test_boxes_come_and_go(rank, swizzle, reduce):
    """A box at a random place, partly outside: its bytes in shared memory, and what a store leaves behind."""
    rng = np.random.default_rng([rank, swizzle, len(reduce)])
    for seed in SEEDS:
        inner = int(rng.choice([4, 8, swizzle // 4] if swizzle else [4, 12, 32]))
        inner = min(inner, swizzle // 4) if swizzle else inner
        box = (*(int(b) for b in rng.integers(1, 4, rank - 1)), inner)
        shape = (*(int(n) for n in rng.integers(1, 6, rank - 1)), 4 * int(rng.integers(1, 10)))
        given = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        before = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        after = before.clone()
        at = [int(rng.integers(-b, n + 1)) for b, n in zip(box, shape, strict=True)]
        expected = np.zeros(box, np.float32)
        stored = before.clone()
        for index in np.ndindex(*box):
            place = tuple(a + i for a, i in zip(at, index, strict=True))
            if all(0 <= p < n for p, n in zip(place, shape, strict=True)):
                expected[index] = given[place]
                stored[place] = given[place] + (before[place] if reduce else 0)
        pitch = swizzle or inner * 4
        rows = expected.size // inner
        raw = torch.zeros(pitch * rows, dtype=torch.uint8)
        maps = [TensorMap(t, box, swizzle) for t in (given, after)]
        args = [*maps, raw, expected.nbytes, raw.numel(), *at[::-1]]
        run(tensor_copy(rank, reduce), args, seed=seed, shared_bytes=raw.numel() + 1024)
        want = np.full(raw.numel(), 0xA5, np.uint8)
        data = expected.reshape(rows, inner).view(np.uint8)
        for r in range(rows):
            for c in range(inner * 4):
                want[swizzled(r * pitch + c, swizzle)] = data[r, c]
        np.testing.assert_array_equal(raw.numpy(), want)
        torch.testing.assert_close(after, stored, rtol=0, atol=0)


@pytest.mark.parametrize("operation", ["add", "min", "max", "and", "or", "xor"])
def test_integer_reductions(operation):
    generator = torch.Generator().manual_seed(2)
    given, before = (
        torch.randint(-1000, 1000, (5, 8), generator=generator, dtype=torch.int32) for _ in range(2)
    )
    after = before.clone()
    maps = [TensorMap(t, (4, 8), 0) for t in (given, after)]
    run(
        tensor_copy(2, operation),
        [*maps, torch.zeros(128, dtype=torch.uint8), 128, 128, 0, 3],
        shared_bytes=128,
    )
    names = {"min": torch.minimum, "max": torch.maximum, "add": torch.add}
    function = names.get(operation) or getattr(torch, f"bitwise_{operation}")
    expected = before.clone()
    expected[3:] = function(before[3:], given[3:])
    assert torch.equal(after, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_multicast_reaches_every_block_of_the_mask(seed):
    """Each of two blocks loads one half of a tile for both."""
    source = """
    extern "C" __global__ void k(const __grid_constant__ TensorMap source, float* out) {
        __shared__ __align__(128) float tile[2][64];
        __shared__ u64 full;
        const u32 rank = ptx::cluster_rank();
        if (threadIdx.x == 0) {
            ptx::mbarrier_init(&full, 1);
            ptx::fence_mbarrier_init();
            ptx::mbarrier_arrive_expect(&full, sizeof tile);
        }
        ptx::cluster_arrive();
        ptx::cluster_wait();
        if (threadIdx.x == 0)
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                         ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
                         ::"r"(ptx::shared_address(tile[rank])), "l"(&source),
                         "r"(ptx::shared_address(&full)), "r"(0), "r"(rank * 2), "h"((u16)3) : "memory");
        ptx::mbarrier_wait(&full, 0);
        for (u32 i = threadIdx.x; i < 128; i += 32) out[rank * 128 + i] = tile[i / 64][i % 64];
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }"""
    given, out = torch.randn(4, 32), torch.full((2, 4, 32), torch.nan)
    gpu = run(source, [TensorMap(given, (2, 32), 0), out], seed=seed, grid=2, block=32, cluster=2)
    assert torch.equal(out[0], given) and torch.equal(out[1], given)
    assert gpu.counters["multicast_bytes"] == 2 * 256 * 2


# ---- Tensor cores

N = 64
BYTES = {"e4m3": 1, "e5m2": 1, "f16": 2, "bf16": 2, "tf32": 4}


def wgmma_source(a, b, d, a_registers, transpose_a, transpose_b):
    count, constraint, kind = (N // 2, "+f", "float") if d == "f32" else (N // 4, "+r", "u32")
    accumulators = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"{constraint}"(d[{i}])' for i in range(count))
    n = count + (4 if a_registers else 1)
    a_names = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}" if a_registers else f"%{count}"
    a_inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if a_registers else '"l"(a)'
    flags = "1, 1, 1"
    if BYTES[a] == 2:
        flags += f", {int(transpose_b)}" if a_registers else f", {int(transpose_a)}, {int(transpose_b)}"
    load_a = (
        "u32 a[4]; for (u32 i = 0; i < 4; ++i) a[i] = *(const u32*)(a_rows + (threadIdx.x / 32 * 16 + "
        "threadIdx.x % 32 / 4 + i % 2 * 8) * 32 + threadIdx.x % 4 * 4 + i / 2 * 16);"
        if a_registers
        else "const u64 a = a_descriptor | (ptx::shared_address(shared + a_offset) & 0x3ffff) >> 4;"
    )
    k = 32 // BYTES[a]
    return f"""
    extern "C" __global__ void k(const __grid_constant__ TensorMap a_map,
                                 const __grid_constant__ TensorMap b_map, const u8* a_rows,
                                 {kind}* accumulators, u64 a_descriptor, u64 b_descriptor,
                                 u32 boxes_a, u32 boxes_b, u32 step, u32 bytes_a, u32 bytes_b, u32 a_offset,
                                 u32 b_offset) {{
        __shared__ __align__(1024) u8 shared[32768];
        __shared__ u64 full;
        if (threadIdx.x == 0) {{
            ptx::mbarrier_init(&full, 1);
            ptx::fence_mbarrier_init();
            ptx::mbarrier_arrive_expect(&full, boxes_a * bytes_a + boxes_b * bytes_b);
            for (u32 i = 0; i < boxes_a; ++i)
                ptx::tma_load(shared + i * bytes_a, &a_map, &full, i * step, 0);
            for (u32 i = 0; i < boxes_b; ++i)
                ptx::tma_load(shared + 16384 + i * bytes_b, &b_map, &full, i * step, 0);
        }}
        __syncthreads();
        ptx::mbarrier_wait(&full, 0);
        {kind} d[{count}];
        for (u32 i = 0; i < {count}; ++i) d[i] = accumulators[threadIdx.x * {count} + i];
        {load_a}
        const u64 b = b_descriptor | (ptx::shared_address(shared + 16384 + b_offset) & 0x3ffff) >> 4;
        ptx::wgmma_fence();
        asm volatile("wgmma.mma_async.sync.aligned.m64n{N}k{k}.{d}.{a}.{b} "
                     "{{{accumulators}}}, {a_names}, %{n}, {flags};"
                     : {outputs} : {a_inputs}, "l"(b));
        ptx::wgmma_commit_group();
        asm volatile("wgmma.wait_group.sync.aligned 0;" : {outputs} :: "memory");
        for (u32 i = 0; i < {count}; ++i) accumulators[threadIdx.x * {count} + i] = d[i];
    }}"""


def in_shared(tile, swizzle, transpose, size, step):
    """How a row-major tile [rows, 32 bytes] is laid out: tensor map, descriptor, boxes, bytes a box, offset.

    K-major: lines of `swizzle` bytes, of which the tile is part number `step`. MN-major: its transpose.
    """
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    rows = tile.shape[0]
    if transpose:
        elements = torch.from_numpy(np.ascontiguousarray(tile.view(np.uint16).T).view(np.int16)).view(
            torch.bfloat16
        )
        panel = swizzle // 2
        bits = mode << 62 | (8 * swizzle >> 4) << 32 | (16 * swizzle >> 4) << 16
        return TensorMap(elements, (16, panel), swizzle), bits, rows // panel, 16 * swizzle, 0
    if not swizzle:
        data = torch.from_numpy(tile)
        return TensorMap(data, (rows, 16), 0), (128 >> 4) << 32 | (rows * 16 >> 4) << 16, 2, rows * 16, 0
    line = np.random.default_rng(1).integers(0, 256, (rows, swizzle), dtype=np.uint8)
    line[:, step * 32 : step * 32 + 32] = tile
    return (
        TensorMap(torch.from_numpy(line), (rows, swizzle), swizzle),
        mode << 62 | (8 * swizzle >> 4) << 32,
        1,
        rows * swizzle,
        step * 32,
    )


FP8 = (("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3"))
FROM_REGISTERS = (("e4m3", "f32"), ("bf16", "f32"), ("f16", "f16"), ("tf32", "f32"))
TRANSPOSED = ((True, False), (False, True), (True, True))
CASES = [
    *((a, b, d, 128, False, False, False) for a, b in FP8 for d in ("f32", "f16")),
    *(
        (t, t, "f32", w, False, False, False)
        for t in ("e4m3", "bf16", "f16", "tf32")
        for w in (0, 32, 64, 128)
    ),
    *((t, t, d, 128, True, False, False) for t, d in FROM_REGISTERS),
    *((t, t, "f32", w, False, *ab) for t in ("bf16", "f16") for w in (32, 64, 128) for ab in TRANSPOSED),
    ("bf16", "bf16", "f32", 64, True, False, True),
]


@pytest.mark.parametrize(("a", "b", "d", "swizzle", "a_registers", "transpose_a", "transpose_b"), CASES)
def test_wgmma_reads_its_operands_where_they_lie(a, b, d, swizzle, a_registers, transpose_a, transpose_b):
    rng = np.random.default_rng([swizzle, transpose_a, transpose_b, ord(a[1])])
    source = wgmma_source(a, b, d, a_registers, transpose_a, transpose_b)
    dtypes = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "f16": torch.float16,
              "bf16": torch.bfloat16, "tf32": torch.float32}  # fmt: skip
    for seed in SEEDS:
        tiles = [
            torch.from_numpy(rng.standard_normal((rows, 32 // BYTES[t])))
            .to(dtypes[t])
            .view(torch.uint8)
            .numpy()
            for rows, t in ((64, a), (N, b))
        ]
        start = rng.standard_normal((64, N)).astype(np.float16 if d == "f16" else np.float32)
        count = N // 2 if d == "f32" else N // 4
        positions = np.array([leaves.accumulator_position(d, t, i) for t in range(128) for i in range(count)])
        rows, columns = positions.T
        if d == "f32":
            registers = torch.from_numpy(start[rows, columns])
        else:
            pairs = np.stack([start[rows, columns], start[rows, columns + 1]], -1)
            registers = torch.from_numpy(pairs.view(np.int32).reshape(-1).copy())
        step = seed % max(1, swizzle // 32)
        a_map, a_bits, boxes_a, bytes_a, a_offset = in_shared(tiles[0], swizzle, transpose_a, BYTES[a], step)
        b_map, b_bits, boxes_b, bytes_b, b_offset = in_shared(tiles[1], swizzle, transpose_b, BYTES[b], step)
        stride = swizzle // 2 if transpose_a or transpose_b else 16
        boxes = (boxes_a, boxes_b, stride, bytes_a, bytes_b, a_offset, b_offset)
        a_rows = torch.from_numpy(tiles[0])
        run(source, [a_map, b_map, a_rows, registers, a_bits, b_bits, *boxes], seed=seed)
        expected = leaves.multiply_accumulate(
            tiles[0], tiles[1], start.astype(np.float32).view(np.uint32), a, b, d
        ).view(np.float32)
        got = np.full((64, N), np.nan, np.float32)
        if d == "f32":
            got[rows, columns] = registers.numpy()
        else:
            halves = registers.numpy().view(np.float16).reshape(-1, 2)
            got[rows, columns], got[rows, columns + 1] = halves[:, 0], halves[:, 1]
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


# ---- Matrix moves


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Matrices are moved to registers as they lie or transposed, then back as they lie."""
    suffix = ".trans" if transposed else ""
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"=r"(m[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(m[{i}])' for i in range(count))
    stored = ", ".join(f"%{i + 1}" for i in range(count))
    source = f"""
    extern "C" __global__ void k(const u32* in, u32* out) {{
        __shared__ __align__(16) u32 given[{count}][32], taken[{count}][32];
        for (u32 i = 0; i < {count}; ++i) given[i][threadIdx.x] = in[i * 32 + threadIdx.x];
        __syncwarp();
        u32 m[{count}];
        const u32 lane = threadIdx.x % {8 * count};
        asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{registers}}}, [%{count}];"
                     : {outputs} : "r"(ptx::shared_address(given) + lane * 16) : "memory");
        asm volatile("stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%0], {{{stored}}};"
                     :: "r"(ptx::shared_address(taken) + lane * 16), {inputs} : "memory");
        __syncwarp();
        for (u32 i = 0; i < {count}; ++i) out[i * 32 + threadIdx.x] = taken[i][threadIdx.x];
    }}"""
    given = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    out = torch.zeros_like(given)
    run(source, [given, out], block=32)
    assert torch.equal(out, given.transpose(1, 2) if transposed else given)


def test_cache_policies_change_nothing():
    """createpolicy, and the hints that carry it on loads, stores, atomics and bulk copies."""
    source = """
    extern "C" __global__ void k(const u32* in, u32* out, u32* sum) {
        __shared__ __align__(16) u32 box[32];
        __shared__ u64 barrier;
        u64 keep, part;
        asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
        asm("createpolicy.fractional.L2::evict_first.L2::evict_unchanged.b64 %0, 0.25;" : "=l"(part));
        if (threadIdx.x == 0) {
            ptx::mbarrier_init(&barrier, 1);
            ptx::fence_mbarrier_init();
            ptx::mbarrier_arrive_expect(&barrier, 128);
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], 128, [%2], %3;"
                ::"r"(ptx::shared_address(box)), "l"(in), "r"(ptx::shared_address(&barrier)), "l"(keep) : "memory");
        }
        __syncthreads();
        ptx::mbarrier_wait(&barrier, 0);
        u32 v;
        asm volatile("ld.global.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v) : "l"(in + threadIdx.x), "l"(part));
        asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(out + threadIdx.x), "r"(v + box[threadIdx.x]), "l"(keep) : "memory");
        asm volatile("red.global.add.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(sum), "r"(v), "l"(part) : "memory");
    }"""
    values = torch.randint(1 << 20, (32,), dtype=torch.int32)
    out, total = torch.zeros(32, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(source, [values, out, total], block=32)
    assert torch.equal(out, 2 * values)
    assert total.item() == values.sum().item()
