// What dispatch and combine across nodes share: which rank is where, the rings over InfiniBand, the tables
// that a dispatch leaves for its combine.
//
// Rank r is GPU r % gpus of node r / gpus. A token goes over InfiniBand once to a node, always between ranks
// of the same GPU number; inside a node it goes by stores over NVLink, through channel.cuh's slots. The
// stream of rank s to a GPU of another node thus has two hops, and the rank in between is called its
// forwarder: the one of s's GPU number on that node. On s's own node that is s itself.
//
// A ring joins a rank, in one channel, with its like on one other node, each way: `depth` slots of a chunk of
// messages. Positions count chunks and never begin anew; position p lies in slot p % depth, for the
// (p / depth + 1)th time. Both ends know from the counts how many chunks a call has, and keep the position at
// which the next one begins. Invariants of a ring, with n = p / depth + 1:
//   1. The sender writes its staging slot and puts it at position p only after free[slot] >= n - 1.
//   2. ready[slot] = n follows the chunk on the same queue pair; nobody else sets that word.
//   3. The receiver reads position p only after it has acquired ready[slot] >= n, and sets free[slot] = n
//   when
//      the last of its warps has read the chunk. The next ready for this slot follows that, so that both
//      words only grow, whoever sets them and in whatever order the slots are freed.
// By 3 and 1 a staging slot is free too: what was read there had left here. A header (the counts of a call)
// has a slot of its own, with the epoch for n.
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
    __device__ __forceinline__ u8* arrived(u64 position) const { return in + position % depth * chunk_bytes; }
    __device__ __forceinline__ u8* staged(u64 position) const { return out + position % depth * chunk_bytes; }
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

// A rank among all; its `self` counts all ranks as sources, and maps each to its forwarder on this node.
struct Link {
    u32 nodes;
    Rings rings;
    u64* positions;          // [2][nodes][channels]: of the next chunk sent, of the next received; and of its
                             // own node, where there is no ring, the number of headers sent so far
    const i32* queue_pairs;  // [channels]

    __device__ __forceinline__ u64* sent_chunks(u32 node, u32 channel) const {
        return positions + node * rings.channels + channel;
    }
    __device__ __forceinline__ u64* received_chunks(u32 node, u32 channel) const {
        return sent_chunks(nodes + node, channel);
    }
    __device__ __forceinline__ u32 chunks(u32 messages) const {
        return (messages + rings.chunk - 1) / rings.chunk;
    }
};

// A rank among the nodes.
struct Where {
    const Rank& self;

    __device__ __forceinline__ u32 node() const { return self.rank / self.gpus; }
    __device__ __forceinline__ u32 gpu() const { return self.rank % self.gpus; }
    // A rank of this node, and its memory.
    __device__ __forceinline__ u32 near(u32 gpu) const { return self.first_of_node() + gpu; }
    __device__ __forceinline__ Workspace peer(u32 gpu) const { return self.workspace(gpu); }
    // This rank's like on another node, and the i-th of the others.
    __device__ __forceinline__ u32 like(u32 on) const { return on * self.gpus + gpu(); }
    __device__ __forceinline__ u32 other(u32 i) const { return i + (i >= node()); }
};

struct Place : Where {
    const Link& link;

    // One warp, after its writes to the staging slot.
    __device__ __forceinline__ void send_chunk(u32 to, u32 channel, u64 position, u64 bytes) const {
        const Ring here = link.rings.at(to, channel), there = link.rings.at(node(), channel);
        __syncwarp();
        transport::put_signal_warp(there.arrived(position), here.staged(position), bytes,
                                   there.ready(position), there.turn(position), like(to),
                                   link.queue_pairs[channel]);
    }
    // One lane, after the reads of all warps.
    __device__ __forceinline__ void free_chunk(u32 from, u32 channel, u64 position) const {
        const Ring there = link.rings.at(node(), channel);
        transport::signal(there.free(position), there.turn(position), like(from), link.queue_pairs[channel]);
    }
    // By all threads of a block that has kept the protocol, after a barrier: as channel.cuh's, for this node.
    __device__ __forceinline__ void finish(u64 epoch, u32 blocks) const {
        Rank on_node = self;
        on_node.ranks = self.gpus;
        dsv3::finish(on_node, epoch, blocks);
    }
};

// What a dispatch finds out of its routing, on the token's rank, the forwarder and the expert's rank. A
// message is a token on its way to a node; its index begins, like that of a slot, at its channel's first
// token. `channels` is that of the dispatch.
struct Layout {
    i32* sent_index;      // [tokens, nodes]: message, or -1
    i32* sent_tokens;     // [nodes, max_tokens]: token of a message
    i32* sent_counts;     // [nodes, channels]: messages
    i32* forward_slot;    // [nodes, max_tokens, gpus]: slot of a message at each GPU here, or -1
    i32* forward_ranges;  // [nodes, channels, 2]: first message and how many come from a node
    i32* forward_counts;  // [nodes, channels, gpus]: how many of them go to each GPU
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

// One role's work in a channel of a call: rows that it reads or writes, in streams of about the same length.
// Several warps may share a stream, or each stream has one warp.
struct Work {
    u32 rows, streams;
    bool shared;

    // Rows of the warp that has most.
    __device__ __forceinline__ u32 longest(u32 warps) const {
        const u32 of_stream = (rows + streams - 1) / streams;
        if (warps < streams) return of_stream * ((streams + warps - 1) / warps);
        return shared ? of_stream / (warps / streams) : of_stream;
    }
};

// Of `warps`, how many do the first of two roles: as many as let the slower role end soonest. None without
// work; else one or more, and `least` are left for the second.
__device__ __forceinline__ u32 split_warps(u32 warps, Work first, Work second, u32 least) {
    if (first.rows == 0) return 0;
    u32 best = 1, soonest = ~0u;
    for (u32 mine = 1; mine + least <= warps; ++mine) {
        const u32 end = max(first.longest(mine), second.longest(warps - mine));
        if (end < soonest) best = mine;
        soonest = min(soonest, end);
    }
    return best;
}

// One warp, whose lanes wait for several words, and which goes on with any: it may find nothing for as long
// as one wait may last. It looks at the clock now and then, where no word has changed in between.
struct Patience {
    u64 idle_since = 0, last_seen = 0;
    u32 fruitless = 0;

    // All lanes; `waits`: this one has found its word to be `seen`. The lanes that may go on, or none; `kept`
    // becomes false once the time is up, or the alarm is there: then all lanes that wait have given up.
    __device__ __forceinline__ u32 look(const Rank& self, bool ready, bool waits, u64 expected, u64 seen,
                                        u32 peer, u32 channel, bool& kept) {
        const u32 found = __ballot_sync(kFullWarp, ready);
        __syncwarp();
        const bool changed = __any_sync(kFullWarp, seen != last_seen);
        last_seen = seen;
        kept = true;
        if (found) idle_since = 0;
        fruitless = found || changed ? 0 : fruitless + 1;
        if (fruitless % 4 != 3) return found;
        const u64 now = ptx::global_timer();
        const bool first = idle_since == 0;
        if (first) idle_since = now;
        const bool late = now - idle_since > self.timeout;
        kept = !__any_sync(kFullWarp, late || (!first && self.given_up().alarm()));
        if (!kept && waits) self.fail(expected, seen, Role::kForward, peer, channel, late, fruitless == 7);
        return 0;
    }
};

}  // namespace dsv3
