#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dsv3::emulator {

struct Inst;
struct Program;
enum class Wait : uint8_t;

/// What a wait waited for: by kind a shared offset, the number of a barrier, an address, a code index, ...
struct Cause { Wait wait; uint64_t object; };

/// What warps, engines and links did when, for Perfetto / chrome://tracing.
class Trace {
  public:
    enum class Kind : uint8_t { Run, Wait, Load, Store, Tensor, Message };
    enum Unit : int { link = -4, bulk_stores = -3, copy_engine = -2, tensor_core = -1 };  ///< or the number of a warp
    struct Row {
        int device;
        int unit;
        int peer = 0;            ///< of a link: the device at its other end
        uint32_t cta = 0;        ///< the rest not for links
        uint32_t sm = 0, launch = 0;
        std::string kernel{};
        uint32_t block[3] = {0, 0, 0};
    };
    struct Span {
        uint32_t row;
        Kind kind;
        uint64_t start, end;
        const Program* program;
        const Inst* inst;
        Cause cause;             ///< of other kinds than Wait: bytes, or the warpgroup of a Tensor
    };
    static constexpr size_t max_spans = 1 << 18;
    static constexpr uint32_t no_row = UINT32_MAX;

    void span(uint32_t row, Kind kind, uint64_t start, uint64_t end, const std::shared_ptr<const Program>& program, const Inst& inst,
              Cause cause = {}) {
        if (std::find(programs_.begin(), programs_.end(), program) == programs_.end()) programs_.push_back(program);
        spans.push_back({row, kind, start, end, program.get(), &inst, cause});
    }
    uint32_t add(Row row) {
        rows.push_back(std::move(row));
        return static_cast<uint32_t>(rows.size() - 1);
    }
    bool full() {
        bool f = spans.size() >= max_spans;
        dropped += f;
        return f;
    }
    std::vector<Span> spans;
    std::vector<Row> rows;
    uint64_t dropped = 0;

  private:
    std::vector<std::shared_ptr<const Program>> programs_;  ///< kept, for spans name their instructions
};

}  // namespace dsv3::emulator
