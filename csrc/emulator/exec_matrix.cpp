// ldmatrix and stmatrix.

#include "lanes.hpp"
#include "ordering.hpp"
#include "tensor_core.hpp"

namespace dsv3::emulator {
namespace {

struct MatrixOp : MemoryOp {
    bool transposed = false, is_load = false;
    int matrices = 1;
};

Flow matrix(Context& c, const Inst& i) {
    const MatrixOp& op = *static_cast<const MatrixOp*>(i.extra);
    const uint32_t* base = c.src(i.a[1]);
    uint32_t access = c.checks ? c.m.log_access(c.w, i, false, Scope::None) : 0;
    Context::Arrival arrival{};
    for (int k = 0; k < op.matrices; k++) {
        uint8_t rows[8][16], unwritten[8][16] = {};
        uint32_t regs[32];
        bool poison = false;
        Target t[8];
        for (int r = 0; r < 8; r++) {
            int lane = k * 8 + r;
            uint64_t a = (op.wide ? get<uint64_t>(base, lane) : base[lane]) + static_cast<uint64_t>(op.offset);
            t[r] = c.locate(op.space, op.wide ? a : static_cast<uint32_t>(a), 16, 16, lane, !op.is_load);
        }
        if (op.is_load) {
            for (int r = 0; r < 8; r++) {
                std::memcpy(rows[r], t[r].data, 16);
                if (!c.check_read(t[r], 16, access, k * 8 + r)) continue;
                poison = true;
                for (uint32_t b = 0; b < 16; b++) unwritten[r][b] = t[r].poison->any(t[r].offset + b, 1);
            }
            ldmatrix_distribute(rows, op.transposed, regs);
            std::memcpy(c.dst(i.list[k]), regs, sizeof regs);
            if (poison || c.w.poisoned) {
                uint32_t lanes = 0;
                ldmatrix_distribute(unwritten, op.transposed, regs);
                for (uint32_t l = 0; l < 32; l++) lanes |= uint32_t{regs[l] != 0} << l;
                c.mark_unwritten(i.list[k], lanes);
            }
        } else {
            std::memcpy(regs, c.src(i.list[k]), sizeof regs);
            stmatrix_collect(regs, op.transposed, rows);
            for (int r = 0; r < 8; r++) {
                c.check_write(t[r], 16, access, k * 8 + r);
                std::memcpy(t[r].data, rows[r], 16);
                c.changed(t[r], 16);
            }
        }
        Context eight = c;
        eight.mask = 0xFF;
        arrival = eight.access(t, 16, op.is_load, !op.is_load);
    }
    if (op.is_load)
        for (int k = 0; k < op.matrices; k++) c.m.expect_result(c.w, i.list[k], arrival.back, i);
    return Flow::Next;
}

void decode_matrix(Decode& d, bool is_load) {
    MatrixOp& op = d.extra<MatrixOp>();
    op.is_load = is_load;
    if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8")) d.unsupported("of this shape");
    op.matrices = d.take("x4") ? 4 : d.take("x2") ? 2 : d.take("x1") ? 1 : 0;
    if (op.matrices == 0) d.unsupported("without .x1, .x2 or .x4");
    op.transposed = d.take("trans");
    op.space = d.take_space(Space::Generic);
    if (d.take_type() != Type::B16) d.unsupported("of this type");
    d.expect_count(2, 2);
    d.inst.a[1] = d.address(d.at(is_load ? 1 : 0), &op.wide, &op.offset);
    std::vector<Ref> list;
    size_t n = static_cast<size_t>(op.matrices);
    const Operand& o = d.at(is_load ? 0 : 1);
    std::vector<Operand> one{o};
    for (const Operand& r : n == 1 && o.kind != Operand::Vector ? one : d.items(o, n, n)) list.push_back(is_load ? d.dst(r, Type::B32) : d.src(r, Type::B32));
    d.set_list(list);
    d.inst.convergent = true;
    d.finish(matrix, Class::Memory);
}

}  // namespace

void register_matrix(OpTable& t) {
    t["ldmatrix"] = [](Decode& d) { decode_matrix(d, true); };
    t["stmatrix"] = [](Decode& d) { decode_matrix(d, false); };
}

}  // namespace dsv3::emulator
