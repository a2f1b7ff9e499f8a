// The tokens whose rows the two warps of a channel of the lean combine add, one after the other.
// combine_lean.cuh says what for. Each warp walks them twice at once, a few rows apart: to load, and to add.
#pragma once

#include "bulk.cuh"
#include "combine_lean_call.cuh"

namespace dsv3 {
namespace lean {

using combine::kChunk;

constexpr u32 kNobody = ~0u;

// What a lane has waited for in vain, if anything. Told where a warp ends: once in the code, and where
// nothing else is in registers.
struct Miss {
    bool happened = false;
    u64 expected;
    Waited waited;
    Role role;
    u32 peer;

    // One lane: as Rank::wait, but true if the word came.
    __device__ __forceinline__ bool wait(const Inbound& o, const u64* word, u64 value, Role as, u32 whom) {
        const Waited end = o.self.wait_quietly(word, value, as, whom, o.channel);
        if (end.seen < value) *this = {true, value, end, as, whom};
        return end.seen >= value;
    }
};

// A sender's tokens, one after the other: of all streams to a node one token, then the next of each.
class Sending {
  public:
    __device__ __forceinline__ Sending(const Inbound& o, const Experts& from) : o_(o), from_(from) {}

    __device__ __forceinline__ bool next() {
        const u32 lane = threadIdx.x % 32;
        while (!gpus_left_) {
            gpus_left_ = __ballot_sync(kFullWarp, ++number_ < total_);
            if (gpus_left_) break;
            if (++turn_ == o_.place.link.nodes) return false;
            const u32 home = o_.node_of_turn(turn_) * o_.self.gpus + lane;
            const i32* range = from_.ranges + 2 * (home * o_.layout.channels + o_.channel);
            first_ = lane < o_.self.gpus ? range[0] : 0;
            total_ = lane < o_.self.gpus ? range[1] : 0;
            number_ = kNobody;
        }
        gpu_ = __ffs(gpus_left_) - 1;
        gpus_left_ &= gpus_left_ - 1;
        index_ = __shfl_sync(kFullWarp, first_, gpu_) + number_;
        const u64 home = o_.node_of_turn(turn_) * o_.self.gpus + gpu_;
        row_ = -1;
        if (lane < o_.topk) row_ = from_.rows[(home * o_.layout.max_tokens + index_) * o_.topk + lane];
        if (from_.weights) weight_ = row_ >= 0 ? from_.weights[row_] : 0.0f;
        return true;
    }
    // A bit for each lane that has a row of the token, to be added by ascending lanes.
    __device__ __forceinline__ u32 rows() const { return __ballot_sync(kFullWarp, row_ >= 0); }
    __device__ __forceinline__ const u8* row() const {
        return from_.y + static_cast<i64>(row_) * (2 * o_.hidden);
    }
    __device__ __forceinline__ bool weighted() const { return from_.weights != nullptr; }
    __device__ __forceinline__ float weight(u32 lane) const { return __shfl_sync(kFullWarp, weight_, lane); }
    __device__ __forceinline__ bool may_read(Miss*) { return true; }

    __device__ __forceinline__ u8* target() const { return peer().slot(source(), index_); }
    // The token's row is on its way, all but its last store, perhaps.
    __device__ __forceinline__ void added() {
        if (o_.gradients) combine::put_gradients(o_, from_, row_, o_.behind(target()));
        const u32 total = __shfl_sync(kFullWarp, total_, gpu_);
        if ((number_ + 1) % kChunk != 0 && number_ + 1 != total) return;
        tail_ = peer().tail(source(), o_.channel);
        value_ = o_.epoch << 32 | (number_ + 1);
    }
    __device__ __forceinline__ bool owes() const { return tail_ != nullptr; }
    // Says of all rows so far, which can be seen, that they are there.
    __device__ __forceinline__ void tell() {
        publish(tail_, value_);
        tail_ = nullptr;
    }

  private:
    __device__ __forceinline__ Workspace peer() const { return o_.where.peer(gpu_); }
    // As the forwarder names this rank's stream.
    __device__ __forceinline__ u32 source() const {
        return o_.node_of_turn(turn_) * o_.self.gpus + o_.where.gpu();
    }

    const Inbound& o_;
    const Experts& from_;
    u32 turn_ = kNobody, gpu_ = 0, gpus_left_ = 0;
    u32 number_ = 0, index_ = 0;  // of the token in its stream, and of its slot
    u32 first_ = 0, total_ = 0;   // lane g: of the stream to GPU g
    i32 row_ = -1;                // lane k: as in Experts::rows
    float weight_ = 1.0f;
    u64* tail_ = nullptr;  // owed
    u64 value_ = 0;
};

// A forwarder's messages, one after the other, to one other node after the other.
class Forwarding {
  public:
    __device__ __forceinline__ explicit Forwarding(const Inbound& o) : o_(o) {}

    __device__ __forceinline__ bool next() {
        const u32 lane = threadIdx.x % 32;
        while (++number_ >= total_) {
            if (++turn_ + 1 >= o_.place.link.nodes) return false;
            total_ = o_.layout.came(node(), o_.channel);
            first_ = o_.layout.first(node(), o_.channel);
            number_ = kNobody;
            seen_ = 0;
        }
        slot_ = -1;
        if (lane < o_.self.gpus) slot_ = o_.layout.slots(node(), first_ + number_, o_.self.gpus)[lane];
        return true;
    }
    __device__ __forceinline__ u32 rows() const { return __ballot_sync(kFullWarp, slot_ >= 0); }
    __device__ __forceinline__ const u8* row() const { return o_.self.mine().slot(source(), max(slot_, 0)); }
    __device__ __forceinline__ bool weighted() const { return false; }
    __device__ __forceinline__ float weight(u32) const { return 1.0f; }
    // Whether all rows of the message are here; with `miss`, it waits for them.
    __device__ __forceinline__ bool may_read(Miss* miss) {
        const u64 expected = o_.epoch << 32 | (slot_ - first_ + 1);
        const bool waits = slot_ >= 0 && seen_ < expected;
        if (!__any_sync(kFullWarp, waits)) return true;
        bool here = true;
        if (waits) {
            const u64* tail = o_.self.mine().tail(source(), o_.channel);
            const u32 peer = o_.where.near(threadIdx.x % 32);
            if (miss) here = miss->wait(o_, tail, expected, Role::kForward, peer);
            seen_ = ptx::load_acquire_system(tail);
            here &= seen_ >= expected;
        }
        here = __all_sync(kFullWarp, here);
        __syncwarp();
        bulk::acquired();
        return here;
    }

    __device__ __forceinline__ u8* target() const {
        return o_.place.staged(node(), first_ + number_, o_.message_bytes);
    }
    __device__ __forceinline__ void added() {
        if (o_.gradients) combine::join_gradients(o_, node(), slot_, o_.behind(target()));
        if ((number_ + 1) % kChunk != 0 && number_ + 1 != total_) return;
        owed_node_ = node();
        owed_end_ = number_ + 1;
        owed_first_ = first_;
        owed_finished_ = number_ + 1 == total_ ? kFinished : 0;
    }
    __device__ __forceinline__ bool owes() const { return owed_end_ != 0; }
    __device__ __forceinline__ void tell() {
        const u32 begin = (owed_end_ - 1) / kChunk * kChunk;
        o_.place.send(owed_node_, o_.channel, owed_first_ + begin, owed_end_ - begin, o_.message_bytes,
                      o_.epoch << 32 | owed_finished_ | owed_end_);
        owed_end_ = 0;
    }

  private:
    __device__ __forceinline__ u32 node() const { return o_.node_of_turn(turn_); }
    // Lane g: whose stream holds what GPU g sent for the node.
    __device__ __forceinline__ u32 source() const {
        return node() * o_.self.gpus + min(threadIdx.x % 32, o_.self.gpus - 1);
    }

    const Inbound& o_;
    u32 turn_ = kNobody, number_ = 0, total_ = 0, first_ = 0;
    i32 slot_ = -1;  // lane g: where the row of GPU g lies
    u64 seen_ = 0;   // lane g: its tail
    u32 owed_node_ = 0, owed_first_ = 0, owed_end_ = 0;
    u64 owed_finished_ = 0;
};

}  // namespace lean
}  // namespace dsv3
