"""The kernels that train DeepSeek-V3.

Names resolve on first use, so that `import dsv3_kernels` is cheap and `dsv3_kernels.jit` works without torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_API = {
    "QuantizedTensor": "quantized",
    "dequantize": "quantize",
    "quantize_1x128": "quantize",
    "quantize_1x128_t": "quantize",
    "quantize_128x128": "quantize",
    "requantize_1x128_t": "quantize",
    "permute_quantize": "permute",
    "unpermute": "permute",
    "route": "gate",
    "PackedE5M6": "e5m6",
    "pack_e5m6": "e5m6",
    "unpack_e5m6": "e5m6",
    "swiglu_quantize": "swiglu",
    "swiglu_backward_quantize": "swiglu",
    "fp8_gemm": "gemm",
    "grouped_fp8_gemm": "gemm",
    "masked_grouped_fp8_gemm": "gemm",
    "fp8_wgrad": "wgrad",
    "DeviceValueError": "device_error",
    "synchronize": "launch",
    "warmup": "compile_ahead",
}
_MODULES = ("doctor", "emulator", "ep", "jit", "model", "nn", "reference", "train")

__all__ = [*_API, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _API:
        value = getattr(importlib.import_module(f".{_API[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
