"""A plain copy on some of a GPU's SMs: what they move when nothing but loads and stores is asked of them."""

from torch import Tensor

from dsv3_kernels import jit, launch
from dsv3_kernels.ep.kernels import OWN_SM
from dsv3_kernels.jit.compile import compile_source, source_options

THREADS = 1024

SOURCE = """
#include "ptx.cuh"
using namespace dsv3;

// 16 bytes a lane and step; several loads are on their way before the first store waits for one.
__global__ void __launch_bounds__(1024) copy_bytes(const u8* from, u8* to, u64 bytes) {
    constexpr u32 kInFlight = 8;
    const u64 step = 16ull * blockDim.x * gridDim.x;
    u64 at = 16ull * (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x);
    for (; at + (kInFlight - 1) * step < bytes; at += kInFlight * step) {
        U32x4 held[kInFlight];
#pragma unroll
        for (u32 i = 0; i < kInFlight; ++i) held[i] = ptx::load_global_nc(from + at + i * step);
#pragma unroll
        for (u32 i = 0; i < kInFlight; ++i) ptx::store_global(to + at + i * step, held[i]);
    }
    for (; at < bytes; at += step) ptx::store_global(to + at, ptx::load_global_nc(from + at));
}
"""


class CopyKernel(jit.Kernel):
    """A kernel of this file, where others are of csrc/kernels."""

    def cubin(self) -> jit.Cubin:
        done = compile_source(SOURCE, [self.function], source_options(), cubin=True)
        name = done.names[0]
        return jit.Cubin(done.cubin, name, ("u64", "u64", "u64"), done.resources(name))

    def ptx(self, lineinfo: bool = False) -> jit.Ptx:
        done = compile_source(SOURCE, [self.function], source_options())
        return jit.Ptx(done.ptx, done.names[0], ("u64", "u64", "u64"))


_KERNEL = CopyKernel("bench", "copy_bytes")


def copy(source: Tensor, target: Tensor, num_sms: int) -> None:
    """Copies a contiguous tensor, a multiple of 16 bytes, with one block on each of `num_sms` SMs."""
    size = source.numel() * source.element_size()
    launch.launch(
        _KERNEL,
        (num_sms, 1, 1),
        (THREADS, 1, 1),
        (source, target, size),
        shared_bytes=OWN_SM,
        cooperative=True,
    )
