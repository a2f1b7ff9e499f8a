// NVSHMEM's device functions: the C++ templates that its headers leave undefined in the PTX (nvshmemi_transfer_*), by their
// mangled names, and a few public ones with C linkage, for kernels that declare them without the headers.

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "network.hpp"
#include "nvshmem_layout.hpp"
#include "ordering.hpp"

namespace dsv3::emulator {
namespace {

using Variant = NetworkCall::Variant;
using Route = Network::Route;

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

uint64_t sign_extended(uint64_t value, Type type) {
    int unused = 64 - 8 * size_of(type);
    return is_signed(type) && unused ? static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused) : value;
}

template <class F>
Flow each_lane(Context& c, F f) {
    for (uint32_t rest = c.mask; rest; rest &= rest - 1) f(__builtin_ctz(rest));
    return Flow::Yield;
}

void expect_arguments(Context& c, const CallTarget& t, size_t in, size_t out = 0) {
    if (t.in.size() != in || t.out.size() != out)
        c.fail(ErrorKind::Unsupported, "this function of NVSHMEM with " + std::to_string(t.in.size()) + " arguments, expected " + std::to_string(in));
}

Flow wait_for_lanes(const Context& c) { return c.block(Wait::Lanes, c.w.id, "other lanes at a call of the whole warp"); }

/// Is the whole group here? The headers synchronise a block before and behind such a call, so a warp is all that can miss.
bool assembled(const Context& c, NetworkCall::Group group) { return group == NetworkCall::Thread || c.converged(c.w.live); }

/// Calls f for the lanes that send: each with what it did itself, or a warp's first with what all of it did, of a block
/// the first warp's.
template <class F>
void each_sender(Context& c, NetworkCall::Group group, F f) {
    uint32_t all = c.mask;
    if (group == NetworkCall::Thread) {
        for (uint32_t rest = all; rest; rest &= rest - 1) c.mask = rest & -rest, f(__builtin_ctz(rest));
        c.mask = all;
    } else if (group == NetworkCall::Warp || c.w.number == 0) {
        f(__builtin_ctz(all));
    }
}

/// A call that does not wait: f(lane).
template <class F>
Flow send(Context& c, NetworkCall::Group group, F f) {
    if (!assembled(c, group)) return wait_for_lanes(c);
    each_sender(c, group, f);
    return Flow::Yield;
}

/// A call that waits for what it sends: f(lane, call), then returned(lane, answer) of each lane that sent.
template <class F, class G>
Flow send_and_wait(Context& c, const Inst& i, NetworkCall::Group group, const char* what, F f, G returned) {
    Network& n = *c.m.network;
    if (c.group->stage == 0) {
        if (!assembled(c, group)) return wait_for_lanes(c);
        uint64_t id = n.begin_call();
        each_sender(c, group, [&](int l) { f(l, id); });
        c.group->stage = 1;
        c.group->token = id;
    }
    uint64_t id = c.group->token;
    Network::Call& call = n.call(id);
    if (call.open)
        return c.block(Wait::Network, static_cast<uint64_t>(c.w.cta->launch->device), std::string(what) + " of " + call.what);
    c.m.wait_until(c.w, i, call.done_at, {Wait::Network, 1});
    for (auto& [lane, answer] : call.answers) returned(group == NetworkCall::Thread ? 1u << lane : c.mask, lane, answer);
    n.end_call(id);
    c.group->stage = 0;
    return Flow::Yield;
}

/// (destination, source, bytes, rank, queue pair); of a get, the source is remote and comes first.
void copy(Context& c, const Inst& i, const CallTarget& t, Variant v, int l, uint64_t call) {
    Network& n = *c.m.network;
    Route route{integer(c, t, 3, l), n.choose_queue_pair(c, integer(c, t, 4, l), l), call};
    uint64_t remote = argument(c, t, 0, l), local = argument(c, t, 1, l), bytes = argument(c, t, 2, l);
    if (v.gets) n.get(c, i, l, local, remote, bytes, route);
    else n.put(c, i, l, remote, local, bytes, route);
}
Flow copy_nbi(Context& c, const Inst& i, const CallTarget& t, Variant v) {
    expect_arguments(c, t, 5);
    return send(c, v.group, [&](int l) { copy(c, i, t, v, l, 0); });
}
Flow copy_blocking(Context& c, const Inst& i, const CallTarget& t, Variant v) {
    expect_arguments(c, t, 5);
    return send_and_wait(c, i, v.group, v.gets ? "a get" : "a put", [&](int l, uint64_t call) { copy(c, i, t, v, l, call); },
                         [&](uint32_t lanes, int, const Network::Call::Answer& answer) { c.w.acquire(lanes, answer.done); });
}

/// (destination, source, bytes, signal address, signal, operation, rank, [is_nbi,] queue pair)
Flow put_signal(Context& c, const Inst& i, const CallTarget& t, Variant v) {
    size_t more = t.in.size() == 9;
    expect_arguments(c, t, 8 + more);
    auto put = [&](int l, uint64_t call) {
        Network& n = *c.m.network;
        Route route{integer(c, t, 6, l), n.choose_queue_pair(c, integer(c, t, 7 + more, l), l), call};
        uint64_t bytes = argument(c, t, 2, l);
        n.put(c, i, l, argument(c, t, 0, l), argument(c, t, 1, l), bytes, route);
        Route with_it = route;
        with_it.rides = bytes != 0;
        n.atomic(c, i, l, argument(c, t, 3, l), {integer(c, t, 5, l), Type::U64, argument(c, t, 4, l)}, with_it);
    };
    bool waits = more && !(argument(c, t, 7, __builtin_ctz(c.mask)) & 1);
    if (!waits) return send(c, v.group, [&](int l) { put(l, 0); });
    return send_and_wait(c, i, v.group, "a put with signal", put,
                         [&](uint32_t lanes, int, const Network::Call::Answer& answer) { c.w.acquire(lanes, answer.done); });
}

/// (address, value, rank, queue pair)
Flow put_value(Context& c, const Inst& i, const CallTarget& t, Variant v) {
    expect_arguments(c, t, 4);
    return send(c, NetworkCall::Thread, [&](int l) {
        Network& n = *c.m.network;
        n.put_value(c, i, l, argument(c, t, 0, l), argument(c, t, 1, l), static_cast<uint64_t>(size_of(v.type)),
                    {integer(c, t, 2, l), n.choose_queue_pair(c, integer(c, t, 3, l), l)});
    });
}
/// (address, rank, queue pair), gives back the value
Flow get_value(Context& c, const Inst& i, const CallTarget& t, Variant v) {
    expect_arguments(c, t, 3, 1);
    return send_and_wait(c, i, NetworkCall::Thread, "a get", [&](int l, uint64_t call) {
        Network& n = *c.m.network;
        n.get(c, i, l, 0, argument(c, t, 0, l), static_cast<uint64_t>(size_of(v.type)),
              {integer(c, t, 1, l), n.choose_queue_pair(c, integer(c, t, 2, l), l), call});
    }, [&](uint32_t lanes, int l, const Network::Call::Answer& answer) {
        c.w.acquire(lanes, answer.done);
        give_back(c, t, l, sign_extended(answer.value, v.type));
    });
}

/// (address, value, rank, operation, queue pair)
Flow atomic(Context& c, const Inst& i, const CallTarget& t, Variant v) {
    expect_arguments(c, t, 5);
    return send(c, NetworkCall::Thread, [&](int l) {
        Network& n = *c.m.network;
        n.atomic(c, i, l, argument(c, t, 0, l), {integer(c, t, 3, l), v.type, argument(c, t, 1, l)},
                 {integer(c, t, 2, l), n.choose_queue_pair(c, integer(c, t, 4, l), l)});
    });
}
/// (address, value, compare, rank, operation, queue pair), gives back the value before. What it read was published by
/// others; like a relaxed load, it takes a fence behind it to acquire that.
Flow fetching_atomic(Context& c, const Inst& i, const CallTarget& t, Variant v) {
    expect_arguments(c, t, 6, 1);
    return send_and_wait(c, i, NetworkCall::Thread, "an atomic", [&](int l, uint64_t call) {
        Network& n = *c.m.network;
        n.atomic(c, i, l, argument(c, t, 0, l), {integer(c, t, 4, l), v.type, argument(c, t, 1, l), argument(c, t, 2, l)},
                 {integer(c, t, 3, l), n.choose_queue_pair(c, integer(c, t, 5, l), l), call});
    }, [&](uint32_t lanes, int l, const Network::Call::Answer& answer) {
        c.w.acquire(lanes, answer.done);
        if (c.checks) {
            if (!c.w.fences) c.w.fences = std::make_unique<Warp::Fences>();
            c.w.fences->pending[3][static_cast<size_t>(l)].join(answer.published);
        }
        give_back(c, t, l, sign_extended(answer.value, v.type));
    });
}
/// (address, value, operation, rank, queue pair)
Flow signal_op(Context& c, const Inst& i, const CallTarget& t, Variant) {
    expect_arguments(c, t, 5);
    return send(c, NetworkCall::Thread, [&](int l) {
        Network& n = *c.m.network;
        n.atomic(c, i, l, argument(c, t, 0, l), {integer(c, t, 2, l), Type::U64, argument(c, t, 1, l)},
                 {integer(c, t, 3, l), n.choose_queue_pair(c, integer(c, t, 4, l), l)});
    });
}

/// A list of queue pairs and how many; all lanes are taken to name the same. Empty for all of them.
std::vector<int> queue_pairs(Context& c, const CallTarget& t, size_t list_at) {
    int l = __builtin_ctz(c.mask), count = integer(c, t, list_at + 1, l);
    uint64_t list = argument(c, t, list_at, l);
    std::vector<int> result;
    for (int k = 0; list && count != static_cast<int>(nvshmem::qp_any) && k < count; k++) {
        int32_t q;
        std::memcpy(&q, c.locate(Space::Generic, list + 4 * static_cast<uint64_t>(k), 4, 4, l, false).data, 4);
        if (q == static_cast<int>(nvshmem::qp_any)) return {};
        result.push_back(q);
    }
    return result;
}

/// Returns once all is done, and then orders it and the lanes' own stores before what comes, as a fence would.
Flow wait_quiet(Context& c, const Inst& i, int to, const std::vector<int>& queue_pairs, bool fences) {
    int from = c.w.cta->launch->device;
    Knowledge completed;
    uint64_t done_at = 0;
    std::string pending = c.m.network->pending(from, to, queue_pairs, c.checks ? &completed : nullptr, &done_at);
    if (!pending.empty()) return c.block(Wait::Network, static_cast<uint64_t>(from), "quiet: " + pending);
    c.m.wait_until(c.w, i, done_at, {Wait::Network, 0});
    c.w.acquire(c.mask, completed);
    if (fences) c.await_stores(i, Scope::Sys), memory_fence(c, Scope::Sys);
    return Flow::Yield;
}
/// (use_membar, rank, queue pairs, how many)
Flow transfer_quiet(Context& c, const Inst& i, const CallTarget& t, Variant) {
    expect_arguments(c, t, 4);
    int l = __builtin_ctz(c.mask);
    return wait_quiet(c, i, integer(c, t, 1, l), queue_pairs(c, t, 2), argument(c, t, 0, l) & 1);
}
Flow quiet(Context& c, const Inst& i, const CallTarget&, Variant) { return wait_quiet(c, i, nvshmem::pe_all, {}, true); }

/// (rank, queue pairs, how many); the headers fence the lanes' own stores themselves.
Flow transfer_fence(Context& c, const Inst&, const CallTarget& t, Variant) {
    expect_arguments(c, t, 3);
    c.m.network->fence(c.w.cta->launch->device, integer(c, t, 0, __builtin_ctz(c.mask)), queue_pairs(c, t, 1));
    return Flow::Yield;
}
Flow fence(Context& c, const Inst& i, const CallTarget&, Variant) {
    c.m.network->fence(c.w.cta->launch->device, nvshmem::pe_all, {});
    c.await_stores(i, Scope::Sys);
    memory_fence(c, Scope::Sys);
    return Flow::Yield;
}

/// What NVSHMEM does behind the end of a wait: what relaxed loads saw is acquired.
Flow update_memory(Context& c, const Inst&, const CallTarget&, Variant) {
    if (c.checks && c.w.fences)
        each_lane(c, [&](int l) {
            for (auto& from : c.w.fences->pending) c.w.known[static_cast<size_t>(l)].join(from[static_cast<size_t>(l)]);
        });
    return Flow::Yield;
}

/// The headers call it only while a region is open, which needs slots for regions: there are none.
Flow submit_region(Context& c, const Inst&, const CallTarget&, Variant) {
    c.fail(ErrorKind::Unsupported, "NVSHMEM's regions are not emulated", __builtin_ctz(c.mask));
}

Flow my_rank(Context& c, const Inst&, const CallTarget& t, Variant) {
    expect_arguments(c, t, 0, 1);
    return each_lane(c, [&](int l) { give_back(c, t, l, static_cast<uint64_t>(c.w.cta->launch->device)); });
}
Flow ranks(Context& c, const Inst&, const CallTarget& t, Variant) {
    expect_arguments(c, t, 0, 1);
    return each_lane(c, [&](int l) { give_back(c, t, l, static_cast<uint64_t>(c.m.network->ranks())); });
}
/// (address, rank): a peer's address if it is of the same node, else null.
Flow peer_address(Context& c, const Inst&, const CallTarget& t, Variant) {
    expect_arguments(c, t, 2, 1);
    return each_lane(c, [&](int l) {
        uint64_t remote = c.m.network->translate(c, argument(c, t, 0, l), integer(c, t, 1, l), l);
        give_back(c, t, l, c.m.network->same_node(c.w.cta->launch->device, integer(c, t, 1, l)) ? remote : 0);
    });
}

const std::unordered_map<std::string, NetworkCall> with_c_linkage = {
    {"nvshmemx_qp_char_put_nbi", {copy_nbi, {NetworkCall::Thread}}},
    {"nvshmemx_qp_char_put_nbi_warp", {copy_nbi, {NetworkCall::Warp}}},
    {"nvshmemx_qp_char_put_signal_nbi", {put_signal, {NetworkCall::Thread}}},
    {"nvshmemx_qp_char_put_signal_nbi_warp", {put_signal, {NetworkCall::Warp}}},
    {"nvshmemx_qp_signal_op", {signal_op}},
    {"nvshmem_quiet", {quiet}},
    {"nvshmem_fence", {fence}},
    {"nvshmem_ptr", {peer_address}},
    {"nvshmem_my_pe", {my_rank}},
    {"nvshmem_n_pes", {ranks}},
};

/// What a template's arguments say: of which group (first), put or get (second), or of which type.
enum class Takes : uint8_t { Nothing, Group, GroupAndCopy, Type };
struct Template { NetworkCall::Run run; Takes takes; };
const std::unordered_map<std::string, Template> templates = {
    {"nvshmemi_transfer_rma", {copy_blocking, Takes::GroupAndCopy}},
    {"nvshmemi_transfer_rma_nbi", {copy_nbi, Takes::GroupAndCopy}},
    {"nvshmemi_transfer_put_signal_dispatch", {put_signal, Takes::Group}},
    {"nvshmemi_transfer_rma_p", {put_value, Takes::Type}},
    {"nvshmemi_transfer_rma_g", {get_value, Takes::Type}},
    {"nvshmemi_transfer_amo_nonfetch", {atomic, Takes::Type}},
    {"nvshmemi_transfer_amo_fetch", {fetching_atomic, Takes::Type}},
    {"nvshmemi_transfer_quiet", {transfer_quiet, Takes::Group}},
    {"nvshmemi_transfer_fence", {transfer_fence, Takes::Group}},
    {"nvshmemi_transfer_submit_active_region_slow", {submit_region, Takes::Group}},
    {"nvshmemi_transfer_syncapi_update_mem", {update_memory, Takes::Nothing}},
    {"nvshmemi_transfer_enforce_consistency_at_target", {update_memory, Takes::Nothing}},
};

/// A mangled name in pieces, as far as these functions need it: the name, and its template's arguments.
struct Mangled {
    std::string name;
    std::vector<std::string> arguments;  ///< a builtin type's letter, another type's name, or an enumerator's number

    explicit Mangled(const std::string& text) : text_(text) {
        if (text.compare(0, 2, "_Z") != 0) return;
        at_ = 2;
        name = identifier();
        if (name.empty() || next() != 'I') return;
        for (at_++; next() && next() != 'E';) {
            if (next() == 'L') {
                at_++;
                identifier();
                size_t end = text_.find('E', at_);
                arguments.push_back(text_.substr(at_, end - at_));
                at_ = end == std::string::npos ? text_.size() : end + 1;
            } else if (next() >= '0' && next() <= '9') {
                arguments.push_back(identifier());
            } else {
                arguments.emplace_back(1, text_[at_++]);
            }
        }
    }

  private:
    char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    std::string identifier() {
        size_t length = 0;
        for (; next() >= '0' && next() <= '9' && length < text_.size(); at_++) length = 10 * length + static_cast<size_t>(next() - '0');
        std::string found = text_.substr(std::min(at_, text_.size()), length);
        at_ += found.size();
        return found;
    }
    const std::string& text_;
    size_t at_ = 0;
};

bool take_group(const std::string& number, Variant& v) {
    if (number == std::to_string(nvshmem::group_thread)) v.group = NetworkCall::Thread;
    else if (number == std::to_string(nvshmem::group_warp)) v.group = NetworkCall::Warp;
    else if (number == std::to_string(nvshmem::group_block)) v.group = NetworkCall::Block;
    else return false;
    return true;
}
bool take_copy(const std::string& number, Variant& v) {
    v.gets = number == std::to_string(nvshmem::op_get);
    return v.gets || number == std::to_string(nvshmem::op_put);
}
/// The types that NVSHMEM's device library has these for: not for signed char, which its headers offer.
bool take_type(const std::string& name, Variant& v) {
    static const std::unordered_map<std::string, Type> types = {
        {"c", Type::S8}, {"h", Type::U8}, {"s", Type::S16}, {"t", Type::U16}, {"i", Type::S32}, {"j", Type::U32},
        {"l", Type::S64}, {"m", Type::U64}, {"x", Type::S64}, {"y", Type::U64}, {"f", Type::F32}, {"d", Type::F64}, {"__half", Type::F16},
    };
    auto found = types.find(name);
    if (found != types.end()) v.type = found->second;
    return found != types.end();
}

NetworkCall resolve(const std::string& name) {
    auto plain = with_c_linkage.find(name);
    if (plain != with_c_linkage.end()) return plain->second;
    Mangled mangled(name);
    auto found = templates.find(mangled.name);
    if (found == templates.end()) return {};
    const std::vector<std::string>& a = mangled.arguments;
    NetworkCall call{found->second.run};
    bool right = false;
    switch (found->second.takes) {
        case Takes::Nothing: right = a.empty(); break;
        case Takes::Group: right = a.size() == 1 && take_group(a[0], call.variant); break;
        case Takes::GroupAndCopy: right = a.size() >= 2 && take_group(a[0], call.variant) && take_copy(a[1], call.variant); break;
        case Takes::Type: right = a.size() == 1 && take_type(a[0], call.variant); break;
    }
    return right ? call : NetworkCall{};
}

}  // namespace

NetworkCall network_call(const std::string& name) {
    thread_local std::unordered_map<std::string, NetworkCall> known;
    if (known.size() > 4096) known.clear();
    auto [at, fresh] = known.try_emplace(name);
    if (fresh) at->second = resolve(name);
    return at->second;
}

}  // namespace dsv3::emulator
