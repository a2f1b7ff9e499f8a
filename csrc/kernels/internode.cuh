// What dispatch and combine across nodes share: which rank is where, the rings over InfiniBand, the tables
// that a dispatch leaves for its combine.
//
// Rank r is GPU r % gpus of node r / gpus. A token goes over InfiniBand once to a node, always between ranks
// of the same GPU number; inside a node it goes by stores over NVLink, through channel.cuh's slots. The stream
// of rank s to a GPU of another node thus has two hops, and the rank in between is called its forwarder:
// the one of s's GPU number on that node. On s's own node that is s itself.
//
// A ring joins a rank, in one channel, with its like on one other node, each way: `depth` slots of a chunk of
// messages. Positions count chunks and never begin anew; position p lies in slot p % depth, for the
// (p / depth + 1)th time. Both ends know from the counts how many chunks a call has, and keep the position at
// which the next one begins. Invariants of a ring, with n = p / depth + 1:
//   1. The sender writes its staging slot and puts it at position p only after free[slot] >= n - 1.
//   2. ready[slot] = n follows the chunk on the same queue pair; nobody else sets that word.
//   3. The receiver reads position p only after it has acquired ready[slot] >= n, and sets free[slot] = n when
//      the last of its warps has read the chunk. The next ready for this slot follows that, so that both words
//      only grow, whoever sets them and in whatever order the slots are freed.
// By 3 and 1 a staging slot is free too: what was read there had left here. A header (the counts of a call) has
// a slot of its own, with the epoch for n.
//
// Who waits for whom: a sender of a ring for its receiver (credits); a receiver of a ring for its sender; a
// reader of a slot over NVLink for its writer; all for the epoch before. Nobody who frees a ring waits for
// anything but data: in dispatch the forwarder writes to slots that always are free, and looks at all its
// rings in turn; in combine, which frees a ring at a token's home, tokens are taken in order, and a forwarder
// that may not send to one home goes on with the others. So the waits form no circle, even with one slot.
#pragma once

#include "channel.cuh"
#include "transport.cuh"

namespace dsv3 {

constexpr u32 kMaxNodes = 16;

struct Place {
    u32 rank, nodes, gpus;

    __device__ __forceinline__ u32 node() const { return rank / gpus; }
    __device__ __forceinline__ u32 gpu() const { return rank % gpus; }
    __device__ __forceinline__ u32 ranks() const { return nodes * gpus; }
    // This rank's like on another node, and the i-th of the others.
    __device__ __forceinline__ u32 like(u32 on) const { return on * gpus + gpu(); }
    __device__ __forceinline__ u32 other(u32 i) const { return i + (i >= node()); }
};

// One end of a ring, by this rank's addresses. python: dsv3_kernels.ep.internode.Rings
struct Ring {
    u64* words;  // header ready, header free, ready[depth], free[depth]
    u32 *header_in, *header_out;
    u8 *in, *out;  // [depth][chunk_bytes]
    u32 depth;
    u64 chunk_bytes;

    __device__ __forceinline__ u64* header_ready() const { return words; }
    __device__ __forceinline__ u64* header_free() const { return words + 1; }
    __device__ __forceinline__ u64* ready(u64 position) const { return words + 2 + position % depth; }
    __device__ __forceinline__ u64* free(u64 position) const { return words + 2 + depth + position % depth; }
    __device__ __forceinline__ u64 turn(u64 position) const { return position / depth + 1; }
    __device__ __forceinline__ u8* arrived(u64 position) const {
        return in + position % depth * chunk_bytes;
    }
    __device__ __forceinline__ u8* staged(u64 position) const {
        return out + position % depth * chunk_bytes;
    }
};

// A rank's symmetric memory, the same on all ranks: words, headers, rings by (node, channel).
struct Rings {
    u8* base;
    u32 nodes, channels, chunk, depth, header_words;  // chunk: messages
    u64 message_bytes;

    __device__ __forceinline__ Ring at(u32 node, u32 channel) const {
        const u64 index = node * channels + channel, count = nodes * channels;
        const u64 words = 2 + 2 * depth, chunk_bytes = chunk * message_bytes;
        u8* headers = base + 8 * count * words;
        u8* data = headers + ((8 * count * header_words + 15) & ~15ull);
        return Ring{reinterpret_cast<u64*>(base) + index * words,
                    reinterpret_cast<u32*>(headers) + 2 * index * header_words,
                    reinterpret_cast<u32*>(headers) + (2 * index + 1) * header_words,
                    data + 2 * index * depth * chunk_bytes,
                    data + (2 * index + 1) * depth * chunk_bytes,
                    depth,
                    chunk_bytes};
    }
};

// What a rank keeps from call to call, and what all calls need.
struct Link {
    Place place;
    u8* const* peers;  // [gpus]: workspaces of this node's ranks
    Workspace mine;    // whose sources are all ranks
    Rings rings;
    u64* positions;          // [2][nodes][channels]: of the next chunk sent, of the next received
    const i32* queue_pairs;  // [channels]

    __device__ __forceinline__ Workspace peer(u32 gpu) const {
        Workspace theirs = mine;
        theirs.base = peers[gpu];
        return theirs;
    }
    __device__ __forceinline__ u64* sent_chunks(u32 node, u32 channel) const {
        return positions + node * rings.channels + channel;
    }
    __device__ __forceinline__ u64* received_chunks(u32 node, u32 channel) const {
        return sent_chunks(place.nodes + node, channel);
    }
    __device__ __forceinline__ u32 chunks(u32 messages) const {
        return (messages + rings.chunk - 1) / rings.chunk;
    }
    // One warp, after its writes to the staging slot.
    __device__ __forceinline__ void send_chunk(u32 node, u32 channel, u64 position, u64 bytes) const {
        const Ring here = rings.at(node, channel), there = rings.at(place.node(), channel);
        __syncwarp();
        transport::put_signal_warp(there.arrived(position), here.staged(position), bytes,
                                   there.ready(position), there.turn(position), place.like(node),
                                   queue_pairs[channel]);
    }
    // One lane, after the reads of all warps.
    __device__ __forceinline__ void free_chunk(u32 node, u32 channel, u64 position) const {
        const Ring there = rings.at(place.node(), channel);
        transport::signal(there.free(position), there.turn(position), place.like(node),
                          queue_pairs[channel]);
    }
};

// What a dispatch finds out of its routing, on the token's rank, the forwarder and the expert's rank. A
// message is a token on its way to a node; its index begins, like that of a slot, at its channel's first
// token. `channels` is that of the dispatch.
struct Layout {
    i32* experts;         // [tokens, topk]: topk_idx, -1 for what is out of range or stands twice
    i32* sent_index;      // [tokens, nodes]: message, or -1
    i32* sent_tokens;     // [nodes, max_tokens]: token of a message
    i32* sent_counts;     // [nodes, channels]: messages
    i32* forward_slot;    // [nodes, max_tokens, gpus]: slot of a message at each GPU here, or -1
    i32* forward_ranges;  // [nodes, channels, 2]: first message and how many come from a node
    i32* forward_counts;  // [nodes, channels, gpus]: how many of them go to each GPU
    i32* rows;            // [ranks, max_tokens, topk]: see dispatch.cuh
    i32* ranges;          // [ranks, channels, 2]
    u32 channels, max_tokens;

    __device__ __forceinline__ u32 sent(u32 node, u32 channel) const {
        return sent_counts[node * channels + channel];
    }
    __device__ __forceinline__ u32 first(u32 node, u32 channel) const {
        return forward_ranges[2 * (node * channels + channel)];
    }
    __device__ __forceinline__ u32 came(u32 node, u32 channel) const {
        return forward_ranges[2 * (node * channels + channel) + 1];
    }
    __device__ __forceinline__ i32* slots(u32 node, u32 message, u32 gpus) const {
        return forward_slot + (static_cast<u64>(node) * max_tokens + message) * gpus;
    }
};

// Of `warps`, how many do the first of two kinds of work: in proportion to the rows that each moves, and at
// least one wherever there is work, also where it needs `least` of them.
// python: dsv3_kernels.ep.internode.split_warps
__device__ __forceinline__ u32 split_warps(u32 warps, u32 first, u32 second, u32 least_second) {
    const u32 all = first + second;
    if (first == 0 || all == 0) return 0;
    const u32 share = (2 * warps * first + all) / (2 * all);
    return max(1u, min(share, warps - least_second));
}

// Of a warp that looks at several words in turn: it may find nothing for as long as one wait may last.
struct Patience {
    u64 idle_since = 0;

    __device__ __forceinline__ void found() { idle_since = 0; }
    // One lane, which waits for the word: false once the time is up, which is then recorded.
    __device__ __forceinline__ bool remains(const Deadline& deadline, u64 expected, u64 seen, Role role,
                                            u32 peer, u32 channel) {
        const u64 now = ptx::global_timer();
        if (idle_since == 0) idle_since = now;
        if (now - idle_since <= deadline.nanoseconds) return true;
        deadline.give_up(role, peer, channel, expected, seen);
        return false;
    }
};

// By all threads of a block that has kept the protocol, after a barrier: as channel.cuh's, for this node.
__device__ __forceinline__ void finish(Sequence* sequence, const Link& link, u64 epoch) {
    if (threadIdx.x != 0) return;
    if (ptx::fetch_add_device(&sequence->finished_blocks, 1) + 1 != gridDim.x) return;
    sequence->finished_blocks = 0;
    sequence->finished_epochs = epoch;
    for (u32 gpu = 0; gpu < link.place.gpus; ++gpu)
        ptx::store_release_system(link.peer(gpu).ack(link.place.gpu()), epoch);
}

}  // namespace dsv3
