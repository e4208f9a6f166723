// SPDX-License-Identifier: Apache-2.0
// Kernels with a thread per element, and sums: over a warp, over a block, and over the parts that the blocks of a launch leave
// behind.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace dien_ops::cuda {

constexpr int kElementThreads = 256;

inline Grid element_grid(int64_t n) { return {divide_up<int64_t>(n, kElementThreads), 1, 1, kElementThreads}; }

DIEN_OPS_DEVICE int64_t element_index() { return block_index() * kElementThreads + thread_index(); }

// The sum over the lanes of the warp, in an order of its own; every lane has it. All lanes call.
template <typename T>
DIEN_OPS_DEVICE T warp_sum(T x) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

template <typename T>
DIEN_OPS_DEVICE T warp_max(T x) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const T other = shuffle_xor(x, mask);
        x = x < other ? other : x;
    }
    return x;
}

// Bytes that join_block needs for so many threads.
template <typename Joined>
int64_t join_block_bytes(int threads) {
    return arena_bytes<double>(threads / kWarp * Joined::kNumbers);
}

// Joins what all threads of the block have, in an order of its own; thread 0 has the result. All threads call, with nothing
// else in shared memory. Joined has its numbers as double v[kNumbers], and join(other).
template <typename Joined>
DIEN_OPS_DEVICE Joined join_block(Joined mine) {
    constexpr int kNumbers = Joined::kNumbers;
    Arena arena;
    const view<double> of_warps = arena.take<double>(block_warps() * kNumbers, "joined warps");
    Joined other;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
#pragma unroll
        for (int k = 0; k < kNumbers; ++k) other.v[k] = shuffle_xor(mine.v[k], mask);
        mine.join(other);
    }
    if (lane_index() == 0) {
#pragma unroll
        for (int k = 0; k < kNumbers; ++k) of_warps.st(warp_index() * kNumbers + k, mine.v[k]);
    }
    sync_block();
    if (thread_index() > 0) return mine;
    for (int warp = 1; warp < block_warps(); ++warp) {
#pragma unroll
        for (int k = 0; k < kNumbers; ++k) other.v[k] = of_warps.ld(warp * kNumbers + k);
        mine.join(other);
    }
    return mine;
}

namespace {

// to [n] = the sum over splits of partial [splits, stride], its numbers from gap_at on taken `gap` further behind.
template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void reduce_parts(gmem<const Compute<S>> partial, int64_t splits, int64_t stride, int64_t gap_at, int64_t gap, int64_t n,
                  gmem<S> to) {
    const int64_t i = element_index();
    if (i >= n) return;
    Compute<S> sum = 0;
#pragma unroll 8
    for (int64_t split = 0; split < splits; ++split) sum += partial.ld(split * stride + i + (i >= gap_at ? gap : 0));
    to.st(i, to_storage<S>(sum));
}

}  // namespace
}  // namespace dien_ops::cuda
