// wgmma: the tensor core of a warpgroup is an agent of its own. An instruction is issued when all four warps have come
// to it; the tensor core reads shared memory and registers, and writes the accumulators, at any later time, in order.

#include "lanes.hpp"
#include "numerics.hpp"
#include "tensor_core.hpp"

namespace dsv3::emulator {
namespace {

struct WgmmaOp {
    MmaConfig config;
    bool a_in_registers = false;
    bool a_transposed = false, b_transposed = false;  ///< MN-major
    uint32_t accumulators = 0;                        ///< registers of D, first in the list; then 4 of A
    bool scale_predicate = false, scale_negated = false;
};

size_t unit(const Program& p, Ref r) { return (static_cast<size_t>(r) - p.predicate_words) / 32; }

class TensorCore : public Operation {
  public:
    TensorCore(Cta& cta, size_t index) : cta_(cta), index_(index) {
        cta.operations++;
        cta.launch->operations++;
        group().active = true;
    }
    bool step(Machine& m) override {
        Warpgroup& g = group();
        execute(m);
        g.executed++;
        for (std::deque<WgmmaIssue>& q : g.queue) q.pop_front();
        for (uint32_t k = 0; k < 4; k++) m.wake(Wait::Wgmma, cta_.warps[index_ * 4 + k]->id);
        if (ready(g)) return false;
        g.active = false;
        cta_.operations--;
        cta_.launch->operations--;
        return true;
    }
    bool uses_shared(const Cta& cta, Issuer& by) const override {
        if (&cta != &cta_) return false;
        by = {cta_.warps[index_ * 4].get(), cta_.warpgroups[index_].queue[0].front().inst, -1};
        return true;
    }
    static bool ready(const Warpgroup& g) {
        for (const std::deque<WgmmaIssue>& q : g.queue)
            if (q.empty()) return false;
        return true;
    }

  private:
    Warpgroup& group() { return cta_.warpgroups[index_]; }
    Warp& warp(size_t k) { return *cta_.warps[index_ * 4 + k]; }

    [[noreturn]] void fail(Machine& m, ErrorKind kind, const std::string& what) {
        m.fail(kind, what, warp(0), *group().queue[0].front().inst, -1);
    }

    /// Reads an operand of `rows` by 32 bytes; marks rows that hold bytes nobody wrote.
    void load(Machine& m, uint64_t descriptor, bool mn_major, int rows, uint32_t access, uint8_t* tile, std::vector<uint8_t>& poison) {
        uint32_t addresses[2 * kMaxTileColumns];
        uint8_t chunks[2 * kMaxTileColumns * 16];
        operand_chunk_addresses(MatrixDescriptor::decode(descriptor), mn_major, rows, addresses);
        poison.assign(static_cast<size_t>(rows), 0);
        Warpgroup& g = group();
        Accessor by{{&g.queue[0].front().knowledge, &g.queue[1].front().knowledge, &g.queue[2].front().knowledge,
                     &g.queue[3].front().knowledge}, 4, access, 0};
        if (by.knowledge[0]->same(*by.knowledge[1]) && by.knowledge[0]->same(*by.knowledge[2]) && by.knowledge[0]->same(*by.knowledge[3]))
            by.count = 1;
        bool any_poison = m.options.checks && cta_.poison->any();
        for (int i = 0; i < 2 * rows; i++) {
            uint32_t a = addresses[i];
            if (a < shared_base || a + 16 > cta_.launch->shared_total)
                fail(m, ErrorKind::MemoryAccess, "its descriptor leads to shared offset " + std::to_string(a) + ", outside [" +
                     std::to_string(shared_base) + ", " + std::to_string(cta_.launch->shared_total) + ")");
            if (m.options.checks) {
                // Neighbouring chunks in one go.
                if (i == 0 || a != addresses[i - 1] + 16 || i % 8 == 0) {
                    int n = 1;
                    while (i + n < 2 * rows && (i + n) % 8 && addresses[i + n] == a + 16 * static_cast<uint32_t>(n)) n++;
                    Target t{cta_.shared.data() + a, a, cta_.shadow.get(), cta_.poison.get(), nullptr, &cta_, nullptr};
                    Conflict conflict = cta_.shadow->read(m.log, by, a, 16 * static_cast<uint32_t>(n));
                    if (conflict.found) fail(m, ErrorKind::Hazard, m.describe_race(conflict, t, false));
                }
                if (any_poison && cta_.poison->any(a, 16)) {
                    if (!mn_major) poison[static_cast<size_t>(i / 2)] = 1;
                    else for (int r = 0; r < 8; r++) poison[static_cast<size_t>(8 * (i % (rows / 8)) + r)] |= cta_.poison->any(a + 2 * static_cast<uint32_t>(r), 2);
                }
            }
            std::memcpy(chunks + 16 * i, cta_.shared.data() + a, 16);
        }
        assemble_operand(mn_major, rows, chunks, tile);
    }

    void execute(Machine& m) {
        Warpgroup& g = group();
        const WgmmaIssue& first = g.queue[0].front();
        const Inst& inst = *first.inst;
        const WgmmaOp& op = *static_cast<const WgmmaOp*>(inst.extra);
        const Program& program = *cta_.launch->program;
        for (size_t k = 1; k < 4; k++) {
            const WgmmaIssue& other = g.queue[k].front();
            if (other.inst != first.inst) m.fail(ErrorKind::Hazard, "the warps of a warpgroup execute different wgmma instructions", warp(k), *other.inst, -1);
            if (other.b_descriptor != first.b_descriptor || other.a_descriptor != first.a_descriptor || other.scale_d != first.scale_d)
                m.fail(ErrorKind::Hazard, "the warps of a warpgroup disagree on descriptors or scale-d", warp(k), inst, -1);
        }
        uint32_t access = 0;
        if (m.options.checks) {
            Access a{g.agent, g.executed + 1, static_cast<uint32_t>(&inst - program.code.data()), static_cast<int32_t>(warp(0).id),
                     cta_.launch->program_index, true, false, Scope::None, cta_.id, cta_.cluster->id, static_cast<uint32_t>(cta_.launch->device)};
            access = m.log.add(a);
        }
        int n = op.config.n;
        static thread_local uint8_t a[kTileRows * kTileBytes], b[kMaxTileColumns * kTileBytes];
        static thread_local float d[kTileRows * kMaxTileColumns];
        std::vector<uint8_t> a_poison, b_poison;
        load(m, first.b_descriptor, op.b_transposed, n, access, b, b_poison);
        if (op.a_in_registers) {
            a_poison.assign(kTileRows, 0);
            for (int t = 0; t < 128; t++)
                for (uint32_t k = 0; k < 4; k++) {
                    TilePosition at = a_fragment_position(t, static_cast<int>(k));
                    uint32_t v = warp(static_cast<size_t>(t / 32)).registers[static_cast<size_t>(inst.list[op.accumulators + k]) + static_cast<size_t>(t % 32)];
                    std::memcpy(a + at.row * kTileBytes + at.column, &v, 4);
                }
        } else {
            load(m, first.a_descriptor, op.a_transposed, kTileRows, access, a, a_poison);
        }
        MmaConfig config = op.config;
        config.scale_d = first.scale_d;
        config.exact_accumulate = m.options.exact_accumulate;
        bool half = config.d == AccumulatorType::f16;
        auto each_accumulator = [&](auto f) {
            for (uint32_t k = 0; k < op.accumulators; k++)
                for (int t = 0; t < 128; t++) {
                    TilePosition at = accumulator_position(config.d, t, static_cast<int>(k));
                    f(warp(static_cast<size_t>(t / 32)).registers[static_cast<size_t>(inst.list[k]) + static_cast<size_t>(t % 32)], d + at.row * n + at.column, at, t, k);
                }
        };
        if (config.scale_d)
            each_accumulator([&](uint32_t& r, float* x, TilePosition, int, uint32_t) {
                if (half) x[0] = f16_to_float(static_cast<uint16_t>(r)), x[1] = f16_to_float(static_cast<uint16_t>(r >> 16));
                else std::memcpy(x, &r, 4);
            });
        multiply_accumulate(config, a, b, d);
        each_accumulator([&](uint32_t& r, float* x, TilePosition, int, uint32_t) {
            if (half) r = float_to_f16(x[0]) | static_cast<uint32_t>(float_to_f16(x[1])) << 16;
            else std::memcpy(&r, x, 4);
        });
        // Every access is over, so the registers are free again once the warps have waited.
        if (m.options.checks) {
            bool any = false;
            for (uint8_t p : a_poison) any |= p;
            for (uint8_t p : b_poison) any |= p;
            bool had = false;
            for (size_t k = 0; k < 4; k++) had |= warp(k).poisoned != 0;
            if (any || (had && !config.scale_d)) {
                for (uint32_t k = 0; k < op.accumulators; k++)
                    for (size_t wi = 0; wi < 4; wi++) {
                        uint32_t mark = 0;
                        for (int l = 0; l < 32; l++) {
                            TilePosition at = accumulator_position(config.d, static_cast<int>(wi) * 32 + l, static_cast<int>(k));
                            if (a_poison[static_cast<size_t>(at.row)] || b_poison[static_cast<size_t>(at.column)] || (half && b_poison[static_cast<size_t>(at.column + 1)])) mark |= 1u << l;
                        }
                        Warp& w = warp(wi);
                        uint32_t& at = w.poison[unit(program, inst.list[k])];
                        w.poisoned -= at != 0;
                        at = config.scale_d ? at | mark : mark;
                        w.poisoned += at != 0;
                    }
            }
        }
        m.counts.wgmma++;
        // The tensor core's rate, or that of shared memory where N is small.
        uint64_t operand_bytes = static_cast<uint64_t>(n + (op.a_in_registers ? 0 : kTileRows)) * kTileBytes;
        uint64_t cycles = std::max(static_cast<uint64_t>(n) / timing::tensor_columns_per_cycle, operand_bytes / timing::shared_bytes_per_cycle);
        m.counts.shared_read += operand_bytes;
        uint64_t ready = g.ends.empty() ? 0 : g.ends.back();
        for (size_t k = 0; k < 4; k++) ready = std::max(ready, g.queue[k].front().issued_at);
        cycle = m.occupy(cta_, Trace::Kind::Tensor, ready, cycles, inst, index_).end;
        g.ends.push_back(cycle);
    }

    Cta& cta_;
    size_t index_;
};

Flow mma(Context& c, const Inst& i) {
    const WgmmaOp& op = *static_cast<const WgmmaOp*>(i.extra);
    Warp& w = c.w;
    Cta& cta = *w.cta;
    size_t index = w.number / 4;
    if (index * 4 + 4 > cta.warps.size()) c.fail(ErrorKind::Hazard, "needs a warpgroup of four warps");
    Warpgroup& g = cta.warpgroups[index];
    const Program& program = *cta.launch->program;
    auto uniform = [&](Ref r, const char* what) {
        uint64_t v = get<uint64_t>(c.src(r), __builtin_ctz(c.mask));
        for (uint32_t rest = c.mask; rest; rest &= rest - 1)
            if (get<uint64_t>(c.src(r), __builtin_ctz(rest)) != v) c.fail(ErrorKind::Hazard, std::string("lanes disagree on the ") + what, __builtin_ctz(rest));
        return v;
    };
    WgmmaIssue issue{&i, 0, uniform(i.a[1], "descriptor of B"), i.imm != 0, {}};
    if (!op.a_in_registers) issue.a_descriptor = uniform(i.a[0], "descriptor of A");
    if (op.scale_predicate) {
        uint32_t p = c.pred(i.a[2]) & c.mask;
        if (p && p != c.mask) c.fail(ErrorKind::Hazard, "lanes disagree on scale-d");
        issue.scale_d = (p != 0) != op.scale_negated;
    }
    if (c.checks) {
        for (uint32_t k = 0; k < i.list_size; k++) {
            size_t u = unit(program, i.list[k]);
            bool accumulator = k < op.accumulators;
            if (w.wgmma.dirty[u] && (!accumulator || issue.scale_d))
                c.fail(ErrorKind::Hazard, std::string(accumulator ? "accumulator" : "A") + " register " + std::to_string(accumulator ? k : k - op.accumulators) +
                       " was written since the last wgmma.fence");
            // Accumulators of instructions of one shape may follow each other.
            if (!accumulator && w.wgmma.writing[u]) c.fail(ErrorKind::Hazard, "reads as A a register that another wgmma in flight writes");
            if (accumulator && w.wgmma.reading[u]) c.fail(ErrorKind::Hazard, "writes a register that another wgmma in flight reads as A");
        }
        if (w.wgmma.group_end.empty() && w.wgmma.issued == 0 && !w.wgmma.fenced)
            c.fail(ErrorKind::Hazard, "no wgmma.fence before the warp's first wgmma");
        issue.knowledge = w.release(c.mask);
    }
    for (uint32_t k = 0; k < i.list_size; k++) (k < op.accumulators ? w.wgmma.writing : w.wgmma.reading)[unit(program, i.list[k])]++;
    w.wgmma.issued++;
    w.wgmma.in_flight.push_back({w.wgmma.issued, &i});
    w.effects++;
    issue.issued_at = w.cycle;
    g.queue[w.number % 4].push_back(std::move(issue));
    if (!g.active && TensorCore::ready(g)) c.m.start(std::make_unique<TensorCore>(cta, index));
    return Flow::Yield;
}

Flow fence(Context& c, const Inst&) {
    std::fill(c.w.wgmma.dirty.begin(), c.w.wgmma.dirty.end(), 0);
    c.w.wgmma.fenced = true;
    return Flow::Next;
}

Flow commit(Context& c, const Inst&) {
    c.w.wgmma.group_end.push_back(c.w.wgmma.issued);
    return Flow::Next;
}

Flow wait(Context& c, const Inst& i) {
    Warp& w = c.w;
    WgmmaState& s = w.wgmma;
    size_t groups = s.group_end.size(), open = static_cast<size_t>(i.imm);
    uint32_t needed = groups > open ? s.group_end[groups - 1 - open] : s.retired;
    Warpgroup& g = w.cta->warpgroups[w.number / 4];
    if (g.executed < needed) {
        return c.block(Wait::Wgmma, w.id, [&g, &w, needed] {
            std::string what = "wgmma " + std::to_string(needed) + " of its warpgroup, " + std::to_string(g.executed) + " are done";
            for (size_t k = 0; k < 4 && w.number / 4 * 4 + k < w.cta->warps.size(); k++)
                if (g.queue[k].empty()) what += "; warp " + std::to_string(w.number / 4 * 4 + k) + " has not issued the next";
            return what;
        });
    }
    const Program& program = *w.cta->launch->program;
    while (!s.in_flight.empty() && s.in_flight.front().first <= needed) {
        const Inst& done = *s.in_flight.front().second;
        const WgmmaOp& op = *static_cast<const WgmmaOp*>(done.extra);
        for (uint32_t k = 0; k < done.list_size; k++) (k < op.accumulators ? s.writing : s.reading)[unit(program, done.list[k])]--;
        s.in_flight.pop_front();
    }
    s.retired = std::max(s.retired, needed);
    if (needed) c.m.wait_until(w, i, g.ends[needed - 1], {Wait::Wgmma, needed});
    if (c.checks && needed) {
        Knowledge k;
        k.generic.add(g.agent, ~0u, needed);
        w.acquire(c.mask, k);
    }
    return Flow::Yield;
}

bool operand_type(Type t, OperandType* out) {
    switch (t) {
        case Type::E4M3: *out = OperandType::e4m3; return true;
        case Type::E5M2: *out = OperandType::e5m2; return true;
        case Type::F16: *out = OperandType::f16; return true;
        case Type::BF16: *out = OperandType::bf16; return true;
        case Type::TF32: *out = OperandType::tf32; return true;
        default: return false;
    }
}

void decode_mma(Decode& d) {
    WgmmaOp& op = d.extra<WgmmaOp>();
    std::string_view shape = d.take_prefix("m64n");
    size_t k = shape.find('k');
    if (shape.empty() || k == std::string_view::npos) d.unsupported("without a shape m64n..k..");
    int n = 0, depth = 0;
    for (char x : shape.substr(4, k - 4)) n = x >= '0' && x <= '9' && n < 1000 ? n * 10 + (x - '0') : 10000;
    for (char x : shape.substr(k + 1)) depth = x >= '0' && x <= '9' && depth < 1000 ? depth * 10 + (x - '0') : 10000;
    op.config.n = n;
    Type dt = d.take_type(), at = d.take_type(), bt = d.take_type();
    if (dt != Type::F32 && dt != Type::F16) d.unsupported("with this accumulator");
    op.config.d = dt == Type::F32 ? AccumulatorType::f32 : AccumulatorType::f16;
    if (!operand_type(at, &op.config.a) || !operand_type(bt, &op.config.b)) d.unsupported("with these operand types");
    std::string wrong = why_invalid(op.config);
    if (!wrong.empty()) d.unsupported(": " + wrong);
    if (depth * element_bytes(op.config.a) != kTileBytes) d.unsupported("of this depth");
    bool half_operands = op.config.a == OperandType::f16 || op.config.a == OperandType::bf16;
    op.accumulators = static_cast<uint32_t>(n / 2 / (dt == Type::F16 ? 2 : 1));
    op.a_in_registers = d.at(1).kind == Operand::Vector;
    // d, a, b, scale-d, imm-scale-a, imm-scale-b {, imm-trans-a}, imm-trans-b
    size_t count = 6 + (half_operands ? 1 + !op.a_in_registers : 0);
    d.expect_count(count, count);
    std::vector<Ref> list;
    for (const Operand& o : d.items(d.at(0), op.accumulators, op.accumulators)) {
        list.push_back(d.src(o, Type::B32));
        d.dst(o, Type::B32);
        d.dedicate(list.back());
    }
    if (op.a_in_registers)
        for (const Operand& o : d.items(d.at(1), 4, 4)) {
            list.push_back(d.src(o, Type::B32));
            if (list.back() < 0) d.malformed("A must be registers");
            d.dedicate(list.back());
        }
    else d.inst.a[0] = d.src(1, Type::B64);
    d.set_list(list);
    d.inst.a[1] = d.src(2, Type::B64);
    if (d.is_literal(d.at(3))) {
        d.inst.imm = d.literal(3) != 0;
    } else {
        op.scale_predicate = true;
        d.inst.a[2] = d.pred_src(d.at(3), &op.scale_negated);
    }
    auto sign = [&](size_t i) {
        int64_t v = static_cast<int64_t>(d.literal(i));
        if (v != 1 && v != -1) d.malformed("a scale is 1 or -1");
        return v == -1;
    };
    op.config.negate_a = sign(4);
    op.config.negate_b = sign(5);
    if (half_operands) {
        if (!op.a_in_registers) op.a_transposed = d.literal(6) != 0;
        op.b_transposed = d.literal(count - 1) != 0;
    }
    d.builder.program->uses_wgmma = true;
    d.inst.convergent = true;
    d.finish(mma, Class::Wgmma);
}

}  // namespace

void register_wgmma(OpTable& t) {
    t["wgmma"] = [](Decode& d) {
        bool m = d.take("mma_async"), f = !m && d.take("fence"), g = !m && !f && d.take("commit_group");
        bool w = !m && !f && !g && d.take("wait_group");
        if (!m && !f && !g && !w) d.unsupported("of this form");
        if (!d.take("sync") || !d.take("aligned")) d.unsupported("without .sync.aligned");
        if (m) return decode_mma(d);
        d.inst.convergent = true;
        d.expect_count(w, w);
        if (w) d.inst.imm = static_cast<int64_t>(d.literal(0));
        d.builder.program->uses_wgmma = true;
        d.finish(f ? fence : g ? commit : wait, Class::Wgmma);
    };
}

}  // namespace dsv3::emulator
