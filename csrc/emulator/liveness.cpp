// Register slots by liveness. PTX is nearly in single-assignment form, so a large kernel names thousands of registers
// of which a few hundred live at a time; sharing slots keeps a warp's registers in the processor's cache.

#include <algorithm>
#include <queue>

#include "decode.hpp"

namespace dsv3::emulator {
namespace {

using Bits = std::vector<uint64_t>;

struct Block {
    uint32_t first, last;  ///< code range
    std::vector<int> next;
    Bits use, def, in, out;
};

bool ends_block(const Builder::Built& b) { return b.target >= 0 || b.inst.klass == Class::Control; }

std::vector<Block> blocks_of(const Builder& b, uint32_t first, uint32_t last, size_t words) {
    std::vector<bool> leader(last - first + 1, false);
    leader[0] = true;
    for (uint32_t pc = first; pc < last; pc++) {
        if (b.code[pc].target >= 0) leader[static_cast<uint32_t>(b.code[pc].target) - first] = true;
        if (ends_block(b.code[pc])) leader[pc + 1 - first] = true;
    }
    std::vector<Block> blocks;
    std::vector<int> block_at(last - first + 1, -1);
    for (uint32_t pc = first; pc < last; pc++) {
        if (leader[pc - first]) blocks.push_back({pc, pc, {}, Bits(words), Bits(words), Bits(words), Bits(words)});
        block_at[pc - first] = static_cast<int>(blocks.size()) - 1;
        blocks.back().last = pc + 1;
    }
    for (size_t i = 0; i < blocks.size(); i++) {
        const Builder::Built& end = b.code[blocks[i].last - 1];
        if (end.target >= 0 && static_cast<uint32_t>(end.target) < last)
            blocks[i].next.push_back(block_at[static_cast<uint32_t>(end.target) - first]);
        if (end.falls_through && i + 1 < blocks.size()) blocks[i].next.push_back(static_cast<int>(i) + 1);
    }
    return blocks;
}

struct Interval { uint32_t start = UINT32_MAX, end = 0; int reg = -1; };

class FreeList {
  public:
    explicit FreeList(uint32_t& top) : top_(top) {}
    uint32_t take(uint32_t words) {
        if (free_.empty()) {
            uint32_t at = top_;
            top_ += words;
            return at;
        }
        uint32_t at = free_.top();
        free_.pop();
        return at;
    }
    void give(uint32_t at) { free_.push(at); }

  private:
    std::priority_queue<uint32_t, std::vector<uint32_t>, std::greater<>> free_;
    uint32_t& top_;
};

/// Live ranges, widened to one interval a register in code order.
std::vector<Interval> intervals_of(const Builder& b, uint32_t first, uint32_t last, int base, int count) {
    size_t words = (static_cast<size_t>(count) + 63) / 64;
    std::vector<Block> blocks = blocks_of(b, first, last, words);
    auto local = [&](int reg) { return reg >= base && reg < base + count && !b.registers[static_cast<size_t>(reg)].dedicated; };
    auto bit = [&](Bits& bits, int reg) -> bool { return bits[static_cast<size_t>(reg - base) / 64] >> ((reg - base) % 64) & 1; };
    auto set = [&](Bits& bits, int reg) { bits[static_cast<size_t>(reg - base) / 64] |= uint64_t{1} << ((reg - base) % 64); };
    for (Block& block : blocks) {
        for (uint32_t pc = block.first; pc < block.last; pc++) {
            for (int r : b.code[pc].reads)
                if (local(r) && !bit(block.def, r)) set(block.use, r);
            for (int r : b.code[pc].writes) {
                if (!local(r)) continue;
                // A guarded write leaves the old value in some lanes, so it reads as well.
                if (b.code[pc].inst.guard != no_ref && !bit(block.def, r)) set(block.use, r);
                set(block.def, r);
            }
        }
    }
    for (bool changed = true; changed;) {
        changed = false;
        for (size_t i = blocks.size(); i-- > 0;) {
            Block& block = blocks[i];
            for (size_t w = 0; w < words; w++) {
                uint64_t out = 0;
                for (int n : block.next) out |= blocks[static_cast<size_t>(n)].in[w];
                uint64_t in = block.use[w] | (out & ~block.def[w]);
                changed |= in != block.in[w] || out != block.out[w];
                block.in[w] = in;
                block.out[w] = out;
            }
        }
    }
    std::vector<Interval> intervals(static_cast<size_t>(count));
    auto extend = [&](int reg, uint32_t from, uint32_t to) {
        Interval& interval = intervals[static_cast<size_t>(reg - base)];
        interval.reg = reg;
        interval.start = std::min(interval.start, from);
        interval.end = std::max(interval.end, to);
    };
    for (Block& block : blocks) {
        for (size_t w = 0; w < words; w++) {
            for (uint64_t rest = block.in[w]; rest; rest &= rest - 1)
                extend(base + static_cast<int>(w * 64) + __builtin_ctzll(rest), block.first, block.first);
            for (uint64_t rest = block.out[w]; rest; rest &= rest - 1)
                extend(base + static_cast<int>(w * 64) + __builtin_ctzll(rest), block.last, block.last);
        }
        for (uint32_t pc = block.first; pc < block.last; pc++) {
            // A destination begins with its instruction, so that it never shares with a source of the same one.
            for (int r : b.code[pc].reads)
                if (local(r)) extend(r, pc, pc + 1);
            for (int r : b.code[pc].writes)
                if (local(r)) extend(r, pc, pc + 1);
        }
    }
    return intervals;
}

}  // namespace

void allocate_registers(Builder& b) {
    Program& p = *b.program;
    std::vector<uint32_t> slot(b.registers.size(), 0);
    uint32_t predicates = 0, words = 0;
    auto place_dedicated = [&](size_t r) {
        Type type = b.registers[r].type;
        uint32_t size = type == Type::Pred ? 1 : size_of(type) == 8 ? 64 : 32;
        uint32_t& top = type == Type::Pred ? predicates : words;
        slot[r] = top;
        top += size;
    };
    for (size_t r = 0; r < b.registers.size(); r++)
        if (b.registers[r].dedicated) place_dedicated(r);
    for (const Function& f : p.functions) {
        int base = INT32_MAX, end = 0;
        for (uint32_t pc = f.first; pc < f.last; pc++) {
            for (const std::vector<int>* list : {&b.code[pc].reads, &b.code[pc].writes})
                for (int r : *list)
                    if (!b.registers[static_cast<size_t>(r)].dedicated) base = std::min(base, r), end = std::max(end, r + 1);
        }
        if (base >= end) continue;
        std::vector<Interval> intervals = intervals_of(b, f.first, f.last, base, end - base);
        intervals.erase(std::remove_if(intervals.begin(), intervals.end(), [](const Interval& i) { return i.reg < 0; }),
                        intervals.end());
        std::sort(intervals.begin(), intervals.end(), [](const Interval& x, const Interval& y) {
            return x.start != y.start ? x.start < y.start : x.reg < y.reg;
        });
        FreeList free[3] = {FreeList(predicates), FreeList(words), FreeList(words)};
        using Live = std::pair<uint32_t, int>;
        std::priority_queue<Live, std::vector<Live>, std::greater<>> live;
        auto kind = [&](int r) {
            Type type = b.registers[static_cast<size_t>(r)].type;
            return type == Type::Pred ? 0 : size_of(type) == 8 ? 2 : 1;
        };
        for (const Interval& i : intervals) {
            while (!live.empty() && live.top().first <= i.start) {
                int r = live.top().second;
                free[kind(r)].give(slot[static_cast<size_t>(r)]);
                live.pop();
            }
            int k = kind(i.reg);
            slot[static_cast<size_t>(i.reg)] = free[k].take(k == 0 ? 1 : k == 1 ? 32 : 64);
            live.push({i.end, i.reg});
        }
    }
    p.predicate_words = (predicates + 31) / 32 * 32;
    p.register_words = p.predicate_words + words;
    auto place = [&](int r) {
        uint32_t at = slot[static_cast<size_t>(r)];
        return b.registers[static_cast<size_t>(r)].type == Type::Pred ? at : at + p.predicate_words;
    };
    auto rewrite = [&](Ref& ref) {
        if (ref >= 0) ref = static_cast<Ref>(place(ref));
    };
    for (Builder::Built& built : b.code) {
        Inst& inst = built.inst;
        for (Ref& ref : inst.a)
            if (ref != no_ref) rewrite(ref);
        if (inst.guard != no_ref) rewrite(inst.guard);
        Ref* list = const_cast<Ref*>(inst.list);
        for (uint32_t i = 0; i < inst.list_size; i++)
            if (list[i] != no_ref) rewrite(list[i]);
        inst.touched = static_cast<uint32_t>(p.touched.size());
        for (const std::vector<int>* list : {&built.reads, &built.writes})
            for (int r : *list) inst.touches_wgmma |= b.registers[static_cast<size_t>(r)].wgmma;
        for (int r : built.reads) p.touched.push_back(place(r));
        for (int r : built.writes) p.touched.push_back(place(r));
        inst.reads = static_cast<uint16_t>(built.reads.size());
        inst.writes = static_cast<uint16_t>(built.writes.size());
        p.code.push_back(inst);
    }
    for (auto& [kind, ref] : p.specials) rewrite(ref);
    for (Function& f : p.functions)
        if (f.return_pc != no_ref) rewrite(f.return_pc);
}

}  // namespace dsv3::emulator
