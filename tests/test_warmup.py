"""warmup: compiles what it was told, once, in parallel, and says what the cache held."""

import itertools
import re

import pytest

import dsv3_kernels as dsv3
from dsv3_kernels import e5m6, gate, gemm, permute, quantize, swiglu, wgrad
from dsv3_kernels.ep import ahead
from dsv3_kernels.jit import CompileError, Kernel, cache, kernel


@pytest.fixture(autouse=True)
def an_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV3_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel, "compiled_here", set())
    monkeypatch.setattr("dsv3_kernels.compile_ahead.compiled_here", kernel.compiled_here)
    kernel._cubin.cache_clear()
    yield
    kernel._cubin.cache_clear()


def test_names_configurations_and_kernels_each_once():
    one = quantize.kernels()["quantize_1x128"][0]
    config = gemm.config_of_tile(128, 64)
    warmed = dsv3.warmup([one, "quantize_1x128", config, config.kernel], workers=2, progress=False)
    assert (warmed.kernels, warmed.from_cache) == (10, 0)
    assert cache.usage().entries == 10
    assert 0 < warmed.slowest <= warmed.seconds
    kernel._cubin.cache_clear()  # as a fresh process would
    again = dsv3.warmup([config, one], progress=False)
    assert (again.kernels, again.from_cache) == (2, 2)
    assert re.match(r"2 kernels in \d+\.\d", str(again))


def test_what_cannot_be_compiled_is_said_with_the_compilers_words():
    with pytest.raises(CompileError, match="no_such_function"):
        dsv3.warmup([Kernel("quantize.cuh", "no_such_function")], progress=False)


def test_the_list_of_an_op_holds_what_it_launches():
    for module in (gemm, quantize, swiglu, permute, e5m6, gate, wgrad, ahead):
        for kernels in module.kernels().values():
            assert len(set(kernels)) == len(kernels) > 0
            assert all(isinstance(k, Kernel) for k in kernels)
    assert all(kernel.nvshmem for kernel in ahead.between_nodes())
    assert not any(kernel.nvshmem for kernels in ahead.kernels().values() for kernel in kernels)
    listed = set(gemm.kernels()["fp8_gemm"])
    for m, n in itertools.product((1, 17, 64, 200, 4096, 8192), (8, 392, 2112, 24576)):
        config = gemm.choose_config("none", m, n, 1, 132)
        assert config.kernel in listed, config
        assert wgrad.choose_config(1, m, n, 132).kernel in wgrad.kernels()["fp8_wgrad"]


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("fp8_gemm", {}, r"expected a list; pass \['fp8_gemm'\]"),
        (["gemm"], {}, r"'gemm' has no kernel, expected one of .*fp8_gemm"),
        ([3], {}, r"got 3, expected the name of an op, a configuration or a Kernel"),
        ([], {"workers": 0}, r"workers is 0, expected an int of 1 or more"),
    ],
)
def test_bad_input(what, options, message):
    with pytest.raises(ValueError, match=message):
        dsv3.warmup(what, **options)


def test_nothing_is_a_list_too(capsys):
    assert dsv3.warmup([]).kernels == 0
