// SPDX-License-Identifier: Apache-2.0
// A mini-batch of ids and gradient rows, checked and grouped by id: what every sparse update starts from.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/embedding.h"
#include "ops/tensor.h"

namespace dien_ops::ops {

// Calls f(position, id) for every id except padding_idx, in order. Throws where one, or padding_idx, lies outside of
// 0..num_embeddings-1.
template <typename F>
void for_each_id(const Tensor& ids, int64_t num_embeddings, std::optional<int64_t> padding_idx, F&& f) {
    const ScalarType dtype = ids.scalar_type();
    check(dtype == ScalarType::Int || dtype == ScalarType::Long, "ids must be int32 or int64");
    check(ids.is_cpu(), "ids must be on the CPU as the other arguments are");
    const Tensor dense = ids.is_contiguous() ? ids : torch::stable::contiguous(ids);
    constexpr int64_t kNone = -1;
    const int64_t padding = padding_idx.value_or(kNone);
    check(!padding_idx.has_value() || (padding >= 0 && padding < num_embeddings), "padding_idx must be in 0..",
          num_embeddings - 1, ", got ", padding);
    const auto visit = [&](const auto* values) {
        const int64_t n = dense.numel();
        for (int64_t i = 0; i < n; ++i) {
            const int64_t id = values[i];
            if (id < 0 || id >= num_embeddings) {
                check(false, "ids must be in 0..", num_embeddings - 1, ", got ", id, " at position ", i);
            }
            if (id != padding) f(i, id);
        }
    };
    dtype == ScalarType::Int ? visit(pointer<int32_t>(dense)) : visit(pointer<int64_t>(dense));
}

// n_j of DIN eq. 7: how often id j occurs in the training set, 1 for every id where no counts came.
class Counts {
  public:
    Counts(const OptionalTensor& counts, int64_t num_embeddings) {
        if (!counts.has_value()) return;
        check_sizes(*counts, "counts", {num_embeddings});
        check(counts->is_cpu(), "counts must be on the CPU as the other arguments are");
        dtype_ = counts->scalar_type();
        check(dtype_ == ScalarType::Int || dtype_ == ScalarType::Long || dtype_ == ScalarType::Float ||
                  dtype_ == ScalarType::Double,
              "counts must be int32, int64, float32 or float64");
        tensor_ = counts->is_contiguous() ? *counts : torch::stable::contiguous(*counts);
    }

    double operator[](int64_t id) const {
        if (!tensor_.has_value()) return 1;
        switch (dtype_) {
            case ScalarType::Int:
                return pointer<int32_t>(tensor_)[id];
            case ScalarType::Long:
                return static_cast<double>(pointer<int64_t>(tensor_)[id]);
            case ScalarType::Float:
                return pointer<float>(tensor_)[id];
            default:
                return pointer<double>(tensor_)[id];
        }
    }

    // Throws where the count of an id of the mini-batch cannot be divided by.
    void check_positive(int64_t id) const {
        const double count = (*this)[id];
        if (!(count > 0)) check(false, "counts must be positive for every id of the mini-batch, got ", count, " for id ", id);
    }

  private:
    OptionalTensor tensor_;
    ScalarType dtype_ = ScalarType::Long;
};

struct Occurrence {
    int64_t id;
    int64_t position;  // in the mini-batch
};

// Sorts by id; equal ids keep the order of their positions. A radix sort whose passes run over blocks in parallel: a stable
// sort has one result only, whatever the number of threads.
inline void sort_by_id(std::vector<Occurrence>& occurrences, int64_t num_embeddings) {
    constexpr int kDigitBits = 11;
    constexpr int64_t kDigits = int64_t{1} << kDigitBits, kPerBlock = 1 << 14;
    const int64_t n = static_cast<int64_t>(occurrences.size());
    const int64_t blocks = divide_up(n, kPerBlock);
    std::vector<Occurrence> sorted(n);
    std::vector<std::array<int64_t, kDigits>> offsets(blocks);  // where a block's next occurrence of each digit goes
    for (int shift = 0; shift < 63 && (num_embeddings - 1) >> shift > 0; shift += kDigitBits) {
        const auto digit = [shift](const Occurrence& o) { return (o.id >> shift) & (kDigits - 1); };
        const auto for_block = [&](int64_t block, auto&& f) {
            for (int64_t i = block * kPerBlock; i < std::min(n, (block + 1) * kPerBlock); ++i) f(occurrences[i]);
        };
        parallel_tasks(blocks, [&](int64_t block) {
            offsets[block].fill(0);
            for_block(block, [&](const Occurrence& o) { ++offsets[block][digit(o)]; });
        });
        int64_t total = 0;
        for (int64_t d = 0; d < kDigits; ++d) {
            for (auto& offset : offsets) total += std::exchange(offset[d], total);
        }
        parallel_tasks(blocks, [&](int64_t block) {
            for_block(block, [&](const Occurrence& o) { sorted[offsets[block][digit(o)]++] = o; });
        });
        occurrences.swap(sorted);
    }
}

// The distinct ids with the gradient rows that fall on each. Points into grad, which the caller keeps.
template <typename T>
struct MiniBatch {
    std::vector<cpu::Segment<T>> segments;  // by ascending row
    std::vector<const T*> gradient_rows;
    std::vector<T> partial_sums;
};

template <typename T>
void set_decay(std::vector<cpu::Segment<T>>& segments, const Counts& counts, double l2) {
    constexpr int64_t kPerThread = 1 << 12;
    std::atomic<bool> positive = true;
    const auto set_range = [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
            const double count = counts[segments[s].row];
            if (!(count > 0)) positive = false;
            segments[s].decay = T(l2 / count);
        }
    };
    parallel_ranges(static_cast<int64_t>(segments.size()), set_range, kPerThread);
    if (positive) return;
    for (const auto& segment : segments) counts.check_positive(segment.row);
}

// Sums the segments that are longer than kPiece a piece at a time, and leaves the pieces' sums in place of their rows: an id
// that fills half the batch is shared by all threads, and the rounding error of its sum stays small. The pieces are the same
// whatever the number of threads.
template <typename T>
void shorten_segments(MiniBatch<T>& batch, int64_t dim) {
    constexpr int64_t kPiece = 256;
    struct Piece {
        int64_t first, count, target;  // gradient rows first .. first + count - 1; their sum replaces row target
    };
    std::vector<Piece> pieces;
    for (auto& segment : batch.segments) {
        if (segment.count <= kPiece) continue;
        int64_t target = segment.first;
        for (int64_t i = 0; i < segment.count; i += kPiece) {
            pieces.push_back({segment.first + i, std::min(kPiece, segment.count - i), target++});
        }
        segment.count = target - segment.first;
    }
    batch.partial_sums.resize(pieces.size() * dim);
    const auto sum_of = [&](int64_t piece) { return batch.partial_sums.data() + piece * dim; };
    const int64_t n = static_cast<int64_t>(pieces.size());
    cpu::with_capability([&](auto capability) {
        parallel_tasks(n, [&](int64_t p) {
            cpu::sum_gradient_rows<capability()>(batch.gradient_rows.data() + pieces[p].first, pieces[p].count, dim, sum_of(p));
        });
    });
    for (int64_t p = 0; p < n; ++p) batch.gradient_rows[pieces[p].target] = sum_of(p);
}

// Checks every value of ids [N] and the counts they meet, then groups grad [N, dim] by id. Writes nothing of the caller's.
template <typename T>
MiniBatch<T> group_by_id(const Tensor& ids, const T* grad, int64_t num_embeddings, int64_t dim, const Counts& counts, double l2,
                         std::optional<int64_t> padding_idx) {
    std::vector<Occurrence> occurrences;
    occurrences.reserve(ids.numel());
    for_each_id(ids, num_embeddings, padding_idx, [&](int64_t position, int64_t id) { occurrences.push_back({id, position}); });
    sort_by_id(occurrences, num_embeddings);

    MiniBatch<T> batch;
    batch.gradient_rows.reserve(occurrences.size());
    for (const auto& [id, position] : occurrences) {
        if (batch.segments.empty() || batch.segments.back().row != id) {
            batch.segments.push_back({id, static_cast<int64_t>(batch.gradient_rows.size()), 0, T(0)});
        }
        ++batch.segments.back().count;
        batch.gradient_rows.push_back(grad + position * dim);
    }
    set_decay(batch.segments, counts, l2);
    shorten_segments(batch, dim);
    return batch;
}

}  // namespace dien_ops::ops
