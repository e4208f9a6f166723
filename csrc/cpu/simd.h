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
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <>
struct NativeVector<double> {
    typedef double Floats __attribute__((vector_size(kVectorBytes)));
    typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
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
    Vec(T scalar) : v(scalar - Native{}) {}  // x - 0 is x, which the compiler knows; 0 + x is not, where x is -0

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

// The lanes' sum, always in the same order: halves are added to halves.
template <typename T>
T sum(Vec<T> x) {
    T lanes[Vec<T>::kSize];
    x.store(lanes);
#pragma GCC unroll 4
    for (int64_t half = Vec<T>::kSize / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[half + i];
    }
    return lanes[0];
}

// The smaller and the larger of a bound and x; a NaN in x passes through, so that bad input is seen in the result. The
// compiler makes two instructions of the portable form, as it may not assume what the processor's one does with a NaN. (The
// forms with a mask of ones are the plain instructions, without GCC's warnings of an undefined operand.)
#if defined(__AVX512F__)
inline Vec<float> at_most(Vec<float> x, Vec<float> bound) { return Vec<float>(_mm512_maskz_min_ps(0xffff, bound.v, x.v)); }
inline Vec<double> at_most(Vec<double> x, Vec<double> bound) { return Vec<double>(_mm512_maskz_min_pd(0xff, bound.v, x.v)); }
inline Vec<float> at_least(Vec<float> x, Vec<float> bound) { return Vec<float>(_mm512_maskz_max_ps(0xffff, bound.v, x.v)); }
inline Vec<double> at_least(Vec<double> x, Vec<double> bound) { return Vec<double>(_mm512_maskz_max_pd(0xff, bound.v, x.v)); }
#elif defined(__AVX2__)
inline Vec<float> at_most(Vec<float> x, Vec<float> bound) { return Vec<float>(_mm256_min_ps(bound.v, x.v)); }
inline Vec<double> at_most(Vec<double> x, Vec<double> bound) { return Vec<double>(_mm256_min_pd(bound.v, x.v)); }
inline Vec<float> at_least(Vec<float> x, Vec<float> bound) { return Vec<float>(_mm256_max_ps(bound.v, x.v)); }
inline Vec<double> at_least(Vec<double> x, Vec<double> bound) { return Vec<double>(_mm256_max_pd(bound.v, x.v)); }
#else
template <typename T>
Vec<T> at_most(Vec<T> x, Vec<T> bound) {
    return bound.v < x.v ? bound.v : x.v;
}
template <typename T>
Vec<T> at_least(Vec<T> x, Vec<T> bound) {
    return bound.v > x.v ? bound.v : x.v;
}
#endif

// Calls f(first, lanes) for each vector of a row of n elements; the last may have fewer lanes.
template <typename T, typename F>
void for_vectors(int64_t n, F&& f) {
    constexpr int64_t kSize = Vec<T>::kSize;
    int64_t j = 0;
    for (; j + kSize <= n; j += kSize) f(j, kSize);
    if (j < n) f(j, n - j);
}

// The compiler makes one instruction of the loop only where it sees the vector in memory, so the processor's is named.
#if defined(__AVX512F__)
inline Vec<float> sqrt(Vec<float> x) { return Vec<float>(_mm512_maskz_sqrt_ps(0xffff, x.v)); }
inline Vec<double> sqrt(Vec<double> x) { return Vec<double>(_mm512_maskz_sqrt_pd(0xff, x.v)); }
#elif defined(__AVX2__)
inline Vec<float> sqrt(Vec<float> x) { return Vec<float>(_mm256_sqrt_ps(x.v)); }
inline Vec<double> sqrt(Vec<double> x) { return Vec<double>(_mm256_sqrt_pd(x.v)); }
#else
template <typename T>
Vec<T> sqrt(Vec<T> x) {
    for (int64_t i = 0; i < Vec<T>::kSize; ++i) x.v[i] = __builtin_sqrt(x.v[i]);
    return x;
}
#endif

// positive ? a : b, lane by lane, where "positive" is x > 0.
template <typename T>
Vec<T> where_positive(Vec<T> x, Vec<T> a, Vec<T> b) {
    return x.v > 0 ? a.v : b.v;
}

template <typename T>
typename NativeVector<T>::Bits bits_of(Vec<T> x) {
    typename NativeVector<T>::Bits bits;
    std::memcpy(&bits, &x.v, sizeof(bits));
    return bits;
}

template <typename T>
Vec<T> from_bits(typename NativeVector<T>::Bits bits) {
    Vec<T> x;
    std::memcpy(&x.v, &bits, sizeof(bits));
    return x;
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

// x lies in kLowest..kHighest or is NaN.
template <typename T>
[[gnu::always_inline]] inline ExpParts<T> exp_parts(Vec<T> x) {
    using Traits = ExpTraits<T>;
    // The last bits of `shifted` are the integer n next to x / ln(2); the others go when n is shifted into the exponent.
    const Vec<T> shifted = x * Vec<T>(T(1.4426950408889634)) + Vec<T>(Traits::kRound);
    const Vec<T> n = shifted - Vec<T>(Traits::kRound);
    const Vec<T> r = x - n * Vec<T>(Traits::kLn2High) - n * Vec<T>(Traits::kLn2Low);

    // expm1(r) = r + r^2 (1/2! + r/3! + r^2/4! + ...): the bracket from the inside out, then one rounding that matters
    Vec<T> series(Traits::kInverseFactorials[Traits::kTerms]);
#pragma GCC unroll 16
    for (int k = Traits::kTerms - 1; k >= 2; --k) series = Vec<T>(Traits::kInverseFactorials[k]) + series * r;

    return {from_bits<T>((bits_of(shifted) + Traits::kBias) << Traits::kMantissaBits), r + r * r * series};
}

template <typename T>
Vec<T> clamp_for_exp(Vec<T> x) {
    return at_most(at_least(x, Vec<T>(ExpTraits<T>::kLowest)), Vec<T>(ExpTraits<T>::kHighest));
}

template <typename T>
[[gnu::always_inline]] inline Vec<T> exp(Vec<T> x) {
    const ExpParts<T> e = exp_parts(clamp_for_exp(x));
    return e.scale + e.scale * e.tail;
}

template <typename T>
[[gnu::always_inline]] inline Vec<T> sigmoid(Vec<T> x) {
    return Vec<T>(T(1)) / (Vec<T>(T(1)) + exp(-x));
}

// exp(x) - 1 without cancellation near 0.
template <typename T>
Vec<T> expm1(Vec<T> x) {
    const ExpParts<T> e = exp_parts(clamp_for_exp(x));
    return e.scale * e.tail + (e.scale - Vec<T>(T(1)));
}

// With m = expm1(2 |x|): tanh |x| = m / (m + 2), where nothing cancels.
template <typename T>
[[gnu::always_inline]] inline Vec<T> tanh(Vec<T> x) {
    using Bits = typename NativeVector<T>::Bits;
    const Bits bits = bits_of(x), sign = bits & bits_of(Vec<T>(T(-0.0)));
    const Vec<T> magnitude = at_most(from_bits<T>(bits ^ sign), Vec<T>(T(20)));  // beyond 20 the result is 1 in both precisions
    const ExpParts<T> e = exp_parts(magnitude + magnitude);
    const Vec<T> m = e.scale * e.tail + (e.scale - Vec<T>(T(1)));
    return from_bits<T>(bits_of(m / (m + Vec<T>(T(2)))) | sign);
}

}  // namespace
}  // namespace dien_ops::cpu
