// SPDX-License-Identifier: Apache-2.0
// w_j <- w_j - lr (g_j + (l2 / n_j) w_j) for every id j of the mini-batch, once (DIN eq. 7), and the same gradient under
// momentum, Adagrad and Adam.
//
// The caller has grouped the mini-batch by id, so a segment is one row of the table with the gradient rows that fall on it.
// A thread takes a range of segments and needs no lock: no two segments share a row. For each of them
//   1. the gradient rows are summed, in the order of their positions in the batch, into a buffer (a lone one is read in place);
//   2. the decay is added;
//   3. the rule reads and writes the row of the weight and of its own state.
// Everything between 1 and 3 is one row long and stays in the first-level cache, so memory sees each gradient row read once
// and each row of the table read and written once: the least that any order of work can do. What is left is latency, since
// the rows lie anywhere in the table: the rows of the segments a few steps ahead are prefetched.
//
// The loops run over contiguous rows and are left to the compiler to vectorise.

#include "cpu/embedding.h"

#include <cmath>

#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace dien_ops::cpu {
namespace {

constexpr int64_t kSegmentsAhead = 4;

template <typename T>
void prefetch(const T* row, int64_t dim) {
    constexpr int64_t kPerCacheLine = 64 / sizeof(T);
    for (int64_t d = 0; d < dim; d += kPerCacheLine) __builtin_prefetch(row + d);
}

template <typename T>
void prefetch(const TableUpdate<T>& update, const Sgd<T>& rule, int64_t row) {
    if (rule.momentum_buffer != nullptr) prefetch(rule.momentum_buffer + row * update.dim, update.dim);
}
template <typename T>
void prefetch(const TableUpdate<T>& update, const Adagrad<T>& rule, int64_t row) {
    prefetch(rule.state_sum + row * update.dim, update.dim);
}
template <typename T>
void prefetch(const TableUpdate<T>&, const RowwiseAdagrad<T>& rule, int64_t row) {
    prefetch(rule.state_sum + row, 1);
}
template <typename T>
void prefetch(const TableUpdate<T>& update, const Adam<T>& rule, int64_t row) {
    prefetch(rule.exp_avg + row * update.dim, update.dim);
    prefetch(rule.exp_avg_sq + row * update.dim, update.dim);
    prefetch(rule.step + row, 1);
}

template <typename T>
void apply(const Sgd<T>& rule, int64_t row, int64_t dim, const T* __restrict g, T* __restrict w) {
    if (rule.momentum_buffer == nullptr) {
        for (int64_t d = 0; d < dim; ++d) w[d] -= rule.lr * g[d];
        return;
    }
    T* __restrict buffer = rule.momentum_buffer + row * dim;
    for (int64_t d = 0; d < dim; ++d) {
        buffer[d] = rule.momentum * buffer[d] + g[d];
        w[d] -= rule.lr * buffer[d];
    }
}

template <typename T>
void apply(const Adagrad<T>& rule, int64_t row, int64_t dim, const T* __restrict g, T* __restrict w) {
    T* __restrict sum = rule.state_sum + row * dim;
    for (int64_t d = 0; d < dim; ++d) {
        sum[d] += g[d] * g[d];
        w[d] -= rule.lr * g[d] / (std::sqrt(sum[d]) + rule.eps);
    }
}

template <typename T>
void apply(const RowwiseAdagrad<T>& rule, int64_t row, int64_t dim, const T* __restrict g, T* __restrict w) {
    constexpr int64_t kSize = Vec<T>::kSize;
    Vec<T> squares;
    int64_t d = 0;
    for (; d + kSize <= dim; d += kSize) squares += Vec<T>::load(g + d) * Vec<T>::load(g + d);
    T total = sum(squares);
    for (; d < dim; ++d) total += g[d] * g[d];
    rule.state_sum[row] += total / T(dim);
    const T step_size = rule.lr / (std::sqrt(rule.state_sum[row]) + rule.eps);
    for (d = 0; d < dim; ++d) w[d] -= step_size * g[d];
}

template <typename T>
void apply(const Adam<T>& rule, int64_t row, int64_t dim, const T* __restrict g, T* __restrict w) {
    T* __restrict exp_avg = rule.exp_avg + row * dim;
    T* __restrict exp_avg_sq = rule.exp_avg_sq + row * dim;
    // In double: 1 - beta2^t is 1e-3 at the first step, and float32 would keep only four digits of it.
    const double t = static_cast<double>(++rule.step[row]);
    const T step_size = T(rule.lr / (1 - std::pow(rule.beta1, t)));
    const T root_scale = T(1 / std::sqrt(1 - std::pow(rule.beta2, t)));
    const T beta1 = T(rule.beta1), beta2 = T(rule.beta2), eps = T(rule.eps);
    const T rest1 = T(1 - rule.beta1), rest2 = T(1 - rule.beta2);
    for (int64_t d = 0; d < dim; ++d) {
        exp_avg[d] = beta1 * exp_avg[d] + rest1 * g[d];
        exp_avg_sq[d] = beta2 * exp_avg_sq[d] + rest2 * g[d] * g[d];
        w[d] -= step_size * exp_avg[d] / (std::sqrt(exp_avg_sq[d]) * root_scale + eps);
    }
}

}  // namespace

template <Capability C, typename T>
void sum_gradient_rows(const T* const* rows, int64_t count, int64_t dim, T* sum) {
    std::memcpy(sum, rows[0], dim * sizeof(T));
    for (int64_t i = 1; i < count; ++i) {
        const T* __restrict row = rows[i];
        T* __restrict total = sum;
        for (int64_t d = 0; d < dim; ++d) total[d] += row[d];
    }
}

template <Capability C, typename T, template <typename> class Rule>
void update_rows(const TableUpdate<T>& update, const Rule<T>& rule, int64_t begin, int64_t end) {
    const int64_t dim = update.dim;
    const Scratch<T> gradient(dim);
    for (int64_t s = begin; s < end; ++s) {
        if (s + kSegmentsAhead < end) {
            const Segment<T>& ahead = update.segments[s + kSegmentsAhead];
            prefetch(update.weight + ahead.row * dim, dim);
            prefetch(update.gradient_rows[ahead.first], dim);
            prefetch(update, rule, ahead.row);
        }
        const Segment<T>& segment = update.segments[s];
        const T* const* rows = update.gradient_rows + segment.first;
        T* g = gradient;
        T* w = update.weight + segment.row * dim;
        const T* sum = rows[0];
        if (segment.count > 1) {
            sum_gradient_rows<C>(rows, segment.count, dim, gradient);
            sum = gradient;
        }
#pragma GCC ivdep
        for (int64_t d = 0; d < dim; ++d) g[d] = sum[d] + segment.decay * w[d];
        apply(rule, segment.row, dim, g, w);
    }
}

template void sum_gradient_rows<kCapability>(const float* const*, int64_t, int64_t, float*);
template void sum_gradient_rows<kCapability>(const double* const*, int64_t, int64_t, double*);
template void update_rows<kCapability>(const TableUpdate<float>&, const Sgd<float>&, int64_t, int64_t);
template void update_rows<kCapability>(const TableUpdate<double>&, const Sgd<double>&, int64_t, int64_t);
template void update_rows<kCapability>(const TableUpdate<float>&, const Adagrad<float>&, int64_t, int64_t);
template void update_rows<kCapability>(const TableUpdate<double>&, const Adagrad<double>&, int64_t, int64_t);
template void update_rows<kCapability>(const TableUpdate<float>&, const RowwiseAdagrad<float>&, int64_t, int64_t);
template void update_rows<kCapability>(const TableUpdate<double>&, const RowwiseAdagrad<double>&, int64_t, int64_t);
template void update_rows<kCapability>(const TableUpdate<float>&, const Adam<float>&, int64_t, int64_t);
template void update_rows<kCapability>(const TableUpdate<double>&, const Adam<double>&, int64_t, int64_t);

}  // namespace dien_ops::cpu
