#include "decode.hpp"

#include <algorithm>

namespace dsv3::emulator {
namespace {

struct SpecialName { std::string_view name; Special kind; };
constexpr SpecialName special_names[] = {
    {"%tid.x", Special::TidX}, {"%tid.y", Special::TidY}, {"%tid.z", Special::TidZ},
    {"%ntid.x", Special::NtidX}, {"%ntid.y", Special::NtidY}, {"%ntid.z", Special::NtidZ},
    {"%ctaid.x", Special::CtaidX}, {"%ctaid.y", Special::CtaidY}, {"%ctaid.z", Special::CtaidZ},
    {"%nctaid.x", Special::NctaidX}, {"%nctaid.y", Special::NctaidY}, {"%nctaid.z", Special::NctaidZ},
    {"%laneid", Special::LaneId}, {"%warpid", Special::WarpId}, {"%nwarpid", Special::NwarpId},
    {"%smid", Special::SmId}, {"%nsmid", Special::NsmId}, {"%gridid", Special::GridId},
    {"%clusterid.x", Special::ClusterIdX}, {"%clusterid.y", Special::ClusterIdY}, {"%clusterid.z", Special::ClusterIdZ},
    {"%nclusterid.x", Special::NclusterIdX}, {"%nclusterid.y", Special::NclusterIdY},
    {"%nclusterid.z", Special::NclusterIdZ}, {"%cluster_ctaid.x", Special::ClusterCtaidX},
    {"%cluster_ctaid.y", Special::ClusterCtaidY}, {"%cluster_ctaid.z", Special::ClusterCtaidZ},
    {"%cluster_nctaid.x", Special::ClusterNctaidX}, {"%cluster_nctaid.y", Special::ClusterNctaidY},
    {"%cluster_nctaid.z", Special::ClusterNctaidZ}, {"%cluster_ctarank", Special::ClusterCtaRank},
    {"%cluster_nctarank", Special::ClusterNctaRank}, {"%is_explicit_cluster", Special::IsExplicitCluster},
    {"%lanemask_eq", Special::LaneMaskEq}, {"%lanemask_le", Special::LaneMaskLe}, {"%lanemask_lt", Special::LaneMaskLt},
    {"%lanemask_ge", Special::LaneMaskGe}, {"%lanemask_gt", Special::LaneMaskGt},
    {"%dynamic_smem_size", Special::DynamicSharedSize}, {"%total_smem_size", Special::TotalSharedSize},
    {"%aggr_smem_size", Special::AggrSharedSize}, {"WARP_SZ", Special::WarpSize}};

uint64_t float_bits_of(const Operand& o, Type type) {
    double d = 0;
    if (o.kind == Operand::Float32) {
        if (type == Type::F32) return o.bits;
        float f;
        uint32_t low = static_cast<uint32_t>(o.bits);
        std::memcpy(&f, &low, 4);
        d = f;
    } else {
        std::memcpy(&d, &o.bits, 8);
    }
    uint64_t bits = 0;
    if (type == Type::F64) {
        std::memcpy(&bits, &d, 8);
    } else {
        float f = static_cast<float>(d);
        std::memcpy(&bits, &f, 4);
    }
    return bits;
}

}  // namespace

Decode::Decode(Builder& b, const Statement& s) : statement(s), builder(b) {
    for (size_t at = s.opcode.find('.'); at != std::string_view::npos;) {
        size_t next = s.opcode.find('.', at + 1);
        modifiers_.push_back(s.opcode.substr(at + 1, next == std::string_view::npos ? next : next - at - 1));
        at = next;
    }
    inst.line = s.line;
    inst.source = s.source;
    if (s.guard >= 0) {
        inst.guard = b.first_register + s.guard;
        inst.guard_negated = s.guard_negated;
        reads.push_back(inst.guard);
    }
}

bool Decode::has(std::string_view m) const { return std::find(modifiers_.begin(), modifiers_.end(), m) != modifiers_.end(); }

bool Decode::take(std::string_view m) {
    auto it = std::find(modifiers_.begin(), modifiers_.end(), m);
    if (it == modifiers_.end()) return false;
    modifiers_.erase(it);
    return true;
}

Type Decode::try_type() {
    for (auto it = modifiers_.begin(); it != modifiers_.end(); ++it) {
        Type type = parse_type(*it);
        if (type == Type::None) continue;
        modifiers_.erase(it);
        return type;
    }
    return Type::None;
}

Type Decode::take_type() {
    Type type = try_type();
    if (type == Type::None) unsupported("without a type");
    return type;
}

std::string_view Decode::take_prefix(std::string_view prefix) {
    for (auto it = modifiers_.begin(); it != modifiers_.end(); ++it) {
        if (it->substr(0, prefix.size()) != prefix) continue;
        std::string_view found = *it;
        modifiers_.erase(it);
        return found;
    }
    return {};
}

Space Decode::take_space(Space otherwise) {
    static constexpr std::pair<std::string_view, Space> names[] = {
        {"global", Space::Global}, {"shared::cluster", Space::SharedCluster}, {"shared::cta", Space::Shared},
        {"shared", Space::Shared}, {"local", Space::Local}, {"param::entry", Space::Param},
        {"param::func", Space::Param}, {"param", Space::Param}, {"const", Space::Const}};
    for (auto& [name, space] : names)
        if (take(name)) return space;
    return otherwise;
}

const Operand& Decode::at(size_t i) const {
    if (i >= statement.operands.size()) malformed("too few operands");
    return statement.operands[i];
}

void Decode::expect_count(size_t least, size_t most) const {
    if (count() < least || count() > most)
        malformed("has " + std::to_string(count()) + " operands, expected " + std::to_string(least) +
                  (most > least ? " to " + std::to_string(most) : ""));
}

int Decode::register_size(const Operand& o) const {
    if (o.kind == Operand::Register) return size_of(builder.registers[static_cast<size_t>(builder.first_register + o.id)].type);
    if (o.kind == Operand::Special) return o.name == "%gridid" ? 8 : 4;
    return -1;
}

Ref Decode::constant(uint64_t bits, int size) { return builder.constant(bits, size); }

Ref Decode::src(const Operand& o, Type type) {
    if (type == Type::Pred) return pred_src(o, nullptr);
    int size = size_of(type), held = size == 8 ? 8 : 4;
    if (o.negated) malformed("'!' before an operand that is no predicate");
    if (o.minus) malformed("'-' before a register");
    switch (o.kind) {
        case Operand::Register: {
            int have = register_size(o);
            if (have == 0 || (have == 8) != (size == 8))
                malformed("register '" + std::string(o.name) + "' does not hold the type of the instruction");
            reads.push_back(builder.first_register + o.id);
            return reads.back();
        }
        case Operand::Special:
            for (const SpecialName& s : special_names) {
                if (s.name != o.name) continue;
                int id = builder.special(s.kind);
                if ((size_of(builder.registers[static_cast<size_t>(id)].type) == 8) != (size == 8))
                    malformed("'" + std::string(o.name) + "' has another size");
                return id;
            }
            unsupported("reads '" + std::string(o.name) + "', an unknown name");
        case Operand::Integer:
            if (type == Type::F32 || type == Type::F64) malformed("an integer where a floating-point value is expected");
            return constant(size >= 8 ? o.bits : o.bits & ((uint64_t{1} << (size * 8)) - 1), held);
        case Operand::Float32:
        case Operand::Float64:
            if (size != 4 && size != 8) malformed("a float literal for a type of 16 bits or less");
            return constant(float_bits_of(o, size == 8 ? Type::F64 : Type::F32), held);
        case Operand::Var:
            if (size < 4) malformed("an address needs 32 or 64 bits");
            return builder.variable_address(o.id, 0, held);
        default: break;
    }
    malformed("operand '" + std::string(o.name) + "' is not declared or not allowed here");
}

Ref Decode::dst(const Operand& o, Type type) {
    if (o.kind == Operand::Sink && o.items.empty()) {
        builder.registers.push_back({type, true, false});
        return static_cast<Ref>(builder.registers.size()) - 1;
    }
    if (o.kind != Operand::Register || o.negated || o.minus) malformed("the destination is no register");
    Type have = builder.registers[static_cast<size_t>(builder.first_register + o.id)].type;
    if ((have == Type::Pred) != (type == Type::Pred) || (size_of(have) == 8) != (size_of(type) == 8))
        malformed("register '" + std::string(o.name) + "' does not hold the type of the instruction");
    writes.push_back(builder.first_register + o.id);
    return writes.back();
}

Ref Decode::pred_src(const Operand& o, bool* negated) {
    if (o.kind != Operand::Register || register_size(o) != 0) malformed("expected a predicate register");
    if (o.negated && !negated) malformed("a negated predicate is not allowed here");
    if (negated) *negated = o.negated;
    reads.push_back(builder.first_register + o.id);
    return reads.back();
}

Ref Decode::address(const Operand& o, bool* wide, int64_t* offset) {
    if (o.kind != Operand::Address) malformed("expected an address in brackets");
    const Operand& base = o.items[0];
    *offset = o.offset;
    if (base.kind == Operand::Register) {
        *wide = register_size(base) == 8;
        return src(base, *wide ? Type::B64 : Type::B32);
    }
    if (base.kind == Operand::Integer) {
        *wide = true;
        return constant(base.bits, 8);
    }
    if (base.kind != Operand::Var) malformed("'" + std::string(base.name) + "' is not declared");
    *wide = true;
    return builder.variable_address(base.id, 0, 8);
}

uint64_t Decode::literal(size_t i) const {
    if (at(i).kind != Operand::Integer) malformed("operand " + std::to_string(i + 1) + " must be an integer literal");
    return at(i).bits;
}

const std::vector<Operand>& Decode::items(const Operand& o, size_t least, size_t most) const {
    if (o.kind != Operand::Vector || o.items.size() < least || o.items.size() > most)
        malformed("expected a vector of " + std::to_string(least) + (most > least ? " to " + std::to_string(most) : "") + " operands");
    return o.items;
}

void Decode::dedicate(Ref r) {
    Builder::Virtual& v = builder.registers[static_cast<size_t>(r)];
    v.dedicated = v.wgmma = true;
}

void Decode::set_list(const std::vector<Ref>& refs) {
    builder.program->lists.push_back(std::make_unique<Ref[]>(refs.size()));
    Ref* list = builder.program->lists.back().get();
    std::copy(refs.begin(), refs.end(), list);
    inst.list = list;
    inst.list_size = static_cast<uint32_t>(refs.size());
}

void Decode::own(std::shared_ptr<void> p) { builder.program->extras.push_back(std::move(p)); }

void Decode::finish(Execute execute, Class klass) {
    if (!modifiers_.empty()) unsupported("with '." + std::string(modifiers_.front()) + "'");
    inst.execute = execute;
    inst.klass = klass;
    // The opcode's text lives as long as the program; errors and traces show it.
    size_t end = statement.opcode.size();
    auto name = std::make_shared<std::string>(statement.opcode.substr(0, end));
    inst.name = name->c_str();
    own(name);
}

void Decode::unsupported(const std::string& what) const {
    fail_at(ErrorKind::Unsupported, "'" + std::string(statement.opcode) + "' " + what, builder, statement);
}

void Decode::malformed(const std::string& what) const {
    fail_at(ErrorKind::Emulation, "malformed PTX: '" + std::string(statement.opcode) + "': " + what, builder, statement);
}

}  // namespace dsv3::emulator
