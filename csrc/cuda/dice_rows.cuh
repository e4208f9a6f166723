// SPDX-License-Identifier: Apache-2.0
// How dice.cu's kernels go over the rows of a [B, T, C] tensor: which columns and rows a thread has, and how they are loaded
// ahead of their use. Design: dice.cu.
#pragma once

#include "cuda/dice.h"
#include "cuda/elements.cuh"

namespace dien_ops::cuda {
namespace {

constexpr int kThreads = 256, kMostPacks = 64;
constexpr int kMostRows = 64;  // of a thread in a block
constexpr int kLeastRows = 8;
constexpr int64_t kEnoughBlocks = 2112;  // 16 for each multiprocessor of an H100: above this, threads take more rows each

// How many rows a thread loads before it uses the first: of all tensors together 64 bytes, if the rows are not too many.
template <typename S, int kColumns>
constexpr int kAhead = kColumns * sizeof(S) < 8 ? 8 : 64 / (kColumns * sizeof(S));

template <typename S>
using Gate = std::conditional_t<sizeof(S) == 2, HalfMath<S>, ExactMath<S>>;

// Where the threads of a launch stand.
struct Tiling {
    int64_t rows, steps, channels;
    int64_t packs;                         // of a row: the columns that a thread takes together are one
    bool aligned;                          // packs begin at multiples of their size
    int packs_per_block;                   // at most kMostPacks
    int rows_per_step;                     // that a block takes at once
    int64_t rows_per_part, parts, chunks;  // blocks along the rows and along the columns
    int64_t row_steps, row_sequences;      // rows_per_step as sequences and steps: T row_sequences + row_steps

    Grid grid(int64_t shared_bytes = 0) const { return {parts * chunks, 1, 1, kThreads, shared_bytes}; }
};

template <typename S>
Tiling tiling(const DiceProblem<S>& p, int64_t columns) {
    Tiling t = {};
    t.rows = p.rows(), t.steps = p.steps > 0 ? p.steps : 1, t.channels = p.channels;
    if (t.channels == 0) return t;
    t.packs = t.channels / columns;
    t.chunks = divide_up<int64_t>(t.packs, kMostPacks);
    t.packs_per_block = static_cast<int>(divide_up(t.packs, t.chunks));
    t.rows_per_step = kThreads / t.packs_per_block;
    int64_t rows_of_thread = divide_up(t.rows * t.chunks, kEnoughBlocks * t.rows_per_step);
    rows_of_thread = rows_of_thread < kLeastRows ? kLeastRows : rows_of_thread < kMostRows ? rows_of_thread : kMostRows;
    t.rows_per_part = rows_of_thread * t.rows_per_step;
    t.parts = t.rows > 0 ? divide_up(t.rows, t.rows_per_part) : 1;  // one without rows still writes what it has of columns
    t.row_steps = t.rows_per_step % t.steps, t.row_sequences = t.rows_per_step / t.steps;
    return t;
}

// A thread's place: its columns, and its rows one by one.
template <int kColumns>
struct Place {
    int pack, y;   // of the block: its pack and its row of those that the block takes at once
    bool present;  // there is such a row and such a pack
    int64_t part, column;
    int64_t row, end;
    int64_t b, t;  // row = b * T + t

    DIEN_OPS_DEVICE explicit Place(const Tiling& l) {
        pack = thread_index() % l.packs_per_block, y = thread_index() / l.packs_per_block;
        part = block_index() / l.chunks;
        const int64_t of_row = block_index() % l.chunks * l.packs_per_block + pack;
        present = y < l.rows_per_step && of_row < l.packs;
        column = present ? of_row * kColumns : 0;
        row = part * l.rows_per_part + y;
        const int64_t stop = (part + 1) * l.rows_per_part;
        end = present ? (stop < l.rows ? stop : l.rows) : 0;
        b = row / l.steps, t = row % l.steps;
    }
    DIEN_OPS_DEVICE bool is_row() const { return row < end; }
    DIEN_OPS_DEVICE bool is_valid(const gmem<const int64_t>& lengths) const {
        return is_row() && (!lengths || t < lengths.ld(b));
    }
    DIEN_OPS_DEVICE int64_t index(const Tiling& l) const { return row * l.channels + column; }
    DIEN_OPS_DEVICE void advance(const Tiling& l) {
        row += l.rows_per_step, b += l.row_sequences, t += l.row_steps;
        if (t >= l.steps) t -= l.steps, ++b;
    }
};

// One value of each of the thread's columns.
template <typename T, int kColumns>
struct Values {
    T v[kColumns];
};

template <int kColumns, typename S>
DIEN_OPS_DEVICE Values<Compute<S>, kColumns> unpacked(const Pack<S, kColumns>& pack) {
    Values<Compute<S>, kColumns> values;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values.v[i] = to_compute(pack.v[i]);
    return values;
}

// The numbers from `index` on where the condition holds, else zeros.
template <int kColumns, typename S>
DIEN_OPS_DEVICE Pack<S, kColumns> load(const gmem<const S>& from, bool condition, int64_t index, bool aligned) {
    if (aligned) return from.template ld_if<Pack<S, kColumns>>(condition, index);
    Pack<S, kColumns> pack;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) pack.v[i] = from.template ld_if<S>(condition, index + i);
    return pack;
}

template <int kColumns, typename S>
DIEN_OPS_DEVICE void store(const gmem<S>& to, int64_t index, bool aligned, const Values<Compute<S>, kColumns>& values) {
    Pack<S, kColumns> pack;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) pack.v[i] = to_storage<S>(values.v[i]);
    if (aligned) return to.st_as(index, pack);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) to.st(index + i, pack.v[i]);
}

// Calls f(prepared, index, valid, numbers of tensor 0, of tensor 1 ..) for each of the thread's rows; padding has zeros.
// prepared is what prepare() returns, which every thread calls once while its first rows are under way.
template <int kColumns, typename S, typename Prepare, typename F, typename... More>
DIEN_OPS_DEVICE void for_rows(Place<kColumns> place, const Tiling& l, const gmem<const int64_t>& lengths,
                              const Prepare& prepare, const F& f, const gmem<const S>& first, const More&... more) {
    constexpr int kTensors = 1 + sizeof...(More), kRows = kAhead<S, kColumns> / kTensors;
    const gmem<const S> tensors[] = {first, more...};
    Pack<S, kColumns> loaded[kRows][kTensors];
    bool is_row[kRows], valid[kRows];
    int64_t index[kRows];
    const auto load_rows = [&] {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            is_row[i] = place.is_row(), valid[i] = place.is_valid(lengths), index[i] = place.index(l);
#pragma unroll
            for (int k = 0; k < kTensors; ++k) loaded[i][k] = load<kColumns>(tensors[k], valid[i], index[i], l.aligned);
            place.advance(l);
        }
    };
    load_rows();
    const auto prepared = prepare();
    while (is_row[0]) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (!is_row[i]) continue;
            if constexpr (kTensors == 1) f(prepared, index[i], valid[i], unpacked(loaded[i][0]));
            if constexpr (kTensors == 2) f(prepared, index[i], valid[i], unpacked(loaded[i][0]), unpacked(loaded[i][1]));
        }
        load_rows();
    }
}

}  // namespace
}  // namespace dien_ops::cuda
