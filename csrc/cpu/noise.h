// SPDX-License-Identifier: Apache-2.0
// Stochastic rounding (common/rounding.h) by vectors. Only kernel files include this header.
#pragma once

#include <bit>

#include "common/rounding.h"
#include "cpu/scratch.h"
#include "cpu/storage.h"

namespace dien_ops::cpu {
namespace {

// The upper half of the product of each lane with b.
inline Bits32 high_products(Bits32 a, uint32_t b) {
#if defined(__AVX512F__)
    const __m512i x = (__m512i)a, factor = _mm512_set1_epi64(b);
    const __m512i even = _mm512_maskz_srli_epi64(0xff, _mm512_maskz_mul_epu32(0xff, x, factor), 32);
    const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, x, 32), factor);
    return (Bits32)_mm512_mask_mov_epi32(even, 0xaaaa, odd);
#elif defined(__AVX2__)
    const __m256i x = (__m256i)a, factor = _mm256_set1_epi64x(b);
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, factor), 32);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    return (Bits32)_mm256_blend_epi32(even, odd, 0xaa);
#else
    for (int64_t lane = 0; lane < Vec<float>::kSize; ++lane) a[lane] = multiply_high(a[lane], b);
    return a;
#endif
}

// A word of each of many Philox counters: several vectors, since one alone would wait for its own products most of the time.
struct Words {
    static constexpr int64_t kVectors = 4, kLanes = kVectors * Vec<float>::kSize;
    Bits32 v[kVectors];

    template <typename F>
    static Words each(F&& f) {
        return {f(0), f(1), f(2), f(3)};
    }
    friend Words operator^(const Words& a, const Words& b) {
        return each([&](int i) { return a.v[i] ^ b.v[i]; });
    }
    friend Words operator^(const Words& a, uint32_t b) {
        return each([&](int i) { return a.v[i] ^ b; });
    }
    friend Words operator*(const Words& a, uint32_t b) {
        return each([&](int i) { return a.v[i] * b; });
    }
    friend Words multiply_high(const Words& a, uint32_t b) {
        return each([&](int i) { return high_products(a.v[i], b); });
    }
};

// The noise of some rows, made for several at a time so that all lanes have a counter to work on.
class Noise {
    static_assert(std::endian::native == std::endian::little, "halves of words are read as 16-bit numbers");

  public:
    Noise(int64_t seed, int64_t dim)
        : seed_(static_cast<uint64_t>(seed)),
          blocks_((dim + kNumbersPerPhilox - 1) / kNumbersPerPhilox),
          rows_(blocks_ < Words::kLanes && blocks_ > 0 ? Words::kLanes / blocks_ : 1),
          counters_(4 * padded()),
          words_(4 * padded() + Vec<float>::kSize) {}

    // The most rows that make() takes at once.
    int64_t rows() const { return rows_; }

    // row(i) is the number in the table of the i-th of `count` rows.
    template <typename Row>
    void make(int64_t count, Row&& row) {
        uint32_t* lane = counters_;
        const int64_t stride = padded();
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t block = 0; block < blocks_; ++block, ++lane) {
                const PhiloxBlock<uint32_t> counter = noise_counter(row(i), block);
                for (int w = 0; w < 4; ++w) lane[w * stride] = counter.word[w];
            }
        }
        for (int64_t begin = 0; begin < count * blocks_; begin += Words::kLanes) {
            PhiloxBlock<Words> encrypted;
            for (int w = 0; w < 4; ++w) std::memcpy(&encrypted.word[w], counters_ + w * stride + begin, sizeof(Words));
            encrypted = philox(encrypted, seed_);
            uint32_t lanes[4][Words::kLanes];
            std::memcpy(lanes, &encrypted, sizeof(lanes));
            uint32_t* const to = words_ + 4 * begin;
            for (int64_t i = 0; i < Words::kLanes; ++i) {
                to[4 * i] = lanes[0][i], to[4 * i + 1] = lanes[1][i], to[4 * i + 2] = lanes[2][i], to[4 * i + 3] = lanes[3][i];
            }
        }
    }

    // That of row i of those that were made: two numbers' 16 bits in each word.
    const uint32_t* of(int64_t i) const { return words_ + 4 * i * blocks_; }

  private:
    int64_t padded() const { return (rows_ * blocks_ + Words::kLanes - 1) / Words::kLanes * Words::kLanes; }

    uint64_t seed_;
    int64_t blocks_, rows_;
    Scratch<uint32_t> counters_;  // [4, padded]: a counter's words lie apart
    Scratch<uint32_t> words_;     // [padded, 4]: encrypted; behind them room for a whole vector
};

// Rounds the first n lanes of x to one of the neighbours that can be stored at p. noise: of a whole vector of numbers.
template <typename S>
void store_with_noise(Vec<float> x, S* p, int64_t n, const uint32_t* noise) {
    Bits16 halves;
    std::memcpy(&halves, noise, sizeof(halves));
    store_bits(narrow_bits(round_with_noise(bits_of(x), widen_bits(halves), S{})), &p->bits, n);
}

}  // namespace
}  // namespace dien_ops::cpu
