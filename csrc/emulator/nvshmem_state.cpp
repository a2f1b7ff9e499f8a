// The memory that NVSHMEM's headers expect the library to have set up: its table, one team, and the barriers' words.

#include <cstring>

#include "network.hpp"
#include "nvshmem_layout.hpp"

namespace dsv3::emulator {
namespace {

using namespace nvshmem;

template <size_t n>
uint32_t offset_of(const Named (&fields)[n], const char* name) {
    for (const Named& field : fields)
        if (std::strcmp(field.name, name) == 0) return field.value;
    throw Error(ErrorKind::Emulation, std::string("no field '") + name + "' in the layout of NVSHMEM's tables");
}

template <class T>
void store(uint8_t* at, T value) {
    std::memcpy(at, &value, sizeof value);
}

// A rank's counters: the barriers it has begun (two a team), where wait_until_any begins, active regions.
constexpr uint64_t sync_counters_at = 0, wait_any_at = 16, regions_at = 24, counter_bytes = 32;
// The barriers' words: a `long` a rank, for odd and for even barriers in turn, at the end of the symmetric heap.
constexpr uint64_t words_at = Network::heap_stride - (uint64_t{1} << 20), words_apart = uint64_t{sync_size} * 8;
static_assert(2 * words_apart <= Network::heap_stride - words_at, "the barriers' words do not fit where they are put");

}  // namespace

/// For all ranks at once: a rank may signal another before that one has loaded its program.
void Network::allocate_tables(Machine& m) {
    size_t ranks = static_cast<size_t>(ranks_);
    for (int rank = 0; rank < ranks_; rank++) {
        Tables& t = tables_.emplace_back();
        // Addresses of peers, pointers to teams, the world team, and its ranks (by number in the team, and back).
        uint64_t teams_at = 8 * ranks, world_at = teams_at + 8 * teams, mapping_at = world_at + team_bytes;
        Region& constants = m.memory.map(nullptr, mapping_at + 8 * ranks, "NVSHMEM's tables", rank);
        constants.constant = true;
        t.constants = constants.base;
        for (int peer = 0; peer < ranks_; peer++) {
            uint64_t base = same_node(rank, peer) ? heap_base + static_cast<uint64_t>(peer) * heap_stride : 0;
            store(constants.host + 8 * peer, base);
            store(constants.host + mapping_at + 4 * static_cast<size_t>(peer), peer);
            store(constants.host + mapping_at + 4 * (ranks + static_cast<size_t>(peer)), peer);
        }
        store(constants.host + teams_at, constants.base + world_at);
        auto set = [&](const char* name, auto value) { store(constants.host + world_at + offset_of(team_fields, name), value); };
        set("my_pe", int32_t{rank});
        set("start", int32_t{0});
        set("stride", int32_t{1});
        set("size", int32_t{ranks_});
        set("team_idx", int32_t{0});
        set("are_gpus_p2p_connected", ranks_ <= ranks_per_node_);
        set("pe_mapping", constants.base + mapping_at);

        Region& counters = m.memory.map(nullptr, counter_bytes, "NVSHMEM's counters", rank);
        t.counters = counters.base;
        barrier_state_.push_back(&counters);
        for (uint64_t parity = 0; parity < 2; parity++) {
            uint64_t at = heap_base + static_cast<uint64_t>(rank) * heap_stride + words_at + parity * words_apart;
            Region& words = m.memory.map(nullptr, 8 * ranks, "NVSHMEM's barrier words of rank " + std::to_string(rank), rank, at);
            words.synchronises = true;
            barrier_state_.push_back(&words);
        }
    }
    restart_barriers();
}

/// As after nvshmem_init: no barrier has begun. Their count starts at 1, because a word of 0 means nobody came yet.
void Network::restart_barriers() {
    for (Region* region : barrier_state_) std::memset(region->host, 0, region->size);
    for (const Tables& t : tables_) store(barrier_state_[3 * static_cast<size_t>(&t - tables_.data())]->host + sync_counters_at, int64_t{1});
}

void Network::reset() {
    queue_pairs_.clear();
    fences_.clear();
    calls_.clear();
    restart_barriers();
}

/// Peers of the node are mapped, so the headers store to them directly; other ranks are reached through
/// nvshmemi_transfer_*. Teams other than the world are not there: what uses one reads through a null pointer.
void Network::fill_device_state(Machine& m, int rank, Region& state) {
    if (state.size != state_bytes)
        throw Error(ErrorKind::Unsupported, "nvshmemi_device_state_d has " + std::to_string(state.size) + " bytes, expected " + std::to_string(state_bytes) +
                    ": this PTX comes from headers of an NVSHMEM that lays out its table otherwise than the emulator knows");
    if (tables_.empty()) allocate_tables(m);
    const Tables& t = tables_[static_cast<size_t>(rank)];
    auto set = [&](const char* name, auto value) { store(state.host + offset_of(state_fields, name), value); };
    uint64_t heap = heap_base + static_cast<uint64_t>(rank) * heap_stride;
    set("version", int32_t{(1 << 16) + state_bytes});
    set("mype", int32_t{rank});
    set("npes", int32_t{ranks_});
    set("node_mype", int32_t{rank % ranks_per_node_});
    set("node_npes", int32_t{ranks_per_node_});
    // Within one node loads, stores and atomics do all; else everything may pass through a NIC.
    set("job_connectivity", ranks_ <= ranks_per_node_ ? uint32_t{job_ldst_atomics} : uint32_t{job_proxy_cst});
    set("heap_base", heap);
    set("heap_size", heap_stride);
    set("peer_heap_base_p2p", t.constants);
    set("test_wait_any_start_idx_ptr", t.counters + wait_any_at);
    set("team_pool", t.constants + 8 * static_cast<uint64_t>(ranks_));
    set("psync_pool", heap + words_at);
    set("sync_counter", t.counters + sync_counters_at);
    set("gpu_coll_env_params_var.barrier_tg_dissem_kval", int32_t{2});
    set("region_active_count", t.counters + regions_at);
}

}  // namespace dsv3::emulator
