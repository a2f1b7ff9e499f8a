// Control flow: branches, calls, exit, sleep, and the instructions about launches.

#include <algorithm>

#include "lanes.hpp"
#include "network.hpp"

namespace dsv3::emulator {
namespace {

/// Moves the active lanes to `pc`; the others go on behind the instruction.
Flow go_to(Context& c, uint32_t pc) {
    if (c.group->mask == c.mask) {
        c.group->pc = pc - 1;
        return Flow::Next;
    }
    Group moved;
    moved.pc = pc;
    moved.mask = c.mask;
    c.group->mask &= ~c.mask;
    c.group->pc++;
    c.w.groups.push_back(std::move(moved));
    return Flow::Jump;
}

Flow bra(Context& c, const Inst& i) { return go_to(c, static_cast<uint32_t>(i.imm)); }

Flow exit_lanes(Context& c, const Inst&) {
    uint32_t leaving = c.mask;
    Group* g = c.group;
    g->mask &= ~leaving;
    g->pc++;
    if (g->mask == 0) c.w.groups.erase(c.w.groups.begin() + (g - c.w.groups.data()));
    c.m.lanes_exit(c.w, leaving);
    return Flow::Jump;
}

uint8_t* lane_memory(Context& c, int lane) {
    return c.w.local.data() + static_cast<size_t>(lane) * c.w.cta->launch->program->local_bytes;
}

void call_external(Context& c, const CallTarget& t, int lane) {
    const Program& p = *c.w.cta->launch->program;
    uint8_t* memory = lane_memory(c, lane);
    ExternCall call{c.m, c.w, lane, {}, {}};
    for (const CallTarget::Copy& copy : t.in) call.arguments.emplace_back(memory + copy.from, memory + copy.from + copy.size);
    if (!t.out.empty()) call.result.resize(t.out[0].size);
    size_t expected = call.result.size();
    c.m.externs.at(p.externals[static_cast<size_t>(t.external)])(call);
    if (call.result.size() != expected) c.fail(ErrorKind::Emulation, "the handler returned a value of another size", lane);
    if (expected) std::memcpy(memory + t.out[0].to, call.result.data(), expected);
}

Flow call(Context& c, const Inst& i) {
    const CallTarget& t = *static_cast<const CallTarget*>(i.extra);
    if (t.external >= 0) {
        const std::string& name = c.w.cta->launch->program->externals[static_cast<size_t>(t.external)];
        NetworkCall provided = c.m.externs.count(name) ? NetworkCall{} : network_call(name);
        if (provided) return provided(c, i, t);
        for (uint32_t rest = c.mask; rest; rest &= rest - 1) call_external(c, t, __builtin_ctz(rest));
        return Flow::Next;
    }
    const Function& f = c.w.cta->launch->program->functions[static_cast<size_t>(t.function)];
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        for (const CallTarget::Copy& copy : t.in)
            std::memmove(lane_memory(c, l) + copy.to, lane_memory(c, l) + copy.from, copy.size);
        c.dst(f.return_pc)[l] = c.group->pc + 1;
    }
    return go_to(c, f.first);
}

/// Lanes return to where they came from, which may be several places.
Flow ret(Context& c, const Inst& i) {
    const Program& p = *c.w.cta->launch->program;
    const uint32_t* back = c.src(i.a[1]);
    uint32_t pc = back[__builtin_ctz(c.mask)], same = 0;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1)
        if (back[__builtin_ctz(rest)] == pc) same |= rest & -rest;
    const CallTarget& t = *static_cast<const CallTarget*>(p.code[pc - 1].extra);
    for (uint32_t rest = same; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        for (const CallTarget::Copy& copy : t.out)
            std::memmove(lane_memory(c, l) + copy.to, lane_memory(c, l) + copy.from, copy.size);
    }
    if (same == c.mask) return go_to(c, pc);
    // The others stay at this instruction and return next.
    Group moved;
    moved.pc = pc;
    moved.mask = same;
    c.group->mask &= ~same;
    c.w.groups.push_back(std::move(moved));
    return Flow::Jump;
}

Flow trap(Context& c, const Inst&) { c.fail(ErrorKind::Emulation, "the kernel trapped", __builtin_ctz(c.mask)); }

Flow nanosleep(Context& c, const Inst& i) {
    if (c.group->stage == 1) {
        c.group->stage = 0;
        c.m.wait_until(c.w, i, c.group->token, {Wait::Sleep, 0});
        return Flow::Yield;
    }
    uint32_t longest = 0;
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) longest = std::max(longest, c.src(i.a[1])[__builtin_ctz(rest)]);
    c.group->stage = 1;
    c.group->until = c.m.time + longest;
    c.m.issue(c.w);
    c.group->token = c.w.cycle + timing::cycles(longest);
    return c.block(Wait::Sleep, 0, "its nanosleep to end");
}

Flow launch_dependents(Context& c, const Inst&) {
    if (!c.w.cta->triggered) c.w.cta->launch->triggered++;
    c.w.cta->triggered = true;
    Launch& l = *c.w.cta->launch;
    c.m.issue(c.w);
    l.triggered_at = std::max(l.triggered_at, c.w.cycle);
    return Flow::Yield;
}
Flow dependency_wait(Context& c, const Inst& i) {
    Launch& l = *c.w.cta->launch;
    if (l.predecessor && !l.predecessor->finished)
        return c.block(Wait::Dependency, static_cast<uint64_t>(l.device), "the launch before this one to finish");
    if (l.predecessor) c.m.wait_until(c.w, i, c.m.devices[static_cast<size_t>(l.device)].cycle, {Wait::Dependency, 0});
    c.w.acquire(c.mask, c.m.devices[static_cast<size_t>(l.device)].done);
    return Flow::Yield;
}
Flow nothing(Context&, const Inst&) { return Flow::Next; }

void decode_call(Decode& d) {
    d.take("uni");
    Builder& b = d.builder;
    CallTarget& t = d.extra<CallTarget>();
    size_t at = 0;
    bool returns = d.at(0).kind == Operand::List;
    if (returns) at++;
    const Operand& callee = d.at(at++);
    if (callee.kind != Operand::Name) d.unsupported("through a register");
    d.expect_count(at, at + 1);
    static const std::vector<Operand> none;
    const std::vector<Operand>& in = at < d.count() ? d.at(at).items : none;
    const std::vector<Operand>& out = returns ? d.at(0).items : none;
    if (at < d.count() && d.at(at).kind != Operand::List) d.unsupported("with a prototype");
    auto param = [&](const Operand& o) {
        bool kernel_parameter = b.function_ast().is_entry && o.id < static_cast<int>(b.function_ast().params.size());
        if (o.kind != Operand::Var || o.id < 0 || kernel_parameter || b.variable(o.id).space != Space::Param)
            d.unsupported("with an operand that is no .param variable");
        return CallTarget::Copy{b.offset_of(o.id), b.offset_of(o.id), static_cast<uint32_t>(b.variable(o.id).size)};
    };
    for (const Operand& o : in) t.in.push_back(param(o));
    for (const Operand& o : out) t.out.push_back(param(o));
    int f = b.find_function(callee.name);
    if (f < 0) d.malformed("no function '" + std::string(callee.name) + "'");
    if (b.ast.functions[static_cast<size_t>(f)].is_entry) d.malformed("calls a kernel");
    const Function& target = b.program->functions[static_cast<size_t>(f)];
    if (t.in.size() != target.param_offsets.size() || t.out.size() != target.return_offsets.size())
        d.malformed("another number of parameters than '" + target.name + "' has");
    if (b.ast.functions[static_cast<size_t>(f)].has_body) {
        t.function = f;
        for (size_t k = 0; k < t.in.size(); k++) {
            t.in[k].to = target.param_offsets[k];
            if (t.in[k].size != target.param_sizes[k]) d.malformed("a parameter of another size");
        }
        for (size_t k = 0; k < t.out.size(); k++) {
            t.out[k].from = target.return_offsets[k];
            if (t.out[k].size != target.return_sizes[k]) d.malformed("a result of another size");
        }
    } else {
        if (t.out.size() > 1) d.unsupported("with several results");
        t.external = b.find_external(callee.name);
    }
    d.finish(call, Class::Control);
}

}  // namespace

void register_control(OpTable& t) {
    t["bra"] = [](Decode& d) {
        d.take("uni");
        d.expect_count(1, 1);
        int target = d.at(0).kind == Operand::Name ? d.builder.label(d.at(0)) : -1;
        if (target < 0) d.malformed("no label '" + std::string(d.at(0).name) + "'");
        d.builder.current->target = target;
        d.builder.current->falls_through = d.statement.guard >= 0;
        d.inst.imm = target;
        d.finish(bra, Class::Control);
    };
    t["call"] = decode_call;
    auto leave = [](bool always) {
        return [=](Decode& d) {
            d.take("uni");
            d.expect_count(0, 0);
            d.builder.current->falls_through = d.statement.guard >= 0;
            bool entry = d.builder.function_ast().is_entry;
            if (!entry && !always) {
                d.inst.a[1] = d.builder.program->functions[static_cast<size_t>(d.builder.function)].return_pc;
                d.finish(ret, Class::Control);
            } else {
                d.finish(exit_lanes, Class::Control);
            }
        };
    };
    t["ret"] = leave(false);
    t["exit"] = leave(true);
    t["trap"] = [](Decode& d) { d.finish(trap, Class::Control); };
    t["brkpt"] = [](Decode& d) { d.finish(nothing, Class::Control); };
    t["nanosleep"] = [](Decode& d) {
        if (d.take_type() != Type::U32) d.unsupported("of this type");
        d.expect_count(1, 1);
        d.inst.a[1] = d.src(0, Type::U32);
        d.finish(nanosleep, Class::Control);
    };
    t["griddepcontrol"] = [](Decode& d) {
        d.expect_count(0, 0);
        if (d.take("wait")) return d.finish(dependency_wait, Class::Control);
        if (!d.take("launch_dependents")) d.unsupported("of this kind");
        d.finish(launch_dependents, Class::Control);
    };
}

}  // namespace dsv3::emulator
