// SPDX-License-Identifier: Apache-2.0
// The tables of a call as its kernels see them, and the words by which the mini-batches are grouped. Design: embedding.cu.
#pragma once

#include <vector>

#include "cuda/embedding.h"
#include "cuda/rows.cuh"

namespace dien_ops::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTablesPerLaunch = 16;
constexpr int64_t kPiece = 32;               // rows of a long segment that are summed as one
constexpr int64_t kSuper = kPiece * kPiece;  // and of a very long one, as pieces
constexpr int kTile = kThreads - kPiece;     // positions of a block in the update
constexpr int64_t kFiniteRows = 16;          // of each group of lanes, when gradients are looked through

// A table, and where its share of everything begins.
struct Table : EmbeddingTable {
    RowLanes lanes;
    int64_t number;               // in the call
    int64_t first_position;       // among those of all tables
    int64_t first_key;            // of rows + 1 keys: its rows, and one for the positions that are left out
    int64_t pieces, superpieces;  // in the sums: of each kPiece (kSuper) positions a row of D
    int64_t flags, flag_count;    // of the blocks that look through its gradient
};

// The tables of one launch, whose blocks lie one table behind the other.
struct Group {
    int64_t first_block[kTablesPerLaunch + 1];
    int count;
    bool several;  // tables in the call: messages name them
    Table tables[kTablesPerLaunch];

    // The table of the running block.
    DIEN_OPS_DEVICE int table() const {
        int k = 0;
        while (k + 1 < count && block_index() >= first_block[k + 1]) ++k;
        return k;
    }
};

static_assert(sizeof(Group) <= 3584);  // a kernel's parameters are 4 KB at most

// A word for each position of the call: key << bits | position.
struct Words {
    gmem<uint64_t> words;
    int bits;
};

// The words of a table.
struct TableWords {
    gmem<const uint64_t> words;
    int bits;
    int64_t first_key, first_position;

    DIEN_OPS_DEVICE TableWords(const Words& all, const Table& t)
        : words(gmem<const uint64_t>(all.words).sub(t.first_position, t.batch)),
          bits(all.bits),
          first_key(t.first_key),
          first_position(t.first_position) {}

    // Of a word: the row that is to be updated (t.rows: none is), and the position in the table's mini-batch.
    DIEN_OPS_DEVICE int64_t row_of(uint64_t word) const { return static_cast<int64_t>(word >> bits) - first_key; }
    DIEN_OPS_DEVICE int64_t position_of(uint64_t word) const {
        return static_cast<int64_t>(word & ((uint64_t{1} << bits) - 1)) - first_position;
    }
    DIEN_OPS_DEVICE int64_t row(int64_t i) const { return row_of(words.ld(i)); }

    // Of sorted words: the first in begin..end that is of the row or of one behind it; end, where there is none.
    DIEN_OPS_DEVICE int64_t first_of(int64_t row_sought, int64_t begin, int64_t end) const {
        while (begin < end) {
            const int64_t middle = begin + (end - begin) / 2;
            if (row(middle) < row_sought) {
                begin = middle + 1;
            } else {
                end = middle;
            }
        }
        return end;
    }
};

// Adds the rows i of first..count-1, kAhead at most, to the sums of the lane's chunk, one after the other; all of them are
// under way at once. at(i): where the chunk lies in row i; numbers: how many of it there are, 0 for a lane that only keeps
// company.
template <int kAhead, typename S, typename At>
DIEN_OPS_DEVICE void add_some_rows(const gmem<const S>& from, int64_t first, int64_t count, int numbers, bool whole,
                                   const At& at, Compute<S> (&sum)[kChunk<S>]) {
    Chunk<S> loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        const bool present = first + i < count;
        loaded[i] = load_chunk(from, present ? at(first + i) : 0, present ? numbers : 0, whole);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int k = 0; k < kChunk<S>; ++k) sum[k] += to_compute(loaded[i].v[k]);
    }
}

// The same with any number of rows, from `first` on.
template <typename S, typename At>
DIEN_OPS_DEVICE void add_rows(const gmem<const S>& from, int64_t first, int64_t count, int numbers, bool whole, const At& at,
                              Compute<S> (&sum)[kChunk<S>]) {
    constexpr int kAhead = 8;
#pragma unroll 1
    for (; first < count; first += kAhead) add_some_rows<kAhead>(from, first, count, numbers, whole, at, sum);
}

template <typename T>
DIEN_OPS_DEVICE T number_of(const void* numbers, int64_t n, int64_t i, const char* name) {
    return gmem<const T>(static_cast<const T*>(numbers), n, name).ld(i);
}

// n_j of row j.
DIEN_OPS_DEVICE double count_of(const Table& t, int64_t row) {
    if (t.counts == nullptr) return 1;
    if (t.count_type == CountType::int32) return number_of<int32_t>(t.counts, t.rows, row, "counts");
    if (t.count_type == CountType::int64) return static_cast<double>(number_of<int64_t>(t.counts, t.rows, row, "counts"));
    if (t.count_type == CountType::float32) return number_of<float>(t.counts, t.rows, row, "counts");
    return number_of<double>(t.counts, t.rows, row, "counts");
}

template <typename S>
DIEN_OPS_DEVICE gmem<const S> gradient_of(const Table& t) {
    return {static_cast<const S*>(t.grad), t.batch * t.dim, "grad"};
}

// ------------------------------------------------------------------------------------------------------------ on the host

struct Tables {
    std::vector<Table> tables;
    EmbeddingSizes sizes = {};
    int position_bits = 0, key_bits = 0;
};

int bits_for(int64_t numbers) {
    int bits = 0;
    while (bits < 62 && (int64_t{1} << bits) < numbers) ++bits;
    return bits;
}

template <typename S>
Tables place_tables(const EmbeddingCall& call) {
    using T = Compute<S>;
    static_assert(kChunk<T> == kChunk<S>);
    Tables all;
    int64_t positions = 0, keys = 0;
    all.sizes.flags = call.skip_nonfinite ? call.count : 0;
    for (int64_t i = 0; i < call.count; ++i) {
        Table t = {call.tables[i]};
        t.lanes = row_lanes<S>(t.dim, {static_cast<const S*>(t.weight), static_cast<const S*>(t.grad)});
        t.lanes.whole &= row_lanes<T>(t.dim, {static_cast<const T*>(t.states[0]), static_cast<const T*>(t.states[1])}).whole;
        t.number = i;
        t.first_position = positions;
        t.first_key = keys;
        positions += t.batch;
        keys += t.rows + 1;
        const auto take_sums = [&](int64_t size) {
            const int64_t first = all.sizes.sums;
            const int64_t numbers = t.batch > size ? divide_up(t.batch, size) * t.dim : 0;
            all.sizes.sums += divide_up<int64_t>(numbers, kChunk<T>) * kChunk<T>;
            return first;
        };
        t.pieces = take_sums(kPiece);
        t.superpieces = take_sums(kSuper);
        t.flags = all.sizes.flags;
        t.flag_count = t.dim > 0 ? divide_up(t.batch, kThreads / t.lanes.lanes * kFiniteRows) : 0;
        if (call.skip_nonfinite) all.sizes.flags += t.flag_count;
        all.tables.push_back(t);
    }
    all.position_bits = bits_for(positions), all.key_bits = bits_for(keys < 2 ? 2 : keys);
    if (all.position_bits + all.key_bits > 64) {
        throw std::runtime_error("a call must not have more than 2^64 rows times ids, got " + std::to_string(keys) + " and " +
                                 std::to_string(positions));
    }
    all.sizes.words = positions;
    return all;
}

// Calls launch(group, blocks) for the tables of each launch, whose numbers of blocks blocks_of(table) says.
template <typename BlocksOf, typename Launch>
void for_groups(const std::vector<Table>& tables, const BlocksOf& blocks_of, const Launch& launch) {
    for (size_t first = 0; first < tables.size(); first += kTablesPerLaunch) {
        Group group = {};
        group.several = tables.size() > 1;
        for (size_t i = first; i < tables.size() && group.count < kTablesPerLaunch; ++i) {
            const int k = group.count++;
            group.tables[k] = tables[i];
            group.first_block[k + 1] = group.first_block[k] + blocks_of(tables[i]);
        }
        launch(group, group.first_block[group.count]);
    }
}

}  // namespace
}  // namespace dien_ops::cuda
