"""The machine code of each kernel: wide loads and stores, no local memory, registers within budget."""

import itertools

import pytest

from dsv3_kernels.ep import kernels
from dsv3_kernels.jit import Kernel
from dsv3_kernels.jit.compile import compile_source, source_options
from dsv3_kernels.jit.disassemble import Sass, disassemble

# Registers a thread: three blocks of 256 threads share an SM's 65,536.
QUANTIZE_REGISTERS = 80
# Four blocks of 128 threads, or two of 256, share an SM.
QUANTIZE_TILE_REGISTERS = 128
REQUANTIZE_REGISTERS = 168  # six blocks of 64
QUANTIZE = list(itertools.product(("Bf16", "Fp16", "float"), (False, True)))


@pytest.mark.parametrize(("input_type", "power_of_2"), QUANTIZE)
def test_quantize_1x128(input_type, power_of_2):
    cubin = Kernel("quantize.cuh", "quantize_1x128", (input_type, power_of_2)).cubin()
    sass = disassemble(cubin.image)
    assert cubin.parameters == ("u64",) * 3 + ("u32",) * 3 + ("u64",) * 4

    # Every load has 16 bytes; so has every store but the one of the warp's scales, 4 bytes a lane.
    steps = 1 if input_type == "float" else 2
    assert sass.widths("LDG") == {128: 4}
    assert sass.count("LDG.E.128.CONSTANT") == 4, "x is read through the non-coherent path"
    assert sass.widths("STG") == {128: steps, 32: 1}
    assert sass.count("F2FP.SATFINITE.E4M3") == steps * 8, "two values a conversion"

    # One division a tile (each begins with FCHK), not one a value; besides, corrections of two operations.
    assert sass.count("FCHK") == steps
    corrections = 0 if power_of_2 else operations(input_type) * 16 * steps
    assert corrections <= sass.count("FFMA") <= corrections + 48

    assert sass.count("LDS") + sass.count("STS") + sass.count("BAR") == 0
    check_resources(cubin, sass, QUANTIZE_REGISTERS)


def operations(input_type):
    """Of the corrections of a quotient."""
    return 4 if input_type == "float" else 2


def check_resources(cubin, sass, registers):
    """No spills, no local memory."""
    resources = cubin.resources
    assert sass.local_memory == 0
    assert sass.registers <= resources.registers <= registers
    assert (resources.stack_bytes, resources.spill_store_bytes, resources.spill_load_bytes) == (0, 0, 0)


def check_quantize_tile(kernel, input_type, power_of_2, orientations, encoded=1, reports=False):
    """What the kernels of quantize_tile.cuh share; a thread holds 16 rows of 16 bytes.

    encoded: how often a value is encoded, which is once for each scale it has. reports: wrong offsets, by one
    store.
    """
    cubin = kernel.cubin()
    sass, columns = disassemble(cubin.image), 4 if input_type == "float" else 8
    assert sass.count("LDG.E.128.CONSTANT") == sass.widths("LDG")[128] == 16
    assert sass.widths("STG") == {128: columns * orientations, 32: orientations + reports}
    assert sass.count("F2FP.SATFINITE.E4M3") == columns * 8 * encoded
    assert sass.count("FCHK") == encoded, "a division for each scale"
    corrections = 0 if power_of_2 else operations(input_type) * 16 * columns * encoded
    assert corrections <= sass.count("FFMA") <= corrections + 48 * encoded * encoded
    check_resources(cubin, sass, QUANTIZE_TILE_REGISTERS)
    return sass, columns


@pytest.mark.parametrize("row_wise", [False, True], ids=["one_orientation", "both"])
@pytest.mark.parametrize(("input_type", "power_of_2"), QUANTIZE)
def test_quantize_1x128_t(input_type, power_of_2, row_wise):
    kernel = Kernel("quantize_tile.cuh", "quantize_1x128_t", (input_type, power_of_2, row_wise))
    sass, columns = check_quantize_tile(
        kernel, input_type, power_of_2, 1 + row_wise, 1 + row_wise, reports=True
    )
    assert sass.widths("LDG") == {128: 16, 32: 2 + 2}, "beside x, a group's two offsets, and two to check"
    stores = sass.widths("STS")
    assert stores[128] == columns and stores[64] == (16 if columns == 8 and row_wise else 0)
    assert sass.count("BAR.SYNC") == 3


def test_ue8m0_scales_are_stored_as_bytes():
    for file, function, template, bytes_ in (
        ("quantize.cuh", "quantize_1x128", ("Bf16", True, "E8m0"), 1),
        ("quantize_tile.cuh", "quantize_1x128_t", ("Bf16", True, True, "E8m0"), 2),
        ("quantize_tile.cuh", "quantize_128x128", ("Bf16", True, True, "E8m0"), 2),
        ("permute.cuh", "permute_quantize", ("Bf16", True, True, "E8m0"), 2),
        ("swiglu.cuh", "swiglu_quantize", (True, True, "E8m0"), 2),
        ("swiglu.cuh", "swiglu_backward_quantize", (True, True, True, "E8m0"), 5),
    ):
        cubin = Kernel(file, function, template).cubin()
        sass = disassemble(cubin.image)
        assert sass.widths("STG")[8] == bytes_ and set(sass.widths("STG")) - {32} == {8, 128}
        check_resources(cubin, sass, QUANTIZE_TILE_REGISTERS)


@pytest.mark.parametrize("power_of_2", [False, True])
def test_requantize_1x128_t(power_of_2):
    cubin = Kernel("quantize_tile.cuh", "requantize_1x128_t", (power_of_2,)).cubin()
    sass = disassemble(cubin.image)
    assert sass.count("LDG.E.128.CONSTANT") == sass.widths("LDG")[128] == 16
    assert sass.widths("STG")[128] == 16 and sass.widths("STS")[128] == 16
    check_resources(cubin, sass, REQUANTIZE_REGISTERS)


@pytest.mark.parametrize("transpose", [False, True], ids=["one_orientation", "both"])
@pytest.mark.parametrize(("input_type", "power_of_2"), QUANTIZE)
def test_quantize_128x128(input_type, power_of_2, transpose):
    kernel = Kernel("quantize_tile.cuh", "quantize_128x128", (input_type, power_of_2, transpose))
    sass, columns = check_quantize_tile(kernel, input_type, power_of_2, orientations=1 + transpose)
    assert sass.widths("LDG") == {128: 16}
    stores = sass.widths("STS")
    assert stores[128] == columns * transpose and stores[64] == (16 if columns == 8 else 0)
    assert sass.count("BAR.SYNC") == 2


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("power_of_2", [False, True])
def test_swiglu_quantize(power_of_2, transpose):
    cubin = Kernel("swiglu.cuh", "swiglu_quantize", (power_of_2, transpose)).cubin()
    sass = disassemble(cubin.image)
    assert sass.count("LDG.E.128.CONSTANT") == sass.widths("LDG")[128] == 32, "gate and up"
    assert sass.widths("STG") == {128: 8 * (1 + transpose), 32: 1 + 2 * transpose}, "a scale; a report"
    assert sass.count("MUFU.EX2") == 128, "a sigmoid a value"
    assert sass.count("F2FP.SATFINITE.E4M3") == 64 * (1 + transpose)
    assert sass.count("BAR.SYNC") == 3
    check_resources(cubin, sass, QUANTIZE_TILE_REGISTERS)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("power_of_2", [False, True])
def test_swiglu_backward_quantize(power_of_2, recompute, weighted):
    """Four columns a thread: loads of 4 and 8 bytes, a whole line a warp."""
    cubin = Kernel("swiglu.cuh", "swiglu_backward_quantize", (power_of_2, recompute, weighted)).cubin()
    sass = disassemble(cubin.image)
    assert sass.widths("LDG") == {64: 16, 32: 2 * 16 + 3 + 2 + weighted}, "dy; gate, up, a scale, offsets"
    assert sass.widths("STG") == {128: 4 * (4 + recompute), 32: 4 + recompute + 1 + weighted}
    assert sass.count("MUFU.EX2") == 64 * (1 + recompute)
    assert sass.count("BAR.SYNC") == 1 + 3 * (2 + recompute)
    check_resources(cubin, sass, QUANTIZE_TILE_REGISTERS)


@pytest.mark.parametrize("input_type", ["Bf16", "Fp16", "float"])
def test_pack_e5m6(input_type):
    cubin = Kernel("e5m6.cuh", "pack_e5m6", (input_type,)).cubin()
    sass = disassemble(cubin.image)
    assert sass.widths("LDG") == {128: 8 if input_type == "float" else 4}
    assert sass.widths("STG") == {128: 3, 32: 4}, "codes; a scale a tile"
    check_resources(cubin, sass, 64)


@pytest.mark.parametrize("output_type", ["Bf16", "float"])
def test_unpack_e5m6(output_type):
    cubin = Kernel("e5m6.cuh", "unpack_e5m6", (output_type,)).cubin()
    sass = disassemble(cubin.image)
    assert sass.widths("LDG") == {128: 3, 32: 1} and set(sass.widths("STG")) == {128}
    check_resources(cubin, sass, 64)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("input_type", ["Bf16", "float"])
def test_permute_quantize(input_type, transpose):
    cubin = Kernel("permute.cuh", "permute_quantize", (input_type, False, transpose)).cubin()
    sass, columns = disassemble(cubin.image), 4 if input_type == "float" else 8
    assert sass.widths("LDG") == {128: 16, 32: 16 + 2 + 2 * transpose}, "x, the index and offsets"
    assert sass.widths("STG") == {128: columns * (1 + transpose), 32: 1 + 2 * transpose}
    check_resources(cubin, sass, QUANTIZE_TILE_REGISTERS)


def test_unpermute():
    cubin = Kernel("permute.cuh", "unpermute", (4,)).cubin()
    sass = disassemble(cubin.image)
    loads = sass.widths("LDG")
    assert loads[32] == 2 and loads[128] in (4, 8) and sum(loads.values()) == 2 + loads[128]
    assert sass.widths("STG") == {128: 1}
    assert sass.count("FFMA") == 0, "products and sums are rounded one by one"
    check_resources(cubin, sass, 64)


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("scores_of_lane", [1, 8, 16])
def test_route(scores_of_lane, logits):
    cubin = Kernel("gate.cuh", "route", (scores_of_lane, logits)).cubin()
    sass = disassemble(cubin.image)
    assert sass.widths("LDG") == {32: 2 * scores_of_lane}, "a score and a bias an expert"
    assert sass.count("MUFU.EX2") == scores_of_lane * logits
    assert sass.count("REDUX") > 0 and sass.count("REDG") == scores_of_lane
    assert sass.count("LDS") + sass.count("STS") + sass.count("BAR") == 0, "warps know nothing of each other"
    check_resources(cubin, sass, 112 if scores_of_lane == 16 else 64)


def sass_of(body):
    source = 'extern "C" __global__ void k(float4* p, float* q, unsigned char* b, int n) {' + body + "}"
    return disassemble(compile_source(source, (), source_options(), cubin=True).cubin)


def test_the_checks_see_what_they_look_for():
    wide = sass_of("float4 v = p[threadIdx.x]; v.x += 1; p[threadIdx.x] = v; b[0] = b[1];")
    assert wide.widths("LDG") == {128: 1, 8: 1}
    assert wide.widths("STG") == {128: 1, 8: 1}
    assert wide.local_memory == 0

    indexed = sass_of("float a[64] = {}; for (int i = 0; i < n; ++i) a[b[i] % 64] += q[i]; q[0] = a[n % 64];")
    assert indexed.local_memory > 0

    spilling = """
        extern "C" __global__ void __launch_bounds__(1024, 2) k(float* q) {
            float a[64];
            #pragma unroll
            for (int i = 0; i < 64; ++i) a[i] = q[i * 1024 + threadIdx.x];
            __syncthreads();
            #pragma unroll
            for (int i = 0; i < 64; ++i) q[i * 1024 + threadIdx.x] = a[63 - i] * a[(i * 7) % 64];
        }"""
    done = compile_source(spilling, (), source_options(), cubin=True)
    resources = done.resources("k")
    assert resources.spill_store_bytes > 0
    assert resources.registers <= 32
    assert disassemble(done.cubin).local_memory > 0


@pytest.mark.parametrize("kernel", [kernels.DISPATCH, kernels.DISPATCH_AGAIN, kernels.COMBINE], ids=str)
def test_all_to_all_within_a_node(kernel):
    """Rows move by bulk copies; 512 threads share the registers of an SM that they have alone."""
    cubin = kernel.cubin()
    sass = disassemble(cubin.image)
    assert sass.count("UBLKCP") >= 2
    if kernel is kernels.COMBINE:  # sums are the lanes'; so are a bias's values and what leaves
        assert sass.widths("LDS") == {128: 21 + 14} and sass.widths("LDG")[128] == 7
        assert sass.widths("STG")[128] == 28
    else:
        assert 128 not in sass.widths("LDG") and 128 not in sass.widths("STG"), "no row through registers"
    if kernel is kernels.DISPATCH_AGAIN:  # its image is that of DISPATCH
        assert cubin.resources.registers <= 96 and cubin.resources.spill_store_bytes == 0
    else:
        check_resources(cubin, sass, 128)


def test_counting_of_opcodes():
    sass = Sass("R2 R17 UR40", {"LDG.E.128.CONSTANT": 2, "LDG.E": 1, "LDGSTS.E.128": 5, "LDG.E.U16": 3})
    assert sass.count("LDG") == 6
    assert sass.count("LDG.E.128") == 2
    assert sass.widths("LDG") == {128: 2, 32: 1, 16: 3}
    assert sass.registers == 18


def test_a_bad_image_is_refused():
    with pytest.raises(ValueError, match="nvdisasm refused the image"):
        disassemble(b"not a cubin")
