// SPDX-License-Identifier: Apache-2.0
// The small matrix products inside the kernels. Two shapes cover everything:
//   multiply           C[M, N] (+)= A[M, K] B[K, N]   with B packed once into column panels (weights, used many times)
//   accumulate_outer   C[M, N]  += A[K, M]^T B[K, N]  over K rows (weight gradients: the sum over batch and time)
// Both keep a tile of kTileRows x kTileVectors vectors of sums in registers while they run along K. The sums start at zero and
// are added to C once, at the end: K small terms added to a large C one by one would each be rounded at C's size. The order of
// every sum depends on K alone, never on the number of threads.
#pragma once

#include "cpu/simd.h"

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

// Packs B[k][n] = source[k * stride_k + n * stride_n] into panels of kPanelWidth columns, [panel][K][kPanelWidth], zero-padded.
template <typename T>
void pack(const T* source, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, T* packed) {
    for (int64_t n0 = 0; n0 < N; n0 += kPanelWidth<T>) {
        for (int64_t k = 0; k < K; ++k) {
            for (int64_t j = 0; j < kPanelWidth<T>; ++j) {
                *packed++ = n0 + j < N ? source[k * stride_k + (n0 + j) * stride_n] : T(0);
            }
        }
    }
}

// One register tile: C[kRows, width] (+)= A B, width <= kPanelWidth.
template <int64_t kRows, typename T>
void multiply_tile(const T* a, int64_t lda, const T* panel, int64_t K, const T* bias, bool accumulate, T* c, int64_t ldc,
                   int64_t width) {
    constexpr int64_t kSize = Vec<T>::kSize;
    Vec<T> sums[kRows][kTileVectors];
    for (int64_t k = 0; k < K; ++k) {
        Vec<T> b[kTileVectors];
#pragma GCC unroll 3
        for (int64_t v = 0; v < kTileVectors; ++v) b[v] = Vec<T>::load(panel + k * kPanelWidth<T> + v * kSize);
#pragma GCC unroll 8
        for (int64_t m = 0; m < kRows; ++m) {
            const Vec<T> a_mk(a[m * lda + k]);
#pragma GCC unroll 3
            for (int64_t v = 0; v < kTileVectors; ++v) sums[m][v] += a_mk * b[v];
        }
    }
    for (int64_t v = 0; v < kTileVectors; ++v) {
        const int64_t left = width - v * kSize;
        if (left <= 0) break;
        const int64_t lanes = left < kSize ? left : kSize;
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
        int64_t m = 0;
        for (; m + kTileRows <= M; m += kTileRows) {
            multiply_tile<kTileRows>(a + m * lda, lda, panel, K, panel_bias, accumulate, c + m * ldc + n, ldc, width);
        }
        for (; m < M; ++m) {
            multiply_tile<1>(a + m * lda, lda, panel, K, panel_bias, accumulate, c + m * ldc + n, ldc, width);
        }
    }
}

// One register tile of accumulate_outer: C[kRows, width] += A^T B.
template <int64_t kRows, typename T>
void outer_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t K, T* c, int64_t ldc, int64_t width) {
    constexpr int64_t kSize = Vec<T>::kSize;
    Vec<T> sums[kRows][kTileVectors];
    if (width == kPanelWidth<T>) {
        for (int64_t k = 0; k < K; ++k) {
            Vec<T> row[kTileVectors];
#pragma GCC unroll 3
            for (int64_t v = 0; v < kTileVectors; ++v) row[v] = Vec<T>::load(b + k * ldb + v * kSize);
#pragma GCC unroll 8
            for (int64_t m = 0; m < kRows; ++m) {
                const Vec<T> a_km(a[k * lda + m]);
#pragma GCC unroll 3
                for (int64_t v = 0; v < kTileVectors; ++v) sums[m][v] += a_km * row[v];
            }
        }
        for (int64_t m = 0; m < kRows; ++m) {
            for (int64_t v = 0; v < kTileVectors; ++v) {
                T* p = c + m * ldc + v * kSize;
                (Vec<T>::load(p) + sums[m][v]).store(p);
            }
        }
        return;
    }
    // The last columns, fewer than a panel: a vector at a time.
    for (int64_t n = 0; n < width; n += kSize) {
        const int64_t lanes = width - n < kSize ? width - n : kSize;
        Vec<T> column[kRows];
        for (int64_t k = 0; k < K; ++k) {
            const Vec<T> row = Vec<T>::load(b + k * ldb + n, lanes);
            for (int64_t m = 0; m < kRows; ++m) column[m] += Vec<T>(a[k * lda + m]) * row;
        }
        for (int64_t m = 0; m < kRows; ++m) {
            T* p = c + m * ldc + n;
            (Vec<T>::load(p, lanes) + column[m]).store(p, lanes);
        }
    }
}

// C[M, N] += A[K, M]^T B[K, N]. Call it with blocks of K that fit the cache.
template <typename T>
void accumulate_outer(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t M, int64_t N, int64_t K) {
    for (int64_t n = 0; n < N; n += kPanelWidth<T>) {
        const int64_t width = N - n < kPanelWidth<T> ? N - n : kPanelWidth<T>;
        int64_t m = 0;
        for (; m + kTileRows <= M; m += kTileRows) {
            outer_tile<kTileRows>(a + m, lda, b + n, ldb, K, c + m * ldc + n, ldc, width);
        }
        for (; m < M; ++m) outer_tile<1>(a + m, lda, b + n, ldb, K, c + m * ldc + n, ldc, width);
    }
}

}  // namespace
}  // namespace dien_ops::cpu
