// SPDX-License-Identifier: Apache-2.0
// What the recurrent kernels' passes over a row share.
#pragma once

#include <type_traits>

#include "common/gates.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/storage.h"

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

template <typename T, typename S>
Vec<T> load_or_zero(const S* p, int64_t j, int64_t lanes) {
    return p != nullptr ? load<T>(p + j, lanes) : Vec<T>();
}

// Copies n elements from one format of storage to another.
template <typename From, typename To>
void copy_or_zero(const From* source, int64_t n, To* destination) {
    if (source == nullptr) return fill_zeros(destination, n);
    if constexpr (std::is_same_v<From, To>) {
        if (n > 0) std::memcpy(destination, source, n * sizeof(To));
    } else {
        using T = std::conditional_t<std::is_same_v<From, Compute<From>>, From, To>;
        for_vectors<T>(n, [&](int64_t j, int64_t lanes) { store(load<T>(source + j, lanes), destination + j, lanes); });
    }
}

// The distance of two rows of n elements in a buffer: an odd number of cache lines, so that rows which lie a power of two
// apart do not fall into the same few sets of the cache.
template <typename T>
int64_t padded(int64_t n) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return ((n + kLine - 1) / kLine | 1) * kLine;
}

}  // namespace
}  // namespace dien_ops::cpu
