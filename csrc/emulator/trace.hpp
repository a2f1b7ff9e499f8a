#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dsv3::emulator {

/// Spans for Perfetto / chrome://tracing: one row a warp, one an engine.
class Trace {
  public:
    struct Span { uint32_t process, row; uint64_t start, length; const char* name; };
    static constexpr size_t max_spans = 1 << 20;
    void span(uint32_t process, uint32_t row, uint64_t start, uint64_t end, const char* name) {
        if (spans.size() < max_spans) spans.push_back({process, row, start, end - start, name});
    }
    std::vector<Span> spans;
    std::vector<std::pair<std::pair<uint32_t, uint32_t>, std::string>> rows;
};

}  // namespace dsv3::emulator
