// SPDX-License-Identifier: Apache-2.0
// w_j <- w_j - lr (g_j + (l2 / n_j) w_j) for every id j of the mini-batch, once (DIN eq. 7), and the same gradient under
// momentum, Adagrad and Adam.
//
// The caller has grouped the mini-batch by id, so a segment is one row of the table with the gradient rows that fall on it.
// A thread takes a range of segments and needs no lock: no two segments share a row. For each of them
//   1. the gradient rows are summed, in the order of their positions in the batch, into a buffer;
//   2. the decay is added;
//   3. the rule reads and writes the row of the weight and of its own state.
// Everything between 1 and 3 is one row long and stays in the first-level cache, so memory sees each gradient row read once
// and each row of the table read and written once: the least that any order of work can do. What is left is latency, since
// the rows lie anywhere in the table: the rows of the segments a few steps ahead are prefetched.
//
// The rules' loops run over contiguous rows and are left to the compiler to vectorise.

#include "cpu/embedding.h"

#include <cmath>

#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace dien_ops::cpu {
namespace {

constexpr int64_t kSegmentsAhead = 8, kRowsAhead = 8;  // more gains nothing, 4 loses a tenth
constexpr int64_t kColumnVectors = 4;

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

// sum[d ...] over kVectors vectors of columns, which stay in registers from the first row to the last.
template <int64_t kVectors, typename T>
void sum_columns(const T* const* rows, int64_t count, int64_t d, T* sum) {
    Vec<T> sums[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) sums[v] = Vec<T>::load(rows[0] + d + v * Vec<T>::kSize);
    for (int64_t i = 1; i < count; ++i) {
        if (i + kRowsAhead < count) prefetch(rows[i + kRowsAhead] + d, kVectors * Vec<T>::kSize);
        for (int64_t v = 0; v < kVectors; ++v) sums[v] += Vec<T>::load(rows[i] + d + v * Vec<T>::kSize);
    }
    for (int64_t v = 0; v < kVectors; ++v) sums[v].store(sum + d + v * Vec<T>::kSize);
}

template <typename T>
void add_decay(T decay, const T* __restrict w, int64_t dim, T* __restrict g) {
    for (int64_t d = 0; d < dim; ++d) g[d] += decay * w[d];
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
    // 1 - beta^t = -expm1(t log(beta)), in double: at the first step it is 1e-3 for beta2.
    Vec<double> exponents;
    const double t = static_cast<double>(++rule.step[row]);
    exponents.v[0] = t * rule.log_beta1;
    exponents.v[1] = t * rule.log_beta2;
    const Vec<double> corrections = -expm1(exponents);
    const T step_size = T(rule.lr / corrections.v[0]);
    const T root_scale = T(1 / std::sqrt(corrections.v[1]));
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
    int64_t d = 0;
    for (; d + kColumnVectors * Vec<T>::kSize <= dim; d += kColumnVectors * Vec<T>::kSize) {
        sum_columns<kColumnVectors>(rows, count, d, sum);
    }
    for (; d + Vec<T>::kSize <= dim; d += Vec<T>::kSize) sum_columns<1>(rows, count, d, sum);
    for (; d < dim; ++d) {
        sum[d] = rows[0][d];
        for (int64_t i = 1; i < count; ++i) sum[d] += rows[i][d];
    }
}

template <Capability C, typename T, template <typename> class Rule>
void update_rows(const TableUpdate<T>& update, const Rule<T>& rule, int64_t begin, int64_t end) {
    const int64_t dim = update.dim;
    const Scratch<T> buffer(dim);
    T* const g = buffer;
    for (int64_t s = begin; s < end; ++s) {
        if (s + kSegmentsAhead < end) {
            const Segment<T>& ahead = update.segments[s + kSegmentsAhead];
            prefetch(update.weight + ahead.row * dim, dim);
            prefetch(update.gradient_rows[ahead.first], dim);
            prefetch(update, rule, ahead.row);
        }
        const Segment<T>& segment = update.segments[s];
        T* w = update.weight + segment.row * dim;
        sum_gradient_rows<C>(update.gradient_rows + segment.first, segment.count, dim, g);
        add_decay(segment.decay, w, dim, g);
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
