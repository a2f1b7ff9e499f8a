#pragma once

#include <cstring>
#include <functional>
#include <map>

#include "error.hpp"
#include "program.hpp"

namespace dsv3::emulator {

class Builder;

/// One statement on its way to an Inst. An instruction family registers a decoder for each opcode; the decoder takes
/// modifiers and operands from here, and what it leaves untaken is refused.
class Decode {
  public:
    Decode(Builder& builder, const Statement& statement);

    const Statement& statement;
    Inst inst;
    std::vector<int> reads, writes;  ///< virtual registers

    // Modifiers: the words behind the opcode's first.
    bool take(std::string_view modifier);
    Type take_type();  ///< the first modifier that names a type; refuses if there is none
    Type try_type();
    std::string_view take_prefix(std::string_view prefix);  ///< the modifier that starts so, or ""
    Space take_space(Space otherwise);
    bool has(std::string_view modifier) const;

    // Operands.
    size_t count() const { return statement.operands.size(); }
    const Operand& at(size_t i) const;
    void expect_count(size_t least, size_t most) const;
    Ref src(const Operand& o, Type type);
    Ref dst(const Operand& o, Type type);
    Ref src(size_t i, Type type) { return src(at(i), type); }
    Ref dst(size_t i, Type type) { return dst(at(i), type); }
    Ref pred_src(const Operand& o, bool* negated);  ///< null `negated`: a negated predicate is refused
    Ref pred_dst(const Operand& o) { return dst(o, Type::Pred); }
    Ref constant(uint64_t bits, int size);
    /// [base + offset]: sets the base operand (32 or 64 bit wide, true for 64) and the offset.
    Ref address(const Operand& o, bool* wide, int64_t* offset);
    int register_size(const Operand& o) const;  ///< bytes; 0 for a predicate, -1 for no register
    uint64_t literal(size_t i) const;           ///< an operand that must be an integer literal
    bool is_literal(const Operand& o) const { return o.kind == Operand::Integer; }
    void dedicate(Ref virtual_register);  ///< a slot of its own, and instructions that name it are marked
    void set_list(const std::vector<Ref>& refs);
    const std::vector<Operand>& items(const Operand& o, size_t least, size_t most) const;
    template <class T>
    T& extra() {
        auto owned = std::make_shared<T>();
        inst.extra = owned.get();
        own(owned);
        return *owned;
    }

    void finish(Execute execute, Class klass);  ///< refuses leftover modifiers
    [[noreturn]] void unsupported(const std::string& what) const;
    [[noreturn]] void malformed(const std::string& what) const;
    Builder& builder;

  private:
    void own(std::shared_ptr<void> p);
    std::vector<std::string_view> modifiers_;
};

using DecodeFn = std::function<void(Decode&)>;
using OpTable = std::map<std::string_view, DecodeFn>;

// Each file of instructions adds its opcodes.
void register_integer(OpTable&);
void register_float(OpTable&);
void register_half(OpTable&);
void register_logic(OpTable&);
void register_convert(OpTable&);
void register_move(OpTable&);
void register_control(OpTable&);
void register_registers(OpTable&);
void register_memory(OpTable&);
void register_atomic(OpTable&);
void register_warp(OpTable&);
void register_barrier(OpTable&);
void register_mbarrier(OpTable&);
void register_bulk(OpTable&);
void register_tensor(OpTable&);
void register_wgmma(OpTable&);
void register_matrix(OpTable&);

/// Builds one Program from a parsed module.
class Builder {
  public:
    explicit Builder(ModuleAst ast);
    std::shared_ptr<Program> build();

    struct Virtual { Type type; bool dedicated; bool wgmma = false; };  ///< dedicated: never shares its slot
    struct Built { Inst inst; std::vector<int> reads, writes; int target = -1; bool falls_through = true; };

    ModuleAst ast;
    std::shared_ptr<Program> program = std::make_shared<Program>();
    std::vector<Virtual> registers;   ///< of all functions
    std::vector<Built> code;
    int function = -1;                ///< being built
    int first_register = 0;           ///< of the function being built
    std::vector<uint32_t> local_offsets;  ///< of the function's variables (lane memory, parameters or shared)

    const FunctionAst& function_ast() const;
    int special(Special kind);
    int label(const Operand& name) const;  ///< code index within the function's statements, or -1
    Ref constant(uint64_t bits, int size);
    Ref variable_address(int id, uint64_t addend, int size);
    int find_function(std::string_view name) const;
    int find_external(std::string_view name);
    const Variable& variable(int id) const;
    uint32_t offset_of(int id) const { return local_offsets[static_cast<size_t>(id)]; }
    Built* current = nullptr;
    uint32_t function_start = 0;

  private:
    void layout_module();
    void layout_function(int index);
    void build_function(int index);
    void refuse_recursion() const;
    std::map<std::pair<uint64_t, int>, Ref> pool_;
    std::map<std::tuple<int, int, uint64_t, int>, Ref> addresses_;
    std::map<Special, int> specials_;
    uint32_t common_shared_ = shared_base;
    uint32_t lane_bytes_ = 0;
    friend class Decode;
};

/// Gives virtual registers word offsets so that registers never live at the same time share one (by liveness, function
/// by function); rewrites the references of `code`. Returns the words a warp needs.
void allocate_registers(Builder& builder);

[[noreturn]] void fail_at(ErrorKind kind, const std::string& what, const Builder& builder, const Statement& statement);

}  // namespace dsv3::emulator
