// SPDX-License-Identifier: Apache-2.0
// Several vectors that are computed side by side. A chain of dependent operations, such as a sigmoid's, takes ten times as long
// as its instructions take to issue; the processor looks ahead for others, but not as far as that. Here each operation is
// written for all vectors before the next one is.
#pragma once

#include <utility>

#include "cpu/storage.h"

namespace dien_ops::cpu {
namespace {

// As many as the registers hold with all that a sigmoid needs: there are 32 with AVX-512 and on arm64, else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVecs = 4;
#else
constexpr int kVecs = 2;
#endif

// (Without loops: the compiler would keep arrays that a loop goes over in memory.)
template <typename T, int kCount>
struct Vecs {
    static constexpr int64_t kSize = kCount * Vec<T>::kSize;

    Vec<T> v[kCount];

    Vecs() = default;
    explicit Vecs(T scalar) : Vecs(each([&](int) { return Vec<T>(scalar); })) {}
    // make(i) is vector i.
    template <typename F>
    static Vecs each(F&& make) {
        return [&]<int... kPlaces>(std::integer_sequence<int, kPlaces...>) {
            Vecs result;
            ((result.v[kPlaces] = make(kPlaces)), ...);
            return result;
        }(std::make_integer_sequence<int, kCount>{});
    }
    // The first n elements at p (0 <= n <= kSize), and zeros; of any format of storage.
    template <typename S>
    static Vecs load(const S* p, int64_t n) {
        return each([&](int i) { return cpu::load<T>(p + i * Vec<T>::kSize, lanes(i, n)); });
    }
    template <typename S>
    void store(S* p, int64_t n) const {
        each([&](int i) { return cpu::store(v[i], p + i * Vec<T>::kSize, lanes(i, n)), v[i]; });
    }

    friend Vecs operator+(const Vecs& a, const Vecs& b) {
        return each([&](int i) { return a.v[i] + b.v[i]; });
    }
    friend Vecs operator-(const Vecs& a, const Vecs& b) {
        return each([&](int i) { return a.v[i] - b.v[i]; });
    }
    friend Vecs operator*(const Vecs& a, const Vecs& b) {
        return each([&](int i) { return a.v[i] * b.v[i]; });
    }
    friend Vecs operator/(const Vecs& a, const Vecs& b) {
        return each([&](int i) { return a.v[i] / b.v[i]; });
    }
    Vecs& operator+=(const Vecs& b) { return *this = *this + b; }

  private:
    static int64_t lanes(int i, int64_t n) {
        if constexpr (kCount == 1) return n;
        const int64_t left = n - i * Vec<T>::kSize;
        return left < 0 ? 0 : left < Vec<T>::kSize ? left : Vec<T>::kSize;
    }
};

// 2^f - 1 = f (c[0] + c[1] f + ...) for |f| <= 1/2: float interpolated at Chebyshev's points, to 4e-9; double Taylor's series,
// to 4e-18.
template <typename T>
struct Exp2Series;
template <>
struct Exp2Series<float> {
    static constexpr float kTerms[] = {0.693147188026f,   0.240226507606f,   0.0555035711422f,
                                       0.00961808255728f, 0.00133908633647f, 0.000154531629451f};
};
template <>
struct Exp2Series<double> {
    static constexpr double kTerms[] = {6.931471805599453094e-01, 2.402265069591007123e-01, 5.550410866482157995e-02,
                                        9.618129107628477162e-03, 1.333355814642844342e-03, 1.540353039338160995e-04,
                                        1.525273380405984028e-05, 1.321548679014430949e-06, 1.017808600923969973e-07,
                                        7.054911620801123330e-09, 4.445538271870811498e-10, 2.567843599348820514e-11,
                                        1.369148885390412888e-12};
};

// 1 / (1 + exp(-x)), to 2 units in the last place and the rounding of log2(e) x. exp(-x) = 2^n 2^f, n the integer next to
// -log2(e) x: with powers of two, unlike those of e, the remainder f is a difference that rounds nothing more.
template <typename T, int kCount>
Vecs<T, kCount> sigmoid(const Vecs<T, kCount>& given) {
    using V = Vecs<T, kCount>;
    using Traits = ExpTraits<T>;
    constexpr const auto& kTerms = Exp2Series<T>::kTerms;
    constexpr int kCountOfTerms = sizeof(kTerms) / sizeof(T);
    const V x = V::each([&](int i) { return clamp_for_exp(given.v[i]); }), log2(T(-1.4426950408889634));
    const V shifted = x * log2 + V(Traits::kRound);
    const V f = x * log2 - (shifted - V(Traits::kRound));
    V series(kTerms[kCountOfTerms - 1]);
#pragma GCC unroll 16
    for (int k = kCountOfTerms - 2; k >= 0; --k) series = series * f + V(kTerms[k]);
    const V power =
        V::each([&](int i) { return from_bits<T>((bits_of(shifted.v[i]) + Traits::kBias) << Traits::kMantissaBits); });
    return V(T(1)) / (V(T(1)) + (power + power * (f * series)));
}

}  // namespace
}  // namespace dien_ops::cpu
