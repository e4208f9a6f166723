// SPDX-License-Identifier: Apache-2.0
// What both attentions of the package do with a row of scores.
#pragma once

#include "cpu/simd.h"

namespace dien_ops::cpu {
namespace {

// dots[r] = x[r] . y for `rows` rows of n values, `stride` apart. The last vector of a row is moved left until it fits; what it
// shares with the one before is multiplied by 0.
template <typename T>
void dot_rows(const T* x, int64_t stride, const T* y, T* dots, int64_t rows, int64_t n) {
    constexpr int64_t kSize = Vec<T>::kSize;
    const int64_t whole = n / kSize * kSize, rest = n - whole, last = n < kSize ? 0 : n - kSize;
    const int64_t last_lanes = n < kSize ? n : kSize;
    Vec<T> y_last = Vec<T>::load(y + last, last_lanes);
    for (int64_t i = 0; i < last_lanes - rest; ++i) y_last.v[i] = 0;
    for (int64_t r = 0; r < rows; ++r, x += stride) {
        Vec<T> total;
        for (int64_t i = 0; i < whole; i += kSize) total += Vec<T>::load(x + i) * Vec<T>::load(y + i);
        if (rest > 0) total += Vec<T>::load(x + last, last_lanes) * y_last;
        dots[r] = sum(total);
    }
}

// x [n] becomes its softmax. Nothing happens where n is 0.
template <typename T>
void softmax_row(T* x, int64_t n) {
    constexpr int64_t kSize = Vec<T>::kSize;
    T largest = n > 0 ? x[0] : T(0);
    for (int64_t i = 1; i < n; ++i) largest = x[i] < largest ? largest : x[i];
    Vec<T> total;
    for (int64_t i = 0; i < n; i += kSize) {
        const int64_t lanes = n - i < kSize ? n - i : kSize;
        const Vec<T> e = exp(Vec<T>::load(x + i, lanes) - Vec<T>(largest));
        e.store(x + i, lanes);
        total += lanes == kSize ? e : Vec<T>::load(x + i, lanes);  // lanes beyond the row add nothing
    }
    const Vec<T> scale(T(1) / sum(total));
    for (int64_t i = 0; i < n; i += kSize) {
        const int64_t lanes = n - i < kSize ? n - i : kSize;
        (Vec<T>::load(x + i, lanes) * scale).store(x + i, lanes);
    }
}

// grad_x = y (grad_y - sum of y grad_y), all [n], where y is the softmax of x. grad_x may be grad_y.
template <typename T>
void softmax_row_gradient(const T* y, const T* grad_y, T* grad_x, int64_t n) {
    constexpr int64_t kSize = Vec<T>::kSize;
    Vec<T> total;
    for (int64_t i = 0; i < n; i += kSize) {
        const int64_t lanes = n - i < kSize ? n - i : kSize;
        total += Vec<T>::load(y + i, lanes) * Vec<T>::load(grad_y + i, lanes);
    }
    const Vec<T> common(sum(total));
    for (int64_t i = 0; i < n; i += kSize) {
        const int64_t lanes = n - i < kSize ? n - i : kSize;
        (Vec<T>::load(y + i, lanes) * (Vec<T>::load(grad_y + i, lanes) - common)).store(grad_x + i, lanes);
    }
}

}  // namespace
}  // namespace dien_ops::cpu
