// SPDX-License-Identifier: Apache-2.0
// Rows of H numbers that lie one behind the other in global memory, read at the memory's speed: a few lanes of a warp share a
// row, each taking kChunk numbers at a time, so that a warp's access is a run of whole rows.
#pragma once

#include <initializer_list>

#include "cuda/elements.cuh"

namespace dien_ops::cuda {

// What a lane loads at once: 16 bytes, or 8 of a 16-bit format, so that rows of any multiple of 4 numbers are aligned.
template <typename S>
constexpr int kChunk = sizeof(S) == 8 ? 2 : 4;
template <typename S>
using Chunk = Pack<S, kChunk<S>>;

// How rows are shared out.
struct RowLanes {
    int64_t width;  // H
    int lanes;      // of a row: a power of two in 2..32
    int passes;     // in which they go through it
    bool whole;     // chunks are aligned and never cross a row's end

    // Of every pass together: H, and what fills the last one.
    template <typename S>
    DIEN_OPS_HOST_DEVICE int padded() const {
        return passes * lanes * kChunk<S>;
    }
    DIEN_OPS_DEVICE int lane() const { return thread_index() % lanes; }
    DIEN_OPS_DEVICE int group() const { return thread_index() / lanes; }  // of lanes, in the block
    DIEN_OPS_DEVICE int groups() const { return block_threads() / lanes; }
    // The first number of the lane's chunk, and how many of it there are.
    template <typename S>
    DIEN_OPS_DEVICE int column(int pass) const {
        return (pass * lanes + lane()) * kChunk<S>;
    }
    template <typename S>
    DIEN_OPS_DEVICE int count(int column) const {
        const int64_t left = width - column;
        return left < 0 ? 0 : left < kChunk<S> ? static_cast<int>(left) : kChunk<S>;
    }
};

// For tensors whose rows begin at multiples of H numbers from where the tensors begin.
template <typename S>
RowLanes row_lanes(int64_t width, std::initializer_list<const S*> tensors) {
    RowLanes rows = {width, 2, 0, width % kChunk<S> == 0};
    for (const S* tensor : tensors) rows.whole &= reinterpret_cast<uintptr_t>(tensor) % sizeof(Chunk<S>) == 0;
    const int64_t chunks = divide_up<int64_t>(width, kChunk<S>);
    while (rows.lanes < chunks && rows.lanes < kWarp) rows.lanes *= 2;
    rows.passes = static_cast<int>(divide_up<int64_t>(chunks, rows.lanes));
    return rows;
}

// `count` numbers from i on, and zeros.
template <typename S>
DIEN_OPS_DEVICE Chunk<S> load_chunk(const gmem<const S>& from, int64_t i, int count, bool whole) {
    if (whole) return from.template ld_if<Chunk<S>>(count > 0, i);
    Chunk<S> chunk;
#pragma unroll
    for (int k = 0; k < kChunk<S>; ++k) chunk.v[k] = from.template ld_if<S>(k < count, i + k);
    return chunk;
}

template <typename S>
DIEN_OPS_DEVICE void store_chunk(const gmem<S>& to, int64_t i, int count, bool whole, const Chunk<S>& chunk) {
    if (whole) {
        if (count > 0) to.st_as(i, chunk);
        return;
    }
#pragma unroll
    for (int k = 0; k < kChunk<S>; ++k) {
        if (k < count) to.st(i + k, chunk.v[k]);
    }
}

template <typename S>
DIEN_OPS_DEVICE void store_chunk(const gmem<S>& to, int64_t i, int count, bool whole, const Compute<S> (&values)[kChunk<S>]) {
    Chunk<S> chunk;
#pragma unroll
    for (int k = 0; k < kChunk<S>; ++k) chunk.v[k] = to_storage<S>(values[k]);
    store_chunk(to, i, count, whole, chunk);
}

// The sum over the lanes of a row, in an order of its own; each of them has it. All lanes of the warp call.
template <typename T>
DIEN_OPS_DEVICE T row_sum(T x, int lanes) {
    for (int mask = lanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// The sum over the rows that a warp has at a time, of each column; every lane has its columns'. All lanes of the warp call.
template <typename T>
DIEN_OPS_DEVICE T column_sum(T x, int lanes) {
    for (int mask = kWarp / 2; mask >= lanes; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

}  // namespace dien_ops::cuda
