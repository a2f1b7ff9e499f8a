#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cxxabi.h>

#include <cstdlib>
#include <cstring>

#include "network.hpp"
#include "tensor_map.hpp"

namespace dsv3 {
void bind_leaves(pybind11::module_& m);  // bindings_leaves.cpp
}

namespace py = pybind11;

namespace dsv3::emulator {
namespace {

/// Fields of an Error as the Python exception's constructor takes them.
void raise(const Error& e) {
    static constexpr const char* names[] = {"EmulationError", "DeadlockError", "HazardError", "MemoryAccessError", "UnsupportedInstructionError"};
    py::object type = py::module_::import("dsv3_kernels.emulator").attr(names[static_cast<int>(e.kind)]);
    const Place& p = e.place;
    py::object block = p.block[0] < 0 ? py::none() : py::object(py::make_tuple(p.block[0], p.block[1], p.block[2]));
    auto or_none = [](int x) { return x < 0 ? py::object(py::none()) : py::object(py::int_(x)); };
    // A message may quote half a character of a damaged text.
    auto text = [](const std::string& s) {
        return py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(s.data(), static_cast<Py_ssize_t>(s.size()), "replace"));
    };
    py::object error = type(text(e.message), py::arg("kernel") = text(p.kernel), py::arg("block") = block, py::arg("rank") = or_none(p.rank),
                            py::arg("warp") = or_none(p.warp), py::arg("lane") = or_none(p.lane),
                            py::arg("ptx_line") = or_none(p.ptx_line), py::arg("source") = text(p.source));
    PyErr_SetObject(type.ptr(), error.ptr());
}

std::array<uint32_t, 3> dims(const std::vector<uint32_t>& d) {
    std::array<uint32_t, 3> out{1, 1, 1};
    std::copy_n(d.begin(), std::min<size_t>(d.size(), 3), out.begin());
    return out;
}

std::shared_ptr<Launch> make_launch(const std::shared_ptr<Program>& program, const std::string& kernel, int device,
                                    const std::vector<uint32_t>& grid, const std::vector<uint32_t>& block,
                                    const std::vector<uint32_t>& cluster, uint32_t shared_bytes, const py::bytes& params, bool dependent) {
    auto it = program->by_name.find(kernel);
    if (it == program->by_name.end() || !program->functions[static_cast<size_t>(it->second)].is_entry) {
        std::string have;
        for (const Function& f : program->functions)
            if (f.is_entry) have += (have.empty() ? "" : ", ") + f.name;
        throw Error(ErrorKind::Emulation, "the PTX holds no kernel '" + kernel + "'; it holds: " + (have.empty() ? "none" : have));
    }
    auto launch = std::make_shared<Launch>();
    launch->program = program;
    launch->function = &program->functions[static_cast<size_t>(it->second)];
    launch->device = device;
    auto set = [](uint32_t* to, const std::vector<uint32_t>& from) {
        auto d = dims(from);
        std::copy(d.begin(), d.end(), to);
    };
    set(launch->grid, grid);
    set(launch->block, block);
    bool declared = launch->function->required_cluster[0] != 0;
    if (cluster.empty() && declared) std::copy_n(launch->function->required_cluster, 3, launch->cluster);
    else set(launch->cluster, cluster);
    launch->shared_bytes = shared_bytes;
    launch->dependent = dependent;
    std::string bytes = params;
    launch->params.assign(bytes.begin(), bytes.end());
    if (launch->params.size() != launch->function->param_bytes)
        throw Error(ErrorKind::Emulation, "launch of '" + kernel + "': " + std::to_string(launch->params.size()) +
                    " bytes of parameters, expected " + std::to_string(launch->function->param_bytes));
    return launch;
}

/// By Class.
constexpr const char* class_names[] = {"integer", "float", "convert", "move", "memory", "atomic", "barrier", "async", "wgmma", "control", "warp"};

/// What a slice of waiting waited for.
std::string text_of(Machine& m, const Trace::Span& s) {
    uint64_t x = s.cause.object;
    auto number = [](uint64_t n) { return std::to_string(n); };
    switch (s.cause.wait) {
        case Wait::Mbarrier: return "mbarrier at shared offset " + number(x);
        case Wait::Barrier: return "barrier " + number(x);
        case Wait::ClusterBarrier: return "barrier.cluster";
        case Wait::Wgmma: return "wgmma " + number(x) + " of its warpgroup";
        case Wait::BulkGroup: return x ? "bulk stores to be read" : "bulk stores to complete";
        case Wait::CpAsync: return "cp.async";
        case Wait::Sleep: return "nanosleep";
        case Wait::Dependency: return "the launch before";
        case Wait::Network: return x == 0 ? "quiet" : x == 1 ? "an answer of the network" : "a work request";
        case Wait::Registers: return "registers of its block";
        case Wait::Stores: return "its stores to reach memory";
        case Wait::Load: {
            const Inst& load = s.program->code[x];
            return "the result of " + std::string(load.name) + " at PTX line " + number(load.line);
        }
        case Wait::Spin: {
            if (x >> 62) return "a value in shared memory at offset " + number(x & 0xFFFFFFFF);
            const Region* r = m.memory.find(x);
            return r && r->alive ? "a value in '" + r->name + "' at byte " + number(x - r->base) : "a value in memory";
        }
        default: return "";
    }
}

std::string text_of(const Machine& m, const Trace::Row& r) {
    if (r.unit >= 0) return "warp " + std::to_string(r.unit);
    if (r.unit == Trace::link) return std::string(m.network->same_node(r.device, r.peer) ? "NVLink" : "IB") + " to rank " + std::to_string(r.peer);
    return r.unit == Trace::copy_engine ? "copy engine" : r.unit == Trace::tensor_core ? "tensor core" : "bulk stores";
}

/// "dsv3::fp8_gemm<128u, 128u, 5u, 16u>" of a mangled name; another as it is.
std::string readable(const std::string& name) {
    int status = 0;
    char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    if (!text) return name;
    std::string out = text;
    std::free(text);
    out = out.substr(0, out.find('('));
    return out.compare(0, 5, "void ") ? out : out.substr(5);
}

py::dict counters(const Machine& m) {
    py::dict d;
    for (auto& [name, value] : m.counters) d[name.c_str()] = value;
    if (!d.contains("launches")) d["launches"] = 0;
    py::dict classes;
    uint64_t all = 0;
    for (size_t i = 0; i < m.executed.size(); i++) classes[class_names[i]] = m.executed[i], all += m.executed[i];
    d["instructions"] = all;
    d["instructions_by_class"] = classes;
    const Counts& c = m.counts;
    d["wgmma"] = c.wgmma;
    d["global_bytes_read"] = c.global_read;
    d["global_bytes_written"] = c.global_write;
    d["shared_bytes_read"] = c.shared_read;
    d["shared_bytes_written"] = c.shared_write;
    d["distributed_shared_bytes"] = c.distributed_shared;
    d["copy_bytes_read"] = c.copy_read;
    d["copy_bytes_written"] = c.copy_write;
    d["multicast_bytes"] = c.multicast;
    d["bank_conflicts"] = c.bank_conflicts;
    d["global_sectors"] = c.sectors;
    d["barrier_waits"] = c.barrier_waits;
    d["barrier_wait_cycles"] = c.barrier_wait_cycles;
    d["tensor_core_cycles"] = c.tensor_core_cycles;
    uint64_t cycles = 0;
    for (const Device& device : m.devices) cycles = std::max(cycles, device.cycle);
    d["cycles"] = cycles;
    d["launch_cycles"] = c.launch_cycles;
    d["nanoseconds"] = m.time;
    py::dict links;
    for (auto& [link, count] : m.network->counts) {
        py::dict one;
        one["kind"] = link.first == link.second ? "local" : m.network->same_node(link.first, link.second) ? "NVLink" : "IB";
        one["messages"] = count.messages;
        one["bytes"] = count.bytes;
        one["lost"] = count.lost;
        links[py::make_tuple(link.first, link.second)] = one;
    }
    d["links"] = links;
    py::dict direct;
    uint64_t peer = 0;
    for (auto& [link, bytes] : m.network->direct) direct[py::make_tuple(link.first, link.second)] = bytes, peer += bytes;
    d["peer_bytes"] = peer;
    d["peer_bytes_by_link"] = direct;
    return d;
}

py::bytes encode_map(uint64_t address, int type, const std::vector<uint64_t>& shape, const std::vector<uint64_t>& strides,
                     const std::vector<uint32_t>& box, const std::vector<uint32_t>& element_strides, uint32_t swizzle, bool fill_nan) {
    TensorMap map;
    map.address = address;
    map.type = element_type_of_driver(type);
    map.rank = static_cast<int>(shape.size());
    if (shape.empty() || shape.size() > kMaxRank || box.size() != shape.size() || strides.size() + 1 != shape.size() || element_strides.size() != shape.size())
        throw Error(ErrorKind::Emulation, "tensor map: shape, strides, box and element_strides do not describe 1 to 5 dimensions");
    std::copy(shape.begin(), shape.end(), map.dims.begin());
    std::copy(strides.begin(), strides.end(), map.strides.begin());
    std::copy(box.begin(), box.end(), map.box.begin());
    std::copy(element_strides.begin(), element_strides.end(), map.element_strides.begin());
    map.swizzle = swizzle == 128 ? Swizzle::b128 : swizzle == 64 ? Swizzle::b64 : swizzle == 32 ? Swizzle::b32 : Swizzle::none;
    map.fill = fill_nan ? OutOfBoundsFill::nan : OutOfBoundsFill::zeros;
    std::string wrong = map.why_invalid();
    if (!wrong.empty()) throw Error(ErrorKind::Emulation, "tensor map: " + wrong);
    std::string bytes(kTensorMapBytes, '\0');
    map.encode(reinterpret_cast<uint8_t*>(bytes.data()));
    return bytes;
}

void bind_machine(py::module_& m) {
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const Error& e) {
            raise(e);
        }
    });
    py::class_<Program, std::shared_ptr<Program>>(m, "Program")
        .def("parameters", [](const Program& p, const std::string& kernel) {
            auto it = p.by_name.find(kernel);
            if (it == p.by_name.end() || !p.functions[static_cast<size_t>(it->second)].is_entry)
                throw Error(ErrorKind::Emulation, "the PTX holds no kernel '" + kernel + "'");
            py::list out;
            for (const Parameter& x : p.functions[static_cast<size_t>(it->second)].params) {
                static constexpr const char* kinds[] = {"", "pred", "b", "b", "b", "b", "b", "u", "u", "u", "u", "s", "s", "s", "s"};
                std::string kind = x.type <= Type::S64 ? kinds[static_cast<int>(x.type)] : "f";
                out.append(py::make_tuple(x.name, kind, size_of(x.type), x.offset, x.size));
            }
            return out;
        })
        .def_property_readonly("kernels", [](const Program& p) {
            std::vector<std::string> names;
            for (const Function& f : p.functions)
                if (f.is_entry) names.push_back(f.name);
            return names;
        })
        .def_property_readonly("register_bytes", [](const Program& p) { return p.register_words * 4; })
        .def_property_readonly("virtual_registers", [](const Program& p) { return p.virtual_registers; });
    m.def("load", [](std::string text) { return std::const_pointer_cast<Program>(load(std::move(text))); });
    m.def("encode_tensor_map", &encode_map);
    py::class_<Launch, std::shared_ptr<Launch>>(m, "Launch").def_readonly("finished", &Launch::finished);
    py::class_<Machine>(m, "Machine")
        .def(py::init([](int devices, int num_sms, uint64_t seed, const std::string& schedule, bool checks, bool exact_accumulate,
                         uint64_t max_steps, const std::vector<uint32_t>& choices) {
            return std::make_unique<Machine>(Options{devices, num_sms, seed, schedule, checks, exact_accumulate, max_steps, choices});
        }))
        .def("map", [](Machine& m, uint64_t host, uint64_t size, const std::string& name, int rank) {
            return m.memory.map(reinterpret_cast<uint8_t*>(host), size, name, rank).base;
        })
        .def("release", &Machine::release)
        .def("poison", [](Machine& m, uint64_t address, uint64_t bytes) {
            Region* r = m.memory.find(address);
            if (!r || !r->alive || address + bytes > r->base + r->size) throw Error(ErrorKind::MemoryAccess, "poison: no such allocation");
            if (!r->poison) r->poison = std::make_unique<Poison>(r->size, false);
            r->poison->set(address - r->base, bytes, true);
        })
        .def("symbol", [](Machine& m, int device, const std::shared_ptr<Program>& p, const std::string& name) {
            for (size_t i = 0; i < p->variables.size(); i++)
                if (p->variables[i].name == name && (p->variables[i].space == Space::Global || p->variables[i].space == Space::Const))
                    return m.module_variable(device, p, static_cast<int>(i));
            throw Error(ErrorKind::Emulation, "the PTX holds no variable '" + name + "'");
        })
        .def("read", [](Machine& m, uint64_t address, uint64_t bytes) {
            Region* r = m.memory.find(address);
            if (!r || !r->alive || address + bytes > r->base + r->size) throw Error(ErrorKind::MemoryAccess, "read: no such allocation");
            return py::bytes(reinterpret_cast<const char*>(r->host + (address - r->base)), bytes);
        })
        .def("write", [](Machine& m, uint64_t address, const py::bytes& data) {
            std::string bytes = data;
            Region* r = m.memory.find(address);
            if (!r || !r->alive || address + bytes.size() > r->base + r->size) throw Error(ErrorKind::MemoryAccess, "write: no such allocation");
            std::memcpy(r->host + (address - r->base), bytes.data(), bytes.size());
        })
        .def("bind", [](Machine& m, const std::string& name, py::function handler) {
            m.externs[name] = [handler](ExternCall& call) {
                py::gil_scoped_acquire gil;
                py::list arguments;
                for (auto& a : call.arguments) arguments.append(py::bytes(reinterpret_cast<const char*>(a.data()), a.size()));
                py::object result = handler(arguments);
                if (call.result.empty()) return;
                std::string bytes = py::cast<py::bytes>(result);
                call.result.assign(bytes.begin(), bytes.end());
            };
        })
        .def("submit", [](Machine& m, const std::shared_ptr<Program>& p, const std::string& kernel, int device, const std::vector<uint32_t>& grid,
                          const std::vector<uint32_t>& block, const std::vector<uint32_t>& cluster, uint32_t shared_bytes, const py::bytes& params, bool dependent) {
            return m.submit(make_launch(p, kernel, device, grid, block, cluster, shared_bytes, params, dependent));
        })
        .def("map_symmetric", [](Machine& m, uint64_t host, uint64_t size, const std::string& name, int rank, uint64_t offset) {
            uint64_t at = Network::heap_base + static_cast<uint64_t>(rank) * Network::heap_stride + offset;
            return m.memory.map(reinterpret_cast<uint8_t*>(host), size, name, rank, at).base;
        })
        .def("set_network", [](Machine& m, int per_node, std::pair<uint64_t, double> nvlink, std::pair<uint64_t, double> infiniband) {
            m.network = std::make_unique<Network>(m.options.devices, per_node, LinkModel{nvlink.first, nvlink.second},
                                                  LinkModel{infiniband.first, infiniband.second});
            m.set_rates();
        })
        .def("set_posting", [](Machine& m, uint64_t nvlink, uint64_t infiniband) { m.network->set_posting(nvlink, infiniband); })
        .def("set_memory", [](Machine& m, uint64_t latency, double bandwidth) {
            m.memory_model = {latency, bandwidth};
            m.set_rates();
        })
        .def("stall_link", [](Machine& m, int from, int to, uint64_t until) { m.network->stall(from, to, until); })
        .def("drop_message", [](Machine& m, int from, int to, uint64_t message) { m.network->drop(from, to, message); })
        .def("kill_device", [](Machine& m, int device, uint64_t step) { m.deaths[step] = device; })
        .def("run", &Machine::run, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("choice_widths", [](const Machine& m) { return m.choice_widths; })
        .def_property_readonly("time", [](const Machine& m) { return m.time; })
        .def("counters", &counters)
        .def_property_readonly("trace_rows", [](const Machine& m) {
            py::list out;
            for (const Trace::Row& r : m.trace.rows)
                out.append(py::make_tuple(r.device, r.cta, r.unit, text_of(m, r), r.sm, r.launch, readable(r.kernel), py::make_tuple(r.block[0], r.block[1], r.block[2])));
            return out;
        })
        .def_property_readonly("trace_spans", [](Machine& m) {
            static constexpr const char* kinds[] = {"run", "wait", "load", "store", "wgmma", "message"};
            py::list out;
            for (const Trace::Span& s : m.trace.spans) {
                const char* name = s.kind == Trace::Kind::Run ? class_names[static_cast<int>(s.inst->klass)] : s.inst->name;
                out.append(py::make_tuple(s.row, kinds[static_cast<int>(s.kind)], s.start, s.end, name, s.program->ast.source_text(s.inst->place), s.program->source_of(*s.inst), s.inst->line,
                                          text_of(m, s), s.cause.object));
            }
            return out;
        })
        .def_property_readonly("trace_dropped", [](const Machine& m) { return m.trace.dropped; });
}

}  // namespace
}  // namespace dsv3::emulator

PYBIND11_MODULE(_emulator, m) {
    m.doc() = "The PTX machine.";
    dsv3::bind_leaves(m);
    dsv3::emulator::bind_machine(m);
}
