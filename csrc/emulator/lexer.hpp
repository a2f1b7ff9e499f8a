#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace dsv3::emulator {

struct Token {
    enum Kind : uint8_t { Word, Int, Float32, Float64, String, Punct, End } kind = End;
    std::string_view text;  ///< into the PTX text
    uint64_t bits = 0;      ///< value of Int, or the bit pattern of a float
    uint32_t line = 0;
};

/// PTX text to tokens, ended by one End token. Throws Error on text that is no PTX.
/// A Word keeps its dots and double colons: "ld.shared::cta.b32" is one token.
std::vector<Token> tokenize(std::string_view text);

}  // namespace dsv3::emulator
