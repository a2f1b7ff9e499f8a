// What the two launches of the lean combine get. combine_lean.cuh says what they do.
#pragma once

#include "combine_internode_node.cuh"
#include "lean.cuh"

namespace dsv3 {
namespace lean {

using combine::Experts;
using combine::HomeTokens;

// One channel of one call.
struct Inbound : combine::Channel {
    Place place;

    // The node that a warp serves in its i-th turn; the last one is this.
    __device__ __forceinline__ u32 node_of_turn(u32 i) const {
        return (where.node() + 1 + i) % place.link.nodes;
    }
};

struct CombineCall {
    Rank self;
    Link link;
    Experts from;
    HomeTokens to;
    Layout layout;
    u32 hidden, topk;
    u64 message_bytes;

    __device__ __forceinline__ Inbound channel(u32 index) const {
        return {
            {self, {self}, layout, hidden, topk, index, self.epoch(), message_bytes, to.gradients != nullptr},
            {{self}, link}};
    }
    __device__ __forceinline__ bool laid_out() const { return from.ranges[1] != kNothing; }
};

}  // namespace lean
}  // namespace dsv3
