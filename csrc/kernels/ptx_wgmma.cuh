// The chapter of ptx.cuh on the matrix instructions of a warpgroup.
#pragma once

#include "ptx.cuh"

namespace dsv3 {
namespace ptx {

// ---- Asynchronous warpgroup-level matrix instructions

// The matrix descriptor of a K-major operand in lines of 128 bytes with 128-byte swizzle, 8 lines a group,
// groups contiguous and 1024-byte aligned. Adding kDescriptorStep moves it 32 bytes along K: one wgmma.
__device__ __forceinline__ u64 k_major_descriptor(const void* tile) {
    constexpr u64 kSwizzle128 = 1ull << 62;
    constexpr u64 kGroupStride = 1024 >> 4;
    return kSwizzle128 | kGroupStride << 32 | (shared_address(tile) & 0x3ffff) >> 4;
}
constexpr u64 kDescriptorStep = 32 >> 4;

// Orders the warpgroup's earlier accesses to registers and shared memory before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until every committed wgmma is done and `d` may be read: the empty asm keeps the compiler from reading it
// sooner.
template <u32 kCount>
__device__ __forceinline__ void wgmma_wait(float (&d)[kCount]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d[64 x kN] = a[64 x 32] * b[kN x 32]^T (+ d if accumulate), e4m3 operands by descriptor, FP32 sums.
// Register 4i + j of a lane holds row 16 * warp + lane / 4 + 8 * (j / 2), column 8i + 2 * (lane % 4) + j % 2.
template <u32 kN>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[kN / 2], u64 a, u64 b, bool accumulate);

// The instruction names its N/2 accumulators one by one: these build the lists, 8 and then 16 at a time.
#define DSV3_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DSV3_NAMES_16 DSV3_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define DSV3_NAMES_32 \
    DSV3_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSV3_NAMES_48 \
    DSV3_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define DSV3_NAMES_64 \
    DSV3_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DSV3_NAMES_80 \
    DSV3_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define DSV3_NAMES_96 \
    DSV3_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define DSV3_NAMES_128                                                                             \
    DSV3_NAMES_96                                                                                  \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DSV3_EIGHT(i)                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define DSV3_OPERANDS_8 DSV3_EIGHT(0)
#define DSV3_OPERANDS_16 DSV3_OPERANDS_8, DSV3_EIGHT(8)
#define DSV3_OPERANDS_32 DSV3_OPERANDS_16, DSV3_EIGHT(16), DSV3_EIGHT(24)
#define DSV3_OPERANDS_48 DSV3_OPERANDS_32, DSV3_EIGHT(32), DSV3_EIGHT(40)
#define DSV3_OPERANDS_64 DSV3_OPERANDS_48, DSV3_EIGHT(48), DSV3_EIGHT(56)
#define DSV3_OPERANDS_80 DSV3_OPERANDS_64, DSV3_EIGHT(64), DSV3_EIGHT(72)
#define DSV3_OPERANDS_96 DSV3_OPERANDS_80, DSV3_EIGHT(80), DSV3_EIGHT(88)
#define DSV3_OPERANDS_128 DSV3_OPERANDS_96, DSV3_EIGHT(96), DSV3_EIGHT(104), DSV3_EIGHT(112), DSV3_EIGHT(120)

// N, the number of accumulators R = N / 2, and the numbers R, R + 1, R + 2 of the operands that follow them.
#define DSV3_WGMMA_E4M3(N, R, A, B, P)                                                            \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma_e4m3<N>(float (&d)[R], u64 a, u64 b, bool accumulate) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %" #P                                      \
                     ", 0;\n"                                                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" DSV3_NAMES_##R  \
                     "}, %" #A ", %" #B ", p, 1, 1;\n}"                                           \
                     : DSV3_OPERANDS_##R                                                          \
                     : "l"(a), "l"(b), "r"(static_cast<u32>(accumulate)));                        \
    }
DSV3_WGMMA_E4M3(16, 8, 8, 9, 10)
DSV3_WGMMA_E4M3(32, 16, 16, 17, 18)
DSV3_WGMMA_E4M3(64, 32, 32, 33, 34)
DSV3_WGMMA_E4M3(96, 48, 48, 49, 50)
DSV3_WGMMA_E4M3(128, 64, 64, 65, 66)
DSV3_WGMMA_E4M3(160, 80, 80, 81, 82)
DSV3_WGMMA_E4M3(192, 96, 96, 97, 98)
DSV3_WGMMA_E4M3(256, 128, 128, 129, 130)
#undef DSV3_WGMMA_E4M3
#undef DSV3_NAMES_8
#undef DSV3_NAMES_16
#undef DSV3_NAMES_32
#undef DSV3_NAMES_48
#undef DSV3_NAMES_64
#undef DSV3_NAMES_80
#undef DSV3_NAMES_96
#undef DSV3_NAMES_128
#undef DSV3_EIGHT
#undef DSV3_OPERANDS_8
#undef DSV3_OPERANDS_16
#undef DSV3_OPERANDS_32
#undef DSV3_OPERANDS_48
#undef DSV3_OPERANDS_64
#undef DSV3_OPERANDS_80
#undef DSV3_OPERANDS_96
#undef DSV3_OPERANDS_128

}  // namespace ptx
}  // namespace dsv3
