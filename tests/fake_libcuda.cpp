// A stand-in for libcuda.so.1 that writes down what it is asked to do, so that the launcher is tested without
// a GPU.
//
// $FAKE_CUDA_LOG names the file to write to; $FAKE_CUDA_VERSION and $FAKE_CUDA_CAPABILITY (90 is 9.0) are
// what it claims to be; $FAKE_CUDA_FAIL names a function that fails, $FAKE_CUDA_STATUS its status. A kernel
// image is text: the bytes of each parameter.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "../csrc/runtime/driver.hpp"

#if __has_include(<cuda.h>)
#include <cuda.h>
static_assert(sizeof(dsv3::LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(dsv3::LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(dsv3::LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(dsv3::LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(dsv3::LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs));
static_assert(sizeof(dsv3::LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(dsv3::LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(offsetof(CUlaunchAttributeValue, clusterDim) == 0 &&
              offsetof(CUlaunchAttributeValue, cooperative) == 0);
static_assert(int(dsv3::kCooperative) == int(CU_LAUNCH_ATTRIBUTE_COOPERATIVE));
static_assert(int(dsv3::kClusterDimension) == int(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION));
static_assert(int(dsv3::kProgrammaticSerialization) ==
              int(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION));
static_assert(dsv3::kFunctionMaxDynamicShared == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(dsv3::kDeviceMultiprocessors == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(dsv3::kDeviceCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(dsv3::kDeviceCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(dsv3::kDeviceSharedOptin == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(sizeof(dsv3::TensorMapBytes) == sizeof(CUtensorMap));
#endif

using namespace dsv3;

namespace {

struct FakeKernel {
    std::vector<size_t> sizes;
};

Handle current_context = nullptr;
char contexts[8];  // their addresses are the contexts

int number(const char* variable, int otherwise) {
    const char* value = std::getenv(variable);
    return value ? std::atoi(value) : otherwise;
}

Status reply(const char* function) {
    const char* failing = std::getenv("FAKE_CUDA_FAIL");
    return failing && std::strcmp(failing, function) == 0 ? number("FAKE_CUDA_STATUS", 1) : kSuccess;
}

void log(const std::string& line) {
    static FILE* file =
        std::getenv("FAKE_CUDA_LOG") ? std::fopen(std::getenv("FAKE_CUDA_LOG"), "w") : nullptr;
    if (file == nullptr) return;
    std::fprintf(file, "%s\n", line.c_str());
    std::fflush(file);
}

std::string hex(const void* data, size_t size) {
    std::string out;
    char digits[3];
    for (size_t i = 0; i < size; ++i) {
        std::snprintf(digits, sizeof digits, "%02x", static_cast<const unsigned char*>(data)[i]);
        out += digits;
    }
    return out;
}

int context_index(Handle context) { return context ? int(static_cast<char*>(context) - contexts) : -1; }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#undef cuCtxPushCurrent
#undef cuCtxPopCurrent

// The functions live under assembler names, so that they do not collide with the declarations of cuda.h.
#define FAKE(name, parameters)                           \
    EXPORT Status fake_##name parameters __asm__(#name); \
    Status fake_##name parameters

FAKE(cuInit, (unsigned)) { return reply("cuInit"); }
FAKE(cuGetExportTable, (const void** table, const void*)) {  // NVRTC asks for it, and does without
    *table = nullptr;
    return 500;  // CUDA_ERROR_NOT_FOUND
}
FAKE(cuDriverGetVersion, (int* version)) {
    *version = number("FAKE_CUDA_VERSION", 13000);
    return kSuccess;
}
FAKE(cuGetErrorName, (Status, const char** name)) {
    *name = "CUDA_ERROR_INVALID_VALUE";
    return kSuccess;
}
FAKE(cuGetErrorString, (Status, const char** text)) {
    *text = "invalid argument";
    return kSuccess;
}
FAKE(cuDeviceGetCount, (int* count)) {
    *count = 2;
    return kSuccess;
}
FAKE(cuDeviceGetName, (char* name, int size, Device)) {
    std::snprintf(name, size_t(size), "Fake H100");
    return kSuccess;
}
FAKE(cuDeviceGetAttribute, (int* value, int attribute, Device)) {
    const int capability = number("FAKE_CUDA_CAPABILITY", 90);
    *value = attribute == kDeviceCapabilityMajor   ? capability / 10
             : attribute == kDeviceCapabilityMinor ? capability % 10
             : attribute == kDeviceMultiprocessors ? 132
                                                   : 232448;
    return kSuccess;
}
FAKE(cuDevicePrimaryCtxRetain, (Handle * context, Device device)) {
    *context = &contexts[device];
    return reply("cuDevicePrimaryCtxRetain");
}
FAKE(cuCtxGetCurrent, (Handle * context)) {
    *context = current_context;
    return kSuccess;
}
FAKE(cuCtxPushCurrent_v2, (Handle context)) {
    current_context = context;
    return kSuccess;
}
FAKE(cuCtxPopCurrent_v2, (Handle * context)) {
    *context = current_context;
    current_context = nullptr;
    return kSuccess;
}
FAKE(cuMemHostAlloc, (void** host, size_t bytes, unsigned flags)) {
    log("host " + std::to_string(bytes) + " flags " + std::to_string(flags) + " context " +
        std::to_string(context_index(current_context)));
    *host = std::malloc(bytes);
    std::memset(*host, 0xff, bytes);
    return reply("cuMemHostAlloc");
}
FAKE(cuMemHostGetDevicePointer_v2, (uint64_t* address, void* host, unsigned)) {
    *address = reinterpret_cast<uint64_t>(host);
    return reply("cuMemHostGetDevicePointer_v2");
}
FAKE(cuLibraryLoadData,
     (Handle * library, const void* image, void*, void*, unsigned, void*, void*, unsigned)) {
    auto* kernel = new FakeKernel;
    std::istringstream sizes(static_cast<const char*>(image));
    for (size_t size; sizes >> size;) kernel->sizes.push_back(size);
    *library = kernel;
    log("load");
    return reply("cuLibraryLoadData");
}
FAKE(cuLibraryUnload, (Handle)) { return kSuccess; }
FAKE(cuLibraryGetKernel, (Handle * kernel, Handle library, const char* name)) {
    *kernel = library;
    log(std::string("kernel ") + name);
    return reply("cuLibraryGetKernel");
}
FAKE(cuKernelSetAttribute, (int attribute, int value, Handle, Device device)) {
    log("attribute " + std::to_string(attribute) + " " + std::to_string(value) + " device " +
        std::to_string(device));
    return reply("cuKernelSetAttribute");
}
FAKE(cuLaunchKernelEx, (const LaunchConfig* config, Handle kernel, void** parameters, void** extra)) {
    if (std::getenv("FAKE_CUDA_LOG") == nullptr) return kSuccess;  // timing runs
    std::ostringstream line;
    const auto dim = [&](const char* name, const unsigned* d) {
        line << name << ' ' << d[0] << ',' << d[1] << ',' << d[2] << ' ';
    };
    line << "launch context " << context_index(current_context) << ' ';
    dim("grid", config->grid);
    dim("block", config->block);
    line << "shared " << config->shared_bytes << " stream " << reinterpret_cast<uintptr_t>(config->stream);
    for (unsigned i = 0; i < config->attribute_count; ++i)
        line << " attribute " << config->attributes[i].id << '='
             << hex(config->attributes[i].value.bytes, 12);
    line << " parameters";
    const auto& sizes = static_cast<FakeKernel*>(kernel)->sizes;
    for (size_t i = 0; i < sizes.size(); ++i) line << ' ' << hex(parameters[i], sizes[i]);
    line << " extra " << (extra != nullptr);
    log(line.str());
    return reply("cuLaunchKernelEx");
}
FAKE(cuTensorMapEncodeTiled,
     (TensorMapBytes * map, int type, uint32_t rank, void* address, const uint64_t* shape,
      const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave, int swizzle,
      int l2_promotion, int fill)) {
    std::ostringstream line;
    line << "map type " << type << " address " << reinterpret_cast<uintptr_t>(address) << " shape";
    for (uint32_t i = 0; i < rank; ++i) line << ' ' << shape[i];
    line << " strides";
    for (uint32_t i = 0; i + 1 < rank; ++i) line << ' ' << strides[i];
    line << " box";
    for (uint32_t i = 0; i < rank; ++i) line << ' ' << box[i];
    line << " steps";
    for (uint32_t i = 0; i < rank; ++i) line << ' ' << steps[i];
    line << " interleave " << interleave << " swizzle " << swizzle << " l2 " << l2_promotion << " fill "
         << fill;
    line << " aligned " << (reinterpret_cast<uintptr_t>(map) % 64 == 0);
    log(line.str());
    std::memset(map, 0x5a, sizeof *map);
    return reply("cuTensorMapEncodeTiled");
}
