"""Compilation: PTX and cubins without a GPU and without torch, keys that change with the code, errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_kernels import jit
from dsv3_kernels.jit import cache, compile, kernel, toolchain

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of device sources of the test's own, and a cache of its own."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "base.cuh").write_text("namespace dsv3 { struct Wide { char bytes[128]; }; }\n")
    (folder / "add.cuh").write_text(
        '#pragma once\n  #  include "base.cuh"\n'
        "#ifndef STEP\n#define STEP 1\n#endif\n"
        "namespace dsv3 {\n"
        "template <class T, int kCount, bool kFlag>\n"
        "__global__ void add(T* p, float f, double d, short s, const __grid_constant__ Wide w) {\n"
        "    p[threadIdx.x] += T(kCount * STEP) + T(f) + T(d) + T(s) + T(w.bytes[5]) + T(kFlag);\n"
        "}\n"
        "__global__ void plain() {}\n"
        "}\n"
    )
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.setattr(compile, "kernel_dir", lambda: folder)
    monkeypatch.setattr(kernel, "kernel_dir", lambda: folder)
    forget()
    yield folder
    forget()


def forget():
    kernel._ptx.cache_clear()
    kernel._cubin.cache_clear()


def test_a_kernel_gives_ptx_and_a_cubin_that_agree(sources):
    add = jit.Kernel("add.cuh", "add", ("unsigned long long", 3, True))
    assert str(add) == "dsv3::add<unsigned long long, 3, true>"
    ptx, cubin = add.ptx(), add.cubin()
    assert f".entry {ptx.name}(" in ptx.text
    assert ".target sm_90a" in ptx.text
    assert ptx.parameters == ("u64", "f32", "f64", "u16", "b8[128]")
    assert (cubin.name, cubin.parameters) == (ptx.name, ptx.parameters)
    assert cubin.image.startswith(b"\x7fELF")
    assert cubin.resources.registers > 0
    assert jit.Kernel("add.cuh", "plain").ptx().parameters == ()
    # Again from the cache, and again from this process' memory.
    forget()
    assert (add.ptx(), add.cubin()) == (ptx, cubin)
    assert add.cubin() is add.cubin()


def test_the_key_changes_with_whatever_changes_the_machine_code(sources, monkeypatch):
    compiled = []

    def counting(*arguments):
        compiled.append(arguments)
        return compile.compile_source(*arguments)

    monkeypatch.setattr(kernel, "compile_source", counting)

    def compiles(add, **options):
        forget()
        before = len(compiled)
        add.ptx(**options)
        return len(compiled) - before

    add = jit.Kernel("add.cuh", "add", ("int", 3, True))
    assert compiles(add) == 1
    assert compiles(add) == 0
    assert compiles(jit.Kernel("add.cuh", "add", ("int", 4, True))) == 1
    assert compiles(jit.Kernel("add.cuh", "add", ("int", 3, False))) == 1
    assert compiles(jit.Kernel("add.cuh", "add", ("int", 3, True), (("STEP", 2),))) == 1
    assert compiles(add, lineinfo=True) == 1
    assert compiles(add) == 0
    add.cubin()
    assert len(compiled) == 6, "machine code is another entry"

    header = sources / "base.cuh"
    header.write_text(header.read_text() + "// a comment in an included file\n")
    assert compiles(add) == 1
    header.write_text(header.read_text() + "#if 0\n#include <later.cuh>\n#endif\n")
    assert compiles(add) == 1
    (sources / "later.cuh").write_text("")
    assert compiles(add) == 0, "an empty file is what a missing one was taken for"
    (sources / "later.cuh").write_text("#define LATER\n")
    assert compiles(add) == 1

    monkeypatch.setattr(toolchain.Library, "build", property(lambda library: "another release"))
    assert compiles(add) == 1


def test_the_text_of_a_closure_cannot_be_shifted_between_files():
    assert cache.key_of("ab", "c") != cache.key_of("a", "bc")
    assert cache.key_of("a", "") != cache.key_of("a")
    assert len(cache.key_of("a")) == 64


def test_line_information_names_the_real_files():
    source = (
        '#include "ptx.cuh"\nextern "C" __global__ void k(float* p) { *p = dsv3::ptx::div_rn(p[0], p[1]); }'
    )
    ptx = jit.compile_ptx(source, lineinfo=True)
    assert f'"{jit.kernel_dir() / "ptx.cuh"}"' in ptx
    assert ".loc" in ptx
    plain = jit.compile_ptx(source)
    assert ".loc" not in plain and ".file" not in plain
    assert os.getcwd() + "/instance.cu" not in ptx


def test_compilers_write_into_no_object_of_pythons():
    jit.compile_ptx('extern "C" __global__ void k() {}')  # its log is empty: one byte, the final zero
    assert [bytes([i])[0] for i in range(256)] == list(range(256))


def test_defines_and_include_folders(tmp_path):
    (tmp_path / "value.cuh").write_text("constexpr int kValue = 1000 + VALUE;\n")
    source = '#include "value.cuh"\nextern "C" __global__ void k(int* p) { *p = kValue; }'
    assert "1234" in jit.compile_ptx(source, include_dirs=[tmp_path], defines={"VALUE": 234})
    with pytest.raises(jit.CompileError, match=r"value\.cuh"):
        jit.compile_ptx(source)


def test_errors_carry_the_compilers_own_words(sources):
    with pytest.raises(
        jit.CompileError, match=r'(?s)instance\.cu\(2\): error: identifier "oops" is undefined'
    ):
        jit.compile_ptx('\nextern "C" __global__ void k(int* p) { *p = oops; }')
    with pytest.raises(jit.CompileError, match=r"dsv3::absent<int>"):
        jit.Kernel("add.cuh", "absent", ("int",)).ptx()
    with pytest.raises(jit.CompileError, match=r"no_such_file\.cuh"):
        jit.Kernel("no_such_file.cuh", "add").ptx()
    bad_ptx = 'extern "C" __global__ void k() { asm volatile("nonsense.u32;"); }'
    with pytest.raises(jit.CompileError, match=r"(?s)nvrtcCompileProgram: .*ptxas.*nonsense"):
        compile.compile_source(bad_ptx, (), compile.source_options(), cubin=True)
    with pytest.raises(jit.CompileError):  # and nothing of that was cached
        jit.Kernel("add.cuh", "absent", ("int",)).ptx()


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of torch fails
from dsv3_kernels import jit
cubin = jit.Kernel("quantize.cuh", "quantize_1x128", ("Bf16", True)).cubin()
assert cubin.image.startswith(b"\\x7fELF")
print(len(cubin.image))
"""


def test_compilation_needs_no_torch_and_any_working_folder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), cache.ENVIRONMENT: str(tmp_path / "cache")}
    run = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


@pytest.mark.parametrize(
    ("module", "finder", "mend"),
    [
        ("cuda.bindings.nvrtc", toolchain.nvrtc, "pip install 'cuda-python"),
        ("cuda.bindings.nvjitlink", toolchain.nvjitlink, "pip install 'cuda-python"),
    ],
)
def test_missing_bindings_are_named_with_their_mend(monkeypatch, module, finder, mend):
    monkeypatch.setitem(sys.modules, module, None)
    finder.cache_clear()
    try:
        with pytest.raises(jit.ToolchainError, match=f"found no {module}.*Mend: {mend}"):
            finder()
    finally:
        finder.cache_clear()


def test_missing_libraries_are_named_with_their_mend(monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("Failure finding library:\n  long story")

    from cuda.bindings import nvjitlink, nvrtc

    for module, name, finder in (
        (nvrtc, "nvrtcVersion", toolchain.nvrtc),
        (nvjitlink, "version", toolchain.nvjitlink),
    ):
        monkeypatch.setattr(module, name, fails)
        finder.cache_clear()
        try:
            with pytest.raises(
                jit.ToolchainError, match=r"long story.*Mend: pip install 'dsv3_kernels\[cu13\]'"
            ):
                finder()
        finally:
            finder.cache_clear()

    monkeypatch.setattr(toolchain, "_wheel_folders", lambda: iter([tmp_path]))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NVSHMEM_HOME", raising=False)
    with pytest.raises(jit.ToolchainError, match=r"nvdisasm.*Mend: pip install"):
        toolchain.nvdisasm()
    with pytest.raises(jit.ToolchainError, match=r"NVSHMEM.*Mend: pip install"):
        toolchain.nvshmem()


def test_the_tools_of_this_machine():
    nvrtc, nvjitlink = toolchain.nvrtc(), toolchain.nvjitlink()
    assert nvrtc.version >= (12, 9)
    assert nvjitlink.version >= (12, 9)
    assert os.access(toolchain.nvdisasm(), os.X_OK)


def test_nvshmem_of_this_machine():
    try:
        found = toolchain.nvshmem()
    except jit.ToolchainError:
        pytest.skip("NVSHMEM is not installed")
    assert tuple(int(part) for part in found.version.split(".")) >= (3, 5, 0)
    assert (found.include / "nvshmem.h").is_file()


@pytest.mark.parametrize(
    ("missing", "match"),
    [
        ("cudart", r"headers of the CUDA runtime.*Mend: pip install 'nvidia-cuda-runtime>=13"),
        ("cccl", r"headers of the CUDA C\+\+ libraries.*Mend: pip install 'nvidia-cuda-cccl>=13"),
    ],
)
def test_missing_headers_are_named_with_their_mend(monkeypatch, tmp_path, missing, match):
    for file in ("include/non_abi/nvshmem_version.h", "lib/libnvshmem_device.a", "lib/libnvshmem_host.so.3"):
        (tmp_path / "nvshmem" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvshmem" / file).touch()
    monkeypatch.setattr(toolchain, "_wheel_folders", lambda: iter([tmp_path / "nvshmem"]))
    monkeypatch.setattr(toolchain, "_header_folder", lambda name: None if name == missing else tmp_path)
    with pytest.raises(jit.ToolchainError, match=match):
        jit.compile_ptx("#include <nvshmem.h>\n", nvshmem=True)
    monkeypatch.setattr(toolchain, "_header_folder", lambda name: tmp_path)
    assert toolchain.nvshmem_headers().folders == (tmp_path / "nvshmem" / "include", tmp_path, tmp_path)
