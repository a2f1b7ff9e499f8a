// The machine's pure parts, for the tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>

#include "numerics.hpp"
#include "nvshmem_layout.hpp"
#include "tensor_core.hpp"
#include "tensor_map.hpp"

namespace py = pybind11;

namespace dsv3 {

namespace {

template <class T>
const T& lookup(const std::map<std::string, T>& table, const std::string& key, const char* what) {
    auto found = table.find(key);
    if (found != table.end()) return found->second;
    std::string known;
    for (const auto& entry : table) known += (known.empty() ? "" : ", ") + entry.first;
    throw std::invalid_argument(std::string(what) + " is " + key + ", expected one of " + known);
}

const FloatFormat& format_named(const std::string& name) {
    static const std::map<std::string, FloatFormat> formats{{"e4m3", kE4M3}, {"e5m2", kE5M2}, {"f16", kF16},
                                                            {"bf16", kBF16}, {"tf32", kTF32}, {"f32", kF32}};
    return lookup(formats, name, "format");
}

ConversionOptions options_named(const std::string& rounding, bool saturate, bool relu) {
    static const std::map<std::string, Rounding> modes{{"rn", Rounding::nearest_even},
                                                       {"rna", Rounding::nearest_away},
                                                       {"rz", Rounding::toward_zero},
                                                       {"rm", Rounding::down},
                                                       {"rp", Rounding::up}};
    return {lookup(modes, rounding, "rounding"), saturate, relu};
}

OperandType operand_named(const std::string& name) {
    static const std::map<std::string, OperandType> types{{"e4m3", OperandType::e4m3},
                                                          {"e5m2", OperandType::e5m2},
                                                          {"f16", OperandType::f16},
                                                          {"bf16", OperandType::bf16},
                                                          {"tf32", OperandType::tf32}};
    return lookup(types, name, "operand type");
}

AccumulatorType accumulator_named(const std::string& name) {
    static const std::map<std::string, AccumulatorType> types{{"f32", AccumulatorType::f32},
                                                              {"f16", AccumulatorType::f16}};
    return lookup(types, name, "accumulator type");
}

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;

void bind_numerics(py::module_& m) {
    m.def(
        "encode",
        [](const Doubles& x, const std::string& format, const std::string& rounding, bool saturate,
           bool relu) {
            Words out(x.size());
            for (py::ssize_t i = 0; i < x.size(); ++i)
                out.mutable_data()[i] =
                    encode(x.data()[i], format_named(format), options_named(rounding, saturate, relu));
            return out;
        },
        py::arg("x"), py::arg("format"), py::arg("rounding") = "rn", py::arg("saturate") = false,
        py::arg("relu") = false);
    m.def("decode", [](const Words& codes, const std::string& format) {
        Doubles out(codes.size());
        for (py::ssize_t i = 0; i < codes.size(); ++i)
            out.mutable_data()[i] = decode(codes.data()[i], format_named(format));
        return out;
    });
    m.def("fast_from_float", [](const Floats& x, const std::string& format) {
        Words out(x.size());
        for (py::ssize_t i = 0; i < x.size(); ++i) {
            float value = x.data()[i];
            out.mutable_data()[i] = format == "e4m3"   ? float_to_e4m3(value)
                                    : format == "f16"  ? float_to_f16(value)
                                    : format == "bf16" ? float_to_bf16(value)
                                                       : throw std::invalid_argument("format is " + format);
        }
        return out;
    });
    m.def("fast_to_float_bits", [](const Words& codes, const std::string& format) {
        Words out(codes.size());
        for (py::ssize_t i = 0; i < codes.size(); ++i) {
            uint32_t code = codes.data()[i];
            float value = format == "e4m3"   ? e4m3_to_float(uint8_t(code))
                          : format == "e5m2" ? e5m2_to_float(uint8_t(code))
                          : format == "f16"  ? f16_to_float(uint16_t(code))
                          : format == "bf16" ? bf16_to_float(uint16_t(code))
                                             : throw std::invalid_argument("format is " + format);
            out.mutable_data()[i] = float_bits(value);
        }
        return out;
    });
    m.def("cvt_fp8x2_f32", [](float upper, float lower, const std::string& format, bool relu) {
        return cvt_fp8x2_f32(upper, lower, format_named(format), relu);
    });
    m.def("cvt_fp8x2_f16x2", [](uint32_t pair, const std::string& format, bool relu) {
        return cvt_fp8x2_f16x2(pair, format_named(format), relu);
    });
    m.def("cvt_f16x2_fp8x2", [](uint16_t pair, const std::string& format, bool relu) {
        return cvt_f16x2_fp8x2(pair, format_named(format), relu);
    });
    m.def("cvt_half2_f32", [](float upper, float lower, const std::string& format,
                              const std::string& rounding, bool saturate, bool relu) {
        return cvt_half2_f32(upper, lower, format_named(format), options_named(rounding, saturate, relu));
    });
    m.def("cvt_tf32_f32", [](float x, const std::string& rounding, bool saturate, bool relu) {
        return cvt_tf32_f32(x, options_named(rounding, saturate, relu));
    });
}

void bind_tensor_core(py::module_& m) {
    m.def(
        "multiply_accumulate",
        [](const Bytes& a, const Bytes& b, const Words& d_bits, const std::string& a_type,
           const std::string& b_type, const std::string& d_type, bool scale_d, bool negate_a, bool negate_b,
           bool exact_accumulate) {
            MmaConfig config{int(b.size() / kTileBytes),
                             operand_named(a_type),
                             operand_named(b_type),
                             accumulator_named(d_type),
                             scale_d,
                             negate_a,
                             negate_b,
                             exact_accumulate};
            std::string wrong = why_invalid(config);
            if (!wrong.empty()) throw std::invalid_argument(wrong);
            if (a.size() != kTileRows * kTileBytes || b.size() % kTileBytes != 0 ||
                d_bits.size() != kTileRows * config.n)
                throw std::invalid_argument(
                    "expected a of 64 x 32 bytes, b of n x 32 bytes, d of 64 x n words");
            Words out({py::ssize_t(kTileRows), py::ssize_t(config.n)});
            std::copy(d_bits.data(), d_bits.data() + d_bits.size(), out.mutable_data());
            multiply_accumulate(config, a.data(), b.data(), reinterpret_cast<float*>(out.mutable_data()));
            return out;
        },
        py::arg("a"), py::arg("b"), py::arg("d_bits"), py::arg("a_type") = "e4m3", py::arg("b_type") = "e4m3",
        py::arg("d_type") = "f32", py::arg("scale_d") = true, py::arg("negate_a") = false,
        py::arg("negate_b") = false, py::arg("exact_accumulate") = false);
    m.def("operand_chunk_addresses", [](uint64_t descriptor, bool mn_major, int rows) {
        if (rows < 8 || rows > kMaxTileColumns || rows % 8 != 0)
            throw std::invalid_argument("rows: 8 to 256, by 8");
        std::vector<uint32_t> addresses(size_t(rows) * 2);
        operand_chunk_addresses(MatrixDescriptor::decode(descriptor), mn_major, rows, addresses.data());
        return addresses;
    });
    m.def("assemble_operand", [](bool mn_major, const Bytes& chunks) {
        py::ssize_t rows = chunks.size() / kTileBytes;
        if (rows % 8 != 0) throw std::invalid_argument("chunks: a multiple of 256 bytes");
        Bytes tile({rows, py::ssize_t(kTileBytes)});
        assemble_operand(mn_major, int(rows), chunks.data(), tile.mutable_data());
        return tile;
    });
    m.def("accumulator_position", [](const std::string& type, int thread, int index) {
        TilePosition p = accumulator_position(accumulator_named(type), thread, index);
        return std::make_pair(p.row, p.column);
    });
    m.def("a_fragment_position", [](int thread, int index) {
        TilePosition p = a_fragment_position(thread, index);
        return std::make_pair(p.row, p.column);
    });
    m.def("ldmatrix_distribute", [](const Bytes& rows, bool transposed) {
        if (rows.size() != 128) throw std::invalid_argument("rows: 8 x 16 bytes");
        Words registers(32);
        ldmatrix_distribute(reinterpret_cast<const uint8_t (*)[16]>(rows.data()), transposed,
                            registers.mutable_data());
        return registers;
    });
    m.def("stmatrix_collect", [](const Words& registers, bool transposed) {
        if (registers.size() != 32) throw std::invalid_argument("registers: 32");
        Bytes rows({8, 16});
        stmatrix_collect(registers.data(), transposed,
                         reinterpret_cast<uint8_t (*)[16]>(rows.mutable_data()));
        return rows;
    });
}

const std::map<std::string, TensorMapField>& field_names() {
    static const std::map<std::string, TensorMapField> names{
        {"global_address", TensorMapField::global_address},
        {"rank", TensorMapField::rank},
        {"box_dim", TensorMapField::box_dim},
        {"global_dim", TensorMapField::global_dim},
        {"global_stride", TensorMapField::global_stride},
        {"element_stride", TensorMapField::element_stride},
        {"elemtype", TensorMapField::elemtype},
        {"interleave_layout", TensorMapField::interleave_layout},
        {"swizzle_mode", TensorMapField::swizzle_mode},
        {"fill_mode", TensorMapField::fill_mode}};
    return names;
}

TensorMap make_tensor_map(uint64_t address, int type, const std::vector<uint64_t>& dims,
                          const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box,
                          uint32_t swizzle, bool fill_nan, const std::vector<uint32_t>& element_strides) {
    size_t rank = dims.size();
    if (rank < 1 || rank > size_t(kMaxRank) || strides.size() != rank - 1 || box.size() != rank ||
        (!element_strides.empty() && element_strides.size() != rank))
        throw std::invalid_argument(
            "TensorMap: dims, box and element_strides need 1 to 5 entries, strides one fewer");
    TensorMap map;
    map.address = address;
    map.type = ElementType(type);
    map.rank = int(rank);
    std::copy(dims.begin(), dims.end(), map.dims.begin());
    std::copy(strides.begin(), strides.end(), map.strides.begin());
    std::copy(box.begin(), box.end(), map.box.begin());
    std::copy(element_strides.begin(), element_strides.end(), map.element_strides.begin());
    map.swizzle = swizzle == 0    ? Swizzle::none
                  : swizzle == 32 ? Swizzle::b32
                  : swizzle == 64 ? Swizzle::b64
                                  : Swizzle::b128;
    if (swizzle_bytes(map.swizzle) != swizzle)
        throw std::invalid_argument("TensorMap: swizzle is " + std::to_string(swizzle) +
                                    ", expected 0, 32, 64 or 128");
    map.fill = fill_nan ? OutOfBoundsFill::nan : OutOfBoundsFill::zeros;
    std::string wrong = map.why_invalid();
    if (!wrong.empty()) throw std::invalid_argument("TensorMap: " + wrong);
    return map;
}

void bind_tensor_map(py::module_& m) {
    m.def("element_type_of_driver", [](int data_type) { return int(element_type_of_driver(data_type)); });
    py::class_<TensorMap>(m, "RawTensorMap", "A tensor map over an address; dimensions innermost first.")
        .def(py::init(&make_tensor_map), py::arg("address"), py::arg("type"), py::arg("dims"),
             py::arg("strides"), py::arg("box"), py::arg("swizzle") = 0, py::arg("fill_nan") = false,
             py::arg("element_strides") = std::vector<uint32_t>{})
        .def_property_readonly("box_bytes", &TensorMap::box_bytes)
        .def("why_invalid", &TensorMap::why_invalid)
        .def("replace",
             [](TensorMap& map, const std::string& field, int ordinal, uint64_t value) {
                 return map.replace(lookup(field_names(), field, "field"), ordinal, value);
             })
        .def("encode",
             [](const TensorMap& map) {
                 std::string bytes(kTensorMapBytes, '\0');
                 map.encode(reinterpret_cast<uint8_t*>(&bytes[0]));
                 return py::bytes(bytes);
             })
        .def_static("decode",
                    [](const std::string& bytes) {
                        TensorMap map;
                        if (bytes.size() != size_t(kTensorMapBytes) ||
                            !TensorMap::decode(reinterpret_cast<const uint8_t*>(bytes.data()), &map))
                            throw std::invalid_argument("these bytes are no tensor map");
                        return map;
                    })
        .def("chunks",
             [](const TensorMap& map, const std::vector<int32_t>& coordinates, uint32_t shared_base) {
                 if (int(coordinates.size()) != map.rank)
                     throw std::invalid_argument("one coordinate a dimension");
                 std::vector<std::tuple<uint64_t, uint32_t, int, bool>> out;
                 for (const TensorChunk& c : box_chunks(map, coordinates.data(), shared_base))
                     out.emplace_back(c.global, c.shared, c.bytes, c.in_bounds);
                 return out;
             })
        .def("fill", [](const TensorMap& map, uint32_t bytes) {
            std::string out(bytes, '\0');
            fill_out_of_bounds(map, reinterpret_cast<uint8_t*>(&out[0]), bytes);
            return py::bytes(out);
        });
}

/// What is assumed of NVSHMEM's headers, by the names that they use: offsets, sizes and numbers.
py::dict nvshmem_layout() {
    namespace layout = emulator::nvshmem;
    auto fill = [](const auto& named) {
        py::dict d;
        for (const layout::Named& one : named) d[one.name] = one.value;
        return d;
    };
    py::dict state = fill(layout::state_fields), team = fill(layout::team_fields), all;
    state["sizeof"] = layout::state_bytes;
    team["sizeof"] = layout::team_bytes;
    all["nvshmemi_device_host_state_t"] = state;
    all["nvshmemi_team_t"] = team;
    all["numbers"] = fill(layout::numbers);
    return all;
}

}  // namespace

void bind_leaves(py::module_& m) {
    py::module_ leaves = m.def_submodule("leaves", "Pure parts of the machine, for the tests.");
    bind_numerics(leaves);
    bind_tensor_core(leaves);
    bind_tensor_map(leaves);
    leaves.def("nvshmem_layout", &nvshmem_layout);
}

}  // namespace dsv3
