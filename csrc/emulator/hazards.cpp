// Checks of registers, for the few instructions that need them: registers that a wgmma in flight reads or writes, and
// registers that hold bytes nobody wrote.

#include "machine.hpp"

namespace dsv3::emulator {
namespace {

size_t unit(const Program& p, uint32_t word) { return (word - p.predicate_words) / 32; }

}  // namespace

void Machine::slow_checks_before(Context& c, const Inst& inst) {
    if (inst.klass == Class::Wgmma) return;
    const Program& p = *c.w.cta->launch->program;
    const uint32_t* touched = p.touched.data() + inst.touched;
    for (uint32_t i = 0; i < uint32_t{inst.reads} + inst.writes; i++) {
        if (touched[i] < p.predicate_words) continue;
        size_t u = unit(p, touched[i]);
        bool writes = i >= inst.reads;
        if (inst.touches_wgmma) {
            if (c.w.wgmma.writing[u])
                c.fail(ErrorKind::Hazard, std::string(writes ? "writes" : "reads") + " an accumulator register of a wgmma in flight, before wgmma.wait_group");
            if (writes && c.w.wgmma.reading[u]) c.fail(ErrorKind::Hazard, "writes a register that a wgmma in flight reads as A, before wgmma.wait_group");
            // A mov hands on what its source is: the compiler may place the copies of operands behind the fence.
            bool moves = inst.propagates && !inst.selects;
            bool clean = moves && (inst.reads == 0 || touched[0] < p.predicate_words || !c.w.wgmma.dirty[unit(p, touched[0])]);
            if (writes && !clean) c.w.wgmma.dirty[u] = 1;
        }
        if (!writes && !inst.propagates && (c.w.poison[u] & c.mask))
            c.fail(ErrorKind::Hazard, "uses a value loaded from bytes that nobody wrote", __builtin_ctz(c.w.poison[u] & c.mask));
    }
}

void Context::mark_unwritten(Ref r, uint32_t lanes) const {
    uint32_t& at = w.poison[unit(*w.cta->launch->program, static_cast<uint32_t>(r))];
    w.poisoned -= at != 0;
    at = (at & ~mask) | (lanes & mask);
    w.poisoned += at != 0;
}

/// Results of what only moves values are as unwritten as their sources; any other result is clean.
void Machine::slow_checks_after(Context& c, const Inst& inst) {
    if (!c.w.poisoned || inst.klass == Class::Wgmma || inst.klass == Class::Memory) return;
    const Program& p = *c.w.cta->launch->program;
    const uint32_t* touched = p.touched.data() + inst.touched;
    uint32_t mark = 0;
    auto of = [&](Ref r) { return r >= 0 && static_cast<uint32_t>(r) >= p.predicate_words ? c.w.poison[unit(p, static_cast<uint32_t>(r))] : 0u; };
    if (inst.selects) {
        uint32_t chosen = inst.flags ? ~c.pred(inst.a[3]) : c.pred(inst.a[3]);
        mark = (of(inst.a[1]) & chosen) | (of(inst.a[2]) & ~chosen);
    } else if (inst.propagates) {
        for (uint32_t i = 0; i < inst.reads; i++) mark |= of(static_cast<Ref>(touched[i]));
    }
    for (uint32_t i = inst.reads; i < uint32_t{inst.reads} + inst.writes; i++) {
        if (touched[i] < p.predicate_words) continue;
        c.mark_unwritten(static_cast<Ref>(touched[i]), mark);
    }
}

}  // namespace dsv3::emulator
