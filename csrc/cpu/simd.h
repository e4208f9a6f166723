// SPDX-License-Identifier: Apache-2.0
// Vectors of the width that this file's instruction set offers, through the compiler's vector extensions: the same source
// gives SSE, AVX2, AVX-512 or NEON code. Only kernel files include this header. Everything in it has internal linkage, so
// that code compiled for one instruction set can never be linked into another's.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "cpu/capability.h"

namespace dien_ops::cpu {
namespace {

// DIEN_OPS_KERNEL_CAPABILITY is set by CMake for each compilation of a kernel file.
constexpr Capability kCapability = Capability::DIEN_OPS_KERNEL_CAPABILITY;
constexpr int kVectorBytes = kCapability == Capability::avx512 ? 64 : kCapability == Capability::avx2 ? 32 : 16;

// The compiler's vector types. Written out: GCC cannot tell a dependent vector type from its element type.
template <typename T>
struct NativeVector;

template <>
struct NativeVector<float> {
    typedef float Floats __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <>
struct NativeVector<double> {
    typedef double Floats __attribute__((vector_size(kVectorBytes)));
    typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
};

// The first n lanes of a vector, from and to memory. Rows are seldom a whole number of vectors long, so this is worth the
// processor's masked instructions; the loops serve every other processor.
#if defined(__AVX512F__) && defined(__AVX512VL__)
inline NativeVector<float>::Floats load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline NativeVector<double>::Floats load_first(const double* p, int64_t n) { return _mm512_maskz_loadu_pd((1u << n) - 1, p); }
inline void store_first(NativeVector<float>::Floats v, float* p, int64_t n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
inline void store_first(NativeVector<double>::Floats v, double* p, int64_t n) { _mm512_mask_storeu_pd(p, (1u << n) - 1, v); }
#elif defined(__AVX2__)
inline __m256i first_lanes_32(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_lanes_64(int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
inline NativeVector<float>::Floats load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes_32(n)); }
inline NativeVector<double>::Floats load_first(const double* p, int64_t n) { return _mm256_maskload_pd(p, first_lanes_64(n)); }
inline void store_first(NativeVector<float>::Floats v, float* p, int64_t n) { _mm256_maskstore_ps(p, first_lanes_32(n), v); }
inline void store_first(NativeVector<double>::Floats v, double* p, int64_t n) { _mm256_maskstore_pd(p, first_lanes_64(n), v); }
#else
template <typename T>
typename NativeVector<T>::Floats load_first(const T* p, int64_t n) {
    typename NativeVector<T>::Floats result{};
    for (int64_t i = 0; i < n; ++i) result[i] = p[i];
    return result;
}
template <typename T, typename Floats>
void store_first(Floats v, T* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
#endif

template <typename T>
struct Vec {
    static constexpr int64_t kSize = kVectorBytes / sizeof(T);
    using Native = typename NativeVector<T>::Floats;

    Native v;

    Vec() : v{} {}
    Vec(Native native) : v(native) {}
    Vec(T scalar) : v(Native{} + scalar) {}

    static Vec load(const T* p) {
        Vec result;
        std::memcpy(&result.v, p, sizeof(Native));
        return result;
    }
    // Reads the first n elements (0 <= n <= kSize) and fills the rest with 0.
    static Vec load(const T* p, int64_t n) { return n == kSize ? load(p) : Vec(load_first(p, n)); }
    void store(T* p) const { std::memcpy(p, &v, sizeof(Native)); }
    void store(T* p, int64_t n) const { n == kSize ? store(p) : store_first(v, p, n); }

    friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
    friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
    friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
    friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
    friend Vec operator-(Vec a) { return -a.v; }
    Vec& operator+=(Vec b) { return *this = *this + b; }
    Vec& operator-=(Vec b) { return *this = *this - b; }
    Vec& operator*=(Vec b) { return *this = *this * b; }
};

// The lanes' sum, always in the same order.
template <typename T>
T sum(Vec<T> x) {
    T total = 0;
    for (int64_t i = 0; i < Vec<T>::kSize; ++i) total += x.v[i];
    return total;
}

// A NaN in x passes through, so that bad input is seen in the result.
template <typename T>
Vec<T> clamp(Vec<T> x, T low, T high) {
    const Vec<T> l(low), h(high);
    const Vec<T> raised = l.v > x.v ? l.v : x.v;
    return h.v < raised.v ? h.v : raised.v;
}

// positive ? a : b, lane by lane, where "positive" is x > 0.
template <typename T>
Vec<T> where_positive(Vec<T> x, Vec<T> a, Vec<T> b) {
    return x.v > 0 ? a.v : b.v;
}

// The parts of a float format that exp needs.
template <typename T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
    static constexpr int kMantissaBits = 23, kBias = 127, kTerms = 7;  // Taylor remainder 5e-9 at |r| = ln(2)/2
    static constexpr float kLowest = -87.0f, kHighest = 88.0f;
    static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.428606765330187e-06f;
    static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float kInverseFactorials[] = {1.0f,      1.0f,       1 / 2.0f,   1 / 6.0f,
                                                   1 / 24.0f, 1 / 120.0f, 1 / 720.0f, 1 / 5040.0f};
};

template <>
struct ExpTraits<double> {
    static constexpr int kMantissaBits = 52, kBias = 1023, kTerms = 13;  // Taylor remainder 4e-18
    static constexpr double kLowest = -708.0, kHighest = 709.0;
    static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
    static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double kInverseFactorials[] = {
        1.0,        1.0,         1 / 2.0,      1 / 6.0,       1 / 24.0,       1 / 120.0,       1 / 720.0,
        1 / 5040.0, 1 / 40320.0, 1 / 362880.0, 1 / 3628800.0, 1 / 39916800.0, 1 / 479001600.0, 1 / 6227020800.0};
};

// exp(x) = scale * (1 + tail) with scale a power of two and tail = expm1(r), |r| <= ln(2)/2.
template <typename T>
struct ExpParts {
    Vec<T> scale, tail;
};

template <typename T>
ExpParts<T> exp_parts(Vec<T> x) {
    using Traits = ExpTraits<T>;
    using Bits = typename NativeVector<T>::Bits;
    const Vec<T> clamped = clamp(x, Traits::kLowest, Traits::kHighest);
    const Vec<T> shifted = clamped * Vec<T>(T(1.4426950408889634)) + Vec<T>(Traits::kRound);
    const Vec<T> n = shifted - Vec<T>(Traits::kRound);
    const Vec<T> r = clamped - n * Vec<T>(Traits::kLn2High) - n * Vec<T>(Traits::kLn2Low);

    // expm1(r) = r + r^2 (1/2! + r/3! + r^2/4! + ...): the bracket from the inside out, then one rounding that matters
    Vec<T> series(Traits::kInverseFactorials[Traits::kTerms]);
#pragma GCC unroll 16
    for (int k = Traits::kTerms - 1; k >= 2; --k) series = Vec<T>(Traits::kInverseFactorials[k]) + series * r;

    const Bits exponent = __builtin_convertvector(n.v, Bits) + Traits::kBias;
    ExpParts<T> parts;
    const Bits scale_bits = exponent << Traits::kMantissaBits;
    std::memcpy(&parts.scale.v, &scale_bits, sizeof(scale_bits));
    parts.tail = r + r * r * series;
    return parts;
}

template <typename T>
Vec<T> exp(Vec<T> x) {
    const ExpParts<T> e = exp_parts(x);
    return e.scale + e.scale * e.tail;
}

template <typename T>
Vec<T> sigmoid(Vec<T> x) {
    return Vec<T>(T(1)) / (Vec<T>(T(1)) + exp(-x));
}

// exp(x) - 1 without cancellation near 0.
template <typename T>
Vec<T> expm1(Vec<T> x) {
    const ExpParts<T> e = exp_parts(x);
    return e.scale * e.tail + (e.scale - Vec<T>(T(1)));
}

// With m = expm1(2 |x|): tanh |x| = m / (m + 2) near 0, where nothing cancels, and 1 - 2 / (m + 2) further out, where the
// quotient's rounding is scaled down.
template <typename T>
Vec<T> tanh(Vec<T> x) {
    const Vec<T> one(T(1)), two(T(2));
    const Vec<T> magnitude = clamp(where_positive(x, x, -x), T(0), T(20));  // beyond 20 the result is 1 in both precisions
    const Vec<T> m = expm1(magnitude + magnitude);
    const Vec<T> far = magnitude - Vec<T>(T(0.55));
    const Vec<T> quotient = where_positive(far, two, m) / (m + two);
    const Vec<T> result = where_positive(far, one - quotient, quotient);
    return where_positive(x, result, -result);
}

}  // namespace
}  // namespace dien_ops::cpu
