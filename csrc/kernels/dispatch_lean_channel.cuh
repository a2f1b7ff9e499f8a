// What the warps of a channel share in the lean dispatch: how a token travels, whom they tell what.
#pragma once

#include "bulk.cuh"
#include "dispatch_layout.cuh"
#include "lean.cuh"

namespace dsv3 {
namespace dispatch {

// How much of a message a stage holds, and how many of them a warp has.
struct Pieces {
    u32 bytes, stages;

    __device__ __forceinline__ u32 bytes_of_warp() const {
        return stages * (bytes + bulk::Ring::kBarrierBytes);
    }
};

// A token as it travels: the expert and weight of each choice, none in a dispatch with a known layout; the
// row; its scales. All are multiples of 16 bytes.
struct Message {
    u32 bytes, routing_bytes;
    Pieces pieces;
};

struct LeanCall {
    Call call;
    lean::Link link;
    Layout layout;
    u32 message_bytes, routing_bytes;
};

// One channel of one call.
struct Lean {
    const Call& call;
    const Rank& self;
    const Tokens& tokens;
    lean::Place place;
    const Layout& layout;
    const Message& message;
    u32 channel;
    u64 epoch;

    __device__ __forceinline__ u32 experts() const { return self.ranks * self.local_experts; }
    __device__ __forceinline__ u32 stream(u32 node) const { return node * layout.channels + channel; }
    __device__ __forceinline__ u64 tail(u32 count) const { return epoch << 32 | count; }
    // What `first` says: whether rows look as here, and the slot of the first.
    __device__ __forceinline__ u64 opening(u32 first) const {
        return epoch << 32 | tokens.form << 29 | first;
    }
};

// A piece of some message.
struct Cursor {
    u32 item, begin = 0;

    __device__ __forceinline__ u32 end(const Message& m) const {
        return min(begin + m.pieces.bytes, m.bytes);
    }
    __device__ __forceinline__ void advance(const Message& m) {
        begin += m.pieces.bytes;
        if (begin >= m.bytes) ++item, begin = 0;
    }
};

// One warp, lane t: its readers of the epoch before are done. t counts the GPUs of this node, then, if `far`,
// all nodes.
__device__ __forceinline__ bool may_write(const Lean& o, bool far) {
    const u32 lane = threadIdx.x % 32, gpus = o.self.gpus, node = lane - gpus;
    bool free = true;
    if (lane < gpus) {
        const u32 peer = o.place.near(lane);
        free = o.self.wait(o.self.mine().ack(peer), o.epoch - 1, Role::kSend, peer, o.channel) >= o.epoch - 1;
    } else if (far && node < o.place.link.nodes && node != o.place.node()) {
        free = o.place.wait_ack(node, o.channel, o.epoch - 1);
    }
    return __all_sync(kFullWarp, free);
}

// What a channel of a rank brings the GPUs of this node.
struct Told {
    const u32 *counts, *tokens, *rows;  // [gpus * local experts], [gpus], [ranks]
    Announcement said;                  // tokens: messages
};

// In a header.
__device__ __forceinline__ Told read_header(const Lean& o, const u32* header) {
    const u32 *tokens = header + o.self.gpus * o.self.local_experts, *rows = tokens + o.self.gpus;
    return {header, tokens, rows, *reinterpret_cast<const Announcement*>(rows + o.self.ranks)};
}

// One warp: to the GPUs, whom a tail behind this tells that it is there, and into the layout.
__device__ __forceinline__ void tell(const Lean& o, u32 node, const Told& told) {
    const u32 lane = threadIdx.x % 32, local = o.self.local_experts, source = o.place.like(node);
    for (u32 gpu = 0; gpu < o.self.gpus; ++gpu) {
        const Workspace theirs = o.place.peer(gpu);
        u32 *counts = theirs.counts(source, o.channel), *rows = theirs.rows(source, o.channel);
        for (u32 e = lane; e < local; e += 32) counts[e] = told.counts[gpu * local + e];
        for (u32 r = lane; r < o.self.ranks; r += 32) rows[r] = told.rows[r];
        if (lane != 0) continue;
        Announcement said = told.said;
        said.tokens = told.tokens[gpu];
        *theirs.announcement(source, o.channel) = said;
    }
    if (lane < o.self.gpus) o.layout.forward_counts[o.stream(node) * o.self.gpus + lane] = told.tokens[lane];
    if (lane != 0) return;
    o.layout.forward_ranges[2 * o.stream(node)] = told.said.first;
    o.layout.forward_ranges[2 * o.stream(node) + 1] = told.said.tokens;
}

// The same of rows whose layout is known.
__device__ __forceinline__ void tell_form(const Lean& o, u32 node, u32 form) {
    const u32 lane = threadIdx.x % 32;
    if (lane < o.self.gpus) o.place.peer(lane).announcement(o.place.like(node), o.channel)->form = form;
}

// One lane, after all of a node's stream to a GPU has been stored and told, and __syncwarp.
__device__ __forceinline__ void close(const Lean& o, u32 node, u32 gpu, u32 count) {
    ptx::store_release_system(o.place.peer(gpu).tail(o.place.like(node), o.channel), o.tail(count));
}

// One warp: a stage to all lanes' targets, then the next load.
template <class Load>
__device__ __forceinline__ void spread(const Cursor& at, u32 end, const u8* stage, u8* target, Load load) {
    for (u32 left = __ballot_sync(kFullWarp, target != nullptr); left; left &= left - 1) {
        const u64 to = __shfl_sync(kFullWarp, reinterpret_cast<u64>(target), __ffs(left) - 1);
        bulk::store(reinterpret_cast<u8*>(to) + at.begin, stage, end - at.begin);
    }
    bulk::commit();
    bulk::stores_read<1>();  // the stage before this one is free
    load();
}

}  // namespace dispatch
}  // namespace dsv3
