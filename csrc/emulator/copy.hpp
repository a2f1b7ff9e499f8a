#pragma once

#include <optional>

#include "decode.hpp"
#include "machine.hpp"
#include "tensor_map.hpp"

namespace dsv3::emulator {

/// One bulk copy under way: it lands late, in pieces and out of order.
class Copy : public Operation {
  public:
    struct Chunk { uint64_t global; uint32_t shared; uint32_t bytes; bool in_bounds; };
    struct Destination { Cta* cta; uint32_t shift; uint32_t barrier; uint32_t access; };  ///< shift: added to Chunk::shared

    Copy(Context& c, const Inst& inst, int lane);
    ~Copy() override;
    bool step(Machine& m) override;
    bool uses_shared(const Cta& cta, Issuer& by) const override;

    /// Global to shared memory of one or more blocks, completing on an mbarrier in each.
    void to_shared(const Context& c, uint32_t barrier_offset, const std::vector<Cta*>& targets);
    /// Shared memory to global, in the lane's open bulk group.
    void to_global(const Context& c);
    /// Shared to shared memory of another block.
    void between_blocks(const Context& c, uint32_t source, Cta* target, uint32_t destination, uint32_t barrier_offset);
    void use(Cta* cta);
    void shift_destination(uint32_t by) { destinations_[0].shift = by; }

    std::vector<Chunk> chunks;
    std::vector<uint8_t> payload;   ///< of st.async: the bytes to write; of stores: what was read
    int reduce = -1;                ///< of cp.reduce: operation
    Type reduce_type = Type::None;
    bool generic = false;           ///< st.async and red.async: not through the async proxy
    TensorMap map;                  ///< for out-of-bounds fill
    Knowledge knowledge;
    uint32_t read_access = 0;
    uint64_t map_address = 0;       ///< of a tensor map in global memory

    void launch(Context& c, std::unique_ptr<Copy> self);

  private:
    [[noreturn]] void fail(Machine& m, ErrorKind kind, const std::string& what) const;
    void read_chunk(Machine& m, size_t i, uint8_t* into, bool* poison);
    void write_shared(Machine& m, const Chunk& chunk, const Destination& d, const uint8_t* data);
    void write_global(Machine& m, const Chunk& chunk, const uint8_t* data);
    void finish();
    uint32_t new_access(Machine& m, Agent agent, uint32_t time);

    Warp& warp_;
    const Inst& inst_;
    int lane_;
    uint32_t code_;
    bool from_shared_ = false;
    uint32_t source_shift_ = 0;
    std::vector<Destination> destinations_;
    uint32_t group_ = 0;           ///< of a store
    uint32_t write_access_ = 0;
    bool store_ = false;
    std::vector<std::pair<size_t, size_t>> pieces_, later_;
    std::vector<Cta*> used_;
    uint64_t issued_at_ = 0;
    uint64_t read_at_ = 0;         ///< cycle at which the source of a store is read
};

/// The new value of a reduction; shared with atom.
uint64_t reduce_value(Type type, int op, uint64_t old, uint64_t a, uint64_t b);
int reduce_op(Decode& d);

Agent agent_of(Machine& m, Warp& w, Agent& slot);

/// [mbar] of a copy: its block and offset, with its initialisation visible to the engine.
Target barrier_of(Context& c, Space space, uint64_t address, int lane, const Knowledge& k);

}  // namespace dsv3::emulator
