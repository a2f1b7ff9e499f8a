#include "device.hpp"

#include <map>
#include <memory>
#include <string>

namespace dsv3 {

constexpr unsigned kPortableAndMapped = 1 | 2;  // for every context, and in the devices' address space

DeviceState::DeviceState(Device device) : device_(device) {
    driver().check(driver().cuDevicePrimaryCtxRetain(&context_, device), "cuDevicePrimaryCtxRetain",
                   "device " + std::to_string(device));
}

uint64_t DeviceState::error_address() {
    if (word_ != nullptr) return address_;
    const std::string what = "the error word of device " + std::to_string(device_);
    const CurrentContext current(context_);
    void* host = nullptr;
    driver().check(driver().cuMemHostAlloc(&host, sizeof(uint32_t), kPortableAndMapped), "cuMemHostAlloc",
                   what);
    driver().check(driver().cuMemHostGetDevicePointer_v2(&address_, host, 0), "cuMemHostGetDevicePointer",
                   what);
    word_ = static_cast<uint32_t*>(host);
    *word_ = 0;
    return address_;
}

DeviceState& device_state(Device device) {
    static std::map<Device, std::unique_ptr<DeviceState>> states;
    auto found = states.find(device);
    if (found == states.end()) found = states.emplace(device, std::make_unique<DeviceState>(device)).first;
    return *found->second;
}

CurrentContext::CurrentContext(Handle context) {
    Handle current = nullptr;
    driver().check(driver().cuCtxGetCurrent(&current), "cuCtxGetCurrent");
    if (current == context) return;
    driver().check(driver().cuCtxPushCurrent_v2(context), "cuCtxPushCurrent");
    pushed_ = true;
}

CurrentContext::~CurrentContext() {
    Handle popped;
    if (pushed_) driver().cuCtxPopCurrent_v2(&popped);
}

}  // namespace dsv3
