// NVSHMEM's device functions, as its headers leave them in the PTX (nvshmemi_transfer_*), and the public ones under their
// own names with C linkage, for kernels that declare them without the headers.

#include <algorithm>
#include <cstring>

#include "network.hpp"

namespace dsv3::emulator {
namespace {

uint64_t argument(const Context& c, const CallTarget& t, size_t index, int lane) {
    const CallTarget::Copy& copy = t.in[index];
    uint64_t value = 0;
    std::memcpy(&value, c.w.local.data() + static_cast<size_t>(lane) * c.w.cta->launch->program->local_bytes + copy.from, std::min(copy.size, 8u));
    return value;
}
int integer(const Context& c, const CallTarget& t, size_t index, int lane) { return static_cast<int32_t>(argument(c, t, index, lane)); }

void give_back(const Context& c, const CallTarget& t, int lane, uint64_t value) {
    uint8_t* memory = c.w.local.data() + static_cast<size_t>(lane) * c.w.cta->launch->program->local_bytes;
    std::memcpy(memory + t.out[0].to, &value, std::min(t.out[0].size, 8u));
}

template <class F>
Flow each_lane(Context& c, F f) {
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) f(__builtin_ctz(rest));
    return Flow::Yield;
}

enum Group { thread, warp, block };

/// Calls f for the lanes that send: each with what it did itself, or a warp's first with what all of it did, of a block
/// the first warp's.
template <Group group, class F>
Flow acting(Context& c, F f) {
    if (group == thread) {
        uint32_t all = c.mask;
        for (uint32_t rest = all; rest; rest &= rest - 1) c.mask = rest & -rest, f(__builtin_ctz(rest));
        c.mask = all;
        return Flow::Yield;
    }
    if (!c.converged(c.w.live)) return c.block(Wait::Lanes, c.w.id, "other lanes at a call of the whole warp");
    if (group == warp || c.w.number == 0) f(__builtin_ctz(c.mask));
    return Flow::Yield;
}

void expect_arguments(Context& c, const CallTarget& t, size_t in, size_t out = 0) {
    if (t.in.size() != in || t.out.size() != out)
        c.fail(ErrorKind::Unsupported, "this function of NVSHMEM with " + std::to_string(t.in.size()) + " arguments, expected " + std::to_string(in));
}

/// (destination, source, bytes, rank, queue pair)
template <Group group>
Flow put(Context& c, const Inst& i, const CallTarget& t) {
    expect_arguments(c, t, 5);
    return acting<group>(c, [&](int l) {
        Network& n = *c.m.network;
        n.put(c, i, l, argument(c, t, 0, l), argument(c, t, 1, l), argument(c, t, 2, l), integer(c, t, 3, l), n.choose_queue_pair(c.m, integer(c, t, 4, l)));
    });
}

/// (destination, source, bytes, signal address, signal, operation, rank, [is_nbi,] queue pair)
template <Group group>
Flow put_signal(Context& c, const Inst& i, const CallTarget& t) {
    size_t more = t.in.size() == 9;
    expect_arguments(c, t, 8 + more);
    return acting<group>(c, [&](int l) {
        Network& n = *c.m.network;
        int rank = integer(c, t, 6, l), qp = n.choose_queue_pair(c.m, integer(c, t, 7 + more, l));
        if (more && !(argument(c, t, 7, l) & 1)) c.fail(ErrorKind::Unsupported, "a blocking put with signal: use the nbi form", l);
        n.put(c, i, l, argument(c, t, 0, l), argument(c, t, 1, l), argument(c, t, 2, l), rank, qp);
        n.atomic(c, i, l, argument(c, t, 3, l), {integer(c, t, 5, l), argument(c, t, 4, l), 8}, rank, qp);
    });
}

/// (address, value, rank, operation, queue pair), of NVSHMEM's inner form
template <uint32_t bytes>
Flow atomic(Context& c, const Inst& i, const CallTarget& t) {
    expect_arguments(c, t, 5);
    return acting<thread>(c, [&](int l) {
        Network& n = *c.m.network;
        n.atomic(c, i, l, argument(c, t, 0, l), {integer(c, t, 3, l), argument(c, t, 1, l), bytes}, integer(c, t, 2, l), n.choose_queue_pair(c.m, integer(c, t, 4, l)));
    });
}
/// (address, value, operation, rank, queue pair)
Flow signal_op(Context& c, const Inst& i, const CallTarget& t) {
    expect_arguments(c, t, 5);
    return acting<thread>(c, [&](int l) {
        Network& n = *c.m.network;
        n.atomic(c, i, l, argument(c, t, 0, l), {integer(c, t, 2, l), argument(c, t, 1, l), 8}, integer(c, t, 3, l), n.choose_queue_pair(c.m, integer(c, t, 4, l)));
    });
}

Flow wait_quiet(Context& c, int to, const std::vector<int>& queue_pairs) {
    int from = c.w.cta->launch->device;
    Knowledge completed;
    std::string pending = c.m.network->pending(from, to, queue_pairs, c.checks ? &completed : nullptr);
    if (!pending.empty()) return c.block(Wait::Network, static_cast<uint64_t>(from), "quiet: " + pending);
    c.w.acquire(c.mask, completed);
    return Flow::Yield;
}

/// (use_membar, rank, queue pairs, how many); all lanes are taken to name the same.
Flow transfer_quiet(Context& c, const Inst&, const CallTarget& t) {
    expect_arguments(c, t, 4);
    int l = __builtin_ctz(c.mask), count = integer(c, t, 3, l);
    uint64_t list = argument(c, t, 2, l);
    std::vector<int> queue_pairs;
    for (int k = 0; list && count != Network::any_queue_pair && k < count; k++) {
        int32_t q;
        std::memcpy(&q, c.locate(Space::Generic, list + 4 * static_cast<uint64_t>(k), 4, 4, l, false).data, 4);
        queue_pairs.push_back(q);
    }
    return wait_quiet(c, integer(c, t, 1, l), queue_pairs);
}
Flow quiet(Context& c, const Inst&, const CallTarget&) { return wait_quiet(c, Network::all_ranks, {}); }

Flow fence(Context& c, const Inst&, const CallTarget&) {
    c.m.network->fence(c.w.cta->launch->device);
    return Flow::Yield;
}

/// What NVSHMEM does behind the end of a wait: what relaxed loads saw is acquired.
Flow update_memory(Context& c, const Inst&, const CallTarget&) {
    if (c.checks && c.w.fences)
        each_lane(c, [&](int l) {
            for (auto& from : c.w.fences->pending) c.w.known[static_cast<size_t>(l)].join(from[static_cast<size_t>(l)]);
        });
    return Flow::Yield;
}
Flow nothing(Context&, const Inst&, const CallTarget&) { return Flow::Next; }

Flow my_rank(Context& c, const Inst&, const CallTarget& t) {
    expect_arguments(c, t, 0, 1);
    return each_lane(c, [&](int l) { give_back(c, t, l, static_cast<uint64_t>(c.w.cta->launch->device)); });
}
Flow ranks(Context& c, const Inst&, const CallTarget& t) {
    expect_arguments(c, t, 0, 1);
    return each_lane(c, [&](int l) { give_back(c, t, l, static_cast<uint64_t>(c.m.network->ranks())); });
}
/// (address, rank): a peer's address if it is of the same node, else null.
Flow peer_address(Context& c, const Inst&, const CallTarget& t) {
    expect_arguments(c, t, 2, 1);
    return each_lane(c, [&](int l) {
        uint64_t remote = c.m.network->translate(c, argument(c, t, 0, l), integer(c, t, 1, l), l);
        give_back(c, t, l, c.m.network->same_node(c.w.cta->launch->device, integer(c, t, 1, l)) ? remote : 0);
    });
}

constexpr std::pair<const char*, NetworkCall> by_name[] = {
    {"nvshmemx_qp_char_put_nbi", put<thread>},
    {"nvshmemx_qp_char_put_nbi_warp", put<warp>},
    {"nvshmemx_qp_char_put_nbi_block", put<block>},
    {"nvshmemx_qp_char_put_signal_nbi", put_signal<thread>},
    {"nvshmemx_qp_char_put_signal_nbi_warp", put_signal<warp>},
    {"nvshmemx_qp_char_put_signal_nbi_block", put_signal<block>},
    {"nvshmemx_qp_signal_op", signal_op},
    {"nvshmem_quiet", quiet},
    {"nvshmem_fence", fence},
    {"nvshmem_ptr", peer_address},
    {"nvshmem_my_pe", my_rank},
    {"nvshmem_n_pes", ranks},
    {"_Z36nvshmemi_transfer_syncapi_update_memv", update_memory},
    {"_Z47nvshmemi_transfer_enforce_consistency_at_targetb", nothing},
};

bool begins(const std::string& name, const char* prefix) { return name.compare(0, std::strlen(prefix), prefix) == 0; }

/// Templates: the group is in the mangled name (0 a thread, 1 a warp, 3 a block); of puts, operation 1.
NetworkCall of_template(const std::string& name) {
    auto by_group = [&](size_t at, NetworkCall a, NetworkCall b, NetworkCall c) -> NetworkCall {
        char group = at < name.size() ? name[at] : ' ';
        return group == '0' ? a : group == '1' ? b : group == '3' ? c : nullptr;
    };
    constexpr const char* put_prefix = "_Z25nvshmemi_transfer_rma_nbiIL13threadgroup_t";
    constexpr const char* signal_prefix = "_Z37nvshmemi_transfer_put_signal_dispatchIL13threadgroup_t";
    if (begins(name, put_prefix) && name.find("nvshmemi_op_t1E") != std::string::npos)
        return by_group(std::strlen(put_prefix), put<thread>, put<warp>, put<block>);
    if (begins(name, signal_prefix)) return by_group(std::strlen(signal_prefix), put_signal<thread>, put_signal<warp>, put_signal<block>);
    if (begins(name, "_Z23nvshmemi_transfer_quietI")) return transfer_quiet;
    if (begins(name, "_Z23nvshmemi_transfer_fenceI")) return fence;
    constexpr const char* atomic_prefix = "_Z30nvshmemi_transfer_amo_nonfetchI";
    if (begins(name, atomic_prefix)) return std::strchr("ij", name[std::strlen(atomic_prefix)]) ? atomic<4> : atomic<8>;
    return nullptr;
}

}  // namespace

NetworkCall network_call(const std::string& name) {
    for (auto& [known, call] : by_name)
        if (name == known) return call;
    return of_template(name);
}

}  // namespace dsv3::emulator
