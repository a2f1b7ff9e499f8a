// Dispatch across nodes: every token over InfiniBand once to each node that holds one of its experts, from
// there over NVLink once to each rank that does, there by expert. internode.cuh says what a ring and a
// forwarder are, and why nothing waits in a circle.
//
// Two blocks a channel. The even one first counts its share of this rank's tokens and tells every node; when
// it has heard the same of all nodes it knows what it has to send and to forward, and deals its warps out to
// the two roles. Sending: whole chunks, any warp any of them. Forwarding: a warp for each (node, GPU), which
// looks at the rings in turn. The odd block receives as within one node, a warp for each source rank, in rows
// that it knows from the counts before any token comes: by expert, source rank, token. What a dispatch learns
// stays in the layout, by which dispatch_internode<true> sends other rows the same way, without counts.
//
// Bytes: a (token, other node): row + scales + 8 K written to the staging slot and over InfiniBand; a (token,
// rank): the same read here and written over NVLink.
#pragma once

#include "dispatch.cuh"
#include "dispatch_internode_layout.cuh"
#include "rows.cuh"

namespace dsv3 {
namespace dispatch {

// A token's row and scales into a message or slot. Gives the end of them.
__device__ __forceinline__ float* put(const Tokens& tokens, u32 token, u8* slot) {
    const u8* row = tokens.data + static_cast<i64>(token) * tokens.row_bytes;
    float* to = reinterpret_cast<float*>(slot + tokens.row_bytes);
    Piece piece;
    piece.load<true>(row, tokens.row_bytes);
    put_scales(tokens, token, to);
    for (u32 at = 0; at < tokens.row_bytes; at += kPieceBytes) {
        if (at) piece.load<true>(row + at, tokens.row_bytes - at);
        piece.store(slot + at, tokens.row_bytes - at);
    }
    return to + tokens.tiles;
}

// Warp `warp` of `warps`: every `warps`th chunk for another node, all nodes' first chunks before any's
// second.
template <bool kAgain>
__device__ __forceinline__ bool send_chunks(const Outbound& o, u32 warp, u32 warps) {
    const u32 lane = threadIdx.x % 32, others = o.link.nodes - 1;
    const u32 width = o.self.gpus * o.self.local_experts;
    u32 most = 0;
    for (u32 i = 0; i < others; ++i)
        most = max(most, o.link.chunks(o.layout.sent(o.place.other(i), o.channel)));
    for (u32 item = warp; item < most * others; item += warps) {
        const u32 chunk = item / others, node = o.place.other(item % others);
        const u32 total = o.layout.sent(node, o.channel), begin = chunk * o.link.rings.chunk;
        if (begin >= total) continue;
        const u32 end = min(begin + o.link.rings.chunk, total);
        const Ring ring = o.link.rings.at(node, o.channel);
        const u64 position = *o.link.sent_chunks(node, o.channel) + chunk, before = ring.turn(position) - 1;
        if (o.self.wait_warp(ring.free(position), before, Role::kSend, o.place.like(node), o.channel) <
            before)
            return false;
        for (u32 i = begin; i < end; ++i) {
            const u32 token = o.sent_tokens(node)[o.share.first + i];
            float* routing = put(o.tokens, token, ring.staged(position) + (i - begin) * o.message_bytes);
            if (!kAgain) put_routing(o.tokens, token, node * width, width, routing);
        }
        o.place.send_chunk(node, o.channel, position, (end - begin) * o.message_bytes);
        o.self.count_sent(o.place.like(node), o.channel, (end - begin) * o.message_bytes);
    }
    return true;
}

// A message's row and scales into a slot. Gives the end of them.
__device__ __forceinline__ float* copy(const Tokens& shape, const u8* message, u8* slot) {
    const u32 lane = threadIdx.x % 32;
    for (u32 at = 0; at < shape.row_bytes; at += kPieceBytes) {
        Piece piece;
        piece.load<false>(message + at, shape.row_bytes - at);
        piece.store(slot + at, shape.row_bytes - at);
    }
    const float* from = reinterpret_cast<const float*>(message + shape.row_bytes);
    float* to = reinterpret_cast<float*>(slot + shape.row_bytes);
    for (u32 i = lane; i < shape.tiles; i += 32) to[i] = from[i];
    return to + shape.tiles;
}

// One warp: one message of a node to a GPU here, if that wants it, into its stream's `sent`th slot. The
// message lies in a ring, or is null and lies in this rank's own tokens.
template <bool kAgain>
__device__ __forceinline__ bool forward(const Outbound& o, u32 node, u32 gpu, u32 index, const u8* message,
                                        u32 sent) {
    const u32 lane = threadIdx.x % 32, local = o.self.local_experts, topk = o.tokens.topk;
    const u32 first_expert = node * o.self.gpus * local + gpu * local;  // as own tokens name it
    const u32 token = message ? 0 : o.sent_tokens(node)[index], first = o.layout.first(node, o.channel);
    i32* forward_slot = o.layout.slots(node, index, o.self.gpus) + gpu;
    u64 expert = ~0ull;  // lane k: local one of choice k, or any that is none
    float weight = 0.0f;
    if (!kAgain) {
        if (lane < topk && message) {
            const float* routing =
                reinterpret_cast<const float*>(message + o.tokens.row_bytes) + o.tokens.tiles;
            expert = static_cast<i64>(__float_as_int(routing[2 * lane])) - gpu * local;
            weight = routing[2 * lane + 1];
        } else if (lane < topk) {
            expert = o.tokens.topk_idx[static_cast<u64>(token) * topk + lane] - first_expert;
        }
        const bool goes = __any_sync(kFullWarp, expert < local);
        if (lane == 0) *forward_slot = goes ? static_cast<i32>(first + sent) : -1;
        if (!goes) return false;
    } else if (*forward_slot < 0) {
        return false;
    }
    u8* slot = o.place.peer(gpu).slot(o.place.like(node), first + sent);
    float* routing = message ? copy(o.tokens, message, slot) : put(o.tokens, token, slot);
    if (kAgain) return true;
    if (!message) {
        put_routing(o.tokens, token, first_expert, local, routing);
    } else if (lane < topk) {
        routing[2 * lane] = __int_as_float(expert < local ? static_cast<i32>(expert) : -1);
        routing[2 * lane + 1] = weight;
    }
    return true;
}

// Warp `warp` of `warps`: lane l has the stream of a node to a GPU, number warp + l * warps of all.
// `readers`, shared memory: how many GPUs' streams have read each slot of each node's ring, and its header.
template <bool kAgain>
__device__ __forceinline__ bool forward_chunks(const Outbound& o, u32 warp, u32 warps, u32* readers) {
    if (kAgain)
        for (u32 i = warp; i < o.self.ranks; i += warps)
            if (!pass_form(o, i / o.self.gpus, i % o.self.gpus, readers + o.link.nodes * o.link.rings.depth))
                return false;
    const u32 lane = threadIdx.x % 32, stream = warp + lane * warps, chunk = o.link.rings.chunk;
    const u32 node = stream / o.self.gpus, gpu = stream % o.self.gpus;
    const bool exists = stream < o.self.ranks, from_here = node == o.place.node();
    const u32 total = exists ? o.layout.came(node, o.channel) : 0;
    const u64 base = exists && !from_here ? *o.link.received_chunks(node, o.channel) : 0;
    const Ring ring = o.link.rings.at(exists ? node : 0, o.channel);
    u32 done = 0, sent = 0;  // messages
    Patience patience;
    while (__any_sync(kFullWarp, done < total)) {
        const u64 position = base + done / chunk;
        bool ready = done < total, kept;
        u64 seen = 0;
        if (ready && !from_here) {
            seen = ptx::load_acquire_system(ring.ready(position));
            ready = seen >= ring.turn(position);
        }
        u32 left = patience.look(o.self, ready, done < total, ring.turn(position), seen, o.place.like(node),
                                 o.channel, kept);
        if (!kept) return false;
        for (; left; left &= left - 1) {
            const u32 who = __ffs(left) - 1, n = __shfl_sync(kFullWarp, node, who);
            const u32 g = __shfl_sync(kFullWarp, gpu, who), begin = __shfl_sync(kFullWarp, done, who);
            const u32 end = min(begin + chunk, __shfl_sync(kFullWarp, total, who));
            const u32 before = __shfl_sync(kFullWarp, sent, who), first = o.layout.first(n, o.channel);
            const u64 p = __shfl_sync(kFullWarp, position, who);
            const bool through_ring = n != o.place.node();
            const u8* from = o.link.rings.at(n, o.channel).arrived(p);
            u32 after = before;
            for (u32 i = begin; i < end; ++i, from += o.message_bytes)
                after += forward<kAgain>(o, n, g, first + i, through_ring ? from : nullptr, after);
            if (after != before) {
                publish(o.place.peer(g).tail(o.place.like(n), o.channel), o.epoch << 32 | after);
                o.self.count_sent(o.place.near(g), o.channel, (after - before) * o.message_bytes);
            }
            if (lane == who) done = end, sent = after;
            __syncwarp();
            if (!through_ring || lane != 0) continue;
            u32* slot_readers = readers + n * o.link.rings.depth + p % o.link.rings.depth;
            if (ptx::fetch_add_block(slot_readers, 1) + 1 != o.self.gpus) continue;
            *slot_readers = 0;
            o.place.free_chunk(n, o.channel, p);
        }
    }
    return true;
}

// The even block, once all counts of the channel are in the layout.
template <bool kAgain>
__device__ __forceinline__ bool move_chunks(const Outbound& o, u32* readers) {
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32, nodes = o.link.nodes;
    u32 sent = 0, forwarded = 0;
    for (u32 node = 0; node < nodes; ++node) {
        if (node != o.place.node()) sent += o.layout.sent(node, o.channel);
        for (u32 gpu = 0; gpu < o.self.gpus; ++gpu)
            forwarded += o.layout.forward_counts[o.stream(node) * o.self.gpus + gpu];
    }
    const u32 senders = split_warps(warps, {2 * sent, 1, true}, {2 * forwarded, o.self.ranks, false},
                                    (o.self.ranks + 31) / 32);
    for (u32 i = threadIdx.x; i < nodes * (o.link.rings.depth + 1); i += blockDim.x) readers[i] = 0;
    __syncthreads();
    const bool kept = warp < senders ? send_chunks<kAgain>(o, warp, senders)
                                     : forward_chunks<kAgain>(o, warp - senders, warps - senders, readers);
    if (__syncthreads_or(!kept)) return false;
    for (u32 node = threadIdx.x; node < nodes; node += blockDim.x) {
        if (node == o.place.node()) continue;
        *o.link.sent_chunks(node, o.channel) += o.link.chunks(o.layout.sent(node, o.channel));
        *o.link.received_chunks(node, o.channel) += o.link.chunks(o.layout.came(node, o.channel));
    }
    return true;
}

struct InternodeCall {
    Call call;
    Link link;
    Layout layout;
    u64 message_bytes;
};

// The even block of a channel.
template <bool kAgain>
__device__ __forceinline__ bool send_and_forward(const InternodeCall& all, u32 channel, u64 epoch,
                                                 u32* shared) {
    const Rank& self = all.call.self;
    const Outbound o{all.call,      self,
                     all.call.from, {self, all.link},
                     all.link,      all.layout,
                     channel,       Share(all.call.from.count, channel, all.layout.channels),
                     epoch,         all.message_bytes};
    bool kept = true;
    if (threadIdx.x < all.call.self.gpus) {
        const u32 peer = o.place.near(threadIdx.x);
        kept = self.wait(self.mine().ack(peer), epoch - 1, Role::kForward, peer, channel) >= epoch - 1;
    }
    if (__syncthreads_or(!kept)) return false;
    if (kAgain) {
        if (threadIdx.x == 0) shared[0] = o.tokens.form;
        __syncthreads();
        for (u32 i = threadIdx.x / 32; i + 1 < o.link.nodes; i += blockDim.x / 32)
            kept &= send_header(o, o.place.other(i), shared, 1);
    } else {
        kept = exchange_counts(o, shared);
    }
    if (__syncthreads_or(!kept)) return false;
    kept = move_chunks<kAgain>(o, shared);
    if (threadIdx.x == 0) ++*o.headers();
    return kept;
}

// All blocks of a rank; `block` is this one.
template <bool kAgain>
__device__ __forceinline__ void run(const InternodeCall& all, u32 block, u32 blocks, u32* shared) {
    const Call& call = all.call;
    const Rank& self = call.self;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const u32 channels = all.layout.channels;
    const u64 epoch = self.epoch(), counted = epoch << 32;
    const Workspace mine = self.mine();
    bool kept = true, go = !kAgain || call.to.ranges[1] != kNothing;
    if (!kAgain && block % 2 == 1) {
        forget(call, block / 2);
        for (u32 source = warp; source < self.ranks; source += warps)
            if (lane < channels)
                kept &= self.wait(mine.tail(source, lane), counted, Role::kReceive, self.writer(source),
                                  lane) >= counted;
        if (__syncthreads_or(!kept)) return;
        u32* scratch = shared + self.ranks * self.local_experts;
        go = sound(call, mine, block / 2, scratch);
        if (go) plan(call, mine, block / 2, shared, scratch);
    }
    auto each_channel = [&](auto move) {
        for (u32 channel = block / 2; go && kept && channel < channels; channel += blocks / 2)
            kept = !__syncthreads_or(!move(channel));
    };
    if (block % 2 == 0) {
        each_channel([&](u32 channel) { return send_and_forward<kAgain>(all, channel, epoch, shared); });
    } else {
        const Stages stages(call.from, kAgain, words_of_team(self), warps);
        bulk::Ring ring = stages.ring(shared, warp);
        each_channel([&](u32 channel) {
            bool came = true;
            for (u32 source = warp; came && source < self.ranks; source += warps)
                came = receive<kAgain>(call, ring, stages, source, channel, epoch,
                                       shared + source * self.local_experts);
            return came;
        });
        bulk::stores_read();
    }
    if (!__syncthreads_or(!kept)) Place{self, all.link}.finish(epoch, blocks);
}

}  // namespace dispatch

// Grid: num_sms blocks for each rank of the launch, num_sms even, all resident, 2 * channels in the first
// dispatch of a layout, which kAgain takes up at any number. 64 to 384 threads, at least 32 * (ranks / 32 +
// 1). Dynamic shared memory, in words: of an even block 1 + ranks + nodes * header_words, or nodes * (depth +
// 1), of an odd one ranks * local_experts and as many as there are ranks or local experts. row_bytes is a
// multiple of 16, topk at most 32.
template <bool kAgain>
__global__ void __launch_bounds__(384, 1)
    dispatch_internode(const __grid_constant__ PerRank<dispatch::InternodeCall> calls, u32 num_sms) {
    extern __shared__ __align__(16) u32 shared[];
    dispatch::run<kAgain>(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms, shared);
}

}  // namespace dsv3
