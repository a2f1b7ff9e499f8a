// Virtual time: when things happen if warps and engines work side by side. It describes a run and decides nothing.

#include <algorithm>

#include "machine.hpp"

namespace dsv3::emulator {
namespace {

/// An unset row is made when it gets its first span.
constexpr uint32_t no_row = UINT32_MAX;

uint32_t row_of_warp(Trace& trace, Warp& w) {
    if (w.row == no_row) {
        const Cta& cta = *w.cta;
        const Launch& l = *cta.launch;
        w.row = static_cast<uint32_t>(trace.rows.size());
        trace.rows.push_back({l.device, cta.sm, static_cast<int>(w.number), l.id, l.function->name, {cta.index[0], cta.index[1], cta.index[2]}});
    }
    return w.row;
}

}  // namespace

/// Ends the slice of running that is open.
void Machine::close_slice(Warp& w) {
    if (w.cycle > w.slice_start && w.doing && !trace.full())
        trace.span(row_of_warp(trace, w), Trace::Kind::Run, w.slice_start, w.cycle, w.cta->launch->program, *w.doing);
    w.slice_start = w.cycle;
    w.doing = nullptr;
    w.votes = 0;
}

/// What `inst` waits for happened at `at`.
void Machine::wait_until(Warp& w, const Inst& inst, uint64_t at) {
    if (at <= w.cycle) return;
    close_slice(w);
    if (!trace.full()) trace.span(row_of_warp(trace, w), Trace::Kind::Wait, w.cycle, at, w.cta->launch->program, inst);
    w.cycle = w.slice_start = at;
}

Engine::Slot Machine::occupy(const Cta& cta, Trace::Kind kind, uint64_t ready, uint64_t cycles, const Inst& inst) {
    const Launch& l = *cta.launch;
    Device::Sm& sm = devices[static_cast<size_t>(l.device)].sms[cta.sm];
    bool tensor = kind == Trace::Kind::Tensor;
    Engine::Slot slot = (tensor ? sm.tensor_core : sm.copy_engine).reserve(ready, cycles);
    if (trace.full()) return slot;
    uint32_t& row = tensor ? sm.tensor_row : sm.copy_row;
    if (row == no_row) {
        row = static_cast<uint32_t>(trace.rows.size());
        trace.rows.push_back({l.device, cta.sm, tensor ? Trace::tensor_core : Trace::copy_engine, 0, "", {0, 0, 0}});
    }
    trace.span(row, kind, slot.start, slot.end, l.program, inst);
    return slot;
}

}  // namespace dsv3::emulator
