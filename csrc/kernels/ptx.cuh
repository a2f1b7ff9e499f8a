// The only inline PTX in the tree: one small function an instruction, ordered by the chapters of the PTX ISA manual.
// No CUDA or standard header is included, so that NVRTC needs no toolkit.
#pragma once

namespace dsv3 {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

// 16 bits of storage each; arithmetic happens in float.
struct Bf16 {
    u16 bits;
};
struct Fp16 {
    u16 bits;
};

struct alignas(16) U32x4 {
    u32 x, y, z, w;
};

namespace ptx {

// ---- Floating point instructions ----------------------------------------------------------------------------------

// IEEE division, whatever --use_fast_math says.
__device__ __forceinline__ float div_rn(float a, float b) {
    float d;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

__device__ __forceinline__ float rcp_rn(float a) {
    float d;
    asm("rcp.rn.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// NaN if either operand is NaN; plain fmaxf would drop it.
__device__ __forceinline__ float max_nan(float a, float b) {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

__device__ __forceinline__ float abs(float a) {
    float d;
    asm("abs.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// ---- Data movement and conversion instructions --------------------------------------------------------------------

// 16 bytes that no thread of this kernel writes; they are read once, so they need no place in L1.
__device__ __forceinline__ U32x4 load_global_nc(const void* address) {
    U32x4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(address)));
    return v;
}

__device__ __forceinline__ void store_global(void* address, U32x4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_global(float* address, float v) {
    asm volatile("st.global.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "f"(v) : "memory");
}

__device__ __forceinline__ float shuffle_xor(float value, u32 lane_mask) {
    float d;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(d) : "f"(value), "r"(lane_mask));
    return d;
}

// Two floats to two e4m3 bytes, round to nearest even, saturating; NaN becomes 0x7F. `low` lands in bits 0 to 7.
__device__ __forceinline__ u16 e4m3x2(float low, float high) {
    u16 d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ float fp16_to_float(u16 bits) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(bits));
    return d;
}

}  // namespace ptx
}  // namespace dsv3
