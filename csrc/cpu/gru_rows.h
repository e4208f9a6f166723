// SPDX-License-Identifier: Apache-2.0
// What the recurrent kernels' passes over a row share.
#pragma once

#include <type_traits>

#include "common/gates.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace dien_ops::cpu {
namespace {

// Calls f with the gate as a compile-time constant.
template <typename F>
void with_gate(Gate gate, F&& f) {
    switch (gate) {
        case Gate::none:
            return f(std::integral_constant<Gate, Gate::none>{});
        case Gate::input:
            return f(std::integral_constant<Gate, Gate::input>{});
        case Gate::replace:
            return f(std::integral_constant<Gate, Gate::replace>{});
        case Gate::paper:
            return f(std::integral_constant<Gate, Gate::paper>{});
        case Gate::authors:
            return f(std::integral_constant<Gate, Gate::authors>{});
    }
}

// Calls f(first, lanes) for each vector of a row of n elements; the last may have fewer lanes.
template <typename T, typename F>
void for_vectors(int64_t n, F&& f) {
    constexpr int64_t kSize = Vec<T>::kSize;
    int64_t j = 0;
    for (; j + kSize <= n; j += kSize) f(j, kSize);
    if (j < n) f(j, n - j);
}

template <typename T>
Vec<T> load_or_zero(const T* p, int64_t j, int64_t lanes) {
    return p != nullptr ? Vec<T>::load(p + j, lanes) : Vec<T>();
}

template <typename T>
void copy_or_zero(const T* source, int64_t n, T* destination) {
    if (source == nullptr) return fill_zeros(destination, n);
    std::memcpy(destination, source, n * sizeof(T));
}

}  // namespace
}  // namespace dien_ops::cpu
