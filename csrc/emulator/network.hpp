#pragma once

#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "machine.hpp"

namespace dsv3::emulator {

/// Virtual time that a message takes: latency, and its bytes one behind the other on the link.
struct LinkModel { uint64_t latency; double bytes_per_nanosecond; };

/// Queue pairs between devices, beneath NVSHMEM's device functions. What one queue pair carries arrives in order, nothing
/// else does; data is read from its source and lands late, in pieces, at moments that the scheduler chooses.
///
/// To the race checker a queue pair is two agents, a reader of sources and a writer of destinations, whose time is the
/// number of the request. Who acquires a signal knows the requests before it on its own queue pair, and what the
/// sender knew; who comes back from quiet knows all that it waited for.
class Network {
  public:
    static constexpr uint64_t heap_base = 0x1000'0000'0000, heap_stride = uint64_t{1} << 36;
    static constexpr int default_queue_pair = 1, any_queue_pair = INT32_MAX, all_ranks = 1 << 15;

    Network(int ranks, int ranks_per_node, LinkModel nvlink, LinkModel infiniband);

    struct Atomic { int op; uint64_t value; uint32_t bytes; };  ///< NVSHMEM's number of the operation
    /// The address on rank `to` of what a kernel of rank `from` names by a symmetric address of its own.
    uint64_t translate(const Context& c, uint64_t address, int to, int lane) const;
    /// `queue_pair` as the caller named it; the default one is any of several. Returns which one it took.
    int choose_queue_pair(Machine& m, int queue_pair) const;
    void put(Context& c, const Inst& inst, int lane, uint64_t to, uint64_t from, uint64_t bytes, int rank, int queue_pair);
    void atomic(Context& c, const Inst& inst, int lane, uint64_t to, const Atomic& atomic, int rank, int queue_pair);
    /// Empty once nothing that matches is under way; else what is. Then `completed` is what the caller may know.
    std::string pending(int from, int to, const std::vector<int>& queue_pairs, Knowledge* completed) const;
    void fence(int from);
    void fill_device_state(Machine& m, int rank, Region& state) const;

    void stall(int from, int to, uint64_t until) { links_[{from, to}].stalled_until = until; }
    void drop(int from, int to, uint64_t message) { links_[{from, to}].drops.insert(message); }
    void kill(int rank);
    std::string troubles() const;   ///< what got lost or stands still, for the message of a deadlock
    void forget_order();            ///< nothing runs: what is left belongs to dead devices
    void reset() { queue_pairs_.clear(); }  ///< after a failure

    bool same_node(int a, int b) const { return a / ranks_per_node_ == b / ranks_per_node_; }
    struct LinkCounts { uint64_t messages = 0, bytes = 0, lost = 0; };
    std::map<std::pair<int, int>, LinkCounts> counts;
    int ranks() const { return ranks_; }

  private:
    struct Fence { uint64_t serial = 0; Clock before; };  ///< the last request before it, and all of them as clocks
    struct Request {
        Warp* warp;
        const Inst* inst;
        int lane;
        uint64_t to = 0, from = 0, bytes = 0, serial = 0, ready_at = 0;
        bool is_atomic = false, lost = false;
        Atomic atomic{};
        Fence fence;
        uint32_t number = 0, read_access = 0, write_access = 0;
        std::vector<std::pair<uint64_t, uint64_t>> pieces;
        Knowledge knowledge;
    };
    struct QueuePair {
        int from, to, index;
        uint32_t launch = 0;           ///< whose agents these are
        Agent reads = 0, writes = 0;
        uint32_t issued = 0, done = 0;
        bool active = false, broken = false;
        std::deque<std::unique_ptr<Request>> queue{};
    };
    struct Link { uint64_t free_at = 0, stalled_until = 0; std::set<uint64_t> drops; };
    class Delivery;

    void post(Context& c, const Inst& inst, int lane, int rank, int queue_pair, std::unique_ptr<Request> request);
    bool step(Machine& m, QueuePair& qp);
    bool stands_still(const QueuePair& qp) const;
    uint64_t ready_at(const QueuePair& qp) const;
    void move_piece(Machine& m, QueuePair& qp, Request& r, uint64_t first, uint64_t last);
    void apply_atomic(Machine& m, QueuePair& qp, Request& r);
    Target target(Machine& m, const Request& r, uint64_t address, uint64_t bytes, bool write) const;
    void check(Machine& m, const Request& r, const Target& t, uint64_t bytes, uint32_t access, bool write) const;
    void finish(Machine& m, QueuePair& qp, bool delivered);

    int ranks_, ranks_per_node_;
    LinkModel nvlink_, infiniband_;
    std::map<std::tuple<int, int, int>, QueuePair> queue_pairs_;
    std::map<std::pair<int, int>, Link> links_;
    std::vector<Fence> fences_;        ///< by rank: its last one
    std::vector<bool> dead_;
    uint64_t serial_ = 0;
};

/// A device function of NVSHMEM that the machine provides; null for any other name.
using NetworkCall = Flow (*)(Context&, const Inst&, const CallTarget&);
NetworkCall network_call(const std::string& name);

}  // namespace dsv3::emulator
