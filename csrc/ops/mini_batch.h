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

// Work on 0..count-1 is shared out in even parts, one for each thread, which has what it wrote of a part in its cache when it
// comes to the same part again; fewer where they would be shorter than this.
constexpr int64_t kShortestPart = 1 << 12;

inline int64_t parts_of(int64_t count) {
    return std::clamp<int64_t>(divide_up(count, kShortestPart), 1, torch::stable::get_num_threads());
}

// Calls f(part, begin, end) for each of the parts.
template <typename F>
void parallel_parts(int64_t count, int64_t parts, F&& f) {
    parallel_ranges(parts, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; ++part) f(part, count * part / parts, count * (part + 1) / parts);
    });
}

template <typename F>
void parallel_parts(int64_t count, F&& f) {
    parallel_parts(count, parts_of(count), f);
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
    [[gnu::always_inline]] void prefetch(int64_t id) const {
        const int64_t bytes = counts_type_ == ScalarType::Int || counts_type_ == ScalarType::Float ? 4 : 8;
        if (counts_ != nullptr) __builtin_prefetch(static_cast<const char*>(counts_) + id * bytes);
        if (decayed_ != nullptr) __builtin_prefetch(decayed_ + id);
    }
    // Calls f with the ids, a pointer to int32_t or int64_t.
    template <typename F>
    void with_ids(F&& f) const {
        if (ids_are_int32_) return f(static_cast<const int32_t*>(ids_));
        f(static_cast<const int64_t*>(ids_));
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

// The table that number i belongs to, where `first` holds the tables' first numbers.
inline int64_t table_of(const std::vector<int64_t>& first, int64_t i) {
    return std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1;
}

// Calls f(t, begin, end) for each table t's share of the numbers begin .. end - 1.
template <typename F>
void for_tables(const std::vector<int64_t>& first, int64_t begin, int64_t end, F&& f) {
    while (begin < end) {
        const int64_t t = table_of(first, begin), last = std::min(end, first[t + 1]);
        f(t, begin, last);
        begin = last;
    }
}

// The keys of all positions. Throws where an id lies outside of its table and ids are to be checked.
inline Buffer<uint64_t> make_keys(const std::vector<Table>& tables, const Numbering& numbering, bool check_ids) {
    Buffer<uint64_t> keys(numbering.positions());
    Smallest wrong;
    parallel_parts(numbering.positions(), [&](int64_t, int64_t begin, int64_t end) {
        for_tables(numbering.first_position, begin, end, [&](int64_t t, int64_t from, int64_t to) {
            const TableArguments& table = tables[t].arguments;
            const int64_t rows = table.num_embeddings, padding = table.padding, none = numbering.rows();
            const int64_t first_row = numbering.first_row[t], first_position = numbering.first_position[t];
            tables[t].with_ids([&](const auto* ids) {
                const auto has = [rows](int64_t id) { return id >= 0 && id < rows; };
                bool has_all = true;
                for (int64_t i = from; i < to; ++i) {
                    const int64_t id = ids[i - first_position];
                    has_all &= has(id);
                    keys[i] = numbering.key(has(id) && id != padding ? first_row + id : none, i);
                }
                if (!check_ids || has_all) return;
                const auto* const first = ids + (from - first_position);
                wrong.report(from + (std::find_if_not(first, first + (to - from), has) - first));
            });
        });
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
    parallel_parts(numbering.positions(), [&](int64_t, int64_t begin, int64_t end) {
        for_tables(numbering.first_position, begin, end, [&](int64_t t, int64_t from, int64_t to) {
            for (int64_t i = from; i < to; ++i) {
                const int64_t id = tables[t].id(i - numbering.first_position[t]);
                if (tables[t].updates(id) && !(tables[t].count(id) > 0)) wrong.report(i);
            }
        });
    });
    if (wrong.none()) return;
    const int64_t t = table_of(numbering.first_position, wrong.value());
    tables[t].refuse_count(tables[t].id(wrong.value() - numbering.first_position[t]));
}

// Sorts keys by the bits from `low` on, where keys of equal bits there are in order already: a radix sort from the lowest digit
// up. first, last: keys that none is below or above. from [n] is overwritten, the result is in to [n].
inline void radix_sort(uint64_t* from, uint64_t* to, int64_t n, int low, uint64_t first, uint64_t last) {
    if (n == 0) return;
    const int most_digit_bits = std::clamp<int>(std::bit_width(static_cast<uint64_t>(n)), 8, 12);
    first = first >> low << low;
    const int bits = std::bit_width((last - first) >> low), passes = static_cast<int>(divide_up(bits, most_digit_bits));
    const int digit_bits = passes > 0 ? static_cast<int>(divide_up(bits, passes)) : 0;
    const uint64_t digits = uint64_t{1} << digit_bits;
    Buffer<int64_t> next(digits);  // where the next key of each digit goes
    uint64_t* const result = to;
    for (int pass = 0; pass < passes; ++pass) {
        const auto digit = [first, digits, shift = low + pass * digit_bits](uint64_t key) {
            return ((key - first) >> shift) & (digits - 1);
        };
        std::fill_n(next.data(), digits, 0);
        for (int64_t i = 0; i < n; ++i) ++next[digit(from[i])];
        std::exclusive_scan(next.data(), next.data() + digits, next.data(), int64_t{0});
        for (int64_t i = 0; i < n; ++i) to[next[digit(from[i])]++] = from[i];
        std::swap(from, to);
    }
    if (from != result) std::copy_n(from, n, result);
}

// Sorts keys below `bound` by the bits from `low` on, where keys of equal bits there are in order already. Each thread sorts a
// share of its own, from one key to another, so that no two write to the same lines. A sample says where the shares begin: all
// keys are different, so shares are even however often a row comes.
inline void sort_keys(Buffer<uint64_t>& keys, int64_t n, int low, uint64_t bound) {
    constexpr int64_t kFew = 256, kMostSamples = 1024, kSamplesPerShare = 128, kFewShares = 8;
    if (n <= kFew) return std::sort(keys.data(), keys.data() + n);
    Buffer<uint64_t> sorted(n);
    const int64_t parts = parts_of(n);  // and as many shares
    if (parts == 1) {
        radix_sort(keys.data(), sorted.data(), n, low, 0, bound - 1);
        return keys.swap(sorted);
    }
    // From places that do not repeat: mini-batches are rows of some length, and every so many ids there may be padding.
    std::vector<uint64_t> samples(std::min({n, kMostSamples, parts * kSamplesPerShare}));
    for (size_t i = 0; i < samples.size(); ++i) samples[i] = keys[(i * 0x9E3779B97F4A7C15u >> 20) % n];
    std::sort(samples.begin(), samples.end());
    std::vector<uint64_t> first_key{0};  // of each share, and one behind the last
    for (int64_t share = 1; share < parts; ++share) first_key.push_back(samples[samples.size() * share / parts]);
    first_key.push_back(bound);
    const auto share_of = [parts, bounds = first_key.data() + 1](uint64_t key) -> int64_t {
        if (parts > kFewShares) return std::upper_bound(bounds, bounds + parts - 1, key) - bounds;
        int64_t share = 0;
        for (int64_t i = 0; i < parts - 1; ++i) share += key >= bounds[i];
        return share;
    };

    std::vector<int64_t> offsets(parts * parts);  // [share, part]: where a part's next key of a share goes
    parallel_parts(n, parts, [&](int64_t part, int64_t begin, int64_t end) {
        std::vector<int64_t> counts(parts);
        for (int64_t i = begin; i < end; ++i) ++counts[share_of(keys[i])];
        for (int64_t share = 0; share < parts; ++share) offsets[share * parts + part] = counts[share];
    });
    std::exclusive_scan(offsets.begin(), offsets.end(), offsets.begin(), int64_t{0});
    offsets.push_back(n);  // where a share more would begin
    parallel_parts(n, parts, [&](int64_t part, int64_t begin, int64_t end) {
        std::vector<int64_t> next(parts);
        for (int64_t share = 0; share < parts; ++share) next[share] = offsets[share * parts + part];
        for (int64_t i = begin; i < end; ++i) sorted[next[share_of(keys[i])]++] = keys[i];
    });
    parallel_ranges(parts, [&](int64_t begin, int64_t end) {
        for (int64_t share = begin; share < end; ++share) {
            const int64_t place = offsets[share * parts], size = offsets[(share + 1) * parts] - place;
            radix_sort(sorted.data() + place, keys.data() + place, size, low, first_key[share], first_key[share + 1] - 1);
        }
    });
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
    sort_keys(keys, n, numbering.position_bits, numbering.key(numbering.rows(), n));
    std::vector<int64_t> first_key;  // of each table, and at the end how many belong to any
    for (const int64_t row : numbering.first_row) {
        const auto before_row = [&](uint64_t key) { return numbering.row(key) < row; };
        first_key.push_back(std::partition_point(keys.data(), keys.data() + n, before_row) - keys.data());
    }
    const int64_t kept = first_key.back(), parts = parts_of(kept);
    const auto row_at = [&](int64_t i) { return numbering.row(keys[i]); };

    Buffer<int64_t> positions(kept), starts(kept);  // starts: the first keys of the segments, each part's from its begin on
    std::vector<int64_t> before(parts + 1, 0);      // segments that begin before each part
    parallel_parts(kept, parts, [&](int64_t part, int64_t begin, int64_t end) {
        int64_t found = 0, previous = begin > 0 ? row_at(begin - 1) : -1;
        for_tables(first_key, begin, end, [&](int64_t t, int64_t from, int64_t to) {
            const int64_t first_position = numbering.first_position[t];
            for (int64_t i = from; i < to; ++i) {
                const uint64_t key = keys[i];
                const int64_t row = numbering.row(key);
                positions[i] = numbering.position(key) - first_position;
                starts[begin + found] = i;  // the next one overwrites it unless it is a first: nothing to be foretold
                found += row != previous;
                previous = row;
            }
        });
        before[part + 1] = found;
    });
    std::partial_sum(before.begin(), before.end(), before.begin());

    const int64_t count = before.back();
    MiniBatch<T> batch{.segments = Buffer<cpu::Segment<T>>(count + 1), .positions = std::move(positions)};
    std::vector<std::vector<int64_t>> long_ones(before.size());
    Smallest wrong;
    parallel_parts(kept, parts, [&](int64_t part, int64_t begin, int64_t) {
        const auto start_of = [&](int64_t s) { return starts[begin + s - before[part]]; };
        constexpr int64_t kAhead = 64;
        int64_t t = 0;
        for (int64_t s = before[part]; s < before[part + 1]; ++s) {
            const int64_t i = start_of(s);
            if (i >= first_key[t + 1]) t = table_of(first_key, i);
            const Table& table = tables[t];
            const int64_t first_row = numbering.first_row[t], row = row_at(i), id = row - first_row;
            if (s + kAhead < before[part + 1]) {
                const int64_t ahead = start_of(s + kAhead);
                if (ahead < first_key[t + 1]) table.prefetch(row_at(ahead) - first_row);
            }
            const double n_j = table.count(id);
            if (!(n_j > 0)) wrong.report(s);
            if (i + kPiece < kept && row_at(i + kPiece) == row) long_ones[part].push_back(s);
            batch.segments[s] = {id, i, decay.of_row<T>(n_j, table.arguments.log_decay, table.decayed(id))};
        }
    });
    batch.segments[count] = {-1, kept, {}};
    for (const auto& of_part : long_ones) batch.long_ones.insert(batch.long_ones.end(), of_part.begin(), of_part.end());
    for (const int64_t first : first_key) {
        const auto before_first = [&](const cpu::Segment<T>& s) { return s.first < first; };
        batch.first.push_back(std::partition_point(batch.segments.data(), batch.segments.data() + count, before_first) -
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
                const int64_t count = pieces[p].end - pieces[p].begin;
                cpu::sum_rows<target()>(grads, batch.positions.data() + pieces[p].begin, count, count, dim,
                                        parts.data() + p * padded);
            });
            parallel_tasks(this->segments.size(), [&](int64_t i) {
                const int64_t count = first[i + 1] - first[i];
                cpu::sum_rows<target()>(static_cast<const T*>(parts.data()), places.data() + first[i], count, count, padded,
                                        sums.data() + i * padded);
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
        parallel_parts(table.arguments.batch(), [&](int64_t, int64_t begin, int64_t end) {
            if (cpu::all_finite<target()>(grads + begin * dim, (end - begin) * dim)) return;
            for (int64_t i = begin; i < end; ++i) {
                if (table.updates(table.id(i)) && !cpu::all_finite<target()>(grads + i * dim, dim)) return found.report(i);
            }
        });
    });
    return found.none() ? -1 : found.value();
}

}  // namespace dien_ops::ops
