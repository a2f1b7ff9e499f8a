#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "error.hpp"
#include "memory.hpp"
#include "program.hpp"
#include "random.hpp"
#include "timing.hpp"
#include "trace.hpp"

namespace dsv3::emulator {

class Machine;
class Network;
struct Cta;
struct Warp;
struct Launch;

/// What a blocked group waits for. Together with an id (a barrier, a warp, ...) it is the key that wakes it.
enum class Wait : uint8_t {
    None, Lanes, Barrier, ClusterBarrier, Mbarrier, Wgmma, BulkGroup, CpAsync, Sleep, Spin, Dependency, Network, Load, Stores, Registers
};

/// Lanes of a warp that stand at one instruction.
struct Group {
    uint32_t pc = 0;
    uint32_t mask = 0;
    Wait wait = Wait::None;
    uint64_t key = 0;
    uint64_t until = 0;        ///< Sleep: when it ends
    uint64_t watch_low = 0, watch_high = 0;  ///< Spin: addresses that are polled
    uint32_t stage = 0;        ///< of an instruction that blocks in the middle
    uint64_t token = 0;
    bool timed_out = false;    ///< woken because nothing else could move
    std::function<std::string()> waiting_for;  ///< as things stand when it is asked
};

/// A strong load or test that gave the same answer again, with nothing done in between.
struct Poll { uint32_t pc = UINT32_MAX; uint64_t hash = 0, effects = 0; uint32_t count = 0; };

struct Mbarrier {
    uint32_t offset = 0;
    uint32_t expected = 0;   ///< arrivals a phase
    uint32_t pending = 0;    ///< arrivals still missing
    int64_t tx = 0;          ///< bytes still missing
    uint32_t phase = 0;      ///< the incomplete one
    Agent agent = 0;         ///< of the copies that complete here: their time is the phase
    uint32_t init_access = 0;
    int init_lane = 0;
    Knowledge arriving, completed;
    uint64_t last_arrival = 0, completed_at = 0;  ///< cycles: so far in this phase, and of the last one
};

struct NamedBarrier {
    uint32_t arrived = 0, expected = 0;  ///< threads; expected 0: all warps of the block that have not exited
    uint32_t warps = 0;                  ///< that arrived, a bit each
    uint32_t generation = 0;
    uint32_t result = 0, last_result = 0;  ///< of bar.red
    Knowledge arriving, completed;
    uint64_t last_arrival = 0, completed_at = 0;  ///< cycles: so far in this phase, and of the last one
    uint64_t stores_arriving = 0, stored_at = 0;  ///< likewise: when the stores before it lie in memory
};

/// Something asynchronous that moves in steps of its own.
class Operation {
  public:
    virtual ~Operation() = default;
    virtual bool step(Machine& m) = 0;  ///< true: finished
    struct Issuer { const Warp* warp; const Inst* inst; int lane; };
    virtual bool uses_shared(const Cta&, Issuer&) const { return false; }  ///< of a block, until it is over
    uint64_t priority = 0;                ///< "pct"
    uint64_t cycle = 0;                   ///< when it ends
};

/// The instructions that one warp has issued to the tensor core.
struct WgmmaIssue {
    const Inst* inst;
    uint64_t a_descriptor, b_descriptor;
    bool scale_d;
    Knowledge knowledge;
    uint64_t issued_at = 0;  ///< cycle
};

struct Warpgroup {
    Agent agent = 0;
    uint32_t executed = 0;            ///< instructions, in order; the agent's time
    std::deque<WgmmaIssue> queue[4];  ///< by warp
    bool active = false;              ///< its operation is listed
    std::vector<uint64_t> ends;       ///< cycle at which each executed instruction ended
};

struct WgmmaState {
    uint32_t issued = 0;              ///< instructions
    bool fenced = false;              ///< saw a wgmma.fence
    std::vector<uint32_t> group_end;  ///< instructions issued when each group was committed
    std::vector<uint8_t> writing, reading;  ///< by register: operations in flight
    std::vector<uint8_t> dirty;       ///< written by the warp since its last wgmma.fence
    uint32_t retired = 0;             ///< instructions known complete to the warp
    std::deque<std::pair<uint32_t, const Inst*>> in_flight;
};

struct BulkState {
    uint32_t group = 1;               ///< being filled, per lane
    std::map<uint32_t, int> reading, writing;  ///< operations of a group that still read, still write
    std::map<uint32_t, uint64_t> read_at, written_at;  ///< cycles, by group
    uint64_t last_at = 0;             ///< cycle of the last one issued

    /// The cycle at which all groups up to `last` were done; forgets them.
    static uint64_t done_at(std::map<uint32_t, uint64_t>& times, int64_t last) {
        uint64_t at = 0;
        while (!times.empty() && times.begin()->first <= last) {
            at = std::max(at, times.begin()->second);
            times.erase(times.begin());
        }
        return at;
    }
};

struct Warp {
    Cta* cta = nullptr;
    uint32_t number = 0;  ///< in the block
    uint32_t id = 0;      ///< in the run
    uint32_t live = 0;
    std::vector<Group> groups;
    std::vector<uint32_t> registers;
    std::vector<uint8_t> local;       ///< lane by lane
    std::vector<uint32_t> poison;     ///< by register word / 32: lanes that hold bytes nobody wrote
    uint32_t poisoned = 0;
    uint32_t carry = 0;
    uint64_t effects = 0;             ///< stores, arrivals, ...: what makes a repeated test no mere polling
    std::array<Poll, 8> polls;
    uint32_t next_poll = 0;
    uint32_t cluster_arrivals = 0, cluster_waits = 0;
    bool queued = false;              ///< is in the list of runnable warps

    Agent agent = 0;
    uint32_t now = 1;
    std::array<Knowledge, 32> known;
    struct Fences {                   ///< for the fence forms of release and acquire
        std::array<Knowledge, 32> released;  ///< as known at the fence; own accesses up to `time`
        std::array<uint32_t, 32> time{};
        std::array<Scope, 32> scope{};
        std::array<Knowledge, 32> pending[4];  ///< read by relaxed loads: from own block, cluster, device, elsewhere
    };
    std::unique_ptr<Fences> fences;
    struct Logged { uint32_t pc = UINT32_MAX, time = 0, access = 0, strength = 0; };
    std::array<Logged, 16> logged;

    uint32_t register_limit = 0;      ///< a thread's, as setmaxnreg left it; 0: fixed for good
    struct RegisterChange { const Inst* inst; uint32_t time; };
    std::vector<RegisterChange> register_changes;

    WgmmaState wgmma;
    Agent bulk_read_agent = 0, bulk_write_agent = 0, copy_agent = 0;
    std::map<int, BulkState> bulk;    ///< by lane
    std::map<int, BulkState> copies;  ///< cp.async, by lane

    // Virtual time; see timeline.cpp.
    uint64_t cycle = 0;                   ///< up to its last instruction that had an issue slot
    uint64_t issued = 0;                  ///< instructions since then
    uint64_t stored_at = 0;               ///< cycle at which all its stores to global memory lie there
    struct Loading { uint32_t word; uint64_t at; const Inst* inst; };
    std::vector<Loading> loading;         ///< registers whose values are on their way
    uint32_t partition = 0;               ///< of its SM
    uint64_t slice_start = 0;
    uint32_t row = Trace::no_row;
    struct Run { const Inst* inst = nullptr; uint32_t key = 0, length = 0; uint64_t start = 0; };
    Run run, short_run;                   ///< of instructions from one place: the open one, and of the open slice's others

    bool runnable() const;
    Knowledge release(uint32_t mask);
    void acquire(uint32_t mask, const Knowledge& k);
};

struct Cluster {
    uint32_t id = 0;
    std::vector<Cta*> ctas;
    uint32_t generation = 0;  ///< of barrier.cluster
    Knowledge arriving, completed;
    uint64_t last_arrival = 0, completed_at = 0;  ///< cycles
    uint32_t live_ctas = 0;
};

struct Cta {
    Launch* launch = nullptr;
    Cluster* cluster = nullptr;
    uint32_t id = 0;
    uint32_t index[3] = {0, 0, 0};
    uint32_t rank = 0;      ///< in its cluster
    uint32_t sm = 0;
    bool exited = false;
    bool triggered = false;
    uint32_t live_threads = 0;
    uint32_t free_registers = 0;  ///< given up by setmaxnreg.dec
    uint64_t registers_freed_at = 0;  ///< cycle of the last one
    std::vector<uint8_t> shared;  ///< by shared address
    std::unique_ptr<Shadow> shadow;
    std::unique_ptr<Poison> poison;
    PublishedMap published;
    std::map<uint32_t, Mbarrier> mbarriers;
    std::array<NamedBarrier, 16> barriers;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<Warpgroup> warpgroups;
    int operations = 0;     ///< asynchronous, that use its shared memory
    Locality locality() const;
    uint32_t rows[3] = {Trace::no_row, Trace::no_row, Trace::no_row};  ///< of its engines in the trace
};

/// A kernel on its way through a device.
struct Launch {
    std::shared_ptr<const Program> program;
    const Function* function = nullptr;
    uint32_t id = 0;
    uint32_t program_index = 0;
    int device = 0;
    int operations = 0;          ///< asynchronous, still to finish
    std::vector<Agent> agents;
    uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {1, 1, 1};
    uint32_t shared_bytes = 0;   ///< dynamic
    uint32_t shared_total = 0;   ///< end of a block's shared memory
    uint32_t registers = 0;      ///< a thread's at entry, where setmaxnreg counts; else 0
    std::vector<uint8_t> params;
    std::vector<uint32_t> constants;
    uint64_t next_cluster = 0, clusters = 0;
    uint32_t live_ctas = 0;
    bool started = false, finished = false;
    uint32_t triggered = 0;      ///< live blocks that called griddepcontrol.launch_dependents
    bool dependent = false;      ///< programmatic dependent launch: may start before its predecessor ends
    std::shared_ptr<Launch> predecessor;
    Knowledge before;            ///< what is ordered before it
    Clock seen;                  ///< what threads that have ended had acquired: ordered before the next launch
    uint64_t starts_at = 0, ends_at = 0, triggered_at = 0;  ///< cycles
    std::vector<std::unique_ptr<Cluster>> cluster_list;
    std::vector<std::unique_ptr<Cta>> ctas;
};

inline Locality Cta::locality() const { return {id, cluster->id, static_cast<uint32_t>(launch->device)}; }

struct Device {
    bool dead = false;           ///< a fault: nothing of it moves any more
    struct Sm {
        uint32_t ctas = 0, threads = 0, shared = 0;
        uint32_t warps = 0;                 ///< so far: they take the partitions in turn
        std::vector<uint64_t> freed;        ///< cycles at which blocks left whose place no other has taken
        Engine copy_engine, bulk_stores, tensor_core;
        Rate issue[timing::partitions];
        struct Cached { uint64_t sector = UINT64_MAX, at = 0; };
        std::vector<Cached> l1;
        Rate loads{timing::sm_bytes_per_cycle}, stores{timing::sm_bytes_per_cycle}, shared_memory;  ///< the last by passes
    };
    std::vector<Sm> sms;
    uint64_t cycle = 0;          ///< at which the last finished launch ended
    Rate memory, out[2], in[2];  ///< bytes; the ports to NVLink and to InfiniBand
    std::deque<std::shared_ptr<Launch>> queue;  ///< in stream order; the first runs
    Knowledge done;              ///< all that finished launches did
    std::map<std::shared_ptr<const Program>, std::vector<uint64_t>> modules;  ///< addresses of module variables
};

/// Latency in nanoseconds, from a load to its data or from one GPU to another, and bandwidth, of a link each way.
struct LinkModel { uint64_t latency; double bytes_per_nanosecond; };

struct Options {
    int devices = 1;
    int num_sms = 132;
    uint64_t seed = 0;
    std::string schedule = "random";
    bool checks = true;
    bool exact_accumulate = false;
    uint64_t max_steps = uint64_t{1} << 40;
    std::vector<uint32_t> choices;  ///< "exhaustive": the first decisions, then 0
};

/// A function that a kernel calls and the machine provides.
struct ExternCall {
    Machine& machine;
    Warp& warp;
    int lane;
    std::vector<std::vector<uint8_t>> arguments;
    std::vector<uint8_t> result;
};
using ExternHandler = std::function<void(ExternCall&)>;

/// Bytes and events, for `counters`.
struct Counts {
    uint64_t global_read = 0, global_write = 0, shared_read = 0, shared_write = 0, distributed_shared = 0;
    uint64_t copy_read = 0, copy_write = 0, multicast = 0, bank_conflicts = 0, sectors = 0, wgmma = 0;
    uint64_t barrier_waits = 0, barrier_wait_cycles = 0, tensor_core_cycles = 0, launch_cycles = 0;
};

/// Where an address leads.
struct Target {
    uint8_t* data = nullptr;
    uint64_t offset = 0;       ///< into the shadow
    Shadow* shadow = nullptr;  ///< null for memory of one lane and for constants
    Poison* poison = nullptr;
    PublishedMap* published = nullptr;
    Cta* cta = nullptr;
    Region* region = nullptr;
    uint64_t watch() const {   ///< one number line for all shared and global memory
        return cta ? uint64_t{1} << 62 | static_cast<uint64_t>(cta->id) << 32 | offset : region ? region->base + offset : 0;
    }
};

struct Context {
    Machine& m;
    Warp& w;
    Group* group;
    uint32_t* registers;
    const uint32_t* constants;
    uint32_t mask;
    bool checks;

    const uint32_t* src(Ref r) const { return r >= 0 ? registers + r : constants + ~r; }
    uint32_t* dst(Ref r) const { return registers + r; }
    uint32_t pred(Ref r) const { return registers[r]; }
    void set_pred(Ref r, uint32_t value) const { registers[r] = (registers[r] & ~mask) | (value & mask); }
    uint64_t value(Ref r, int lane, bool wide) const {
        const uint32_t* p = src(r);
        return wide ? static_cast<uint64_t>(p[2 * lane + 1]) << 32 | p[2 * lane] : p[lane];
    }
    [[noreturn]] void fail(ErrorKind kind, const std::string& what, int lane = -1) const;
    Flow block(Wait wait, uint64_t key, std::function<std::string()> what) const;
    Flow block(Wait wait, uint64_t key, std::string what) const {
        return block(wait, key, [what = std::move(what)] { return what; });
    }
    /// A test that failed (`hash` of what it saw): true when it should block, because it only repeats itself.
    bool polls(uint64_t hash, uint32_t rounds = 2) const;
    /// For .aligned and .sync instructions: true once all of `needed` (live) lanes stand here.
    bool converged(uint32_t needed) const;

    /// Resolves and checks `bytes` at an address, aligned to `align`.
    Target locate(Space space, uint64_t address, uint32_t bytes, uint32_t align, int lane, bool write) const;
    /// The race and poison checks of one lane's access; true if it reads bytes nobody wrote.
    bool check_read(const Target& t, uint32_t bytes, uint32_t access, int lane) const;
    void check_write(const Target& t, uint32_t bytes, uint32_t access, int lane) const;
    /// A register that the active lanes loaded: these of them got bytes that nobody wrote.
    void mark_unwritten(Ref r, uint32_t lanes) const;
    [[noreturn]] void race(const Conflict& conflict, const Target& t, bool write, int lane) const;
    /// After memory changed: wakes those that poll it.
    void changed(const Target& t, uint32_t bytes) const;
    void publish(const Target& t, uint32_t bytes, Published p, bool keep) const;

    // Late writes; see late.cpp.
    /// Before a store to global memory: other blocks shall see it later.
    void delay(const Target& t, uint32_t bytes, int lane) const;
    /// Copies global memory as this lane sees it.
    void see(const Target& t, uint32_t bytes, int lane, uint8_t* out) const;
    /// What the value that this lane sees at a word publishes; null if nothing.
    const Published* published_at(const Target& t, uint64_t word, int lane) const;
    /// These lanes release at this scope: others' writes that they have seen become visible that far; of a fence.sc
    /// (`sequential`), all that it orders.
    void make_visible(uint32_t lanes, Scope scope, bool sequential = false) const;

    /// Counts the access of the active lanes, `bytes` each, and says when it reaches memory and when its result is back.
    struct Arrival { uint64_t there, back; };
    /// `cached`: a load that may find its sectors in L1.
    Arrival access(const Target* targets, uint32_t bytes, bool reads, bool writes, bool cached = false) const;
    void await_values(const Inst& inst, const Target* targets, uint32_t bytes) const;
    void await_stores(const Inst& inst, Scope scope) const;
};

uint32_t registers_at_entry(const Function& f);
/// At the end of a block: fails if a warp left out a setmaxnreg of its warpgroup.
void check_register_changes(Machine& m, Cta& cta);

/// The PTX machine: one or more devices in one address space, run by one thread from a seed.
class Machine {
  public:
    explicit Machine(Options options);
    ~Machine();

    /// Queues a launch on its device; returns it for `finished`. Throws for bad arguments.
    std::shared_ptr<Launch> submit(std::shared_ptr<Launch> launch);
    /// Runs until one of these launches has finished (until nothing is queued, if empty). A failure leaves the machine
    /// empty.
    void run(const std::vector<std::shared_ptr<Launch>>& until);
    bool idle() const;
    /// The allocation ends; its address stays known as freed.
    void release(uint64_t base);
    uint64_t module_variable(int device, const std::shared_ptr<const Program>& program, int variable);

    Options options;
    GlobalMemory memory;
    AccessLog log;
    Random random;
    Trace trace;
    std::map<std::string, uint64_t> counters;
    std::array<uint64_t, static_cast<size_t>(Class::Count)> executed{};
    std::map<std::string, ExternHandler> externs;
    std::unique_ptr<Network> network;
    std::map<uint64_t, int> deaths;  ///< by instruction of the run: the device that dies before it
    std::vector<Device> devices;
    std::vector<uint32_t> choice_widths;  ///< "exhaustive": how many ways each decision had
    Counts counts;
    uint64_t time = 0;   ///< nanoseconds
    uint64_t steps = 0;
    uint64_t progress = 0;  ///< counts whatever may let a blocked warp move
    uint32_t spinners = 0;

    // Virtual time; see timeline.cpp.
    LinkModel memory_model{350, 4800};
    using Arrival = Context::Arrival;
    struct Transfer { uint64_t through, there; };
    void issue(Warp& w);
    void wait_until(Warp& w, const Inst& inst, uint64_t at, Cause cause);
    void expect_result(Warp& w, Ref destination, uint64_t at, const Inst& inst);
    Slot occupy(Cta& cta, Trace::Kind kind, uint64_t ready, uint64_t cycles, const Inst& inst, uint64_t object);
    Device::Sm& sm_of(const Cta& cta);
    Slot cross(int from, int to, uint64_t ready, uint64_t bytes);
    uint64_t one_way(int device, int owner) const;
    Arrival reach_memory(const Cta& cta, int owner, uint64_t ready, uint64_t bytes, bool write);
    Transfer transfer(const std::vector<Cta*>& ctas, int owner, uint64_t ready, uint64_t bytes, bool store, const Inst& inst);
    uint64_t transfer_between_blocks(Cta& from, uint64_t ready, uint64_t bytes, const Inst& inst);
    uint64_t message(const Warp& w, int from, int to, uint64_t bytes, uint64_t ready, const Inst& inst);
    void stamp(const Target& t, uint32_t bytes, uint64_t at);
    uint64_t stamp_of(const Target& t, uint32_t bytes) const;
    void set_rates();

    // Used by instructions.
    void wake(Wait wait, uint64_t key);
    void wake_watchers(uint64_t low, uint64_t high);
    /// What lies here becomes visible to all: before something that all see at once changes it.
    void settle(Region& region, uint64_t offset, uint64_t bytes);
    void queue(Warp& w);
    void start(std::unique_ptr<Operation> op);
    Agent new_agent(Launch& launch) {
        launch.agents.push_back(next_agent_);
        return next_agent_++;
    }
    uint32_t log_access(Warp& w, const Inst& inst, bool atomic, Scope scope);
    [[noreturn]] void fail(ErrorKind kind, const std::string& what, const Warp& w, const Inst& inst, int lane) const;
    std::string place_of(const Access& a, int lane) const;
    std::string describe_race(const Conflict& conflict, const Target& t, bool write) const;
    void lanes_exit(Warp& w, uint32_t mask);
    void cta_may_finish(Cta& cta);
    const Inst& inst(uint32_t program, uint32_t code) const { return programs_[program]->code[code]; }
    std::vector<const Warp*> warps_by_id;
    uint32_t choose(uint32_t n);
    bool only_operations() const { return runnable_.empty(); }

  private:
    void kill(int device);
    void admit();
    bool admit_cluster(Launch& launch);
    void start_warp(Warp& w);
    void finish_launch(Launch& launch);
    bool step_warp(Warp& w);
    void merge_groups(Warp& w);
    void close_slice(Warp& w);
    void slice(Warp& w, uint64_t end, const Inst* named);
    void await_results(Warp& w, const Inst& inst);
    void align_clocks();
    void advance(Warp& w, const Inst& inst);
    uint32_t slice_length();
    bool run_group(Warp& w, Group& g, Context& c, uint32_t budget);
    size_t pick();
    void arrive_late(size_t i);
    void extend(LateWrite& write, int reach);
    /// Makes each late write visible as far as `distance` says.
    void spread_late(const std::function<int(const LateWrite&)>& distance);
    void nothing_moves();
    [[noreturn]] void deadlock();
    void abandon();
    void slow_checks_before(Context& c, const Inst& inst);
    void slow_checks_after(Context& c, const Inst& inst);

    std::map<std::pair<int, int>, uint32_t> link_rows_;  ///< in the trace
    std::unordered_map<uint64_t, uint64_t> stamps_;  ///< cycles, by Target::watch() / 4
    std::vector<Warp*> runnable_;
    std::vector<std::shared_ptr<Launch>> dead_launches_;  ///< kept while others may refer to their warps
    std::vector<std::unique_ptr<Operation>> operations_;
    std::vector<std::shared_ptr<const Program>> programs_;
    std::map<std::pair<Wait, uint64_t>, std::vector<Warp*>> waiters_;
    std::set<std::pair<uint64_t, uint32_t>> sleepers_;  ///< (until, warp)
    std::set<uint32_t> timed_;                          ///< warps whose wait a timeout may end
    Agent next_agent_ = 1;
    uint32_t next_cta_ = 1, next_cluster_ = 1, next_launch_ = 1;
    uint64_t jump_ = 0, jump_progress_ = 0, jump_rounds_ = 0;
    size_t turn_ = 0;
    std::vector<uint64_t> priorities_;   ///< "pct": by warp
    std::vector<uint64_t> change_points_;
    std::vector<std::shared_ptr<LateWrite>> late_;
    friend struct Context;
};

}  // namespace dsv3::emulator
