// Tensor maps: what the copy engine knows of a tensor, and how a box of it lands in shared memory.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace dsv3 {

constexpr int kMaxRank = 5;
constexpr int kTensorMapBytes = 128;

// Enumerators carry the values of PTX's tensormap.replace.
enum class ElementType : uint8_t {
    u8,
    u16,
    u32,
    s32,
    u64,
    s64,
    f16,
    f32,
    f32_ftz,
    f64,
    bf16,
    tf32,
    tf32_ftz,
};
enum class Swizzle : uint8_t { none, b32, b64, b128 };
enum class OutOfBoundsFill : uint8_t { zeros, nan };

// The driver's CUtensorMapDataType, which numbers the types a little differently. Throws
// std::invalid_argument.
ElementType element_type_of_driver(int data_type);

int element_bytes(ElementType type);
bool is_floating(ElementType type);
uint32_t swizzle_bytes(Swizzle swizzle);  // 0, 32, 64 or 128
const char* element_name(ElementType type);

enum class TensorMapField : uint8_t {
    global_address,
    rank,
    box_dim,
    global_dim,
    global_stride,
    element_stride,
    elemtype,
    interleave_layout,
    swizzle_mode,
    fill_mode,
};

// Dimension 0 is the innermost and contiguous. A rank-r map uses the first r entries of each array (r - 1 of
// strides).
struct TensorMap {
    uint64_t address = 0;
    ElementType type = ElementType::u8;
    int rank = 0;
    std::array<uint64_t, kMaxRank> dims{};
    std::array<uint64_t, kMaxRank - 1> strides{};  // bytes, of dimension 1 and up
    std::array<uint32_t, kMaxRank> box{};
    std::array<uint32_t, kMaxRank> element_strides{1, 1, 1, 1, 1};
    uint8_t interleave = 0;  // only 0 (none) is valid here
    Swizzle swizzle = Swizzle::none;
    OutOfBoundsFill fill = OutOfBoundsFill::zeros;

    // Empty if cuTensorMapEncodeTiled would take it, else one sentence: the argument, its value, what was
    // expected.
    std::string why_invalid() const;

    // Elements along one dimension of the box as it lies in shared memory: ceil(box / element stride).
    uint32_t box_elements(int dimension) const;
    // What a load completes on its mbarrier, out-of-bounds elements included.
    uint32_t box_bytes() const;
    // Distance between the box's rows in shared memory: with a swizzle, always the full width of its pattern.
    uint32_t row_pitch() const;

    // The object as it lies in memory: kTensorMapBytes, in an encoding of this emulator.
    void encode(uint8_t* bytes) const;
    // False if the bytes are no tensor map. The result may still be invalid: ask why_invalid().
    static bool decode(const uint8_t* bytes, TensorMap* map);

    // tensormap.replace. `ordinal` counts dimensions (of global_stride: 0 is the stride of dimension 1).
    // Returns an empty string, or what is wrong with ordinal or value.
    std::string replace(TensorMapField field, int ordinal, uint64_t value);
};

// A run of bytes of a box: contiguous in global and in shared memory.
struct TensorChunk {
    uint64_t global;  // address; meaningless where out of bounds
    uint32_t shared;  // address, swizzled
    uint16_t bytes;
    bool in_bounds;
};

// The chunks of the box at `coordinates` (elements, innermost first, may be negative or beyond the tensor),
// with the box's first byte at shared address `shared_base` before swizzling. A swizzle permutes 16-byte
// columns by the bits of the final address, so its pattern hangs on the address and not on the box.
std::vector<TensorChunk> box_chunks(const TensorMap& map, const int32_t* coordinates, uint32_t shared_base);

// Fills `bytes` bytes with what the copy engine writes for elements outside the tensor.
void fill_out_of_bounds(const TensorMap& map, uint8_t* target, uint32_t bytes);

}  // namespace dsv3
