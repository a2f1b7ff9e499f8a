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
    const Link& link;
    const Tokens& tokens;
    const Layout& layout;
    const Deadline& deadline;
    u32 channel, first, last;  // this channel's tokens
    u64 epoch, message_bytes;

    __device__ __forceinline__ u32 count_words() const { return link.mine.local_experts + 3; }
};

// topk_idx of this channel, made harmless. Returns whether this thread had to.
__device__ __forceinline__ bool sanitise(const Outbound& o) {
    const i64 experts = static_cast<i64>(o.link.place.ranks()) * o.link.mine.local_experts;
    bool fault = false;
    for (u32 token = o.first + threadIdx.x; token < o.last; token += blockDim.x) {
        const i64* from = o.tokens.topk_idx + static_cast<i64>(token) * o.tokens.topk;
        i32* to = o.layout.experts + static_cast<i64>(token) * o.tokens.topk;
        for (u32 k = 0; k < o.tokens.topk; ++k) {
            const i64 expert = from[k];
            bool bad = expert < -1 || expert >= experts;
            for (u32 j = 0; j < k && expert >= 0; ++j) bad |= from[j] == expert;
            fault |= bad;
            to[k] = bad ? -1 : static_cast<i32>(expert);
        }
    }
    return fault;
}

// One warp, a token a lane: which tokens go to a node, as which message, and the header that says so: for
// each GPU there counts[local expert], tokens, first message, ErrorCode; then the number of messages.
// `header` is shared memory.
__device__ __forceinline__ void count(const Outbound& o, u32 node, bool fault, u32* header) {
    const u32 lane = threadIdx.x % 32, gpus = o.link.place.gpus, local = o.link.mine.local_experts;
    const u32 words = gpus * o.count_words();
    const i32 low = node * gpus * local, width = gpus * local;
    for (u32 i = lane; i <= words; i += 32) header[i] = 0;
    __syncwarp();
    u32 total = 0, for_gpu = 0;  // lane g: tokens for GPU g
    for (u32 base = o.first; base < o.last; base += 32) {
        const u32 token = base + lane;
        u32 wanted = 0;  // a bit a GPU
        if (token < o.last)
            for (u32 k = 0; k < o.tokens.topk; ++k) {
                const i32 e = o.layout.experts[static_cast<i64>(token) * o.tokens.topk + k] - low;
                if (e < 0 || e >= width) continue;
                const u32 gpu = e / local;
                wanted |= 1u << gpu;
                atomicAdd(header + gpu * o.count_words() + e % local, 1u);
            }
        const u32 goes = __ballot_sync(kFullWarp, wanted != 0);
        const u32 message = o.first + total + __popc(goes & ((1u << lane) - 1));
        if (token < o.last)
            o.layout.sent_index[static_cast<i64>(token) * o.link.place.nodes + node] = wanted ? message : -1;
        if (wanted) o.layout.sent_tokens[static_cast<i64>(node) * o.link.mine.max_tokens + message] = token;
        for (u32 gpu = 0; gpu < gpus; ++gpu) {
            const u32 votes = __popc(__ballot_sync(kFullWarp, wanted >> gpu & 1));
            if (lane == gpu) for_gpu += votes;
        }
        total += __popc(goes);
    }
    if (lane < gpus) {
        u32* of_gpu = header + lane * o.count_words() + local;
        of_gpu[0] = for_gpu;
        of_gpu[1] = o.first;
        of_gpu[2] = fault ? static_cast<u32>(ErrorCode::kDispatchExperts) : 0;
    }
    if (lane == 0) {
        header[words] = total;
        o.layout.sent_counts[node * o.layout.channels + o.channel] = total;
    }
    __syncwarp();
}

// One warp: a header over InfiniBand.
__device__ __forceinline__ bool send_header(const Outbound& o, u32 node, const u32* header) {
    const Ring here = o.link.rings.at(node, o.channel);
    const Ring there = o.link.rings.at(o.link.place.node(), o.channel);
    const u32 like = o.link.place.like(node), words = o.link.rings.header_words;
    if (o.deadline.wait_warp(here.header_free(), o.epoch - 1, Role::kSend, like, o.channel) < o.epoch - 1)
        return false;
    for (u32 i = threadIdx.x % 32; i < words; i += 32) here.header_out[i] = header[i];
    __syncwarp();
    transport::put_signal_warp(reinterpret_cast<u8*>(there.header_in), reinterpret_cast<u8*>(here.header_out),
                               4 * words, there.header_ready(), o.epoch, like, o.link.queue_pairs[o.channel]);
    return true;
}

// One warp: what a header says, to the GPUs of this node and into the layout.
__device__ __forceinline__ void tell(const Outbound& o, u32 node, const u32* header) {
    const u32 lane = threadIdx.x % 32, gpus = o.link.place.gpus, local = o.link.mine.local_experts;
    const u32 source = o.link.place.like(node), stream = node * o.layout.channels + o.channel;
    for (u32 gpu = 0; gpu < gpus; ++gpu) {
        const Workspace theirs = o.link.peer(gpu);
        u32* announced = theirs.counts(source, o.channel);
        const u32* counts = header + gpu * o.count_words();
        for (u32 i = lane; i < o.count_words(); i += 32) announced[i] = counts[i];
        if (lane == 0) o.layout.forward_counts[stream * gpus + gpu] = counts[local];
        publish(theirs.tail(source, o.channel), o.epoch << 32);
    }
    if (lane != 0) return;
    o.layout.forward_ranges[2 * stream] = header[local + 1];
    o.layout.forward_ranges[2 * stream + 1] = header[gpus * o.count_words()];
}

// The even block: counts out and in. `headers` is shared memory, one a warp.
__device__ __forceinline__ bool exchange_counts(const Outbound& o, u32* headers) {
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32, nodes = o.link.place.nodes;
    u32* header = headers + warp * o.link.rings.header_words;
    const bool fault = __syncthreads_or(sanitise(o));
    for (u32 node = warp; node < nodes; node += warps) {
        count(o, node, fault, header);
        if (node == o.link.place.node())
            tell(o, node, header);
        else if (!send_header(o, node, header))
            return false;
        __syncwarp();
    }
    for (u32 i = warp; i + 1 < nodes; i += warps) {
        const u32 node = o.link.place.other(i), like = o.link.place.like(node);
        const Ring here = o.link.rings.at(node, o.channel);
        if (o.deadline.wait_warp(here.header_ready(), o.epoch, Role::kForward, like, o.channel) < o.epoch)
            return false;
        tell(o, node, here.header_in);
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            transport::signal(o.link.rings.at(o.link.place.node(), o.channel).header_free(), o.epoch, like,
                              o.link.queue_pairs[o.channel]);
    }
    return true;
}

// Warp `warp` of `warps`: every `warps`th chunk for another node, all nodes' first chunks before any's
// second.
template <bool kAgain>
__device__ __forceinline__ bool send_chunks(const Outbound& o, u32 warp, u32 warps) {
    const u32 lane = threadIdx.x % 32, others = o.link.place.nodes - 1;
    const u32 width = o.link.place.gpus * o.link.mine.local_experts;
    u32 most = 0;
    for (u32 i = 0; i < others; ++i)
        most = max(most, o.link.chunks(o.layout.sent(o.link.place.other(i), o.channel)));
    for (u32 item = warp; item < most * others; item += warps) {
        const u32 chunk = item / others, node = o.link.place.other(item % others);
        const u32 total = o.layout.sent(node, o.channel), begin = chunk * o.link.rings.chunk;
        if (begin >= total) continue;
        const u32 end = min(begin + o.link.rings.chunk, total);
        const Ring ring = o.link.rings.at(node, o.channel);
        const u64 position = *o.link.sent_chunks(node, o.channel) + chunk, before = ring.turn(position) - 1;
        if (o.deadline.wait_warp(ring.free(position), before, Role::kSend, o.link.place.like(node),
                                 o.channel) < before)
            return false;
        for (u32 i = begin; i < end; ++i) {
            const u32 token =
                o.layout.sent_tokens[static_cast<i64>(node) * o.link.mine.max_tokens + o.first + i];
            u8* message = ring.staged(position) + (i - begin) * o.message_bytes;
            put(o.tokens, token, message, lane);
            if (kAgain || lane >= o.tokens.topk) continue;
            const i64 choice = static_cast<i64>(token) * o.tokens.topk + lane;
            const i32 expert = o.layout.experts[choice] - static_cast<i32>(node * width);
            const bool there = expert >= 0 && expert < static_cast<i32>(width);
            float* metadata = reinterpret_cast<float*>(message + o.tokens.row_bytes) + o.tokens.tiles;
            metadata[2 * lane] = __int_as_float(there ? expert : -1);
            metadata[2 * lane + 1] = o.tokens.topk_weights ? o.tokens.topk_weights[choice] : 0.0f;
        }
        o.link.send_chunk(node, o.channel, position, (end - begin) * o.message_bytes);
    }
    return true;
}

// A message's row and scales into a slot.
__device__ __forceinline__ void copy(const Tokens& shape, const u8* message, u8* slot, u32 lane) {
    for (u32 i = lane * 16; i < shape.row_bytes; i += 32 * 16)
        ptx::store_global(slot + i, ptx::load_global(message + i));
    const float* from = reinterpret_cast<const float*>(message + shape.row_bytes);
    float* to = reinterpret_cast<float*>(slot + shape.row_bytes);
    for (u32 i = lane; i < shape.tiles; i += 32) to[i] = from[i];
}

// One warp: one message of a node to a GPU here, if that wants it, into its stream's `sent`th slot. The
// message lies in a ring, or is null and lies in this rank's own tokens.
template <bool kAgain>
__device__ __forceinline__ bool forward(const Outbound& o, u32 node, u32 gpu, u32 index, const u8* message,
                                        u32 sent) {
    const u32 lane = threadIdx.x % 32, local = o.link.mine.local_experts;
    const u32 width = o.link.place.gpus * local, first = o.layout.first(node, o.channel);
    i32* slots = o.layout.slots(node, index, o.link.place.gpus);
    u32 token = 0;
    if (!message) token = o.layout.sent_tokens[static_cast<i64>(node) * o.link.mine.max_tokens + index];
    i32 expert = -1;
    float weight = 0.0f;
    bool goes;
    if (kAgain) {
        goes = slots[gpu] >= 0;
    } else {
        if (lane < o.tokens.topk && message) {
            const float* metadata =
                reinterpret_cast<const float*>(message + o.tokens.row_bytes) + o.tokens.tiles;
            expert = __float_as_int(metadata[2 * lane]);
            weight = metadata[2 * lane + 1];
        } else if (lane < o.tokens.topk) {
            const i64 choice = static_cast<i64>(token) * o.tokens.topk + lane;
            expert = o.layout.experts[choice] - static_cast<i32>(node * width);
            if (o.tokens.topk_weights) weight = o.tokens.topk_weights[choice];
        }
        expert -= static_cast<i32>(gpu * local);
        if (expert < 0 || expert >= static_cast<i32>(local)) expert = -1;
        goes = __any_sync(kFullWarp, expert >= 0);
        if (lane == 0) slots[gpu] = goes ? static_cast<i32>(first + sent) : -1;
    }
    if (!goes) return false;
    u8* slot = o.link.peer(gpu).slot(o.link.place.like(node), first + sent);
    if (message)
        copy(o.tokens, message, slot, lane);
    else
        put(o.tokens, token, slot, lane);
    if (!kAgain && lane < o.tokens.topk) {
        float* metadata = reinterpret_cast<float*>(slot + o.tokens.row_bytes) + o.tokens.tiles;
        metadata[2 * lane] = __int_as_float(expert);
        metadata[2 * lane + 1] = weight;
    }
    return true;
}

// Warp `warp` of `warps`: lane l has the stream of a node to a GPU, number warp + l * warps of all.
// `readers`, shared memory: how many GPUs' streams have read each slot of each node's ring.
template <bool kAgain>
__device__ __forceinline__ bool forward_chunks(const Outbound& o, u32 warp, u32 warps, u32* readers) {
    const Place& place = o.link.place;
    const u32 lane = threadIdx.x % 32, stream = warp + lane * warps;
    const u32 node = stream / place.gpus, gpu = stream % place.gpus;
    const bool exists = stream < place.ranks(), from_here = node == place.node();
    const u32 total = exists ? o.layout.came(node, o.channel) : 0;
    const u64 base = exists && !from_here ? *o.link.received_chunks(node, o.channel) : 0;
    u32 done = 0, sent = 0;  // messages
    Patience patience;
    while (__any_sync(kFullWarp, done < total)) {
        bool ready = done < total, kept = true;
        if (ready && !from_here) {
            const Ring ring = o.link.rings.at(node, o.channel);
            const u64 position = base + done / o.link.rings.chunk;
            const u64 seen = ptx::load_acquire_system(ring.ready(position));
            ready = seen >= ring.turn(position);
            if (!ready)
                kept = patience.remains(o.deadline, ring.turn(position), seen, Role::kForward,
                                        place.like(node), o.channel);
        }
        u32 left = __ballot_sync(kFullWarp, ready);
        if (left)
            patience.found();
        else if (!__all_sync(kFullWarp, kept))
            return false;
        for (; left; left &= left - 1) {
            const u32 who = __ffs(left) - 1;
            const u32 n = __shfl_sync(kFullWarp, node, who), g = __shfl_sync(kFullWarp, gpu, who);
            const u32 begin = __shfl_sync(kFullWarp, done, who),
                      messages = __shfl_sync(kFullWarp, total, who);
            const u32 end = min(begin + o.link.rings.chunk, messages),
                      before = __shfl_sync(kFullWarp, sent, who);
            const u64 position = __shfl_sync(kFullWarp, base, who) + begin / o.link.rings.chunk;
            const u32 first = o.layout.first(n, o.channel);
            const u8* chunk = n == place.node() ? nullptr : o.link.rings.at(n, o.channel).arrived(position);
            u32 after = before;
            __syncwarp();
            for (u32 i = begin; i < end; ++i)
                after += forward<kAgain>(o, n, g, first + i,
                                         chunk ? chunk + (i - begin) * o.message_bytes : nullptr, after);
            if (after != before)
                publish(o.link.peer(g).tail(place.like(n), o.channel), o.epoch << 32 | after);
            if (lane == who) done = end, sent = after;
            __syncwarp();
            if (!chunk || lane != 0) continue;
            u32* slot_readers = readers + n * o.link.rings.depth + position % o.link.rings.depth;
            if (ptx::fetch_add_block(slot_readers, 1) + 1 != place.gpus) continue;
            *slot_readers = 0;
            o.link.free_chunk(n, o.channel, position);
        }
    }
    return true;
}

// The even block, once all counts of the channel are in the layout.
template <bool kAgain>
__device__ __forceinline__ bool move_chunks(const Outbound& o, u32* readers) {
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32, nodes = o.link.place.nodes;
    const u32 gpus = o.link.place.gpus;
    u32 sent = 0, forwarded = 0;
    for (u32 node = 0; node < nodes; ++node) {
        if (node != o.link.place.node()) sent += o.layout.sent(node, o.channel);
        for (u32 gpu = 0; gpu < gpus; ++gpu)
            forwarded += o.layout.forward_counts[(node * o.layout.channels + o.channel) * gpus + gpu];
    }
    const u32 senders = split_warps(warps, sent, forwarded, (o.link.place.ranks() + 31) / 32);
    for (u32 i = threadIdx.x; i < nodes * o.link.rings.depth; i += blockDim.x) readers[i] = 0;
    __syncthreads();
    const bool kept = warp < senders ? send_chunks<kAgain>(o, warp, senders)
                                     : forward_chunks<kAgain>(o, warp - senders, warps - senders, readers);
    if (__syncthreads_or(!kept)) return false;
    for (u32 node = threadIdx.x; node < nodes; node += blockDim.x) {
        if (node == o.link.place.node()) continue;
        *o.link.sent_chunks(node, o.channel) += o.link.chunks(o.layout.sent(node, o.channel));
        *o.link.received_chunks(node, o.channel) += o.link.chunks(o.layout.came(node, o.channel));
    }
    return true;
}

}  // namespace dispatch

struct DispatchInternode {
    Link link;
    Sequence* sequence;
    Failure* failure;
    u32* error;
    dispatch::Tokens from;
    dispatch::Received to;
    Layout layout;
    u64 message_bytes, timeout;
};

// Grid: an even number of blocks, all resident, 2 * channels of them in the first dispatch of a layout, which
// kAgain takes up at any number; 64 to 512 threads, at least 32 * (ranks / 32 + 1). Dynamic shared memory, in
// words: an even block's max(warps * header_words, nodes * depth), an odd one's (ranks + 1) * local_experts.
template <bool kAgain>
__global__ void __launch_bounds__(512) dispatch_internode(const __grid_constant__ DispatchInternode call) {
    extern __shared__ u32 shared[];
    const Link& link = call.link;
    const Workspace& mine = link.mine;
    const Deadline deadline{call.failure, call.timeout};
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const u32 channels = call.layout.channels, ranks = link.place.ranks();
    const u64 epoch = call.sequence->finished_epochs + 1;

    bool kept = true;
    for (u32 channel = blockIdx.x / 2; kept && channel < channels; channel += gridDim.x / 2) {
        if (blockIdx.x % 2 == 0) {
            const u32 share = (call.from.count + channels - 1) / channels;
            const u32 first = min(channel * share, call.from.count);
            const dispatch::Outbound o{link,
                                       call.from,
                                       call.layout,
                                       deadline,
                                       channel,
                                       first,
                                       min(first + share, call.from.count),
                                       epoch,
                                       call.message_bytes};
            if (threadIdx.x < link.place.gpus)
                kept = deadline.wait(mine.ack(threadIdx.x), epoch - 1, Role::kForward,
                                     link.place.node() * link.place.gpus + threadIdx.x, channel) >= epoch - 1;
            if (__syncthreads_or(!kept)) return;
            if (!kAgain) kept = dispatch::exchange_counts(o, shared);
            if (__syncthreads_or(!kept)) return;
            kept = dispatch::move_chunks<kAgain>(o, shared);
        } else if (kAgain) {
            for (u32 source = warp; kept && source < ranks; source += warps)
                kept = dispatch::receive_again(call.from, call.to, mine, source, channel, channels, epoch,
                                               deadline);
        } else {
            const u64 counted = epoch << 32;
            for (u32 source = warp; source < ranks; source += warps)
                if (lane < channels)
                    kept &= deadline.wait(mine.tail(source, lane), counted, Role::kReceive, source, lane) >=
                            counted;
            if (__syncthreads_or(!kept)) return;
            dispatch::plan(call.to, mine, channel, channels, shared, shared + ranks * mine.local_experts,
                           call.error);
            for (u32 source = warp; kept && source < ranks; source += warps)
                kept = dispatch::receive(call.from, call.to, mine, source, channel, channels, epoch,
                                         shared + source * mine.local_experts, deadline);
        }
        kept = !__syncthreads_or(!kept);
    }
    if (kept) finish(call.sequence, link, epoch);
}

}  // namespace dsv3
