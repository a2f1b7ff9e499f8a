// Dispatch across nodes on few SMs, first launch: every token over InfiniBand once to each node that holds
// one of its experts, from there over NVLink once to each rank that does. lean.cuh has the protocol,
// dispatch_lean_epilogue.cuh the second launch, which puts in order what came.
//
// A channel is two warps. One sends its share of this rank's tokens: a row comes into shared memory by a bulk
// copy, routing and scales are written around it, and bulk copies bring the whole to the slots of the GPUs of
// this node that want it and to the staging slot of each other node that does. The other forwards what comes
// for this node from the ranks of this GPU number, unchanged. Rows are counted while they are sent, so counts
// come last; then the channel's senders watch until all that this rank receives in their channels is here.
//
// Bytes: a token: row + scales + 16 K read; a (token, other node): message written to the staging slot and
// over InfiniBand, and read there; a (token, rank): message written over NVLink.
#pragma once

#include "bulk.cuh"
#include "dispatch_layout.cuh"
#include "lean.cuh"

namespace dsv3 {
namespace dispatch {

constexpr u32 kTold = 4;         // tokens between two tails
constexpr u32 kScalesAhead = 2;  // of a lane, read with the token before
constexpr u32 kForeign = 8;  // in a Form: of rows that the forwarder has not touched, its own are otherwise

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

// What a lane reads of a token ahead of its row: choice `lane`, or expert -1.
struct Ahead {
    i64 expert = -1;
    float weight = 0.0f, scales[kScalesAhead] = {};

    template <bool kAgain>
    __device__ __forceinline__ void read(const Tokens& tokens, u32 token) {
        const u32 lane = threadIdx.x % 32;
        if (!kAgain && lane < tokens.topk) {
            const u64 at = static_cast<u64>(token) * tokens.topk + lane;
            expert = tokens.topk_idx[at];
            if (tokens.topk_weights) weight = tokens.topk_weights[at];
        }
#pragma unroll
        for (u32 i = 0; i < kScalesAhead; ++i)
            if (32 * i + lane < tokens.tiles) scales[i] = scale(tokens, token, 32 * i + lane);
    }
    __device__ __forceinline__ static float scale(const Tokens& tokens, u32 token, u32 tile) {
        return tokens.scales[token * tokens.scale_row_stride + tile * tokens.scale_tile_stride];
    }
};

// One warp: what is around the row in a piece. Whether anything was.
template <bool kAgain>
__device__ __forceinline__ bool fill(const Lean& o, const Cursor& at, u32 end, const Ahead& ahead,
                                     u8* stage) {
    const u32 lane = threadIdx.x % 32, rows_end = o.message.routing_bytes + o.tokens.row_bytes;
    float* const words = reinterpret_cast<float*>(stage);
    const bool routing = !kAgain && at.begin == 0, scales = end > rows_end;
    if (routing && lane < o.message.routing_bytes / 8) {
        words[2 * lane] = __int_as_float(static_cast<i32>(ahead.expert));
        words[2 * lane + 1] = ahead.weight;
    }
    for (u32 i = 0; scales && 32 * i < (o.message.bytes - rows_end) / 4; ++i) {
        const u32 tile = 32 * i + lane, byte = rows_end + 4 * tile;
        if (byte < at.begin || byte >= end) continue;
        float scale = 0.0f;
        if (i < kScalesAhead)
            scale = ahead.scales[i];
        else if (tile < o.tokens.tiles)
            scale = Ahead::scale(o.tokens, at.item, tile);
        words[(byte - at.begin) / 4] = scale;
    }
    return routing || scales;
}

// What a channel sends, as its warp counts it. Shared memory: see words_of_pair.
struct Counted {
    u32 *experts, *tokens, *rows;  // [experts], [ranks], [ranks]
    u32 bad = ~0u;                 // lane k: the first choice k that is out of range, or in its row already

    // One warp: a token's choices, of which wrong ones count as none.
    __device__ __forceinline__ void add(const Lean& o, u32 token, i64& expert) {
        const u32 lane = threadIdx.x % 32;
        bool wrong = expert < -1 || expert >= o.experts();
        const u32 same = __match_any_sync(kFullWarp, expert);
        wrong |= expert >= 0 && (same & ((1u << lane) - 1)) != 0;
        if (wrong) bad = min(bad, token * o.tokens.topk + lane);
        if (wrong) expert = -1;
        const u32 rank = expert < 0 ? ~0u : static_cast<u32>(expert) / o.self.local_experts;
        const u32 first = __ffs(__match_any_sync(kFullWarp, rank)) - 1;
        if (expert >= 0) {
            ++experts[expert];
            if (lane == first) ++tokens[rank];
        }
        __syncwarp();
    }

    // One warp, at the end: rows, and what is said of the channel.
    __device__ __forceinline__ Announcement finish(const Lean& o, u32 first) {
        const u32 lane = threadIdx.x % 32, local = o.self.local_experts;
        for (u32 rank = lane; rank < o.self.ranks; rank += 32) {
            u32 choices = 0;
            for (u32 e = 0; e < local; ++e) choices += experts[rank * local + e];
            rows[rank] = o.tokens.form & kTokenOrder ? tokens[rank] : choices;
        }
        const u32 wrong = __reduce_min_sync(kFullWarp, bad);
        const u64 value = wrong == ~0u ? 0 : o.tokens.topk_idx[wrong];
        __syncwarp();
        return {0,
                first,
                o.tokens.form,
                o.call.to.max_rows,
                wrong + 1,
                {static_cast<u32>(value), static_cast<u32>(value >> 32)}};
    }

    // What of it a node is told.
    __device__ __forceinline__ Told of(const Lean& o, u32 node, Announcement said, u32 messages) const {
        const u32 rank = node * o.self.gpus;
        said.tokens = messages;
        return {experts + rank * o.self.local_experts, tokens + rank, rows, said};
    }
};

// One warp: counts over InfiniBand, and the channel's last tail.
__device__ __forceinline__ void send_header(const Lean& o, u32 node, const Told& told) {
    const u32 lane = threadIdx.x % 32, gpus = o.self.gpus, width = gpus * o.self.local_experts;
    u32* header = o.place.header_staged(node, o.channel);
    for (u32 i = lane; i < width; i += 32) header[i] = told.counts[i];
    for (u32 i = lane; i < gpus; i += 32) header[width + i] = told.tokens[i];
    for (u32 i = lane; i < o.self.ranks; i += 32) header[width + gpus + i] = told.rows[i];
    if (lane == 0) *reinterpret_cast<Announcement*>(header + width + gpus + o.self.ranks) = told.said;
    o.place.send_header(node, o.channel, o.tail(told.said.tokens) | lean::kFinished);
}

// One warp, lane t: the address where the next token goes in stream t, or null: of the GPUs of this node,
// then of all nodes. count: what the stream has so far. The node's own stream counts, and has no address.
template <bool kAgain>
__device__ __forceinline__ u8* route(const Lean& o, Share share, u32 token, i64 expert, u32& count) {
    const u32 lane = threadIdx.x % 32, gpus = o.self.gpus, own = o.place.node(), node = lane - gpus;
    const bool is_node = lane >= gpus && node < o.place.link.nodes;
    i32* sent = o.layout.sent_index + static_cast<u64>(token) * o.place.link.nodes + node;
    i32 index = -1;
    if (!kAgain) {
        u32 bits = 0;
        if (expert >= 0) {
            const u32 rank = static_cast<u32>(expert) / o.self.local_experts, on = rank / gpus;
            bits = 1u << (gpus + on) | (on == own ? 1u << rank % gpus : 0);
        }
        if (__reduce_or_sync(kFullWarp, bits) >> lane & 1) index = share.first + count++;
        if (is_node) {
            *sent = index;
            if (index >= 0)
                o.layout.sent_tokens[static_cast<u64>(node) * o.layout.max_tokens + index] = token;
        }
    } else if (is_node) {
        index = *sent;
        count += index >= 0;
    }
    const i32 here = __shfl_sync(kFullWarp, index, gpus + own);
    if (lane < gpus && here >= 0) {
        i32* slot = o.layout.slots(own, here, gpus) + lane;
        if (kAgain) {
            index = *slot;
            count += index >= 0;
        } else {
            *slot = index;
        }
    }
    if (index < 0 || node == own) return nullptr;
    return is_node ? o.place.staged(node, index, o.message.bytes)
                   : o.place.peer(lane).slot(o.self.rank, index);
}

// The warp that sends.
template <bool kAgain>
__device__ __forceinline__ bool send(const Lean& o, bulk::Ring& ring, u32* words) {
    const Message& m = o.message;
    const u32 lane = threadIdx.x % 32, gpus = o.self.gpus, own = o.place.node(), node = lane - gpus;
    const bool is_node = lane >= gpus && node < o.place.link.nodes, far = is_node && node != own;
    const Share share(o.tokens.count, o.channel, o.layout.channels);
    Counted counted{words, words + o.experts(), words + o.experts() + o.self.ranks};
    for (u32 i = lane; i < o.experts() + o.self.ranks; i += 32) words[i] = 0;
    if (!kAgain) forget(o.call, o.channel, {lane, 32});
    if (!may_write(o, true)) return false;
    if (far) o.place.tell_first(node, o.channel, o.opening(share.first));
    __syncwarp();

    u32 count = 0, stored = 0, told = 0;  // lane t: of stream t; its messages so far, in place, announced
    const auto announce = [&] {
        for (u32 left = __ballot_sync(kFullWarp, far && stored > told); left; left &= left - 1) {
            const u32 who = __ffs(left) - 1, from = __shfl_sync(kFullWarp, told, who);
            const u32 to = __shfl_sync(kFullWarp, stored, who);
            o.place.send(who - gpus, o.channel, share.first + from, to - from, m.bytes, o.tail(to));
        }
        told = stored;
    };
    Cursor next{share.first};
    const auto load = [&] {
        if (next.item >= share.last) return;
        const u32 begin = max(next.begin, m.routing_bytes);
        const u32 end = min(next.end(m), m.routing_bytes + o.tokens.row_bytes);
        const u8* row = o.tokens.data + static_cast<u64>(next.item) * o.tokens.row_bytes;
        ring.load(row + (begin - m.routing_bytes), end > begin ? end - begin : 0, begin - next.begin);
        next.advance(m);
    };
    for (u32 s = 1; s < ring.stages(); ++s) load();
    Ahead ahead, after;
    if (share.first < share.last) ahead.template read<kAgain>(o.tokens, share.first);
    for (u32 token = share.first; token < share.last; ++token, ahead = after) {
        if (token + 1 < share.last) after.template read<kAgain>(o.tokens, token + 1);
        if (!kAgain) counted.add(o, token, ahead.expert);
        u8* const target = route<kAgain>(o, share, token, ahead.expert, count);
        for (Cursor at{token}; at.item == token; at.advance(m)) {
            const u32 end = at.end(m);
            u8* const stage = ring.wait();
            if (fill<kAgain>(o, at, end, ahead, stage)) bulk::lanes_done();
            spread(at, end, stage, target, load);
        }
        if ((token - share.first) % kTold != kTold - 1) continue;
        bulk::stores_done<kTold>();  // a group a piece: all before these kTold tokens
        announce();
        stored = count;
    }
    bulk::stores_done();
    stored = count;
    announce();

    if (kAgain) {
        tell_form(o, own, o.tokens.form);
        if (far) o.place.tell_tail(node, o.channel, o.tail(count) | lean::kFinished);
    } else {
        if (is_node) o.layout.sent_counts[o.stream(node)] = count;
        const Announcement said = counted.finish(o, share.first);
        for (u32 n = 0; n < o.place.link.nodes; ++n) {
            const Told of_node = counted.of(o, n, said, __shfl_sync(kFullWarp, count, gpus + n));
            if (n == own)
                tell(o, n, of_node);
            else
                send_header(o, n, of_node);
        }
    }
    __syncwarp();
    if (lane < gpus) {
        close(o, own, lane, count);
        o.self.add_sent(o.place.near(lane), o.channel, count * static_cast<u64>(m.bytes));
    }
    return true;
}

// One warp, lane g: where a message that lies in a stage goes on GPU g, or null. taken: of its stream.
template <bool kAgain>
__device__ __forceinline__ u8* route_on(const Lean& o, u32 node, u32 first, u32 index, const u8* stage,
                                        u32& taken) {
    const u32 lane = threadIdx.x % 32, gpus = o.self.gpus;
    u32 bits = 0;
    if (!kAgain && lane < o.tokens.topk) {
        const u32 expert = __float_as_int(reinterpret_cast<const float*>(stage)[2 * lane]);
        const u32 gpu = expert / o.self.local_experts - o.self.first_of_node();
        if (gpu < gpus) bits = 1u << gpu;
    }
    if (!kAgain) bits = __reduce_or_sync(kFullWarp, bits);
    if (lane >= gpus) return nullptr;
    i32* slot = o.layout.slots(node, first + index, gpus) + lane;
    if (!kAgain) *slot = bits >> lane & 1 ? static_cast<i32>(first + taken) : -1;
    if (*slot < 0) return nullptr;
    ++taken;
    return o.place.peer(lane).slot(o.place.like(node), *slot);
}

// One warp: messages [begin, end) of a node to the GPUs here. taken: [ranks], shared memory.
template <bool kAgain>
__device__ __forceinline__ void forward_messages(const Lean& o, bulk::Ring& ring, u32 node, u32 first,
                                                 u32 begin, u32 end, u32* taken) {
    const Message& m = o.message;
    u32* mine = taken + node * o.self.gpus + threadIdx.x % 32;
    Cursor next{begin};
    const auto load = [&] {
        if (next.item >= end) return;
        ring.load(o.place.arrived(node, first + next.item, m.bytes) + next.begin, next.end(m) - next.begin);
        next.advance(m);
    };
    bulk::stores_read();  // of the messages before
    for (u32 s = 1; s < ring.stages(); ++s) load();
    u32 count = threadIdx.x % 32 < o.self.gpus ? *mine : 0;
    for (u32 i = begin; i < end; ++i) {
        u8* target = nullptr;
        for (Cursor at{i}; at.item == i; at.advance(m)) {
            const u32 piece_end = at.end(m);
            const u8* stage = ring.wait();
            if (at.begin == 0) target = route_on<kAgain>(o, node, first, i, stage, count);
            spread(at, piece_end, stage, target, load);
        }
    }
    if (threadIdx.x % 32 < o.self.gpus) *mine = count;
}

// The warp that forwards. Lane n: what comes from node n.
template <bool kAgain>
__device__ __forceinline__ bool forward(const Lean& o, bulk::Ring& ring, u32* taken) {
    const u32 lane = threadIdx.x % 32, nodes = o.place.link.nodes, gpus = o.self.gpus;
    __syncwarp();  // of the channel before, all have read it
    for (u32 i = lane; i < o.self.ranks; i += 32) taken[i] = 0;
    if (!may_write(o, false)) return false;
    bool open = lane < nodes && lane != o.place.node();
    u32 done = 0;
    Patience patience;
    while (__any_sync(kFullWarp, open)) {
        u64 seen = 0;
        if (open) seen = ptx::load_acquire_system(o.place.tail(lane, o.channel));
        const bool told = open && seen >> 32 == o.epoch, finished = told && seen & lean::kFinished;
        const u32 came = told ? static_cast<u32>(seen & (lean::kFinished - 1)) : 0;
        bool kept;
        u32 left = patience.look(o.self, finished || came > done, open, o.tail(done + 1), seen,
                                 o.place.like(open ? lane : 0), o.channel, kept);
        if (!kept) return false;
        if (left) bulk::acquired();
        for (; left; left &= left - 1) {
            const u32 node = __ffs(left) - 1, begin = __shfl_sync(kFullWarp, done, node);
            const u64 opening = o.place.opened(node, o.channel);
            const u32 first = static_cast<u32>(opening) & ((1u << 29) - 1);
            const bool alike = opening == o.opening(first);  // else nobody takes these rows
            if (alike)
                forward_messages<kAgain>(o, ring, node, first, begin, __shfl_sync(kFullWarp, came, node),
                                         taken);
            if (lane == node) done = came, open = !finished;
            if (!__shfl_sync(kFullWarp, finished, node)) continue;
            if (kAgain)
                tell_form(o, node, static_cast<u32>(opening) >> 29 | (alike ? 0 : kForeign));
            else
                tell(o, node, read_header(o, o.place.header(node, o.channel)));
        }
    }
    bulk::stores_done();
    u64 sent = 0;
    for (u32 stream = lane; stream < o.self.ranks; stream += 32)
        if (stream / gpus != o.place.node()) close(o, stream / gpus, stream % gpus, taken[stream]);
    for (u32 node = 0; lane < gpus && node < nodes; ++node) sent += taken[node * gpus + lane];
    if (lane < gpus) o.self.add_sent(o.place.near(lane), o.channel, sent * o.message.bytes);
    return true;
}

// One warp, which has sent: until all that this rank receives in the channel is here, so that the launch
// after this one waits for nobody.
__device__ __forceinline__ bool watch(const Lean& o) {
    const Workspace mine = o.self.mine();
    const u64 expected = o.tail(0);
    bool came = true;
    for (u32 source = threadIdx.x % 32; source < o.self.ranks; source += 32)
        came &= o.self.wait(mine.tail(source, o.channel), expected, Role::kReceive, o.self.writer(source),
                            o.channel) >= expected;
    return __all_sync(kFullWarp, came);
}

// Of shared memory, behind the stages. python: dsv3_kernels.ep.lean_dispatch
__device__ __forceinline__ u32 words_of_pair(const Rank& self) {
    return self.ranks * self.local_experts + 3 * self.ranks;
}

// All blocks of a rank; `block` is this one.
template <bool kAgain>
__device__ __forceinline__ void run(const LeanCall& all, u32 block, u32 blocks, Pieces pieces, u8* shared) {
    const Rank& self = all.call.self;
    const Message m{all.message_bytes, all.routing_bytes, pieces};
    const u32 warp = threadIdx.x / 32, pairs = blockDim.x / 64, pair = warp / 2;
    const bool sends = warp % 2 == 0, go = !kAgain || all.call.to.ranges[1] != kNothing;
    const u64 epoch = self.epoch();
    bulk::Ring ring(shared + warp * pieces.bytes_of_warp(), pieces.stages, pieces.bytes);
    u32* words =
        reinterpret_cast<u32*>(shared + 2 * pairs * pieces.bytes_of_warp()) + pair * words_of_pair(self);
    u32* taken = words + words_of_pair(self) - self.ranks;
    bool kept = true;
    for (u32 round = 0; round < 2; ++round)  // what has been sent in all channels is watched in all
        for (u32 channel = block * pairs + pair; go && kept && channel < all.layout.channels;
             channel += blocks * pairs) {
            const Lean o{all.call, self, all.call.from, {{self}, all.link}, all.layout, m, channel, epoch};
            if (round == 0)
                kept = sends ? send<kAgain>(o, ring, words) : forward<kAgain>(o, ring, taken);
            else if (sends)
                kept = watch(o);
        }
    if (__syncthreads_or(!kept)) return;
    ptx::launch_dependents();
    if (threadIdx.x != 0 || ptx::fetch_add_device(&self.sequence->finished_blocks, 1) + 1 != blocks) return;
    lean::Place{{self}, all.link}.acknowledge(epoch);
}

}  // namespace dispatch

// Grid: num_sms blocks for each rank of the launch, all resident; 64 threads a channel, as many channels as
// there are in the first dispatch of a layout, which kAgain takes up at any number. Dynamic shared memory:
// a warp's stages, then 4 * words_of_pair bytes a channel. row_bytes is a multiple of 16, topk at most 32,
// GPUs and nodes together at most 24.
template <bool kAgain>
__global__ void __launch_bounds__(512, 1)
    dispatch_lean(const __grid_constant__ PerRank<dispatch::LeanCall> calls, u32 num_sms, u32 piece_bytes,
                  u32 stages) {
    extern __shared__ __align__(128) u8 shared[];
    dispatch::run<kAgain>(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms,
                          {piece_bytes, stages}, shared);
}

}  // namespace dsv3
