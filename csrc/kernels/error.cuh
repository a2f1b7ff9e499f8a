// How a kernel says that values in device memory are out of range. It stays inside its allocations, stores
// one code of this table in the device's error word (dsv3_kernels.launch.error_flag), and goes on: it never
// traps. The host raises the code as an exception at the next launch or synchronize() and clears the word.
//
// The word lies in pinned host memory, which the host reads without a call to the driver. A relaxed store at
// system scope suffices: any code that was stored is true, so it does not matter whose store is the last.
#pragma once

#include "ptx.cuh"

namespace dsv3 {

// python: dsv3_kernels.device_error.ErrorCode
enum class ErrorCode : u32 {
    kNone = 0,
    kGroupedGemmOffsets = 1,
    kMaskedGemmCounts = 2,
    kWgradOffsets = 3,
    kQuantizeOffsets = 4,
    kDispatchExperts = 5,
    kDispatchForm = 6,
    kDispatchOverflow = 7,
};

// For one lane or many.
__device__ __forceinline__ void report_error(u32* error, ErrorCode code) {
    *reinterpret_cast<volatile u32*>(error) = static_cast<u32>(code);
}

}  // namespace dsv3
