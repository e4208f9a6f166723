// SPDX-License-Identifier: Apache-2.0
// The small matrix products inside the kernels. Two shapes cover everything:
//   multiply           C[M, N] (+)= A[M, K] B[K, N]   with B packed once into column panels (weights, used many times)
//   accumulate_outer   C[M, N]  += A[K, M]^T B[K, N]  over K rows (weight gradients: the sum over batch and time)
// Both keep a tile of kTileRows x kTileVectors vectors of sums in registers while they run along K. The sums start at zero and
// are added to C once, at the end: K small terms added to a large C one by one would each be rounded at C's size. The order of
// every sum depends on K alone, never on the number of threads.
#pragma once

#include "cpu/simd.h"
#include "cpu/storage.h"

namespace dien_ops::cpu {
namespace {

// 12 (24 for AVX-512) accumulators, 3 vectors of B, 1 of A: what 16 (32) vector registers hold.
constexpr int64_t kTileVectors = 3;
constexpr int64_t kTileRows = kCapability == Capability::avx512 ? 8 : 4;
template <typename T>
constexpr int64_t kPanelWidth = kTileVectors * Vec<T>::kSize;

// Number of elements of a packed [K, N] matrix.
template <typename T>
constexpr int64_t packed_size(int64_t k, int64_t n) {
    return (n + kPanelWidth<T> - 1) / kPanelWidth<T> * kPanelWidth<T> * k;
}

// Packs B[k][n] = element(k, n) into panels of kPanelWidth columns, [panel][K][kPanelWidth], zero-padded.
template <typename T, typename F>
void pack(const F& element, int64_t K, int64_t N, T* packed) {
    for (int64_t n0 = 0; n0 < N; n0 += kPanelWidth<T>) {
        for (int64_t k = 0; k < K; ++k) {
            for (int64_t j = 0; j < kPanelWidth<T>; ++j) *packed++ = n0 + j < N ? element(k, n0 + j) : T(0);
        }
    }
}

// The same of B[k][n] = source[k * stride_k + n * stride_n].
template <typename T, typename S>
void pack(const S* source, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, T* packed) {
    pack([&](int64_t k, int64_t n) -> T { return load_one(source + k * stride_k + n * stride_n); }, K, N, packed);
}

// The lanes of vector v that lie within `width` columns.
template <typename T>
int64_t lanes_of(int64_t v, int64_t width) {
    const int64_t left = width - v * Vec<T>::kSize;
    return left < Vec<T>::kSize ? left : Vec<T>::kSize;
}

// Calls f.operator()<vectors>() with the number of vectors that `width` columns take, 1..kTileVectors.
template <typename T, typename F>
void with_vectors(int64_t width, F&& f) {
    static_assert(kTileVectors == 3);
    if (width > 2 * Vec<T>::kSize) return f.template operator()<3>();
    if (width > Vec<T>::kSize) return f.template operator()<2>();
    return f.template operator()<1>();
}

// Calls f.operator()<rows>(m) for tiles of rows that together cover m..M-1: of kRows rows, then of half as many, and so on.
template <int64_t kRows, typename F>
void for_row_tiles(int64_t m, int64_t M, F&& f) {
    for (; m + kRows <= M; m += kRows) f.template operator()<kRows>(m);
    if constexpr (kRows > 1) {
        if (m < M) for_row_tiles<kRows / 2>(m, M, f);
    }
}

// sums[kRows][kVectors] += A[kRows, K] B[K, kVectors vectors], a row of B standing ldb elements after the one before.
template <int64_t kRows, int64_t kVectors, typename T>
[[gnu::always_inline]] inline void add_register_products(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t K,
                                                         Vec<T> (&sums)[kRows][kVectors]) {
    for (int64_t k = 0; k < K; ++k, b += ldb) {
        Vec<T> row[kVectors];
#pragma GCC unroll 3
        for (int64_t v = 0; v < kVectors; ++v) row[v] = Vec<T>::load(b + v * Vec<T>::kSize);
#pragma GCC unroll 8
        for (int64_t m = 0; m < kRows; ++m) {
            const Vec<T> a_mk(a[m * lda + k]);
#pragma GCC unroll 3
            for (int64_t v = 0; v < kVectors; ++v) sums[m][v] += a_mk * row[v];
        }
    }
}

// One register tile: C[kRows, width] (+)= A B, width <= kVectors vectors.
template <int64_t kRows, int64_t kVectors, typename T>
void multiply_tile(const T* a, int64_t lda, const T* panel, int64_t K, const T* bias, bool accumulate, T* c, int64_t ldc,
                   int64_t width) {
    constexpr int64_t kSize = Vec<T>::kSize;
    Vec<T> sums[kRows][kVectors];
    add_register_products(a, lda, panel, kPanelWidth<T>, K, sums);
    for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t lanes = lanes_of<T>(v, width);
        const Vec<T> start = bias != nullptr ? Vec<T>::load(bias + v * kSize, lanes) : Vec<T>();
        for (int64_t m = 0; m < kRows; ++m) {
            T* const p = c + m * ldc + v * kSize;
            (start + (accumulate ? Vec<T>::load(p, lanes) + sums[m][v] : sums[m][v])).store(p, lanes);
        }
    }
}

// C[M, N] = A[M, K] B[K, N] + bias[N] (bias may be null), or += where accumulate is set.
template <typename T>
void multiply(const T* a, int64_t lda, const T* packed_b, const T* bias, bool accumulate, T* c, int64_t ldc, int64_t M,
              int64_t N, int64_t K) {
    for (int64_t n = 0; n < N; n += kPanelWidth<T>) {
        const T* panel = packed_b + n * K;
        const int64_t width = N - n < kPanelWidth<T> ? N - n : kPanelWidth<T>;
        const T* panel_bias = bias != nullptr ? bias + n : nullptr;
        with_vectors<T>(width, [&]<int64_t kVectors>() {
            for_row_tiles<kTileRows>(0, M, [&]<int64_t kRows>(int64_t m) {
                multiply_tile<kRows, kVectors>(a + m * lda, lda, panel, K, panel_bias, accumulate, c + m * ldc + n, ldc, width);
            });
        });
    }
}

// One register tile of accumulate_outer: C[kRows, width] += A^T B, at most kVectors vectors, of which only the last may be
// partial.
template <int64_t kRows, int64_t kVectors, typename T>
void outer_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t K, T* c, int64_t ldc, int64_t width) {
    constexpr int64_t kSize = Vec<T>::kSize, kLast = kVectors - 1;
    const int64_t lanes = lanes_of<T>(kLast, width);
    Vec<T> sums[kRows][kVectors];
    for (int64_t k = 0; k < K; ++k) {
        Vec<T> row[kVectors];
#pragma GCC unroll 3
        for (int64_t v = 0; v < kLast; ++v) row[v] = Vec<T>::load(b + k * ldb + v * kSize);
        row[kLast] = Vec<T>::load(b + k * ldb + kLast * kSize, lanes);
#pragma GCC unroll 8
        for (int64_t m = 0; m < kRows; ++m) {
            const Vec<T> a_km(a[k * lda + m]);
#pragma GCC unroll 4
            for (int64_t v = 0; v < kVectors; ++v) sums[m][v] += a_km * row[v];
        }
    }
#pragma GCC unroll 8
    for (int64_t m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) {
            T* const p = c + m * ldc + v * kSize;
            const int64_t n = v < kLast ? kSize : lanes;
            (Vec<T>::load(p, n) + sums[m][v]).store(p, n);
        }
    }
}

// C[M, N] += A[K, M]^T B[K, N]. Call it with blocks of K that fit the cache.
template <typename T>
void accumulate_outer(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t M, int64_t N, int64_t K) {
    constexpr int64_t kSize = Vec<T>::kSize;
    const auto columns = [&]<int64_t kVectors>(int64_t n) {
        constexpr int64_t kMostRows = kVectors > 3 ? kTileRows * 3 / 4 : kTileRows;  // as many sums
        for_row_tiles<kMostRows>(0, M, [&]<int64_t kRows>(int64_t m) {
            outer_tile<kRows, kVectors>(a + m, lda, b + n, ldb, K, c + m * ldc + n, ldc, N - n);
        });
    };
    // Four vectors in the end rather than three and one: a single vector is soon multiplied, and its rows' loads remain.
    int64_t n = 0, left = (N + kSize - 1) / kSize;
    for (; left > 4 || left == 3; left -= 3, n += 3 * kSize) columns.template operator()<3>(n);
    if (left == 4) columns.template operator()<4>(n);
    if (left == 2) columns.template operator()<2>(n);
    if (left == 1) columns.template operator()<1>(n);
}

}  // namespace
}  // namespace dien_ops::cpu
