// Python's view of the driver: versions, devices, kernels, tensor maps. Importing this needs no GPU and no
// driver.
#include <pybind11/stl.h>

#include "kernel.hpp"

namespace py = pybind11;
using namespace dsv3;

namespace {

int attribute(Device device, int id) {
    int value = 0;
    driver().check(driver().cuDeviceGetAttribute(&value, id, device), "cuDeviceGetAttribute",
                   "device " + std::to_string(device));
    return value;
}

int device_count() {
    int count = 0;
    driver().check(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
    return count;
}

py::dict device_properties(Device device) {
    char name[256] = "";
    driver().check(driver().cuDeviceGetName(name, sizeof name, device), "cuDeviceGetName",
                   "device " + std::to_string(device));
    py::dict properties;
    properties["name"] = name;
    properties["capability"] =
        py::make_tuple(attribute(device, kDeviceCapabilityMajor), attribute(device, kDeviceCapabilityMinor));
    properties["multiprocessors"] = attribute(device, kDeviceMultiprocessors);
    properties["shared_bytes"] = attribute(device, kDeviceSharedOptin);
    return properties;
}

py::bytes encode_tensor_map(int data_type, uintptr_t address, const std::vector<uint64_t>& shape,
                            const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box,
                            const std::vector<uint32_t>& element_strides, int swizzle, int l2_promotion,
                            bool fill_nan) {
    const size_t rank = shape.size();
    if (rank == 0 || strides.size() != rank - 1 || box.size() != rank || element_strides.size() != rank)
        throw py::value_error(
            "encode_tensor_map: shape, box and element_strides need one entry a dimension, strides "
            "one less");
    const auto index = [](int span, int first) {  // 0 -> 0, first -> 1, 2 * first -> 2 ...
        int i = 0;
        for (; span >= first; span /= 2) ++i;
        return i;
    };
    TensorMapBytes map{};
    driver().check(driver().cuTensorMapEncodeTiled(
                       &map, data_type, uint32_t(rank), reinterpret_cast<void*>(address), shape.data(),
                       strides.data(), box.data(), element_strides.data(), /*interleave=*/0,
                       index(swizzle, 32), index(l2_promotion, 64), fill_nan ? 1 : 0),
                   "cuTensorMapEncodeTiled");
    return py::bytes(reinterpret_cast<const char*>(&map), sizeof map);
}

// A launch settled but for its stream and arguments, so that a call converts those alone.
struct PreparedLaunch {
    Kernel& kernel;
    Device device;
    Launch shape;
};

}  // namespace

PYBIND11_MODULE(_runtime, m) {
    m.doc() =
        "The CUDA driver, opened at run time: launches and tensor maps. Every call raises DriverError "
        "without one.";
    py::register_exception<DriverError>(m, "DriverError", PyExc_RuntimeError);

    m.def(
        "driver_version", [] { return driver().version; }, "The driver's CUDA version: 13000 is CUDA 13.0.");
    m.def("device_count", &device_count);
    m.def("device_properties", &device_properties, py::arg("device"),
          "name, capability (major, minor), multiprocessors, shared_bytes (a block may have).");
    m.def(
        "error_word", [](Device device) { return device_state(device).error_address(); }, py::arg("device"),
        "The address of the device's error word, for a kernel's parameter `u32* error`.");
    m.def(
        "take_error", [](Device device) { return device_state(device).take_error(); }, py::arg("device"),
        "The code that a kernel stored in the error word, 0 if none did; clears it.");
    m.def("encode_tensor_map", &encode_tensor_map, py::arg("data_type"), py::arg("address"), py::arg("shape"),
          py::arg("strides"), py::arg("box"), py::arg("element_strides"), py::arg("swizzle"),
          py::arg("l2_promotion"), py::arg("fill_nan"),
          "The 128 bytes of a tensor map; the arguments are those of tensor_map.Encoding.");

    py::class_<Kernel>(m, "Kernel", "A kernel of a cubin; serves every device of the process.")
        .def(py::init<const std::string&, std::string, const std::vector<std::string>&, std::string>(),
             py::arg("image"), py::arg("name"), py::arg("parameters"), py::arg("label"))
        .def_property_readonly(
            "library", [](const Kernel& kernel) { return reinterpret_cast<uintptr_t>(kernel.library()); },
            "The CUlibrary that holds it.")
        .def(
            "launch",
            [](Kernel& kernel, Device device, uintptr_t stream, const Dim3& grid, const Dim3& block,
               const py::tuple& arguments, const Dim3& cluster, unsigned shared_bytes, bool cooperative,
               bool programmatic) {
                return kernel.launch(device, stream,
                                     {grid, block, cluster, shared_bytes, cooperative, programmatic},
                                     arguments);
            },
            py::arg("device"), py::arg("stream"), py::arg("grid"), py::arg("block"), py::arg("arguments"),
            py::arg("cluster") = Dim3{1, 1, 1}, py::arg("shared_bytes") = 0, py::arg("cooperative") = false,
            py::arg("programmatic") = false)
        .def(
            "prepare",
            [](Kernel& kernel, Device device, const Dim3& grid, const Dim3& block, const Dim3& cluster,
               unsigned shared_bytes, bool cooperative, bool programmatic) {
                return PreparedLaunch{
                    kernel, device, {grid, block, cluster, shared_bytes, cooperative, programmatic}};
            },
            py::keep_alive<0, 1>(), "launch's arguments without the stream and the kernel's own.");

    py::class_<PreparedLaunch>(m, "PreparedLaunch")
        .def("__call__", [](PreparedLaunch& self, uintptr_t stream, const py::tuple& arguments) {
            return self.kernel.launch(self.device, stream, self.shape, arguments);
        });
}
