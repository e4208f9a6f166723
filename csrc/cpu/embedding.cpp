// SPDX-License-Identifier: Apache-2.0
// w_j <- w_j - lr (g_j + (l2 / n_j) w_j) for every id j of the mini-batch, once (DIN eq. 7), and the same gradient under
// momentum, Adagrad and Adam.
//
// The caller has grouped the mini-batch by id, so a segment is one row of the table with the gradient rows that fall on it.
// A thread takes a range of segments and needs no lock: no two segments share a row. For each of them
//   1. the gradient rows are summed, in the order of their positions in the batch, into a buffer (those of an id that fills
//      much of the batch were summed before, by all threads);
//   2. the decay joins it;
//   3. the rule reads and writes the row of the weight and of its own state, a vector of columns at a time.
// Everything between 1 and 3 is one row long and stays in the first-level cache, so memory sees each gradient row read once
// and each row of the table read and written once: the least that any order of work can do. What is left is latency, since
// the rows lie anywhere in the table. Their pages are asked for in bursts (cpu/prefetch.h), then the rows some segments ahead,
// and gradient rows in the order in which they are summed, whatever segment they fall on.

#include "cpu/embedding.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/noise.h"
#include "cpu/prefetch.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/storage.h"

namespace dien_ops::cpu {
namespace {

constexpr int64_t kSegmentsAhead = 24, kRowsAhead = 24;
constexpr int64_t kBytesAhead = 1024;  // of a row: the processor foresees the rest
constexpr int64_t kColumnVectors = 4;

template <typename S>
int64_t columns_ahead(int64_t dim) {
    return std::min<int64_t>(dim, kBytesAhead / sizeof(S));
}

// What the rule reads of the first n columns of a row.
template <typename T>
[[gnu::always_inline]] inline void prefetch(const Sgd<T>& rule, int64_t row, int64_t dim, int64_t n) {
    if (rule.momentum_buffer != nullptr) prefetch(rule.momentum_buffer + row * dim, n);
}
template <typename T>
[[gnu::always_inline]] inline void prefetch(const Adagrad<T>& rule, int64_t row, int64_t dim, int64_t n) {
    prefetch(rule.state_sum + row * dim, n);
}
template <typename T>
[[gnu::always_inline]] inline void prefetch(const RowwiseAdagrad<T>& rule, int64_t row, int64_t, int64_t) {
    prefetch(rule.state_sum + row, 1);
}
template <typename T>
[[gnu::always_inline]] inline void prefetch(const Adam<T>& rule, int64_t row, int64_t dim, int64_t n) {
    prefetch(rule.exp_avg + row * dim, n);
    prefetch(rule.exp_avg_sq + row * dim, n);
    prefetch(rule.step + row, 1);
}

// What an update reads of the first n columns of a row.
template <typename S, typename Rule>
[[gnu::always_inline]] inline void prefetch(const TableUpdate<S>& update, const Rule& rule, int64_t row, int64_t n) {
    prefetch(update.weight + row * update.dim, n);
    prefetch(rule, row, update.dim, n);
    if (update.decayed != nullptr) prefetch(update.decayed + row, 1);
}

// sum[d ...] over kVectors vectors of columns, which stay in registers from the first row to the last. Of the last vector there
// are n columns, and zeros behind them: what is read soon after must be written in one piece. Rows are fetched ahead as far as
// positions are known, beyond `count` too; known: how many.
template <int64_t kVectors, typename S, typename T = Compute<S>>
void sum_columns(const S* rows, const int64_t* positions, int64_t count, int64_t known, int64_t dim, int64_t d, int64_t n,
                 T* sum) {
    constexpr int64_t kSize = Vec<T>::kSize;
    const auto lanes = [n](int64_t v) { return v + 1 < kVectors ? kSize : n; };
    Vec<T> sums[kVectors];
    for (int64_t i = 0; i < count; ++i) {
        if (i + kRowsAhead < known) prefetch(rows + positions[i + kRowsAhead] * dim, columns_ahead<S>(dim));
        const S* const row = rows + positions[i] * dim + d;
        for (int64_t v = 0; v < kVectors; ++v) sums[v] += load<T>(row + v * kSize, lanes(v));
    }
    for (int64_t v = 0; v < kVectors; ++v) sums[v].store(sum + d + v * kSize);
}

// A rule at work on one row: step(d, n, g) is the step of the vector of columns from d on, of which n are there, and updates
// the state. squares() is the sum of the squares of the row's g.

template <typename T>
struct SgdStep {
    template <typename Squares>
    SgdStep(const Sgd<T>& sgd, int64_t row, int64_t dim, Squares&&)
        : rule(sgd.rule), buffer(sgd.momentum_buffer == nullptr ? nullptr : sgd.momentum_buffer + row * dim) {}
    Vec<T> operator()(int64_t d, int64_t n, Vec<T> g) const {
        if (buffer == nullptr) return rule.step(g);
        Vec<T> b = Vec<T>::load(buffer + d, n);
        const Vec<T> step = rule.step(g, b);
        b.store(buffer + d, n);
        return step;
    }
    SgdRule<T> rule;
    T* buffer;
};

template <typename T>
struct AdagradStep {
    template <typename Squares>
    AdagradStep(const Adagrad<T>& adagrad, int64_t row, int64_t dim, Squares&&)
        : rule(adagrad.rule), sums(adagrad.state_sum + row * dim) {}
    Vec<T> operator()(int64_t d, int64_t n, Vec<T> g) const {
        Vec<T> sum = Vec<T>::load(sums + d, n);
        const Vec<T> step = rule.step(g, sum);
        sum.store(sums + d, n);
        return step;
    }
    AdagradRule<T> rule;
    T* sums;
};

template <typename T>
struct RowwiseAdagradStep {
    template <typename Squares>
    RowwiseAdagradStep(const RowwiseAdagrad<T>& adagrad, int64_t row, int64_t dim, Squares&& squares)
        : step_size(adagrad.rule.step_size(squares() / T(dim), adagrad.state_sum[row])) {}
    Vec<T> operator()(int64_t, int64_t, Vec<T> g) const { return Vec<T>(step_size) * g; }
    T step_size;
};

template <typename T>
struct AdamStep {
    template <typename Squares>
    AdamStep(const Adam<T>& adam, int64_t row, int64_t dim, Squares&&)
        : rule(of_row(adam, row)), exp_avgs(adam.exp_avg + row * dim), exp_avg_sqs(adam.exp_avg_sq + row * dim) {}
    Vec<T> operator()(int64_t d, int64_t n, Vec<T> g) const {
        Vec<T> exp_avg = Vec<T>::load(exp_avgs + d, n), exp_avg_sq = Vec<T>::load(exp_avg_sqs + d, n);
        const Vec<T> step = rule.step(g, exp_avg, exp_avg_sq);
        exp_avg.store(exp_avgs + d, n);
        exp_avg_sq.store(exp_avg_sqs + d, n);
        return step;
    }
    // 1 - beta^t = -expm1(t log(beta)), in double: at the first step it is 1e-3 for beta2.
    static AdamRow<T> of_row(const Adam<T>& adam, int64_t row) {
        const double t = static_cast<double>(++adam.step[row]);
        Vec<double> exponents;
        exponents.v[0] = t * adam.rule.log_beta1;
        exponents.v[1] = t * adam.rule.log_beta2;
        const Vec<double> corrections = -expm1(exponents);
        return {adam.rule, corrections.v[0], corrections.v[1]};
    }
    AdamRow<T> rule;
    T *exp_avgs, *exp_avg_sqs;
};

template <typename T>
SgdStep<T> step_of(const Sgd<T>&);
template <typename T>
AdagradStep<T> step_of(const Adagrad<T>&);
template <typename T>
RowwiseAdagradStep<T> step_of(const RowwiseAdagrad<T>&);
template <typename T>
AdamStep<T> step_of(const Adam<T>&);

// w <- kept w - step(g + coupled w) for the row w [D]. g: the summed gradient, written by whole vectors.
template <typename S, typename Rule, typename Store, typename T = Compute<S>>
void update_row(const Rule& rule, int64_t row, int64_t dim, RowDecay<T> decay, const T* g, S* w, Store&& store_weights) {
    const auto gradient = [&](int64_t d, Vec<T> x) {
        const Vec<T> summed = Vec<T>::load(g + d);
        return decay.coupled == 0 ? summed : summed + Vec<T>(decay.coupled) * x;
    };
    const auto squares = [&] {
        Vec<T> sums;
        for_vectors<T>(dim, [&](int64_t d, int64_t n) {
            const Vec<T> of_column = gradient(d, load<T>(w + d, n));
            sums += of_column * of_column;
        });
        return sum(sums);
    };
    const decltype(step_of(rule)) step(rule, row, dim, squares);
    for_vectors<T>(dim, [&](int64_t d, int64_t n) {
        const Vec<T> x = load<T>(w + d, n);
        store_weights(Vec<T>(decay.kept) * x - step(d, n, gradient(d, x)), d, n);
    });
}

}  // namespace

template <Capability C, typename S>
void sum_rows(const S* rows, const int64_t* positions, int64_t count, int64_t known, int64_t dim, Compute<S>* sum) {
    constexpr int64_t kSize = Vec<Compute<S>>::kSize;
    for (int64_t d = 0; d < dim; d += kColumnVectors * kSize) {
        const int64_t columns = std::min(dim - d, kColumnVectors * kSize);
        const int64_t n = (columns - 1) % kSize + 1;   // in the last vector
        const int64_t fetchable = d == 0 ? known : 0;  // the first pass fetches for all
        switch ((columns + kSize - 1) / kSize) {
            case 1:
                sum_columns<1>(rows, positions, count, fetchable, dim, d, n, sum);
                break;
            case 2:
                sum_columns<2>(rows, positions, count, fetchable, dim, d, n, sum);
                break;
            case 3:
                sum_columns<3>(rows, positions, count, fetchable, dim, d, n, sum);
                break;
            default:
                sum_columns<kColumnVectors>(rows, positions, count, fetchable, dim, d, n, sum);
        }
    }
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
    constexpr bool k16Bits = !std::is_same_v<S, T>;
    const int64_t dim = update.dim;
    const Scratch<T> gradient(padded(dim));
    T* const g = gradient;
    const bool noisy = k16Bits && update.stochastic;
    Noise noise(update.seed, noisy ? dim : 0);
    int64_t l = 0;
    while (l < update.num_summed && update.summed[l] < begin) ++l;
    for (int64_t s = begin; s < end; ++s) {
        prefetch_ahead(s, begin, end, [&](int64_t ahead) __attribute__((always_inline)) {  // the pages alone
            prefetch(update, rule, update.segments[ahead].row, std::min<int64_t>(dim, 1));
        });
        if (s + kSegmentsAhead < end) {
            const Segment<T>& ahead = update.segments[s + kSegmentsAhead];
            prefetch(update, rule, ahead.row, columns_ahead<S>(dim));
        }
        const Segment<T>& segment = update.segments[s];
        if (l < update.num_summed && update.summed[l] == s) {
            std::memcpy(g, update.sums + l++ * padded(dim), padded(dim) * sizeof(T));
        } else {
            const int64_t count = update.segments[s + 1].first - segment.first;
            const int64_t known = update.segments[end].first - segment.first;
            sum_rows<C>(update.grads, update.positions + segment.first, count, known, dim, g);
        }
        if (update.grad_scale != 1) {
            for_vectors<T>(dim, [&](int64_t d, int64_t) { (Vec<T>::load(g + d) / Vec<T>(update.grad_scale)).store(g + d); });
        }
        const int64_t place = (s - begin) % noise.rows();
        if (noisy && place == 0) {
            const int64_t count = end - s < noise.rows() ? end - s : noise.rows();
            noise.make(count, [&](int64_t i) { return update.segments[s + i].row; });
        }
        S* const w = update.weight + segment.row * dim;
        update_row(rule, segment.row, dim, segment.decay, g, w, [&](Vec<T> x, int64_t d, int64_t n) {
            if constexpr (k16Bits) {
                if (noisy) return store_with_noise(x, w + d, n, noise.of(place) + d / 2);
            }
            store(x, w + d, n);
        });
        if (update.decayed != nullptr) update.decayed[segment.row] = update.log_decay;
    }
}

#define DIEN_OPS_INSTANTIATE(S)                                                                                         \
    template void update_rows<kCapability>(const TableUpdate<S>&, const Sgd<Compute<S>>&, int64_t, int64_t);            \
    template void update_rows<kCapability>(const TableUpdate<S>&, const Adagrad<Compute<S>>&, int64_t, int64_t);        \
    template void update_rows<kCapability>(const TableUpdate<S>&, const RowwiseAdagrad<Compute<S>>&, int64_t, int64_t); \
    template void update_rows<kCapability>(const TableUpdate<S>&, const Adam<Compute<S>>&, int64_t, int64_t);           \
    template void sum_rows<kCapability>(const S*, const int64_t*, int64_t, int64_t, int64_t, Compute<S>*);              \
    template bool all_finite<kCapability>(const S*, int64_t);

DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
