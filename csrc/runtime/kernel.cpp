#include "kernel.hpp"

#include <limits>

namespace py = pybind11;

namespace dsv3 {
namespace {

constexpr unsigned kSharedWithoutAsking = 48 * 1024;
constexpr size_t kMaxParameters = 64;

std::string text(const Dim3& d) {
    return "(" + std::to_string(d[0]) + ", " + std::to_string(d[1]) + ", " + std::to_string(d[2]) + ")";
}

}  // namespace

Kernel::Parameter Kernel::parse(const std::string& type) {
    if (type == "f32" || type == "f64")
        return {Kind::kFloat, type == "f32" ? sizeof(float) : sizeof(double), type};
    const size_t bits = std::stoul(type.substr(1));
    const size_t bracket = type.find('[');
    if (bracket == std::string::npos) return {Kind::kInteger, bits / 8, type};
    return {Kind::kBytes, bits / 8 * std::stoul(type.substr(bracket + 1)), type};
}

Kernel::Kernel(const std::string& image, std::string name, const std::vector<std::string>& parameters,
               std::string label)
    : name_(std::move(name)), label_(std::move(label)) {
    if (parameters.size() > kMaxParameters)
        throw py::value_error(label_ + " has " + std::to_string(parameters.size()) +
                              " parameters, expected at most " + std::to_string(kMaxParameters));
    for (const std::string& type : parameters) parameters_.push_back(parse(type));
    const Driver& d = driver();
    py::gil_scoped_release release;
    d.check(d.cuLibraryLoadData(&library_, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
            "cuLibraryLoadData", label_);
    const Status status = d.cuLibraryGetKernel(&kernel_, library_, name_.c_str());
    if (status != kSuccess) {
        d.cuLibraryUnload(library_);
        d.check(status, "cuLibraryGetKernel", label_ + ", called " + name_);
    }
}

Kernel::~Kernel() { driver().cuLibraryUnload(library_); }

const void* Kernel::pack(size_t index, py::handle argument, Slot& slot) const {
    const Parameter& parameter = parameters_[index];
    const auto wrong = [&](const std::string& expected) {
        return label_ + ": argument " + std::to_string(index) + " is " + std::string(py::repr(argument)) +
               ", expected " + expected + " for a parameter of type " + parameter.type;
    };
    switch (parameter.kind) {
        case Kind::kInteger: {
            if (!PyLong_Check(argument.ptr())) throw py::type_error(wrong("an int"));
            int overflow = 0;
            const long long value = PyLong_AsLongLongAndOverflow(argument.ptr(), &overflow);
            if (overflow > 0 && parameter.size == 8) {  // an unsigned integer of 64 bits, or too large
                slot.integer = PyLong_AsUnsignedLongLong(argument.ptr());
                if (!PyErr_Occurred()) return &slot;
                PyErr_Clear();
            }
            // PTX does not tell signed from unsigned, so that the range of both is allowed.
            const bool fits = parameter.size == 8 || (value >= -(1LL << (8 * parameter.size - 1)) &&
                                                      value < (1LL << (8 * parameter.size)));
            if (overflow != 0 || !fits) throw py::value_error(wrong("an int that fits"));
            slot.integer = static_cast<uint64_t>(value);
            return &slot;
        }
        case Kind::kFloat: {
            const double value = PyFloat_AsDouble(argument.ptr());
            if (value == -1.0 && PyErr_Occurred()) {
                PyErr_Clear();
                throw py::type_error(wrong("a float"));
            }
            if (parameter.size == sizeof(float))
                slot.single_ = static_cast<float>(value);
            else
                slot.double_ = value;
            return &slot;
        }
        case Kind::kBytes:
            if (!PyBytes_Check(argument.ptr()) ||
                PyBytes_GET_SIZE(argument.ptr()) != Py_ssize_t(parameter.size))
                throw py::type_error(wrong(std::to_string(parameter.size) + " bytes"));
            return PyBytes_AS_STRING(argument.ptr());
    }
    return nullptr;
}

Kernel::OnDevice& Kernel::prepare(Device device, const Launch& shape) {
    const Driver& d = driver();
    auto found = devices_.find(device);
    if (found == devices_.end()) {
        found = devices_.insert({device, {&device_state(device), kSharedWithoutAsking}}).first;
    }
    OnDevice& state = found->second;
    if (shape.shared_bytes > state.shared_bytes) {
        d.check(d.cuKernelSetAttribute(kFunctionMaxDynamicShared, int(shape.shared_bytes), kernel_, device),
                "cuKernelSetAttribute(max dynamic shared memory)", describe(device, shape));
        state.shared_bytes = shape.shared_bytes;
    }
    return state;
}

uint32_t Kernel::launch(Device device, uintptr_t stream, const Launch& shape, const py::tuple& arguments) {
    if (arguments.size() != parameters_.size())
        throw py::type_error(label_ + ": got " + std::to_string(arguments.size()) + " arguments, expected " +
                             std::to_string(parameters_.size()));
    Slot slots[kMaxParameters];
    const void* pointers[kMaxParameters];
    for (size_t i = 0; i < parameters_.size(); ++i) pointers[i] = pack(i, arguments[i], slots[i]);

    LaunchAttribute attributes[3]{};
    unsigned count = 0;
    if (shape.cluster != Dim3{1, 1, 1}) {
        attributes[count].id = kClusterDimension;
        attributes[count++].value.cluster = {shape.cluster[0], shape.cluster[1], shape.cluster[2]};
    }
    for (const auto& [id, wanted] : {std::pair{kCooperative, shape.cooperative},
                                     std::pair{kProgrammaticSerialization, shape.programmatic}}) {
        if (!wanted) continue;
        attributes[count].id = id;
        attributes[count++].value.flag = 1;
    }
    const LaunchConfig config{{shape.grid[0], shape.grid[1], shape.grid[2]},
                              {shape.block[0], shape.block[1], shape.block[2]},
                              shape.shared_bytes,
                              reinterpret_cast<Handle>(stream),
                              attributes,
                              count};
    DeviceState& state = *prepare(device, shape).state;
    if (const uint32_t code = state.take_error()) return code;
    const Driver& d = driver();
    Status status;
    {
        py::gil_scoped_release release;  // a launch blocks while the stream's queue is full
        const CurrentContext current(state.context());
        status = d.cuLaunchKernelEx(&config, kernel_, const_cast<void**>(pointers), nullptr);
    }
    if (status != kSuccess) d.check(status, "cuLaunchKernelEx", describe(device, shape));
    return 0;
}

std::string Kernel::describe(Device device, const Launch& shape) const {
    return label_ + ", grid " + text(shape.grid) + ", block " + text(shape.block) + ", cluster " +
           text(shape.cluster) + ", " + std::to_string(shape.shared_bytes) +
           " bytes of dynamic shared memory, device " + std::to_string(device);
}

}  // namespace dsv3
