#pragma once

#include <cstdint>

// What the emulator knows of NVSHMEM's headers: where the fields lie that they read, and the numbers that they pass. These
// are the names as the headers spell them, so that a test can hold every line against the installed ones.

namespace dsv3::emulator::nvshmem {

struct Named { const char* name; uint32_t value; };

/// Offsets in nvshmemi_device_host_state_t, the type of nvshmemi_device_state_d.
constexpr Named state_fields[] = {
    {"version", 0},
    {"mype", 4},
    {"npes", 8},
    {"node_mype", 12},
    {"node_npes", 16},
    {"job_connectivity", 32},
    {"heap_base", 40},
    {"heap_size", 48},
    {"peer_heap_base_p2p", 56},
    {"test_wait_any_start_idx_ptr", 88},
    {"team_pool", 96},
    {"psync_pool", 104},
    {"sync_counter", 112},
    {"gpu_coll_env_params_var.barrier_tg_dissem_kval", 128},
    {"region_active_count", 832},
};
constexpr uint32_t state_bytes = 848;

/// Offsets in nvshmemi_team_t.
constexpr Named team_fields[] = {
    {"my_pe", 4}, {"start", 8}, {"stride", 12}, {"size", 16}, {"team_idx", 20}, {"are_gpus_p2p_connected", 236}, {"pe_mapping", 784},
};
constexpr uint32_t team_bytes = 816;

enum Number : uint32_t {
    op_put = 1, op_get = 4,
    amo_inc = 2, amo_set = 3, amo_add = 4, amo_and = 5, amo_or = 6, amo_xor = 7, amo_signal = 8, amo_signal_set = 9, amo_signal_add = 10,
    amo_fetch = 12, amo_fetch_inc = 13, amo_fetch_add = 14, amo_fetch_and = 15, amo_fetch_or = 16, amo_fetch_xor = 17, amo_swap = 18,
    amo_compare_swap = 19,
    group_thread = 0, group_warp = 1, group_block = 3,
    qp_host = 0, qp_default = 1, qp_any = INT32_MAX, pe_all = 1 << 15,
    job_ldst_atomics = 1, job_proxy_cst = 16,
    teams = 7, sync_size = 55296,
};

constexpr Named numbers[] = {
    {"NVSHMEMI_OP_PUT", op_put}, {"NVSHMEMI_OP_GET", op_get},
    {"NVSHMEMI_AMO_INC", amo_inc}, {"NVSHMEMI_AMO_SET", amo_set}, {"NVSHMEMI_AMO_ADD", amo_add}, {"NVSHMEMI_AMO_AND", amo_and},
    {"NVSHMEMI_AMO_OR", amo_or}, {"NVSHMEMI_AMO_XOR", amo_xor}, {"NVSHMEMI_AMO_SIGNAL", amo_signal},
    {"NVSHMEM_SIGNAL_SET", amo_signal_set}, {"NVSHMEM_SIGNAL_ADD", amo_signal_add}, {"NVSHMEMI_AMO_FETCH", amo_fetch},
    {"NVSHMEMI_AMO_FETCH_INC", amo_fetch_inc}, {"NVSHMEMI_AMO_FETCH_ADD", amo_fetch_add}, {"NVSHMEMI_AMO_FETCH_AND", amo_fetch_and},
    {"NVSHMEMI_AMO_FETCH_OR", amo_fetch_or}, {"NVSHMEMI_AMO_FETCH_XOR", amo_fetch_xor}, {"NVSHMEMI_AMO_SWAP", amo_swap},
    {"NVSHMEMI_AMO_COMPARE_SWAP", amo_compare_swap},
    {"NVSHMEMI_THREADGROUP_THREAD", group_thread}, {"NVSHMEMI_THREADGROUP_WARP", group_warp}, {"NVSHMEMI_THREADGROUP_BLOCK", group_block},
    {"NVSHMEMX_QP_HOST", qp_host}, {"NVSHMEMX_QP_DEFAULT", qp_default}, {"NVSHMEMX_QP_ALL", qp_any}, {"NVSHMEMX_PE_ALL", pe_all},
    {"NVSHMEMI_JOB_GPU_LDST_ATOMICS", job_ldst_atomics}, {"NVSHMEMI_JOB_GPU_PROXY_CST", job_proxy_cst},
    {"NVSHMEM_TEAMS_MIN", teams}, {"NVSHMEMI_SYNC_SIZE", sync_size},
};

}  // namespace dsv3::emulator::nvshmem
