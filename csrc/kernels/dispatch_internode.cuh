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
#include "internode.cuh"

namespace dsv3 {
namespace dispatch {

// One channel of one call, as its even block sees it.
struct Outbound {
    const Call& call;
    const Rank& self;
    const Tokens& tokens;
    Place place;
    const Link& link;
    const Layout& layout;
    u32 channel;
    Share share;
    u64 epoch, message_bytes;

    __device__ __forceinline__ u64* headers() const { return link.sent_chunks(place.node(), channel); }
    __device__ __forceinline__ u32 stream(u32 node) const { return node * layout.channels + channel; }
    __device__ __forceinline__ i32* sent_tokens(u32 node) const {
        return layout.sent_tokens + static_cast<u64>(node) * layout.max_tokens;
    }
};

// All threads of a block. `bad`, shared memory: the least index of a choice of this channel that is out of
// range, or in its row already.
__device__ __forceinline__ void find_bad(const Outbound& o, u32* bad) {
    const i64 experts = static_cast<i64>(o.self.ranks) * o.self.local_experts;
    for (u32 token = o.share.first + threadIdx.x; token < o.share.last; token += blockDim.x) {
        const u64 at = static_cast<u64>(token) * o.tokens.topk;
        for (u32 k = 0; k < o.tokens.topk; ++k) {
            const i64 expert = o.tokens.topk_idx[at + k];
            bool wrong = expert < -1 || expert >= experts;
            for (u32 j = 0; j < k && expert >= 0; ++j) wrong |= o.tokens.topk_idx[at + j] == expert;
            if (wrong) atomicMin(bad, static_cast<u32>(at) + k);
        }
    }
}

// What a channel tells a node: for each GPU there the words that Workspace::counts holds, and last the number
// of messages.
struct Header {
    u32* words;
    u32 gpus, local_experts, ranks;

    __device__ __forceinline__ u32 of_gpu_words() const {
        return local_experts + sizeof(Announcement) / 4 + ranks;
    }
    __device__ __forceinline__ u32* counts(u32 gpu) const { return words + gpu * of_gpu_words(); }
    __device__ __forceinline__ Announcement* announcement(u32 gpu) const {
        return reinterpret_cast<Announcement*>(counts(gpu) + local_experts);
    }
    __device__ __forceinline__ u32* rows(u32 gpu) const {
        return reinterpret_cast<u32*>(announcement(gpu) + 1);
    }
    __device__ __forceinline__ u32* messages() const { return words + gpus * of_gpu_words(); }
    __device__ __forceinline__ u32 size() const { return gpus * of_gpu_words() + 1; }
};

// One warp, a token a lane: which tokens go to a node, as which message, and the header but for its rows,
// which go to `rows`, [ranks]. Both are shared memory.
__device__ __forceinline__ void count(const Outbound& o, u32 node, u32 bad, const Header& header, u32* rows) {
    const u32 lane = threadIdx.x % 32, gpus = o.self.gpus, local = o.self.local_experts;
    const u32 width = gpus * local;
    for (u32 i = lane; i < header.size(); i += 32) header.words[i] = 0;
    __syncwarp();
    u32 total = 0, tokens = 0, choices = 0;  // lane g: the last two are for GPU g
    for (u32 base = o.share.first; base < o.share.last; base += 32) {
        const u32 token = base + lane;
        u32 wanted = 0;  // a bit a GPU
        for (u32 k = 0; token < o.share.last && k < o.tokens.topk; ++k) {
            const u64 e = o.tokens.topk_idx[static_cast<u64>(token) * o.tokens.topk + k] - node * width;
            if (e >= width) continue;
            atomicAdd(header.counts(e / local) + e % local, 1u);
            wanted |= 1u << e / local;
        }
        __syncwarp();
        const u32 goes = __ballot_sync(kFullWarp, wanted != 0);
        const u32 message = o.share.first + total + __popc(goes & ((1u << lane) - 1));
        if (token < o.share.last)
            o.layout.sent_index[static_cast<u64>(token) * o.link.nodes + node] = wanted ? message : -1;
        if (wanted) o.sent_tokens(node)[message] = token;
        for (u32 gpu = 0; gpu < gpus; ++gpu) {
            const u32 votes = __popc(__ballot_sync(kFullWarp, wanted >> gpu & 1));
            if (lane == gpu) tokens += votes;
        }
        total += __popc(goes);
    }
    __syncwarp();
    if (lane < gpus) {
        for (u32 e = 0; e < local; ++e) choices += header.counts(lane)[e];
        const u64 value = bad == ~0u ? 0 : o.tokens.topk_idx[bad];
        *header.announcement(lane) =
            Announcement{tokens,        o.share.first,
                         o.tokens.form, o.call.to.max_rows,
                         bad + 1,       {static_cast<u32>(value), static_cast<u32>(value >> 32)}};
        rows[node * gpus + lane] = o.tokens.form & kTokenOrder ? tokens : choices;
    }
    if (lane == 0) {
        *header.messages() = total;
        o.layout.sent_counts[o.stream(node)] = total;
    }
}

// One warp: a header over InfiniBand.
__device__ __forceinline__ bool send_header(const Outbound& o, u32 node, const Header& header) {
    const Ring here = o.link.rings.at(node, o.channel), there = o.link.rings.at(o.place.node(), o.channel);
    const u32 like = o.place.like(node);
    const u64 before = *o.headers();
    if (o.self.wait_warp(here.header_free(), before, Role::kSend, like, o.channel) < before) return false;
    for (u32 i = threadIdx.x % 32; i < header.size(); i += 32) here.header_out[i] = header.words[i];
    __syncwarp();
    transport::put_signal_warp(reinterpret_cast<u8*>(there.header_in), reinterpret_cast<u8*>(here.header_out),
                               4 * header.size(), there.header_ready(), before + 1, like,
                               o.link.queue_pairs[o.channel]);
    return true;
}

// One warp: what a header says, to the GPUs of this node and into the layout.
__device__ __forceinline__ void tell(const Outbound& o, u32 node, const Header& header) {
    const u32 lane = threadIdx.x % 32, source = o.place.like(node);
    for (u32 gpu = 0; gpu < o.self.gpus; ++gpu) {
        const Workspace theirs = o.place.peer(gpu);
        const u32* from = header.counts(gpu);
        u32* to = theirs.counts(source, o.channel);
        for (u32 i = lane; i < header.of_gpu_words(); i += 32) to[i] = from[i];
        if (lane == 0)
            o.layout.forward_counts[o.stream(node) * o.self.gpus + gpu] = header.announcement(gpu)->tokens;
        publish(theirs.tail(source, o.channel), o.epoch << 32);
    }
    if (lane != 0) return;
    o.layout.forward_ranges[2 * o.stream(node)] = header.announcement(0)->first;
    o.layout.forward_ranges[2 * o.stream(node) + 1] = *header.messages();
}

// The even block: counts out and in. `shared`: [1 + ranks + nodes * header words].
__device__ __forceinline__ bool exchange_counts(const Outbound& o, u32* shared) {
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32, nodes = o.link.nodes;
    u32 *bad = shared, *rows = shared + 1;
    Header header{rows + o.self.ranks, o.self.gpus, o.self.local_experts, o.self.ranks};
    u32* const headers = header.words;
    if (threadIdx.x == 0) *bad = ~0u;
    __syncthreads();
    find_bad(o, bad);
    __syncthreads();
    for (u32 node = warp; node < nodes; node += warps) {
        header.words = headers + node * header.size();
        count(o, node, *bad, header, rows);
    }
    __syncthreads();
    for (u32 node = warp; node < nodes; node += warps) {
        header.words = headers + node * header.size();
        for (u32 i = threadIdx.x % 32; i < o.self.gpus * o.self.ranks; i += 32)
            header.rows(i / o.self.ranks)[i % o.self.ranks] = rows[i % o.self.ranks];
        __syncwarp();
        if (node == o.place.node())
            tell(o, node, header);
        else if (!send_header(o, node, header))
            return false;
    }
    const u64 number = *o.headers() + 1;
    for (u32 i = warp; i + 1 < nodes; i += warps) {
        const u32 node = o.place.other(i), like = o.place.like(node);
        const Ring here = o.link.rings.at(node, o.channel);
        if (o.self.wait_warp(here.header_ready(), number, Role::kForward, like, o.channel) < number)
            return false;
        header.words = here.header_in;
        tell(o, node, header);
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            transport::signal(o.link.rings.at(o.place.node(), o.channel).header_free(), number, like,
                              o.link.queue_pairs[o.channel]);
    }
    return true;
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
// `readers`, shared memory: how many GPUs' streams have read each slot of each node's ring.
template <bool kAgain>
__device__ __forceinline__ bool forward_chunks(const Outbound& o, u32 warp, u32 warps, u32* readers) {
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
            if (kAgain && begin == 0 && lane == 0)
                o.place.peer(g).announcement(o.place.like(n), o.channel)->form = o.tokens.form;
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
    for (u32 i = threadIdx.x; i < nodes * o.link.rings.depth; i += blockDim.x) readers[i] = 0;
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
    if (!kAgain) kept = exchange_counts(o, shared);
    if (__syncthreads_or(!kept)) return false;
    if (!kAgain && threadIdx.x == 0) ++*o.headers();
    return move_chunks<kAgain>(o, shared);
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
    for (u32 channel = block / 2; go && kept && channel < channels; channel += blocks / 2) {
        if (block % 2 == 0)
            kept = send_and_forward<kAgain>(all, channel, epoch, shared);
        else
            for (u32 source = warp; kept && source < self.ranks; source += warps)
                kept = receive<kAgain>(call, source, channel, epoch, shared + source * self.local_experts);
        kept = !__syncthreads_or(!kept);
    }
    if (!__syncthreads_or(!kept)) Place{self, all.link}.finish(epoch, blocks);
}

}  // namespace dispatch

// Grid: num_sms blocks for each rank of the launch, num_sms even, all resident, 2 * channels in the first
// dispatch of a layout, which kAgain takes up at any number. 64 to 384 threads, at least 32 * (ranks / 32 +
// 1). Dynamic shared memory, in words: of an even block 1 + ranks + nodes * header_words, or nodes * depth,
// of an odd one ranks * local_experts and as many as there are ranks or local experts. row_bytes is a
// multiple of 16, topk at most 32.
template <bool kAgain>
__global__ void __launch_bounds__(384, 1)
    dispatch_internode(const __grid_constant__ PerRank<dispatch::InternodeCall> calls, u32 num_sms) {
    extern __shared__ u32 shared[];
    dispatch::run<kAgain>(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms, shared);
}

}  // namespace dsv3
