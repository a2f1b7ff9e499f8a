#include <algorithm>

#include "machine.hpp"

namespace dsv3::emulator {

bool Warp::runnable() const {
    return std::any_of(groups.begin(), groups.end(), [](const Group& g) { return g.wait == Wait::None; });
}

/// What these lanes did and know, to be handed to others. What they do from now on is not in it.
Knowledge Warp::release(uint32_t mask) {
    Knowledge k;
    const Knowledge* last = nullptr;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const Knowledge& lane = known[static_cast<size_t>(__builtin_ctz(rest))];
        if (last && last->same(lane)) continue;
        k.join(lane);
        last = &lane;
    }
    // Lanes that do not exist know nothing and did nothing: let a warp's last lanes stand for them.
    uint32_t own = mask == live ? ~0u : mask;
    k.generic.add(agent, own, now);
    now++;
    return k;
}

void Warp::acquire(uint32_t mask, const Knowledge& k) {
    Knowledge before, after;
    bool memo = false;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        Knowledge& lane = known[static_cast<size_t>(__builtin_ctz(rest))];
        if (memo && lane.same(before)) {
            lane = after;
            continue;
        }
        before = lane;
        lane.join(k);
        after = lane;
        memo = true;
    }
}

void Context::fail(ErrorKind kind, const std::string& what, int lane) const {
    m.fail(kind, what, w, w.cta->launch->program->code[group->pc], lane);
}

Flow Context::block(Wait wait, uint64_t key, std::function<std::string()> what) const {
    group->wait = wait;
    group->key = key;
    group->waiting_for = std::move(what);
    if (wait == Wait::Sleep) {
        m.sleepers_.insert({group->until, w.id});
    } else {
        std::vector<Warp*>& list = m.waiters_[{wait, key}];
        if (std::find(list.begin(), list.end(), &w) == list.end()) list.push_back(&w);
    }
    if (wait == Wait::Spin) m.spinners++;
    if (wait == Wait::Spin || wait == Wait::Mbarrier) m.timed_.insert(w.id);
    return Flow::Blocked;
}

bool Context::polls(uint64_t hash, uint32_t rounds) const {
    Poll* poll = nullptr;
    for (Poll& p : w.polls)
        if (p.pc == group->pc) poll = &p;
    if (!poll) poll = &w.polls[w.next_poll++ % w.polls.size()], *poll = {group->pc, ~hash, 0, 0};
    if (group->timed_out) {
        group->timed_out = false;
        poll->count = 0;
        if (rounds == 0) return false;  // once round the loop, to look at the time
    }
    if (poll->hash == hash && poll->effects == w.effects) return ++poll->count > rounds;
    *poll = {group->pc, hash, w.effects, 0};
    return false;
}

bool Context::converged(uint32_t needed) const {
    needed &= w.live;
    if ((mask & needed) == needed) return true;
    if ((group->mask & needed & ~mask) != 0)
        fail(ErrorKind::Hazard, "lanes that the instruction needs are switched off by its guard",
             __builtin_ctz(group->mask & needed & ~mask));
    return false;
}

void Machine::fail(ErrorKind kind, const std::string& what, const Warp& w, const Inst& inst, int lane) const {
    const Launch& launch = *w.cta->launch;
    Place place;
    place.kernel = launch.function->name;
    for (int i = 0; i < 3; i++) place.block[i] = w.cta->index[i];
    place.rank = devices.size() > 1 ? launch.device : -1;
    place.warp = static_cast<int>(w.number);
    place.lane = lane;
    place.ptx_line = static_cast<int>(inst.line);
    place.source = launch.program->source_of(inst);
    throw Error(kind, std::string(inst.name) + ": " + what, place);
}

std::string Machine::place_of(const Access& a, int lane) const {
    const Inst& i = inst(a.program, a.code);
    const Warp* w = warps_by_id[static_cast<size_t>(a.warp)];
    std::string text = "'" + std::string(i.name) + "' of ";
    if (w) {
        const Cta& cta = *w->cta;
        if (devices.size() > 1) text += "rank " + std::to_string(cta.launch->device) + " ";
        text += "block (" + std::to_string(cta.index[0]) + "," + std::to_string(cta.index[1]) + "," +
                std::to_string(cta.index[2]) + ") warp " + std::to_string(w->number);
        if (lane >= 0 && !a.async) text += " lane " + std::to_string(lane);
    }
    text += " (PTX line " + std::to_string(i.line);
    std::string source = programs_[a.program]->source_of(i);
    return text + (source.empty() ? ")" : ", " + source + ")");
}

uint32_t Machine::log_access(Warp& w, const Inst& inst, bool atomic, Scope scope) {
    const Launch& launch = *w.cta->launch;
    uint32_t pc = static_cast<uint32_t>(&inst - launch.program->code.data());
    uint32_t strength = static_cast<uint32_t>(scope) * 2 + atomic;
    Warp::Logged& memo = w.logged[pc % w.logged.size()];
    if (memo.pc == pc && memo.time == w.now && memo.strength == strength) return memo.access;
    Access a{w.agent, w.now, pc, static_cast<int32_t>(w.id), launch.program_index, false, atomic, scope,
             w.cta->id, w.cta->cluster->id, static_cast<uint32_t>(launch.device)};
    memo = {pc, w.now, log.add(a), strength};
    return memo.access;
}

}  // namespace dsv3::emulator
