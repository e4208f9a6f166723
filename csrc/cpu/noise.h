// SPDX-License-Identifier: Apache-2.0
// Stochastic rounding (common/rounding.h) by vectors. Only kernel files include this header.
#pragma once

#include <bit>

#include "common/rounding.h"
#include "cpu/scratch.h"
#include "cpu/storage.h"

namespace dien_ops::cpu {
namespace {

// A word of each of as many Philox counters as a vector has lanes.
struct Words {
    static constexpr int64_t kLanes = Vec<float>::kSize;
    Bits32 v;

    friend Words operator^(Words a, Words b) { return {a.v ^ b.v}; }
    friend Words operator^(Words a, uint32_t b) { return {a.v ^ b}; }
    friend Words operator*(Words a, uint32_t b) { return {a.v * b}; }
    // As a loop over lanes, in which the compiler sees that factors have 32 bits.
    friend Words multiply_high(Words a, uint32_t b) {
        uint32_t lanes[kLanes];
        std::memcpy(lanes, &a, sizeof(a));
        for (uint32_t& lane : lanes) lane = dien_ops::multiply_high(lane, b);
        std::memcpy(&a, lanes, sizeof(a));
        return a;
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
          halves_(round_up(rows_ * blocks_) * kNumbersPerPhilox) {}

    // The most rows that make() takes at once.
    int64_t rows() const { return rows_; }

    // row(i) is the number in the table of the i-th of `count` rows.
    template <typename Row>
    void make(int64_t count, Row&& row) {
        for (int64_t begin = 0; begin < count * blocks_; begin += Words::kLanes) {
            uint32_t counters[4][Words::kLanes];
            for (int64_t lane = 0; lane < Words::kLanes; ++lane) {
                const int64_t i = (begin + lane) / blocks_;
                const auto counter = noise_counter(row(i < count ? i : 0), (begin + lane) % blocks_);
                for (int word = 0; word < 4; ++word) counters[word][lane] = counter.word[word];
            }
            PhiloxBlock<Words> block;
            std::memcpy(&block, counters, sizeof(block));
            block = philox(block, seed_);
            std::memcpy(counters, &block, sizeof(block));
            uint32_t words[Words::kLanes][4];
            for (int64_t lane = 0; lane < Words::kLanes; ++lane) {
                for (int word = 0; word < 4; ++word) words[lane][word] = counters[word][lane];
            }
            std::memcpy(halves_ + begin * kNumbersPerPhilox, words, sizeof(words));
        }
    }

    // That of row i of those that were made: 16 bits for each of its numbers.
    const uint16_t* of(int64_t i) const { return halves_ + i * blocks_ * kNumbersPerPhilox; }

  private:
    static int64_t round_up(int64_t counters) { return (counters + Words::kLanes - 1) / Words::kLanes * Words::kLanes; }

    uint64_t seed_;
    int64_t blocks_, rows_;
    Scratch<uint16_t> halves_;
};

// Rounds the first n lanes of x to one of the neighbours that can be stored at p.
template <typename S>
void store_with_noise(Vec<float> x, S* p, int64_t n, const uint16_t* noise) {
    store_bits(narrow_bits(round_with_noise(bits_of(x), widen_bits(load_bits(noise, n)), S{})), &p->bits, n);
}

}  // namespace
}  // namespace dien_ops::cpu
