// A loaded kernel: its parameters' types, its device handle, and the hot path from a Python tuple to a
// launch.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <map>
#include <string>
#include <vector>

#include "device.hpp"

namespace dsv3 {

using Dim3 = std::array<unsigned, 3>;

struct Launch {
    Dim3 grid, block, cluster;
    unsigned shared_bytes;
    bool cooperative;  // all blocks resident at once
    bool
        programmatic;  // may start before the previous kernel of the stream ends (griddepcontrol orders them)
};

class Kernel {
  public:
    // `parameters` are PTX types: "u32", "f32", "b8[128]". `label` is what errors call the kernel.
    Kernel(const std::string& image, std::string name, const std::vector<std::string>& parameters,
           std::string label);
    ~Kernel();
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;

    // Arguments: int for integers and addresses, float (or int) for floats, bytes for structures such as
    // tensor maps. Returns 0, or an error code that an earlier kernel left on the device; then nothing was
    // launched.
    uint32_t launch(Device device, uintptr_t stream, const Launch& shape, const pybind11::tuple& arguments);

    Handle library() const { return library_; }

  private:
    enum class Kind { kInteger, kFloat, kBytes };
    struct Parameter {
        Kind kind;
        size_t size;
        std::string type;
    };
    union Slot {
        uint64_t integer;  // little endian: its first bytes are those of a narrower integer
        float single_;
        double double_;
    };
    struct OnDevice {
        DeviceState* state;
        unsigned shared_bytes;  // the dynamic shared memory granted so far
    };

    static Parameter parse(const std::string& type);
    const void* pack(size_t index, pybind11::handle argument, Slot& slot) const;
    OnDevice& prepare(Device device, const Launch& shape);
    std::string describe(Device device, const Launch& shape) const;

    std::string name_, label_;
    std::vector<Parameter> parameters_;
    Handle library_ = nullptr;  // serves every context of the process
    Handle kernel_ = nullptr;
    std::map<Device, OnDevice> devices_;
};

}  // namespace dsv3
