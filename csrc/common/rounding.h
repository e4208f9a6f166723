// SPDX-License-Identifier: Apache-2.0
// Stochastic rounding to the 16-bit formats of storage: one definition for both back ends. x becomes one of its two neighbours,
// the nearer the likelier, so that the mean of the result is x; what the format can represent stays as it is. An update that is
// smaller than half a step of the format would be lost for ever if it were rounded to the nearest.
//
// The noise is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011), a function of
// the seed and of the number's place in the table alone: neither of threads nor of what else is updated.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/number.h"

namespace dien_ops {

constexpr int kNumbersPerPhilox = 8;  // 16 bits for each

// Four words, or one of each of several counters that are encrypted side by side.
template <typename U>
struct PhiloxBlock {
    U word[4];
};

// The 64-bit product of a word and a constant, in halves. (Vectors have an overload of their own.)
DIEN_OPS_HOST_DEVICE inline uint32_t multiply_high(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

template <typename U>
DIEN_OPS_HOST_DEVICE inline PhiloxBlock<U> philox(PhiloxBlock<U> counter, uint64_t key) {
    constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    U* const c = counter.word;
    for (int round = 0; round < 10; ++round) {
        const U high0 = multiply_high(c[0], kMultiplier0), low0 = c[0] * kMultiplier0;
        const U high1 = multiply_high(c[2], kMultiplier1), low1 = c[2] * kMultiplier1;
        c[0] = high1 ^ c[1] ^ key0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ key1;
        c[3] = low0;
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return counter;
}

// The counter of the numbers d = 8 block .. 8 block + 7 of a row. Number d's noise is half d % 2 (0: the lower) of word
// d % 8 / 2 of the encrypted counter.
DIEN_OPS_HOST_DEVICE inline PhiloxBlock<uint32_t> noise_counter(int64_t row, int64_t block) {
    return {
        {static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), static_cast<uint32_t>(block), 0}};
}

// The 16 bits that x, the bits of a float, is rounded to with noise in 0..0xffff, in a word. U is uint32_t or a vector of them.
// A NaN stays one. Between the largest number and infinity, a BFloat16 goes to either as between any two neighbours, a Half to
// the nearest.
template <typename U>
DIEN_OPS_HOST_DEVICE inline U round_with_noise(U x, U noise, BFloat16) {
    const U magnitude = x & 0x7fffffff;
    const U rounded = (x + noise) >> 16;
    return magnitude > 0x7f800000 ? (x >> 16) | 0x40 : rounded;
}

template <typename U>
DIEN_OPS_HOST_DEVICE inline U round_with_noise(U x, U noise, Half) {
    const U magnitude = x & 0x7fffffff, sign = (x >> 16) & 0x8000;
    // From 2^-14 to 65504: 13 bits are dropped, a carry runs into the exponent, as it should.
    const U normal = (magnitude - (112u << 23) + (noise >> 3)) >> 13;
    // Below 2^-14, in steps of 2^-24: 16 binary digits after the point, what lies behind them is cut off.
    const U exponent = magnitude >> 23, mantissa = (magnitude & 0x7fffff) | 0x800000;  // x = mantissa 2^(exponent - 150)
    const U right = exponent > 110 ? 0 * x : 110 - exponent, left = exponent > 110 ? exponent - 110 : 0 * x;
    const U steps = right > 31 ? 0 * x : ((mantissa << (left > 2 ? 2 + 0 * x : left)) >> (right > 31 ? 31 + 0 * x : right));
    const U subnormal = (steps + noise) >> 16;
    const U finite = magnitude < 0x38800000 ? subnormal : normal;
    const U large = magnitude >= 0x477ff000 ? 0x7c00 + 0 * x : 0x7bff + 0 * x;  // beyond 65504: to the nearest
    const U number = magnitude > 0x477fe000 ? large : finite;
    return sign | (magnitude > 0x7f800000 ? 0x7e00 + 0 * x : number);
}

}  // namespace dien_ops
