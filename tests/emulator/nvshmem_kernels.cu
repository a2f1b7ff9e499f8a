// What NVSHMEM's headers make of its device functions, one small program each; see test_nvshmem.py.
// Ranks send to their right neighbour, r + 1, so that in a cluster of 2 x 2 some neighbours share a node and some do not.

#include <nvshmem.h>
#include <nvshmemx.h>

constexpr int kWords = 64;  // ints that a rank sends at a time
enum Form { kThread, kWarp, kBlock, kBlockingThread, kBlockingWarp, kBlockingBlock };

__device__ int next_rank() { return (nvshmem_my_pe() + 1) % nvshmem_n_pes(); }

__device__ void fill(int* source, int round) {
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) source[i] = nvshmem_my_pe() * 1000 + round * 100 + i;
    __syncthreads();
}

__device__ void put_signal(int form, int* to, const int* from, uint64_t* signal, uint64_t value, int qp) {
    int next = next_rank();
    switch (form) {
        case kThread:
            if (threadIdx.x == 0) nvshmemx_qp_int_put_signal_nbi(to, from, kWords, signal, value, NVSHMEM_SIGNAL_SET, next, qp);
            break;
        case kWarp:
            if (threadIdx.x < 32) nvshmemx_qp_int_put_signal_nbi_warp(to, from, kWords, signal, value, NVSHMEM_SIGNAL_SET, next, qp);
            break;
        case kBlock: nvshmemx_qp_int_put_signal_nbi_block(to, from, kWords, signal, 1, NVSHMEM_SIGNAL_ADD, next, qp); break;
        case kBlockingThread:
            if (threadIdx.x == 0) nvshmem_int_put_signal(to, from, kWords, signal, value, NVSHMEM_SIGNAL_SET, next);
            break;
        case kBlockingWarp:
            if (threadIdx.x < 32) nvshmemx_int_put_signal_warp(to, from, kWords, signal, value, NVSHMEM_SIGNAL_SET, next);
            break;
        default: nvshmemx_int_put_signal_block(to, from, kWords, signal, 1, NVSHMEM_SIGNAL_ADD, next); break;
    }
}

// One signal counts the rounds on one queue pair. On the default one, which is several, each round has its own: there a
// signal says nothing of an earlier round's data.
extern "C" __global__ void ring(int* data, int* source, uint64_t* signals, int* out, int rounds, int form) {
    for (int round = 0; round < rounds; round++) {
        int at = kWords * round;
        bool counts = form <= kBlock;
        uint64_t *signal = counts ? signals : signals + round, value = counts ? round + 1 : 1;
        fill(source + at, round);
        put_signal(form, data + at, source + at, signal, value, 2);
        if (threadIdx.x == 0) nvshmem_signal_wait_until(signal, NVSHMEM_CMP_GE, value);
        __syncthreads();
        for (int i = threadIdx.x; i < kWords; i += blockDim.x) out[at + i] = data[at + i];
    }
}

// Data and signal as two messages; what orders them is `between`: 0 nothing, 1 fence, 2 quiet, 3 a fence of the two queue
// pairs, 4 a quiet of them, 5 a fence of another one.
extern "C" __global__ void apart(int* data, int* source, uint64_t* signal, int* out, int data_qp, int signal_qp, int between) {
    fill(source, 0);
    if (threadIdx.x < 32) nvshmemx_qp_int_put_nbi_warp(data, source, kWords, next_rank(), data_qp);
    if (threadIdx.x == 0) {
        nvshmemx_qp_handle_t pairs[2] = {data_qp, signal_qp}, others[1] = {9};
        if (between == 1) nvshmem_fence();
        if (between == 2) nvshmem_quiet();
        if (between == 3) nvshmemx_qp_fence(NVSHMEMX_PE_ALL, pairs, 2);
        if (between == 4) nvshmemx_qp_quiet(next_rank(), pairs, 2);
        if (between == 5) nvshmemx_qp_fence(NVSHMEMX_PE_ALL, others, 1);
        nvshmemx_qp_signal_op(signal, 1, NVSHMEM_SIGNAL_ADD, next_rank(), signal_qp);
        nvshmem_uint64_wait_until(signal, NVSHMEM_CMP_EQ, 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) out[i] = data[i];
}

// A blocking put, then its source is used again: fine. Without a word from the sender, its destination may not be read.
extern "C" __global__ void blocking_put(int* data, int* source, uint64_t* signal, int form, int reads) {
    fill(source, 0);
    if (form == kBlockingThread && threadIdx.x == 0) nvshmem_int_put(data, source, kWords, next_rank());
    if (form == kBlockingWarp && threadIdx.x < 32) nvshmemx_int_put_warp(data, source, kWords, next_rank());
    if (form == kBlockingBlock) nvshmemx_int_put_block(data, source, kWords, next_rank());
    if (form == kThread && threadIdx.x == 0) nvshmem_int_put_nbi(data, source, kWords, next_rank());
    __syncthreads();
    fill(source, 1);
    if (threadIdx.x == 0) {
        nvshmemx_qp_signal_op(signal, 1, NVSHMEM_SIGNAL_SET, next_rank(), 3);
        nvshmem_signal_wait_until(signal, NVSHMEM_CMP_EQ, 1);
        if (reads) source[0] = data[0];
    }
}

// Sends to the right and fetches it back: what a get gives is what was put before quiet. `waits`: 1 for that quiet, 2 for
// a fence and another put behind it, 3 for the same to where the get reads.
extern "C" __global__ void get_back(int* data, int* source, int* out, int form, int waits) {
    int next = next_rank();
    fill(source, 7);
    if (threadIdx.x == 0) {
        nvshmemx_qp_int_put_nbi(data, source, kWords, next, 2);
        nvshmem_quiet();
    }
    __syncthreads();
    switch (form) {
        case kThread: if (threadIdx.x == 0) nvshmem_int_get_nbi(out, data, kWords, next); break;
        case kWarp: if (threadIdx.x < 32) nvshmemx_int_get_nbi_warp(out, data, kWords, next); break;
        case kBlock: nvshmemx_int_get_nbi_block(out, data, kWords, next); break;
        case kBlockingThread: if (threadIdx.x == 0) nvshmem_int_get(out, data, kWords, next); break;
        case kBlockingWarp: if (threadIdx.x < 32) nvshmemx_int_get_warp(out, data, kWords, next); break;
        default: nvshmemx_int_get_block(out, data, kWords, next); break;
    }
    if (waits == 1 && threadIdx.x == 0) nvshmem_quiet();
    if (waits >= 2 && threadIdx.x == 0) {
        nvshmem_fence();
        nvshmemx_qp_int_put_nbi(waits == 2 ? data + kWords : data, source, kWords, next, 3);
        nvshmemx_qp_quiet(next, nullptr, NVSHMEMX_QP_ALL);
    }
    __syncthreads();
    if (threadIdx.x < kWords) out[threadIdx.x] += 1;
}

#define P_AND_G(at, name, type, value)                                  \
    nvshmem_##name##_p((type*)(data + 8 * (at)), (type)(value), next);  \
    nvshmem_quiet();                                                    \
    out[at] = (double)nvshmem_##name##_g((const type*)(data + 8 * (at)), next);

extern "C" __global__ void values(char* data, double* out) {
    int next = next_rank(), me = nvshmem_my_pe();
    P_AND_G(0, char, char, -5 - me)
    P_AND_G(1, short, short, -500 - me)
    P_AND_G(2, int, int, -70000 - me)
    P_AND_G(3, longlong, long long, -5000000000ll - me)
    P_AND_G(4, float, float, 0.5f + me)
    P_AND_G(5, double, double, -0.25 - me)
    P_AND_G(6, uchar, unsigned char, 250 + me)
    P_AND_G(7, uint, unsigned, 4000000000u + me)
    nvshmemx_qp_int_p((int*)(data + 64), 11 + me, next, 5);
    nvshmem_quiet();
    out[8] = nvshmemx_qp_int_g((const int*)(data + 64), next, 5);
}

// All lanes of all ranks, on rank 0: old[] holds what each fetch gave.
extern "C" __global__ void atomics(int* count, uint64_t* big, float* real, int* old, long long* old_big) {
    int me = nvshmem_my_pe(), lane = threadIdx.x;
    old[lane] = nvshmem_int_atomic_fetch_add(count, 1, 0);
    old[32 + lane] = nvshmem_int_atomic_fetch_inc(count + 1, 0);
    old_big[lane] = nvshmem_uint64_atomic_fetch_add(big, 1ull << 32, 0);
    nvshmem_int_atomic_add(count + 2, lane, 0);
    nvshmem_int_atomic_inc(count + 3, 0);
    nvshmem_uint64_atomic_add(big + 1, lane, 0);
    nvshmemx_float_atomic_add(real, 0.5f, 0);
    nvshmem_uint_atomic_or((unsigned*)count + 4, 1u << lane, 0);
    nvshmem_uint_atomic_xor((unsigned*)count + 5, 1u << lane, 0);
    if (lane == 0) {
        nvshmem_uint_atomic_and((unsigned*)count + 6, ~(1u << me), 0);
        // One rank wins.
        old[64] = nvshmem_int_atomic_compare_swap(count + 7, 0, me + 1, 0);
        // On the right neighbour, alone.
        int next = next_rank();
        nvshmem_int_atomic_set(count + 8, -7 - me, next);
        nvshmem_quiet();
        old[65] = nvshmem_int_atomic_fetch(count + 8, next);
        old[66] = nvshmem_int_atomic_swap(count + 8, 100 + me, next);
        old[67] = nvshmem_int_atomic_compare_swap(count + 8, 100 + me, 200 + me, next);
        old[68] = nvshmem_int_atomic_compare_swap(count + 8, 100 + me, 300 + me, next);
        old_big[32] = nvshmem_longlong_atomic_swap((long long*)big + 2, -1 - me, next);
        old_big[33] = nvshmem_uint64_atomic_fetch_and(big + 2, 0xFF, next);
        old_big[34] = nvshmem_uint64_atomic_fetch_or(big + 2, 0x100, next);
        old_big[35] = nvshmem_uint64_atomic_fetch_xor(big + 2, 0x101, next);
        nvshmem_quiet();
    }
}

// `form`: of the barrier; +3 for quiet and sync_all instead.
extern "C" __global__ void barriers(int* data, int* out, int rounds, int form) {
    int me = nvshmem_my_pe(), size = nvshmem_n_pes();
    for (int round = 0; round < rounds; round++) {
        if (threadIdx.x == 0)
            for (int rank = 0; rank < size; rank++) nvshmem_int_p(data + me, 100 * round + me + 1, rank);
        __syncthreads();
        for (int half = 0; half < 2; half++) {
            switch (form) {
                case kThread: if (threadIdx.x == 0) nvshmem_barrier_all(); break;
                case kWarp: if (threadIdx.x < 32) nvshmemx_barrier_all_warp(); break;
                case kBlock: nvshmemx_barrier_all_block(); break;
                case 3: if (threadIdx.x == 0) { nvshmem_quiet(); nvshmem_sync_all(); } break;
                case 4: if (threadIdx.x < 32) { if (threadIdx.x == 0) nvshmem_quiet(); nvshmemx_sync_all_warp(); } break;
                case 5: if (threadIdx.x == 0) nvshmem_quiet(); nvshmemx_sync_all_block(); break;
                case 6: break;
            }
            __syncthreads();
            if (half == 0 && threadIdx.x < size) out[round * size + threadIdx.x] = data[threadIdx.x];
            __syncthreads();
        }
    }
}

extern "C" __global__ void waits(int* flags, uint64_t* signals, int* out) {
    int me = nvshmem_my_pe(), size = nvshmem_n_pes();
    out[0] = nvshmem_int_test(flags, NVSHMEM_CMP_EQ, 99);
    for (int rank = 0; rank < size; rank++) {
        nvshmem_int_atomic_set(flags + me, me + 1, rank);
        nvshmemx_signal_op(signals + me, 3, NVSHMEM_SIGNAL_SET, rank);
    }
    nvshmem_int_wait_until_all(flags, size, nullptr, NVSHMEM_CMP_NE, 0);
    size_t first = nvshmem_uint64_wait_until_any(signals, size, nullptr, NVSHMEM_CMP_EQ, 3);
    out[1] = (int)first < size;
    nvshmem_int_wait_until(flags + me, NVSHMEM_CMP_GT, me);
    nvshmem_int_wait_until(flags + me, NVSHMEM_CMP_LE, me + 1);
    out[2] = nvshmem_int_test(flags + me, NVSHMEM_CMP_LT, me + 1);
    for (int rank = 0; rank < size; rank++) out[3 + rank] = ((volatile int*)flags)[rank];
    out[3 + size] = nvshmem_signal_fetch(signals + me) <= 3;
    nvshmem_barrier_all();
}

extern "C" __global__ void peers(int* data, int* out) {
    for (int peer = 0; peer < nvshmem_n_pes(); peer++) {
        int* p = (int*)nvshmem_ptr(data, peer);
        out[peer] = p != nullptr;
        if (p) p[nvshmem_my_pe()] = nvshmem_my_pe() + 1;
    }
    out[nvshmem_n_pes()] = nvshmem_ptr(out, 0) != nullptr;
    out[nvshmem_n_pes() + 1] = nvshmem_team_my_pe(NVSHMEMX_TEAM_NODE);
}

// A lock on rank 0 around a sum there: get, add, put, quiet.
extern "C" __global__ void locked(int* lock, int* sum, int* mine, int rounds, int fences) {
    int me = nvshmem_my_pe();
    for (int round = 0; round < rounds; round++) {
        while (nvshmem_int_atomic_compare_swap(lock, 0, me + 1, 0) != 0) {}
        if (fences) __threadfence_system();
        nvshmem_int_get(mine, sum, 2, 0);
        mine[0] += 1;
        mine[1] += me;
        nvshmem_int_put(sum, mine, 2, 0);
        nvshmem_quiet();
        nvshmem_int_atomic_set(lock, 0, 0);
    }
}
