#pragma once

#include "ptx.cuh"

namespace dsv3 {

// 1 / (1 + 2^(-x log2 e)) with the approximations of the special function unit, which err in the last bits;
// below 2^-126 it is 0.
__device__ __forceinline__ float sigmoid(float x) {
    constexpr float kLog2E = 1.44269502f;
    return ptx::rcp_approx_ftz(__fadd_rn(1.0f, ptx::ex2_approx_ftz(__fmul_rn(x, -kLog2E))));
}

}  // namespace dsv3
