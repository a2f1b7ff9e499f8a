"""The launcher: what reaches the driver, for which arguments, and what its errors say.

A stand-in for libcuda records the calls, in a process of its own.
"""

import ctypes.util
import os
import struct
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from dsv3_kernels import jit, launch
from dsv3_kernels.tensor_map import TensorMap

ROOT = Path(__file__).parents[1]

PRELUDE = """
import torch
from dsv3_kernels import _runtime, jit, launch
from dsv3_kernels.tensor_map import TensorMap

class OnCuda(torch.Tensor):  # looks like a CUDA tensor to the launcher
    is_cuda = True
    number = 0
    def get_device(self): return self.number
    def data_ptr(self): return 0x7000

class Stub:  # a kernel whose image the fake driver understands
    nvshmem = False
    def __init__(self, *types, sizes): self.types, self.sizes = types, sizes
    def __str__(self): return "dsv3::stub"
    def cubin(self): return jit.Cubin(self.sizes.encode() + b"\\0", "stub", self.types, None)

def on_cuda(device=0):
    tensor = torch.zeros(64, 64, dtype=torch.bfloat16).as_subclass(OnCuda)
    tensor.number = device
    return tensor

def expect(error, text, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error as raised:
        assert text in str(raised), str(raised)
    else:
        raise SystemExit(f"expected {error}: {text}")

torch._C._cuda_getCurrentRawStream = lambda device: 7 + device
"""


@pytest.fixture
def run(fake_driver, tmp_path):
    """Runs a script against the fake driver and returns its log."""

    def run(script, **environment):
        log = tmp_path / "log"
        paths = {"LD_LIBRARY_PATH": str(fake_driver), "PYTHONPATH": str(ROOT), "FAKE_CUDA_LOG": str(log)}
        paths["DSV3_KERNELS_CACHE"] = str(tmp_path / "cache")
        result = subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
            env={**os.environ, **paths, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return log.read_text().splitlines() if log.exists() else []

    return run


def test_a_launch_carries_every_argument_and_attribute(run):
    log = run("""
        kernel = Stub("u64", "u32", "f32", "u64", "f64", "b8[128]", "u32", sizes="8 4 4 8 8 128 4")
        tensor = on_cuda(1)
        tensor_map = TensorMap(tensor, (8, 32), 64)
        args = (tensor, 2**32 - 1, 1.5, -2, 0.1, tensor_map, -1)
        launch.launch(kernel, (5, 6, 7), (128, 2, 1), args, cluster=(2, 1, 1), shared_bytes=100_000,
                      cooperative=True, programmatic=True)
    """)
    assert log[:2] == ["map type 9 address 28672 shape 64 64 strides 128 box 32 8 steps 1 1 "
                       "interleave 0 swizzle 2 l2 3 fill 0 aligned 1", "load"]  # fmt: skip
    assert log[2:4] == ["kernel stub", "attribute 8 100000 device 1"]
    values = [
        struct.pack("<Q", 0x7000),
        b"\xff" * 4,
        struct.pack("<f", 1.5),
        struct.pack("<q", -2),
        struct.pack("<d", 0.1),
        b"\x5a" * 128,
        b"\xff" * 4,
    ]
    assert log[4] == (
        "launch context 1 grid 5,6,7 block 128,2,1 shared 100000 stream 8 "
        f"attribute 4={struct.pack('<III', 2, 1, 1).hex()} "
        f"attribute 2=01{'00' * 11} attribute 6=01{'00' * 11} "
        f"parameters {' '.join(value.hex() for value in values)} extra 0"
    )


def test_a_module_that_uses_nvshmem_learns_its_world_before_a_launch(run):
    log = run("""
        from dsv3_kernels import nvshmem
        kernel, tensor = Stub("u64", sizes="8"), on_cuda()
        kernel.nvshmem = True
        arguments = kernel, (1, 1, 1), (32, 1, 1), (tensor,)
        expect(nvshmem.NvshmemError, "make an ep.Buffer first", launch.launch, *arguments)
        heard = []
        class Library:
            def nvshmemx_culibrary_init(self, library): return heard.append(library.value)
        nvshmem._world = nvshmem.World(Library(), 0, [0], 0)
        for _ in range(2):
            launch.launch(*arguments)
        assert len(heard) == 1 and heard[0], heard
    """)
    assert [line.split()[0] for line in log] == ["load", "kernel", "load", "kernel", "launch", "launch"]


def test_one_image_serves_several_devices_and_the_stream_can_be_given(run):
    log = run("""
        kernel = Stub("u64", sizes="8")
        class Stream: cuda_stream = 99
        for device, shared in ((0, 0), (1, 60_000), (0, 60_000), (1, 50_000), (0, 70_000)):
            tensor = on_cuda(device)
            launch.launch(kernel, (1, 1, 1), (32, 1, 1), (tensor,), shared_bytes=shared, stream=Stream())
    """)
    assert log.count("load") == 1
    wanted = ["attribute 8 60000 device 1", "attribute 8 60000 device 0", "attribute 8 70000 device 0"]
    assert [line for line in log if line.startswith("attribute")] == wanted
    launches = [line.split(" parameters")[0] for line in log if line.startswith("launch")]
    assert launches == [
        f"launch context {device} grid 1,1,1 block 32,1,1 shared {shared} stream 99"
        for device, shared in ((0, 0), (1, 60_000), (0, 60_000), (1, 50_000), (0, 70_000))
    ]


def test_arguments_that_do_not_fit_are_refused_before_the_launch(run):
    log = run("""
        kernel = _runtime.Kernel(b"8 4 2 4 16\\0", "k", ["u64", "u32", "u16", "f32", "b8[16]"], "dsv3::k")
        good = [0, 0, 0, 0.0, bytes(16)]
        def call(index, value):
            args = list(good)
            args[index] = value
            kernel.launch(0, 0, (1, 1, 1), (1, 1, 1), tuple(args))
        for index, value in enumerate([2**64 - 1, 2**32 - 1, -2**15, 3, b"x" * 16]):
            call(index, value)
        for index, value in ((0, 2**64), (0, -2**63 - 1), (1, 2**32), (1, -2**31 - 1), (2, 2**16)):
            text = f"dsv3::k: argument {index} is {value}, expected an int that fits"
            expect(ValueError, text, call, index, value)
        for index, value, expected in ((0, 1.0, "an int"), (1, "1", "an int"), (3, "1", "a float"),
                                       (4, bytes(15), "16 bytes"), (4, 1, "16 bytes"), (0, None, "an int")):
            expect(TypeError, f"argument {index} is {value!r}, expected {expected}", call, index, value)
        good.pop()
        expect(TypeError, "got 4 arguments, expected 5", call, 0, 0)
    """)
    assert sum(line.startswith("launch") for line in log) == 5


@pytest.mark.parametrize(
    "function", ["cuLaunchKernelEx", "cuKernelSetAttribute", "cuDevicePrimaryCtxRetain", "cuLibraryGetKernel"]
)
def test_a_failing_call_names_itself_the_driver_error_and_the_launch(run, function):
    run(
        f"""
        kernel = Stub("u64", sizes="8")
        def call():
            launch.launch(kernel, (3, 1, 1), (32, 1, 1), (on_cuda(),), shared_bytes=60_000)
        error = "CUDA_ERROR_INVALID_VALUE (1, invalid argument)"
        where = "device 0" if "{function}" == "cuDevicePrimaryCtxRetain" else "dsv3::stub"
        for text in ("{function}", error, where, "driver for CUDA 13.0"):
            expect(_runtime.DriverError, text, call)
        if "{function}" in ("cuLaunchKernelEx", "cuKernelSetAttribute"):
            expect(RuntimeError, "grid (3, 1, 1), block (32, 1, 1), cluster (1, 1, 1), 60000 bytes", call)
        """,
        FAKE_CUDA_FAIL=function,
    )


def test_a_gpu_without_memory_left_is_named_with_the_mend(run):
    run(
        """
        call = lambda: launch.launch(Stub("u64", sizes="8"), (1, 1, 1), (32, 1, 1), (on_cuda(),))
        expect(_runtime.DriverError, "Mend: free memory of the GPU, say by torch.cuda.empty_cache()", call)
        """,
        FAKE_CUDA_FAIL="cuLibraryLoadData",
        FAKE_CUDA_STATUS="2",
    )


def test_a_device_error_is_raised_by_the_next_launch_and_by_synchronize(run):
    log = run("""
        import ctypes
        from dsv3_kernels.device_error import DeviceValueError
        tensors = on_cuda(0), on_cuda(1)
        words = [launch.error_flag(tensor) for tensor in tensors]
        assert [launch.error_flag(tensor) for tensor in tensors] == words and words[0] != words[1]
        def store(device, code): ctypes.c_uint32.from_address(words[device]).value = code
        kernel = Stub("u64", "u64", sizes="8 8")
        def call(device):
            tensor = tensors[device]
            launch.launch(kernel, (1, 1, 1), (32, 1, 1), (tensor, launch.error_flag(tensor)))
        store(1, 2)
        call(0)  # the words of two devices are apart
        expect(DeviceValueError, "masked_grouped_fp8_gemm: counts held a value outside 0 to max_m", call, 1)
        call(1)

        waited = []
        torch.cuda.is_available = lambda: True
        torch.cuda.synchronize = waited.append
        torch.cuda._utils._get_device_index = lambda device, optional: device or 0
        store(1, 1)
        launch.synchronize()
        expect(DeviceValueError, "on cuda:1: what it returned is not valid", launch.synchronize, 1)
        launch.synchronize(1)
        assert waited == [None, 1, 1]
    """)
    assert [line for line in log if line.startswith("host")] == [
        f"host 4 flags 3 context {device}" for device in (0, 1)
    ]
    assert sum(line.startswith("launch") for line in log) == 2


def test_an_unsupported_gpu_is_refused_before_anything_is_loaded(run):
    script = """
        call = lambda: launch.launch(Stub("u64", sizes="8"), (1, 1, 1), (32, 1, 1), (on_cuda(),))
        expect(launch.UnsupportedDeviceError, "{text}", call)
    """
    text = "cuda:0 is a Fake H100 of compute capability 8.0, expected 9.0"
    assert "load" not in run(script.format(text=text), FAKE_CUDA_CAPABILITY="80")
    if jit.toolchain.nvrtc().version[0] == 13:
        text = "the driver supports CUDA 12.x, but the kernels are compiled by NVRTC 13"
        assert "load" not in run(script.format(text=text), FAKE_CUDA_VERSION="12040")


def test_an_old_driver_is_named(run):
    run(
        """
        text = "supports CUDA 11.8, expected 12.0 or later"
        expect(_runtime.DriverError, text, _runtime.device_count)
        """,
        FAKE_CUDA_VERSION="11080",
    )


def test_devices_and_versions(run):
    run("""
        assert (_runtime.driver_version(), _runtime.device_count()) == (13000, 2)
        wanted = {"name": "Fake H100", "capability": (9, 0), "multiprocessors": 132, "shared_bytes": 232448}
        assert _runtime.device_properties(1) == wanted
        first, second = on_cuda(0), on_cuda(1)
        call = lambda: launch.launch(Stub("u64", "u64", sizes="8 8"), (1, 1, 1), (1, 1, 1), (first, second))
        expect(ValueError, "argument 1 on", call)
    """)


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="this machine has a CUDA driver")
def test_without_a_driver_the_module_imports_and_each_call_says_what_is_missing():
    from dsv3_kernels import _runtime

    calls = (
        _runtime.driver_version,
        _runtime.device_count,
        lambda: _runtime.device_properties(0),
        lambda: _runtime.Kernel(b"", "k", [], "k"),
        lambda: _runtime.encode_tensor_map(0, 0, [1], [], [1], [1], 0, 0, False),
    )
    for call in calls:
        with pytest.raises(
            _runtime.DriverError, match=r"found no CUDA driver: .*Mend: install the NVIDIA driver"
        ):
            call()


def test_the_world_follows_the_tensors(monkeypatch):
    cpu, meta = torch.zeros(2), torch.zeros(2, device="meta")
    assert launch.world(cpu, cpu) == "reference"
    with pytest.raises(ValueError, match=r"several devices: number 0 is on cpu, number 1 is on meta"):
        launch.world(cpu, meta)
    with pytest.raises(ValueError, match=r"on device 'meta', expected 'cpu' or 'cuda'"):
        launch.world(meta)

    kernel = jit.Kernel("quantize.cuh", "quantize_1x128", ("Bf16", False))
    with pytest.raises(ValueError, match=r"quantize_1x128<Bf16, false> got CPU tensors and no virtual GPU"):
        launch.launch(kernel, (1, 1, 1), (32, 1, 1), (cpu,))
    with pytest.raises(ValueError, match="got no tensor"):
        launch.launch(kernel, (1, 1, 1), (32, 1, 1), (1, 2.0))

    calls = []

    class Gpu:
        def launch(self, *args, **kwargs):
            calls.append((args, kwargs))

    gpu = Gpu()
    emulator = types.SimpleNamespace(current=lambda: gpu)
    monkeypatch.setitem(sys.modules, "dsv3_kernels.emulator", emulator)
    assert launch.world(cpu) == "emulator"
    launch.launch(kernel, (4, 1, 1), (256, 1, 1), (cpu, 3), cluster=(2, 1, 1), shared_bytes=64)
    (((text, name), shape),) = calls
    assert (text, name) == (kernel.ptx(lineinfo=True).text, kernel.ptx().name)
    assert shape.pop("args")[0] is cpu
    assert shape == {"grid": (4, 1, 1), "block": (256, 1, 1), "cluster": (2, 1, 1), "shared_bytes": 64}


@pytest.mark.parametrize(
    ("shape", "dtype", "box", "options", "message"),
    [
        ((4, 64), torch.complex64, (4, 8), {}, "dtype torch.complex64"),
        ((1, 1, 1, 1, 1, 64), torch.uint8, (1,) * 5 + (64,), {}, "6 dimensions, expected 1 to 5"),
        ((4, 64), torch.uint8, (64,), {}, r"box \(64,\) has 1 entries, expected 2"),
        ((0, 64), torch.uint8, (1, 64), {}, r"shape \(0, 64\), expected each extent"),
        ((4, 64), torch.uint8, (0, 64), {}, r"box \(0, 64\), expected each extent in 1..256"),
        ((4, 512), torch.uint8, (4, 512), {"swizzle": 0}, "expected each extent in 1..256"),
        ((4, 65), torch.uint8, (4, 64), {}, r"are \(65,\) bytes, expected positive multiples of 16"),
        ((4, 64), torch.uint8, (4, 64), {"strides": (1, 64)}, "expected 1 for the last dimension"),
        ((4, 64), torch.uint8, (4, 64), {"swizzle": 48}, "swizzle 48"),
        ((4, 64), torch.uint8, (4, 64), {"l2_promotion": 1}, "l2_promotion 1"),
        ((4, 256), torch.uint8, (4, 256), {}, "256 bytes wide.* at most the swizzle's 128"),
        ((4, 64), torch.uint8, (4, 8), {"swizzle": 0}, "8 bytes wide, expected a multiple of 16"),
        ((4, 64), torch.uint8, (4, 64), {"element_strides": (1, 9)}, "expected each in 1..8"),
    ],
)  # fmt: skip
def test_a_tensor_map_that_the_hardware_cannot_do_is_refused(shape, dtype, box, options, message):
    with pytest.raises(ValueError, match=message):
        TensorMap(torch.zeros(shape, dtype=dtype), box, **options)


def test_a_tensor_map_starts_at_a_multiple_of_16_bytes():
    tensor = torch.zeros(1024, dtype=torch.uint8)
    misaligned = tensor[(-tensor.data_ptr()) % 16 + 8 :]
    with pytest.raises(ValueError, match="expected a multiple of 16 bytes"):
        TensorMap(misaligned, (16,), 0)


def test_a_tensor_map_is_encoded_innermost_first():
    tensor = torch.zeros(6, 40, 64, dtype=torch.bfloat16)
    encoding = TensorMap(tensor, (1, 8, 32), 64, element_strides=(1, 2, 1), fill_nan=True).encoding
    assert encoding.shape == (64, 40, 6)
    assert encoding.strides == (128, 40 * 128)
    assert encoding.box == (32, 8, 1)
    assert encoding.element_strides == (1, 2, 1)
    assert (encoding.data_type, encoding.address, encoding.swizzle) == (9, tensor.data_ptr(), 64)
    assert (encoding.l2_promotion, encoding.fill_nan) == (256, True)

    view = TensorMap(tensor, (8, 32), 64, shape=(240, 64), strides=(64, 1)).encoding
    assert (view.shape, view.strides, view.box) == ((64, 240), (128,), (32, 8))


def test_a_prepared_launch_is_a_launch_with_the_tensors_put_in(run):
    log = run("""
        from dsv3_kernels.tensor_map import MapLayout
        kernel = Stub("b8[128]", "u64", "u32", "u64", sizes="128 8 4 8")
        layout = MapLayout(torch.bfloat16, (8, 32), (64, 64), (64, 1), 64)
        options = dict(cluster=(2, 1, 1), shared_bytes=100_000, programmatic=True)
        parameters = (layout, launch.Slot.ADDRESS, 7, launch.Slot.ERROR_WORD)
        prepared = launch.Prepared(kernel, (5, 6, 7), (128, 2, 1), parameters, **options)
        for device in (0, 1, 0):
            tensor = on_cuda(device)
            prepared(tensor, tensor)
            args = (TensorMap(tensor, (8, 32), 64), tensor, 7, launch.error_flag(tensor))
            launch.launch(kernel, (5, 6, 7), (128, 2, 1), args, **options)
        expect(TypeError, "got 1 tensors, expected 2", prepared, tensor)
        expect(ValueError, "argument 1 on", prepared, tensor, on_cuda(1))
    """)
    launches = [line for line in log if line.startswith("launch")]
    assert len(launches) == 6
    for prepared, plain in zip(launches[::2], launches[1::2], strict=True):
        assert prepared == plain
    assert launches[0] == launches[4] != launches[2]


def test_an_encoding_is_remembered_by_all_that_it_holds(run):
    """Memory that is freed and used again: an equal address and shape is one encoding, all else another."""
    log = run("""
        from dsv3_kernels.tensor_map import MapLayout
        class At(OnCuda):
            address = 0x7000
            def data_ptr(self): return self.address
        kernel = Stub("b8[128]", sizes="128")
        def call(address, **changes):
            tensor = torch.zeros(64, 64, dtype=torch.bfloat16).as_subclass(At)
            tensor.address = address
            facts = dict(dtype=torch.bfloat16, box=(8, 32), shape=(64, 64), strides=(64, 1), swizzle=64)
            facts |= changes
            launch.Prepared(kernel, (1, 1, 1), (32, 1, 1), (MapLayout(**facts),))(tensor)
            box = facts.pop("box")
            if facts.pop("dtype") == torch.bfloat16:
                launch.launch(kernel, (1, 1, 1), (32, 1, 1), (TensorMap(tensor, box, **facts),))
        variants = (dict(), dict(box=(4, 32)), dict(shape=(32, 64)), dict(strides=(128, 1)),
                    dict(swizzle=128), dict(dtype=torch.float16), dict(fill_nan=True),
                    dict(l2_promotion=128), dict(element_strides=(2, 1)))
        for _ in range(2):
            for address in (0x7000, 0x9000):
                for changes in variants:
                    call(address, **changes)
    """)
    maps = [line for line in log if line.startswith("map")]
    assert len(maps) == len(set(maps)) == 18
