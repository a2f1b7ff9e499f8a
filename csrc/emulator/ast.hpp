#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "types.hpp"

namespace dsv3::emulator {

/// A variable of any state space. Offsets are given when the program is built.
struct Variable {
    struct Initial {
        uint64_t offset;
        int size;
        uint64_t bits;
        std::string symbol;  ///< address of this variable is added; empty for a plain number
    };
    std::string name;
    Space space = Space::Global;
    Type type = Type::B8;
    uint64_t size = 0;  ///< bytes; 0 for `extern .shared x[]`
    uint32_t align = 1;
    bool is_extern = false;
    std::vector<Initial> initial;
};

struct Operand {
    enum Kind : uint8_t {
        Register,  ///< id: into Function::registers
        Integer, Float32, Float64,
        Special,   ///< name: "%tid.x"
        Var,       ///< id: into Function::variables, or ~id into Module::variables
        Name,      ///< a label or a function
        Vector,    ///< items: {a, b}
        List,      ///< items: (a, b)
        Address,   ///< items[0] the base, offset; items[1] the coordinates of a tensor, if any
        Pair,      ///< items: a|b
        Sink,      ///< _
    } kind = Sink;
    bool negated = false;  ///< !p
    bool minus = false;    ///< -r
    int id = -1;
    int scope = 0;  ///< of a Name: the block that it stands in
    uint64_t bits = 0;
    int64_t offset = 0;
    std::string_view name;
    std::vector<Operand> items;
};

struct Statement {
    std::string_view opcode;
    std::vector<Operand> operands;
    int guard = -1;  ///< predicate register, or -1
    bool guard_negated = false;
    uint32_t line = 0;
    uint32_t source = 0;  ///< into ModuleAst::sources
};

struct FunctionAst {
    struct Register { std::string name; Type type; };
    struct Label { std::string_view name; int scope; uint32_t target; };
    std::string name;
    bool is_entry = false;
    bool has_body = false;
    uint32_t line = 0;
    std::vector<int> params, returns;  ///< into variables
    std::vector<Register> registers;
    std::vector<Variable> variables;
    std::vector<Statement> body;
    std::vector<Label> labels;
    std::vector<int> scope_parent;  ///< scope 0 is the body
    std::array<uint32_t, 3> max_threads{0, 0, 0}, required_threads{0, 0, 0}, required_cluster{0, 0, 0};
    uint32_t min_ctas = 0, max_registers = 0;  ///< .minnctapersm, .maxnreg
};

/// A .loc line; where its code was inlined at is another.
struct SourceLine { uint32_t file = 0, line = 0, inlined_at = 0; };

struct ModuleAst {
    std::shared_ptr<const std::string> text;  ///< owns what the string_views point to
    std::vector<Variable> variables;
    std::vector<FunctionAst> functions;
    std::unordered_map<uint32_t, std::string> files;
    std::vector<SourceLine> sources{1};  ///< 0: unknown
    std::string source_text(uint32_t source) const;  ///< "a.cuh:12 inlined at b.cu:34"
};

/// Throws Error for text outside the grammar; never reads outside the text.
ModuleAst parse(std::string text);

}  // namespace dsv3::emulator
