#include "program.hpp"

#include <algorithm>
#include <set>

#include "decode.hpp"

namespace dsv3::emulator {
namespace {

const OpTable& op_table() {
    static const OpTable table = [] {
        OpTable t;
        // Opcodes that serve several families: each family asks for its types and hands the rest on.
        register_float(t);
        register_half(t);
        register_integer(t);
        register_logic(t);
        register_convert(t);
        register_move(t);
        register_control(t);
        register_registers(t);
        register_memory(t);
        register_atomic(t);
        register_warp(t);
        register_barrier(t);
        register_mbarrier(t);
        register_bulk(t);
        register_tensor(t);
        register_wgmma(t);
        register_matrix(t);
        return t;
    }();
    return table;
}

uint32_t round_up(uint32_t x, uint32_t align) { return (x + align - 1) / align * align; }

constexpr uint64_t max_window_bytes = 1 << 24;

/// Lays one variable behind `top` and returns its offset.
uint32_t place(const Variable& v, uint32_t& top) {
    uint64_t at = round_up(top, v.align);
    if (at + v.size > max_window_bytes)
        throw Error(ErrorKind::Emulation, "variable '" + v.name + "' does not fit its state space");
    top = static_cast<uint32_t>(at + v.size);
    return static_cast<uint32_t>(at);
}

}  // namespace

void fail_at(ErrorKind kind, const std::string& what, const Builder& b, const Statement& s) {
    Place place;
    place.kernel = b.function_ast().name;
    place.ptx_line = static_cast<int>(s.line);
    place.source = b.ast.source_text(s.source);
    throw Error(kind, what, place);
}

Builder::Builder(ModuleAst parsed) : ast(std::move(parsed)) {}

const FunctionAst& Builder::function_ast() const { return ast.functions[static_cast<size_t>(function)]; }

int Builder::special(Special kind) {
    auto it = specials_.find(kind);
    if (it != specials_.end()) return it->second;
    registers.push_back({kind == Special::GridId ? Type::U64 : Type::U32, true, false});
    int id = static_cast<int>(registers.size()) - 1;
    specials_[kind] = id;
    program->specials.push_back({kind, id});
    return id;
}

Ref Builder::constant(uint64_t bits, int size) {
    auto key = std::make_pair(bits, size);
    auto it = pool_.find(key);
    if (it != pool_.end()) return it->second;
    std::vector<uint32_t>& words = program->constants;
    uint32_t at = static_cast<uint32_t>(words.size());
    for (int lane = 0; lane < 32; lane++) {
        words.push_back(static_cast<uint32_t>(bits));
        if (size == 8) words.push_back(static_cast<uint32_t>(bits >> 32));
    }
    return pool_[key] = ~static_cast<Ref>(at);
}

const Variable& Builder::variable(int id) const {
    return id >= 0 ? function_ast().variables[static_cast<size_t>(id)] : ast.variables[static_cast<size_t>(~id)];
}

Ref Builder::variable_address(int id, uint64_t addend, int size) {
    const Variable& v = variable(id);
    if (id >= 0 && !(v.space == Space::Shared && v.size == 0) && v.space != Space::Global && v.space != Space::Const) {
        uint64_t base = offset_of(id);
        if (v.space == Space::Param && !function_ast().is_entry) base += call_params;
        if (v.space == Space::Param && function_ast().is_entry && id >= static_cast<int>(function_ast().params.size()))
            base += call_params;
        return constant(base + addend, size);
    }
    auto key = std::make_tuple(function, id, addend, size);
    auto it = addresses_.find(key);
    if (it != addresses_.end()) return it->second;
    uint32_t at = static_cast<uint32_t>(program->constants.size());
    program->constants.resize(at + (size == 8 ? 64 : 32));
    program->patches.push_back({at, size, id, addend, function});
    return addresses_[key] = ~static_cast<Ref>(at);
}

int Builder::find_function(std::string_view name) const {
    for (size_t i = 0; i < ast.functions.size(); i++)
        if (ast.functions[i].name == name) return static_cast<int>(i);
    return -1;
}

int Builder::find_external(std::string_view name) {
    std::vector<std::string>& list = program->externals;
    auto it = std::find(list.begin(), list.end(), name);
    if (it == list.end()) it = list.insert(list.end(), std::string(name));
    return static_cast<int>(it - list.begin());
}

int Builder::label(const Operand& o) const {
    const FunctionAst& f = function_ast();
    for (int scope = o.scope; scope >= 0; scope = f.scope_parent[static_cast<size_t>(scope)])
        for (const FunctionAst::Label& l : f.labels)
            if (l.scope == scope && l.name == o.name) return static_cast<int>(function_start + l.target);
    return -1;
}

void Builder::layout_module() {
    for (const Variable& v : ast.variables) program->shared_offsets.push_back(v.space == Space::Shared && v.size ? place(v, common_shared_) : 0);
    for (const FunctionAst& f : ast.functions)
        if (!f.is_entry)
            for (const Variable& v : f.variables)
                if (v.space == Space::Shared) common_shared_ = round_up(common_shared_, v.align) + static_cast<uint32_t>(v.size);
    program->functions.resize(ast.functions.size());
    // Parameters of functions first, for call sites need them before the callee is built.
    for (size_t i = 0; i < ast.functions.size(); i++) {
        const FunctionAst& f = ast.functions[i];
        Function& out = program->functions[i];
        out.name = f.name;
        out.is_entry = f.is_entry;
        program->by_name[f.name] = static_cast<int>(i);
        out.min_ctas = f.min_ctas;
        out.max_registers = f.max_registers;
        std::copy(f.max_threads.begin(), f.max_threads.end(), out.max_threads);
        std::copy(f.required_threads.begin(), f.required_threads.end(), out.required_threads);
        std::copy(f.required_cluster.begin(), f.required_cluster.end(), out.required_cluster);
        for (int id : f.params) {
            const Variable& v = f.variables[static_cast<size_t>(id)];
            uint32_t at = place(v, f.is_entry ? out.param_bytes : lane_bytes_);
            if (f.is_entry)
                out.params.push_back({v.name, v.type, at, static_cast<uint32_t>(v.size), v.align});
            else
                out.param_offsets.push_back(at), out.param_sizes.push_back(static_cast<uint32_t>(v.size));
        }
        for (int id : f.returns) {
            const Variable& v = f.variables[static_cast<size_t>(id)];
            out.return_offsets.push_back(place(v, lane_bytes_));
            out.return_sizes.push_back(static_cast<uint32_t>(v.size));
        }
    }
}

void Builder::layout_function(int index) {
    const FunctionAst& f = ast.functions[static_cast<size_t>(index)];
    Function& out = program->functions[static_cast<size_t>(index)];
    local_offsets.assign(f.variables.size(), 0);
    uint32_t shared = f.is_entry ? common_shared_ : shared_base;
    if (!f.is_entry) {  // the same walk as layout_module's, up to this function
        shared = shared_base;
        for (const Variable& v : ast.variables)
            if (v.space == Space::Shared && v.size) place(v, shared);
        for (int i = 0; i < index; i++)
            if (!ast.functions[static_cast<size_t>(i)].is_entry)
                for (const Variable& v : ast.functions[static_cast<size_t>(i)].variables)
                    if (v.space == Space::Shared) place(v, shared);
    }
    for (size_t i = 0; i < f.variables.size(); i++) {
        const Variable& v = f.variables[i];
        auto param = std::find(f.params.begin(), f.params.end(), static_cast<int>(i));
        auto result = std::find(f.returns.begin(), f.returns.end(), static_cast<int>(i));
        if (v.space == Space::Shared) {
            if (v.size) local_offsets[i] = place(v, shared);
            out.dynamic_align = std::max(out.dynamic_align, v.align);
        } else if (param != f.params.end()) {
            size_t k = static_cast<size_t>(param - f.params.begin());
            local_offsets[i] = f.is_entry ? out.params[k].offset : out.param_offsets[k];
        } else if (result != f.returns.end()) {
            local_offsets[i] = out.return_offsets[static_cast<size_t>(result - f.returns.begin())];
        } else if (v.space == Space::Param || v.space == Space::Local) {
            local_offsets[i] = place(v, lane_bytes_);
        }
    }
    for (const Variable& v : ast.variables)
        if (v.space == Space::Shared) out.dynamic_align = std::max(out.dynamic_align, v.align);
    out.static_shared = shared;
}

void Builder::build_function(int index) {
    function = index;
    const FunctionAst& f = function_ast();
    layout_function(index);
    Function& out = program->functions[static_cast<size_t>(index)];
    out.first = function_start = static_cast<uint32_t>(code.size());
    first_register = static_cast<int>(registers.size());
    for (const FunctionAst::Register& r : f.registers) registers.push_back({r.type, false, false});
    if (!f.is_entry) {
        registers.push_back({Type::U32, true, false});
        out.return_pc = static_cast<Ref>(registers.size()) - 1;
    }
    const OpTable& table = op_table();
    auto build = [&](const Statement& s) {
        code.emplace_back();
        current = &code.back();
        size_t dot = s.opcode.find('.');
        auto op = table.find(s.opcode.substr(0, dot));
        if (op == table.end()) fail_at(ErrorKind::Unsupported, "unknown instruction '" + std::string(s.opcode) + "'", *this, s);
        Decode decode(*this, s);
        op->second(decode);
        code.back().inst = decode.inst;
        code.back().reads = std::move(decode.reads);
        code.back().writes = std::move(decode.writes);
        current = nullptr;
    };
    for (const Statement& s : f.body) build(s);
    Statement end;  // falling off the end returns
    end.opcode = "ret";
    end.line = f.body.empty() ? f.line : f.body.back().line;
    build(end);
    out.last = static_cast<uint32_t>(code.size());
}

void Builder::refuse_recursion() const {
    // 0 unseen, 1 on the path, 2 done.
    std::vector<int> state(program->functions.size(), 0);
    std::vector<std::set<int>> callees(program->functions.size());
    for (size_t i = 0; i < program->functions.size(); i++)
        for (uint32_t pc = program->functions[i].first; pc < program->functions[i].last; pc++)
            if (code[pc].inst.klass == Class::Control && code[pc].inst.extra) {
                int callee = static_cast<const CallTarget*>(code[pc].inst.extra)->function;
                if (callee >= 0) callees[i].insert(callee);
            }
    std::function<void(int)> visit = [&](int f) {
        state[static_cast<size_t>(f)] = 1;
        for (int g : callees[static_cast<size_t>(f)]) {
            if (state[static_cast<size_t>(g)] == 1) {
                Place place;
                place.kernel = program->functions[static_cast<size_t>(g)].name;
                throw Error(ErrorKind::Unsupported, "recursive calls (registers are laid out statically)", place);
            }
            if (state[static_cast<size_t>(g)] == 0) visit(g);
        }
        state[static_cast<size_t>(f)] = 2;
    };
    for (size_t f = 0; f < state.size(); f++)
        if (state[f] == 0) visit(static_cast<int>(f));
}

std::shared_ptr<Program> Builder::build() {
    layout_module();
    for (size_t i = 0; i < ast.functions.size(); i++)
        if (ast.functions[i].has_body) build_function(static_cast<int>(i));
    refuse_recursion();
    program->virtual_registers = static_cast<uint32_t>(registers.size());
    allocate_registers(*this);
    program->local_bytes = round_up(lane_bytes_, 16);
    program->variables = ast.variables;
    program->ast.files = ast.files;
    program->ast.sources = ast.sources;
    std::map<std::pair<uint32_t, uint32_t>, uint32_t> places;
    uint32_t before = 0;
    for (Inst& inst : program->code) {
        const SourceLine& own = ast.sources[inst.source];
        uint32_t caller = own.inlined_at ? own.inlined_at : inst.source;
        const SourceLine& at = ast.sources[caller];
        inst.place = before = at.line ? places.try_emplace({at.file, at.line}, caller).first->second : before;
    }
    return program;
}

std::shared_ptr<const Program> load(std::string text) { return Builder(parse(std::move(text))).build(); }

}  // namespace dsv3::emulator
