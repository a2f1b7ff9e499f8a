// The types: no PTX and no header, so that what needs nothing else compiles for the host too.
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

struct alignas(8) Float2 {
    float x, y;
};

// Describes a tensor to the copy engine; made on the host, passed to a kernel as
// `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

}  // namespace dsv3
