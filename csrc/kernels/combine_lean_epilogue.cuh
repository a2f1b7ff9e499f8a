// The lean combine's second launch, on all SMs, dependent on the first, combine_lean.cuh: all rows are here,
// and a token's nodes' rows and the bias are added. Its last block says that the slots are free. Where a
// block of the first launch has waited in vain it does nothing.
#pragma once

#include "combine_lean_call.cuh"

namespace dsv3 {
namespace lean {

// One warp: every `warps`th token of this rank.
__device__ __forceinline__ void bring_home(const CombineCall& call, u32 warp, u32 warps) {
    const Inbound o = call.channel(0);
    const u32 lane = threadIdx.x % 32, here = o.where.node(), nodes = o.place.link.nodes;
    for (u32 token = warp; token < call.to.tokens; token += warps) {
        i32 index = -1, slot = -1;
        if (lane < nodes) index = o.layout.sent_index[static_cast<u64>(token) * nodes + lane];
        const u32 own = __shfl_sync(kFullWarp, index, here);
        const u8* message = nullptr;
        if (index >= 0 && lane != here) message = o.place.arrived(lane, index, o.message_bytes);
        const u32 present = __ballot_sync(kFullWarp, index >= 0);
        if (lane < o.self.gpus && present >> here & 1) slot = o.layout.slots(here, own, o.self.gpus)[lane];
        combine::bring_token(o, call.to, token, present, message, slot);
    }
}

// All blocks of a rank, after the `moved` of the launch that moved the rows.
__device__ __forceinline__ void run_epilogue(const CombineCall& call, u32 block, u32 blocks, u32 moved) {
    const u32 warps = blockDim.x / 32;
    if (ptx::load_acquire_system(&call.self.sequence->finished_blocks) < moved) return;
    const u64 epoch = call.self.epoch();
    if (call.laid_out()) bring_home(call, block * warps + threadIdx.x / 32, blocks * warps);
    __syncthreads();
    const Place place{{call.self}, call.link};
    place.finish(epoch, moved + blocks);
}

}  // namespace lean

// Grid: `blocks` for each rank of the launch; the next in the stream, dependent or not. moved: num_sms of the
// first launch.
__global__ void __launch_bounds__(384, 1)
    combine_lean_epilogue(const __grid_constant__ PerRank<lean::CombineCall> calls, u32 blocks, u32 moved) {
    ptx::grid_dependency_wait();
    lean::run_epilogue(calls.of[blockIdx.x / blocks], blockIdx.x % blocks, blocks, moved);
}

}  // namespace dsv3
