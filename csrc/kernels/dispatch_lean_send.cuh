// The warp of a channel that sends, in the lean dispatch: its share of this rank's tokens, in order. It
// counts what it sends, and tells at the end.
//
// A piece of a token's row is loaded into a stage ahead of its turn, and what the lanes need of a token with
// the token before. Messages go to a node when those of kTold more tokens are under way: then they lie in
// their staging slots.
#pragma once

#include "dispatch_lean_channel.cuh"

namespace dsv3 {
namespace dispatch {

constexpr u32 kTold = 4;         // tokens between two tails
constexpr u32 kScalesAhead = 2;  // of a lane, read with the token before

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

}  // namespace dispatch
}  // namespace dsv3
