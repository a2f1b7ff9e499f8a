#include "driver.hpp"

#include <dlfcn.h>

namespace dsv3 {
namespace {

constexpr Status kOutOfMemory = 2;
constexpr int kOldest = 12000;  // cuLibraryLoadData and cuLaunchKernelEx came with CUDA 12.0

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

template <class Function>
void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr)
        throw DriverError(std::string("the CUDA driver (libcuda.so.1) has no ") + name +
                          ": it is older than CUDA 12.0. Mend: install NVIDIA driver R525 or later");
}

Driver open_driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* reason = dlerror();
        throw DriverError(std::string("found no CUDA driver: ") +
                          (reason ? reason : "libcuda.so.1 does not open") +
                          ". Mend: install the NVIDIA driver; without a GPU, pass CPU tensors");
    }
    Driver d{};
#define FIND(name) find(library, #name, d.name)
    FIND(cuInit);
    FIND(cuDriverGetVersion);
    FIND(cuGetErrorName);
    FIND(cuGetErrorString);
    d.check(d.cuDriverGetVersion(&d.version), "cuDriverGetVersion");
    if (d.version < kOldest)
        throw DriverError("the CUDA driver supports CUDA " + version_text(d.version) +
                          ", expected 12.0 or later. Mend: install NVIDIA driver R525 or later");
    FIND(cuDeviceGetCount);
    FIND(cuDeviceGetName);
    FIND(cuDeviceGetAttribute);
    FIND(cuDevicePrimaryCtxRetain);
    FIND(cuCtxGetCurrent);
    FIND(cuCtxPushCurrent_v2);
    FIND(cuCtxPopCurrent_v2);
    FIND(cuMemHostAlloc);
    FIND(cuMemHostGetDevicePointer_v2);
    FIND(cuLibraryLoadData);
    FIND(cuLibraryUnload);
    FIND(cuLibraryGetKernel);
    FIND(cuKernelSetAttribute);
    FIND(cuLaunchKernelEx);
    FIND(cuTensorMapEncodeTiled);
#undef FIND
    d.check(d.cuInit(0), "cuInit");
    return d;
}

}  // namespace

void Driver::check(Status status, const char* call, const std::string& context) const {
    if (status == kSuccess) return;
    const char* name = nullptr;
    const char* text = nullptr;
    if (cuGetErrorName(status, &name) != kSuccess || name == nullptr) name = "unknown error";
    if (cuGetErrorString(status, &text) != kSuccess || text == nullptr) text = "no description";
    throw DriverError(
        std::string(call) + ": " + name + " (" + std::to_string(status) + ", " + text + ")" +
        (context.empty() ? "" : ": " + context) + "; driver for CUDA " + version_text(version) +
        (status == kOutOfMemory ? ". Mend: free memory of the GPU, say by torch.cuda.empty_cache()" : ""));
}

const Driver& driver() {
    static const Driver d = open_driver();
    return d;
}

}  // namespace dsv3
