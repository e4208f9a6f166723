// SPDX-License-Identifier: Apache-2.0
// The mini-batches of a call, checked and grouped by id: what every sparse update on the CPU starts from. The tables of a call
// are numbered as one: row `id` of a table is row first_row + id of all, and position p of its mini-batch is first_position + p
// of all. A key holds both numbers, so that sorted keys are grouped by row and each row's are in the order of the batch,
// whoever sorts them. Nothing here writes what the caller owns.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/embedding.h"
#include "ops/embedding_arguments.h"

namespace dien_ops::ops {

// Memory that is written before it is read.
template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t size) : data_(std::make_unique_for_overwrite<T[]>(size)) {}
    T* data() const { return data_.get(); }
    T& operator[](int64_t i) const { return data_[i]; }
    void swap(Buffer& other) { data_.swap(other.data_); }

  private:
    std::unique_ptr<T[]> data_;
};

// Work on 0..count-1 is shared out in blocks of this many, whatever the number of threads.
constexpr int64_t kPerBlock = 1 << 13;

// Calls f(block, begin, end) for each block of 0..count-1.
template <typename F>
void parallel_blocks(int64_t count, F&& f) {
    parallel_tasks(divide_up(count, kPerBlock),
                   [&](int64_t block) { f(block, block * kPerBlock, std::min(count, (block + 1) * kPerBlock)); });
}

// The smallest of the numbers that threads report.
class Smallest {
  public:
    void report(int64_t i) {
        for (int64_t seen = value_; i < seen && !value_.compare_exchange_weak(seen, i);) {
        }
    }
    bool none() const { return value_ == INT64_MAX; }
    int64_t value() const { return value_; }

  private:
    std::atomic<int64_t> value_ = INT64_MAX;
};

// A table with its pointers, which loops read by the element.
class Table {
  public:
    Table(const TableArguments& arguments, const double* decayed)
        : arguments(arguments),
          ids_(arguments.ids.const_data_ptr()),
          ids_are_int32_(arguments.ids.scalar_type() == ScalarType::Int),
          counts_(arguments.counts.has_value() ? arguments.counts->const_data_ptr() : nullptr),
          counts_type_(arguments.counts.has_value() ? arguments.counts->scalar_type() : ScalarType::Long),
          decayed_(decayed) {}

    const TableArguments& arguments;

    int64_t id(int64_t position) const { return ids_are_int32_ ? at<int32_t>(ids_, position) : at<int64_t>(ids_, position); }
    bool has(int64_t id) const { return id >= 0 && id < arguments.num_embeddings; }
    bool updates(int64_t id) const { return has(id) && id != arguments.padding; }
    // n_j of DIN eq. 7: how many instances of the training set hold id j, 1 for every id where no counts came.
    double count(int64_t id) const {
        if (counts_ == nullptr) return 1;
        switch (counts_type_) {
            case ScalarType::Int:
                return at<int32_t>(counts_, id);
            case ScalarType::Long:
                return static_cast<double>(at<int64_t>(counts_, id));
            case ScalarType::Float:
                return at<float>(counts_, id);
            default:
                return at<double>(counts_, id);
        }
    }
    void refuse_count(int64_t id) const {
        check(false, arguments.name, "counts must be positive for every id of the mini-batch, got ", count(id), " for id ", id);
    }
    double decayed(int64_t id) const { return decayed_ == nullptr ? 0 : decayed_[id]; }
    // What count and decayed will read.
    [[gnu::always_inline]] void prefetch(int64_t id) const {  // else GCC may drop the call: cpu/simd.h
        const int64_t bytes = counts_type_ == ScalarType::Int || counts_type_ == ScalarType::Float ? 4 : 8;
        if (counts_ != nullptr) __builtin_prefetch(static_cast<const char*>(counts_) + id * bytes);
        if (decayed_ != nullptr) __builtin_prefetch(decayed_ + id);
    }

  private:
    template <typename N>
    static N at(const void* numbers, int64_t i) {
        return static_cast<const N*>(numbers)[i];
    }

    const void* ids_;
    bool ids_are_int32_;
    const void* counts_;
    ScalarType counts_type_;
    const double* decayed_;
};

// How the rows and positions of all tables are numbered as one.
struct Numbering {
    std::vector<int64_t> first_row{0}, first_position{0};  // of each table, and at the end how many there are

    explicit Numbering(const std::vector<TableArguments>& tables) {
        for (const TableArguments& t : tables) {
            first_row.push_back(first_row.back() + t.num_embeddings);
            first_position.push_back(first_position.back() + t.batch());
        }
        position_bits = std::bit_width(static_cast<uint64_t>(positions()));
        check(row_bits() + position_bits <= 64, "a call must not have more than 2^64 rows times ids, got ", rows(), " and ",
              positions());
    }
    int64_t rows() const { return first_row.back(); }
    int64_t positions() const { return first_position.back(); }
    // The key of a position whose row is not to be updated has row rows(), behind all others.
    int row_bits() const { return std::bit_width(static_cast<uint64_t>(rows())); }
    uint64_t key(int64_t row, int64_t position) const {
        return static_cast<uint64_t>(row) << position_bits | static_cast<uint64_t>(position);
    }
    int64_t row(uint64_t key) const { return static_cast<int64_t>(key >> position_bits); }
    int64_t position(uint64_t key) const { return static_cast<int64_t>(key & ((uint64_t{1} << position_bits) - 1)); }

    int position_bits;
};

// The table that number i belongs to, where `first` holds the tables' first numbers; `from` is that of a smaller number.
inline int64_t table_of(const std::vector<int64_t>& first, int64_t i, int64_t from = 0) {
    while (i >= first[from + 1]) ++from;
    return from;
}

// The keys of all positions. Throws where an id lies outside of its table and ids are to be checked.
inline Buffer<uint64_t> make_keys(const std::vector<Table>& tables, const Numbering& numbering, bool check_ids) {
    Buffer<uint64_t> keys(numbering.positions());
    Smallest wrong;
    parallel_blocks(numbering.positions(), [&](int64_t, int64_t begin, int64_t end) {
        int64_t t = 0;
        for (int64_t i = begin; i < end; ++i) {
            t = table_of(numbering.first_position, i, t);
            const Table& table = tables[t];
            const int64_t id = table.id(i - numbering.first_position[t]);
            if (check_ids && !table.has(id)) wrong.report(i);
            keys[i] = numbering.key(table.updates(id) ? numbering.first_row[t] + id : numbering.rows(), i);
        }
    });
    if (!wrong.none()) {
        const int64_t t = table_of(numbering.first_position, wrong.value());
        const int64_t position = wrong.value() - numbering.first_position[t];
        check(false, tables[t].arguments.name, "ids must be in 0..", tables[t].arguments.num_embeddings - 1, ", got ",
              tables[t].id(position), " at position ", position);
    }
    return keys;
}

// Throws where the count of an id that is to be updated cannot be divided by. (Grouping checks that too, once for each row.)
inline void check_counts(const std::vector<Table>& tables, const Numbering& numbering) {
    Smallest wrong;
    const auto id_at = [&](int64_t i, int64_t t) { return tables[t].id(i - numbering.first_position[t]); };
    parallel_blocks(numbering.positions(), [&](int64_t, int64_t begin, int64_t end) {
        int64_t t = 0;
        for (int64_t i = begin; i < end; ++i) {
            t = table_of(numbering.first_position, i, t);
            const int64_t id = id_at(i, t);
            if (tables[t].updates(id) && !(tables[t].count(id) > 0)) wrong.report(i);
        }
    });
    if (wrong.none()) return;
    const int64_t t = table_of(numbering.first_position, wrong.value());
    tables[t].refuse_count(id_at(wrong.value(), t));
}

// Sorts by the bits from `low` on, where keys of equal bits there are in order already: a radix sort from the lowest digit up,
// whose passes run over blocks in parallel.
inline void sort_keys(Buffer<uint64_t>& keys, int64_t n, int low, int bits) {
    constexpr int64_t kFew = 256;
    if (n <= kFew) return std::sort(keys.data(), keys.data() + n);
    constexpr int kMostDigitBits = 11;
    const int passes = static_cast<int>(divide_up(bits, kMostDigitBits));
    const int digit_bits = passes > 0 ? static_cast<int>(divide_up(bits, passes)) : 0;
    const int64_t digits = int64_t{1} << digit_bits, blocks = divide_up(n, kPerBlock);
    Buffer<uint64_t> sorted(n);
    Buffer<int64_t> offsets(blocks * digits);  // where a block's next key of each digit goes
    for (int pass = 0; pass < passes; ++pass) {
        const auto digit = [&, shift = low + pass * digit_bits](uint64_t key) { return (key >> shift) & (digits - 1); };
        parallel_blocks(n, [&](int64_t block, int64_t begin, int64_t end) {
            int64_t* const counts = offsets.data() + block * digits;
            std::fill_n(counts, digits, 0);
            for (int64_t i = begin; i < end; ++i) ++counts[digit(keys[i])];
        });
        int64_t total = 0;
        for (int64_t d = 0; d < digits; ++d) {
            for (int64_t block = 0; block < blocks; ++block) total += std::exchange(offsets[block * digits + d], total);
        }
        parallel_blocks(n, [&](int64_t block, int64_t begin, int64_t end) {
            int64_t* const next = offsets.data() + block * digits;
            for (int64_t i = begin; i < end; ++i) sorted[next[digit(keys[i])]++] = keys[i];
        });
        keys.swap(sorted);
    }
}

// The distinct rows of all tables with the gradient rows that fall on each.
template <typename T>
struct MiniBatch {
    Buffer<cpu::Segment<T>> segments;  // by ascending row; their rows and positions are counted in their own table
    Buffer<int64_t> positions;         // of gradient rows
    std::vector<int64_t> first;        // segment of each table, and at the end how many there are
    std::vector<int64_t> long_ones;    // segments of more than kPiece gradient rows, ascending
};

constexpr int64_t kPiece = 256;

// Throws where the count of an id of the mini-batch cannot be divided by.
template <typename T>
MiniBatch<T> group_by_id(const std::vector<Table>& tables, const Numbering& numbering, Buffer<uint64_t> keys,
                         const DecayRule& decay) {
    const int64_t n = numbering.positions();
    sort_keys(keys, n, numbering.position_bits, numbering.row_bits());
    const auto row_at = [&](int64_t i) { return numbering.row(keys[i]); };
    const auto updated = [&](uint64_t key) { return numbering.row(key) < numbering.rows(); };
    const int64_t kept = std::partition_point(keys.data(), keys.data() + n, updated) - keys.data();
    const auto is_first = [&](int64_t i) { return i == 0 || row_at(i - 1) != row_at(i); };

    std::vector<int64_t> before(divide_up(kept, kPerBlock) + 1, 0);  // segments that begin before each block
    parallel_blocks(kept, [&](int64_t block, int64_t begin, int64_t end) {
        int64_t found = 0;
        for (int64_t i = begin; i < end; ++i) found += is_first(i);
        before[block + 1] = found;
    });
    std::partial_sum(before.begin(), before.end(), before.begin());

    const int64_t count = before.back();
    MiniBatch<T> batch{.segments = Buffer<cpu::Segment<T>>(count + 1), .positions = Buffer<int64_t>(kept)};
    std::vector<std::vector<int64_t>> long_ones(before.size());
    Smallest wrong;
    parallel_blocks(kept, [&](int64_t block, int64_t begin, int64_t end) {
        constexpr int64_t kAhead = 64;
        int64_t t = 0, s = before[block];
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = row_at(i);
            t = table_of(numbering.first_row, row, t);
            batch.positions[i] = numbering.position(keys[i]) - numbering.first_position[t];
            if (i + kAhead < end && row_at(i + kAhead) < numbering.first_row[t + 1]) {
                tables[t].prefetch(row_at(i + kAhead) - numbering.first_row[t]);
            }
            if (!is_first(i)) continue;
            const int64_t id = row - numbering.first_row[t];
            const double n_j = tables[t].count(id);
            if (!(n_j > 0)) wrong.report(s);
            if (i + kPiece < kept && row_at(i + kPiece) == row) long_ones[block].push_back(s);
            const auto of_row = decay.of_row<T>(n_j, tables[t].arguments.log_decay, tables[t].decayed(id));
            batch.segments[s++] = {id, i, of_row};
        }
    });
    batch.segments[count] = {-1, kept, {}};
    for (const auto& of_block : long_ones) batch.long_ones.insert(batch.long_ones.end(), of_block.begin(), of_block.end());
    for (const int64_t row : numbering.first_row) {
        const auto before_row = [&](const cpu::Segment<T>& s) { return row_at(s.first) < row; };
        batch.first.push_back(std::partition_point(batch.segments.data(), batch.segments.data() + count, before_row) -
                              batch.segments.data());
    }
    if (!wrong.none()) {
        tables[table_of(batch.first, wrong.value())].refuse_count(batch.segments[wrong.value()].row);
    }
    return batch;
}

// The sums of a table's long segments, a piece at a time: an id that fills half the batch is shared by all threads, and the
// rounding error of its sum stays small. The pieces are the same whatever the number of threads and whatever else is in the
// call.
template <typename S>
class LongSums {
    using T = Compute<S>;

  public:
    // segments: those of the table, of batch.long_ones. grads [N, D].
    LongSums(const MiniBatch<T>& batch, std::vector<int64_t> segments, const S* grads, int64_t dim)
        : segments(std::move(segments)), sums(this->segments.size() * cpu::padded(dim)) {
        struct Piece {
            int64_t begin, end;  // positions
        };
        std::vector<Piece> pieces;
        std::vector<int64_t> first{0};  // piece of each segment
        for (const int64_t s : this->segments) {
            const int64_t end = batch.segments[s + 1].first;
            for (int64_t i = batch.segments[s].first; i < end; i += kPiece) pieces.push_back({i, std::min(i + kPiece, end)});
            first.push_back(pieces.size());
        }
        const int64_t padded = cpu::padded(dim);
        Buffer<T> parts(pieces.size() * padded);
        std::vector<int64_t> places(pieces.size());
        std::iota(places.begin(), places.end(), 0);
        cpu::with_capability([&](auto target) {
            parallel_tasks(pieces.size(), [&](int64_t p) {
                cpu::sum_rows<target()>(grads, batch.positions.data() + pieces[p].begin, pieces[p].end - pieces[p].begin, dim,
                                        parts.data() + p * padded);
            });
            parallel_tasks(this->segments.size(), [&](int64_t i) {
                cpu::sum_rows<target()>(static_cast<const T*>(parts.data()), places.data() + first[i], first[i + 1] - first[i],
                                        padded, sums.data() + i * padded);
            });
        });
    }

    const std::vector<int64_t> segments;  // ascending
    const Buffer<T> sums;                 // [segments, padded(D)]
};

// The number of the first gradient row with an infinite number or NaN, or -1. Those that no row is updated by do not count.
template <typename S>
int64_t first_nonfinite(const Table& table) {
    const S* const grads = pointer<S>(table.arguments.grad);
    const int64_t dim = table.arguments.dim;
    Smallest found;
    cpu::with_capability([&](auto target) {
        parallel_blocks(table.arguments.batch(), [&](int64_t, int64_t begin, int64_t end) {
            if (cpu::all_finite<target()>(grads + begin * dim, (end - begin) * dim)) return;
            for (int64_t i = begin; i < end; ++i) {
                if (table.updates(table.id(i)) && !cpu::all_finite<target()>(grads + i * dim, dim)) return found.report(i);
            }
        });
    });
    return found.none() ? -1 : found.value();
}

}  // namespace dien_ops::ops
