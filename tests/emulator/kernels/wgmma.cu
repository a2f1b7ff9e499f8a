// Tensor cores: what may be touched when. 128 threads: one warpgroup, and a producer warp where one is
// needed.
#include "common.cuh"
#include "ptx_wgmma.cuh"

constexpr u32 kN = 16;
constexpr u32 kOnes = 0x38383838;  // four times 1.0 in e4m3

// A and B full of ones, K-major lines of 128 bytes: a k32 product is 32 everywhere, in any swizzle.
struct __align__(1024) Operands {
    u32 a[64 * 32];
    u32 b[kN * 32];
};

__device__ __forceinline__ void fill(Operands& o) {
    for (u32 i = threadIdx.x; i < 64 * 32; i += 128) o.a[i] = kOnes;
    for (u32 i = threadIdx.x; i < kN * 32; i += 128) o.b[i] = kOnes;
}

// in[i], provided the product was right.
__device__ __forceinline__ void finish(float* out, const float* in, float d, float expected) {
    if (threadIdx.x < kCount) out[threadIdx.x] = in[threadIdx.x] + (d - expected);
}

KERNEL(operands_without_proxy_fence) {
    __shared__ Operands o;
    for (u32 i = threadIdx.x; i < 64 * 32; i += 128) o.a[i] = kOnes;  // BUG
    for (u32 i = threadIdx.x; i < kN * 32; i += 128) o.b[i] = kOnes;  // BUG
#if !BUG
    ptx::fence_proxy_async_shared();
#endif
    __syncthreads();
    float d[kN / 2];
    ptx::wgmma_fence();
    ptx::wgmma_e4m3<kN>(d, ptx::k_major_descriptor(o.a), ptx::k_major_descriptor(o.b), false);  // BUG
    ptx::wgmma_commit_group();
    ptx::wgmma_wait(d);
    finish(out, in, d[0], 32);
}

// An m64n16k32 and what surrounds it in one asm statement: there the compiler does not choose the registers'
// moments.
#define WGMMA                                                                                               \
    "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, " \
    "1;\n"
#define FENCE "wgmma.fence.sync.aligned;\n"
#define COMMIT "wgmma.commit_group.sync.aligned;\n"
#define WAIT "wgmma.wait_group.sync.aligned 0;\n"
#define OPERANDS                                                                        \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), \
        "+f"(d[7]) : "l"(ptx::k_major_descriptor(o.a)), "l"(ptx::k_major_descriptor(o.b))

KERNEL(accumulators_read_before_wait) {
    __shared__ Operands o;
    fill(o);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    float d[kN / 2] = {};
#if BUG
    asm volatile(FENCE WGMMA COMMIT "add.f32 %0, %0, 0f3F800000;\n" WAIT : OPERANDS : "memory");  // BUG
#else
    asm volatile(FENCE WGMMA COMMIT WAIT "add.f32 %0, %0, 0f3F800000;\n" : OPERANDS : "memory");
#endif
    finish(out, in, d[0], 33);
}

KERNEL(accumulators_written_without_fence) {
    __shared__ Operands o;
    fill(o);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    float d[kN / 2] = {};
#if BUG
    asm volatile(FENCE "add.f32 %0, %0, 0f3F800000;\n" WGMMA COMMIT WAIT : OPERANDS : "memory");  // BUG
#else
    asm volatile("add.f32 %0, %0, 0f3F800000;\n" FENCE WGMMA COMMIT WAIT : OPERANDS : "memory");
#endif
    finish(out, in, d[0], 33);
}

// Two wgmma of one shape may share accumulators without a fence or a wait between them.
KERNEL(a_registers_written_before_wait) {
    __shared__ Operands o;
    fill(o);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    float d[kN / 2] = {};
    u32 a0 = kOnes, a1 = kOnes, a2 = kOnes, a3 = kOnes;
#define WGMMA_A                                                                               \
    "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, " \
    "{%8, %9, %10, %11}, %12, 1, 1, 1;\n"
#define OPERANDS_A                                                                                  \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+r"(a0), "+r"(a1), "+r"(a2), "+r"(a3) : "l"(ptx::k_major_descriptor(o.b))
#if BUG
    asm volatile(FENCE WGMMA_A WGMMA_A COMMIT "and.b32 %8, %8, 0;\n" WAIT : OPERANDS_A : "memory");  // BUG
#else
    asm volatile(FENCE WGMMA_A WGMMA_A COMMIT WAIT "and.b32 %8, %8, 0;\n" : OPERANDS_A : "memory");
#endif
    finish(out, in, d[0] + a0, 64);
}

KERNEL(operand_overwritten_before_wait) {
    __shared__ Operands o;
    fill(o);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    float d[kN / 2];
    ptx::wgmma_fence();
    ptx::wgmma_e4m3<kN>(d, ptx::k_major_descriptor(o.a), ptx::k_major_descriptor(o.b), false);  // BUG
    ptx::wgmma_commit_group();
#if !BUG
    ptx::wgmma_wait(d);
    __syncthreads();
#endif
    o.b[threadIdx.x] = 0;  // BUG
#if BUG
    ptx::wgmma_wait(d);
#endif
    finish(out, in, d[0], 32);
}

// 160 threads. The consumers' release is what lets the producer refill: it must come after the wait. What the
// copy engine wrote needs no proxy fence before wgmma reads it.
KERNEL(stage_released_before_wait) {
    __shared__ Operands o;
    __shared__ u64 full, empty;
    u32* ones = flags + 128;  // global: 2048 bytes of ones
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::mbarrier_init(&empty, 128);
        ptx::fence_mbarrier_init();
    }
    if (threadIdx.x < 128)
        for (u32 i = threadIdx.x; i < 64 * 32; i += 128) o.a[i] = kOnes;
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (threadIdx.x == 128)
            for (u32 lap = 0; lap < 2; ++lap) {
                ptx::mbarrier_wait(&empty, lap ^ 1);
                ptx::mbarrier_arrive_expect(&full, sizeof o.b);
                bulk_load(o.b, ones, sizeof o.b, &full);  // BUG
            }
        return;
    }
    float d[kN / 2];
    for (u32 lap = 0; lap < 2; ++lap) {
        ptx::mbarrier_wait(&full, lap);
        ptx::wgmma_fence();
        ptx::wgmma_e4m3<kN>(d, ptx::k_major_descriptor(o.a), ptx::k_major_descriptor(o.b), lap);  // BUG
        ptx::wgmma_commit_group();
#if BUG
        ptx::mbarrier_arrive(&empty);
        ptx::wgmma_wait(d);
#else
        ptx::wgmma_wait(d);
        ptx::mbarrier_arrive(&empty);
#endif
    }
    finish(out, in, d[0], 64);
}

// Rows of A that nobody wrote spoil their own rows of D, which may be left alone, and nothing else.
KERNEL(product_of_rows_nobody_wrote) {
    __shared__ Operands o;
    for (u32 i = threadIdx.x; i < 32 * 32; i += 128) o.a[i] = kOnes;
    for (u32 i = threadIdx.x; i < kN * 32; i += 128) o.b[i] = kOnes;
    ptx::fence_proxy_async_shared();
    __syncthreads();
    float d[kN / 2];
    ptx::wgmma_fence();
    ptx::wgmma_e4m3<kN>(d, ptx::k_major_descriptor(o.a), ptx::k_major_descriptor(o.b), false);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait(d);
    finish(out, in, d[0], 32);
    if (BUG && threadIdx.x == 64) out[0] = d[0];  // BUG
}

KERNEL(accumulators_written_before_wait) {
    __shared__ Operands o;
    fill(o);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    float d[kN / 2] = {};
#if BUG
    asm volatile(FENCE WGMMA COMMIT "mov.f32 %0, 0f42000000;\n" WAIT : OPERANDS : "memory");  // BUG
#else
    asm volatile(FENCE WGMMA COMMIT WAIT "mov.f32 %0, 0f42000000;\n" : OPERANDS : "memory");
#endif
    finish(out, in, d[0], 32);
}

KERNEL(a_registers_written_without_fence) {
    __shared__ Operands o;
    fill(o);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    float d[kN / 2] = {};
    u32 a0 = 0, a1 = kOnes, a2 = kOnes, a3 = kOnes;
#if BUG
    asm volatile(FENCE "or.b32 %8, %8, 0x38383838;\n" WGMMA_A COMMIT WAIT : OPERANDS_A : "memory");  // BUG
#else
    asm volatile("or.b32 %8, %8, 0x38383838;\n" FENCE WGMMA_A COMMIT WAIT : OPERANDS_A : "memory");
#endif
    finish(out, in, d[0], 32);
}

KERNEL(operand_past_the_end) {
    __shared__ Operands o;
    fill(o);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    float d[kN / 2];
    ptx::wgmma_fence();
    ptx::wgmma_e4m3<kN>(d, ptx::k_major_descriptor(o.a), ptx::k_major_descriptor(o.b + BUG * 256), false);  // BUG
    ptx::wgmma_commit_group();
    ptx::wgmma_wait(d);
    finish(out, in, d[0], 32);
}
