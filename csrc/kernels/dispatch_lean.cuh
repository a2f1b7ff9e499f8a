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
#pragma once

#include "dispatch_lean_send.cuh"

namespace dsv3 {
namespace dispatch {

constexpr u32 kForeign = 8;  // in a Form: of rows that the forwarder has not touched, its own are otherwise

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
