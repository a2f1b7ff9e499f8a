// What the lean dispatch and combine across nodes share: how messages cross InfiniBand without rings.
//
// Ranks, forwarders and what goes over NVLink are those of internode.cuh and channel.cuh. But a rank has a
// slot for every message that its like on another node may ever send in one call, so that in a call nobody
// who sends waits for a reader. A channel is one warp that sends and one that forwards, with a queue pair;
// and an op is two launches: one moves, on few SMs, until all has come; the other, on all, puts it in order
// and waits for nobody. What a rank has for what comes from its like on each other node:
//   ack              epoch of which that rank has read all that this one sent
//   first[channel]   epoch << 32 | what the sender wants to say before all | index of the first message
//   tail[channel]    epoch << 32 | finished | messages so far, from the first on
//   header[channel]  of the op, put before the finished tail
//   in[], out[]      messages that came, and staging of those that go
// Invariants, of epoch n:
//   1. A sender writes its staging slots and puts them only after ack >= n - 1. Who has read a slot has it
//      from the staging slot, so that this is free as well.
//   2. first comes before every tail of the channel, a message before the tail that counts it, the header
//      before the finished tail: all on one queue pair.
//   3. A forwarder reads a message only after it has acquired a tail that counts it, the header only after a
//      finished one. All these words only grow.
//   4. The last block of the launch that reads the messages acknowledges: by the counter of ended blocks it
//      knows that all have been read.
// Waits go to the writers of this epoch and to the readers of the one before, and form no circle.
#pragma once

#include "internode.cuh"

namespace dsv3 {
namespace lean {

constexpr u64 kFinished = 1ull << 31;

// A rank's symmetric memory of one op, the same on all ranks; `other` numbers the nodes that are not its own.
// python: dsv3_kernels.ep.lean.Slots
struct Slots {
    u8* base;
    u32 others, channels, max_tokens, header_words;  // channels: the most of any call
    u64 most_bytes;                                  // of a message; a call packs those that it has

    __device__ __forceinline__ u64* ack(u32 other) const { return reinterpret_cast<u64*>(base) + other; }
    __device__ __forceinline__ u64* first(u32 other, u32 channel) const {
        return ack(others) + 2 * (other * channels + channel);
    }
    __device__ __forceinline__ u64* tail(u32 other, u32 channel) const { return first(other, channel) + 1; }
    __device__ __forceinline__ u32* header_in(u32 other, u32 channel) const {
        return reinterpret_cast<u32*>(first(others, 0)) + 2 * (other * channels + channel) * header_words;
    }
    __device__ __forceinline__ u32* header_out(u32 other, u32 channel) const {
        return header_in(other, channel) + header_words;
    }
    __device__ __forceinline__ u8* in(u32 other, u32 message, u64 bytes) const {
        const u64 control = 8ull * others * (1 + channels * (2 + header_words));
        return base + ((control + 15) & ~15ull) + 2ull * other * max_tokens * most_bytes + message * bytes;
    }
    __device__ __forceinline__ u8* out(u32 other, u32 message, u64 bytes) const {
        return in(other, message, bytes) + max_tokens * most_bytes;
    }
};

// As internode.cuh's.
struct Link {
    u32 nodes;
    Slots slots;
    const i32* queue_pairs;  // [channels]
};

// A rank among all, and its slots by node.
struct Place : Where {
    const Link& link;

    __device__ __forceinline__ u32 number(u32 of) const { return of - (of > node()); }
    // This node's number at another.
    __device__ __forceinline__ u32 number_at(u32 there) const { return node() - (node() > there); }

    // What comes from a node, and what goes there. `first` is there once a tail has been acquired.
    __device__ __forceinline__ u64 opened(u32 from, u32 channel) const {
        return ptx::load_acquire_system(link.slots.first(number(from), channel));
    }
    __device__ __forceinline__ const u64* tail(u32 from, u32 channel) const {
        return link.slots.tail(number(from), channel);
    }
    __device__ __forceinline__ const u8* arrived(u32 from, u32 message, u64 bytes) const {
        return link.slots.in(number(from), message, bytes);
    }
    __device__ __forceinline__ u8* staged(u32 to, u32 message, u64 bytes) const {
        return link.slots.out(number(to), message, bytes);
    }

    __device__ __forceinline__ const u32* header(u32 from, u32 channel) const {
        return link.slots.header_in(number(from), channel);
    }
    __device__ __forceinline__ u32* header_staged(u32 to, u32 channel) const {
        return link.slots.header_out(number(to), channel);
    }

    // One lane: what goes to a node has been read up to this epoch.
    __device__ __forceinline__ bool wait_ack(u32 to, u32 channel, u64 epoch) const {
        return self.wait(link.slots.ack(number(to)), epoch, Role::kSend, like(to), channel) >= epoch;
    }

    // One warp: the slots for what goes to a node are free for this epoch.
    __device__ __forceinline__ bool may_send(u32 to, u32 channel, u64 epoch) const {
        const u64* ack = link.slots.ack(number(to));
        return self.wait_warp(ack, epoch - 1, Role::kSend, like(to), channel) >= epoch - 1;
    }

    // One lane: a word of the channel there, on its queue pair.
    __device__ __forceinline__ void tell_first(u32 to, u32 channel, u64 value) const {
        transport::signal(link.slots.first(number_at(to), channel), value, like(to),
                          link.queue_pairs[channel]);
    }
    __device__ __forceinline__ void tell_tail(u32 to, u32 channel, u64 value) const {
        transport::signal(link.slots.tail(number_at(to), channel), value, like(to),
                          link.queue_pairs[channel]);
    }

    // One warp: `count` staged messages from `message` on, which lane 0 can see, and then the tail.
    __device__ __forceinline__ void send(u32 to, u32 channel, u32 message, u32 count, u64 bytes,
                                         u64 tail) const {
        put(to, channel, link.slots.in(number_at(to), message, bytes), staged(to, message, bytes),
            count * bytes, tail);
        self.count_sent(like(to), channel, count * bytes);
    }

    // One warp, after its writes to the staged header: the same with that.
    __device__ __forceinline__ void send_header(u32 to, u32 channel, u64 tail) const {
        put(to, channel, reinterpret_cast<u8*>(link.slots.header_in(number_at(to), channel)),
            reinterpret_cast<u8*>(header_staged(to, channel)), 4 * link.slots.header_words, tail);
    }

    // One lane: this rank has read all that came over InfiniBand in this epoch.
    __device__ __forceinline__ void acknowledge(u64 epoch) const {
        for (u32 i = 0; i + 1 < link.nodes; ++i) {
            const u32 to = other(i);
            transport::signal(link.slots.ack(number_at(to)), epoch, like(to), link.queue_pairs[0]);
        }
    }
    // By all threads of a block of the launch that reads, after a barrier: as channel.cuh's, for this node
    // and its likes on the others.
    __device__ __forceinline__ void finish(u64 epoch, u32 blocks) const {
        Rank on_node = self;
        on_node.ranks = self.gpus;
        if (dsv3::finish(on_node, epoch, blocks)) acknowledge(epoch);
    }

  private:
    __device__ __forceinline__ void put(u32 to, u32 channel, u8* target, const u8* source, u64 bytes,
                                        u64 tail) const {
        __syncwarp();
        transport::put_signal_warp(target, source, bytes, link.slots.tail(number_at(to), channel), tail,
                                   like(to), link.queue_pairs[channel]);
    }
};

}  // namespace lean
}  // namespace dsv3
