// Launches: checks of their arguments, placing blocks on SMs, starting warps, and what their ends order.

#include <algorithm>
#include <cstring>

#include "network.hpp"

namespace dsv3::emulator {
namespace {

constexpr uint32_t max_block_shared = 227 * 1024, sm_shared = 228 * 1024, sm_threads = 2048, sm_ctas = 32;

uint64_t volume(const uint32_t* d) { return uint64_t{d[0]} * d[1] * d[2]; }

std::string shown(const uint32_t* d) {
    return "(" + std::to_string(d[0]) + ", " + std::to_string(d[1]) + ", " + std::to_string(d[2]) + ")";
}

void check_launch(const Launch& l) {
    const Function& f = *l.function;
    auto refuse = [&](const std::string& what) {
        Place place;
        place.kernel = f.name;
        throw Error(ErrorKind::Emulation, "launch of '" + f.name + "': " + what, place);
    };
    uint64_t threads = volume(l.block);
    if (threads == 0 || threads > 1024 || l.block[2] > 64)
        refuse("block " + shown(l.block) + " has " + std::to_string(threads) + " threads, expected 1 to 1024");
    if (volume(l.grid) == 0 || volume(l.grid) > (1u << 24)) refuse("grid " + shown(l.grid) + " must hold 1 to 2^24 blocks");
    if (volume(f.required_threads) && !std::equal(l.block, l.block + 3, f.required_threads))
        refuse("block " + shown(l.block) + " differs from the kernel's .reqntid " + shown(f.required_threads));
    if (volume(f.max_threads) && threads > volume(f.max_threads))
        refuse("block " + shown(l.block) + " exceeds the kernel's .maxntid " + shown(f.max_threads));
    if (volume(f.required_cluster) && !std::equal(l.cluster, l.cluster + 3, f.required_cluster))
        refuse("cluster " + shown(l.cluster) + " differs from the kernel's .reqnctapercluster " + shown(f.required_cluster));
    uint64_t size = volume(l.cluster);
    if (size == 0 || size > 16) refuse("cluster " + shown(l.cluster) + " must hold 1 to 16 blocks");
    for (int i = 0; i < 3; i++)
        if (l.grid[i] % l.cluster[i])
            refuse("grid " + shown(l.grid) + " is not a multiple of cluster " + shown(l.cluster));
    if (l.shared_total - shared_base > max_block_shared)
        refuse("needs " + std::to_string(l.shared_total - shared_base) + " bytes of shared memory a block, at most " +
               std::to_string(max_block_shared) + " are there");
}

Knowledge everything(const Clock& clock) { return {clock, clock, clock, clock, clock, clock}; }

}  // namespace

Machine::Machine(Options o) : options(std::move(o)), random(options.seed) {
    devices.resize(static_cast<size_t>(options.devices));
    for (Device& d : devices) d.sms.resize(static_cast<size_t>(options.num_sms));
    network = std::make_unique<Network>(options.devices, options.devices, LinkModel{700, 450}, LinkModel{2500, 50});
    set_rates();
    if (options.schedule == "pct") {
        for (int i = 0; i < 6; i++) change_points_.push_back(random.below(1u << (8 + 2 * random.below(6))));
        std::sort(change_points_.begin(), change_points_.end());
    }
}

Machine::~Machine() = default;

bool Machine::idle() const {
    return std::all_of(devices.begin(), devices.end(), [](const Device& d) { return d.queue.empty(); });
}

uint64_t Machine::module_variable(int device, const std::shared_ptr<const Program>& program, int variable) {
    std::vector<uint64_t>& addresses = devices[static_cast<size_t>(device)].modules[program];
    if (addresses.empty()) {
        addresses.resize(program->variables.size());
        for (size_t i = 0; i < addresses.size(); i++) {
            const Variable& v = program->variables[i];
            if (v.space != Space::Global && v.space != Space::Const) continue;
            Region& r = memory.map(nullptr, v.size, v.name, device);
            r.constant = v.space == Space::Const;
            addresses[i] = r.base;
        }
        for (size_t i = 0; i < addresses.size(); i++) {
            const Variable& v = program->variables[i];
            if (!addresses[i]) continue;
            if (v.name == "nvshmemi_device_state_d") network->fill_device_state(*this, device, *memory.find(addresses[i]));
            for (const Variable::Initial& item : v.initial) {
                uint64_t bits = item.bits;
                if (!item.symbol.empty()) {
                    auto other = std::find_if(program->variables.begin(), program->variables.end(),
                                              [&](const Variable& x) { return x.name == item.symbol; });
                    if (other == program->variables.end() || !addresses[static_cast<size_t>(other - program->variables.begin())])
                        throw Error(ErrorKind::Unsupported, "'" + v.name + "' is initialised with the address of '" + item.symbol + "'");
                    bits += addresses[static_cast<size_t>(other - program->variables.begin())];
                }
                std::memcpy(memory.find(addresses[i])->host + item.offset, &bits, static_cast<size_t>(item.size));
            }
        }
    }
    return addresses[static_cast<size_t>(variable)];
}

std::shared_ptr<Launch> Machine::submit(std::shared_ptr<Launch> launch) {
    Launch& l = *launch;
    const Function& f = *l.function;
    const Program& p = *l.program;
    uint32_t dynamic = (f.static_shared + f.dynamic_align - 1) / f.dynamic_align * f.dynamic_align;
    l.shared_total = dynamic + l.shared_bytes;
    check_launch(l);
    l.registers = registers_at_entry(f);
    l.constants = p.constants;
    for (const ConstantPatch& patch : p.patches) {
        const Variable* v = patch.variable < 0 ? &p.variables[static_cast<size_t>(~patch.variable)] : nullptr;
        uint64_t at;
        if (!v || (v->space == Space::Shared && v->size == 0)) at = dynamic;
        else if (v->space == Space::Shared) at = p.shared_offsets[static_cast<size_t>(~patch.variable)];
        else at = module_variable(l.device, l.program, ~patch.variable);
        at += patch.addend;
        for (uint32_t lane = 0; lane < 32; lane++)
            std::memcpy(&l.constants[patch.word + lane * static_cast<uint32_t>(patch.size) / 4], &at, static_cast<size_t>(patch.size));
    }
    for (const std::string& name : p.externals)
        if (!externs.count(name) && !network_call(name)) {
            Place place;
            place.kernel = f.name;
            throw Error(ErrorKind::Unsupported, "calls '" + name + "', which is not defined in the PTX and bound to no handler", place);
        }
    l.clusters = volume(l.grid) / volume(l.cluster);
    l.id = next_launch_++;
    auto known = std::find(programs_.begin(), programs_.end(), l.program);
    l.program_index = static_cast<uint32_t>(known - programs_.begin());
    if (known == programs_.end()) programs_.push_back(l.program);
    counters["launches"]++;
    // What the host may have written since then is newer.
    spread_late([&](const LateWrite& w) { return w.region->rank == l.device ? everywhere : w.reach; });
    Device& device = devices[static_cast<size_t>(l.device)];
    if (device.dead) l.finished = true;
    else device.queue.push_back(launch);
    return launch;
}

void Machine::admit() {
    for (Device& d : devices) {
        while (!d.queue.empty()) {
            Launch& first = *d.queue.front();
            if (!first.started) {
                first.started = true;
                first.before = d.done;
                first.starts_at = d.cycle;
            }
            while (first.next_cluster < first.clusters && admit_cluster(first)) {}
            if (d.queue.size() > 1 && d.queue[1]->dependent && first.next_cluster == first.clusters &&
                first.triggered >= first.live_ctas) {
                Launch& second = *d.queue[1];
                if (!second.started) {
                    second.started = true;
                    second.predecessor = d.queue.front();
                    second.before = d.done;
                    second.starts_at = first.triggered_at;
                }
                while (second.next_cluster < second.clusters && admit_cluster(second)) {}
            }
            if (first.next_cluster < first.clusters || first.live_ctas || first.operations) break;
            finish_launch(first);
            d.queue.pop_front();
        }
    }
}

bool Machine::admit_cluster(Launch& l) {
    Device& d = devices[static_cast<size_t>(l.device)];
    uint32_t threads = static_cast<uint32_t>(volume(l.block)), size = static_cast<uint32_t>(volume(l.cluster));
    uint32_t shared = l.shared_total;
    std::vector<uint32_t> chosen;
    for (uint32_t i = 0; i < size; i++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t s = 0; s < d.sms.size(); s++) {
            const Device::Sm& sm = d.sms[s];
            if (sm.ctas >= sm_ctas || sm.threads + threads > sm_threads || sm.shared + shared > sm_shared) continue;
            if (best == UINT32_MAX || sm.ctas < d.sms[best].ctas) best = s;
        }
        if (best == UINT32_MAX) {
            for (uint32_t s : chosen) d.sms[s].ctas--, d.sms[s].threads -= threads, d.sms[s].shared -= shared;
            if (l.live_ctas == 0 && d.queue.front().get() == &l) {
                Place place;
                place.kernel = l.function->name;
                throw Error(ErrorKind::Emulation, "a cluster of " + std::to_string(size) + " blocks of '" + l.function->name +
                            "' does not fit on " + std::to_string(d.sms.size()) + " SMs", place);
            }
            return false;
        }
        d.sms[best].ctas++, d.sms[best].threads += threads, d.sms[best].shared += shared;
        chosen.push_back(best);
    }
    auto cluster = std::make_unique<Cluster>();
    cluster->id = next_cluster_++;
    uint64_t index = l.next_cluster++;
    uint32_t grid_clusters[2] = {l.grid[0] / l.cluster[0], l.grid[1] / l.cluster[1]};
    uint32_t at[3] = {static_cast<uint32_t>(index % grid_clusters[0]),
                      static_cast<uint32_t>(index / grid_clusters[0] % grid_clusters[1]),
                      static_cast<uint32_t>(index / grid_clusters[0] / grid_clusters[1])};
    for (uint32_t rank = 0; rank < size; rank++) {
        auto cta = std::make_unique<Cta>();
        cta->launch = &l;
        cta->cluster = cluster.get();
        cta->id = next_cta_++;
        cta->rank = rank;
        cta->sm = chosen[rank];
        uint32_t in[3] = {rank % l.cluster[0], rank / l.cluster[0] % l.cluster[1], rank / l.cluster[0] / l.cluster[1]};
        for (int i = 0; i < 3; i++) cta->index[i] = at[i] * l.cluster[i] + in[i];
        cta->live_threads = threads;
        cta->shared.resize(l.shared_total);
        if (options.checks) {
            cta->shadow = std::make_unique<Shadow>(l.shared_total);
            cta->poison = std::make_unique<Poison>(l.shared_total, true);
        }
        cta->warpgroups.resize((threads + 127) / 128);
        for (Warpgroup& g : cta->warpgroups) g.agent = l.program->uses_wgmma ? new_agent(l) : 0;
        cluster->ctas.push_back(cta.get());
        l.ctas.push_back(std::move(cta));
    }
    cluster->live_ctas = size;
    l.live_ctas += size;
    // The blocks of a cluster start together, in places that were free or that others have left longest ago.
    uint64_t starts_at = l.starts_at;
    for (Cta* cta : cluster->ctas) {
        std::vector<uint64_t>& freed = d.sms[cta->sm].freed;
        auto first = std::min_element(freed.begin(), freed.end());
        if (first == freed.end()) continue;
        starts_at = std::max(starts_at, *first);
        freed.erase(first);
    }
    for (Cta* cta : cluster->ctas) {
        for (uint32_t i = 0; i < (threads + 31) / 32; i++) {
            auto w = std::make_unique<Warp>();
            w->cta = cta;
            w->number = i;
            w->cycle = w->slice_start = starts_at;
            w->partition = d.sms[cta->sm].warps++ % timing::partitions;
            w->live = threads - i * 32 >= 32 ? ~0u : (1u << (threads - i * 32)) - 1;
            start_warp(*w);
            cta->warps.push_back(std::move(w));
        }
    }
    l.cluster_list.push_back(std::move(cluster));
    counters["peak_shared_bytes"] = std::max<uint64_t>(counters["peak_shared_bytes"], l.shared_total - shared_base);
    return true;
}

void Machine::start_warp(Warp& w) {
    const Cta& cta = *w.cta;
    Launch& l = *cta.launch;
    const Program& p = *l.program;
    w.id = static_cast<uint32_t>(warps_by_id.size());
    warps_by_id.push_back(&w);
    priorities_.push_back(1024 + (random.next() >> 1));
    w.agent = new_agent(l);
    w.register_limit = l.registers;
    w.known.fill(everything(l.before.generic));
    w.registers.assign(p.register_words, 0);
    w.local.assign(p.local_bytes * 32, 0);
    size_t units = (p.register_words - p.predicate_words) / 32;
    if (options.checks) w.poison.assign(units, 0);
    if (p.uses_wgmma) {
        w.wgmma.writing.assign(units, 0);
        w.wgmma.reading.assign(units, 0);
        w.wgmma.dirty.assign(units, 0);
    }
    Group all;
    all.pc = l.function->first;
    all.mask = w.live;
    w.groups.push_back(std::move(all));
    for (auto [kind, ref] : p.specials) {
        for (uint32_t lane = 0; lane < 32; lane++) {
            uint32_t thread = w.number * 32 + lane, value = 0;
            const uint32_t *b = l.block, *c = l.cluster, *g = l.grid;
            switch (kind) {
                case Special::TidX: value = thread % b[0]; break;
                case Special::TidY: value = thread / b[0] % b[1]; break;
                case Special::TidZ: value = thread / b[0] / b[1]; break;
                case Special::NtidX: case Special::NtidY: case Special::NtidZ:
                    value = b[static_cast<int>(kind) - static_cast<int>(Special::NtidX)]; break;
                case Special::CtaidX: case Special::CtaidY: case Special::CtaidZ:
                    value = cta.index[static_cast<int>(kind) - static_cast<int>(Special::CtaidX)]; break;
                case Special::NctaidX: case Special::NctaidY: case Special::NctaidZ:
                    value = g[static_cast<int>(kind) - static_cast<int>(Special::NctaidX)]; break;
                case Special::LaneId: value = lane; break;
                case Special::WarpId: value = w.number; break;
                case Special::NwarpId: value = static_cast<uint32_t>((volume(b) + 31) / 32); break;
                case Special::SmId: value = cta.sm; break;
                case Special::NsmId: value = static_cast<uint32_t>(options.num_sms); break;
                case Special::GridId: break;
                case Special::ClusterIdX: case Special::ClusterIdY: case Special::ClusterIdZ: {
                    int i = static_cast<int>(kind) - static_cast<int>(Special::ClusterIdX);
                    value = cta.index[i] / c[i];
                    break;
                }
                case Special::NclusterIdX: case Special::NclusterIdY: case Special::NclusterIdZ: {
                    int i = static_cast<int>(kind) - static_cast<int>(Special::NclusterIdX);
                    value = g[i] / c[i];
                    break;
                }
                case Special::ClusterCtaidX: case Special::ClusterCtaidY: case Special::ClusterCtaidZ: {
                    int i = static_cast<int>(kind) - static_cast<int>(Special::ClusterCtaidX);
                    value = cta.index[i] % c[i];
                    break;
                }
                case Special::ClusterNctaidX: case Special::ClusterNctaidY: case Special::ClusterNctaidZ:
                    value = c[static_cast<int>(kind) - static_cast<int>(Special::ClusterNctaidX)]; break;
                case Special::ClusterCtaRank: value = cta.rank; break;
                case Special::ClusterNctaRank: value = static_cast<uint32_t>(volume(c)); break;
                case Special::IsExplicitCluster: value = volume(c) > 1; break;
                case Special::LaneMaskEq: value = 1u << lane; break;
                case Special::LaneMaskLt: value = (1u << lane) - 1; break;
                case Special::LaneMaskLe: value = (2u << lane) - 1; break;
                case Special::LaneMaskGe: value = ~((1u << lane) - 1); break;
                case Special::LaneMaskGt: value = ~((2u << lane) - 1); break;
                case Special::DynamicSharedSize: value = l.shared_bytes; break;
                case Special::TotalSharedSize: case Special::AggrSharedSize: value = l.shared_total; break;
                case Special::WarpSize: value = 32; break;
                case Special::Sink: break;
            }
            if (kind == Special::GridId) {
                w.registers[static_cast<size_t>(ref) + 2 * lane] = l.id;
                w.registers[static_cast<size_t>(ref) + 2 * lane + 1] = 0;
            } else {
                w.registers[static_cast<size_t>(ref) + lane] = value;
            }
        }
    }
    queue(w);
}

void Machine::lanes_exit(Warp& w, uint32_t mask) {
    Cta& cta = *w.cta;
    progress++;
    w.live &= ~mask;
    cta.live_threads -= static_cast<uint32_t>(__builtin_popcount(mask));
    wake(Wait::Lanes, w.id);
    if (w.live) return;
    close_slice(w);
    cta.launch->ends_at = std::max({cta.launch->ends_at, w.cycle, w.stored_at});
    // Its exit may be what a barrier waits for.
    for (NamedBarrier& b : cta.barriers)
        if (b.arrived && !b.expected) b.last_arrival = std::max(b.last_arrival, w.cycle);
    cta.cluster->last_arrival = std::max(cta.cluster->last_arrival, w.cycle);
    for (uint32_t b = 0; b < cta.barriers.size(); b++) wake(Wait::Barrier, uint64_t{cta.id} << 8 | b);
    wake(Wait::ClusterBarrier, cta.cluster->id);
    cta_may_finish(cta);
}

void Machine::cta_may_finish(Cta& cta) {
    if (cta.exited || cta.live_threads) return;
    Launch& l = *cta.launch;
    cta.exited = true;
    check_register_changes(*this, cta);
    uint64_t ended_at = 0;
    for (auto& w : cta.warps) ended_at = std::max(ended_at, w->cycle);
    if (!cta.triggered) l.triggered_at = std::max(l.triggered_at, ended_at);
    l.live_ctas--;
    l.triggered -= cta.triggered;
    Operation::Issuer by{};
    for (auto& op : operations_)
        if (cta.operations && op->uses_shared(cta, by))
            fail(ErrorKind::Hazard, "block rank " + std::to_string(cta.rank) + " of the cluster exits while this uses its shared memory", *by.warp, *by.inst, by.lane);
    Cluster& cluster = *cta.cluster;
    if (--cluster.live_ctas) return;
    // The blocks of a cluster leave together, for their shared memory is shared among them.
    Device& d = devices[static_cast<size_t>(l.device)];
    uint64_t left_at = 0;
    for (Cta* c : cluster.ctas)
        for (auto& w : c->warps) left_at = std::max(left_at, w->cycle);
    for (Cta* c : cluster.ctas) {
        Device::Sm& sm = d.sms[c->sm];
        sm.freed.push_back(left_at);
        sm.ctas--;
        sm.threads -= static_cast<uint32_t>(volume(l.block));
        sm.shared -= l.shared_total;
        c->shared = {};
        c->shadow.reset();
        c->poison.reset();
        c->published.clear();
        c->mbarriers.clear();
        for (auto& w : c->warps) {
            w->registers = {};
            w->local = {};
            for (const Knowledge& k : w->known) l.seen.join(k.generic);
            w->known = {};
            w->fences.reset();
        }
    }
}

void Machine::finish_launch(Launch& l) {
    Device& d = devices[static_cast<size_t>(l.device)];
    l.finished = true;
    progress++;
    spread_late([&](const LateWrite& w) { return w.from.device == static_cast<uint32_t>(l.device) ? same_device : w.reach; });
    d.cycle = std::max(d.cycle, l.ends_at);
    counts.launch_cycles = l.ends_at - l.starts_at;
    Clock done = d.done.generic;
    for (Agent a : l.agents) done.add(a, ~0u, in_flight - 1);
    done.join(l.seen);
    d.done = everything(done);
    wake(Wait::Dependency, static_cast<uint64_t>(l.device));
    for (auto& cta : l.ctas)
        for (auto& w : cta->warps) warps_by_id[w->id] = nullptr;
    if (d.queue.size() == 1 && std::all_of(devices.begin(), devices.end(), [&](const Device& x) { return &x == &d || x.queue.empty(); })) {
        // Nothing else runs: whatever comes is ordered behind all of this, and the records can go.
        // Operations that are left belong to dead devices.
        operations_.clear();
        dead_launches_.clear();
        network->forget_order();
        memory.forget_order();
        late_.clear();
        log.clear();
        for (Device& x : devices) x.done = {};
        align_clocks();
        warps_by_id.clear();
        priorities_.clear();
        programs_.clear();
        waiters_.clear();
        timed_.clear();
        sleepers_.clear();
        next_agent_ = 1;
    }
    l.ctas.clear();
    l.cluster_list.clear();
}

}  // namespace dsv3::emulator
