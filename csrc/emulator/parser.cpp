#include <map>
#include <set>

#include "ast.hpp"
#include "error.hpp"
#include "lexer.hpp"

namespace dsv3::emulator {
namespace {

constexpr uint64_t max_registers = 1 << 20;
constexpr uint64_t max_variable_bytes = uint64_t{1} << 34;
constexpr int max_nesting = 64;

struct Symbol { enum Kind : uint8_t { Register, Var, Range } kind; int id; int count; };
using Scope = std::unordered_map<std::string_view, Symbol>;

class Parser {
  public:
    explicit Parser(std::string text) {
        module_.text = std::make_shared<const std::string>(std::move(text));
        tokens_ = tokenize(*module_.text);
    }

    ModuleAst run() {
        while (peek().kind != Token::End) module_item();
        return std::move(module_);
    }

  private:
    // ---- tokens
    const Token& peek(size_t ahead = 0) const { return tokens_[std::min(pos_ + ahead, tokens_.size() - 1)]; }
    const Token& take() { return tokens_[pos_ + 1 < tokens_.size() ? pos_++ : pos_]; }
    bool is(char c, size_t ahead = 0) const { return peek(ahead).kind == Token::Punct && peek(ahead).text[0] == c; }
    bool accept(char c) { return is(c) && (take(), true); }
    bool accept(std::string_view w) { return peek().kind == Token::Word && peek().text == w && (take(), true); }

    [[noreturn]] void fail(const std::string& what, ErrorKind kind = ErrorKind::Emulation) const {
        Place place;
        place.ptx_line = static_cast<int>(peek().line);
        place.kernel = function_ ? function_->name : "";
        throw Error(kind, (kind == ErrorKind::Emulation ? "malformed PTX: " : "") + what, place);
    }
    void expect(char c) {
        if (!accept(c)) fail(std::string("expected '") + c + "', found '" + std::string(peek().text) + "'");
    }
    std::string_view word() {
        if (peek().kind != Token::Word) fail("expected a name, found '" + std::string(peek().text) + "'");
        return take().text;
    }
    uint64_t integer() {
        bool minus = accept('-');
        if (peek().kind != Token::Int) fail("expected a number, found '" + std::string(peek().text) + "'");
        uint64_t value = take().bits;
        return minus ? 0 - value : value;
    }
    void skip_line() {
        for (uint32_t line = peek().line; peek().kind != Token::End && peek().line == line;) take();
    }

    // ---- module
    void module_item() {
        if (accept(';')) return;
        std::string_view w = word();
        if (w == ".version" || w == ".target" || w == ".address_size") return skip_line();
        if (w == ".file") return file();
        if (w == ".section") return section();
        if (w == ".pragma") return skip_statement();
        bool external = false;
        for (; w == ".visible" || w == ".weak" || w == ".extern" || w == ".common"; w = word()) external |= w == ".extern";
        if (w == ".entry" || w == ".func") return function(w == ".entry");
        Space space = variable_space(w);
        if (space == Space::Reg || space == Space::Local || space == Space::Param)
            fail("'" + std::string(w) + "' does not stand at the top of a module");
        declare_variables(space, external);
    }
    void file() {
        uint64_t index = integer();
        if (peek().kind != Token::String) fail("expected a file name");
        module_.files[static_cast<uint32_t>(index)] = std::string(take().text);
        while (accept(',')) integer();
    }
    void section() {
        word();
        expect('{');
        for (int depth = 1; depth > 0;) {
            if (peek().kind == Token::End) fail("section without end");
            depth += is('{') - is('}');
            take();
        }
    }
    void skip_statement() {
        while (!is(';')) {
            if (peek().kind == Token::End) fail("directive without ';'");
            take();
        }
        take();
    }

    // ---- variables
    Space variable_space(std::string_view w) const {
        if (w == ".global") return Space::Global;
        if (w == ".const") return Space::Const;
        if (w == ".shared") return Space::Shared;
        if (w == ".local") return Space::Local;
        if (w == ".param") return Space::Param;
        if (w == ".reg") return Space::Reg;
        fail("unknown directive '" + std::string(w) + "'", w[0] == '.' ? ErrorKind::Unsupported : ErrorKind::Emulation);
    }
    Type type_of(std::string_view w) const {
        Type type = w[0] == '.' ? parse_type(w.substr(1)) : Type::None;
        if (type == Type::None) fail("expected a type, found '" + std::string(w) + "'");
        return type;
    }
    /// After the space: `.align 4 .b8 name[16] = {...}`.
    Variable variable(Space space) {
        Variable v;
        v.space = space;
        std::string_view w = word();
        uint32_t lanes = 1;
        bool aligned = false;
        for (;; w = word()) {
            if (w == ".align") {
                uint64_t align = integer();
                if (align == 0 || align > 4096 || (align & (align - 1))) fail(".align takes a power of two up to 4096");
                v.align = static_cast<uint32_t>(align);
                aligned = true;
            } else if (w == ".v2" || w == ".v4") {
                lanes = w == ".v2" ? 2 : 4;
            } else if (w == ".ptr" || w == ".managed" || is_space_word(w)) {
                continue;  // attributes of a pointer parameter: no effect on execution
            } else {
                break;
            }
        }
        v.type = type_of(w);
        if (size_of(v.type) == 0) fail("a variable cannot be .pred");
        while (accept(".ptr") || accept(".global") || accept(".shared") || accept(".const") || accept(".local")) {}
        if (accept(".align")) integer();
        v.name = std::string(word());
        v.size = static_cast<uint64_t>(size_of(v.type)) * lanes;
        if (!aligned) v.align = static_cast<uint32_t>(v.size);
        bool open = false;
        while (accept('[')) {
            uint64_t n = is(']') ? (open = true, 0) : integer();
            if (n > max_variable_bytes || v.size * n > max_variable_bytes) fail("variable too large");
            v.size *= n;
            expect(']');
        }
        if (accept('=')) {
            uint64_t offset = 0;
            initialiser(v, offset);
            if (open) v.size = offset;
            if (offset > v.size) fail("more initial values than '" + v.name + "' holds");
        }
        return v;
    }
    static bool is_space_word(std::string_view w) {
        return w == ".global" || w == ".shared" || w == ".const" || w == ".local";
    }
    void initialiser(Variable& v, uint64_t& offset, int depth = 0) {
        if (depth > max_nesting) fail("initialiser nested too deep");
        if (accept('{')) {
            while (!is('}')) {
                initialiser(v, offset, depth + 1);
                if (!accept(',')) break;
            }
            return expect('}');
        }
        Variable::Initial item{offset, size_of(v.type), 0, {}};
        bool minus = accept('-');
        if (peek().kind == Token::Word) {
            std::string_view name = word();
            if (name == "generic") {
                expect('(');
                name = word();
                expect(')');
            }
            item.symbol = std::string(name);
            if (accept('+')) item.bits = integer();
            if (item.size != 8) fail("an address needs a 64-bit variable");
        } else if (peek().kind == Token::Float64 && v.type == Type::F32) {
            double d;
            __builtin_memcpy(&d, &take().bits, 8);
            float f = static_cast<float>(minus ? -d : d);
            uint32_t bits;
            __builtin_memcpy(&bits, &f, 4);
            item.bits = bits;
        } else if (peek().kind == Token::Int || peek().kind == Token::Float32 || peek().kind == Token::Float64) {
            item.bits = take().bits;
            if (minus) item.bits = 0 - item.bits;
        } else {
            fail("expected an initial value");
        }
        offset += static_cast<uint64_t>(item.size);
        v.initial.push_back(std::move(item));
    }
    void declare_variables(Space space, bool external) {
        Variable v = variable(space);
        v.is_extern = external;
        expect(';');
        int id = function_ ? static_cast<int>(function_->variables.size()) : ~static_cast<int>(module_.variables.size());
        if (!function_ && known_global(v.name)) return;
        std::vector<Variable>& list = function_ ? function_->variables : module_.variables;
        list.push_back(std::move(v));
        declare(list.back().name, {Symbol::Var, id, 0});
    }
    bool known_global(const std::string& name) const {
        for (const Variable& v : module_.variables)
            if (v.name == name) return true;
        return false;
    }
    /// Names are kept alive by `names_`: a variable's own string moves when its vector grows.
    void declare(std::string_view name, Symbol symbol) {
        std::string_view kept = *names_.insert(std::string(name)).first;
        Scope& scope = scopes_.back();
        if (scope.count(kept) && function_) fail("'" + std::string(name) + "' is declared twice");
        scope[kept] = symbol;
    }
    void declare_registers() {
        std::string_view w = word();
        if (w == ".v2" || w == ".v4") fail("vector registers", ErrorKind::Unsupported);
        Type type = type_of(w);
        if (type == Type::B128) fail("128-bit registers", ErrorKind::Unsupported);
        do {
            std::string_view name = word();
            uint64_t count = 1;
            bool range = accept('<');
            if (range) {
                count = integer();
                expect('>');
            }
            if (function_->registers.size() + count > max_registers) fail("too many registers");
            int first = static_cast<int>(function_->registers.size());
            for (uint64_t i = 0; i < count; i++)
                function_->registers.push_back({range ? std::string(name) + std::to_string(i) : std::string(name), type});
            declare(name, {range ? Symbol::Range : Symbol::Register, first, static_cast<int>(count)});
        } while (accept(','));
        expect(';');
    }

    // ---- functions
    void function(bool entry) {
        FunctionAst f;
        f.is_entry = entry;
        f.line = peek().line;
        function_ = &f;
        scopes_.emplace_back();
        scope_ids_ = {0};
        f.scope_parent = {-1};
        if (!entry && is('(')) parameters(f.returns);
        f.name = std::string(word());
        if (is('(')) parameters(f.params);
        directives(f);
        if (accept('{')) {
            f.has_body = true;
            body();
        } else {
            expect(';');
        }
        scopes_.pop_back();
        function_ = nullptr;
        for (FunctionAst& g : module_.functions) {
            if (g.name != f.name) continue;
            if (g.has_body && f.has_body) fail("function '" + f.name + "' is defined twice");
            if (!g.has_body) g = std::move(f);
            return;
        }
        module_.functions.push_back(std::move(f));
    }
    void parameters(std::vector<int>& list) {
        expect('(');
        while (!is(')')) {
            std::string_view w = word();
            if (w == ".reg") fail("register parameters of a function", ErrorKind::Unsupported);
            if (w != ".param") fail("expected .param");
            list.push_back(static_cast<int>(function_->variables.size()));
            function_->variables.push_back(variable(Space::Param));
            // `_` names the unused parameters of a prototype.
            if (function_->variables.back().name != "_")
                declare(function_->variables.back().name, {Symbol::Var, list.back(), 0});
            if (!accept(',')) break;
        }
        expect(')');
    }
    void directives(FunctionAst& f) {
        auto triple = [&](std::array<uint32_t, 3>& out) {
            out = {1, 1, 1};
            for (size_t i = 0; i < 3 && (i == 0 || accept(',')); i++) {
                uint64_t n = integer();
                if (n == 0 || n > 0x7FFFFFFF) fail("dimension out of range");
                out[i] = static_cast<uint32_t>(n);
            }
        };
        auto count = [&] {
            std::array<uint32_t, 3> out;
            triple(out);
            return out[0];
        };
        while (peek().kind == Token::Word) {
            std::string_view w = word();
            if (w == ".maxntid") triple(f.max_threads);
            else if (w == ".reqntid") triple(f.required_threads);
            else if (w == ".reqnctapercluster") triple(f.required_cluster);
            else if (w == ".minnctapersm") f.min_ctas = count();
            else if (w == ".maxnreg") f.max_registers = count();
            else if (w == ".maxclusterrank") count();
            else if (w == ".pragma") skip_statement();
            else if (w != ".noreturn" && w != ".explicitcluster")
                fail("unknown directive '" + std::string(w) + "' of a function", ErrorKind::Unsupported);
        }
    }
    void body() {
        for (int depth = 1; depth > 0;) {
            if (peek().kind == Token::End) fail("function without end");
            if (accept('{')) {
                if (++depth > max_nesting) fail("blocks nested too deep");
                scopes_.emplace_back();
                function_->scope_parent.push_back(scope_ids_.back());
                scope_ids_.push_back(static_cast<int>(function_->scope_parent.size()) - 1);
            } else if (accept('}')) {
                if (--depth == 0) break;
                scopes_.pop_back();
                scope_ids_.pop_back();
            } else if (!accept(';')) {
                statement();
            }
        }
    }
    void location() {
        std::array<uint64_t, 3> at{integer(), integer(), integer()};
        SourceLine source{static_cast<uint32_t>(at[0]), static_cast<uint32_t>(at[1]), 0};
        if (accept(',')) source.inlined_at = inlined_at();
        source_ = static_cast<uint32_t>(module_.sources.size());
        module_.sources.push_back(source);
        source_at_[at] = source_;
    }
    uint32_t inlined_at() {
        if (!accept("function_name")) fail("expected function_name");
        word();
        if (accept('+')) integer();
        expect(',');
        if (!accept("inlined_at")) fail("expected inlined_at");
        std::array<uint64_t, 3> at{integer(), integer(), integer()};
        auto it = source_at_.find(at);
        if (it != source_at_.end()) return it->second;
        module_.sources.push_back({static_cast<uint32_t>(at[0]), static_cast<uint32_t>(at[1]), 0});
        return static_cast<uint32_t>(module_.sources.size() - 1);
    }
    void statement() {
        if (peek().kind == Token::Word && is(':', 1)) {
            function_->labels.push_back({take().text, scope_ids_.back(), static_cast<uint32_t>(function_->body.size())});
            take();
            return;
        }
        if (peek().kind == Token::Word && peek().text[0] == '.') {
            std::string_view w = word();
            if (w == ".loc") return location();
            if (w == ".pragma") return skip_statement();
            if (w == ".branchtargets" || w == ".calltargets" || w == ".callprototype")
                fail("indirect branches and calls", ErrorKind::Unsupported);
            Space space = variable_space(w);
            if (space == Space::Reg) return declare_registers();
            return declare_variables(space, false);
        }
        Statement s;
        s.line = peek().line;
        s.source = source_;
        if (accept('@')) {
            s.guard_negated = accept('!');
            Operand p = operand();
            if (p.kind != Operand::Register || function_->registers[static_cast<size_t>(p.id)].type != Type::Pred)
                fail("a guard needs a predicate register");
            s.guard = p.id;
        }
        s.opcode = word();
        while (!is(';')) {
            s.operands.push_back(operand());
            if (!accept(',')) break;
        }
        expect(';');
        function_->body.push_back(std::move(s));
    }

    // ---- operands
    Operand operand(int depth = 0) {
        if (depth > max_nesting) fail("operand nested too deep");
        Operand o;
        if (is('{') || is('(')) {
            bool list = is('(');
            take();
            o.kind = list ? Operand::List : Operand::Vector;
            while (!is(list ? ')' : '}')) {
                o.items.push_back(operand(depth + 1));
                if (!accept(',')) break;
            }
            expect(list ? ')' : '}');
            return o;
        }
        if (accept('[')) {
            o.kind = Operand::Address;
            o.items.push_back(operand(depth + 1));
            while (is('+') || is('-')) {
                bool minus = is('-');
                if (!minus) take();
                o.offset += static_cast<int64_t>(integer());
            }
            if (accept(',')) o.items.push_back(operand(depth + 1));
            expect(']');
            return o;
        }
        if (accept('!')) {
            o = operand(depth + 1);
            o.negated = !o.negated;
            return o;
        }
        if (accept('-')) {
            o = operand(depth + 1);
            if (o.kind == Operand::Integer) o.bits = 0 - o.bits;
            else if (o.kind == Operand::Float32) o.bits ^= 0x80000000u;
            else if (o.kind == Operand::Float64) o.bits ^= uint64_t{1} << 63;
            else o.minus = !o.minus;
            return o;
        }
        const Token& t = take();
        if (t.kind == Token::Int || t.kind == Token::Float32 || t.kind == Token::Float64) {
            o.kind = t.kind == Token::Int ? Operand::Integer : t.kind == Token::Float32 ? Operand::Float32 : Operand::Float64;
            o.bits = t.bits;
        } else if (t.kind == Token::Word) {
            o = named(t.text);
        } else {
            fail("expected an operand, found '" + std::string(t.text) + "'");
        }
        if (accept('|')) {
            Operand pair;
            pair.kind = Operand::Pair;
            pair.items.push_back(std::move(o));
            pair.items.push_back(operand(depth + 1));
            return pair;
        }
        return o;
    }
    Operand named(std::string_view name) {
        Operand o;
        o.name = name;
        o.scope = scope_ids_.back();
        if (name == "_") return o;
        if (const Symbol* s = lookup(name, Symbol::Range, false)) {
            o.kind = s->kind == Symbol::Var ? Operand::Var : Operand::Register;
            o.id = s->id;
            return o;
        }
        size_t digits = name.size();
        while (digits > 0 && name[digits - 1] >= '0' && name[digits - 1] <= '9') digits--;
        if (digits < name.size() && name.size() - digits <= 7) {
            const Symbol* s = lookup(name.substr(0, digits), Symbol::Range, true);
            int index = std::stoi(std::string(name.substr(digits)));
            if (s && index < s->count) {
                o.kind = Operand::Register;
                o.id = s->id + index;
                return o;
            }
        }
        o.kind = name[0] == '%' || name == "WARP_SZ" ? Operand::Special : Operand::Name;
        return o;
    }
    const Symbol* lookup(std::string_view name, Symbol::Kind kind, bool equal) const {
        for (size_t i = scopes_.size(); i-- > 0;) {
            auto it = scopes_[i].find(name);
            if (it != scopes_[i].end() && (it->second.kind == kind) == equal) return &it->second;
        }
        return nullptr;
    }

    ModuleAst module_;
    std::vector<Token> tokens_;
    size_t pos_ = 0;
    FunctionAst* function_ = nullptr;
    std::vector<Scope> scopes_{1};
    std::vector<int> scope_ids_{0};
    std::set<std::string, std::less<>> names_;
    uint32_t source_ = 0;
    std::map<std::array<uint64_t, 3>, uint32_t> source_at_;  ///< by file, line and column
};

}  // namespace

std::string ModuleAst::source_text(uint32_t source) const {
    std::string text;
    for (; source; source = sources[source].inlined_at) {  // points backwards, so it ends
        auto file = files.find(sources[source].file);
        if (!text.empty()) text += " inlined at ";
        text += (file == files.end() ? "source" : file->second) + ":" + std::to_string(sources[source].line);
    }
    return text;
}

ModuleAst parse(std::string text) { return Parser(std::move(text)).run(); }

}  // namespace dsv3::emulator
