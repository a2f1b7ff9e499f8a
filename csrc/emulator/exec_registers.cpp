// setmaxnreg: warpgroups of a block hand registers to each other through the block's pool.

#include <algorithm>

#include "lanes.hpp"

namespace dsv3::emulator {
namespace {

constexpr uint32_t register_file = 65536;  // of an SM
constexpr uint32_t most_registers = 255;   // that a thread's code can name; 256 are then allotted
constexpr uint32_t granule = 8, warpgroup_threads = 128, warps_of_group = 4;

uint64_t volume(const uint32_t* d) { return uint64_t{d[0]} * d[1] * d[2]; }
uint32_t allotted(uint32_t registers) { return (registers + granule - 1) / granule * granule; }

/// The warps of a warp's warpgroup but itself.
template <class F>
void each_other(Warp& w, F f) {
    uint32_t first = w.number / warps_of_group * warps_of_group;
    for (uint32_t k = first; k < first + warps_of_group && k < w.cta->warps.size(); k++)
        if (k != w.number) f(*w.cta->warps[k]);
}

/// The instruction is the warpgroup's: its warps execute the same ones, and meet between one and the next.
void check_group(Context& c, const Inst& i) {
    Warp& w = c.w;
    size_t n = w.register_changes.size();
    each_other(w, [&](Warp& other) {
        std::string who = "warp " + std::to_string(other.number) + " of its warpgroup";
        const std::vector<Warp::RegisterChange>& theirs = other.register_changes;
        if (theirs.size() > n && theirs[n].inst != &i)
            c.fail(ErrorKind::Hazard, who + " executes another setmaxnreg, at PTX line " + std::to_string(theirs[n].inst->line));
        if (n == 0) return;
        int lane = __builtin_ctz(c.mask);
        bool met = theirs.size() >= n && (!c.checks || w.known[static_cast<size_t>(lane)].generic.knows(other.agent, lane, theirs[n - 1].time));
        if (!met) c.fail(ErrorKind::Hazard, "no barrier with " + who + " since the setmaxnreg before it");
    });
}

Flow set_registers(Context& c, const Inst& i) {
    Warp& w = c.w;
    Cta& cta = *w.cta;
    uint32_t now = w.register_limit, next = static_cast<uint32_t>(i.imm);
    if (!now) return Flow::Next;
    bool increases = i.flags;
    if (c.group->stage == 0) {
        check_group(c, i);
        if (increases ? next < now : next > now)
            c.fail(ErrorKind::Hazard, "to " + std::to_string(next) + " registers a thread, but the warp has " + std::to_string(now));
    }
    if (increases && cta.free_registers < (next - now) * 32) {
        c.group->stage = 1;
        return c.block(Wait::Registers, cta.id, [&cta, now, next] {
            return std::to_string((next - now) * 32) + " registers to go from " + std::to_string(now) + " to " + std::to_string(next) +
                   " a thread: " + std::to_string(cta.free_registers) + " are free in its block, whose " +
                   std::to_string(cta.warps.size()) + " warps began with " + std::to_string(cta.launch->registers) + " a thread";
        });
    }
    c.group->stage = 0;
    if (increases && next > now) {
        c.m.wait_until(w, i, cta.registers_freed_at, {Wait::Registers, cta.id});
        cta.free_registers -= (next - now) * 32;
    } else if (next < now) {
        cta.registers_freed_at = std::max(cta.registers_freed_at, w.cycle);
        cta.free_registers += (now - next) * 32;
    }
    w.register_limit = next;
    w.register_changes.push_back({&i, w.now});
    w.effects++;
    c.m.wake(Wait::Registers, cta.id);
    return Flow::Yield;
}

}  // namespace

/// Registers a thread at entry, as ptxas (of CUDA 13) fixes them when a kernel holds setmaxnreg: .maxnreg, else what the
/// launch bounds leave to each of .minnctapersm blocks of .maxntid threads (counted in whole warpgroups), rounded down
/// to a multiple of 8; never more than the largest setmaxnreg.inc asks for. 0 without either bound: ptxas then ignores
/// setmaxnreg, and so does the machine. What the code itself needs is unknown in PTX and does not enter.
uint32_t registers_at_entry(const Function& f) {
    uint32_t limit = f.max_registers;
    uint64_t threads = std::max(volume(f.max_threads), volume(f.required_threads));
    if (!limit) {
        if (!f.min_ctas || !threads || threads > 1024) return 0;
        uint64_t block = (threads + warpgroup_threads - 1) / warpgroup_threads * warpgroup_threads;
        limit = static_cast<uint32_t>(register_file / (block * f.min_ctas)) / granule * granule;
    }
    limit = std::min(limit, most_registers);
    if (f.largest_increase) limit = std::min(limit, f.largest_increase);
    return allotted(limit);
}

void check_register_changes(Machine& m, Cta& cta) {
    for (auto& w : cta.warps)
        each_other(*w, [&](Warp& other) {
            if (w->register_changes.size() < other.register_changes.size())
                m.fail(ErrorKind::Hazard, "warp " + std::to_string(w->number) + " of its warpgroup ended without executing it",
                       other, *other.register_changes.back().inst, -1);
        });
}

void register_registers(OpTable& t) {
    t["setmaxnreg"] = [](Decode& d) {
        bool increases = d.take("inc");
        if (!increases && !d.take("dec")) d.unsupported("without .inc or .dec");
        if (!d.take("sync") || !d.take("aligned") || d.take_type() != Type::U32) d.unsupported("of this form");
        d.expect_count(1, 1);
        uint64_t n = d.literal(0);
        if (n < 24 || n > 256 || n % granule) d.malformed("takes 24 to 256 registers in steps of 8, got " + std::to_string(n));
        d.inst.imm = static_cast<int64_t>(n);
        d.inst.flags = increases;
        uint32_t& largest = d.builder.program->functions[static_cast<size_t>(d.builder.function)].largest_increase;
        if (increases) largest = std::max(largest, static_cast<uint32_t>(n));
        d.inst.convergent = true;
        d.finish(set_registers, Class::Control);
    };
}

}  // namespace dsv3::emulator
