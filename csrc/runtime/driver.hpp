// The part of the CUDA driver API that launching needs, found in libcuda.so.1 at run time.
//
// Declared here by hand, because a build must not need a CUDA toolkit. Names and layouts are those of cuda.h,
// whose ABI is stable; tests/fake_libcuda.cpp compares the layouts with cuda.h where there is one.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dsv3 {

using Status = int;  // CUresult
using Device = int;
using Handle = void*;  // CUcontext, CUlibrary, CUkernel, CUstream

constexpr Status kSuccess = 0;

constexpr int kDeviceMultiprocessors = 16;
constexpr int kDeviceCapabilityMajor = 75;
constexpr int kDeviceCapabilityMinor = 76;
constexpr int kDeviceSharedOptin = 97;
constexpr int kFunctionMaxDynamicShared = 8;

enum AttributeId : int { kCooperative = 2, kClusterDimension = 4, kProgrammaticSerialization = 6 };

struct LaunchAttribute {
    AttributeId id;
    char padding[4];
    union {
        char bytes[64];
        int flag;
        struct {
            unsigned x, y, z;
        } cluster;
    } value;
};

struct LaunchConfig {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    Handle stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};

struct alignas(128) TensorMapBytes {
    uint64_t opaque[16];
};

// The driver is missing or too old, or one of its calls failed.
struct DriverError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// One pointer a function, under its name in cuda.h.
struct Driver {
    Status (*cuInit)(unsigned flags);
    Status (*cuDriverGetVersion)(int* version);
    Status (*cuGetErrorName)(Status, const char** name);
    Status (*cuGetErrorString)(Status, const char** text);
    Status (*cuDeviceGetCount)(int* count);
    Status (*cuDeviceGetName)(char* name, int size, Device);
    Status (*cuDeviceGetAttribute)(int* value, int attribute, Device);
    Status (*cuDevicePrimaryCtxRetain)(Handle* context, Device);
    Status (*cuCtxGetCurrent)(Handle* context);
    Status (*cuCtxPushCurrent_v2)(Handle context);
    Status (*cuCtxPopCurrent_v2)(Handle* context);
    Status (*cuMemHostAlloc)(void** host, size_t bytes, unsigned flags);
    Status (*cuMemHostGetDevicePointer_v2)(uint64_t* address, void* host, unsigned flags);
    Status (*cuLibraryLoadData)(Handle* library, const void* image, void* jit_options, void* jit_values,
                                unsigned jit_count, void* options, void* values, unsigned count);
    Status (*cuLibraryUnload)(Handle library);
    Status (*cuLibraryGetKernel)(Handle* kernel, Handle library, const char* name);
    Status (*cuKernelSetAttribute)(int attribute, int value, Handle kernel, Device);
    Status (*cuLaunchKernelEx)(const LaunchConfig*, Handle kernel, void** parameters, void** extra);
    Status (*cuTensorMapEncodeTiled)(TensorMapBytes*, int data_type, uint32_t rank, void* address,
                                     const uint64_t* shape, const uint64_t* strides, const uint32_t* box,
                                     const uint32_t* element_strides, int interleave, int swizzle,
                                     int l2_promotion, int fill);
    int version;  // 13000 is CUDA 13.0

    // Throws DriverError with the call's name, the driver's name and text of the error, and `context`.
    void check(Status status, const char* call, const std::string& context = "") const;
};

// Opens and initialises the driver on first use. Throws DriverError, and tries again on the next call.
const Driver& driver();

}  // namespace dsv3
