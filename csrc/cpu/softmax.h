// SPDX-License-Identifier: Apache-2.0
// Softmax over one row and its derivative: what both attentions of the package need.
#pragma once

#include <cstring>

#include "cpu/simd.h"

namespace dien_ops::cpu {
namespace {

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
