#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ast.hpp"

namespace dsv3::emulator {

struct Context;
struct Inst;

/// What an executed instruction asks of the warp loop.
enum class Flow : uint8_t {
    Next,     ///< go on behind it
    Jump,     ///< it moved the lanes itself
    Blocked,  ///< not done: run it again when its condition may have changed
    Yield,    ///< done, and other agents should have their turn
};
using Execute = Flow (*)(Context&, const Inst&);

/// Classes of instructions, as counted in `counters`.
enum class Class : uint8_t { Integer, Float, Convert, Move, Memory, Atomic, Barrier, Async, Wgmma, Control, Warp, Count };

/// A reference to an operand: a word offset into the warp's registers, or ~offset into the constants. Both hold 32
/// lanes side by side: 32 words, 64 for a 64-bit register; a predicate is one word, a bit a lane.
using Ref = int32_t;
constexpr Ref no_ref = INT32_MIN;

struct CallTarget;
struct ExternCall;

/// A decoded instruction. What `imm`, `flags` and `list` mean is the business of its `execute`.
struct Inst {
    Execute execute = nullptr;
    Ref a[6] = {no_ref, no_ref, no_ref, no_ref, no_ref, no_ref};
    int64_t imm = 0;
    const Ref* list = nullptr;   ///< registers of a vector operand
    const void* extra = nullptr;
    uint32_t flags = 0;
    Ref guard = no_ref;
    uint32_t list_size = 0;
    uint32_t touched = 0;  ///< first of the slots that it reads and writes, in Program::touched
    uint16_t reads = 0, writes = 0;
    bool guard_negated = false;
    bool convergent = false;   ///< .aligned: all live lanes of the warp must stand here
    bool touches_wgmma = false;  ///< names a register that some wgmma reads or writes
    bool propagates = false;   ///< moves values unread: poison in, poison out
    bool selects = false;      ///< a[0] = a[3] ? a[1] : a[2], for the same purpose
    Class klass = Class::Integer;
    Type type = Type::None;
    uint32_t line = 0, source = 0;
    uint32_t place = 0;        ///< source line that calls the inlined function it is from, or its own: names slices of the trace
    const char* name = "";
};

/// A register that is filled once, when its warp starts.
enum class Special : uint8_t {
    TidX, TidY, TidZ, NtidX, NtidY, NtidZ, CtaidX, CtaidY, CtaidZ, NctaidX, NctaidY, NctaidZ, LaneId, WarpId, NwarpId,
    SmId, NsmId, GridId, ClusterIdX, ClusterIdY, ClusterIdZ, NclusterIdX, NclusterIdY, NclusterIdZ, ClusterCtaidX,
    ClusterCtaidY, ClusterCtaidZ, ClusterNctaidX, ClusterNctaidY, ClusterNctaidZ, ClusterCtaRank, ClusterNctaRank,
    IsExplicitCluster, LaneMaskEq, LaneMaskLe, LaneMaskLt, LaneMaskGe, LaneMaskGt, DynamicSharedSize, TotalSharedSize,
    AggrSharedSize, WarpSize, Sink,
};

struct Parameter { std::string name; Type type; uint32_t offset, size, align; };

struct Function {
    std::string name;
    bool is_entry = false;
    uint32_t first = 0, last = 0;  ///< code range
    std::vector<Parameter> params;  ///< an entry's, in its parameter buffer
    uint32_t param_bytes = 0;
    uint32_t static_shared = 0;   ///< end of its static shared memory
    uint32_t dynamic_align = 16;
    uint32_t min_ctas = 0, max_registers = 0;  ///< .minnctapersm, .maxnreg
    uint32_t largest_increase = 0;  ///< of its setmaxnreg.inc
    uint32_t max_threads[3] = {0, 0, 0}, required_threads[3] = {0, 0, 0}, required_cluster[3] = {0, 0, 0};
    Ref return_pc = no_ref;       ///< of a .func: register that holds where to return
    std::vector<uint32_t> param_offsets, return_offsets, param_sizes, return_sizes;  ///< of a .func, in lane memory
};

/// A call site: which bytes of lane memory go where.
struct CallTarget {
    struct Copy { uint32_t from, to, size; };
    std::vector<Copy> in, out;
    int function = -1;
    int external = -1;  ///< into Program::externals
};

struct ConstantPatch { uint32_t word; int size; int variable; uint64_t addend; int function; };

/// A module made ready to run. Immutable and shared by launches.
struct Program {
    std::vector<Inst> code;
    std::vector<uint32_t> touched;     ///< word offsets of registers
    std::vector<uint32_t> constants;
    std::vector<ConstantPatch> patches;  ///< addresses of variables, known at launch
    std::vector<Variable> variables;     ///< of the module
    std::vector<uint32_t> shared_offsets;  ///< of module variables in shared memory
    std::vector<Function> functions;
    std::vector<std::string> externals;    ///< functions without a body
    std::unordered_map<std::string, int> by_name;
    std::vector<std::pair<Special, Ref>> specials;
    uint32_t register_words = 0;
    uint32_t predicate_words = 0;  ///< the first words; one a predicate
    uint32_t local_bytes = 0;      ///< lane memory: local variables, then parameters of calls
    uint32_t virtual_registers = 0;
    bool uses_wgmma = false;
    ModuleAst ast;  ///< its source lines; functions and variables have moved out
    std::vector<std::unique_ptr<Ref[]>> lists;
    std::vector<std::shared_ptr<void>> extras;

    std::string source_of(const Inst& inst) const { return ast.source_text(inst.source); }
};

/// Reads PTX text; throws Error (malformed text, Unsupported with the line).
std::shared_ptr<const Program> load(std::string text);

// State-space layout that programs and the machine agree on.
constexpr uint32_t shared_base = 1024;                      ///< like sm_90: the first 1 KB is the system's
constexpr uint64_t shared_window = 0x7000'0000'0000;        ///< generic addresses of shared memory
constexpr uint64_t local_window = 0x7100'0000'0000;
constexpr uint64_t param_window = 0x7200'0000'0000;
constexpr uint64_t window_size = uint64_t{1} << 32;
constexpr uint32_t call_params = 0x100000;  ///< parameter space: below, the kernel's buffer; from here, lane memory

}  // namespace dsv3::emulator
