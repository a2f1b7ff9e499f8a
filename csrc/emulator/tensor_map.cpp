#include "tensor_map.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace dsv3 {

namespace {

struct TypeInfo {
    const char* name;
    uint8_t bytes;
    bool floating;
    uint64_t nan;
};

constexpr TypeInfo kTypes[] = {
    {"u8", 1, false, 0},
    {"u16", 2, false, 0},
    {"u32", 4, false, 0},
    {"s32", 4, false, 0},
    {"u64", 8, false, 0},
    {"s64", 8, false, 0},
    {"f16", 2, true, 0x7FFF},
    {"f32", 4, true, 0x7FFFFFFF},
    {"f32_ftz", 4, true, 0x7FFFFFFF},
    {"f64", 8, true, 0x7FFFFFFFFFFFFFFF},
    {"bf16", 2, true, 0x7FFF},
    {"tf32", 4, true, 0x7FFFFFFF},
    {"tf32_ftz", 4, true, 0x7FFFFFFF},
};
constexpr int kNumTypes = int(sizeof kTypes / sizeof kTypes[0]);

constexpr uint64_t kMaxDim = uint64_t(1) << 32;
constexpr uint64_t kStrideLimit = uint64_t(1) << 40;
constexpr uint32_t kMaxBox = 256;
constexpr uint32_t kMaxElementStride = 8;

// The encoding, 128 bytes, little-endian as the host: fixed fields at fixed places, so that replacing one is
// local.
struct Encoded {
    uint32_t magic;
    uint8_t type, rank, swizzle, fill;
    uint64_t address;
    uint64_t strides[kMaxRank - 1];
    uint32_t dims_minus_1[kMaxRank];
    uint16_t box[kMaxRank];
    uint8_t element_strides[kMaxRank];
    uint8_t interleave;
    uint8_t reserved[44];
};
static_assert(sizeof(Encoded) == kTensorMapBytes, "a tensor map is 128 bytes");
constexpr uint32_t kMagic = 0x704D7354;

std::string of(const char* name, int dimension) {
    return std::string(name) + "[" + std::to_string(dimension) + "]";
}

std::string complaint(const std::string& what, uint64_t got, const std::string& expected) {
    return what + " is " + std::to_string(got) + ", expected " + expected;
}

}  // namespace

ElementType element_type_of_driver(int data_type) {
    using E = ElementType;
    constexpr E kOrder[] = {E::u8,  E::u16, E::u32,  E::s32,     E::u64,  E::s64,     E::f16,
                            E::f32, E::f64, E::bf16, E::f32_ftz, E::tf32, E::tf32_ftz};
    if (data_type < 0 || data_type >= kNumTypes)
        throw std::invalid_argument("tensor map: data type is " + std::to_string(data_type) +
                                    ", expected 0 to 12");
    return kOrder[data_type];
}

int element_bytes(ElementType type) { return kTypes[int(type)].bytes; }
bool is_floating(ElementType type) { return kTypes[int(type)].floating; }
const char* element_name(ElementType type) { return kTypes[int(type)].name; }
uint32_t swizzle_bytes(Swizzle swizzle) { return swizzle == Swizzle::none ? 0 : 16u << int(swizzle); }

uint32_t TensorMap::box_elements(int dimension) const {
    auto d = size_t(dimension);
    return (box[d] + element_strides[d] - 1) / element_strides[d];
}

uint32_t TensorMap::box_bytes() const {
    uint32_t bytes = uint32_t(element_bytes(type));
    for (int d = 0; d < rank; ++d) bytes *= box_elements(d);
    return bytes;
}

uint32_t TensorMap::row_pitch() const {
    return swizzle == Swizzle::none ? box_elements(0) * uint32_t(element_bytes(type))
                                    : swizzle_bytes(swizzle);
}

std::string TensorMap::why_invalid() const {
    if (int(type) >= kNumTypes) return complaint("element type", uint64_t(type), "0 to 12");
    if (rank < 1 || rank > kMaxRank) return complaint("rank", uint64_t(rank), "1 to 5");
    if (interleave != 0) return complaint("interleave", interleave, "0 (none)");
    if (int(swizzle) > 3)
        return complaint("swizzle", uint64_t(swizzle), "0 to 3 (none, 32, 64 or 128 bytes)");
    if (int(fill) > 1) return complaint("out-of-bounds fill", uint64_t(fill), "0 (zeros) or 1 (NaN)");
    if (address % 16 != 0) return complaint("global address", address, "a multiple of 16");
    if (fill == OutOfBoundsFill::nan && !is_floating(type))
        return std::string("out-of-bounds fill is NaN, expected zeros for element type ") +
               element_name(type);
    for (int d = 0; d < rank; ++d) {
        auto i = size_t(d);
        if (dims[i] < 1 || dims[i] > kMaxDim) return complaint(of("global dim", d), dims[i], "1 to 2^32");
        if (box[i] < 1 || box[i] > kMaxBox) return complaint(of("box", d), box[i], "1 to 256");
        if (element_strides[i] < 1 || element_strides[i] > kMaxElementStride)
            return complaint(of("element stride", d), element_strides[i], "1 to 8");
        if (d > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= kStrideLimit))
            return complaint(of("global stride", d), strides[i - 1], "a multiple of 16 bytes below 2^40");
    }
    uint64_t inner = uint64_t(box_elements(0)) * uint64_t(element_bytes(type));
    if (inner % 16 != 0) return complaint("inner box", inner, "a multiple of 16 bytes");
    if (swizzle != Swizzle::none && inner > swizzle_bytes(swizzle))
        return complaint("inner box", inner,
                         "at most the swizzle's " + std::to_string(swizzle_bytes(swizzle)) + " bytes");
    return "";
}

void TensorMap::encode(uint8_t* bytes) const {
    Encoded e{};
    e.magic = kMagic;
    e.type = uint8_t(type);
    e.rank = uint8_t(rank);
    e.swizzle = uint8_t(swizzle);
    e.fill = uint8_t(fill);
    e.address = address;
    e.interleave = interleave;
    for (size_t d = 0; d < kMaxRank; ++d) {
        e.dims_minus_1[d] = uint32_t(dims[d] - 1);
        e.box[d] = uint16_t(box[d]);
        e.element_strides[d] = uint8_t(element_strides[d]);
        if (d + 1 < kMaxRank) e.strides[d] = strides[d];
    }
    std::memcpy(bytes, &e, sizeof e);
}

bool TensorMap::decode(const uint8_t* bytes, TensorMap* map) {
    Encoded e;
    std::memcpy(&e, bytes, sizeof e);
    if (e.magic != kMagic) return false;
    map->type = ElementType(e.type);
    map->rank = e.rank;
    map->swizzle = Swizzle(e.swizzle);
    map->fill = OutOfBoundsFill(e.fill);
    map->address = e.address;
    map->interleave = e.interleave;
    for (size_t d = 0; d < kMaxRank; ++d) {
        map->dims[d] = uint64_t(e.dims_minus_1[d]) + 1;
        map->box[d] = e.box[d];
        map->element_strides[d] = e.element_strides[d];
        if (d + 1 < kMaxRank) map->strides[d] = e.strides[d];
    }
    return true;
}

std::string TensorMap::replace(TensorMapField field, int ordinal, uint64_t value) {
    auto bounded = [&](const char* name, uint64_t low, uint64_t high) {
        if (value >= low && value <= high) return std::string();
        return complaint(name, value, std::to_string(low) + " to " + std::to_string(high));
    };
    bool indexed = field == TensorMapField::box_dim || field == TensorMapField::global_dim ||
                   field == TensorMapField::global_stride || field == TensorMapField::element_stride;
    int limit = field == TensorMapField::global_stride ? kMaxRank - 1 : kMaxRank;
    if (indexed && (ordinal < 0 || ordinal >= limit))
        return "ordinal is " + std::to_string(ordinal) + ", expected 0 to " + std::to_string(limit - 1);

    auto i = size_t(ordinal);
    std::string wrong;
    switch (field) {
        case TensorMapField::global_address: address = value; break;
        case TensorMapField::rank:
            if ((wrong = bounded("rank - 1", 0, kMaxRank - 1)).empty()) rank = int(value) + 1;
            break;
        case TensorMapField::box_dim:
            if ((wrong = bounded("box_dim", 1, kMaxBox)).empty()) box[i] = uint32_t(value);
            break;
        case TensorMapField::global_dim:
            if ((wrong = bounded("global_dim", 1, kMaxDim)).empty()) dims[i] = value;
            break;
        case TensorMapField::global_stride:
            if ((wrong = bounded("global_stride", 0, kStrideLimit - 1)).empty()) strides[i] = value;
            break;
        case TensorMapField::element_stride:
            if ((wrong = bounded("element_stride", 1, kMaxElementStride)).empty())
                element_strides[i] = uint32_t(value);
            break;
        case TensorMapField::elemtype:
            if ((wrong = bounded("elemtype", 0, kNumTypes - 1)).empty()) type = ElementType(value);
            break;
        case TensorMapField::interleave_layout:
            if ((wrong = bounded("interleave_layout", 0, 2)).empty()) interleave = uint8_t(value);
            break;
        case TensorMapField::swizzle_mode:
            if ((wrong = bounded("swizzle_mode", 0, 3)).empty()) swizzle = Swizzle(value);
            break;
        case TensorMapField::fill_mode:
            if ((wrong = bounded("fill_mode", 0, 1)).empty()) fill = OutOfBoundsFill(value);
            break;
    }
    return wrong;
}

std::vector<TensorChunk> box_chunks(const TensorMap& map, const int32_t* coordinates, uint32_t shared_base) {
    const auto size = uint32_t(element_bytes(map.type));
    const uint32_t inner = map.box_elements(0);
    const uint32_t column_mask = map.swizzle == Swizzle::none ? 0 : swizzle_bytes(map.swizzle) / 16 - 1;
    const uint32_t step = map.element_strides[0];
    std::vector<TensorChunk> chunks;

    // Elements [first, last) of one row, all inside or all outside the tensor.
    auto emit = [&](uint64_t row_address, uint32_t row_offset, uint32_t first, uint32_t last,
                    bool in_bounds) {
        while (first < last) {
            uint32_t address = shared_base + row_offset + first * size;
            uint32_t count = step == 1 || !in_bounds ? last - first : 1;
            if (column_mask != 0) count = std::min(count, (16 - address % 16) / size);
            uint64_t element = uint64_t(int64_t(coordinates[0]) + int64_t(first) * step);
            address ^= (address >> 7 & column_mask) << 4;
            chunks.push_back({row_address + element * size, address, uint16_t(count * size), in_bounds});
            first += count;
        }
    };

    uint32_t rows = 1;
    for (int d = 1; d < map.rank; ++d) rows *= map.box_elements(d);
    for (uint32_t row = 0; row < rows; ++row) {
        uint64_t row_address = map.address;
        bool row_inside = true;
        uint32_t rest = row;
        for (int d = 1; d < map.rank; ++d) {
            auto i = size_t(d);
            uint32_t count = map.box_elements(d);
            int64_t at = int64_t(coordinates[d]) + int64_t(rest % count) * map.element_strides[i];
            rest /= count;
            row_inside = row_inside && at >= 0 && uint64_t(at) < map.dims[i];
            row_address += uint64_t(at) * map.strides[i - 1];
        }
        // Of the row's elements at coordinates c, c + step, ..., those in [begin, end) lie inside the tensor.
        int64_t c = coordinates[0], room = int64_t(map.dims[0]) - c;
        auto clamp = [inner](int64_t x) { return uint32_t(std::clamp<int64_t>(x, 0, inner)); };
        uint32_t begin = row_inside ? clamp(c < 0 ? (-c + step - 1) / step : 0) : inner;
        uint32_t end = row_inside ? std::max(begin, clamp(room <= 0 ? 0 : (room + step - 1) / step)) : inner;
        uint32_t offset = row * map.row_pitch();
        emit(row_address, offset, 0, begin, false);
        emit(row_address, offset, begin, end, true);
        emit(row_address, offset, end, inner, false);
    }
    return chunks;
}

void fill_out_of_bounds(const TensorMap& map, uint8_t* target, uint32_t bytes) {
    uint64_t value = map.fill == OutOfBoundsFill::nan ? kTypes[int(map.type)].nan : 0;
    auto size = uint32_t(element_bytes(map.type));
    for (uint32_t i = 0; i < bytes; i += size) std::memcpy(target + i, &value, std::min(size, bytes - i));
}

}  // namespace dsv3
