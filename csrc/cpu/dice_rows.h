// SPDX-License-Identifier: Apache-2.0
// Dice over some rows of a [N, C] matrix: the loops that the dice column and the activation unit share.
//
// Rows are stored in any format S and computed in T = Compute<S>, in which columns, statistics and sums of kRowsPerSum rows
// are. A row is taken kVecs vectors at a time (vecs.h); each loop is one function without calls (gnu::flatten), for what is
// handed to a call goes through memory.
//
// Sums over rows run down the columns, in registers. They are taken in T over at most kRowsPerSum rows and continued in double,
// so their error does not grow with the number of rows. Each call serves one thread's rows; the callers add the partial results
// up in a fixed order.
//
// Where C is no multiple of the vector, the last vector is moved left until it fits, which is cheaper than a masked access:
// some columns are computed twice, with the same result. So input and output may be the same memory only where C is a multiple.
#pragma once

#include "common/dice.h"
#include "cpu/vecs.h"

namespace dien_ops::cpu {
namespace {

constexpr int64_t kRowsPerSum = 64;

// Calls f.template operator()<vectors>(first, lanes, fresh) for tiles of columns that together cover 0..C-1: `vectors` vectors
// from column `first` on, with all lanes unless C is less than a vector. Columns below `fresh` were in an earlier tile.
template <typename T, int kWide, typename F>
void for_column_tiles(int64_t C, F&& f) {
    constexpr int64_t kSize = Vec<T>::kSize;
    int64_t c = 0;
    for (; c + kWide * kSize <= C; c += kWide * kSize) f.template operator()<kWide>(c, kSize, c);
    for (; c + kSize <= C; c += kSize) f.template operator()<1>(c, kSize, c);
    if (c == C) return;
    if (C > kSize) {
        f.template operator()<1>(C - kSize, kSize, c);
    } else {
        f.template operator()<1>(0, C, 0);
    }
}

// sums[k][c] += the sum over r of the k-th term, for k < kSums. term.template operator()<kVectors>(r, c, columns, terms) gives
// those of row r for so many columns from c on.
template <int kSums, int kWide, typename T, typename F>
void add_term_sums(int64_t rows, int64_t C, double* sums, const F& term) {
    constexpr int64_t kSize = Vec<T>::kSize;
    for (int64_t begin = 0; begin < rows; begin += kRowsPerSum) {
        const int64_t end = rows - begin < kRowsPerSum ? rows : begin + kRowsPerSum;
        for_column_tiles<T, kWide>(C, [&]<int kVectors>(int64_t first, int64_t lanes, int64_t fresh) {
            using V = Vecs<T, kVectors>;
            const int64_t columns = (kVectors - 1) * kSize + lanes;
            V total[kSums];
            for (int64_t r = begin; r < end; ++r) {
                V terms[kSums];
                term.template operator()<kVectors>(r, first, columns, terms);
                for (int k = 0; k < kSums; ++k) total[k] += terms[k];
            }
            for (int k = 0; k < kSums; ++k) {
                T sum[V::kSize];
                total[k].store(sum, V::kSize);
                double* const to = sums + k * C + first;
                for (int64_t i = fresh - first; i < columns; ++i) to[i] += sum[i];
            }
        });
    }
}

// The same of terms that are made a vector at a time, by term(r, c, lanes, terms).
template <int kSums, int kWide, typename T, typename F>
void add_column_sums(int64_t rows, int64_t C, double* sums, const F& term) {
    add_term_sums<kSums, kWide, T>(rows, C, sums, [&]<int kVectors>(int64_t r, int64_t c, int64_t n, Vecs<T, kVectors>* terms) {
        constexpr int64_t kSize = Vec<T>::kSize;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            Vec<T> of_vector[kSums];
            term(r, c + v * kSize, n - v * kSize < kSize ? n - v * kSize : kSize, of_vector);
            for (int k = 0; k < kSums; ++k) terms[k].v[v] = of_vector[k];
        }
    });
}

// Count, mean and sum of squared deviations of C columns.
struct Moments {
    double* data;  // [1 + 2 C], starts as zeros
    int64_t C;

    double& count() const { return data[0]; }
    double* mean() const { return data + 1; }
    double* deviation() const { return data + 1 + C; }

    // Joins n values of each column from `first` on to the count() that they stand for: those of other_mean and
    // other_deviation, in their order. count() itself stays.
    void merge_columns(int64_t first, int64_t columns, double n, const double* other_mean,
                       const double* other_deviation) const {
        const DiceJoin join(count(), n);
        double* const means = mean() + first;
        double* const deviations = deviation() + first;
#pragma GCC ivdep
        for (int64_t c = 0; c < columns; ++c) join(means[c], deviations[c], other_mean[c], other_deviation[c]);
    }
    void merge(double n, const double* other_mean, const double* other_deviation) const {
        if (n == 0) return;
        merge_columns(0, C, n, other_mean, other_deviation);
        count() += n;
    }
    void merge(const Moments& other) const { merge(other.count(), other.mean(), other.deviation()); }
};

// Adds the rows of x [rows, C] to m. The sums of a run of rows are taken of the distances from its first row: a large mean
// costs no precision, and as that row is one of the values, the squares exceed the deviation by a factor of kRowsPerSum at the
// most.
template <typename S>
[[gnu::flatten]] void add_moments(const S* x, int64_t stride, int64_t rows, const Moments& m) {
    using T = Compute<S>;
    constexpr int64_t kSize = Vec<T>::kSize;
    for (; rows > 0; x += kRowsPerSum * stride, rows -= kRowsPerSum) {
        const int64_t run = rows < kRowsPerSum ? rows : kRowsPerSum;
        const double share = 1 / double(run);
        for_column_tiles<T, kVecs>(m.C, [&]<int kVectors>(int64_t first, int64_t lanes, int64_t fresh) {
            using V = Vecs<T, kVectors>;
            const int64_t columns = (kVectors - 1) * kSize + lanes;
            const V pivots = V::load(x + first, columns);
            V sums, squares;
            for (int64_t r = 1; r < run; ++r) {
                const V d = V::load(x + r * stride + first, columns) - pivots;
                sums += d;
                squares += d * d;
            }
            T pivot[V::kSize], sum[V::kSize], square[V::kSize];
            pivots.store(pivot, V::kSize), sums.store(sum, V::kSize), squares.store(square, V::kSize);
            double mean[V::kSize], deviation[V::kSize];
            for (int64_t i = 0; i < V::kSize; ++i) {
                const double offset = sum[i] * share, d = square[i] - sum[i] * offset;
                mean[i] = pivot[i] + offset;
                deviation[i] = d < 0 ? 0 : d;
            }
            m.merge_columns(fresh, first + columns - fresh, double(run), mean + fresh - first, deviation + fresh - first);
        });
        m.count() += double(run);
    }
}

// The batch's mean and (biased) variance; 0 where there are no rows.
template <typename T>
void finish_moments(const Moments& m, T* mean, T* var) {
    for (int64_t c = 0; c < m.C; ++c) {
        mean[c] = T(m.mean()[c]);
        var[c] = m.count() > 0 ? T(m.deviation()[c] / m.count()) : T(0);
    }
}

// What the loops need to know of each column.
template <typename T>
struct DiceColumns {
    const T* mean;   // [C] E
    const T* scale;  // [C] weight / divisor(Var)
    const T* bias;   // [C]
    const T* alpha;  // [C]
};

template <typename T>
T dice_scale(T weight, T var, const DiceEps& eps) {
    return T(weight / eps.divisor(var));
}

// Fills the first C columns of data [4, width]. weight and bias may be null.
template <typename T>
void fill_dice_columns(const T* mean, const T* var, const T* weight, const T* bias, const T* alpha, const DiceEps& eps,
                       int64_t C, int64_t width, T* data) {
    for (int64_t c = 0; c < C; ++c) {
        data[c] = mean[c];
        data[width + c] = dice_scale(weight != nullptr ? weight[c] : T(1), var[c], eps);
        data[2 * width + c] = bias != nullptr ? bias[c] : T(0);
        data[3 * width + c] = alpha[c];
    }
}

template <typename T>
DiceColumns<T> dice_columns(const T* data, int64_t C) {
    return {data, data + C, data + 2 * C, data + 3 * C};
}

// Some values of a row with all that belongs to them: `columns` of them from column c on.
template <typename T, int kVectors>
struct DiceLanes {
    using V = Vecs<T, kVectors>;
    V s, scale, alpha, centered, p;

    template <typename S>
    DiceLanes(const DiceColumns<T>& of, const S* x, int64_t c, int64_t columns)
        : s(V::load(x + c, columns)),
          scale(V::load(of.scale + c, columns)),
          alpha(V::load(of.alpha + c, columns)),
          centered(s - V::load(of.mean + c, columns)),
          p(sigmoid(scale * centered + V::load(of.bias + c, columns))) {}
};

// Calls f.template operator()<vectors>(r, c, columns) for parts of rows that together cover them all, row after row.
template <typename T, int kWide, typename F>
void for_row_tiles(int64_t rows, int64_t C, F&& f) {
    for (int64_t r = 0; r < rows; ++r) {
        for_column_tiles<T, kWide>(C, [&]<int kVectors>(int64_t c, int64_t lanes, int64_t) {
            f.template operator()<kVectors>(r, c, (kVectors - 1) * Vec<T>::kSize + lanes);
        });
    }
}

// y = f(x), both [rows, C] with row strides
template <typename T, typename S>
[[gnu::flatten]] void dice_rows(const DiceColumns<T>& columns, const S* x, int64_t stride_x, S* y, int64_t stride_y,
                                int64_t rows, int64_t C) {
    for_row_tiles<T, kVecs>(rows, C, [&]<int kVectors>(int64_t r, int64_t c, int64_t n) {
        const DiceLanes<T, kVectors> d(columns, x + r * stride_x, c, n);
        dice_value(d.s, d.p, d.alpha).store(y + r * stride_y + c, n);
    });
}

// Adds to sums [3, C]: the gradient of alpha; the sum of g_logit, the gradient of weight x + bias; the sum of g_logit (s - E).
template <typename T, typename S>
[[gnu::flatten]] void add_dice_sums(const DiceColumns<T>& columns, const S* x, int64_t stride_x, const S* g, int64_t stride_g,
                                    int64_t rows, int64_t C, double* sums) {
    add_term_sums<3, kVecs, T>(rows, C, sums, [&]<int kVectors>(int64_t r, int64_t c, int64_t n, Vecs<T, kVectors>* terms) {
        const DiceLanes<T, kVectors> d(columns, x + r * stride_x, c, n);
        const auto grad = Vecs<T, kVectors>::load(g + r * stride_g + c, n);
        terms[0] = grad * dice_slope_of_alpha(d.s, d.p);
        terms[1] = dice_logit_gradient(grad, d.s, d.p, d.alpha);
        terms[2] = terms[1] * d.centered;
    });
}

// The part of the gradient that goes through batch statistics; null pointers where these are fixed. See common/dice.h.
template <typename T>
struct DiceFeedback {
    const T* mean_g_logit;  // [C]
    const T* pull;          // [C]
};

// Fills the first C columns of data [2, width] from the sums [3, C] over all `count` rows.
template <typename T>
void fill_dice_feedback(const double* sums, double count, const T* var, const T* scale, const DiceEps& eps, int64_t C,
                        int64_t width, T* data) {
    for (int64_t c = 0; c < C; ++c) {
        data[c] = count > 0 ? T(sums[C + c] / count) : T(0);
        data[width + c] = count > 0 ? T(eps.pull(scale[c], var[c], sums[2 * C + c] / count)) : T(0);
    }
}

template <typename T>
void fill_dice_feedback(const double* sums, double count, const T* var, const T* scale, const DiceEps& eps, int64_t C,
                        T* data) {
    fill_dice_feedback(sums, count, var, scale, eps, C, C, data);
}

template <typename T>
DiceFeedback<T> dice_feedback(const T* data, int64_t C) {
    return {data, data + C};
}

// The gradient of x, from that of y
template <typename T, typename S>
[[gnu::flatten]] void dice_gradient_rows(const DiceColumns<T>& columns, const DiceFeedback<T>& feedback, const S* x,
                                         int64_t stride_x, const S* g, int64_t stride_g, S* grad_x, int64_t stride_grad_x,
                                         int64_t rows, int64_t C) {
    for_row_tiles<T, kVecs>(rows, C, [&]<int kVectors>(int64_t r, int64_t c, int64_t n) {
        using V = Vecs<T, kVectors>;
        const DiceLanes<T, kVectors> d(columns, x + r * stride_x, c, n);
        const V grad = V::load(g + r * stride_g + c, n), g_logit = dice_logit_gradient(grad, d.s, d.p, d.alpha);
        const V mean_g_logit = feedback.pull ? V::load(feedback.mean_g_logit + c, n) : V();
        const V pull = feedback.pull ? V::load(feedback.pull + c, n) : V();
        dice_gradient(grad, g_logit, d.p, d.alpha, d.scale, d.centered, mean_g_logit, pull)
            .store(grad_x + r * stride_grad_x + c, n);
    });
}

}  // namespace
}  // namespace dien_ops::cpu
