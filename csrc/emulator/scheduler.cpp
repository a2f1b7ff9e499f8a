// Which agent moves next. One thread runs everything; all freedom is in choose() and the seed.

#include <algorithm>

#include "network.hpp"

namespace dsv3::emulator {
namespace {

constexpr uint64_t first_jump = 1000, largest_jump = 4'000'000'000;
constexpr uint64_t max_jump_rounds = 600;
constexpr size_t max_listed = 64;

/// Follows `choices`, decides at synchronising steps only.
bool explores(const Options& options) { return options.schedule == "exhaustive" || options.schedule == "sequential"; }

}  // namespace

uint32_t Machine::choose(uint32_t n) {
    if (!explores(options)) return random.below(n);
    if (n < 2) return 0;
    size_t depth = choice_widths.size();
    choice_widths.push_back(n);
    return depth < options.choices.size() ? std::min(options.choices[depth], n - 1) : 0;
}

void Machine::queue(Warp& w) {
    if (w.queued || !w.runnable()) return;
    w.queued = true;
    runnable_.push_back(&w);
}

void Machine::start(std::unique_ptr<Operation> op) {
    op->priority = random.next() >> 1;
    operations_.push_back(std::move(op));
}

void Machine::wake(Wait wait, uint64_t key) {
    progress++;
    auto it = waiters_.find({wait, key});
    if (it == waiters_.end()) return;
    std::vector<Warp*> list = std::move(it->second);
    waiters_.erase(it);
    for (Warp* w : list) {
        for (Group& g : w->groups) {
            if (g.wait != wait || g.key != key) continue;
            if (wait == Wait::Spin) spinners--;
            g.wait = Wait::None;
        }
        queue(*w);
    }
}

void Machine::wake_watchers(uint64_t low, uint64_t high) {
    std::vector<uint64_t> keys;
    for (auto it = waiters_.lower_bound({Wait::Spin, 0}); it != waiters_.end() && it->first.first == Wait::Spin; ++it)
        for (const Warp* w : it->second)
            for (const Group& g : w->groups)
                if (g.wait == Wait::Spin && g.watch_low < high && low < g.watch_high) keys.push_back(it->first.second);
    for (uint64_t key : keys) wake(Wait::Spin, key);
}

/// Index into runnable warps, then operations, then late writes.
size_t Machine::pick() {
    size_t n = runnable_.size() + operations_.size();
    if (late_.size() > most_late || (!late_.empty() && steps - late_.front()->step > latest)) return n;
    if (options.schedule != "pct" && options.schedule != "timed") {
        // All late writes together are one agent, so that many of them do not crowd out the others.
        size_t all = n + !late_.empty();
        size_t i = options.schedule == "round_robin" ? turn_++ % all : choose(static_cast<uint32_t>(all));
        return i < n ? i : n + choose(static_cast<uint32_t>(late_.size()));
    }
    size_t best = 0;
    if (options.schedule == "timed") {
        uint64_t earliest = UINT64_MAX;
        for (size_t i = 0; i < n; i++) {
            uint64_t at = i < runnable_.size() ? runnable_[i]->cycle + runnable_[i]->issued : operations_[i - runnable_.size()]->cycle;
            if (at < earliest) earliest = at, best = i;
        }
        return best;
    }
    uint64_t highest = 0;
    for (size_t i = 0; i < n + late_.size(); i++) {
        uint64_t p = i < runnable_.size() ? priorities_[runnable_[i]->id]
                     : i < n ? operations_[i - runnable_.size()]->priority : late_[i - n]->priority;
        if (p >= highest) highest = p, best = i;
    }
    if (std::binary_search(change_points_.begin(), change_points_.end(), turn_++)) {
        if (best < runnable_.size()) priorities_[runnable_[best]->id] = turn_ % 1024;
        else if (best >= n) late_[best - n]->priority = turn_ % 1024;
        else operations_[best - runnable_.size()]->priority = turn_ % 1024;
    }
    return best;
}

uint32_t Machine::slice_length() {
    if (options.schedule == "random") return 1 + random.below(random.one_in(4) ? 512 : 64);
    return options.schedule == "round_robin" || options.schedule == "timed" ? 32 : options.schedule == "pct" ? 64 : 4096;
}

void Machine::run(const std::vector<std::shared_ptr<Launch>>& until) {
    try {
        for (;;) {
            while (!deaths.empty() && deaths.begin()->first <= steps) {
                kill(deaths.begin()->second);
                deaths.erase(deaths.begin());
            }
            admit();
            if (until.empty() ? idle() : std::any_of(until.begin(), until.end(), [](auto& l) { return l->finished; })) return;
            if (runnable_.empty() && operations_.empty() && late_.empty()) {
                nothing_moves();
                continue;
            }
            size_t i = pick();
            if (i < runnable_.size()) {
                Warp* w = runnable_[i];
                w->queued = false;
                runnable_[i] = runnable_.back();
                runnable_.pop_back();
                while (!step_warp(*w) && explores(options) && w->live) {}
                if (w->live) queue(*w);
            } else if (i -= runnable_.size(); i >= operations_.size()) {
                arrive_late(i - operations_.size());
            } else {
                progress++;
                time++;
                if (operations_[i]->step(*this)) {
                    // A step may start other operations, so look the finished one up anew.
                    operations_[i] = std::move(operations_.back());
                    operations_.pop_back();
                }
            }
            if (steps > options.max_steps)
                throw Error(ErrorKind::Emulation, "more than max_steps = " + std::to_string(options.max_steps) + " instructions");
        }
    } catch (...) {
        abandon();
        throw;
    }
}

/// Lanes that stand at one instruction go on together, unless some already are in the middle of it.
void Machine::merge_groups(Warp& w) {
    auto open = [](const Group& g) { return g.stage == 0 && (g.wait == Wait::None || g.wait == Wait::Lanes); };
    for (size_t i = 0; i < w.groups.size(); i++) {
        for (size_t j = i + 1; j < w.groups.size();) {
            if (w.groups[i].pc != w.groups[j].pc || !open(w.groups[i]) || !open(w.groups[j])) {
                j++;
                continue;
            }
            w.groups[i].mask |= w.groups[j].mask;
            w.groups[i].wait = Wait::None;
            w.groups.erase(w.groups.begin() + static_cast<std::ptrdiff_t>(j));
        }
    }
}

bool Machine::step_warp(Warp& w) {
    // The lowest instruction first, which brings divergent lanes together again; now and then another, so that lanes
    // that wait for each other all move.
    if (w.groups.size() > 1) merge_groups(w);
    size_t chosen = w.groups.size();
    uint32_t ready = 0;
    for (size_t i = 0; i < w.groups.size(); i++) {
        if (w.groups[i].wait != Wait::None) continue;
        ready++;
        if (chosen == w.groups.size() || w.groups[i].pc < w.groups[chosen].pc) chosen = i;
    }
    if (ready == 0) return true;
    if (ready > 1 && !explores(options) && options.schedule != "timed" && choose(8) == 0) {
        uint32_t n = choose(ready);
        for (chosen = 0;; chosen++)
            if (w.groups[chosen].wait == Wait::None && n-- == 0) break;
    }
    const Launch& launch = *w.cta->launch;
    Context c{*this, w, nullptr, w.registers.data(), launch.constants.data(), 0, options.checks};
    return run_group(w, w.groups[chosen], c, slice_length());
}

namespace {

/// What this instruction reads of virtual time must be settled first.
bool on_the_clock(const Inst& inst) { return inst.klass >= Class::Memory && inst.klass <= Class::Wgmma; }

}  // namespace

/// True if it ended at a step that synchronises.
bool Machine::run_group(Warp& w, Group& start, Context& c, uint32_t budget) {
    const Program& program = *w.cta->launch->program;
    const Inst* code = program.code.data();
    Group* g = &start;
    for (; budget > 0; budget--) {
        const Inst& inst = code[g->pc];
        uint32_t mask = g->mask;
        if (inst.guard != no_ref) mask &= inst.guard_negated ? ~c.registers[inst.guard] : c.registers[inst.guard];
        steps++;
        time++;
        Flow flow = Flow::Next;
        if (mask) {
            c.mask = mask;
            c.group = g;
            bool slow = c.checks && (w.poisoned || inst.touches_wgmma);
            if (slow) slow_checks_before(c, inst);
            if (inst.convergent && !c.converged(w.live)) {
                c.block(Wait::Lanes, w.id, "other lanes at a .aligned instruction");
                return true;
            }
            if (!w.loading.empty()) await_results(w, inst);
            if (on_the_clock(inst)) issue(w);
            flow = inst.execute(c, inst);
            if (flow == Flow::Blocked) return true;
            executed[static_cast<size_t>(inst.klass)]++;
            advance(w, inst);
            if (flow == Flow::Jump) return false;
            if (slow) slow_checks_after(c, inst);
        } else {
            executed[static_cast<size_t>(inst.klass)]++;
            advance(w, inst);
        }
        g->pc++;
        if (w.groups.size() > 1) {
            for (const Group& other : w.groups)
                if (&other != g && (other.pc == g->pc || (other.wait == Wait::None && other.pc < g->pc))) return false;
        }
        if (flow == Flow::Yield) return true;
    }
    return false;
}

/// Nothing can move: let time pass until a sleeper wakes, then until timed waits give up, again and again.
void Machine::nothing_moves() {
    if (!sleepers_.empty()) {
        auto [until, id] = *sleepers_.begin();
        sleepers_.erase(sleepers_.begin());
        time = std::max(time, until);
        Warp* w = const_cast<Warp*>(warps_by_id[id]);
        if (!w) return;
        for (Group& g : w->groups)
            if (g.wait == Wait::Sleep && g.until <= time) g.wait = Wait::None;
        queue(*w);
        return;
    }
    if (progress != jump_progress_) jump_rounds_ = 0, jump_ = 0;
    if (timed_.empty() || jump_rounds_++ > max_jump_rounds) deadlock();
    jump_ = std::clamp(jump_ * 2, first_jump, largest_jump);
    time += jump_;
    std::set<uint32_t> timed = std::move(timed_);
    timed_.clear();
    for (uint32_t id : timed) {
        Warp* w = const_cast<Warp*>(warps_by_id[id]);
        if (!w) continue;
        for (Group& g : w->groups) {
            if (g.wait != Wait::Spin && g.wait != Wait::Mbarrier) continue;
            if (g.wait == Wait::Spin) spinners--;
            std::vector<Warp*>& list = waiters_[{g.wait, g.key}];
            list.erase(std::remove(list.begin(), list.end(), w), list.end());
            wait_until(*w, w->cta->launch->program->code[g.pc], w->cycle + timing::cycles(jump_), {g.wait, g.key & 0xFFFFFF});
            g.wait = Wait::None;
            g.timed_out = true;
        }
        queue(*w);
    }
    jump_progress_ = progress;
}

void Machine::deadlock() {
    std::string text = "nothing can move";
    size_t listed = 0, blocked = 0;
    Place place;
    for (Device& device : devices)
        for (auto& launch : device.queue)
            for (auto& cta : launch->ctas)
                for (auto& w : cta->warps)
                    for (const Group& g : w->groups) {
                        blocked++;
                        const Inst& inst = launch->program->code[g.pc];
                        if (listed == 0) {
                            place.kernel = launch->function->name;
                            place.ptx_line = static_cast<int>(inst.line);
                            place.source = launch->program->source_of(inst);
                            std::copy(cta->index, cta->index + 3, place.block);
                            place.warp = static_cast<int>(w->number);
                        }
                        if (listed++ >= max_listed) continue;
                        text += "\n  ";
                        if (devices.size() > 1) text += "rank " + std::to_string(launch->device) + " ";
                        text += launch->function->name + " block (" + std::to_string(cta->index[0]) + "," +
                                std::to_string(cta->index[1]) + "," + std::to_string(cta->index[2]) + ") warp " +
                                std::to_string(w->number);
                        if (g.mask != w->live) text += " lane " + std::to_string(__builtin_ctz(g.mask)) + "+" + std::to_string(__builtin_popcount(g.mask) - 1);
                        std::string source = launch->program->source_of(inst);
                        text += " at PTX line " + std::to_string(inst.line) + (source.empty() ? "" : " (" + source + ")") +
                                ": waits for " + (g.waiting_for ? g.waiting_for() : "its turn");
                    }
    if (blocked > max_listed) text += "\n  and " + std::to_string(blocked - max_listed) + " more";
    throw Error(ErrorKind::Deadlock, text + network->troubles(), place);
}

/// A fault: the device stops where it is. What its copy engines have begun still ends; what it sends is lost.
void Machine::kill(int device) {
    Device& d = devices[static_cast<size_t>(device)];
    d.dead = true;
    network->kill(device);
    auto of_device = [&](const Warp* w) { return w->cta->launch->device == device; };
    runnable_.erase(std::remove_if(runnable_.begin(), runnable_.end(), of_device), runnable_.end());
    for (auto& launch : d.queue) {
        launch->finished = true;
        for (auto& cta : launch->ctas)
            for (auto& w : cta->warps) {
                for (const Group& g : w->groups) spinners -= g.wait == Wait::Spin;
                w->groups.clear();
                w->live = 0;
            }
        dead_launches_.push_back(launch);
    }
    d.queue.clear();
    progress++;
}

/// After a failure: drop everything that ran, so that the machine can be used again.
void Machine::abandon() {
    operations_.clear();
    late_.clear();
    network->reset();
    dead_launches_.clear();
    runnable_.clear();
    waiters_.clear();
    sleepers_.clear();
    timed_.clear();
    spinners = 0;
    for (Device& d : devices) {
        for (auto& launch : d.queue) launch->finished = true;
        d.queue.clear();
        d.done = {};
        for (Device::Sm& sm : d.sms) sm.ctas = sm.threads = sm.shared = 0;
    }
    align_clocks();
    memory.forget_order();
    log.clear();
    warps_by_id.clear();
    priorities_.clear();
    programs_.clear();
}

}  // namespace dsv3::emulator
