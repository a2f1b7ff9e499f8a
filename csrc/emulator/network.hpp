#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "machine.hpp"

namespace dsv3::emulator {

/// Queue pairs between devices, beneath NVSHMEM's device functions. What one queue pair carries arrives in order, nothing
/// else does; data is read from its source and lands late, in pieces, at moments that the scheduler chooses.
///
/// To the race checker a queue pair is three agents, whose time is the number of the request: a reader of sources and a
/// writer of destinations, and one for gets, which only quiet orders. Who acquires a signal knows the puts and atomics
/// before it on its own queue pair, and what the sender knew; who comes back from quiet knows all that it waited for; who
/// comes back from a blocking put may write to the source, and knows nothing of the destination.
///
/// A get or a fetching atomic is a message without payload to the other rank (with the operands, for an atomic), and one
/// back with the answer. Both are counted on their links, and both can be lost.
class Network {
  public:
    static constexpr uint64_t heap_base = 0x1000'0000'0000, heap_stride = uint64_t{1} << 36;

    Network(int ranks, int ranks_per_node, LinkModel nvlink, LinkModel infiniband);

    /// call: who waits, 0 if nobody does; rides: posted with the request before, for nothing.
    struct Route { int rank, queue_pair; uint64_t call = 0; bool rides = false; };
    struct Atomic { int op; Type type; uint64_t value, compare = 0; };  ///< NVSHMEM's number of the operation
    /// The address on rank `to` of what a kernel of rank `from` names by a symmetric address of its own.
    uint64_t translate(const Context& c, uint64_t address, int to, int lane) const;
    /// `queue_pair` as the caller named it; the default one is any of several. Returns which one it took.
    int choose_queue_pair(const Context& c, int queue_pair, int lane) const;
    void put(Context& c, const Inst& inst, int lane, uint64_t to, uint64_t from, uint64_t bytes, Route route);
    void put_value(Context& c, const Inst& inst, int lane, uint64_t to, uint64_t value, uint64_t bytes, Route route);
    void get(Context& c, const Inst& inst, int lane, uint64_t to, uint64_t from, uint64_t bytes, Route route);
    void atomic(Context& c, const Inst& inst, int lane, uint64_t to, const Atomic& atomic, Route route);

    /// A call that returns only when its requests are done: what came back, by lane, and what its lanes then know.
    struct Call {
        struct Answer { uint64_t value = 0; Knowledge done, published; };
        uint32_t open = 0;
        uint64_t done_at = 0;   ///< cycle, of what is done
        std::map<int, Answer> answers;
        std::string what;
    };
    uint64_t begin_call() { return ++last_call_; }
    Call& call(uint64_t id) { return calls_[id]; }
    void end_call(uint64_t id) { calls_.erase(id); }

    /// Empty once nothing that matches is under way; else what is. Then `completed` is what the caller may know, and
    /// `done_at` the cycle at which the sender knows that all is there.
    std::string pending(int from, int to, const std::vector<int>& queue_pairs, Knowledge* completed, uint64_t* done_at) const;
    void fence(int from, int to, const std::vector<int>& queue_pairs);
    /// Writes the table that NVSHMEM's headers read; see nvshmem_state.cpp.
    void fill_device_state(Machine& m, int rank, Region& state);

    /// Nanoseconds of virtual time that a request keeps the warp that posts it, within a node and between nodes.
    void set_posting(uint64_t nvlink, uint64_t infiniband) { posting_ = {nvlink, infiniband}; }
    void stall(int from, int to, uint64_t until) { links_[{from, to}].stalled_until = until; }
    void drop(int from, int to, uint64_t message) { links_[{from, to}].drops.insert(message); }
    void kill(int rank);
    std::string troubles() const;   ///< what got lost or stands still, for the message of a deadlock
    void forget_order();            ///< nothing runs: what is left belongs to dead devices
    void reset();                   ///< after a failure

    bool same_node(int a, int b) const { return a / ranks_per_node_ == b / ranks_per_node_; }
    struct LinkCounts { uint64_t messages = 0, bytes = 0, lost = 0; };  ///< of messages
    std::map<std::pair<int, int>, LinkCounts> counts;
    int ranks() const { return ranks_; }
    /// Bytes of accesses to a peer's memory by its address.
    void count_direct(int from, int to, uint64_t bytes) { direct[{from, to}] += bytes; }
    std::map<std::pair<int, int>, uint64_t> direct;
    const LinkModel& link(int a, int b) const { return same_node(a, b) ? nvlink_ : infiniband_; }
    const LinkModel& nvlink() const { return nvlink_; }
    const LinkModel& infiniband() const { return infiniband_; }

  private:
    enum class Kind : uint8_t { Put, Value, Get, Atomic };
    /// The last request before it, all of them as clocks, and which queue pairs they are on (empty: any).
    struct Fence { uint64_t serial = 0; Clock before; std::vector<int> queue_pairs; uint64_t cycle = 0; };
    struct Request {
        Kind kind;
        Warp* warp = nullptr;
        const Inst* inst = nullptr;
        int lane = 0;
        uint64_t to = 0, from = 0, bytes = 0, serial = 0, ready_at = 0, call = 0;
        bool answers = false, lost = false;
        uint64_t there = 0, ends = 0, known = 0;  ///< cycles: at the other rank; with the answer here; known here to be done
        std::pair<int, int> lost_on;
        Atomic atomic{};
        std::vector<Fence> fences;
        uint32_t number = 0, read_access = 0, write_access = 0;
        std::vector<std::pair<uint64_t, uint64_t>> pieces;
        Knowledge knowledge;
    };
    struct QueuePair {
        int from, to, index;
        uint32_t launch = 0;           ///< whose agents these are
        Agent reads = 0, writes = 0, gets = 0;
        uint32_t issued = 0, done = 0;
        uint64_t last_there = 0, done_at = 0;  ///< cycles: of the last one issued; known of what is done
        bool active = false, broken = false;
        std::deque<std::unique_ptr<Request>> queue{};
    };
    struct Link { uint64_t free_at = 0, stalled_until = 0; std::set<uint64_t> drops; };
    struct Tables { uint64_t constants = 0, counters = 0; };  ///< addresses, of one rank
    class Delivery;

    std::unique_ptr<Request> copy_request(Context& c, Kind kind, int lane, uint64_t bytes);
    void post(Context& c, const Inst& inst, Route route, std::unique_ptr<Request> request);
    /// One message on a link: counts it, and returns when it arrives, if it does.
    uint64_t send(int from, int to, uint64_t bytes, uint64_t at, Request& r);
    QueuePair* goes_first(const QueuePair& qp);
    void schedule(Machine& m, Request& r, QueuePair& qp, bool rides) const;
    bool step(Machine& m, QueuePair& qp);
    uint64_t stalled_until(const QueuePair& qp) const;
    bool stands_still(const QueuePair& qp) const;
    uint64_t ready_at(const QueuePair& qp) const;
    void move_piece(Machine& m, Request& r, uint64_t first, uint64_t last);
    void write_value(Machine& m, Request& r);
    void apply_atomic(Machine& m, QueuePair& qp, Request& r);
    void written(Machine& m, const Target& t, uint64_t bytes) const;
    Target target(Machine& m, const Request& r, uint64_t address, uint64_t bytes, bool write) const;
    void check(Machine& m, const Request& r, const Target& t, uint64_t bytes, uint32_t access, bool write) const;
    void finish(Machine& m, QueuePair& qp, bool delivered);
    void allocate_tables(Machine& m);
    void restart_barriers();

    int ranks_, ranks_per_node_;
    LinkModel nvlink_, infiniband_;
    std::array<uint64_t, 2> posting_{};
    std::map<std::tuple<int, int, int>, QueuePair> queue_pairs_;
    std::map<std::pair<int, int>, Link> links_;
    std::map<std::tuple<int, int, int>, Fence> fences_;  ///< by sender, destination and queue pair or `every`
    std::map<uint64_t, Call> calls_;
    std::vector<Tables> tables_;       ///< by rank, once a program needs them
    std::vector<Region*> barrier_state_;  ///< three a rank: its counters, and the words of odd and of even barriers
    std::vector<bool> dead_;
    uint64_t serial_ = 0, last_call_ = 0;
};

/// A device function of NVSHMEM that the machine provides; empty for any other name.
struct NetworkCall {
    enum Group : uint8_t { Thread, Warp, Block };
    struct Variant { Group group = Thread; bool gets = false; Type type = Type::None; };
    using Run = Flow (*)(Context&, const Inst&, const CallTarget&, Variant);
    Run run = nullptr;
    Variant variant{};
    explicit operator bool() const { return run != nullptr; }
    Flow operator()(Context& c, const Inst& inst, const CallTarget& t) const { return run(c, inst, t, variant); }
};
NetworkCall network_call(const std::string& name);

}  // namespace dsv3::emulator
