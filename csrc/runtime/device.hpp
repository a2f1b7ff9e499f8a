// What this process holds of each GPU: its primary context, which torch uses too, and its error word.
#pragma once

#include "driver.hpp"

namespace dsv3 {

// The error word is 4 bytes of pinned host memory, which kernels write (csrc/kernels/error.cuh) and the host
// reads without asking the driver. It is never freed: a CUDA graph may hold its address.
class DeviceState {
  public:
    explicit DeviceState(Device device);
    DeviceState(const DeviceState&) = delete;
    DeviceState& operator=(const DeviceState&) = delete;

    Handle context() const { return context_; }

    // Where kernels see the word; allocated on first use.
    uint64_t error_address();

    // The code that a kernel stored, 0 if none did; clears the word.
    uint32_t take_error() {
        if (word_ == nullptr || *word_ == 0) return 0;
        const uint32_t code = *word_;
        *word_ = 0;
        return code;
    }

  private:
    const Device device_;
    Handle context_ = nullptr;
    volatile uint32_t* word_ = nullptr;
    uint64_t address_ = 0;
};

// Made on first use, and kept until the process ends. Needs the GIL. Throws DriverError.
DeviceState& device_state(Device device);

// Makes a context current for as long as it lives. torch keeps it current already, except on fresh threads.
class CurrentContext {
  public:
    explicit CurrentContext(Handle context);
    ~CurrentContext();
    CurrentContext(const CurrentContext&) = delete;
    CurrentContext& operator=(const CurrentContext&) = delete;

  private:
    bool pushed_ = false;
};

}  // namespace dsv3
