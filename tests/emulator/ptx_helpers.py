"""Runs single PTX instructions over arrays in the virtual GPU."""

import numpy as np
import torch

from dsv3_kernels import emulator

HEADER = ".version 9.5\n.target sm_90a\n.address_size 64\n"
_LOADS = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
_REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def kernel(body, params="", declarations="", name="k", before=""):
    return f"{HEADER}{before}\n.visible .entry {name}({params})\n{{\n{declarations}\n{body}\n}}\n"


def elementwise(code, out_dtype, *arrays, before=""):
    """Run `code` once an element, on registers %d (result) and %a, %b, %c, %e (sources), typed by the dtypes.

    Sub-byte and packed types travel as the unsigned integer of their width.
    """
    n = len(arrays[0])
    names = "abce"[: len(arrays)]
    sizes = [np.dtype(x.dtype).itemsize for x in arrays]
    out_size = np.dtype(out_dtype).itemsize
    params = ", ".join([".param .u64 po"] + [f".param .u64 p{x}" for x in names] + [".param .u32 n"])
    lines = [
        ".reg .pred %stop, %p, %q;",
        ".reg .b32 %i, %m, %t, %u;",
        ".reg .b64 %adr, %off, %base;",
        f".reg .{_REGISTERS[out_size]} %d;",
    ]
    lines += [f".reg .{_REGISTERS[s]} %{x};" for x, s in zip(names, sizes, strict=True)]
    body = [
        "mov.u32 %i, %ctaid.x;",
        "mov.u32 %t, %ntid.x;",
        "mov.u32 %u, %tid.x;",
        "mad.lo.u32 %i, %i, %t, %u;",
        "ld.param.u32 %m, [n];",
        "setp.ge.u32 %stop, %i, %m;",
        "@%stop bra DONE;",
        "cvt.u64.u32 %off, %i;",
    ]
    for x, s in zip(names, sizes, strict=True):
        body += [
            f"ld.param.u64 %base, [p{x}];",
            f"mad.lo.u64 %adr, %off, {s}, %base;",
            f"ld.global.{_LOADS[s]} %{x}, [%adr];",
        ]
    body += [code, "ld.param.u64 %base, [po];", f"mad.lo.u64 %adr, %off, {out_size}, %base;"]
    body += [f"st.global.{_LOADS[out_size]} [%adr], %d;", "DONE:", "ret;"]
    text = kernel("\n".join(body), params, "\n".join(lines), before=before)
    out = np.full(n, 0xA5, dtype=np.uint8).repeat(out_size)[: n * out_size].view(out_dtype).copy()
    tensors = [torch.from_numpy(x.copy().view(np.uint8)) for x in (out, *arrays)]
    gpu = emulator.VirtualGPU(seed=1)
    gpu.launch(text, "k", grid=(-(-n // 64), 1, 1), block=(64, 1, 1), args=[*tensors, n])
    return tensors[0].numpy().view(out_dtype)


def run(
    body,
    *args,
    declarations="",
    params="",
    block=32,
    grid=1,
    cluster=1,
    shared=0,
    seed=0,
    before="",
    **options,
):
    """One launch of a handwritten kernel; the arguments are tensors or numbers, as `params` declares them."""
    gpu = emulator.VirtualGPU(num_sms=4, seed=seed, **options)
    gpu.launch(
        kernel(body, params, declarations, before=before),
        "k",
        grid=(grid, 1, 1),
        block=(block, 1, 1),
        args=list(args),
        cluster=(cluster, 1, 1),
        shared_bytes=shared,
    )
    return gpu


def edges(dtype, rng, n):
    """Random bit patterns, with the values at the borders many times among them."""
    info = np.iinfo(dtype)
    special = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 255, info.max, info.max - 1, info.min, info.min + 1]
    special = np.array([x for x in special if info.min <= x <= info.max], dtype=dtype)
    x = rng.integers(info.min, info.max, n, dtype=dtype, endpoint=True)
    return np.where(rng.random(n) < 0.5, rng.choice(special, n), x).astype(dtype)


def float_edges(dtype, rng, n):
    bits = {
        np.dtype(np.float32): np.uint32,
        np.dtype(np.float64): np.uint64,
        np.dtype(np.float16): np.uint16,
    }[np.dtype(dtype)]
    x = rng.integers(0, np.iinfo(bits).max, n, dtype=bits, endpoint=True).view(dtype)
    info = np.finfo(dtype)
    special = np.array(
        [
            0.0,
            -0.0,
            1.0,
            -1.0,
            0.5,
            1.5,
            2.5,
            -2.5,
            np.inf,
            -np.inf,
            np.nan,
            info.max,
            -info.max,
            info.tiny,
            info.smallest_subnormal,
            -info.smallest_subnormal,
            3.0,
            448.0,
        ],
        dtype=dtype,
    )
    small = rng.normal(size=n).astype(dtype)
    x = np.where(rng.random(n) < 0.3, small, x)
    return np.where(rng.random(n) < 0.4, rng.choice(special, n), x).astype(dtype)
