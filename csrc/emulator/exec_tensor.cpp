// cp.async.bulk.tensor and the instructions that edit tensor maps.

#include "copy.hpp"
#include "mbarrier.hpp"
#include "ordering.hpp"

namespace dsv3::emulator {
namespace {

struct TensorOp {
    int rank = 0;
    bool wide_to = false, wide_map = false, wide_barrier = false;
    int64_t to_offset = 0, map_offset = 0, barrier_offset = 0;
    Space to = Space::SharedCluster;
    bool multicast = false;
    int reduce = -1;
    // tensormap.replace
    Space space = Space::Generic;
    TensorMapField field{};
    bool wide_value = false;
};

uint64_t at(const Context& c, Ref r, bool wide, int64_t offset, int l) {
    uint64_t a = c.value(r, l, wide) + static_cast<uint64_t>(offset);
    return wide ? a : static_cast<uint32_t>(a);
}

/// Reads and checks the tensor map at a generic address; the engine reads it as long as the copy runs.
void read_map(Context& c, Copy& copy, uint64_t address, int rank, int l) {
    Target t = c.locate(Space::Generic, address, kTensorMapBytes, 64, l, false);
    if (!TensorMap::decode(t.data, &copy.map)) c.fail(ErrorKind::MemoryAccess, "the address holds no tensor map", l);
    std::string wrong = copy.map.why_invalid();
    if (!wrong.empty()) c.fail(ErrorKind::MemoryAccess, "invalid tensor map: " + wrong, l);
    if (copy.map.rank != rank)
        c.fail(ErrorKind::MemoryAccess, "the tensor map has " + std::to_string(copy.map.rank) + " dimensions, the instruction " + std::to_string(rank), l);
}
void check_map(Context& c, Copy& copy, uint64_t address, int l) {
    if (!c.checks) return;
    Target t = c.locate(Space::Generic, address, kTensorMapBytes, 64, l, false);
    if (!t.shadow) return;
    Accessor by{{&copy.knowledge}, 1, copy.read_access, 0, true, true};
    Conflict conflict = t.shadow->read(c.m.log, by, t.offset, kTensorMapBytes);
    if (conflict.found && conflict.missing_fence)
        c.fail(ErrorKind::Hazard, "stale tensor map: it was written by " + c.m.place_of(c.m.log[conflict.other], conflict.other_lane) +
               " and no fence.proxy.tensormap release and acquire lie between", l);
    if (conflict.found) c.race(conflict, t, false, l);
}

void coordinates(const Context& c, const Inst& i, int rank, int l, int32_t* out) {
    for (int k = 0; k < rank; k++) out[k] = static_cast<int32_t>(c.src(i.list[k])[l]);
}
void make_chunks(Copy& copy, const int32_t* at, uint32_t shared) {
    std::vector<TensorChunk> boxes = box_chunks(copy.map, at, shared);
    copy.chunks.reserve(boxes.size());
    for (const TensorChunk& b : boxes) copy.chunks.push_back({b.global, b.shared, b.bytes, b.in_bounds});
}
uint32_t span_bytes(const std::vector<Copy::Chunk>& chunks, uint32_t base) {
    uint32_t end = base;
    for (const Copy::Chunk& x : chunks) end = std::max(end, x.shared + x.bytes);
    return end - base;
}

/// a[0] destination, a[1] map, a[3] mbarrier, a[4] block mask; the list holds the coordinates.
Flow tensor_load(Context& c, const Inst& i) {
    const TensorOp& op = *static_cast<const TensorOp*>(i.extra);
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        auto copy = std::make_unique<Copy>(c, i, l);
        uint64_t map = at(c, i.a[1], op.wide_map, op.map_offset, l);
        read_map(c, *copy, map, op.rank, l);
        Target to = c.locate(op.to, at(c, i.a[0], op.wide_to, op.to_offset, l), 16, 128, l, true);
        Target barrier = barrier_of(c, Space::SharedCluster, at(c, i.a[3], op.wide_barrier, op.barrier_offset, l), l, copy->knowledge);
        if (barrier.cta != to.cta) c.fail(ErrorKind::MemoryAccess, "the mbarrier lies in another block than the destination", l);
        int32_t x[kMaxRank];
        coordinates(c, i, op.rank, l, x);
        make_chunks(*copy, x, static_cast<uint32_t>(to.offset));
        if (to.offset + span_bytes(copy->chunks, static_cast<uint32_t>(to.offset)) > c.w.cta->launch->shared_total)
            c.fail(ErrorKind::MemoryAccess, "the box runs past the end of shared memory", l);
        std::vector<Cta*> targets{to.cta};
        if (op.multicast) {
            uint32_t mask = c.src(i.a[4])[l] & 0xFFFF;
            const std::vector<Cta*>& ctas = c.w.cta->cluster->ctas;
            if (mask == 0 || mask >> ctas.size())
                c.fail(ErrorKind::MemoryAccess, "block mask " + std::to_string(mask) + " in a cluster of " + std::to_string(ctas.size()), l);
            targets.clear();
            for (size_t k = 0; k < ctas.size(); k++) {
                if (!(mask >> k & 1)) continue;
                if (ctas[k]->exited) c.fail(ErrorKind::Hazard, "block rank " + std::to_string(k) + " of the cluster has exited", l);
                targets.push_back(ctas[k]);
            }
        }
        copy->to_shared(c, static_cast<uint32_t>(barrier.offset), targets);
        check_map(c, *copy, map, l);
        Copy& ref = *copy;
        ref.launch(c, std::move(copy));
    }
    return Flow::Yield;
}

Type reduction_type(Context& c, const TensorMap& map, int lane) {
    switch (map.type) {
        case ElementType::u32: return Type::U32;
        case ElementType::s32: return Type::S32;
        case ElementType::u64: return Type::U64;
        case ElementType::s64: return Type::S64;
        case ElementType::f16: return Type::F16;
        case ElementType::bf16: return Type::BF16;
        case ElementType::f32: return Type::F32;
        default: c.fail(ErrorKind::MemoryAccess, std::string("no reductions of ") + element_name(map.type), lane);
    }
}

/// a[0] map, a[1] source.
Flow tensor_store(Context& c, const Inst& i) {
    const TensorOp& op = *static_cast<const TensorOp*>(i.extra);
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        auto copy = std::make_unique<Copy>(c, i, l);
        uint64_t map = at(c, i.a[0], op.wide_map, op.map_offset, l);
        read_map(c, *copy, map, op.rank, l);
        Target from = c.locate(Space::Shared, at(c, i.a[1], op.wide_to, op.to_offset, l), 16, 128, l, false);
        int32_t x[kMaxRank];
        coordinates(c, i, op.rank, l, x);
        make_chunks(*copy, x, static_cast<uint32_t>(from.offset));
        if (from.offset + span_bytes(copy->chunks, static_cast<uint32_t>(from.offset)) > c.w.cta->launch->shared_total)
            c.fail(ErrorKind::MemoryAccess, "the box runs past the end of shared memory", l);
        copy->reduce = op.reduce;
        if (op.reduce >= 0) copy->reduce_type = reduction_type(c, copy->map, l);
        copy->to_global(c);
        check_map(c, *copy, map, l);
        Copy& ref = *copy;
        ref.launch(c, std::move(copy));
    }
    return Flow::Yield;
}

Flow tensor_prefetch(Context& c, const Inst& i) {
    const TensorOp& op = *static_cast<const TensorOp*>(i.extra);
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        Copy copy(c, i, l);
        read_map(c, copy, at(c, i.a[0], op.wide_map, op.map_offset, l), op.rank, l);
    }
    return Flow::Next;
}

void take_map(Decode& d, TensorOp& op, const Operand& o, Ref& ref) {
    if (o.kind != Operand::Address || o.items.size() != 2) d.malformed("expected [map, {coordinates}]");
    ref = d.address(o, &op.wide_map, &op.map_offset);
    std::vector<Ref> refs;
    for (const Operand& x : d.items(o.items[1], static_cast<size_t>(op.rank), static_cast<size_t>(op.rank))) refs.push_back(d.src(x, Type::S32));
    d.set_list(refs);
}

void decode_tensor(Decode& d) {
    TensorOp& op = d.extra<TensorOp>();
    bool reduces = d.take("reduce");
    if (!d.take("async") || !d.take("bulk") || !d.take("tensor")) d.unsupported("of this form");
    for (int r = 1; r <= kMaxRank; r++)
        if (d.take(std::to_string(r) + "d")) op.rank = r;
    if (op.rank == 0) d.unsupported("without a number of dimensions");
    bool prefetch = d.take("prefetch");
    d.take("tile");
    if (prefetch) {
        d.take("L2");
        d.take("global");
        const Operand* policy;
        take_cache_hints(d, &policy);
        d.expect_count(policy ? 2 : 1, policy ? 2 : 1);
        take_map(d, op, d.at(0), d.inst.a[0]);
        return d.finish(tensor_prefetch, Class::Async);
    }
    if (reduces) op.reduce = reduce_op(d);
    const Operand* policy;
    take_cache_hints(d, &policy);
    if (d.take("bulk_group")) {
        if (!d.take("global") || !d.take("shared::cta")) d.unsupported("of these state spaces");
        d.expect_count(policy ? 3 : 2, policy ? 3 : 2);
        take_map(d, op, d.at(0), d.inst.a[0]);
        d.inst.a[1] = d.address(d.at(1), &op.wide_to, &op.to_offset);
        return d.finish(tensor_store, Class::Async);
    }
    if (reduces || !d.take("mbarrier::complete_tx::bytes")) d.unsupported("of this form");
    op.to = d.take("shared::cluster") ? Space::SharedCluster : d.take("shared::cta") ? Space::Shared : Space::Generic;
    if (op.to == Space::Generic || !d.take("global")) d.unsupported("of these state spaces");
    op.multicast = d.take("multicast::cluster");
    size_t n = 3 + op.multicast + (policy != nullptr);
    d.expect_count(n, n);
    d.inst.a[0] = d.address(d.at(0), &op.wide_to, &op.to_offset);
    take_map(d, op, d.at(1), d.inst.a[1]);
    d.inst.a[3] = d.address(d.at(2), &op.wide_barrier, &op.barrier_offset);
    if (op.multicast) d.inst.a[4] = d.src(3, Type::U16);
    d.finish(tensor_load, Class::Async);
}

// ---- tensormap.replace, tensormap.cp_fenceproxy
Flow replace(Context& c, const Inst& i) {
    const TensorOp& op = *static_cast<const TensorOp*>(i.extra);
    uint32_t access = c.checks ? c.m.log_access(c.w, i, false, Scope::None) : 0;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        Target t = c.locate(op.space, at(c, i.a[0], op.wide_map, op.map_offset, l), kTensorMapBytes, 64, l, true);
        if (c.check_read(t, kTensorMapBytes, access, l)) c.fail(ErrorKind::Hazard, "edits a tensor map that nobody wrote", l);
        c.check_write(t, kTensorMapBytes, access, l);
        TensorMap map;
        if (!TensorMap::decode(t.data, &map)) c.fail(ErrorKind::MemoryAccess, "the address holds no tensor map", l);
        uint64_t value = op.wide_value ? get<uint64_t>(c.src(i.a[1]), l) : c.src(i.a[1])[l];
        std::string wrong = map.replace(op.field, static_cast<int>(i.imm), value);
        if (!wrong.empty()) c.fail(ErrorKind::MemoryAccess, wrong, l);
        if (t.region) c.m.settle(*t.region, t.offset, kTensorMapBytes);
        map.encode(t.data);
        c.changed(t, kTensorMapBytes);
    }
    return Flow::Next;
}
Flow copy_fence(Context& c, const Inst& i) {
    const TensorOp& op = *static_cast<const TensorOp*>(i.extra);
    int l = __builtin_ctz(c.mask);
    Target from = c.locate(Space::Shared, at(c, i.a[1], op.wide_to, op.to_offset, l), kTensorMapBytes, 128, l, false);
    Target to = c.locate(Space::Global, at(c, i.a[0], op.wide_map, op.map_offset, l), kTensorMapBytes, 128, l, true);
    if (c.checks) {
        uint32_t access = c.m.log_access(c.w, i, false, Scope::None);
        if (c.check_read(from, kTensorMapBytes, access, l)) c.fail(ErrorKind::Hazard, "copies a tensor map that nobody wrote", l);
        c.check_write(to, kTensorMapBytes, access, l);
    }
    c.m.settle(*to.region, to.offset, kTensorMapBytes);
    std::memcpy(to.data, from.data, kTensorMapBytes);
    c.changed(to, kTensorMapBytes);
    if (c.checks) {
        Knowledge k = c.w.release(c.mask);
        for (uint32_t rest = c.mask; rest; rest &= rest - 1) c.w.known[static_cast<size_t>(__builtin_ctz(rest))].map_released.join(k.generic);
    }
    return Flow::Yield;
}

void decode_tensormap(Decode& d) {
    TensorOp& op = d.extra<TensorOp>();
    if (d.take("cp_fenceproxy")) {
        for (const char* m : {"global", "shared::cta", "tensormap::generic", "release", "sync", "aligned"})
            if (!d.take(m)) d.unsupported("of this form");
        for (const char* s : {"cta", "cluster", "gpu", "sys"}) d.take(s);
        d.expect_count(3, 3);
        d.inst.a[0] = d.address(d.at(0), &op.wide_map, &op.map_offset);
        d.inst.a[1] = d.address(d.at(1), &op.wide_to, &op.to_offset);
        if (d.literal(2) != kTensorMapBytes) d.malformed("copies 128 bytes");
        d.inst.convergent = true;
        return d.finish(copy_fence, Class::Memory);
    }
    if (!d.take("replace") || !d.take("tile")) d.unsupported("of this form");
    struct Field { const char* name; TensorMapField field; bool ordinal; };
    static constexpr Field fields[] = {
        {"global_address", TensorMapField::global_address, false}, {"rank", TensorMapField::rank, false},
        {"box_dim", TensorMapField::box_dim, true}, {"global_dim", TensorMapField::global_dim, true},
        {"global_stride", TensorMapField::global_stride, true}, {"element_stride", TensorMapField::element_stride, true},
        {"elemtype", TensorMapField::elemtype, false}, {"interleave_layout", TensorMapField::interleave_layout, false},
        {"swizzle_mode", TensorMapField::swizzle_mode, false}, {"fill_mode", TensorMapField::fill_mode, false}};
    const Field* found = nullptr;
    for (const Field& f : fields)
        if (d.take(f.name)) found = &f;
    if (!found) d.unsupported("of this field");
    op.field = found->field;
    op.space = d.take_space(Space::Generic);
    if (!d.take("b1024")) d.unsupported("without .b1024");
    Type t = d.take_type();
    if (t != Type::B32 && t != Type::B64) d.unsupported("of this type");
    size_t n = found->ordinal ? 3 : 2;
    d.expect_count(n, n);
    d.inst.a[0] = d.address(d.at(0), &op.wide_map, &op.map_offset);
    d.inst.imm = found->ordinal ? static_cast<int64_t>(d.literal(1)) : 0;
    d.inst.a[1] = d.src(n - 1, t);
    op.wide_value = t == Type::B64;
    d.finish(replace, Class::Memory);
}

}  // namespace

void register_tensor(OpTable& t) {
    DecodeFn plain = t["cp"];
    t["cp"] = [=](Decode& d) { d.has("tensor") ? decode_tensor(d) : plain(d); };
    t["tensormap"] = decode_tensormap;
}

}  // namespace dsv3::emulator
