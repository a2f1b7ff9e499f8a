// Combine within a node: what the experts of a token returned, added up on each rank and then on the token's
// own.
//
// The streams are those of the dispatch, backwards: what came from rank s in its channel i goes back there in
// channel i, a token in the slot it had. A team that sends adds the rows of each token (a warp for each home
// rank) to one BF16 row; one that receives waits for a token's ranks and adds them. All sums start at +0 and
// run in FP32, experts ascending, then ranks ascending, each rounded to BF16: bits do not depend on the
// timing. The protocol is in channel.cuh; no counts travel, for the dispatch has told them.
//
// Bytes: a (token, expert): a row read; a (token, rank): a row written over NVLink and read; a token: a row
// written.
#pragma once

#include "bulk.cuh"
#include "channel.cuh"
#include "sums.cuh"

namespace dsv3 {
namespace combine {

constexpr u32 kChunk = 4;  // tokens that a tail announces at a time

// What the experts of this rank returned.
struct Rows {
    const u8* y;             // BF16 [rows, hidden]
    const float* weights;    // [rows], or null
    const float* gradients;  // [rows], in token order [rows, topk], or null: travel home as they are
    const i32* rows;         // [ranks, max_tokens, topk], by ascending expert, then -1
    const i32* ranges;       // [ranks, channels, 2]
};

// The tokens of this rank, and where each one went.
struct Home {
    const i64* topk_idx;   // [tokens, topk]
    const i32* sent_slot;  // [tokens, ranks], or -1
    const u8* bias;        // BF16 [tokens, hidden], or null
    u8* out;               // BF16 [tokens, hidden]
    float* gradients;      // [tokens, topk], or null
};

struct Call {
    Rank self;
    Rows from;
    Home to;
    u32 tokens, hidden, topk, channels, token_order;
};

// The rows that make one token's sum: one of each lane in `lanes`, in their order.
struct Addends {
    const u8* row;
    float weight;
    u32 lanes;
};

// One warp: tokens one after another, whose rows come piece by piece through a ring of stages. While a piece
// is added those after it are under way, to the end of the token that comes next.
class Stream {
  public:
    __device__ __forceinline__ Stream(bulk::Ring& ring, u32 row_bytes) : ring_(ring), row_bytes_(row_bytes) {}

    // The token that was pushed before is the one to add now; `next` comes behind it.
    __device__ __forceinline__ void push(const Addends& next) {
        if (waits_) load_next();
        now_ = next_;
        next_ = next;
        waits_ = true;
    }

    // Of the token's next piece, where so many bytes of a row are left.
    __device__ __forceinline__ Sums sum(u32 left, bool weighted) {
        Sums sums;
        for (u32 lanes = now_.lanes; lanes; lanes &= lanes - 1) {
            load_ahead();
            const u8* piece = ring_.wait();
            --under_way_;
            const float weight = __shfl_sync(kFullWarp, now_.weight, __ffs(lanes) - 1);
            if (left < kPieceBytes)
                sums.add_shared(piece, weight, left);
            else if (weighted)
                sums.add_shared(piece, weight, true);
            else
                sums.add_shared(piece, weight, false);
        }
        return sums;
    }

    // Until nothing more comes to shared memory.
    __device__ __forceinline__ void drain() {
        for (; under_way_; --under_way_) ring_.wait();
    }

  private:
    __device__ __forceinline__ void load_next() {
        waits_ = false;
        row_ = next_.row;
        lanes_ = left_ = next_.lanes;
        at_ = 0;
    }

    __device__ __forceinline__ void load_ahead() {
        while (under_way_ < ring_.stages()) {
            if (!left_) {
                if (!waits_) return;
                load_next();
                continue;
            }
            const u64 row = __shfl_sync(kFullWarp, reinterpret_cast<u64>(row_), __ffs(left_) - 1);
            ring_.load(reinterpret_cast<const u8*>(row) + at_, min(kPieceBytes, row_bytes_ - at_));
            ++under_way_;
            left_ &= left_ - 1;
            if (left_) continue;
            at_ += kPieceBytes;
            if (at_ < row_bytes_) left_ = lanes_;
        }
    }

    bulk::Ring& ring_;
    const u32 row_bytes_;
    Addends now_{}, next_{};
    bool waits_ = false;  // next_, for those before it
    // Being loaded: a token, the place of a piece in its rows, and the lanes whose piece is still to come.
    const u8* row_ = nullptr;
    u32 lanes_ = 0, at_ = 0, left_ = 0;
    u32 under_way_ = 0;  // pieces
};

// One warp: the tokens of one home rank's channel.
__device__ __forceinline__ bool send(const Call& call, bulk::Ring& ring, u32 peer, u32 channel, u64 epoch) {
    const Rank& self = call.self;
    const Rows& from = call.from;
    const Workspace home = self.workspace(peer);
    const u32 lane = threadIdx.x % 32, row_bytes = 2 * call.hidden, topk = call.topk;
    const u32 first = from.ranges[2 * (peer * call.channels + channel)];
    const u32 total = from.ranges[2 * (peer * call.channels + channel) + 1];
    if (total == kNothing) return true;
    const u64* ack = self.mine().ack(peer);
    if (self.wait_warp(ack, epoch - 1, Role::kSend, peer, channel) < epoch - 1) return false;
    u64 bytes = 0;
    Stream stream(ring, row_bytes);
    i32 row = -1, next_row = -1;
    // Lane k: the k-th row of token i.
    auto push = [&](u32 i) {
        row = next_row;
        next_row = -1;
        if (i < total && lane < topk)
            next_row = from.rows[(static_cast<i64>(peer) * self.max_tokens + first + i) * topk + lane];
        stream.push({from.y + static_cast<i64>(next_row) * row_bytes,
                     from.weights && next_row >= 0 ? from.weights[next_row] : 1.0f,
                     __ballot_sync(kFullWarp, next_row >= 0)});
    };
    push(0);
    for (u32 i = 0; i < total; ++i) {
        push(i + 1);
        u8* slot = home.slot(self.rank, first + i);
        for (u32 at = 0; at < row_bytes; at += kPieceBytes) {
            const u32 left = row_bytes - at;
            stream.sum(left, from.weights != nullptr).rounded().store(slot + at, left);
        }
        if (from.gradients) {
            const i64 only = __shfl_sync(kFullWarp, row, 0);
            const i64 at = call.token_order && lane < topk ? only * topk + lane : row;
            if (at >= 0) reinterpret_cast<float*>(slot + row_bytes)[lane] = from.gradients[at];
            bytes += 4 * __popc(__ballot_sync(kFullWarp, at >= 0));
        }
        bytes += row_bytes;
        if ((i + 1) % kChunk == 0 || i + 1 == total)
            publish(home.tail(self.rank, channel), epoch << 32 | (i + 1));
    }
    self.count_sent(peer, channel, bytes);
    return true;
}

// Lane k: the gradient of choice k. In its rank's slot it stands at k in token order, in expert order behind
// those of lower experts there.
__device__ __forceinline__ void bring_gradients(const Call& call, const Workspace& mine, u32 token) {
    const u32 lane = threadIdx.x % 32, topk = call.topk;
    const i64 at = static_cast<i64>(token) * topk + lane;
    i32 expert = -1;
    if (lane < topk) expert = static_cast<i32>(call.to.topk_idx[at]);
    const u32 rank = max(expert, 0) / mine.local_experts;
    const i32 first = rank * mine.local_experts;
    u32 place = 0;
    for (u32 k = 0; k < topk; ++k) {
        const i32 other = __shfl_sync(kFullWarp, expert, k);
        place += other >= first && other < expert;
    }
    if (lane >= topk) return;
    float value = 0.0f;
    if (expert >= 0) {
        const u8* slot = mine.slot(rank, call.to.sent_slot[static_cast<i64>(token) * mine.ranks + rank]);
        value = reinterpret_cast<const float*>(slot + 2 * call.hidden)[call.token_order ? lane : place];
    }
    call.to.gradients[at] = value;
}

// One warp: every `stride`th token of a channel.
__device__ __forceinline__ bool receive(const Call& call, bulk::Ring& ring, u32 channel, u32 offset,
                                        u32 stride, u64 epoch) {
    const Rank& self = call.self;
    const Home& to = call.to;
    const Workspace mine = self.mine();
    const u32 lane = threadIdx.x % 32, row_bytes = 2 * call.hidden;
    const Share share(call.tokens, channel, call.channels);
    Stream stream(ring, row_bytes);
    // Lane r: the token's sum of rank r, once it has come.
    auto push = [&](u32 token) {
        i32 slot = -1;
        if (token < share.last && lane < mine.ranks)
            slot = to.sent_slot[static_cast<i64>(token) * mine.ranks + lane];
        bool arrived = true;
        if (slot >= 0) {
            const u64 expected = epoch << 32 | (slot - share.first + 1);
            arrived =
                self.wait(mine.tail(lane, channel), expected, Role::kReceive, lane, channel) >= expected;
        }
        if (!__all_sync(kFullWarp, arrived)) return false;
        __syncwarp();
        bulk::acquired();
        stream.push({mine.slot(lane, slot), 1.0f, __ballot_sync(kFullWarp, slot >= 0)});
        return true;
    };
    bool arrived = push(share.first + offset);
    for (u32 token = share.first + offset; arrived && token < share.last; token += stride) {
        arrived = push(token + stride);
        if (!arrived) break;
        const u64 start = static_cast<u64>(token) * row_bytes;
        for (u32 at = 0; at < row_bytes; at += kPieceBytes) {
            // The sum of the node, which here is the only one.
            Piece piece = stream.sum(row_bytes - at, false).rounded();
            if (to.bias) {
                Sums total;
                total.add(piece, 1.0f, false);
                piece.load<true>(to.bias + start + at, row_bytes - at);
                total.add(piece, 1.0f, false);
                piece = total.rounded();
            }
            piece.store(to.out + start + at, row_bytes - at);
        }
        if (to.gradients) bring_gradients(call, mine, token);
    }
    stream.drain();
    return arrived;
}

// Of shared memory, for each warp. python: dsv3_kernels.ep.kernels.COMBINE_STAGES
constexpr u32 kStages = 4;

// All blocks of a rank; `block` is this one.
__device__ __forceinline__ void run(const Call& call, u32 block, u32 blocks, u8* shared) {
    const u32 ranks = call.self.ranks, teams = blockDim.x / (32 * ranks);  // as in dispatch.cuh
    const u32 warp = threadIdx.x / 32 % ranks, number = threadIdx.x / (32 * ranks);
    const u32 first = block / 2 * teams + number;
    const u64 epoch = call.self.epoch();
    const bool laid_out = call.from.ranges[1] != kNothing;
    constexpr u32 kRoom = kStages * (kPieceBytes + bulk::Ring::kBarrierBytes);
    u8* stages = shared + threadIdx.x / 32 * kRoom;
    bulk::Ring ring(stages, kStages, kPieceBytes);
    bool kept = true;
    for (u32 channel = first; laid_out && kept && channel < call.channels; channel += blocks / 2 * teams)
        kept = sends(block, number, ranks) ? send(call, ring, warp, channel, epoch)
                                           : receive(call, ring, channel, warp, ranks, epoch);
    if (!__syncthreads_or(!kept)) finish(call.self, epoch, blocks);
}

}  // namespace combine

// Grid: num_sms blocks for each rank of the launch, num_sms even, all resident; 32 * ranks threads a
// team. `channels` is that of the dispatch; teams take them in turn. hidden is a multiple of 8, topk at
// most 32.
__global__ void __launch_bounds__(512, 1)
    combine_tokens(const __grid_constant__ PerRank<combine::Call> calls, u32 num_sms) {
    extern __shared__ __align__(16) u8 stages[];
    combine::run(calls.of[blockIdx.x / num_sms], blockIdx.x % num_sms, num_sms, stages);
}

}  // namespace dsv3
