// SPDX-License-Identifier: Apache-2.0
// Dice over some rows of a [N, C] matrix: the loops that the dice column and the activation unit share.
//
// Sums over rows run down the columns, four vectors of columns at a time, in registers. They are taken in T over at most
// kRowsPerSum rows and continued in double, so their error does not grow with the number of rows. Each call serves one
// thread's rows; the callers add the partial results up in a fixed order.
//
// Where C is no multiple of the vector, the last vector is moved left until it fits, which is cheaper than a masked access:
// some columns are computed twice, with the same result. So input and output may be the same memory only where C is a multiple.
#pragma once

#include "common/dice.h"
#include "cpu/simd.h"

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

// Sums over rows: sums[k][c] += the sum over r of term(r, c, lanes)[k], for k < kSums.
template <int kSums, int kWide, typename T, typename F>
void add_column_sums(int64_t rows, int64_t C, double* sums, const F& term) {
    constexpr int64_t kSize = Vec<T>::kSize;
    for (int64_t begin = 0; begin < rows; begin += kRowsPerSum) {
        const int64_t end = rows - begin < kRowsPerSum ? rows : begin + kRowsPerSum;
        for_column_tiles<T, kWide>(C, [&]<int kVectors>(int64_t first, int64_t lanes, int64_t fresh) {
            Vec<T> total[kVectors][kSums];
            for (int64_t r = begin; r < end; ++r) {
                for (int v = 0; v < kVectors; ++v) {
                    Vec<T> terms[kSums];
                    term(r, first + v * kSize, lanes, terms);
                    for (int k = 0; k < kSums; ++k) total[v][k] += terms[k];
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                for (int64_t i = 0; i < lanes; ++i) {
                    const int64_t c = first + v * kSize + i;
                    if (c < fresh) continue;
                    for (int k = 0; k < kSums; ++k) sums[k * C + c] += total[v][k].v[i];
                }
            }
        });
    }
}

// Count, mean and sum of squared deviations of C columns.
struct Moments {
    double* data;  // [1 + 2 C], starts as zeros
    int64_t C;

    double& count() const { return data[0]; }
    double* mean() const { return data + 1; }
    double* deviation() const { return data + 1 + C; }

    // Joins n values of column c to the count() that it stands for (Chan, Golub, LeVeque 1979). count() itself stays.
    void merge_column(int64_t c, double n, double other_mean, double other_deviation) const {
        const double delta = other_mean - mean()[c], total = count() + n;
        mean()[c] += delta * (n / total);
        deviation()[c] += other_deviation + delta * delta * (count() * n / total);
    }
    void merge(const Moments& other) const {
        if (other.count() == 0) return;
        for (int64_t c = 0; c < C; ++c) merge_column(c, other.count(), other.mean()[c], other.deviation()[c]);
        count() += other.count();
    }
};

// Adds the rows of x [rows, C] to m. The sums of a run of rows are taken of the distances from its first row: a large mean
// costs no precision, and as that row is one of the values, the squares exceed the deviation by a factor of kRowsPerSum at the
// most.
template <typename T>
void add_moments(const T* x, int64_t stride, int64_t rows, const Moments& m) {
    constexpr int64_t kSize = Vec<T>::kSize;
    for (; rows > 0; x += kRowsPerSum * stride, rows -= kRowsPerSum) {
        const int64_t run = rows < kRowsPerSum ? rows : kRowsPerSum;
        for_column_tiles<T, 4>(m.C, [&]<int kVectors>(int64_t first, int64_t lanes, int64_t fresh) {
            Vec<T> pivots[kVectors], sums[kVectors], squares[kVectors];
            for (int v = 0; v < kVectors; ++v) pivots[v] = Vec<T>::load(x + first + v * kSize, lanes);
            for (int64_t r = 1; r < run; ++r) {
                for (int v = 0; v < kVectors; ++v) {
                    const Vec<T> d = Vec<T>::load(x + r * stride + first + v * kSize, lanes) - pivots[v];
                    sums[v] += d;
                    squares[v] += d * d;
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                for (int64_t i = 0; i < lanes; ++i) {
                    const int64_t c = first + v * kSize + i;
                    if (c < fresh) continue;
                    const double sum = sums[v].v[i], offset = sum / double(run), deviation = squares[v].v[i] - sum * offset;
                    m.merge_column(c, double(run), pivots[v].v[i] + offset, deviation < 0 ? 0 : deviation);
                }
            }
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

// Fills data [4, C]. weight and bias may be null.
template <typename T>
void fill_dice_columns(const T* mean, const T* var, const T* weight, const T* bias, const T* alpha, const DiceEps& eps,
                       int64_t C, T* data) {
    for (int64_t c = 0; c < C; ++c) {
        data[c] = mean[c];
        data[C + c] = dice_scale(weight != nullptr ? weight[c] : T(1), var[c], eps);
        data[2 * C + c] = bias != nullptr ? bias[c] : T(0);
        data[3 * C + c] = alpha[c];
    }
}

template <typename T>
DiceColumns<T> dice_columns(const T* data, int64_t C) {
    return {data, data + C, data + 2 * C, data + 3 * C};
}

// One vector of values with all that belongs to it.
template <typename T>
struct DiceLanes {
    Vec<T> s, scale, alpha, centered, p;

    DiceLanes(const DiceColumns<T>& columns, const T* x, int64_t c, int64_t lanes)
        : s(Vec<T>::load(x + c, lanes)),
          scale(Vec<T>::load(columns.scale + c, lanes)),
          alpha(Vec<T>::load(columns.alpha + c, lanes)),
          centered(s - Vec<T>::load(columns.mean + c, lanes)),
          p(sigmoid(scale * centered + Vec<T>::load(columns.bias + c, lanes))) {}
};

// y = f(x), both [rows, C] with row strides
template <typename T>
void dice_rows(const DiceColumns<T>& columns, const T* x, int64_t stride_x, T* y, int64_t stride_y, int64_t rows, int64_t C) {
    for (int64_t r = 0; r < rows; ++r) {
        for_column_tiles<T, 1>(C, [&]<int>(int64_t c, int64_t lanes, int64_t) {
            const DiceLanes<T> d(columns, x + r * stride_x, c, lanes);
            dice_value(d.s, d.p, d.alpha).store(y + r * stride_y + c, lanes);
        });
    }
}

// Adds to sums [3, C]: the gradient of alpha; the sum of g_logit, the gradient of weight x + bias; the sum of g_logit (s - E).
template <typename T>
void add_dice_sums(const DiceColumns<T>& columns, const T* x, int64_t stride_x, const T* g, int64_t stride_g, int64_t rows,
                   int64_t C, double* sums) {
    add_column_sums<3, 2, T>(rows, C, sums, [&](int64_t r, int64_t c, int64_t lanes, Vec<T>* terms) {
        const DiceLanes<T> d(columns, x + r * stride_x, c, lanes);
        const Vec<T> grad = Vec<T>::load(g + r * stride_g + c, lanes);
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

// Fills data [2, C] from the sums [3, C] over all `count` rows. A column without deviation has no derivative there, as in
// reference.py: its pull is 0.
template <typename T>
void fill_dice_feedback(const double* sums, double count, const T* var, const T* scale, const DiceEps& eps, int64_t C,
                        T* data) {
    for (int64_t c = 0; c < C; ++c) {
        const double root = eps.root(var[c]);
        data[c] = count > 0 ? T(sums[C + c] / count) : T(0);
        data[C + c] = root > 0 ? T(double(scale[c]) / eps.divisor(var[c]) / root * (sums[2 * C + c] / count)) : T(0);
    }
}

template <typename T>
DiceFeedback<T> dice_feedback(const T* data, int64_t C) {
    return {data, data + C};
}

// The gradient of x, from that of y
template <typename T>
void dice_gradient_rows(const DiceColumns<T>& columns, const DiceFeedback<T>& feedback, const T* x, int64_t stride_x,
                        const T* g, int64_t stride_g, T* grad_x, int64_t stride_grad_x, int64_t rows, int64_t C) {
    for (int64_t r = 0; r < rows; ++r) {
        for_column_tiles<T, 1>(C, [&]<int>(int64_t c, int64_t lanes, int64_t) {
            const DiceLanes<T> d(columns, x + r * stride_x, c, lanes);
            const Vec<T> grad = Vec<T>::load(g + r * stride_g + c, lanes);
            const Vec<T> g_logit = dice_logit_gradient(grad, d.s, d.p, d.alpha);
            const Vec<T> mean_g_logit = feedback.pull ? Vec<T>::load(feedback.mean_g_logit + c, lanes) : Vec<T>();
            const Vec<T> pull = feedback.pull ? Vec<T>::load(feedback.pull + c, lanes) : Vec<T>();
            dice_gradient(grad, g_logit, d.p, d.alpha, d.scale, d.centered, mean_g_logit, pull)
                .store(grad_x + r * stride_grad_x + c, lanes);
        });
    }
}

}  // namespace
}  // namespace dien_ops::cpu
