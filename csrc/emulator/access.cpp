// Addresses to bytes, with every check on the way.

#include <cinttypes>
#include <cstdio>

#include "machine.hpp"

namespace dsv3::emulator {
namespace {

std::string hex(uint64_t x) {
    char text[24];
    std::snprintf(text, sizeof text, "0x%" PRIx64, x);
    return text;
}

const char* space_name(Space s) {
    switch (s) {
        case Space::Global: return "global";
        case Space::Shared: return "shared::cta";
        case Space::SharedCluster: return "shared::cluster";
        case Space::Local: return "local";
        case Space::Param: return "param";
        case Space::Const: return "const";
        default: return "generic";
    }
}

}  // namespace

Target Context::locate(Space space, uint64_t address, uint32_t bytes, uint32_t align, int lane, bool write) const {
    auto refuse = [&](const std::string& what) {
        fail(ErrorKind::MemoryAccess, std::string(write ? "write of " : "read of ") + std::to_string(bytes) + " bytes at " +
             space_name(space) + " address " + hex(address) + ": " + what, lane);
    };
    if (address % align) refuse("not aligned to " + std::to_string(align) + " bytes");
    Launch& launch = *w.cta->launch;
    Target t;
    if (space == Space::Generic) {
        if (address - shared_window < window_size) space = Space::SharedCluster, address -= shared_window;
        else if (address - local_window < window_size) space = Space::Local, address -= local_window;
        else if (address - param_window < window_size) space = Space::Param, address -= param_window;
        else space = Space::Global;
    }
    switch (space) {
        case Space::Shared:
        case Space::SharedCluster: {
            uint64_t rank = address >> 24;
            if (rank > w.cta->cluster->ctas.size()) refuse("no shared memory of this cluster");
            Cta* cta = rank == 0 ? w.cta : w.cta->cluster->ctas[rank - 1];
            if (space == Space::Shared && cta != w.cta) refuse("an address of another block needs shared::cluster");
            uint64_t offset = address & 0xFFFFFF;
            if (offset < shared_base || offset + bytes > launch.shared_total)
                refuse("outside the block's shared memory [" + hex(shared_base) + ", " + hex(launch.shared_total) + ")");
            if (cta->exited)
                fail(ErrorKind::Hazard, "uses shared memory of block rank " + std::to_string(cta->rank) + " of its cluster, which has exited", lane);
            t = {cta->shared.data() + offset, offset, cta->shadow.get(), cta->poison.get(), &cta->published, cta, nullptr};
            break;
        }
        case Space::Local: {
            uint32_t size = launch.program->local_bytes;
            if (address + bytes > size) refuse("outside the lane's " + std::to_string(size) + " bytes of local memory");
            t.data = w.local.data() + static_cast<size_t>(lane) * size + address;
            break;
        }
        case Space::Param: {
            if (address < call_params) {
                if (write) refuse("kernel parameters are read-only");
                if (address + bytes > launch.params.size()) refuse("outside the kernel's parameters");
                t.data = launch.params.data() + address;
            } else {
                uint32_t size = launch.program->local_bytes;
                if (address - call_params + bytes > size) refuse("outside the call's parameters");
                t.data = w.local.data() + static_cast<size_t>(lane) * size + (address - call_params);
            }
            break;
        }
        default: {
            Region* r = m.memory.find(address);
            if (!r) {
                if (address - shared_window < window_size) refuse("this is a generic address of shared memory");
                if (address < 0x1000000) refuse("null or a shared-memory address, no global one");
                refuse("outside all allocations; " + m.memory.describe(address));
            }
            if (!r->alive) refuse("'" + r->name + "' was freed");
            if (address + bytes > r->base + r->size) refuse("runs past the end of '" + r->name + "' of " + std::to_string(r->size) + " bytes");
            if (write && (r->constant || space == Space::Const)) refuse("'" + r->name + "' is constant");
            t.data = r->host + (address - r->base);
            t.offset = address - r->base;
            t.region = r;
            if (!r->constant) t.shadow = &r->shadow, t.poison = r->poison.get(), t.published = &r->published;
        }
    }
    return t;
}

std::string Machine::describe_race(const Conflict& conflict, const Target& t, bool write) const {
    const Access& other = log[conflict.other];
    std::string what = conflict.missing_fence ? "no proxy fence: " : "data race: ";
    what += write ? "writes" : "reads";
    what += t.cta ? " shared memory at offset " + hex(conflict.offset) : " '" + t.region->name + "' at byte " + std::to_string(conflict.offset);
    what += std::string(" that ") + (conflict.other_wrote ? "was written" : "was read") + " by " + place_of(other, conflict.other_lane);
    if (conflict.missing_fence)
        return what + "; ordered, but the async proxy sees it only behind a fence.proxy.async for " + (t.cta ? "shared" : "global") + " memory";
    return what + ", with nothing that orders the two";
}

void Context::race(const Conflict& conflict, const Target& t, bool write, int lane) const {
    fail(ErrorKind::Hazard, m.describe_race(conflict, t, write), lane);
}

bool Context::check_read(const Target& t, uint32_t bytes, uint32_t access, int lane) const {
    if (!checks || !t.shadow) return false;
    Accessor by{{&w.known[static_cast<size_t>(lane)]}, 1, access, lane};
    Conflict conflict = t.shadow->read(m.log, by, t.offset, bytes);
    if (conflict.found) race(conflict, t, false, lane);
    return t.poison && t.poison->any(t.offset, bytes);
}

void Context::check_write(const Target& t, uint32_t bytes, uint32_t access, int lane) const {
    if (!checks || !t.shadow) return;
    if (t.cta && !t.cta->mbarriers.empty()) {
        auto it = t.cta->mbarriers.upper_bound(static_cast<uint32_t>(t.offset + bytes - 1));
        if (it != t.cta->mbarriers.begin() && std::prev(it)->first + 8 > t.offset)
            fail(ErrorKind::Hazard, "writes over the mbarrier at shared offset " + hex(std::prev(it)->first), lane);
    }
    Accessor by{{&w.known[static_cast<size_t>(lane)]}, 1, access, lane};
    Conflict conflict = t.shadow->write(m.log, by, t.offset, bytes);
    if (conflict.found) race(conflict, t, true, lane);
    if (t.poison) t.poison->set(t.offset, bytes, false);
}

void Context::changed(const Target& t, uint32_t bytes) const {
    w.effects++;
    m.progress++;
    if (m.spinners && (t.cta || t.region)) m.wake_watchers(t.watch(), t.watch() + bytes);
}

void Context::publish(const Target& t, uint32_t bytes, Published p, bool keep) const {
    for (uint64_t word = t.offset / 4; word <= (t.offset + bytes - 1) / 4; word++) {
        if (p.scope == Scope::None) {
            if (!keep && !t.published->empty()) t.published->erase(word);
            continue;
        }
        Published& at = (*t.published)[word];
        if (!keep || at.scope == Scope::None) {
            at = p;
        } else {  // a read-modify-write continues the release sequence
            at.knowledge.join(p.knowledge);
            at.scope = std::max(at.scope, p.scope);
        }
    }
}

}  // namespace dsv3::emulator
