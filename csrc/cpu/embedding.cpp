// SPDX-License-Identifier: Apache-2.0
// w_j <- w_j - lr (g_j + (l2 / n_j) w_j) for every id j of the mini-batch, once (DIN eq. 7), and the same gradient under
// momentum, Adagrad and Adam.
//
// The caller has grouped the mini-batch by id, so a segment is one row of the table with the gradient rows that fall on it.
// A thread takes a range of segments and needs no lock: no two segments share a row. For each of them
//   1. the gradient rows are summed, in the order of their positions in the batch, into a buffer (those of an id that fills
//      much of the batch were summed before, by all threads);
//   2. the decay is added;
//   3. the rule reads and writes the row of the weight and of its own state. Weights of 16 bits pass through a second buffer.
// Everything between 1 and 3 is one row long and stays in the first-level cache, so memory sees each gradient row read once
// and each row of the table read and written once: the least that any order of work can do. What is left is latency, since
// the rows lie anywhere in the table: the rows of the segments a few steps ahead are prefetched.
//
// The rules' loops run over contiguous rows and are left to the compiler to vectorise.

#include "cpu/embedding.h"

#include <cmath>

#include "cpu/noise.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/storage.h"

namespace dien_ops::cpu {
namespace {

constexpr int64_t kSegmentsAhead = 8, kRowsAhead = 8;  // more gains nothing, 4 loses a tenth
constexpr int64_t kColumnVectors = 4;

template <typename S>
void prefetch(const S* row, int64_t dim) {
    constexpr int64_t kPerCacheLine = 64 / sizeof(S);
    for (int64_t d = 0; d < dim; d += kPerCacheLine) __builtin_prefetch(row + d);
}

template <typename T>
void prefetch(const Sgd<T>& rule, int64_t row, int64_t dim) {
    if (rule.momentum_buffer != nullptr) prefetch(rule.momentum_buffer + row * dim, dim);
}
template <typename T>
void prefetch(const Adagrad<T>& rule, int64_t row, int64_t dim) {
    prefetch(rule.state_sum + row * dim, dim);
}
template <typename T>
void prefetch(const RowwiseAdagrad<T>& rule, int64_t row, int64_t) {
    prefetch(rule.state_sum + row, 1);
}
template <typename T>
void prefetch(const Adam<T>& rule, int64_t row, int64_t dim) {
    prefetch(rule.exp_avg + row * dim, dim);
    prefetch(rule.exp_avg_sq + row * dim, dim);
    prefetch(rule.step + row, 1);
}

// sum[d ...] over kVectors vectors of columns, which stay in registers from the first row to the last; of the last vector only
// the first n lanes.
template <int64_t kVectors, typename S, typename T = Compute<S>>
void sum_columns(const S* rows, const int64_t* positions, int64_t count, int64_t dim, int64_t d, int64_t n, T* sum) {
    constexpr int64_t kSize = Vec<T>::kSize;
    const auto lanes = [n](int64_t v) { return v + 1 < kVectors ? kSize : n; };
    const auto row = [&](int64_t i) { return rows + positions[i] * dim + d; };
    Vec<T> sums[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) sums[v] = load<T>(row(0) + v * kSize, lanes(v));
    for (int64_t i = 1; i < count; ++i) {
        if (i + kRowsAhead < count) prefetch(row(i + kRowsAhead), kVectors * kSize);
        for (int64_t v = 0; v < kVectors; ++v) sums[v] += load<T>(row(i) + v * kSize, lanes(v));
    }
    for (int64_t v = 0; v < kVectors; ++v) sums[v].store(sum + d + v * kSize, lanes(v));
}

// What the rules' loops go over is written by nobody else, which the compiler cannot know.
template <typename T>
void add_decay(T coupled, const T* __restrict w, int64_t dim, T* __restrict g) {
    if (coupled == 0) return;
    for (int64_t d = 0; d < dim; ++d) g[d] += coupled * w[d];
}

template <typename T>
void apply(const Sgd<T>& sgd, int64_t row, int64_t dim, T kept, const T* __restrict g, T* __restrict w) {
    if (sgd.momentum_buffer == nullptr) {
        for (int64_t d = 0; d < dim; ++d) w[d] = kept * w[d] - sgd.rule.step(g[d]);
        return;
    }
    T* __restrict buffer = sgd.momentum_buffer + row * dim;
    for (int64_t d = 0; d < dim; ++d) w[d] = kept * w[d] - sgd.rule.step(g[d], buffer[d]);
}

template <typename T>
void apply(const Adagrad<T>& adagrad, int64_t row, int64_t dim, T kept, const T* __restrict g, T* __restrict w) {
    T* __restrict sum = adagrad.state_sum + row * dim;
    for (int64_t d = 0; d < dim; ++d) w[d] = kept * w[d] - adagrad.rule.step(g[d], sum[d]);
}

template <typename T>
void apply(const RowwiseAdagrad<T>& adagrad, int64_t row, int64_t dim, T kept, const T* __restrict g, T* __restrict w) {
    constexpr int64_t kSize = Vec<T>::kSize;
    Vec<T> squares;
    int64_t d = 0;
    for (; d + kSize <= dim; d += kSize) squares += Vec<T>::load(g + d) * Vec<T>::load(g + d);
    T total = sum(squares);
    for (; d < dim; ++d) total += g[d] * g[d];
    const T step_size = adagrad.rule.step_size(total / T(dim), adagrad.state_sum[row]);
    for (d = 0; d < dim; ++d) w[d] = kept * w[d] - step_size * g[d];
}

template <typename T>
void apply(const Adam<T>& adam, int64_t row, int64_t dim, T kept, const T* __restrict g, T* __restrict w) {
    T* __restrict exp_avg = adam.exp_avg + row * dim;
    T* __restrict exp_avg_sq = adam.exp_avg_sq + row * dim;
    // 1 - beta^t = -expm1(t log(beta)), in double: at the first step it is 1e-3 for beta2.
    const double t = static_cast<double>(++adam.step[row]);
    Vec<double> exponents;
    exponents.v[0] = t * adam.rule.log_beta1;
    exponents.v[1] = t * adam.rule.log_beta2;
    const Vec<double> corrections = -expm1(exponents);
    const AdamRow<T> rule(adam.rule, corrections.v[0], corrections.v[1]);
    for (int64_t d = 0; d < dim; ++d) w[d] = kept * w[d] - rule.step(g[d], exp_avg[d], exp_avg_sq[d]);
}

// The weights of one row as what is computed in, from memory and back.
template <typename T, typename S>
void widen_row(const S* row, int64_t dim, T* wide) {
    for (int64_t d = 0; d < dim; d += Vec<T>::kSize) {
        const int64_t n = dim - d < Vec<T>::kSize ? dim - d : Vec<T>::kSize;
        load<T>(row + d, n).store(wide + d, n);
    }
}

// noise: null to round to the nearest.
template <typename T, typename S>
void store_row(const T* wide, int64_t dim, const uint16_t* noise, S* row) {
    for (int64_t d = 0; d < dim; d += Vec<T>::kSize) {
        const int64_t n = dim - d < Vec<T>::kSize ? dim - d : Vec<T>::kSize;
        const Vec<T> x = Vec<T>::load(wide + d, n);
        noise == nullptr ? store(x, row + d, n) : store_with_noise(x, row + d, n, noise + d);
    }
}

}  // namespace

template <Capability C, typename S>
void sum_rows(const S* rows, const int64_t* positions, int64_t count, int64_t dim, Compute<S>* sum) {
    constexpr int64_t kSize = Vec<Compute<S>>::kSize;
    int64_t d = 0;
    for (; d + kColumnVectors * kSize <= dim; d += kColumnVectors * kSize) {
        sum_columns<kColumnVectors>(rows, positions, count, dim, d, kSize, sum);
    }
    for (; d < dim; d += kSize) sum_columns<1>(rows, positions, count, dim, d, dim - d < kSize ? dim - d : kSize, sum);
}

template <Capability C, typename S>
bool all_finite(const S* numbers, int64_t n) {
    using T = Compute<S>;
    constexpr int64_t kSize = Vec<T>::kSize;
    Vec<T> zeros[kColumnVectors];  // x - x is NaN where x is not finite, and so is any sum with it
    int64_t i = 0;
    for (; i + kColumnVectors * kSize <= n; i += kColumnVectors * kSize) {
        for (int64_t v = 0; v < kColumnVectors; ++v) {
            const Vec<T> x = load<T>(numbers + i + v * kSize, kSize);
            zeros[v] += x - x;
        }
    }
    for (; i < n; i += kSize) {
        const Vec<T> x = load<T>(numbers + i, n - i < kSize ? n - i : kSize);
        zeros[0] += x - x;
    }
    for (int64_t v = 1; v < kColumnVectors; ++v) zeros[0] += zeros[v];
    return sum(zeros[0]) == 0;
}

template <Capability C, typename S, template <typename> class Rule>
void update_rows(const TableUpdate<S>& update, const Rule<Compute<S>>& rule, int64_t begin, int64_t end) {
    using T = Compute<S>;
    constexpr bool kWide = !std::is_same_v<S, T>;
    const int64_t dim = update.dim;
    const Scratch<T> gradient(dim), wide(kWide ? dim : 0);
    T* const g = gradient;
    const bool noisy = kWide && update.stochastic;
    Noise noise(update.seed, noisy ? dim : 0);
    int64_t l = 0;
    while (l < update.num_summed && update.summed[l] < begin) ++l;
    for (int64_t s = begin; s < end; ++s) {
        if (s + kSegmentsAhead < end) {
            const Segment<T>& ahead = update.segments[s + kSegmentsAhead];
            prefetch(update.weight + ahead.row * dim, dim);
            prefetch(update.grads + update.positions[ahead.first] * dim, dim);
            prefetch(rule, ahead.row, dim);
            if (update.decayed != nullptr) prefetch(update.decayed + ahead.row, 1);
        }
        const Segment<T>& segment = update.segments[s];
        if (l < update.num_summed && update.summed[l] == s) {
            std::memcpy(g, update.sums + l++ * dim, dim * sizeof(T));
        } else {
            const int64_t count = update.segments[s + 1].first - segment.first;
            sum_rows<C>(update.grads, update.positions + segment.first, count, dim, g);
        }
        if (update.grad_scale != 1) {
            for (int64_t d = 0; d < dim; ++d) g[d] /= update.grad_scale;
        }
        S* const row = update.weight + segment.row * dim;
        T* w;
        if constexpr (kWide) {
            w = wide;
            widen_row(row, dim, w);
        } else {
            w = row;
        }
        add_decay(segment.decay.coupled, w, dim, g);
        apply(rule, segment.row, dim, segment.decay.kept, g, w);
        if constexpr (kWide) {
            const int64_t place = (s - begin) % noise.rows();
            if (noisy && place == 0) {
                const int64_t count = end - s < noise.rows() ? end - s : noise.rows();
                noise.make(count, [&](int64_t i) { return update.segments[s + i].row; });
            }
            store_row(w, dim, noisy ? noise.of(place) : nullptr, row);
        }
        if (update.decayed != nullptr) update.decayed[segment.row] = update.log_decay;
    }
}

#define DIEN_OPS_INSTANTIATE(S)                                                                                         \
    template void update_rows<kCapability>(const TableUpdate<S>&, const Sgd<Compute<S>>&, int64_t, int64_t);            \
    template void update_rows<kCapability>(const TableUpdate<S>&, const Adagrad<Compute<S>>&, int64_t, int64_t);        \
    template void update_rows<kCapability>(const TableUpdate<S>&, const RowwiseAdagrad<Compute<S>>&, int64_t, int64_t); \
    template void update_rows<kCapability>(const TableUpdate<S>&, const Adam<Compute<S>>&, int64_t, int64_t);           \
    template void sum_rows<kCapability>(const S*, const int64_t*, int64_t, int64_t, Compute<S>*);                       \
    template bool all_finite<kCapability>(const S*, int64_t);

DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
