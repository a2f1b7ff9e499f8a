// The first half of dispatch across nodes: the counts of a channel go to every node, and from its forwarder
// to the GPUs there, before any token. A cached handle skips it.
//
// What goes to another node is a header, in the ring's slot for headers; what a header says lands in the same
// words as a source's announcement within one node, so that the receivers work as there. What the forwarder
// and the sender need of it stays in the layout.
#pragma once

#include "dispatch_layout.cuh"
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

// One warp: a header over InfiniBand; of a layout that is used again the form alone.
__device__ __forceinline__ bool send_header(const Outbound& o, u32 node, const u32* words, u32 size) {
    const Ring here = o.link.rings.at(node, o.channel), there = o.link.rings.at(o.place.node(), o.channel);
    const u32 like = o.place.like(node);
    const u64 before = *o.headers();
    if (o.self.wait_warp(here.header_free(), before, Role::kSend, like, o.channel) < before) return false;
    for (u32 i = threadIdx.x % 32; i < size; i += 32) here.header_out[i] = words[i];
    __syncwarp();
    transport::put_signal_warp(reinterpret_cast<u8*>(there.header_in), reinterpret_cast<u8*>(here.header_out),
                               4 * size, there.header_ready(), before + 1, like,
                               o.link.queue_pairs[o.channel]);
    return true;
}

// One lane that has read, or knows that others have read, all of a header.
__device__ __forceinline__ void free_header(const Outbound& o, u32 node, u64 number) {
    transport::signal(o.link.rings.at(o.place.node(), o.channel).header_free(), number, o.place.like(node),
                      o.link.queue_pairs[o.channel]);
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
        else if (!send_header(o, node, header.words, header.size()))
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
        if (threadIdx.x % 32 == 0) free_header(o, node, number);
    }
    return true;
}

// One warp, in place of counts where a layout is used again: what form a node's rank has, to a GPU here,
// ahead of its rows. `readers`, shared memory: how many GPUs' warps have read a node's header.
__device__ __forceinline__ bool pass_form(const Outbound& o, u32 node, u32 gpu, u32* readers) {
    const u32 lane = threadIdx.x % 32, source = o.place.like(node);
    u32 form = o.tokens.form;
    if (node != o.place.node()) {
        const Ring here = o.link.rings.at(node, o.channel);
        const u64 number = *o.headers() + 1;
        if (o.self.wait_warp(here.header_ready(), number, Role::kForward, source, o.channel) < number)
            return false;
        form = here.header_in[0];
        __syncwarp();
        if (lane == 0 && ptx::fetch_add_block(readers + node, 1) + 1 == o.self.gpus)
            free_header(o, node, number);
    }
    const Workspace theirs = o.place.peer(gpu);
    if (lane == 0) theirs.announcement(source, o.channel)->form = form;
    publish(theirs.tail(source, o.channel), o.epoch << 32);
    return true;
}

}  // namespace dispatch
}  // namespace dsv3
